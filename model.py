"""The denoisers of the FLUX family, written by hand with the official tensor names.

    Flux    FLUX.1-dev and FLUX.1-schnell; silence_guidance makes of dev what a student is

Called as `net(x_t, t, cond)`: latents in, prediction out, both (B, C, H, W). Patches, positions and
the factor 1000 on time stay in here; `net.schedule` says what the prediction means. A network casts
its inputs to the dtype of its weights, and its prediction to that of x_t; time stays in fp32 until
it is embedded. `net.blocks()` lists the transformer blocks, for whoever shards or recomputes them
from outside. nets/mmdit.py and nets/unet.py have the denoisers of Stable Diffusion.

B batch, C H W latent, P patch, L image tokens, T text tokens, D width, N heads.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.layers import (
    FinalLayer,
    attention,
    count_patches,
    modulate,
    norm,
    rms_norm,
    rotate,
    rotations,
    split_heads,
    time_embedding,
)
from schedule import Cond, Flow

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


def places(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """(T + L, 3): text first, all of it at 0; then patches, each at (0, row, column)."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    row, column = torch.meshgrid(row, column, indexing="ij")
    patches = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)  # (L, 3)
    return F.pad(patches, (0, 0, tokens, 0))


def turned(
    rows: int, columns: int, tokens: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The `rotations` of text and image."""
    return rotations(places(rows, columns, tokens, device), axes, theta)


@lru_cache(maxsize=8)
def kept_rotations(*where) -> tuple[Tensor, Tensor]:
    """`turned`, computed once per size and device; as ordinary tensors, which can be trained with
    even if they were first asked for in inference mode."""
    with torch.inference_mode(False):
        return turned(*where)


class FluxEmbedder(nn.Module):
    """Two linear layers around SiLU."""

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
    """`rms_norm` with its weight."""

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
    """q, k, v with q/k RMS norm per head, and the output projection.

    The attending itself is joint, so it is outside.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = QKNorm(width // heads)

    def q_k_v(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> three times (B, N, L, D / N)."""
        return self.norm(*split_heads(self.qkv(x), self.heads))


class DoubleBlock(nn.Module):
    """Text and image attend to each other, with weights of their own."""

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
        rope = turned(*where) if torch.compiler.is_compiling() else kept_rotations(*where)
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
