"""The paper's claims in two dimensions: seconds a run, a table and a picture for each.

    python toy.py                      # every scenario, a few minutes
    python toy.py ida --seeds 5        # one

    ida       the fake score lags behind: the student overshoots, IDA damps that
    isg       four coarse steps: ISG against nothing, and against plain regression on the teacher
    pair      a long run: IDA alone, ISG alone, both
    ttur      1, 2, 5, 10 fake updates per student update, with and without IDA
    steps     1 to 16 student steps, both samplers, both ISG distances
    modes     an unequal mixture: what is kept when the fake score keeps up, and when it lags
    segments  a teacher that is wrong near the student's anchors only: ISG against regression
    ddpm      the diffusion schedule and noise prediction, through the same functions

dmd.py, ida.py, isg.py and schedule.py are used as they are for the large teachers. A point of the
plane is a latent (B, 2, 1, 1); the networks have 9,090 weights. Writes OUT/SCENARIO.png.
"""

import argparse
import copy
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Parser, refuse
from dmd import dmd_loss, fake_loss, student_input
from engine.pictures import Graph, points_and_graphs
from ida import ida_update
from isg import distance_l2, isg_loss
from schedule import DDPM, Flow, Rng, draw_samples, generator, grid, sample_ode

# --- targets -------------------------------------------------------------------------------------


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

# --- denoisers: net(x_t, t, cond), as everywhere -------------------------------------------------


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


ANCHORS = (1.0, 0.75, 0.5, 0.25)


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


# --- distillation --------------------------------------------------------------------------------


# fmt: off
@dataclass(frozen=True)
class Setting:
    target: str = "ring"          # what the teacher knows
    start: str = ""               # what student and fake score know at first; "": the same
    exact: bool = False           # teacher in closed form
    diffusion: bool = False       # DDPM in place of Flow
    defect: float = 0.0           # the teacher's error near the anchors
    iterations: int = 600
    ttur: int = 1                 # fake updates per student update
    lr: float = 5e-4              # of the student
    lr_fake: float = 5e-4         # of the fake score
    ida: float = 1.0              # lambda; 1: no IDA
    pull: str = "student"         # or "start": the control, pulled to where it began
    w_isg: float = 0.0
    w_anchor: float = 0.0         # the control: regression on the teacher's step from the anchor
    distance: str = "l2"          # of ISG
    taus: tuple[float, ...] = ANCHORS
    against: str = ""             # the variant that this one is compared with, seed by seed
    measures: tuple[str, ...] = ("swd",)
# fmt: on


BATCH, EVERY, COUNT = 128, 25, 2048  # points a step; iterations between measurements; their points


def distill(setting: Setting, seed: int, teacher: nn.Module, start: MLP) -> dict:
    """Algorithm 1 without a discriminator; returns curves, final samples and seconds."""
    began, s = time.perf_counter(), setting
    student, fake = (copy.deepcopy(start).requires_grad_(True) for _ in range(2))
    opt = torch.optim.Adam(student.parameters(), lr=s.lr, fused=True)
    opt_fake = torch.optim.Adam(fake.parameters(), lr=s.lr_fake, fused=True)
    schedule, target, draw = student.schedule, TARGETS[s.target], generator(seed, "data")
    curves = {name: [] for name in s.measures}
    for step in range(s.iterations):
        rng = [Rng(seed, step, purpose, [0]) for purpose in ("input", "dmd", "isg", "fake")]
        x_t, i = student_input(student, target.sample(BATCH, draw), {}, s.taus, rng[0])
        tau_start, tau_end = (x_t.new_full((BATCH,), tau) for tau in (*s.taus, 0.0)[i : i + 2])
        prediction = student(x_t, tau_start, {})
        x0 = schedule.x0(x_t, prediction, tau_start)
        if step % s.ttur == 0:
            segment = (student, teacher, x_t, prediction, tau_start, tau_end)
            loss = dmd_loss(x0, teacher, fake, {}, None, (1.0, 1.0), "uniform", rng[1])
            if s.w_isg:
                how = ({}, None, (1.0, 1.0), 0.02, s.distance, rng[2])
                loss = loss + s.w_isg * isg_loss(*segment, *how)
            if s.w_anchor:
                loss = loss + s.w_anchor * anchor_loss(*segment)
            update(opt, loss)
            ida_update(fake, student if s.pull == "student" else start, s.ida)
        update(opt_fake, fake_loss(fake, x0, {}, "uniform", rng[3]))
        if (step + 1) % EVERY == 0:
            seen = Seen(s, seed, student, fake, draw_points(student, s.taus, "x0", seed))
            for name in s.measures:
                curves[name].append(MEASURES[name](seen))
    result = {"curves": curves, "points": seen.points.numpy()}
    return result | {"seconds": time.perf_counter() - began}


