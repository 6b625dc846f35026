"""The denoisers of the FLUX family, written by hand with the official tensor names.

    Flux    FLUX.1-dev and FLUX.1-schnell; silence_guidance makes of dev what a student is
    Flux2   FLUX.2 [klein]

What the second generation changed: no biases; no pooled text and no guidance as input; one
modulation for all blocks instead of one in each; a gated MLP; text has positions; and the latents
come folded 2 x 2 from the autoencoder, so that a patch is one of them.

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

# --- parts ---------------------------------------------------------------------------------------

Rope = tuple[Tensor, Tensor]  # cosines and sines, (T + L, D / N / 2) each, in fp32
Mod = tuple[Tensor, ...]  # shift, scale, gate, (B, D) each; in a double block again for the MLP


def places(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """(T + L, 4) where each token is: text at (0, 0, 0, its index), a patch at (0, row, column, 0).

    FLUX.1 knows the first three of them, in which all text is at one place.
    """
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    row, column = torch.meshgrid(row, column, indexing="ij")
    nowhere = torch.zeros_like(row)
    patches = torch.stack([nowhere, row, column, nowhere], dim=-1).flatten(0, 1)  # (L, 4)
    text = F.pad(torch.arange(tokens, device=device)[:, None], (3, 0))  # (T, 4)
    return torch.cat([text, patches])


def turned(
    rows: int, columns: int, tokens: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> Rope:
    """The `rotations` of text and image."""
    where = places(rows, columns, tokens, device)[:, : len(axes)]
    return rotations(where, axes, theta)


@lru_cache(maxsize=8)
def kept_rotations(*where) -> Rope:
    """`turned`, computed once per size and device; as ordinary tensors, which can be trained with
    even if they were first asked for in inference mode."""
    with torch.inference_mode(False):
        return turned(*where)


def positions(cfg, rows: int, columns: int, context: Tensor) -> Rope:
    """For a network of these sizes. A compiled graph holds the table itself, and cannot look into
    the cache."""
    where = (rows, columns, context.shape[1], cfg.axes, cfg.theta, context.device)
    return turned(*where) if torch.compiler.is_compiling() else kept_rotations(*where)


def check_axes(cfg) -> None:
    assert sum(cfg.axes) * cfg.heads == cfg.width, (
        f"positions turn every channel of a head: {cfg.axes} for {cfg.width} / {cfg.heads}"
    )


def pack(x: Tensor, rows: int, columns: int) -> Tensor:
    x = x.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (B, C, rows, P, columns, P)
    return x.movedim((2, 4), (1, 2)).flatten(3).flatten(1, 2)  # -> (B, L, C P P)


def unpack(x: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    x = x.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))
    x = x.movedim((1, 2), (2, 4))  # (B, rows, columns, C, P, P) -> (B, C, rows, P, columns, P)
    return x.flatten(4).flatten(2, 3)  # -> (B, C, rows P, columns P)


class FluxEmbedder(nn.Module):
    """Two linear layers around SiLU."""

    def __init__(self, width_in: int, width: int, bias: bool = True):
        super().__init__()
        self.in_layer = nn.Linear(width_in, width, bias=bias)
        self.out_layer = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class Modulation(nn.Module):
    """Time and text (B, D) -> `chunks` vectors (B, D): shift, scale, gate, once or twice."""

    def __init__(self, width: int, chunks: int, bias: bool = True):
        super().__init__()
        self.chunks, self.lin = chunks, nn.Linear(width, chunks * width, bias=bias)

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

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.norm = QKNorm(width // heads)

    def q_k_v(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> three times (B, N, L, D / N)."""
        return self.norm(*split_heads(self.qkv(x), self.heads))


def double_stream(
    block: nn.Module, context: Tensor, x: Tensor, mod_text: Mod, mod_image: Mod, rope: Rope
) -> tuple[Tensor, Tensor]:
    """What the double blocks of both generations do: text and image attend to each other, with
    weights of their own. context (B, T, D), x (B, L, D) -> context, x.
    """
    text = block.txt_attn.q_k_v(modulate(norm(context), *mod_text[:2]))
    image = block.img_attn.q_k_v(modulate(norm(x), *mod_image[:2]))
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
    joint = attention(rotate(q, rope), rotate(k, rope), v)
    attended_text, attended_image = joint.split([context.shape[1], x.shape[1]], dim=1)
    context = finish(context, block.txt_attn.proj(attended_text), block.txt_mlp, mod_text)
    return context, finish(x, block.img_attn.proj(attended_image), block.img_mlp, mod_image)


