"""Between pixels and latents.

    Pixels   the embedded task: the latents are the pixels
    VAE      the KL autoencoder of FLUX.1, SD 3.5, SDXL and SD 1.5, with the official tensor names

`encode` and `decode` map (B, 3, H, W) in [-1, 1] to (B, C, h, w) and back; `factor` is H / h and
`channels` is C. Latents are what the denoiser sees: (z - shift) * scale of the encoder's z.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nets.layers import attention


class Pixels(nn.Module):
    factor, channels = 1, 3

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent


# --- parts ---------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        same = width_in == width
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Every place attends to every place, with one head over all channels."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.v, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        maps = self.q(h), self.k(h), self.v(h)
        q, k, v = (m.flatten(2).transpose(1, 2)[:, None] for m in maps)  # (B, 1, h w, D)
        if x.is_cpu:  # as recorded numbers have it: the CPU's fused kernel rounds otherwise
            out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        else:
            out = attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def res_blocks(count: int, width_in: int, width: int, groups: int) -> nn.Sequential:
    """`count` blocks at one resolution; the first changes the width."""
    rest = (ResBlock(width, width, groups) for _ in range(count - 1))
    return nn.Sequential(ResBlock(width_in, width, groups), *rest)


def middle(width: int, groups: int) -> nn.Sequential:
    """At the lowest resolution."""
    parts = OrderedDict(block_1=ResBlock(width, width, groups))
    parts["attn_1"] = Attention(width, groups)
    parts["block_2"] = ResBlock(width, width, groups)
    return nn.Sequential(parts)


# --- the autoencoder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class VAEConfig:
    channels: int  # of the latent
    scale: float
    shift: float = 0.0
    quant: bool = False  # 1x1 convolutions on both sides of the latent
    width: int = 128  # at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width, per resolution; each halves it
    blocks: int = 2  # per resolution in the encoder; the decoder has one more
    groups: int = 32
    recompute: bool = True  # a backward pass runs the decoder's blocks again: 17 GB less at 1024^2

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.multipliers) - 1)


VAES = {
    "flux": VAEConfig(channels=16, scale=0.3611, shift=0.1159),
    "sd35": VAEConfig(channels=16, scale=1.5305, shift=0.0609),
    "sdxl": VAEConfig(channels=4, scale=0.13025, quant=True),  # overflows in fp16: bf16 or fp32
    "sd15": VAEConfig(channels=4, scale=0.18215, quant=True),
}


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.conv_in = nn.Conv2d(3, cfg.width, 3, padding=1)
        self.down = nn.Sequential()
        for i, (width_in, width) in enumerate(zip([cfg.width, *widths[:-1]], widths, strict=True)):
            level = OrderedDict(block=res_blocks(cfg.blocks, width_in, width, cfg.groups))
            if i < len(widths) - 1:
                level["downsample"] = Downsample(width)
            self.down.append(nn.Sequential(level))
        self.mid = middle(widths[-1], cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> mean and log variance (B, 2 C, h, w)."""
        x = self.mid(self.down(self.conv_in(image)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.recompute = cfg.recompute
        self.conv_in = nn.Conv2d(cfg.channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], cfg.groups)
        self.up = nn.ModuleList()
        for i, (width, width_in) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = OrderedDict(block=res_blocks(cfg.blocks + 1, width_in, width, cfg.groups))
            if i > 0:
                level["upsample"] = Upsample(width)
            self.up.append(nn.Sequential(level))
        self.norm_out = nn.GroupNorm(cfg.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def run(self, part: nn.Module, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
        return part(x)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # up.0 is the full resolution
            for part in (*level.block, *level[1:]):
                x = self.run(part, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Computes in the dtype of its weights; latents and images keep the dtype they came in."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.factor, self.channels = cfg.factor, cfg.channels
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        C = cfg.channels
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if cfg.quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if cfg.quant else nn.Identity()

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and log variance of z, (B, C, h, w) each."""
        both = self.quant_conv(self.encoder(image.to(self.encoder.conv_in.weight.dtype)))
        mean, logvar = both.to(image.dtype).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Tensor, eps: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> latent (B, C, h, w).

        It is the mean, or with noise eps (B, C, h, w) a draw from the encoder's Gaussian.
        """
        z, logvar = self.moments(image)
        if eps is not None:
            z = z + (0.5 * logvar).exp() * eps
        return (z - self.cfg.shift) * self.cfg.scale

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, h, w) -> image (B, 3, H, W), about [-1, 1]."""
        z = (latent / self.cfg.scale + self.cfg.shift).to(self.decoder.conv_in.weight.dtype)
        return self.decoder(self.post_quant_conv(z)).to(latent.dtype)
