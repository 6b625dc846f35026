"""The denoisers, written by hand with the official tensor names.

    MMDiT   Stable Diffusion 3.5 (Large; Medium with a second attention), and the embedded teacher
    Flux    FLUX.1-dev and FLUX.1-schnell; silence_guidance makes of dev what a student is

Called as `net(x_t, t, cond)`: latents in, prediction out, both (B, C, H, W). Patches, positions and
the factor 1000 on time stay in here; `net.schedule` says what the prediction means. A network casts
its inputs to the dtype of its weights, and its prediction to that of x_t; time stays in fp32 until
it is embedded. `net.blocks()` lists the transformer blocks, for whoever shards or recomputes them
from outside.

B batch, C H W latent, P patch, L image tokens, T text tokens, D width, N heads.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.layers import attention, time_embedding
from schedule import Cond, Flow


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, L, 3 D) -> q, k, v as (3, B, N, L, D / N)."""
    return qkv.unflatten(-1, (3, heads, -1)).movedim(2, 0).transpose(2, 3)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The layer norm's missing affine, chosen by time and text. x (B, L, D), the others (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def norm(x: Tensor) -> Tensor:
    """Layer norm without affine; `modulate` supplies one."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Over a head's channels, in the dtype of x (under autocast the weight's is wider)."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps=1e-6).to(x.dtype)


def count_patches(x_t: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in (B, C, H, W)."""
    height, width = x_t.shape[-2:]
    assert height % patch == 0 and width % patch == 0, (
        f"latents are cut into {patch} x {patch} patches, got {height} x {width}"
    )
    return height // patch, width // patch


# --- parts ---------------------------------------------------------------------------------------


