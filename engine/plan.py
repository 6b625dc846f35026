"""What an iteration takes, before anything is loaded: train.py's own, run without memory.

    measure      a student's turn and another -> a Plan, of rank 0 of so many GPUs
    show_plan    as text: does it fit, which card would do, and what to change

No weight is read, and neither a GPU nor a compiler is needed: unloaded.py has a run without files,
meter.py what is read off it.
"""

import argparse
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from config import Config
from discriminator import Discriminator
from engine import build, ranks
from engine.batch import ids_of
from engine.calls import PARTS, conditioning, turns
from engine.cards import CARDS, Card
from engine.meter import CPU, Meter
from engine.reals import teacher_calls
from engine.sheets import is_watched
from engine.unloaded import Run, one_of, without_files
from engine.views import off_by
from engine.watch import look_at, looks
from schedule import Rng
from teachers import find

RESERVE = 4e9  # bytes that torch cannot hand out: CUDA's context, NCCL's buffers, fragmentation

# --- what its turns take -------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One kind of iteration, as it was run."""

    stages: dict[tuple[str, str], int]  # (network, what it does) -> bytes, at the highest
    peak: int
    flops: Counter  # by network; with what is computed again
    again: Counter  # of these, what is computed again
    loaded: Counter  # and what the batch took
    kernels: Counter
    collectives: Counter  # bytes
    waits: int
    call: int  # FLOPs of the student's call without a gradient
    call_kernels: Counter  # and its kernels


@dataclass(frozen=True)
class Plan:
    cfg: Config
    gpus: int
    parts: dict[str, int]
    build: int  # bytes at the highest while networks are loaded
    saved: int
    host: int
    drawn: int  # calls of the student before, in the turns that were run
    turns: dict[bool, Turn]  # whether the student learns
    look: tuple[int, int]  # the watch, at the images of one call: bytes at the highest, FLOPs

    @property
    def total(self) -> int:
        return max(self.build, self.look[0], *(turn.peak for turn in self.turns.values()))


def find_step(cfg: Config, taus: tuple[float, ...], learn: bool, drawn: int) -> int:
    """The first at which the student learns, or not, from the anchor after so many; as
    `student_input` draws it, after backward simulation where there is a choice."""
    for step in range(100_000):
        shared = Rng(cfg.seed, step, "input", ids_of(cfg, step)).shared
        i = int(torch.randint(len(taus), (), generator=shared))
        backward = bool(torch.rand((), generator=shared) < cfg.p_backward)
        if (step % cfg.ttur == 0) == learn and i == drawn and (backward or not cfg.p_backward):
            return step
    raise AssertionError("no such step")


def measure(cfg: Config, train_step: Callable, gpus: int = 1, memory: float = 80e9) -> Plan:
    """cfg.cache: text and latents come from one; memory: of each GPU, for --shard auto."""
    meter, cached = Meter(), bool(cfg.cache)
    cfg = dataclasses.replace(cfg, compile=False, channels_last=False)
    if cfg.shard == "auto" and gpus > 1:
        cfg = dataclasses.replace(cfg, shard=choose_shards(cfg, memory))
    silence = warnings.catch_warnings(action="ignore")  # torch's, of tensors without memory
    with silence, one_of(gpus), without_files(cfg.teacher, meter, cached, cfg.t5), meter:
        bar = tqdm(total=2 + (cfg.ttur > 1), desc="plan", leave=False, disable=None)
        shop = Run(cfg, meter, cached)
        taus, ran = build.anchors(cfg, shop.nets.student.schedule), {}
        for learn in (True, False)[: 1 + (cfg.ttur > 1)]:
            bar.update()
            step = find_step(cfg, taus, learn, min(1, len(taus) - 1))
            meter.reset()
            batch = shop.load(ids_of(cfg, step))
            loaded = Counter(meter.flops)
            with build.precision(cfg, shop.nets, CPU):
                train_step(step, batch, shop.nets, shop.opts, cfg)
            del batch
            ran[learn] = Turn(
                **{"stages": meter.stages, "peak": meter.peak, "flops": meter.flops},
                **{"again": meter.again, "loaded": loaded, "kernels": meter.kernels},
                **{"collectives": meter.collectives, "waits": meter.waits},
                call=meter.flops_of_call.get("student", 0),
                call_kernels=meter.kernels_of_call.get("student", Counter()),
            )
        bar.close()
        meter.reset()
        if is_watched(cfg):
            with build.precision(cfg, shop.nets, CPU), torch.no_grad():
                look_at(shop.latents(looks(cfg, shop.nets.family, gpus)[0]), shop.nets)
        look = meter.peak, sum(meter.flops.values())
        drawn = min(1, len(taus) - 1) * (cfg.p_backward > 0)
        sizes = shop.resident(), shop.built, shop.saved(), shop.loading()
        return Plan(cfg, gpus, *sizes, drawn, ran, look)


