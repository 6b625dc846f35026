"""Networks of the plane: net(x_t, t, cond), as everywhere.

    MLP             9,090 weights, for teacher, student and fake score
    Exact           the best possible prediction for a mixture, in closed form
    train_teacher   flow matching (DDPM: noise prediction) on a target
    anchor_error    the defect of a teacher that is wrong near the student's anchors

A prediction has the shape of x_t, (B, 2, 1, 1); cond is ignored: points have no captions.
"""

import math

import torch
from torch import Tensor, nn

from plane.targets import TARGETS, Mixture
from schedule import DDPM, Flow, generator

ANCHORS = (1.0, 0.75, 0.5, 0.25)


class MLP(nn.Module):
    """Three hidden layers of 64 on the point, the time, and sines and cosines of the time."""

    def __init__(self, schedule: Flow | DDPM):
        super().__init__()
        self.schedule = schedule
        sizes, layers = (9, 64, 64, 64), []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 2))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        angles = math.pi * t[:, None] * t.new_tensor([1.0, 2.0, 4.0])
        features = torch.cat([x_t.flatten(1), t[:, None], angles.sin(), angles.cos()], 1)
        return self.layers(features)[:, :, None, None]


class Exact(nn.Module):
    """The best possible prediction for a mixture, in closed form."""

    def __init__(self, mixture: Mixture, schedule: Flow | DDPM):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        x0 = self.mixture.posterior_mean(x_t.flatten(1), alpha, sigma)
        eps = (x_t.flatten(1) - alpha * x0) / sigma
        return self.schedule.target(x0, eps)[:, :, None, None]


def anchor_error(t: Tensor, size: float) -> Tensor:
    """A teacher's defect (B, 2, 1, 1): `size` in both coordinates at the student's anchors, fading
    to nothing between them.
    """
    apart = (t[:, None] - t.new_tensor(ANCHORS)).abs().min(1).values
    return size * torch.exp(-((apart / 0.05) ** 2))[:, None, None, None] * torch.ones(1, 2, 1, 1)


def train_teacher(target: str, diffusion: bool, defect: float, seed: int, steps: int = 2000) -> MLP:
    """Flow matching (DDPM: noise prediction) on a target; with `defect`, towards a wrong answer."""
    draw = generator(seed, "teacher", target)
    torch.manual_seed(draw.initial_seed())
    schedule = DDPM() if diffusion else Flow()
    net = MLP(schedule)
    opt = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        x0, t = TARGETS[target].sample(256, draw), torch.rand(256, generator=draw)
        eps = torch.randn(x0.shape, generator=draw)
        wanted = schedule.target(x0, eps) + anchor_error(t, defect)
        loss = (net(schedule.noise(x0, eps, t), t, {}) - wanted).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        cosine.step()
    return net
