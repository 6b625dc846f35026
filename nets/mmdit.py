"""MM-DiT, the transformer of Stable Diffusion 3.5, written by hand with the official tensor names.

    MMDiT   Large; Medium with a second attention; small: the embedded teacher

Called as `net(x_t, t, cond)`, like the denoisers in model.py.

B batch, C H W latent, P patch, L image tokens, T text tokens, D width, N heads.
"""

from dataclasses import dataclass

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
    split_heads,
    time_embedding,
)

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


# --- the network ---------------------------------------------------------------------------------


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

    def __init__(self, cfg: MMDiTConfig, schedule):
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

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
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

    def embed(self, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Time and pooled text as one vector (B, D)."""
        return self.t_embedder(time_embedding(1000 * t)) + self.y_embedder(cond["pooled"])

    def unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.cfg.patch
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
        x = x.movedim(-1, 1).transpose(3, 4)  # (B, rows, columns, P, P, C) -> (B, C, rows, P, ...)
        return x.flatten(4).flatten(2, 3)  # -> (B, C, rows P, columns P)
