"""How long an iteration takes, where its time and memory go, and what the released order takes.

    python -m engine.bench                                                 # the embedded teacher
    python -m engine.bench --teacher flux-dev --width-scale 0.1 --depth 6 --size 256 256
    python -m engine.bench --teacher flux-dev --depth 12 --compile --out bench.json  # a GPU

Random weights, random text and images: no file is read. Uses the CUDA GPU when there is one. Inputs
are noised data; times are medians, after a warm-up. FLOPs are those of the model: what is computed
again counts as time and not as work. MFU is their share of what a large matrix product reaches.
"""

from engine.flags import bench_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    bench_arguments(__doc__)

import contextlib
import copy
import dataclasses
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import train
from config import Config, Refusal
from discriminator import augment, disc_loss, gan_loss, omega
from dmd import fake_loss, student_input
from engine import plan, ranks
from ida import ida_update
from schedule import Rng
from teachers import FOUND, find

LR = 1e-6  # SD 3.5's and SDXL's, where bf16 weights round an update away


@dataclasses.dataclass
class Bench:
    """Everything that is timed."""

    cfg: Config
    device: torch.device
    made: dict[str, list[nn.Module]]  # as plan.networks gives them
    nets: train.Nets
    opts: dict[str, train.Learner]
    batch: train.Batch
    vae_fp32: nn.Module  # what the released order decodes with
    calls: dict[str, plan.Call]


def prepare(cfg: Config, device: torch.device) -> Bench:
    torch.manual_seed(cfg.seed)
    frozen, family = torch.bfloat16 if cfg.bf16 else torch.float32, find(cfg.teacher)
    with device:
        made = plan.networks(cfg)
        for part in ("teacher", "VAE", "text", "backbone"):
            made[part] = [net.to(frozen) for net in made[part]]
        (student,), (teacher,), (vae,), (disc,) = (
            made[part] for part in ("student", "teacher", "VAE", "disc")
        )
        fake = copy.deepcopy(student)
        if cfg.recompute:  # the copy's blocks must not run the student's
            for block in fake.blocks():
                block.__dict__.pop("forward")
            plan.ranks.recompute(fake)
        cond, uncond = (plan.conditioning(family, cfg.batch, frozen) for _ in range(2))
        images = torch.rand(cfg.batch, 3, *cfg.size) * 2 - 1
        text = torch.randn(cfg.batch, family.embedding_width())
        x0_real = torch.randn(cfg.batch, *family.latent_shape(cfg.size))
        null = uncond if family.uses_null else None
        batch = train.Batch(range(cfg.batch), images, x0_real, cond, null, text)
        nets = train.Nets(family, student, fake, teacher, disc, vae, student)
        calls = plan.call_table(cfg, made)
    vae_fp32 = copy.deepcopy(vae).float()
    opts = train.build_learners(nets, cfg)
    return Bench(cfg, device, made, nets, opts, batch, vae_fp32, calls)


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


def once(bench: Bench, call: plan.Call) -> None:
    """One of plan's calls, for real."""
    with autocast(bench), torch.set_grad_enabled(call.learn):
        out = list(call.run())
        if call.learn:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])
    for net in call.nets:
        net.zero_grad()


def reachable(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, 10, device)


def by_part(bench: Bench, iterations: int) -> dict[str, dict[str, float]]:
    """Of the average iteration: seconds and FLOPs, by network; FLOPs counted while they happen."""
    spent, work = {}, {}
    for name, call in tqdm(bench.calls.items(), desc="parts", leave=False, disable=None):
        with plan.Meter() as meter:
            once(bench, call)
        work[name] = meter.flops - meter.again
        spent[name] = seconds(lambda call=call: once(bench, call), iterations, bench.device)
    spent, work = plan.alike(spent), plan.alike(work)
    found = {part: {"seconds": 0.0, "flops": 0.0} for part in plan.PARTS if part != "text"}
    for p, turn in plan.turns(bench.cfg):
        for name, n in plan.calls(turn, bench.cfg).items():
            if n:
                found[name.split(":")[0]]["seconds"] += p * n * spent[name]
                found[name.split(":")[0]]["flops"] += p * n * work[name]
    return found


def kinds(cfg: Config) -> dict[tuple[bool, bool], tuple[float, int, Config]]:
    """Per (student's turn, judged): its probability, and a step and configuration that are so."""
    with torch.device("meta"):
        schedule = find(cfg.teacher).build(cfg.shift).schedule
    taus, found = train.anchors(cfg, schedule), {}
    for p, turn in plan.turns(cfg):
        kind = turn.learn, turn.judged
        share = found[kind][0] if kind in found else 0.0
        for step in range(1, 1000):
            shared = Rng(cfg.seed, step, "input", ()).shared
            i = int(torch.randint(len(taus), (), generator=shared))
            if bool(schedule.alpha(torch.tensor(taus[i])) > 0) == turn.judged:
                break
        how = replace(cfg, ttur=1 if turn.learn else 10**6)
        if share + p:
            found[kind] = share + p, step, how
    return found


def two_orders(bench: Bench, iterations: int) -> dict[str, dict[str, float]]:
    """Seconds of each kind of turn and of the average iteration, in our order and the released."""
    orders = {"ours": our_step, "released": released_step}
    found, mean = {}, dict.fromkeys(orders, 0.0)
    for (learn, judged), (p, step, cfg) in tqdm(
        kinds(bench.cfg).items(), "turns", leave=False, disable=None
    ):
        row = {}
        for name, order in orders.items():

            def run(order=order, step=step, cfg=cfg) -> None:
                with autocast(bench):
                    order(step, bench, cfg)

            row[name] = seconds(run, iterations, bench.device)
            mean[name] += p * row[name]
        noise = "" if judged else ", at pure noise"
        found[("student's turn" if learn else "another turn") + noise] = row
    return found | {"average iteration": mean}


