"""What the networks share: attention, numbers as waves, and the way to the device.

    attention        of every network but T5, whose scores have a bias
    per_head         channels cut into heads
    time_embedding   a time, or a size in pixels, as cosines and sines
    send             from the host's memory to the device, and nobody waits

B batch, L tokens, D width, N heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
