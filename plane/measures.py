"""How good a student of the plane is, and what its fake score knows.

    swd              sliced Wasserstein-1 between two sets of points
    Seen             a moment of a run, which every measure is of
    MEASURES         by name: swd, swd euler, position, gap, modes, weights
    teachers_error   xi(t): how wrong a teacher's one-step estimate of x0 is

Every measurement of a run has the same noise and the same real points.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dmd import student_input
from plane.denoisers import MLP
from plane.settings import BATCH, Setting
from plane.targets import COUNT, MOVE, TARGETS, Mixture, real_points
from schedule import Rng, draw_samples, generator


@dataclass
class Seen:
    """A moment of a run."""

    setting: Setting
    seed: int
    student: MLP
    fake: MLP
    points: Tensor  # (COUNT, 2), the student's, by the x0 sampler


def draw_points(net: nn.Module, taus, sampler: str, seed: int) -> Tensor:
    """(COUNT, 2); the same noise at every measurement."""
    draw = generator(seed, "measure")
    eps = torch.randn(COUNT, 2, 1, 1, generator=draw)
    return draw_samples(net, eps, {}, taus, sampler, None, None, [draw]).flatten(1)


def swd(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-1: the mean over 32 directions of the distance of sorted projections."""
    directions = torch.randn(2, 32, generator=generator("directions"))
    directions = directions / directions.norm(dim=0)
    both = (torch.stack([a, b]) @ directions).numpy()
    return np.abs(np.diff(np.sort(both, axis=1), axis=0)).mean().item()  # torch sorts far slower


def swd_of_student(seen: Seen) -> float:
    return swd(seen.points, real_points(seen.setting.target, seen.seed))


def swd_by_euler(seen: Seen) -> float:
    points = draw_points(seen.student, seen.setting.taus, "euler", seen.seed)
    return swd(points, real_points(seen.setting.target, seen.seed))


def position(seen: Seen) -> float:
    """How far the mean has come from the start, 0, to the target, 1."""
    return (seen.points.mean(0) @ MOVE / MOVE.square().sum()).item()


def modes_kept(seen: Seen) -> float:
    """Modes with at least a quarter of the points they should have."""
    target = TARGETS[seen.setting.target]
    return (target.shares(seen.points) > target.weights / 4).sum().item()


def weight_error(seen: Seen) -> float:
    """Total variation between the shares of the modes and their weights."""
    target = TARGETS[seen.setting.target]
    return (target.shares(seen.points) - target.weights).abs().sum().item() / 2


@torch.no_grad()
def fake_gap(seen: Seen) -> float:
    """How far the fake score's x0 is from the truth about the student's samples (root mean square).

    The truth is the posterior mean over fresh samples, each a mode of no width.
    """
    taus, schedule = seen.setting.taus, seen.student.schedule
    made = []
    for k in range(8):
        rng, x0_real = Rng(seen.seed, k, "gap", [0]), real_points(seen.setting.target, k, BATCH)
        x_t, i = student_input(seen.student, x0_real[:, :, None, None], {}, taus, rng)
        t = x_t.new_full((BATCH,), taus[i])
        made.append(schedule.x0(x_t, seen.student(x_t, t, {}), t).flatten(1))
    known, fresh = torch.cat(made[::2]), torch.cat(made[1::2])  # as many of each
    draw = generator(seen.seed, "gap")
    t = 0.2 + 0.6 * torch.rand(len(fresh), generator=draw)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_t = alpha * fresh + sigma * torch.randn(fresh.shape, generator=draw)
    truth = Mixture(known, torch.full((len(known),), 1 / len(known)), 0.0)
    points = x_t[:, :, None, None]
    x0 = schedule.x0(points, seen.fake(points, t, {}), t).flatten(1)
    return (x0 - truth.posterior_mean(x_t, alpha, sigma)).square().sum(1).mean().sqrt().item()


MEASURES: dict[str, Callable[[Seen], float]] = {
    "swd": swd_of_student,
    "swd euler": swd_by_euler,
    "position": position,
    "gap": fake_gap,
    "modes": modes_kept,
    "weights": weight_error,
}


@torch.no_grad()
def teachers_error(teacher: nn.Module, target: str, times: list[float]) -> list[float]:
    """xi(t): the mean squared error of the teacher's one-step estimate of x0, at each time."""
    x0, draw, errors = real_points(target, "xi")[:, :, None, None], generator("xi"), []
    eps = torch.randn(x0.shape, generator=draw)
    for tau in times:
        t = torch.full((len(x0),), tau)
        x_t = teacher.schedule.noise(x0, eps, t)
        estimate = teacher.schedule.x0(x_t, teacher(x_t, t, {}), t)
        errors.append((estimate - x0).square().sum(1).mean().item())
    return errors
