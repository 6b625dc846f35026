"""An iteration and its networks, timed: in our order, in the released one, compiled, by part.

    prepare                 networks, optimizers and a batch, all random
    our_step                train.py's iteration; released_step: in the order of the released code
    two_orders              seconds of every kind of turn, and of the average iteration
    by_part                 seconds and FLOPs of it by network
    compiled                the same with compiled blocks
    peak_memory, planned    bytes as they are, and as the plan has them
    attention_backends, precision, reachable

Inputs are noised data; times are medians, after a warm-up. FLOPs are those of the model: what is
computed again counts as time and not as work. Knows nothing of flags.
"""

import contextlib
import copy
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import train
from config import Config, Refusal
from discriminator import augment, disc_loss, gan_loss, omega
from dmd import fake_loss, student_input
from engine import build, calls, plan
from ida import ida_update
from schedule import Rng
from teachers import find

LR = 1e-6  # SD 3.5's and SDXL's, where bf16 weights round an update away


@dataclass
class Bench:
    """Everything that is timed."""

    cfg: Config
    device: torch.device
    made: dict[str, list[nn.Module]]  # as calls.networks gives them
    nets: train.Nets
    opts: dict[str, train.Learner]
    batch: train.Batch
    vae_fp32: nn.Module  # what the released order decodes with
    calls: dict[str, calls.Call]


def prepare(cfg: Config, device: torch.device) -> Bench:
    torch.manual_seed(cfg.seed)
    frozen, family = torch.bfloat16 if cfg.bf16 else torch.float32, find(cfg.teacher)
    with device:
        made = calls.networks(cfg)
        for part in ("teacher", "VAE", "text", "backbone"):
            made[part] = [net.to(frozen) for net in made[part]]
        (student,), (teacher,), (vae,), (disc,) = (
            made[part] for part in ("student", "teacher", "VAE", "disc")
        )
        fake = copy.deepcopy(student)
        cond, uncond = (calls.conditioning(family, cfg.batch, frozen) for _ in range(2))
        images = torch.rand(cfg.batch, 3, *cfg.size) * 2 - 1
        text = torch.randn(cfg.batch, family.embedding_width())
        x0_real = torch.randn(cfg.batch, *family.latent_shape(cfg.size))
        null = uncond if family.uses_null else None
        batch = train.Batch(range(cfg.batch), images, x0_real, cond, null, text)
        nets = train.Nets(family, student, fake, teacher, disc, vae, student)
        table = calls.call_table(cfg, made)
    vae_fp32 = copy.deepcopy(vae).float()
    opts = train.build_learners(nets, cfg)
    bench = Bench(cfg, device, made, nets, opts, batch, vae_fp32, table)
    run_blocks(bench, cfg.compile)
    if cfg.channels_last:
        channels_last(bench)
    return bench


def run_blocks(bench: Bench, compiled: bool) -> None:
    """As build_nets has them: what is trained is computed again, where that was asked for."""
    nets, again = bench.nets, bench.cfg.recompute
    for net, recompute in ((nets.student, again), (nets.fake, again), (nets.teacher, False)):
        build.run_blocks(net, compiled, recompute)


def channels_last(bench: Bench) -> None:
    """As build_nets does it, and Adam anew: its state lies as weights do."""
    nets = bench.nets
    for net in (nets.student, nets.fake, nets.teacher, nets.vae):
        build.channels_last(net)
    bench.opts = train.build_learners(nets, bench.cfg)


# --- two orders of the same iteration ------------------------------------------------------------


def our_step(step: int, bench: Bench, cfg: Config) -> None:
    """Latents and texts come from a cache."""
    train.train_step(step, bench.batch, bench.nets, bench.opts, cfg)


