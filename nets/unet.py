"""The UNet of SDXL and SD 1.5, with the official tensor names.

Called as `net(x_t, t, cond)`: latents in, predicted noise out, both (B, C, H, W). The index that
the network knows times by stays in here; `net.schedule` says what the prediction means, and which
index a time has. `net.blocks()` lists what to shard or recompute from outside.

From the full resolution down to the lowest each level has residual blocks, each followed by a
transformer where the level has one, which attends to the image and then to the text. On the way up
every block also reads what its counterpart made on the way down.

B batch, C H W latent or feature map, L = H W image tokens, T text tokens, D width, N heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.layers import attention, per_head, time_embedding

# --- parts ---------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Two convolutions; time and text shift the channels between them."""

    def __init__(self, width_in: int, width: int, embedding: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, width_in, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(width_in, width, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, width, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # where the names leave a place for dropout
            nn.Conv2d(width, width, 3, padding=1),
        )
        same = width_in == width
        self.skip_connection = nn.Identity() if same else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(c)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, L, D) attends to context (B, T, context_width) -> (B, L, D)."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(*(per_head(part, self.heads) for part in (q, k, v))))


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        narrow = nn.Linear(4 * width, width)
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """The image attends to itself, then to the text."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_width, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """`depth` blocks on the places of a feature map, between two projections.

    SDXL stores the projections as linear layers, SD 1.5 as 1x1 convolutions: the same map.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, depth: int, linear: bool, groups: int
    ):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, context_width, heads) for _ in range(depth)
        )

    def project(self, x: Tensor, layer: nn.Module) -> Tensor:
        """x (B, L, D) -> the same shape."""
        if self.linear:
            return layer(x)
        if isinstance(layer, nn.Conv2d):
            return F.linear(x, layer.weight.flatten(1), layer.bias)
        return layer(x.mT[..., None])[..., 0].mT  # a convolution with an adapter

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, L, D)
        tokens = self.project(tokens, self.proj_in)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.project(tokens, self.proj_out)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, L, D) -> (B, C, H, W)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """Parts in a row; residual blocks also read time, transformers the text."""

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, c)
            elif isinstance(part, Transformer):
                x = part(x, context)
            else:
                x = part(x)
        return x


def embedder(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


# --- the network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetConfig:
    multipliers: tuple[int, ...]  # of the width, per level; each level but the first halves H and W
    depths: tuple[int, ...]  # transformer blocks after a residual block, per level
    middle: int  # transformer blocks in the middle
    context_width: int  # of the text tokens
    pooled_width: int = 0  # of the vector of pooled text and sizes; 0: there is none
    heads: int = 0  # in every attention; 0: as many as give each `head` channels
    head: int = 0
    linear: bool = True  # how the projections around the transformers are stored
    channels: int = 4
    width: int = 320  # at the full resolution
    blocks: int = 2  # residual blocks per level on the way down, one more on the way up
    groups: int = 32  # of the group norms


UNETS = {
    "sdxl": UNetConfig(
        multipliers=(1, 2, 4),
        depths=(0, 2, 10),
        middle=10,
        context_width=2048,
        pooled_width=2816,
        head=64,
    ),
    "sd15": UNetConfig(
        multipliers=(1, 2, 4, 4),
        depths=(1, 1, 1, 0),
        middle=1,
        context_width=768,
        heads=8,
        linear=False,
    ),
}


class UNet(nn.Module):
    """cond: context (B, T, context_width) and, with cfg.pooled_width, pooled (B, pooled_width).

    SDXL's pooled is the pooled text followed by the embedded sizes (see SDXLText). The schedule,
    a DDPM, is handed in; its `index` is what the network is told of t. Computes in the dtype of its
    weights; the prediction has the dtype of x_t.
    """

    def __init__(self, cfg: UNetConfig, schedule):
        super().__init__()
        self.cfg, self.schedule = cfg, schedule
        self.divisor = 2 ** (len(cfg.multipliers) - 1)  # of the latent's sides
        self.time_embed = embedder(cfg.width, 4 * cfg.width)
        if cfg.pooled_width:
            self.label_emb = nn.Sequential(embedder(cfg.pooled_width, 4 * cfg.width))
        levels = [
            (cfg.width * m, depth) for m, depth in zip(cfg.multipliers, cfg.depths, strict=True)
        ]
        conv_in = nn.Conv2d(cfg.channels, cfg.width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage(conv_in)])
        width, skips = cfg.width, [cfg.width]  # skips: the width each entry of input_blocks makes
        for level, (wide, depth) in enumerate(levels):
            if level > 0:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)
            for _ in range(cfg.blocks):
                self.input_blocks.append(Stage(*self.pair(width, wide, depth)))
                width = wide
                skips.append(width)
        last = ResBlock(width, width, 4 * cfg.width, cfg.groups)
        self.middle_block = Stage(*self.pair(width, width, cfg.middle), last)
        self.output_blocks = nn.ModuleList()
        for level, (wide, depth) in reversed(list(enumerate(levels))):
            for i in range(cfg.blocks + 1):
                parts = self.pair(width + skips.pop(), wide, depth)
                width = wide
                if level > 0 and i == cfg.blocks:
                    parts.append(Upsample(width))
                self.output_blocks.append(Stage(*parts))
        norm_out = nn.GroupNorm(cfg.groups, width, eps=1e-5)
        conv_out = nn.Conv2d(width, cfg.channels, 3, padding=1)
        self.out = nn.Sequential(norm_out, nn.SiLU(), conv_out)

    def pair(self, width_in: int, width: int, depth: int) -> list[nn.Module]:
        """A residual block and, with depth, a transformer."""
        cfg = self.cfg
        block = ResBlock(width_in, width, 4 * cfg.width, cfg.groups)
        if depth == 0:
            return [block]
        heads = cfg.heads or width // cfg.head
        sizes = (width, cfg.context_width, heads, depth, cfg.linear, cfg.groups)
        return [block, Transformer(*sizes)]

    def blocks(self) -> list[nn.Module]:
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        assert height % self.divisor == 0 and width % self.divisor == 0, (
            f"the sides of a latent must be multiples of {self.divisor}, got {height} x {width}"
        )
        c, context = self.embed(t, cond), cond["context"].to(self.dtype)
        x, skips = x_t.to(self.dtype), []
        for block in self.input_blocks:
            x = block(x, c, context)
            skips.append(x)
        x = self.middle_block(x, c, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), c, context)
        return self.out(x).to(x_t.dtype)

    def embed(self, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Time and, in SDXL, pooled text and sizes as one vector (B, 4 width)."""
        index = self.schedule.index(t).to(t.dtype)  # as coarse as t came, for the check of it
        c = self.time_embed(time_embedding(index, self.cfg.width).to(self.dtype))
        if not self.cfg.pooled_width:
            return c
        return c + self.label_emb(cond["pooled"].to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embed[0].weight.dtype