def choose_shards(cfg: Config, memory: float) -> str:
    """What --shard auto does."""
    family = find(cfg.teacher)
    with torch.device("meta"):
        how = family.embedding_width(), cfg.disc_channels
        disc = Discriminator(family.build_backbone(), *how) if cfg.w_gan else None
    weights = build.count_trained(cfg, family, disc)
    return "fsdp" if ranks.wants_shards(weights, memory) else "ddp"


def flops_of(plan: Plan, learn: bool, judged: bool, drawn: int) -> dict[str, float]:
    """Of such an iteration, by network, with what makes its batch: of the turn that was run, but
    for what was not judged, and so many calls of the student before."""
    turn = plan.turns[learn]
    found = {part: turn.flops[part] for part in PARTS}
    found["student"] += (drawn - plan.drawn) * turn.call * plan.cfg.accumulate
    for part in ("VAE", "discriminator"):
        found[part] = found[part] if judged else turn.loaded[part]
    return found


def mean_flops(plan: Plan, only: bool | None = None) -> dict[str, float]:
    """Of the average iteration, by network; only: of the student's turns, or of the others."""
    found, total = dict.fromkeys(PARTS, 0.0), 0.0
    for p, kind in turns(plan.cfg):
        if p and only in (None, kind.learn):
            total += p
            for part, n in flops_of(plan, **vars(kind)).items():
                found[part] += p * n
    return {part: n / total for part, n in found.items()}


# --- train.py --plan -----------------------------------------------------------------------------


def fits(plan: Plan, memory: float) -> bool:
    return plan.total + RESERVE <= memory


def report(plan: Plan, memory: float) -> str:
    """GB (10^9 bytes) of each GPU, TFLOP of each GPU."""
    cfg, turn = plan.cfg, max(plan.turns.values(), key=lambda turn: turn.peak)
    resident, gb = sum(plan.parts.values()), 1e9
    sizes = f"{cfg.size[0]} x {cfg.size[1]}, {cfg.batch} a GPU"
    lines = [f"{find(cfg.teacher).name}, {sizes}, {plan.gpus} x {memory / gb:g} GB", ""]
    lines += ["always there"]
    lines += [f"  {name:<36}{n / gb:>8.2f}" for name, n in plan.parts.items()]
    lines += [f"{'in all':<38}{resident / gb:>8.2f}", "and at the highest, with that"]
    for (part, doing), n in turn.stages.items():
        name = f"{part or 'losses'}: {doing}"
        lines += [f"  {name:<36}{n / gb:>8.2f}{'  <- most' if n == turn.peak else ''}"]
    verdict = "fits" if fits(plan, memory) else "does not fit"
    room = f"with {RESERVE / gb:g} GB to spare"
    lines += [f"{'peak, GB per GPU':<38}{plan.total / gb:>8.2f}  {verdict}, {room}"]
    lines += [f"{'while networks are loaded':<38}{plan.build / gb:>8.2f}"]
    lines += [f"{'on the host of rank 0, loading':<38}{plan.host / gb:>8.2f}"]
    disk = f"{cfg.keep} kept, and one being written: {(cfg.keep + 1) * plan.saved / gb:.2f}"
    lines += [f"{'a checkpoint':<38}{plan.saved / gb:>8.2f}  {disk}", ""]
    return "\n".join([*lines, *work(plan)])


