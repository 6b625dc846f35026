"""What the networks of the plane should learn to draw.

    Mixture        round Gaussians, with their posterior mean in closed form
    Moons          two crescents
    Checkerboard   every other square of a board
    ring           eight Gaussians on a circle
    TARGETS        by name
    real_points    fresh points of one of them

A point of the plane is a latent (B, 2, 1, 1); where no network is near it is (B, 2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schedule import generator

COUNT = 2048  # points of a measurement


@dataclass(frozen=True)
class Mixture:
    """Round Gaussians of one width."""

    centres: Tensor  # (M, 2)
    weights: Tensor  # (M,), sum 1
    std: float

    def sample(self, count: int, draw: torch.Generator) -> Tensor:
        mode = torch.multinomial(self.weights, count, replacement=True, generator=draw)
        points = self.centres[mode] + self.std * torch.randn(count, 2, generator=draw)
        return points[:, :, None, None]

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] (B, 2) for x_t (B, 2) = alpha x0 + sigma eps; alpha, sigma (B, 1)."""
        variance = alpha**2 * self.std**2 + sigma**2  # of x_t, given its mode
        away = x_t[:, None] - alpha[:, None] * self.centres  # (B, M, 2)
        likely = self.weights.log() - away.square().sum(2) / (2 * variance)
        shrink = (alpha * self.std**2 / variance)[:, None]
        means = self.centres + shrink * away  # E[x0 | x_t, mode] (B, M, 2)
        return (likely.softmax(1)[:, :, None] * means).sum(1)

    def shares(self, points: Tensor) -> Tensor:
        """(M,): the share of points (B, 2) within three standard deviations of each centre."""
        distance = torch.cdist(points, self.centres)
        near = (distance < 3 * self.std) & (distance == distance.min(1, keepdim=True).values)
        return near.float().mean(0)


class Moons:
    def sample(self, count: int, draw: torch.Generator) -> Tensor:
        angle = math.pi * torch.rand(count, generator=draw)
        upper = torch.rand(count, generator=draw) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
        noise = 0.08 * torch.randn(count, 2, generator=draw)
        return (1.5 * torch.stack([x, y], 1) + noise)[:, :, None, None]


class Checkerboard:
    """Every other square of a 4 x 4 board on [-2, 2]^2."""

    def sample(self, count: int, draw: torch.Generator) -> Tensor:
        x = 4 * torch.rand(count, generator=draw) - 2
        row = 2 * torch.randint(0, 2, (count,), generator=draw) + x.floor() % 2
        y = row - 2 + torch.rand(count, generator=draw)
        return torch.stack([x, y], 1)[:, :, None, None]


MOVE = torch.tensor([1.0, 0.5])  # where the teacher's ring lies, where student and fake start at 0


def ring(weights: tuple[float, ...] = (1,) * 8, centre: Tensor | float = 0.0) -> Mixture:
    """Eight Gaussians on a circle."""
    angles = 2 * math.pi * torch.arange(8) / 8
    centres = 1.5 * torch.stack([angles.cos(), angles.sin()], 1) + centre
    return Mixture(centres, torch.tensor(weights) / sum(weights), std=0.15)


TARGETS = {
    "ring": ring(),
    "moved ring": ring(centre=MOVE),
    "unequal ring": ring((12, 1, 8, 2, 12, 1, 8, 2)),
    "moved unequal ring": ring((12, 1, 8, 2, 12, 1, 8, 2), centre=MOVE),
    "moons": Moons(),
    "checkerboard": Checkerboard(),
}


def real_points(target: str, key: int | str, count: int = COUNT) -> Tensor:
    return TARGETS[target].sample(count, generator("real", target, key)).flatten(1)
