"""Noise and time: how data is mixed with noise, how a prediction is read, how samples are drawn.

    Flow, DDPM    x_t = alpha(t) x0 + sigma(t) eps, and a network's prediction as x0 or eps
    guided        classifier-free or embedded guidance, the only place that knows which
    held          how long it may be
    grid          the times of a sampler; resolution_shift is FLUX.1-dev's shift for them
    anchor_at     one of the student's anchors, for each sample
    sample_x0     few-step sampling: estimate x0, noise it again to the next anchor
    sample_ode    deterministic sampling: Euler for Flow, DDIM for DDPM
    Rng, draw_t   random numbers, a function of (seed, step, purpose, sample)

A denoiser is anything called as `net(x_t, t, cond)` that returns its prediction in the shape of x_t
(B, C, H, W) and carries `net.schedule`. Time t is (B,) in [0, 1], 1 is noise, after any resolution
shift. `cond` is a dict of tensors that this file never looks into. Knows nothing of devices (but
that nobody should wait for one), files, ranks or configuration.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nets.layers import send

Cond = dict[str, Tensor]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), so that it multiplies `like` (B, ...)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


# --- schedules -----------------------------------------------------------------------------------


class Flow:
    """Rectified flow: x_t = (1 - t) x0 + t eps; the network predicts the velocity v = eps - x0."""

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def warp(self, u: Tensor) -> Tensor:
        """Unshifted times (B,) -> the times the network sees, resolution-shifted."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def times(self, u: Tensor) -> Tensor:
        """Unshifted times 1 .. 0 (B,) -> where a sampler calls the network."""
        return self.warp(u)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return per_sample(1 - t, x0) * x0 + per_sample(t, x0) * eps

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict."""
        return eps - x0

    def x0(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return x_t - per_sample(t, x_t) * v

    def eps(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return x_t + per_sample(1 - t, x_t) * v

    def step(self, x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Euler: keep x0 and eps, move t. (The same as noise(x0, eps, t_next), in one product.)"""
        return x_t + per_sample(t_next - t, x_t) * v


class DDPM:
    """Variance-preserving diffusion of SD 1.5 and SDXL: the network predicts eps.

    t = index / 1000 into the scaled-linear table (0.00085 .. 0.012, 1000 entries); t = 0 is clean
    data. The last entry is not quite pure noise: alpha(.999) = sqrt(.00466).
    """

    def __init__(self):
        ends = (0.00085**0.5, 0.012**0.5)  # a table needs numbers, also inside a meta network
        betas = torch.linspace(*ends, 1000, dtype=torch.float64, device="cpu") ** 2
        self.alpha_bar = torch.cumprod(1 - betas, dim=0)  # (1000,)
        self.tables = {self.alpha_bar.device: self.alpha_bar}  # sent to each device once

    def warp(self, u: Tensor) -> Tensor:
        return u

    def times(self, u: Tensor) -> Tensor:
        """The u-th part of the table's entries, and the last of them: .25 is entry 249.

        Entry 0 is nearest to t = .0001, since t = 0 is clean data.
        """
        return ((1000 * u).round() - 1).clamp_min(0.1) / 1000

    def index(self, t: Tensor) -> Tensor:
        """The entry nearest to t (B,), which is how the network knows times; in fp64."""
        return (t.double() * 1000).round().clamp(0, 999)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        if t.device not in self.tables:
            self.tables[t.device] = send(self.alpha_bar, t.device)
        entry = self.tables[t.device][self.index(t).long()]
        return torch.where(t > 0, entry, torch.ones_like(entry))

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar(t).sqrt().float()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar(t)).sqrt().float()

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict."""
        return eps

    def x0(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (x_t - per_sample(self.sigma(t), x_t) * eps) / per_sample(self.alpha(t), x_t)

    def eps(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def step(self, x_t: Tensor, eps: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """DDIM: keep x0 and eps, move t."""
        return self.noise(self.x0(x_t, eps, t), eps, t_next)


# --- guidance ------------------------------------------------------------------------------------


def guided(
    net: Callable,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    uncond: Cond | None,
    guidance: Tensor | float | None,
    rescale: float = 0.0,
) -> Tensor:
    """The guided prediction, in the shape of x_t.

    guidance: scale, a float or (B,); None means no guidance. With `uncond` it is classifier-free,
    uncond + g (cond - uncond), in one batched call; without, the network takes the scale as an
    input (FLUX.1-dev). rescale: see `held`; only of the first kind.
    """
    if guidance is None:
        return net(x_t, t, cond)
    g = torch.as_tensor(guidance, dtype=torch.float32, device=x_t.device).expand(len(x_t))
    if uncond is None:
        return net(x_t, t, cond | {"guidance": g})
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
    yes, no = net(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    made = no + per_sample(g, x_t).to(no.dtype) * (yes - no)
    return held(made, yes, rescale) if rescale else made


def held(made: Tensor, cond: Tensor, share: float) -> Tensor:
    """(1 - share) made + share made |cond| / |made|: a guided prediction, its norm drawn to that of
    the conditional one, sample by sample (B, ...). arXiv:2305.08891, section 3.4.
    """
    norm_made, norm_cond = (x.float().flatten(1).norm(dim=1) for x in (made, cond))
    factor = 1 - share + share * norm_cond / norm_made.clamp_min(1e-12)
    return per_sample(factor, made).to(made.dtype) * made


# --- samplers ------------------------------------------------------------------------------------


def grid(schedule: Flow | DDPM, steps: int, last: float | None = None) -> list[float]:
    """`steps` times from pure noise, evenly spaced before the shift: 1, 1 - 1/N, ... 1/N.

    For DDPM the table's entries that close each N-th of it: 999, 749, 499, 249 of 1000 for N = 4.
    last: where they end instead of 1/N, before the shift. The official sampler of SD 3.5 ends at
    the shifted 1/1000, and so shifts it twice.
    """
    if last is None:
        u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    else:
        u = torch.linspace(1, last, steps, dtype=torch.float64)
    return schedule.times(u).tolist()


def anchor_at(taus: Sequence[float] | Tensor, i: int, like: Tensor) -> Tensor:
    """(B,) the anchor taus[i] of each row of `like` (B, ...); after the last 0, clean data.

    taus: K floats, or a tensor (K,), or (K, B) where each sample has anchors of its own.
    """
    tau = taus[i] if i < len(taus) else 0.0
    if isinstance(tau, Tensor):
        return tau.to(like).expand(len(like))
    return like.new_full((len(like),), tau)


def resolution_shift(tokens: int) -> float:
    """The shift FLUX.1-dev samples with: exp(mu), mu linear in the number of image tokens.

    mu is .5 at 256 tokens (256 x 256 pixels) and 1.15 at 4096 (1024 x 1024); schnell has none.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


