"""The embedded task's judge: which digits and colours are in a scene, how placed, how much ghost.

    Judge        a small CNN, trained by pretrain.py
    load_judge   with its weights, and the ghost that real scenes stay under

B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from digits import ASSETS
from nets.weights import load_weights, read_metadata


@dataclass
class Verdict:
    """What the judge sees in B scenes, by place: the left or upper object first."""

    axis: Tensor  # (B,) 0 side by side, 1 stacked
    digits: Tensor  # (B, 2)
    colours: Tensor  # (B, 2)
    ghost: Tensor  # (B,) how much of another scene shines through, 0 to .5
    features: Tensor  # (B, 96) for the Frechet distance and recall


class Judge(nn.Module):
    """A small CNN on (B, 3, 16, 16) images in [-1, 1]."""

    def __init__(self, width: int = 96, hidden: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, width // 2, 3, padding=1), nn.GroupNorm(6, width // 2), nn.GELU()),
            *(nn.Conv2d(width // 2, width, 3, 2, padding=1), nn.GroupNorm(8, width), nn.GELU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()),
            *(nn.Conv2d(width, width, 3, 2, padding=1), nn.GroupNorm(8, width), nn.GELU()),
        )
        self.head = nn.Sequential(
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * width, hidden), nn.GELU()),
            nn.Linear(hidden, 2 + 2 * 10 + 2 * 6 + 1),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits of axis (B, 2), digits (B, 2, 10), colours (B, 2, 6); ghost (B,); features.

        The features (B, 96) are ten times the last maps averaged over space, as in the FID.
        """
        maps = self.body(image)
        axis, digits, colours, ghost = self.head(maps).split([2, 20, 12, 1], dim=-1)
        digits, colours = digits.unflatten(-1, (2, 10)), colours.unflatten(-1, (2, 6))
        return axis, digits, colours, ghost[:, 0], 10 * maps.mean((2, 3))

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 512) -> Verdict:
        parts = [self(part) for part in images.split(batch)]
        axis, digits, colours, ghost, features = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        return Verdict(axis.argmax(-1), digits.argmax(-1), colours.argmax(-1), ghost, features)


def load_judge() -> tuple[Judge, float]:
    """The evaluator, and the ghost that 95% of real scenes stay under."""
    path = ASSETS / "judge.safetensors"
    judge = load_weights(Judge(), path).requires_grad_(False).eval()
    return judge, float(read_metadata(path)["ghost_limit"])