def released_step(step: int, bench: Bench, cfg: Config) -> None:
    """The same losses in the order of the released code, with what it does besides.

    Images are encoded on every iteration, used or not, and "" is encoded by all text encoders; the
    image is decoded in fp32, at pure noise too; the student's adversarial pass is made on every
    turn and on most of them discarded; the reference's features are computed for each of the
    discriminator's three passes, and once more as the real image.
    """
    nets, opts, batch, disc = bench.nets, bench.opts, bench.batch, bench.nets.disc
    learn, log, cond, text = step % cfg.ttur == 0, defaultdict(list), batch.cond, batch.text
    student, fake, schedule = nets.student, nets.fake, nets.student.schedule

    def rng(purpose: str, ids=batch.ids) -> Rng:
        return Rng(cfg.seed, step, purpose, ids)

    with torch.no_grad():
        nets.vae.encode(batch.images)
        bench.calls["text: forward"].run()
    taus = train.anchors(cfg, schedule)
    x_t, i = student_input(student, batch.x0_real, cond, taus, rng("input"), cfg.p_backward)
    tau_start, tau_end = (x_t.new_full((len(x_t),), tau) for tau in (*taus, 0.0)[i : i + 2])
    weight = omega(schedule, tau_start)
    with torch.set_grad_enabled(learn):
        prediction = student(x_t, tau_start, cond)
        x0 = schedule.x0(x_t, prediction, tau_start)
        with torch.autocast(bench.device.type, enabled=False):
            image = augment(bench.vae_fp32.decode(x0), cfg.disc_augment, rng("augment made"))
        made = disc.features(image)
        adversarial = gan_or_nothing(disc, made, features(disc, batch), text, weight)
    if learn:
        draw = train.Draw(x0, x_t, prediction, tau_start, tau_end, weight)
        loss = train.student_loss(draw, batch, nets, cfg, rng, log) + cfg.w_gan * adversarial
        train.minimise("student", [loss], opts, step, cfg, log)
        ida_update(fake, student, cfg.ida_decay)
    loss = fake_loss(fake, x0, cond, cfg.t_fake, rng("fake"))
    train.minimise("fake", [loss], opts, step, cfg, log)
    real, reference = features(disc, batch), features(disc, batch)
    features(disc, batch)  # the reference again, for the image that was made
    disc.power_iteration()
    loss = disc_loss(disc, real, made, reference, text, weight)
    train.minimise("disc", [loss], opts, step, cfg, log)


@torch.no_grad()
def features(disc: nn.Module, batch: train.Batch) -> list[Tensor]:
    return disc.features(batch.images)


def gan_or_nothing(disc, made, reference, text: Tensor, weight: Tensor) -> Tensor:
    """The student's adversarial loss; without a gradient it is only computed."""
    if torch.is_grad_enabled():
        return gan_loss(disc, made, reference, text, weight)
    return -(weight[:, None] * disc(made, disc.condition(reference, text))).mean()


# --- measuring -----------------------------------------------------------------------------------


def seconds(run: Callable[[], object], iterations: int, device: torch.device) -> float:
    """The median, after one that is not counted."""
    times = []
    for _ in range(iterations + 1):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def autocast(bench: Bench) -> torch.autocast:
    return torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.cfg.bf16)


def once(bench: Bench, call: calls.Call) -> None:
    """One of plan's calls, for real."""
    with autocast(bench), torch.set_grad_enabled(call.learn):
        out = list(call.run())
        if call.learn:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])
    for net in call.nets:
        net.zero_grad()


def reachable(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, 10, device)


def times_called(bench: Bench) -> dict[str, float]:
    """How often the average iteration makes each of plan's calls."""
    found = defaultdict(float)
    for p, turn in calls.turns(bench.cfg):
        for name, n in calls.calls(turn, bench.cfg).items():
            found[name] += p * n
    return {name: n for name, n in found.items() if n}


def calls_of(bench: Bench) -> list[str]:
    """Names of plan's calls that an iteration makes, but the fake score's, which are the student's;
    a batch is there before it."""
    return [name for name in bench.calls if name not in calls.loading(cached=False)]


def flops_of(bench: Bench) -> dict[str, float]:
    """FLOPs of each call, counted while it runs; not where blocks are compiled."""
    work = {}
    for name in calls_of(bench):
        with calls.Tally() as meter:
            once(bench, bench.calls[name])
        work[name] = meter.flops - meter.again
    return calls.alike(work)