def update(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
    opt.step()


def anchor_loss(student, teacher, x_t, prediction, tau_start, tau_end) -> Tensor:
    """The control for ISG: the teacher's step over the whole segment, no point inside it."""
    step = student.schedule.step
    with torch.no_grad():
        x_tar = step(x_t, teacher(x_t, tau_start, {}), tau_start, tau_end)
    return distance_l2(step(x_t, prediction, tau_start, tau_end), x_tar)


# --- measures ------------------------------------------------------------------------------------


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


def real_points(target: str, key: int | str, count: int = COUNT) -> Tensor:
    return TARGETS[target].sample(count, generator("real", target, key)).flatten(1)


def swd(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-1: the mean over 32 directions of the distance of sorted projections."""
    directions = torch.randn(2, 32, generator=generator("directions"))
    directions = directions / directions.norm(dim=0)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


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


# --- scenarios -----------------------------------------------------------------------------------

# TTUR 1, a slow fake score and far to go; TTUR 5, a fast one, at home from the start.
LAGGING = Setting(target="moved ring", start="ring", ttur=1, lr=2e-4, lr_fake=5e-5)
KEEPING_UP = Setting(ttur=5)
IDA, ISG = {"ida": 0.97}, {"w_isg": 1.0}


@dataclass(frozen=True)
class Scenario:
    variants: dict[str, Setting]
    columns: tuple[str, ...] = ("late swd",)  # of the table: "late" or "peak" of a measure
    curves: tuple[str, ...] = ("swd",)  # measures drawn against iterations
    across: str = ""  # the columns are drawn against this, the first word of a variant's name
    panels: tuple[str, ...] = ()  # variants whose points are drawn; (): all


def four_parts(base: Setting, name: str = "") -> dict[str, Setting]:
    """A setting, and with IDA, ISG or both."""
    changes = {"vanilla": {}, "IDA": IDA, "ISG": ISG, "IDA + ISG": IDA | ISG}
    return compare({name + part: (base, change) for part, change in changes.items()})


def compare(variants: dict[str, tuple[Setting, dict]]) -> dict[str, Setting]:
    """Each setting with its changes; the later ones are compared with the first."""
    first = next(iter(variants))
    made = {
        name: replace(base, against=first, **change) for name, (base, change) in variants.items()
    }
    return made | {first: replace(made[first], against="")}


def ida_scenario() -> Scenario:
    base = replace(LAGGING, measures=("swd", "position", "gap"))
    variants = {
        "vanilla": (base, {}),
        "IDA": (base, IDA),
        "pulled to the start": (base, IDA | {"pull": "start"}),
        "fake 4 x faster": (base, {"lr_fake": 2e-4}),
    }
    columns = ("late swd", "peak position", "peak gap", "late gap")
    return Scenario(compare(variants), columns, ("swd", "position", "gap"))


def isg_scenario() -> Scenario:
    variants = {}
    for target in ("checkerboard", "moons", "ring"):
        base = replace(KEEPING_UP, target=target)
        three = {"vanilla": {}, "ISG": ISG, "regression": {"w_anchor": 1.0}}
        variants |= compare({f"{target}, {part}": (base, three[part]) for part in three})
    return Scenario(variants)


def pair_scenario() -> Scenario:
    base = replace(LAGGING, iterations=2000, measures=("swd", "position", "gap"))
    columns = ("late swd", "peak position", "peak gap", "late gap")
    return Scenario(four_parts(base), columns, ("swd", "position", "gap"))


def ttur_scenario() -> Scenario:
    variants = {}
    for ttur in (1, 2, 5, 10):  # as many student updates for each
        for name, lr_fake in (("slow fake", LAGGING.lr_fake), ("fast fake", LAGGING.lr)):
            base = replace(LAGGING, ttur=ttur, iterations=200 * ttur, lr_fake=lr_fake)
            base = replace(base, measures=("swd", "position"))
            variants |= compare(
                {f"{ttur}, {name}": (base, {}), f"{ttur}, {name}, IDA": (base, IDA)}
            )
    columns = ("late swd", "peak position")
    panels = tuple(name for name in variants if name.startswith(("1,", "10,")))
    return Scenario(variants, columns, (), "fake updates per student update", panels)


def steps_scenario() -> Scenario:
    variants, charbonnier = {}, ISG | {"distance": "charbonnier"}
    for K in (1, 2, 4, 8, 16):
        base = replace(KEEPING_UP, target="checkerboard", taus=tuple(grid(Flow(), K)))
        base = replace(base, measures=("swd", "swd euler"))
        three = {"vanilla": {}, "ISG, L2": ISG, "ISG, Charbonnier": charbonnier}
        variants |= compare({f"{K}, {part}": (base, three[part]) for part in three})
    panels = tuple(f"{K}, {part}" for part in three for K in (1, 2, 4, 8, 16))
    return Scenario(variants, ("late swd", "late swd euler"), (), "student steps", panels)


def modes_scenario() -> Scenario:
    measures = ("swd", "modes", "weights")
    calm = replace(KEEPING_UP, target="unequal ring", exact=True, measures=measures)
    stressed = replace(LAGGING, target="moved unequal ring", exact=True, measures=measures)
    variants = four_parts(calm, "calm, ") | four_parts(stressed, "stressed, ")
    return Scenario(variants, ("late swd", "late modes", "late weights"), ("modes", "weights"))


def segments_scenario() -> Scenario:
    variants = {}
    for defect in (0.0, 0.5, 1.0):
        base, name = replace(KEEPING_UP, defect=defect), f"teacher wrong by {defect:g}"
        runs = {f"0, {name}": (base, {})}
        for w in (0.25, 1.0, 4.0):
            runs[f"{w:g}, {name}, ISG"] = (base, {"w_isg": w})
            runs[f"{w:g}, {name}, regression"] = (base, {"w_anchor": w})
        variants |= compare(runs)
    panels = tuple(name for name in variants if name.startswith(("0,", "1,")))
    return Scenario(variants, curves=(), across="weight", panels=panels)


def ddpm_scenario() -> Scenario:
    taus, measures = (0.999, 0.749, 0.499, 0.249), ("swd", "position")
    lagging = replace(LAGGING, diffusion=True, taus=taus, measures=measures)
    calm = replace(KEEPING_UP, diffusion=True, taus=taus, measures=measures)
    variants = four_parts(lagging, "lagging, ") | four_parts(calm, "calm, ")
    return Scenario(variants, ("late swd", "peak swd", "peak position"), ("swd", "position"))


SCENARIOS = {
    "ida": ida_scenario,
    "isg": isg_scenario,
    "pair": pair_scenario,
    "ttur": ttur_scenario,
    "steps": steps_scenario,
    "modes": modes_scenario,
    "segments": segments_scenario,
    "ddpm": ddpm_scenario,
}

# --- many runs on all cores ----------------------------------------------------------------------


class Key(NamedTuple):
    """What names a network at the start of a run."""

    target: str
    diffusion: bool
    defect: float
    exact: bool
    seed: int


XI_TIMES = [k / 50 for k in range(2, 51)]


def keys_of(setting: Setting, seed: int) -> list[Key]:
    """The teacher, and what student and fake score are at first."""
    kind = (setting.diffusion, setting.defect)
    teacher = Key(setting.target, *kind, setting.exact, seed)
    return [teacher, Key(setting.start or setting.target, *kind, False, seed)]


def teach(key: Key) -> dict:
    """A network's weights in one vector (trained here), and how good it is as a teacher."""
    target, diffusion, defect, exact, seed = key
    weights = np.zeros(0)
    if not exact:
        trained = train_teacher(target, diffusion, defect, seed)
        weights = nn.utils.parameters_to_vector(trained.parameters()).detach().numpy()
    net = network(key, weights)
    real, eps = real_points(target, seed), torch.randn(COUNT, 2, 1, 1, generator=generator(seed))
    made = {n: sample_ode(net, eps, {}, grid(net.schedule, n)).flatten(1) for n in (100, 4)}
    facts = {f"teacher, {n} steps": swd(points, real) for n, points in made.items()}
    pairs = [(real_points(target, k), real_points(target, -k)) for k in range(1, 5)]
    facts["data against data"] = sum(swd(*pair) for pair in pairs) / len(pairs)
    return {"weights": weights, "facts": facts, "xi": teachers_error(net, target, XI_TIMES)}


def network(key: Key, weights: np.ndarray) -> nn.Module:
    schedule = DDPM() if key.diffusion else Flow()
    if key.exact:
        return Exact(TARGETS[key.target], schedule)
    net = MLP(schedule)
    nn.utils.vector_to_parameters(torch.from_numpy(weights), net.parameters())
    return net


def run(setting: Setting, seed: int, weights: list[np.ndarray]) -> dict:
    """One distillation; weights: of the two networks that `keys_of` names."""
    teacher, start = map(network, keys_of(setting, seed), weights)
    return distill(setting, seed, teacher.requires_grad_(False), start)


def run_all(
    name: str, scenario: Scenario, seeds: int, pool: ProcessPoolExecutor, taught: dict[Key, dict]
) -> dict[str, list[dict]]:
    """Teachers first (kept in `taught`), then every variant and seed. Variant -> one per seed."""
    variants = scenario.variants
    jobs = [(s, seed) for s in variants.values() for seed in range(seeds)]
    keys = sorted({key for job in jobs for key in keys_of(*job)} - taught.keys())
    with tqdm(total=len(keys) + len(jobs), desc=name, leave=False) as bar:
        for key, lesson in zip(keys, pool.map(teach, keys), strict=True):
            taught[key] = lesson
            bar.update()
        weights = [[taught[key]["weights"] for key in keys_of(*job)] for job in jobs]
        results = []
        for result in pool.map(run, *zip(*jobs, strict=True), weights):
            results.append(result)
            bar.update()
    return {v: results[k * seeds : (k + 1) * seeds] for k, v in enumerate(variants)}


def prepare_worker() -> None:
    """One thread each: the networks are tiny. Ctrl-C is the parent's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- tables and graphs ---------------------------------------------------------------------------


def value(result: dict, column: str) -> float:
    """ "late M": the mean of the last 8 measurements of M; "peak M": the largest."""
    how, measure = column.split(" ", 1)
    curve = result["curves"][measure]
    return max(curve) if how == "peak" else sum(curve[-8:]) / len(curve[-8:])


def number(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.3g}"


def table(scenario: Scenario, results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over seeds; wins: seeds whose first column is below the row's
    that it is compared with.
    """
    width = max(len(name) for name in results) + 2
    lines = ["".join(f"{head:>20}" for head in (*scenario.columns, "wins", "seconds"))]
    lines[0] = " " * width + lines[0]
    for name, runs in results.items():
        cells = []
        for column in scenario.columns:
            numbers = torch.tensor([value(result, column) for result in runs])
            spread = numbers.std().item() if len(runs) > 1 else 0.0
            cells.append(f"{number(numbers.mean().item())} ± {number(spread)}")
        against = results.get(scenario.variants[name].against)
        pairs = zip(runs, against or [], strict=False)
        first = scenario.columns[0]
        won = sum(value(ours, first) < value(theirs, first) for ours, theirs in pairs)
        cells.append(f"{won} of {len(runs)}" if against else "-")
        cells.append(f"{sum(result['seconds'] for result in runs) / len(runs):.1f}")
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def reference(scenario: Scenario, taught: dict[Key, dict]) -> str:
    """For every teacher of a scenario (seed 0): its own SWD, and that of data against data."""
    lines = {}
    for setting in scenario.variants.values():
        key = keys_of(setting, 0)[0]
        facts = ", ".join(f"{name} {x:.3f}" for name, x in taught[key]["facts"].items())
        wrong = f", teacher wrong by {key.defect:g}" if key.defect else ""
        lines[key] = f"  {key.target}{wrong}: SWD of {facts}"
    return "\n".join(lines.values())


def panels(scenario: Scenario, results: dict[str, list[dict]]) -> dict[str, tuple]:
    """Title -> points of the target, and of the student of seed 0."""
    shown = {name: scenario.variants[name].target for name in scenario.panels or results}
    return {
        name: (real_points(target, "picture").numpy(), results[name][0]["points"])
        for name, target in shown.items()
    }


def graphs(scenario: Scenario, results: dict[str, list[dict]], taught: dict) -> list[Graph]:
    made = []
    if scenario.across:
        made += [graph_across(column, scenario, results) for column in scenario.columns]
    else:  # one for each group of variants: those whose names begin alike
        groups = dict.fromkeys(name.rpartition(", ")[0] for name in results)
        for group in groups:
            some = {name: results[name] for name in results if name.rpartition(", ")[0] == group}
            made += [graph_over_iterations(measure, group, some) for measure in scenario.curves]
    defects = {s.defect: keys_of(s, 0)[0] for s in scenario.variants.values()}
    if len(defects) > 1:
        lines = {
            f"teacher wrong by {d:g}": (XI_TIMES, [taught[k]["xi"]]) for d, k in defects.items()
        }
        made.append(Graph("xi(t), error of the teacher's x0", "t", "linear", lines))
    return made


def graph_over_iterations(measure: str, group: str, results: dict[str, list[dict]]) -> Graph:
    lines = {}
    for name, runs in results.items():
        curves = [result["curves"][measure] for result in runs]
        part = name.rpartition(", ")[2]
        lines[part] = ([EVERY * (k + 1) for k in range(len(curves[0]))], curves)
    scale = {"swd": "log", "gap": "log", "position": "symlog"}.get(measure, "linear")
    return Graph(f"{group}: {measure}" if group else measure, "iteration", scale, lines)


def graph_across(column: str, scenario: Scenario, results: dict[str, list[dict]]) -> Graph:
    """One line per kind of variant, over the number that its name begins with."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, runs in results.items():
        where, kind = name.split(", ", 1)
        found.setdefault(kind, {})[where] = [value(result, column) for result in runs]
    lines = {
        kind: (list(by_place), list(zip(*by_place.values(), strict=True)))
        for kind, by_place in found.items()
    }
    return Graph(column, scenario.across, "log", lines)


# --- the command ---------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("scenario", nargs="*", default=["all"], help="one or several; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant; default: 3")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="default: runs/toy")
    given = parser.parse_args()
    unknown = [name for name in given.scenario if name not in (*SCENARIOS, "all")]
    if unknown:
        refuse(f'unknown scenario "{unknown[0]}"; choose from all, {", ".join(SCENARIOS)}')
    if given.seeds < 1:
        refuse(f"--seeds is {given.seeds}; it must be at least 1")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {given.out} cannot be made ({error.strerror}); choose another")
    return given


def main() -> None:
    given = arguments()
    chosen = SCENARIOS if "all" in given.scenario else given.scenario
    taught: dict[Key, dict] = {}
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), prepare_worker)
    try:
        for name in chosen:
            began, scenario = time.perf_counter(), SCENARIOS[name]()
            results = run_all(name, scenario, given.seeds, pool, taught)
            print(f"{name}\n{table(scenario, results)}\n{reference(scenario, taught)}")
            plots = panels(scenario, results), graphs(scenario, results, taught)
            points_and_graphs(given.out / f"{name}.png", *plots)
            seconds = time.perf_counter() - began
            print(f"  {given.out / name}.png, {seconds:.0f} s, {given.seeds} seeds\n", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