def work(plan: Plan) -> list[str]:
    columns = {"every turn": mean_flops(plan), "student's turn": mean_flops(plan, True)}
    if False in plan.turns:
        columns["another turn"] = mean_flops(plan, False)
    lines = [f"{'TFLOP per iteration and GPU':<38}" + "".join(f"{x:>16}" for x in columns)]
    columns = {name: x | {"sum": sum(x.values())} for name, x in columns.items()}
    for part in (*PARTS, "sum"):
        row = "".join(f"{x[part] / 1e12:>16.4g}" for x in columns.values())
        lines += [f"  {part:<36}{row}"]
    learn, other = plan.turns[True], plan.turns.get(False)
    for name, of in (
        ("GB between ranks", lambda turn: sum(turn.collectives.values()) / 1e9),
        ("waits for the GPU", lambda turn: turn.waits),
    ):
        row = f"{of(learn):>16.4g}" + (f"{of(other):>16.4g}" if other else "")
        lines += [f"{name:<38}{'':>16}{row}"]
    return lines


def seconds(plan: Plan, card: Card) -> float:
    """Of the average iteration, by roofline."""
    learn = card.seconds(plan.turns[True].kernels)
    other = card.seconds(plan.turns[False].kernels) if False in plan.turns else 0.0
    return learn / plan.cfg.ttur + other * (1 - 1 / plan.cfg.ttur)


def reals(plan: Plan, card: str) -> list[str]:
    """What the images of --make-reals take, before training: the teacher's calls, which take as
    long as the student's. Their decoding is not counted."""
    cfg, turn = plan.cfg, plan.turns.get(False, plan.turns[True])
    calls = teacher_calls(cfg, find(cfg.teacher)) * cfg.make_reals / cfg.batch
    hours = calls * CARDS[card].seconds(turn.call_kernels) / plan.gpus / 3600
    each = calls * turn.call / cfg.make_reals / 1e12
    name, many = f"making {cfg.make_reals:,} images", f"{plan.gpus} x {card}"
    return [
        f"{name + ', TFLOP of each':<38}{each:>16.4g}",
        f"{name + ', hours':<38}{hours:>16.3g}  {many}, by roofline: really about twice as long",
    ]