def by_part(bench: Bench, iterations: int, work: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of the average iteration: seconds and FLOPs, by network. work: as flops_of counted it."""
    times, spent = times_called(bench), {}
    for name in tqdm(calls_of(bench), desc="parts", leave=False, disable=None):
        call = bench.calls[name]
        spent[name] = seconds(lambda call=call: once(bench, call), iterations, bench.device)
    spent = calls.alike(spent)
    found = {part: {"seconds": 0.0, "flops": 0.0} for part in calls.PARTS if part != "text"}
    for name, n in times.items():
        part = found[name.split(":")[0]]
        part["seconds"] += n * spent[name]
        part["flops"] += n * work[name]
    return found


def kinds(cfg: Config) -> dict[tuple[bool, bool], tuple[float, int, Config]]:
    """Per (student's turn, judged): its probability, and a step and configuration that are so.

    The student draws once before it, where that kind of turn ever draws: backward simulation does
    so (K - 1) / 4 times on average.
    """
    with torch.device("meta"):
        schedule = find(cfg.teacher).build(cfg.shift).schedule
    taus, found = train.anchors(cfg, schedule), {}
    for p, turn in calls.turns(cfg):
        share, most = found.get((turn.learn, turn.judged), (0.0, 0))
        found[turn.learn, turn.judged] = share + p, max(most, turn.drawn)
    made = {}
    for kind, (p, most) in found.items():
        how = replace(cfg, ttur=1 if kind[0] else 10**6)
        if p:
            made[kind] = p, plan.find_step(how, taus, kind[0], min(1, most)), how
    return made


ORDERS = {"ours": our_step, "released": released_step}


def run_turn(bench: Bench, kind: tuple[bool, bool], name: str = "ours") -> None:
    """One iteration of this kind (see `kinds`) in this order."""
    _, step, cfg = kinds(bench.cfg)[kind]
    with autocast(bench):
        ORDERS[name](step, bench, cfg)


def two_orders(
    bench: Bench, iterations: int, names: Iterable[str] = tuple(ORDERS)
) -> dict[str, dict[str, float]]:
    """Seconds of each kind of turn and of the average iteration, in our order and the released."""
    found, mean = {}, dict.fromkeys(names, 0.0)
    every = kinds(bench.cfg).items()
    for (learn, judged), (p, step, cfg) in tqdm(every, "turns", leave=False, disable=None):
        row = {}
        for name in names:

            def run(order=ORDERS[name], step=step, cfg=cfg) -> None:
                with autocast(bench):
                    order(step, bench, cfg)

            row[name] = seconds(run, iterations, bench.device)
            mean[name] += p * row[name]
        noise = "" if judged else ", at pure noise"
        found[("student's turn" if learn else "another turn") + noise] = row
    return found | {"average iteration": mean}


def compiled(bench: Bench, iterations: int, work: dict[str, float]) -> dict:
    """Turns and parts with compiled blocks, and seconds of the first turns, which compile them.

    Blocks are then as they were. Where no compiler works: "refused", and why.
    """
    try:
        build.check_compiler(bench.device)
    except Refusal as error:
        return {"refused": str(error)}
    run_blocks(bench, True)
    begin = time.perf_counter()
    for kind in kinds(bench.cfg):
        run_turn(bench, kind)
    found = {"compiling": time.perf_counter() - begin}
    found["orders"] = two_orders(bench, iterations, ["ours"])
    found["parts"] = by_part(bench, iterations, work)
    run_blocks(bench, bench.cfg.compile)
    return found


def peak_memory(bench: Bench) -> float:
    """Bytes at the worst moment of a student's turn: the GPU's, or the tensors' that are alive."""
    nets, batch = bench.nets, bench.batch
    state = [
        x
        for opt in bench.opts.values()
        for optimizer in opt.optimizers
        for s in optimizer.state.values()
        for x in s.values()
    ]
    held = [nets.student, nets.fake, nets.teacher, nets.vae, nets.disc]
    known = [x for net in held for x in (*net.parameters(), *net.buffers())] + state
    known += [batch.images, batch.x0_real, *batch.cond.values()]
    meter = calls.Tally(known)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        meter = contextlib.nullcontext()
    with meter:
        run_turn(bench, max(kinds(bench.cfg)))  # the student's turn, judged if any is
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return sum(x.nbytes for x in known) + meter.peak


def planned(cfg: Config) -> int:
    """Bytes of the same by the plan: alone, from a cache."""
    return plan.measure(replace(cfg, cache="cache"), train.train_step).total


def attention_backends(bench: Bench, iterations: int) -> dict[str, float | None]:
    """Seconds of the student's forward pass with each kernel, None where the machine has it not."""
    found = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            try:
                found[name] = forward_seconds(bench, iterations)
            except RuntimeError:
                found[name] = None
    return found


def forward_seconds(bench: Bench, iterations: int) -> float:
    call = bench.calls["student: forward"]
    return seconds(lambda: once(bench, call), iterations, bench.device)


def precision(bench: Bench, iterations: int) -> dict[str, dict[str, float]]:
    """IDA and Adam on fp32 and on bf16 weights: seconds of IDA, and the share of weights that move.

    The student's step is Adam's first at LR, from random gradients; IDA then pulls the fake score
    from where the student was. The largest matrix stands for all.
    """
    weight = max(bench.nets.student.parameters(), key=Tensor.numel).detach()
    gradient, found = torch.randn_like(weight), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        student, fake = (weight.to(dtype, copy=True).requires_grad_() for _ in range(2))
        before, student.grad = fake.detach().clone(), gradient.to(dtype)
        torch.optim.AdamW([student], lr=LR, weight_decay=0.0).step()
        ida = 1 - (bench.cfg.ida_decay if bench.cfg.ida_decay < 1 else 0.97)
        pair = [fake.detach()], [student.detach()]
        torch._foreach_lerp_(*pair, ida)
        found[name] = {
            "Adam moves": (student != before).float().mean().item(),
            "IDA moves": (fake != before).float().mean().item(),
            "IDA seconds": seconds(
                lambda pair=pair, ida=ida: torch._foreach_lerp_(*pair, ida),
                iterations,
                bench.device,
            ),
        }
    return found


# --- as text -------------------------------------------------------------------------------------


def about(cfg: Config, reach: float, device: torch.device) -> list[str]:
    return [
        f"{find(cfg.teacher).name}, {cfg.size[0]} x {cfg.size[1]}, batch {cfg.batch}",
        f"torch {torch.__version__}, {machine(device)}",
        f"{reach / 1e12:.3g} TFLOP/s in a large matrix product",
    ]


def orders_table(orders: dict[str, dict[str, float]]) -> list[str]:
    """Seconds; a ratio where there are both orders."""
    names = list(orders["average iteration"])
    both = len(names) == 2
    lines = [f"{'seconds':<34}" + "".join(f"{name:>10}" for name in names) + "   ratio" * both]
    for name, row in orders.items():
        ratio = f"{row['released'] / row['ours']:>8.2f}" if both else ""
        lines.append(f"  {name:<32}" + "".join(f"{row[x]:>10.4f}" for x in names) + ratio)
    return lines


def parts_table(parts: dict[str, dict[str, float]], mean: float, reach: float) -> list[str]:
    """mean: seconds of the average iteration; reach: FLOPs a second."""
    lines = [f"{'average iteration, by part':<34}{'seconds':>10}{'TFLOP':>10}{'MFU':>8}"]
    work = sum(row["flops"] for row in parts.values())
    rows = {name: (row["seconds"], row["flops"]) for name, row in parts.items()}
    for name, (spent, flops) in (rows | {"all, with updates": (mean, work)}).items():
        share = flops / spent / reach if spent else 0.0
        lines.append(f"  {name:<32}{spent:>10.4f}{flops / 1e12:>10.4g}{share:>8.1%}")
    return lines


def compiled_table(found: dict, reach: float) -> list[str]:
    """Of what `compiled` found."""
    if "refused" in found:
        return [found["refused"]]
    mean = found["orders"]["average iteration"]["ours"]
    first = f"compiled blocks; the first turns, compiling, took {found['compiling']:.1f} s"
    rows = [*orders_table(found["orders"]), *parts_table(found["parts"], mean, reach)]
    return [first, *rows]


def memory_line(peak: float, planned: float) -> str:
    return f"peak memory, GB: {peak / 1e9:.3f}; planned {planned / 1e9:.3f}"


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