@torch.no_grad()
def sample_x0(
    net: Callable,
    eps: Tensor,
    cond: Cond,
    taus: Iterable[float],
    uncond: Cond | None = None,
    guidance: float | None = None,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """At each anchor: estimate x0, noise it again (fresh noise) to the next one.

    eps, result: (B, C, H, W).
    """
    x0 = None
    for tau in taus:
        t = eps.new_full((len(eps),), tau)
        x_t = eps if x0 is None else net.schedule.noise(x0, normal(eps, generators), t)
        x0 = net.schedule.x0(x_t, guided(net, x_t, t, cond, uncond, guidance), t)
    return x0


@torch.no_grad()
def sample_ode(
    net: Callable,
    eps: Tensor,
    cond: Cond,
    taus: Iterable[float],
    uncond: Cond | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Deterministic steps along `taus` and from the last of them to clean data.

    eps, result: (B, C, H, W).
    """
    x_t, taus = eps, [*taus, 0.0]
    for tau, tau_next in zip(taus[:-1], taus[1:], strict=True):
        t, t_next = eps.new_full((len(eps),), tau), eps.new_full((len(eps),), tau_next)
        x_t = net.schedule.step(x_t, guided(net, x_t, t, cond, uncond, guidance), t, t_next)
    return x_t


def draw_samples(
    net: Callable,
    eps: Tensor,
    cond: Cond,
    taus: Iterable[float],
    sampler: str,
    uncond: Cond | None,
    guidance: float | None,
    generators: list[torch.Generator],
) -> Tensor:
    """By sampler: "x0" (noise again to each anchor) | "euler" (deterministic)."""
    if sampler == "x0":
        return sample_x0(net, eps, cond, taus, uncond, guidance, generators)
    return sample_ode(net, eps, cond, taus, uncond, guidance)


# --- random numbers ------------------------------------------------------------------------------


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone, and alike on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def normal(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Gaussian noise like `like` (B, ...); each generator fills an equal share of the rows, in
    order: one row each in training.
    """
    shape = (len(like) // len(generators), *like.shape[1:])
    rows = [torch.randn(shape, generator=g) for g in generators]
    return send(torch.cat(rows), like.device).to(like.dtype)


def uniform(
    like: Tensor, generators: list[torch.Generator], low: float = 0.0, high: float = 1.0
) -> Tensor:
    """(B,) in fp32 for the rows of `like` (B, ...), shared out as in `normal`."""
    each = len(like) // len(generators)
    u = torch.cat([torch.rand(each, generator=g) for g in generators])
    return low + (high - low) * send(u, like.device)


class Rng:
    """The random sources for one purpose in one training step.

    shared: one generator, equal on all ranks: for decisions that change which networks are called.
    own:    one generator per sample of the batch, keyed by the sample's global number, so that a
            sample's noise does not depend on how many ranks there are. (The toy's sample is a whole
            batch of points: one generator.)
    Nothing is kept between steps, so a resumed run draws the same numbers.
    """

    def __init__(self, seed: int, step: int, purpose: str, samples: Iterable[int]):
        self.shared = generator(seed, step, purpose)
        self.own = [generator(seed, step, purpose, i) for i in samples]


def draw_t(kind: str, schedule: Flow | DDPM, like: Tensor, rng: Rng) -> Tensor:
    """Times (B,) for the DMD and fake losses, drawn for each row of `like`, warped.

    kind: "uniform" on (.02, .98) | "logit-normal".
    """
    if kind == "uniform":
        u = uniform(like, rng.own, 0.02, 0.98)
    elif kind == "logit-normal":
        u = normal(like.new_empty(len(like), dtype=torch.float32), rng.own).sigmoid()
    else:
        raise ValueError(
            f'unknown distribution of times "{kind}"; choose from uniform, logit-normal'
        )
    return schedule.warp(u)