def finish(x: Tensor, attended: Tensor, mlp: nn.Module, mod: Mod) -> Tensor:
    """The residual additions after the joint attention."""
    gate, shift_mlp, scale_mlp, gate_mlp = mod[2:6]
    x = x + gate[:, None] * attended
    return x + gate_mlp[:, None] * mlp(modulate(norm(x), shift_mlp, scale_mlp))


def single_stream(block: nn.Module, x: Tensor, mod: Mod, rope: Rope) -> Tensor:
    """What the single blocks of both generations do: attention and MLP side by side on text and
    image joined, x (B, T + L, D) -> x.

    One linear layer makes q, k, v and the MLP's hidden channels, another takes what attention and
    activation made of them.
    """
    shift, scale, gate = mod
    qkv, hidden = block.linear1(modulate(norm(x), shift, scale)).split(block.sizes, dim=-1)
    q, k, v = block.norm(*split_heads(qkv, block.heads))
    attended = attention(rotate(q, rope), rotate(k, rope), v)  # (B, T + L, D)
    both = torch.cat([attended, block.activation(hidden)], dim=-1)
    return x + gate[:, None] * block.linear2(both)


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

    def forward(self, context: Tensor, x: Tensor, c: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """context (B, T, D), x (B, L, D), c (B, D) -> context, x."""
        return double_stream(self, context, x, self.txt_mod(c), self.img_mod(c), rope)


class SingleBlock(nn.Module):
    """Text and image joined, with the same weights."""

    def __init__(self, cfg: FluxConfig):
        super().__init__()
        hidden = cfg.mlp_ratio * cfg.width
        self.heads, self.sizes = cfg.heads, [3 * cfg.width, hidden]
        self.modulation = Modulation(cfg.width, 3)
        self.linear1 = nn.Linear(cfg.width, sum(self.sizes))
        self.linear2 = nn.Linear(cfg.width + hidden, cfg.width)
        self.norm, self.activation = QKNorm(cfg.width // cfg.heads), nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, c: Tensor, rope: Rope) -> Tensor:
        """x (B, T + L, D), c (B, D) -> x."""
        return single_stream(self, x, self.modulation(c), rope)


class Flux(nn.Module):
    """The transformer of FLUX.1.

    cond: context (B, T, context_width), pooled (B, pooled_width) and, with cfg.guidance, guidance
    (B,), the scale as it is. Where guidance is absent its embedding is not added, which is what a
    silenced embedder gives: a student has no such input. The prediction has the dtype of x_t.
    """

    def __init__(self, cfg: FluxConfig, schedule: Flow):
        super().__init__()
        check_axes(cfg)
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
        x = self.img_in(pack(x_t, rows, columns).to(dtype))  # (B, L, D)
        context = self.txt_in(cond["context"].to(dtype))  # (B, T, D)
        c = self.embed(t, cond)  # (B, D)
        rope = positions(self.cfg, rows, columns, context)
        for block in self.double_blocks:
            context, x = block(context, x, c, rope)
        joined = torch.cat([context, x], dim=1)  # (B, T + L, D)
        for block in self.single_blocks:
            joined = block(joined, c, rope)
        v = self.final_layer(joined[:, context.shape[1] :], c)
        return unpack(v, rows, columns, self.cfg.patch).to(x_t.dtype)

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Time, pooled text and guidance as one vector (B, D)."""
        c = self.time_in(time_embedding(1000 * t)) + self.vector_in(cond["pooled"])
        if "guidance" not in cond:
            return c
        assert self.cfg.guidance, "this network takes no guidance scale (FLUX.1-schnell)"
        return c + self.guidance_in(time_embedding(1000 * cond["guidance"]))


def silence_guidance(net: Flux) -> None:
    """Makes a student of FLUX.1-dev: guidance has no effect, yet every official tensor is there.

    The last layer of the guidance embedder becomes zero, so its output is zero whatever the scale;
    the whole embedder is frozen (no gradient passes a zero layer).
    """
    if net.cfg.guidance:
        net.guidance_in.requires_grad_(False)
        for parameter in net.guidance_in.out_layer.parameters():
            parameter.zero_()


# --- FLUX.2 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flux2Config:
    patch: int = 1
    channels: int = 128  # 32 of the autoencoder's, folded 2 x 2
    width: int = 3072
    heads: int = 24
    double: int = 5
    single: int = 20
    mlp_ratio: int = 3
    context_width: int = 7680  # of the text tokens: three states of Qwen3
    axes: tuple[int, ...] = (32, 32, 32, 32)  # turned by 0, by row, by column, by index of the text
    theta: float = 2e3


class SwiGLU(nn.Module):
    """Half of the channels, gated by SiLU of the other half, the first."""

    def forward(self, x: Tensor) -> Tensor:
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class Flux2DoubleBlock(nn.Module):
    """`DoubleBlock` with a gated MLP; its modulation is handed in."""

    def __init__(self, cfg: Flux2Config):
        super().__init__()
        width, heads = cfg.width, cfg.heads
        self.img_attn, self.txt_attn = (FluxAttention(width, heads, bias=False) for _ in range(2))
        self.img_mlp, self.txt_mlp = (self.mlp(width, cfg.mlp_ratio) for _ in range(2))

    @staticmethod
    def mlp(width: int, ratio: int) -> nn.Sequential:
        wide = nn.Linear(width, 2 * ratio * width, bias=False)
        return nn.Sequential(wide, SwiGLU(), nn.Linear(ratio * width, width, bias=False))

    def forward(
        self, context: Tensor, x: Tensor, mods: tuple[Mod, Mod], rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """context (B, T, D), x (B, L, D), mods of text and image -> context, x."""
        return double_stream(self, context, x, *mods, rope)


class Flux2SingleBlock(nn.Module):
    """`SingleBlock` with a gated MLP; its modulation is handed in."""

    def __init__(self, cfg: Flux2Config):
        super().__init__()
        hidden = cfg.mlp_ratio * cfg.width
        self.heads, self.sizes = cfg.heads, [3 * cfg.width, 2 * hidden]
        self.linear1 = nn.Linear(cfg.width, sum(self.sizes), bias=False)
        self.linear2 = nn.Linear(cfg.width + hidden, cfg.width, bias=False)
        self.norm, self.activation = QKNorm(cfg.width // cfg.heads), SwiGLU()

    def forward(self, x: Tensor, mod: Mod, rope: Rope) -> Tensor:
        """x (B, T + L, D) -> x."""
        return single_stream(self, x, mod, rope)


class Flux2(nn.Module):
    """The transformer of FLUX.2 [klein].

    cond: context (B, T, context_width), every token of it, padding too. Nothing is told of text but
    its tokens; guidance is classifier-free. The prediction has the dtype of x_t.
    """

    def __init__(self, cfg: Flux2Config, schedule: Flow):
        super().__init__()
        check_axes(cfg)
        self.cfg, self.schedule = cfg, schedule
        self.img_in = nn.Linear(cfg.channels * cfg.patch**2, cfg.width, bias=False)
        self.txt_in = nn.Linear(cfg.context_width, cfg.width, bias=False)
        self.time_in = FluxEmbedder(256, cfg.width, bias=False)
        self.double_stream_modulation_img = Modulation(cfg.width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(cfg.width, 6, bias=False)
        self.single_stream_modulation = Modulation(cfg.width, 3, bias=False)
        self.double_blocks = nn.ModuleList(Flux2DoubleBlock(cfg) for _ in range(cfg.double))
        self.single_blocks = nn.ModuleList(Flux2SingleBlock(cfg) for _ in range(cfg.single))
        self.final_layer = FinalLayer(cfg.width, cfg.patch, cfg.channels, bias=False)

    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows, columns = count_patches(x_t, self.cfg.patch)
        dtype = self.img_in.weight.dtype
        x = self.img_in(pack(x_t, rows, columns).to(dtype))  # (B, L, D)
        context = self.txt_in(cond["context"].to(dtype))  # (B, T, D)
        c = self.time_in(time_embedding(1000 * t))  # (B, D)
        mods = self.double_stream_modulation_txt(c), self.double_stream_modulation_img(c)
        mod = self.single_stream_modulation(c)
        rope = positions(self.cfg, rows, columns, context)
        for block in self.double_blocks:
            context, x = block(context, x, mods, rope)
        joined = torch.cat([context, x], dim=1)  # (B, T + L, D)
        for block in self.single_blocks:
            joined = block(joined, mod, rope)
        v = self.final_layer(joined[:, context.shape[1] :], c)
        return unpack(v, rows, columns, self.cfg.patch).to(x_t.dtype)
