"""Between pixels and latents.

    Pixels   the embedded task: the latents are the pixels
    VAE      the KL autoencoder of FLUX.1, SD 3.5, SDXL and SD 1.5, with the official tensor names;
             with fold = 2 that of FLUX.2
    load_vae from a file with these names, with those of FLUX.2's makers, or with diffusers'

`encode` and `decode` map (B, 3, H, W) in [-1, 1] to (B, C, h, w) and back; `factor` is H / h and
`channels` is C. Latents are what the denoiser sees: (z - shift) * scale of the encoder's z; in
FLUX.2 z with 2 x 2 places folded into channels, each channel by its stored mean and deviation.
"""

import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nets.layers import attention
from nets.names import Other
from nets.weights import assign, load_weights, places, stored_weights


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
    channels: int  # of z, which is the latent before folding
    scale: float = 1.0
    shift: float = 0.0
    fold: int = 1  # so many places a side become channels of one; then standardised by channel
    quant: bool = False  # 1x1 convolutions on both sides of the latent
    width: int = 128  # at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width, per resolution; each halves it
    blocks: int = 2  # per resolution in the encoder; the decoder has one more
    groups: int = 32
    recompute: bool = True  # a backward pass runs the decoder's blocks again: 17 GB less at 1024^2

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.multipliers) - 1) * self.fold


VAES = {
    "flux": VAEConfig(channels=16, scale=0.3611, shift=0.1159),
    "sd35": VAEConfig(channels=16, scale=1.5305, shift=0.0609),
    "sdxl": VAEConfig(channels=4, scale=0.13025, quant=True),  # overflows in fp16: bf16 or fp32
    "sd15": VAEConfig(channels=4, scale=0.18215, quant=True),
    "flux2": VAEConfig(channels=32, fold=2, quant=True),
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


class Statistics(nn.Module):
    """Mean and variance by channel of FLUX.2's folded latents, as its training left them."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def both(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1); `like` latents, in their dtype."""
        mean, variance = self.running_mean.to(like.dtype), self.running_var.to(like.dtype)
        return mean[:, None, None], (variance + 1e-4).sqrt()[:, None, None]

    def standardise(self, x: Tensor) -> Tensor:
        mean, deviation = self.both(x)
        return (x - mean) / deviation

    def restore(self, x: Tensor) -> Tensor:
        mean, deviation = self.both(x)
        return x * deviation + mean


class VAE(nn.Module):
    """Computes in the dtype of its weights; latents and images keep the dtype they came in."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.factor, self.channels = cfg.factor, cfg.channels * cfg.fold**2
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        C = cfg.channels
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if cfg.quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if cfg.quant else nn.Identity()
        if cfg.fold > 1:
            self.bn = Statistics(self.channels)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and log variance of z, (B, C, h, w) each."""
        both = self.quant_conv(self.encoder(image.to(self.encoder.conv_in.weight.dtype)))
        mean, logvar = both.to(image.dtype).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Tensor, eps: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> latent (B, C, h, w).

        It is the mean, or with noise eps like z a draw from the encoder's Gaussian.
        """
        z, logvar = self.moments(image)
        if eps is not None:
            z = z + (0.5 * logvar).exp() * eps
        if self.cfg.fold > 1:
            # channel slowest: (B, C, h 2, w 2) -> (B, C 2 2, h, w)
            return self.bn.standardise(F.pixel_unshuffle(z, self.cfg.fold))
        return (z - self.cfg.shift) * self.cfg.scale

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, h, w) -> image (B, 3, H, W), about [-1, 1]."""
        if self.cfg.fold > 1:
            z = F.pixel_shuffle(self.bn.restore(latent), self.cfg.fold)
        else:
            z = latent / self.cfg.scale + self.cfg.shift
        z = z.to(self.decoder.conv_in.weight.dtype)
        return self.decoder(self.post_quant_conv(z)).to(latent.dtype)


# --- other names ---------------------------------------------------------------------------------

FLUX2_NAMES = (  # our names -> those of FLUX.2's makers: the 1x1 convolutions are inside
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
)
DIFFUSERS_NAMES = (  # our names -> diffusers', but for the decoder's levels, counted from below
    (r"\.(down|up)\.(\d)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    ("nin_shortcut", "conv_shortcut"),
    (r"\.norm_out", ".conv_norm_out"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"),
    (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
)


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    for ours, theirs in table:
        name = re.sub(ours, theirs, name)
    return name


def to_diffusers(name: str, levels: int) -> str:
    """Our name of a tensor -> diffusers'. levels: resolutions of the autoencoder."""
    name = renamed(name, DIFFUSERS_NAMES)
    return re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)


def load_vae(
    net: VAE,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
    eight_bits: bool = False,
) -> VAE:
    """`load_weights` from a file under any of three sets of names, told by the file's own.

    In diffusers' the attention's weights are matrices (D, D), not 1x1 convolutions (D, D, 1, 1).
    """
    found = places([path] if isinstance(path, Path) else path, prefix)
    if not any(".mid_block." in name for name in found):
        inside = f"{prefix}encoder.quant_conv.weight" in found
        table = FLUX2_NAMES if inside else ()
        how = {"stored": lambda name: Other((renamed(name, table),)), "eight_bits": eight_bits}
        return load_weights(net, path, dtype, device, prefix, ignore, **how)
    state = net.state_dict()
    names = {to_diffusers(name, len(net.cfg.multipliers)): name for name in state}
    wanted = {
        theirs: torch.empty(state[ours].shape[:2], device="meta")
        if ".attentions." in theirs
        else state[ours]
        for theirs, ours in names.items()
    }
    how = {"eight_bits": eight_bits}
    read = dict(stored_weights(wanted, path, dtype, device, prefix, ignore, **how))
    for theirs, tensor in read.items():
        assign(net, names[theirs], tensor.reshape(state[names[theirs]].shape))
    return net