def peak_memory(bench: Bench) -> float:
    """Bytes at the worst moment of a student's turn: the GPU's, or the tensors' that are alive."""
    found = kinds(bench.cfg)
    _, step, cfg = found[max(found)]  # the student's turn, judged if any is
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
    meter = plan.Meter(known)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        meter = contextlib.nullcontext()
    with autocast(bench), meter:
        our_step(step, bench, cfg)
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return sum(x.nbytes for x in known) + plan.peak(meter.history, 1)


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


def compiled(bench: Bench, iterations: int) -> dict[str, float | None]:
    """The student's forward pass, its blocks as they are and compiled; None: no compiler here."""
    found = {"eager": forward_seconds(bench, iterations)}
    for block in bench.nets.student.blocks():
        block.compile()
    begin = time.perf_counter()
    try:
        once(bench, bench.calls["student: forward"])
    except RuntimeError:
        return found | {"compiled": None}
    found["compiling"] = time.perf_counter() - begin
    return found | {"compiled": forward_seconds(bench, iterations)}


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


# --- the command ---------------------------------------------------------------------------------


def measure(bench: Bench, iterations: int, compiling: bool) -> dict:
    dtype = torch.bfloat16 if bench.cfg.bf16 else torch.float32
    found = {"machine": machine(bench.device), "reachable": reachable(bench.device, dtype)}
    found["orders"] = two_orders(bench, iterations)
    found["peak"] = peak_memory(bench)
    found["parts"] = by_part(bench, iterations)
    found["precision"] = precision(bench, iterations)
    found["attention"] = attention_backends(bench, iterations)
    if compiling:
        found["compile"] = compiled(bench, iterations)
    return found


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def table(cfg: Config, found: dict, planned: float) -> str:
    reach, orders = found["reachable"], found["orders"]
    lines = [
        f"{find(cfg.teacher).name}, {cfg.size[0]} x {cfg.size[1]}, batch {cfg.batch}",
        f"torch {torch.__version__}, {found['machine']}",
        f"{reach / 1e12:.3g} TFLOP/s in a large matrix product",
        "",
        f"{'seconds':<34}{'ours':>10}{'released':>10}{'ratio':>8}",
    ]
    for name, row in orders.items():
        ratio = row["released"] / row["ours"]
        lines.append(f"  {name:<32}{row['ours']:>10.4f}{row['released']:>10.4f}{ratio:>8.2f}")
    lines += ["", f"{'average iteration, by part':<34}{'seconds':>10}{'TFLOP':>10}{'MFU':>8}"]
    for name, row in found["parts"].items():
        share = row["flops"] / row["seconds"] / reach if row["seconds"] else 0.0
        flops = row["flops"] / 1e12
        lines.append(f"  {name:<32}{row['seconds']:>10.4f}{flops:>10.4g}{share:>8.1%}")
    work = sum(row["flops"] for row in found["parts"].values())
    mean = orders["average iteration"]["ours"]
    share = work / mean / reach
    lines.append(f"  {'all, with updates':<32}{mean:>10.4f}{work / 1e12:>10.4g}{share:>8.1%}")
    peak = found["peak"] / 1e9
    lines += ["", f"peak memory, GB: {peak:.3f}; planned {planned / 1e9:.3f}", ""]
    lines += [f"{'the student, forward':<34}{'seconds':>10}"]
    for name, spent in (found["attention"] | found.get("compile", {})).items():
        shown = "not here" if spent is None else f"{spent:.4f}"
        lines.append(f"  {name.lower().replace('_', ' '):<32}{shown:>10}")
    lines += ["", f"{f'weights at learning rate {LR:g}':<34}{'fp32':>10}{'bf16':>10}"]
    for name in ("Adam moves", "IDA moves"):
        row = [found["precision"][dtype][name] for dtype in ("fp32", "bf16")]
        lines.append(f"  {name:<32}" + "".join(f"{x:>10.1%}" for x in row))
    row = [found["precision"][dtype]["IDA seconds"] for dtype in ("fp32", "bf16")]
    return "\n".join([*lines, f"  {'IDA seconds':<32}" + "".join(f"{x:>10.2g}" for x in row)])


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def main() -> None:
    cfg, given = bench_arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ranks.refusals():
        find(cfg.teacher).check_size(cfg.size)
        cfg = replace(cfg, p_backward=0.0, ema=0.0, w_gan=cfg.w_gan or 1.0)
        FOUND[cfg.teacher] = find(cfg.teacher).scaled(given.width_scale, given.depth)
        measured = plan.Measured(cfg, device.type == "cuda")
        planned, free = measured.plan(1, cached=True).total, free_memory(device)
        if planned > free:
            raise Refusal(
                f"needs {planned / 1e9:.1f} GB and {free / 1e9:.1f} are free; "
                "take a smaller --width-scale, --depth, --size or --batch"
            )
    found = measure(prepare(cfg, device), given.iterations, given.compile)
    print(table(cfg, found, planned))
    if given.out:
        settings = {"config": dataclasses.asdict(cfg), "planned": planned}
        given.out.write_text(json.dumps(settings | found, indent=1))


if __name__ == "__main__":
    main()