class Embedder(nn.Module):
    """Two linear layers around SiLU; `mlp.0`, `mlp.2` in the official files."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.to(self.mlp[0].weight.dtype))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, L, D)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.RMSNorm):
    """`rms_norm` with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Attention(nn.Module):
    """q, k, v with q/k RMS norm per head, and the output projection.

    The attending itself is joint, so it is outside.
    """

    def __init__(self, width: int, heads: int, project: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q, self.ln_k = RMSNorm(width // heads), RMSNorm(width // heads)
        if project:
            self.proj = nn.Linear(width, width)

    def q_k_v(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> three times (B, N, L, D / N)."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """One stream's half of a joint block.

    The modulation gives shift, scale, gate for the attention, then for the MLP; with `dual`
    (Medium's first blocks) three more for a second attention over the image alone. The last text
    block has only shift and scale: nothing reads on.
    """

    def __init__(self, width: int, heads: int, dual: bool = False, last_text: bool = False):
        super().__init__()
        self.dual, self.last_text = dual, last_text
        self.attn = Attention(width, heads, project=not last_text)
        self.chunks = 2 if last_text else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))
        if dual:
            self.attn2 = Attention(width, heads)
        if not last_text:
            self.mlp = MLP(width, 4 * width)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(c).chunk(self.chunks, dim=-1)

    def finish(self, x: Tensor, attended: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        """The residual additions after the joint attention."""
        gate, shift_mlp, scale_mlp, gate_mlp = mod[2:6]
        normed = norm(x)  # both attentions read the same x
        x = x + gate[:, None] * self.attn.proj(attended)
        if self.dual:
            shift_2, scale_2, gate_2 = mod[6:9]
            own = attention(*self.attn2.q_k_v(modulate(normed, shift_2, scale_2)))
            x = x + gate_2[:, None] * self.attn2.proj(own)
        return x + gate_mlp[:, None] * self.mlp(modulate(norm(x), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """Text and image attend to each other in one attention, with weights of their own (SD3, Sec.
    4).
    """

    def __init__(self, width: int, heads: int, dual: bool, last: bool):
        super().__init__()
        self.context_block = StreamBlock(width, heads, last_text=last)
        self.x_block = StreamBlock(width, heads, dual=dual)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, T, D), x (B, L, D), c (B, D) -> context, x."""
        mod_text, mod_image = self.context_block.modulation(c), self.x_block.modulation(c)
        text = self.context_block.attn.q_k_v(modulate(norm(context), *mod_text[:2]))
        image = self.x_block.attn.q_k_v(modulate(norm(x), *mod_image[:2]))
        joint = attention(*(torch.cat(pair, dim=2) for pair in zip(text, image, strict=True)))
        attended_text, attended_image = joint.split([context.shape[1], x.shape[1]], dim=1)
        if not self.context_block.last_text:
            context = self.context_block.finish(context, attended_text, mod_text)
        return context, self.x_block.finish(x, attended_image, mod_image)


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(norm(x), shift, scale))


# --- MM-DiT --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MMDiTConfig:
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    context_width: int  # of the text tokens
    pooled_width: int  # of the pooled text vector
    table: int  # the position table has table x table entries
    dual_blocks: int = 0  # the first blocks with a second attention


class MMDiT(nn.Module):
    """The multimodal diffusion transformer of SD 3.5.

    cond: context (B, T, context_width), pooled (B, pooled_width). The prediction has the dtype of
    x_t.
    """

    def __init__(self, cfg: MMDiTConfig, schedule: Flow):
        super().__init__()
        self.cfg, self.schedule = cfg, schedule
        self.x_embedder = PatchEmbed(cfg.patch, cfg.channels, cfg.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.table**2, cfg.width))
        self.t_embedder = Embedder(256, cfg.width)
        self.y_embedder = Embedder(cfg.pooled_width, cfg.width)
        self.context_embedder = nn.Linear(cfg.context_width, cfg.width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(cfg.width, cfg.heads, dual=i < cfg.dual_blocks, last=i == cfg.depth - 1)
            for i in range(cfg.depth)
        )
        self.final_layer = FinalLayer(cfg.width, cfg.patch, cfg.channels)

    def blocks(self) -> list[nn.Module]:
        return list(self.joint_blocks)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The centre of the position table, (1, rows columns, D)."""
        top, left = (self.cfg.table - rows) // 2, (self.cfg.table - columns) // 2
        table = self.pos_embed.unflatten(1, (self.cfg.table, self.cfg.table))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows, columns = count_patches(x_t, self.cfg.patch)
        assert max(rows, columns) <= self.cfg.table, (
            f"at most {self.cfg.table} patches a side, got {rows} x {columns}"
        )
        dtype = self.pos_embed.dtype
        x = self.x_embedder(x_t.to(dtype))
        x = x + self.positions(rows, columns).to(x.dtype)  # (B, L, D)
        context = self.context_embedder(cond["context"].to(dtype))  # (B, T, D)
        c = self.embed(t, cond)  # (B, D)
        for block in self.joint_blocks:
            context, x = block(context, x, c)
        return self.unpatchify(self.final_layer(x, c), rows, columns).to(x_t.dtype)

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Time and pooled text as one vector (B, D)."""
        return self.t_embedder(time_embedding(1000 * t)) + self.y_embedder(cond["pooled"])

    def unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.cfg.patch
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
        x = x.movedim(-1, 1).transpose(3, 4)  # (B, rows, columns, P, P, C) -> (B, C, rows, P, ...)
        return x.flatten(4).flatten(2, 3)  # -> (B, C, rows P, columns P)


# --- FLUX.1 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FluxConfig:
    guidance: bool  # the guidance scale is an input (dev), or there is none (schnell)
    patch: int = 2
    channels: int = 16
    width: int = 3072
    heads: int = 24
    double: int = 19  # blocks in which text and image have weights of their own
    single: int = 38  # blocks on the joined sequence
    mlp_ratio: int = 4
    context_width: int = 4096  # of the text tokens (T5)
    pooled_width: int = 768  # of the pooled text vector (CLIP-L)
    axes: tuple[int, ...] = (16, 56, 56)  # a head's channels turned by 0, by row and by column
    theta: float = 1e4


def rotations(
    rows: int, columns: int, tokens: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T + L, D / N / 2) of the rotary position embedding, in fp32.

    A pair of channels turns by position times rate. Text comes first, at angle 0; a patch is at
    (0, row, column), and each of the three has its share of the pairs.
    """
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    row, column = torch.meshgrid(row, column, indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)  # (L, 3)
    places = F.pad(places, (0, 0, tokens, 0)).double()  # (T + L, 3)
    angles = []
    for place, axis in zip(places.unbind(-1), axes, strict=True):
        rates = theta ** (-torch.arange(0, axis, 2, dtype=torch.float64, device=device) / axis)
        angles.append(place[:, None] * rates)
    angles = torch.cat(angles, dim=-1)  # (T + L, D / N / 2)
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=8)
def kept_rotations(*where) -> tuple[Tensor, Tensor]:
    """`rotations`, computed once per size and device; as ordinary tensors, which can be trained
    with even if they were first asked for in inference mode."""
    with torch.inference_mode(False):
        return rotations(*where)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of neighbouring channels by its position's angle. x (B, N, L, D / N)."""
    cos, sin = rope
    assert cos.dtype == torch.float32, f"positions must stay in fp32, got {cos.dtype}"
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, L, D / N / 2) each
    turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    return turned.flatten(-2).to(x.dtype)  # bf16 times fp32 was fp32


class FluxEmbedder(nn.Module):
    """`Embedder` under FLUX's names."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width_in, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class Modulation(nn.Module):
    """Time and text (B, D) -> `chunks` vectors (B, D): shift, scale, gate, once or twice."""

    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.chunks, self.lin = chunks, nn.Linear(width, chunks * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(c)).chunk(self.chunks, dim=-1)


class HeadNorm(nn.Module):
    """`RMSNorm` under FLUX's names."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = HeadNorm(dim), HeadNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k), v


class FluxAttention(nn.Module):
    """`Attention` under FLUX's names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = QKNorm(width // heads)

    def q_k_v(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> three times (B, N, L, D / N)."""
        return self.norm(*split_heads(self.qkv(x), self.heads))


class DoubleBlock(nn.Module):
    """Text and image attend to each other, with weights of their own: `JointBlock` with rotary
    positions, under FLUX's names."""

    def __init__(self, cfg: FluxConfig):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(cfg.width, 6), Modulation(cfg.width, 6)
        self.img_attn, self.txt_attn = (FluxAttention(cfg.width, cfg.heads) for _ in range(2))
        self.img_mlp, self.txt_mlp = (self.mlp(cfg.width, cfg.mlp_ratio) for _ in range(2))

    @staticmethod
    def mlp(width: int, ratio: int) -> nn.Sequential:
        wide, narrow = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        return nn.Sequential(wide, nn.GELU(approximate="tanh"), narrow)

    def forward(
        self, context: Tensor, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """context (B, T, D), x (B, L, D), c (B, D) -> context, x."""
        mod_text, mod_image = self.txt_mod(c), self.img_mod(c)
        text = self.txt_attn.q_k_v(modulate(norm(context), *mod_text[:2]))
        image = self.img_attn.q_k_v(modulate(norm(x), *mod_image[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
        joint = attention(rotate(q, rope), rotate(k, rope), v)
        attended_text, attended_image = joint.split([context.shape[1], x.shape[1]], dim=1)
        context = self.finish(context, self.txt_attn.proj(attended_text), self.txt_mlp, mod_text)
        return context, self.finish(x, self.img_attn.proj(attended_image), self.img_mlp, mod_image)

    @staticmethod
    def finish(x: Tensor, attended: Tensor, mlp: nn.Module, mod: tuple[Tensor, ...]) -> Tensor:
        """The residual additions after the joint attention."""
        gate, shift_mlp, scale_mlp, gate_mlp = mod[2:6]
        x = x + gate[:, None] * attended
        return x + gate_mlp[:, None] * mlp(modulate(norm(x), shift_mlp, scale_mlp))


class SingleBlock(nn.Module):
    """Attention and MLP side by side on text and image joined.

    One linear layer makes q, k, v and the MLP's hidden channels, another takes what attention and
    activation made of them.
    """

    def __init__(self, cfg: FluxConfig):
        super().__init__()
        hidden = cfg.mlp_ratio * cfg.width
        self.heads, self.sizes = cfg.heads, [3 * cfg.width, hidden]
        self.modulation = Modulation(cfg.width, 3)
        self.linear1 = nn.Linear(cfg.width, sum(self.sizes))
        self.linear2 = nn.Linear(cfg.width + hidden, cfg.width)
        self.norm = QKNorm(cfg.width // cfg.heads)

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T + L, D), c (B, D) -> x."""
        shift, scale, gate = self.modulation(c)
        qkv, hidden = self.linear1(modulate(norm(x), shift, scale)).split(self.sizes, dim=-1)
        q, k, v = self.norm(*split_heads(qkv, self.heads))
        attended = attention(rotate(q, rope), rotate(k, rope), v)  # (B, T + L, D)
        both = torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1)
        return x + gate[:, None] * self.linear2(both)


class Flux(nn.Module):
    """The transformer of FLUX.1.

    cond: context (B, T, context_width), pooled (B, pooled_width) and, with cfg.guidance, guidance
    (B,), the scale as it is. Where guidance is absent its embedding is not added, which is what a
    silenced embedder gives: a student has no such input. The prediction has the dtype of x_t.
    """

    def __init__(self, cfg: FluxConfig, schedule: Flow):
        super().__init__()
        assert sum(cfg.axes) * cfg.heads == cfg.width, (
            f"positions turn every channel of a head: {cfg.axes} for {cfg.width} / {cfg.heads}"
        )
        self.cfg, self.schedule = cfg, schedule
        self.img_in = nn.Linear(cfg.channels * cfg.patch**2, cfg.width)
        self.txt_in = nn.Linear(cfg.context_width, cfg.width)
        self.time_in = FluxEmbedder(256, cfg.width)
        self.vector_in = FluxEmbedder(cfg.pooled_width, cfg.width)
        if cfg.guidance:
            self.guidance_in = FluxEmbedder(256, cfg.width)
        self.double_blocks = nn.ModuleList(DoubleBlock(cfg) for _ in range(cfg.double))
        self.single_blocks = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.single))
        self.final_layer = FinalLayer(cfg.width, cfg.patch, cfg.channels)

    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows, columns = count_patches(x_t, self.cfg.patch)
        dtype = self.img_in.weight.dtype
        x = self.img_in(self.pack(x_t, rows, columns).to(dtype))  # (B, L, D)
        context = self.txt_in(cond["context"].to(dtype))  # (B, T, D)
        c = self.embed(t, cond)  # (B, D)
        where = (rows, columns, context.shape[1], self.cfg.axes, self.cfg.theta, x.device)
        # a compiled graph holds the table itself, and cannot look into the cache
        rope = rotations(*where) if torch.compiler.is_compiling() else kept_rotations(*where)
        for block in self.double_blocks:
            context, x = block(context, x, c, rope)
        joined = torch.cat([context, x], dim=1)  # (B, T + L, D)
        for block in self.single_blocks:
            joined = block(joined, c, rope)
        v = self.final_layer(joined[:, context.shape[1] :], c)
        return self.unpack(v, rows, columns).to(x_t.dtype)

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Time, pooled text and guidance as one vector (B, D)."""
        c = self.time_in(time_embedding(1000 * t)) + self.vector_in(cond["pooled"])
        if "guidance" not in cond:
            return c
        assert self.cfg.guidance, "this network takes no guidance scale (FLUX.1-schnell)"
        return c + self.guidance_in(time_embedding(1000 * cond["guidance"]))

    def pack(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.cfg.patch
        x = x.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (B, C, rows, P, cols, P)
        return x.movedim((2, 4), (1, 2)).flatten(3).flatten(1, 2)  # -> (B, L, C P P)

    def unpack(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.cfg.patch
        x = x.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))
        x = x.movedim((1, 2), (2, 4))  # (B, rows, columns, C, P, P) -> (B, C, rows, P, columns, P)
        return x.flatten(4).flatten(2, 3)  # -> (B, C, rows P, columns P)


def silence_guidance(net: Flux) -> None:
    """Makes a student of FLUX.1-dev: guidance has no effect, yet every official tensor is there.

    The last layer of the guidance embedder becomes zero, so its output is zero whatever the scale;
    the whole embedder is frozen (no gradient passes a zero layer).
    """
    if net.cfg.guidance:
        net.guidance_in.requires_grad_(False)
        for parameter in net.guidance_in.out_layer.parameters():
            parameter.zero_()
