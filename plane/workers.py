"""Many runs on all cores: every teacher is trained once, then every variant and seed distilled.

    Key, keys_of     what names a network at the start of a run; the two of a run
    teach, network   train one, as a vector of weights; and back
    run, run_all     one distillation; all of a scenario

Workers are started afresh ("spawn") and get settings and weights, never a live network.
"""

import signal
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from plane.denoisers import MLP, Exact, train_teacher
from plane.distill import distill
from plane.measures import swd, teachers_error
from plane.scenarios import Scenario
from plane.settings import Setting
from plane.targets import COUNT, TARGETS, real_points
from schedule import DDPM, Flow, generator, grid, sample_ode


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