def watch(plan: Plan) -> tuple[float, float]:
    """FLOPs of all that the watch takes: the student's images, and the teacher's once. Each call
    is as one of the student's in training, and of every image drawn something is measured."""
    cfg, turn = plan.cfg, plan.turns.get(False, plan.turns[True])
    images, steps, teachers = looks(cfg, find(cfg.teacher), plan.gpus)
    call, seen = turn.call / cfg.batch, plan.look[1] / min(images, cfg.batch)
    each = images * (steps * call + seen)
    return each * (1 + cfg.steps // cfg.watch_every), images * (teachers * call + seen)


def watched(plan: Plan) -> str:
    """The share of the run that it is."""
    cfg, parts = plan.cfg, watch(plan)
    whole = sum(mean_flops(plan).values()) * cfg.steps
    students, teachers, total = (f"{100 * x / whole:.2g} %" for x in (*parts, sum(parts)))
    told = f"every {cfg.watch_every} iterations {students}, the teacher's images {teachers}"
    return f"{'looks at drift, share of the run':<38}{total:>16}  {told}"


NARROW = 0.1, 4  # of a network that is computed to see what 8 bits change: width, blocks


@torch.no_grad()
def eight_bits(cfg: Config) -> str:
    """How far --base-dtype's prediction is from that of 16 bits: at reduced width, with weights of
    unit gain (deviation 1 / sqrt(in)), since none are read here, and random input."""
    family = find(cfg.teacher)
    family = family if family.examined else family.scaled(*NARROW)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, t = family.build(cfg.shift), torch.tensor([0.3, 0.8])
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
        x_t = torch.randn(2, *family.latent_shape([min(n, 128) for n in cfg.size]))
        off = off_by(cfg.base_dtype, net, x_t, t, conditioning(family, 2, torch.float32))
    name = f"error of the base in {cfg.base_dtype}"
    return f"{name:<38}{100 * off:>14.2g} %  of a small network's prediction, random weights"


def cards(plan: Plan, twice: Plan) -> list[str]:
    """Which fit, how fast, and with which batch. twice: the plan of a batch twice as large."""
    lines = [f"{'card':<12}{'GB':>6}  {'largest batch':<16}{'s / iteration':>14}{'s / image':>11}"]
    batch, slope = plan.cfg.batch, (twice.total - plan.total) / plan.cfg.batch
    for name, card in CARDS.items():
        room = card.memory * 1e9 - RESERVE - plan.total
        most = batch + int(room // slope) if room >= 0 else 0
        shown = str(most) if most else "does not fit"
        times = (seconds(plan, card), seconds(twice, card))
        each = (times[1] - times[0]) / batch
        spent = times[0] + each * (most - batch)
        row = f"{spent:>14.3g}{spent / most:>11.3g}" if most else ""
        lines.append(f"  {name:<10}{card.memory:>6g}  {shown:<16}{row}")
    return [*lines, "  (by roofline: real runs take about twice as long)"]


def changes(plan: Plan) -> list[tuple[str, dict, int]]:
    """What makes it smaller, each alone: flags, fields of the configuration, GPUs."""
    cfg, gpus, half = plan.cfg, plan.gpus, tuple(n // 2 for n in plan.cfg.size)
    tried = [
        ("--cache DIR", {"cache": "cache"}, gpus),
        (f"{2 * gpus} GPUs", {}, 2 * gpus),
        (f"{4 * gpus} GPUs", {}, 4 * gpus),
        ("--recompute", {"recompute": True}, gpus),
        ("--disc-channels 256", {"disc_channels": 256} if cfg.w_gan else {}, gpus),
        ("--batch 1", {"batch": 1}, gpus),
        ("--size {} {}".format(*half), {"size": half}, gpus),
    ]
    same = [(name, {k: getattr(cfg, k) for k in fields}, gpus) for name, fields, _ in tried]
    return [one for one, other in zip(tried, same, strict=True) if one != other]


def show_plan(cfg: Config, given: argparse.Namespace, train_step: Callable) -> int:
    """Prints the plan, and what to change if it does not fit. Returns the exit code.

    Raises ValueError on what cannot be.
    """
    find(cfg.teacher).check_size(cfg.size)
    memory = 1e9 * (CARDS[given.card].memory if given.card else given.gpu_memory)
    plan = measure(cfg, train_step, given.gpus, memory)
    print(report(plan, memory))
    if cfg.base_dtype != "bf16":
        print(eight_bits(cfg))
    if is_watched(cfg):
        print(watched(plan))
    if cfg.make_reals:
        print("\n".join(reals(plan, given.card or "h100")))
    if given.card:
        name, spent = f"seconds of an iteration, {given.card}", seconds(plan, CARDS[given.card])
        print(f"{name:<38}{spent:>16.4g}")
        twice = dataclasses.replace(cfg, batch=2 * cfg.batch)
        print("\n".join(["", *cards(plan, measure(twice, train_step, given.gpus, memory))]))
    if fits(plan, memory):
        return 0
    print("\nwhat to change, each alone, and what it then needs (GB per GPU)")
    for name, fields, count in changes(plan):
        changed = dataclasses.replace(cfg, **fields, ttur=1)  # a student's turn has the peak
        other = measure(changed, train_step, count, memory)
        if other.total < plan.total:
            shown = "  fits" if fits(other, memory) else ""
            print(f"  {name:<36}{other.total / 1e9:>8.2f}{shown}", flush=True)
    return 1
