"""What the networks share: attention, numbers as waves, and the way to the device.

    attention        of every network but T5, whose scores have a bias
    per_head         channels cut into heads; split_heads: q, k and v of one tensor
    modulate, norm   a layer norm whose affine is chosen by time and text
    rms_norm         of the channels, or of a head's
    FinalLayer       of a transformer: from tokens to patches
    rotations        a token's places as angles; rotate turns channels by them
    time_embedding   a time, or a size in pixels, as cosines and sines
    send             from the host's memory to the device, and nobody waits

B batch, L tokens, D width, N heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (B, N, L, D / N), k and v (B, N, M, D / N) -> (B, L, D). causal: nothing sees what follows.

    No mask and contiguous, so any fused kernel fits: all refuse a tensor whose channels lie apart,
    and what is left keeps L x M scores.
    """
    parts = (x.contiguous() for x in (q, k, v))
    out = F.scaled_dot_product_attention(*parts, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def per_head(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, N, L, D / N)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, L, 3 D) -> q, k, v as (3, B, N, L, D / N)."""
    return qkv.unflatten(-1, (3, heads, -1)).movedim(2, 0).transpose(2, 3)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The layer norm's missing affine, chosen by time and text. x (B, L, D), the others (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def norm(x: Tensor) -> Tensor:
    """Layer norm without affine; `modulate` supplies one."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Over the channels, in the dtype of x (under autocast the weight's is wider)."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps=eps).to(x.dtype)


def count_patches(x_t: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in (B, C, H, W)."""
    height, width = x_t.shape[-2:]
    assert height % patch == 0 and width % patch == 0, (
        f"latents are cut into {patch} x {patch} patches, got {height} x {width}"
    )
    return height // patch, width // patch


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels, bias=bias)
        modulation = nn.Linear(width, 2 * width, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(norm(x), shift, scale))


def rotations(places: Tensor, axes: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, D / N / 2) of the rotary position embedding, in fp32.

    places (L, A): where each token is, along A axes. A pair of channels turns by place times rate;
    axes: how many of a head's channels each axis has.
    """
    angles = []
    for place, axis in zip(places.double().unbind(-1), axes, strict=True):
        rates = theta ** (
            -torch.arange(0, axis, 2, dtype=torch.float64, device=place.device) / axis
        )
        angles.append(place[:, None] * rates)
    angles = torch.cat(angles, dim=-1)  # (L, D / N / 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of neighbouring channels by its position's angle. x (B, N, L, D / N)."""
    cos, sin = rope
    assert cos.dtype == torch.float32, f"positions must stay in fp32, got {cos.dtype}"
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, L, D / N / 2) each
    turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    return turned.flatten(-2).to(x.dtype)  # bf16 times fp32 was fp32


def time_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, in fp32; t is 0..1000 here, too fine for bf16."""
    assert t.dtype in (torch.float32, torch.float64), (
        f"time must come in fp32 (in bf16 .759 is embedded as 756), got {t.dtype}"
    )
    half = dim // 2
    rates = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on `device`. From memory that cannot be swapped out, a GPU fetches it in
    its own time, after the work it was given before; else the host would wait for that work.
    """
    if x.device.type != "cpu":
        return x.to(device)
    pinned = torch.device(device).type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
