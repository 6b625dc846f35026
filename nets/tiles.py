"""An autoencoder that decodes in tiles, for a GPU that cannot hold the activations of the whole.

    spans    where tiles begin along a side
    Tiled    in place of an autoencoder: overlapping tiles, blended

A tile is computed again in the backward pass, so that one is in memory at a time. Away from seams
pixels and gradients are those of the untiled decode, but for what looks at all places at once: the
decoder's group norms and its attention see a tile's alone.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

OVERLAP = 4  # a tile shares this fraction of its side with the next, 1 / OVERLAP at least


def spans(length: int, tile: int) -> list[int]:
    """Beginnings of tiles that cover `length`, evenly spaced."""
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / (tile - tile // OVERLAP)) + 1
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def ramp(length: int, slope: int, like: Tensor) -> Tensor:
    """Rises over `slope` pixels from the one border, falls to the other, is 1 between."""
    places = torch.arange(length, device=like.device, dtype=torch.float32)
    return torch.minimum(places + 1, length - places).div(slope + 1).clamp(max=1).to(like.dtype)


class Tiled(nn.Module):
    """side: of a tile, in pixels. All else is the autoencoder's."""

    def __init__(self, vae: nn.Module, side: int):
        super().__init__()
        self.vae, self.side = vae, side
        self.factor, self.channels = vae.factor, vae.channels

    def encode(self, *given) -> Tensor:
        return self.vae.encode(*given)

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, C, h, w) -> image (B, 3, H, W)."""
        side, factor = max(1, self.side // self.factor), self.factor
        height, width = latent.shape[-2:]
        if max(height, width) <= side:
            return self.vae.decode(latent)
        image = latent.new_zeros(len(latent), 3, height * factor, width * factor)
        total = image.new_zeros(1, 1, *image.shape[-2:])
        for top in spans(height, side):
            for left in spans(width, side):
                part = latent[..., top : top + side, left : left + side]
                made = self.decoded(part)
                down, across = (ramp(n, side * factor // OVERLAP, made) for n in made.shape[-2:])
                weight, begin = down[:, None] * across, (top * factor, left * factor)
                rows, columns = (
                    slice(a, a + n) for a, n in zip(begin, made.shape[-2:], strict=True)
                )
                image[..., rows, columns] += weight * made
                total[..., rows, columns] += weight
        return image / total

    def decoded(self, part: Tensor) -> Tensor:
        if torch.is_grad_enabled() and part.requires_grad:
            how = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self.vae.decode, part, **how)
        return self.vae.decode(part)
