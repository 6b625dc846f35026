"""Between pixels and latents.

    Pixels   the embedded task: the latents are the pixels

`encode` and `decode` map (B, 3, H, W) in [-1, 1] to (B, C, h, w) and back.
"""

from torch import Tensor, nn


class Pixels(nn.Module):
    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent
