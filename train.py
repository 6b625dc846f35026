"""SenseFlow: distil a flow model into a few-step student (Algorithm 1 of the paper).

    python train.py                            # the embedded teacher, on a CPU, in minutes
    python train.py --student-steps 2          # a two-step student
    python train.py --no-ida --no-isg --no-gan # plain DMD; each part has its switch
    torchrun --nproc_per_node 8 train.py --teacher flux-dev --data DIR [--weights DIR]
    python train.py --teacher flux-dev --plan --gpus 8 --gpu-memory 80   # does it fit?
    python train.py --help                     # every setting

The same command continues an interrupted run. Results are in runs/TEACHER (or --out):
student.safetensors, samples.png, curves.png, log.csv, metrics.json.
"""

import argparse
import collections
import copy
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import parallel
from cache import Cache, cond_of, fill_cache, frozen_rows, read_null
from config import Config, Parser, parse, refuse
from data import Ahead, Prompts, batch_ids, open_data
from discriminator import Discriminator, augment, disc_loss, gan_loss, omega
from dmd import dmd_loss, fake_loss, student_input
from exam import Exam, exam_table, format_table
from ida import ida_update
from images import Images, Pairs
from isg import isg_loss
from nets.weights import merge_weights, stream_weights
from pictures import curves, exam_pictures, sheet
from plan import add_plan_flags, show_plan
from run import LOSSES, Run, keep_samples, open_board, open_log, prepare_folder, say
from schedule import Cond, Rng, generator, grid, normal, sample_x0
from teachers import (
    Files,
    build,
    check_size,
    embedding_width,
    latent_shape,
    load_backbone,
    load_reader,
    load_start,
    load_student,
    load_teacher,
    load_text,
    load_vae,
    locate,
    null_for,
    prefix_of,
)


@dataclass
class Batch:
    ids: range  # global sample numbers
    images: Tensor | None  # (B, 3, H, W) in [-1, 1]; None: captions alone
    x0_real: Tensor  # (B, C, h, w)
    cond: Cond
    uncond: Cond | None
    text: Tensor | None  # (B, E), what the discriminator reads of the caption

    def split(self, count: int) -> list["Batch"]:
        """`count` equal parts, in order."""

        def cut(x: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * count if x is None else x.chunk(count)

        def cut_all(cond: Cond | None) -> Sequence[Cond | None]:
            if cond is None:
                return [None] * count
            parts = zip(*map(cut, cond.values()), strict=True)
            return [dict(zip(cond, part, strict=True)) for part in parts]

        each = len(self.ids) // count
        ids = [self.ids[k * each : (k + 1) * each] for k in range(count)]
        tensors = (cut(self.images), cut(self.x0_real), cut_all(self.cond), cut_all(self.uncond))
        return [Batch(*part) for part in zip(ids, *tensors, cut(self.text), strict=True)]


@dataclass
class Draw:
    """What the student drew for a batch, and what of it the others learn from."""

    x0: Tensor  # (B, C, h, w)
    path: tuple[Tensor, ...]  # x_t, the prediction there, tau_start, tau_end
    weight: Tensor  # (B,) omega
    real: list[Tensor] | None  # the discriminator's features of real images, None without work
    reference: list[Tensor] | None  # of the same as reference
    made: list[Tensor] | None  # of what the student drew
    text: Tensor | None  # (B, E)


@dataclass
class Nets:
    student: nn.Module
    fake: nn.Module
    teacher: nn.Module
    disc: Discriminator | None
    vae: nn.Module
    ema: nn.Module  # the student's moving average; the student itself without one
    text: nn.Module | None = None  # captions -> cond; None with a cache
    reader: nn.Module | None = None  # captions -> what the discriminator reads of them; likewise
    null: Cond | None = None  # the null caption, encoded once; None: guidance is a teacher's input
    cache: Cache | None = None


@dataclass
class Learner:
    """A network, its optimizer and the learning rate its schedule multiplies."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    lr: float

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


# --- Algorithm 1 ---------------------------------------------------------------------------------


def train_step(
    step: int, batch: Batch, nets: Nets, opts: dict[str, Learner], cfg: Config
) -> dict[str, float]:
    """The fake score and the discriminator learn on every step, the student on every ttur-th.

    Each learns from the mean over all parts of the batch, then moves. The discriminator's group
    statistics are those of a part.
    """
    learn, rng = step % cfg.ttur == 0, partial(Rng, cfg.seed, step)
    parts, log = batch.split(cfg.accumulate), {}

    # 1. The student draws. Every ttur-th turn it learns, and pulls the fake score after it (IDA).
    draws = []
    for k, part in enumerate(parts):
        draw = draw_student(part, nets, cfg, learn, rng)
        if learn:
            collect(opts["student"], student_loss(draw, part, nets, cfg, rng, log), k, cfg)
        draws.append(without_gradient(draw))
    if learn and update("student", opts, step, cfg, log):
        ida_update(nets.fake, nets.student, cfg.ida_decay)
        if nets.ema is not nets.student:
            ida_update(nets.ema, nets.student, cfg.ema)  # the same average of weights

    # 2. The fake score learns the student's samples.
    for k, (part, draw) in enumerate(zip(parts, draws, strict=True)):
        loss = fake_loss(nets.fake, draw.x0, part.cond, cfg.t_fake, rng("fake", part.ids))
        note(log, "fake", loss, cfg)
        collect(opts["fake"], loss, k, cfg)
    update("fake", opts, step, cfg, log)

    # 3. The discriminator learns to tell them from real images.
    if draws[0].real:
        with parallel.whole_heads(nets.disc.heads):
            nets.disc.power_iteration()
        for k, draw in enumerate(draws):
            given = (draw.real, draw.made, draw.reference, draw.text, draw.weight)
            loss = disc_loss(nets.disc, *given)
            note(log, "disc", loss, cfg)
            collect(opts["disc"], loss, k, cfg)
        update("disc", opts, step, cfg, log)
    return {name: float(torch.as_tensor(value).detach()) for name, value in log.items()}


def draw_student(batch: Batch, nets: Nets, cfg: Config, learn: bool, rng) -> Draw:
    """x0 from noised data or from the student's own previous output (backward simulation).

    And the discriminator's features, none where omega is zero for the whole batch. With gradient if
    the student is to learn.
    """
    student, disc, schedule = nets.student, nets.disc, nets.student.schedule
    taus, sources = anchors(cfg, schedule), rng("input", batch.ids)
    p_backward = 1.0 if batch.images is None else cfg.p_backward
    x_t, i = student_input(student, batch.x0_real, batch.cond, taus, sources, p_backward)
    tau_start, tau_end = (x_t.new_full((len(x_t),), tau) for tau in (*taus, 0.0)[i : i + 2])
    weight, real, reference, made, text = omega(schedule, tau_start), None, None, None, None
    with torch.set_grad_enabled(learn):
        prediction = student(x_t, tau_start, batch.cond)
        x0 = schedule.x0(x_t, prediction, tau_start)
    if cfg.w_gan > 0 and bool(weight.any()):
        real, reference, text = real_features(batch, disc, cfg, rng)
        with torch.set_grad_enabled(learn):
            sources = rng("augment made", batch.ids)
            made = disc.features(augment(nets.vae.decode(x0), cfg.disc_augment, sources))
    return Draw(x0, (x_t, prediction, tau_start, tau_end), weight, real, reference, made, text)


def student_loss(draw: Draw, batch: Batch, nets: Nets, cfg: Config, rng, log: dict) -> Tensor:
    """Distribution matching, intra-segment guidance and the discriminator's word."""
    student, fake, teacher = nets.student, nets.fake, nets.teacher
    cond, uncond, (x_t, prediction, tau_start, tau_end) = batch.cond, batch.uncond, draw.path
    guidance = (cond, uncond, cfg.guidance_dmd)
    dmd = dmd_loss(draw.x0, teacher, fake, *guidance, cfg.t_dmd, rng("dmd", batch.ids))
    note(log, "dmd", dmd, cfg)
    loss = cfg.w_dmd * dmd
    if cfg.w_isg > 0:
        segment = (student, teacher, x_t, prediction, tau_start, tau_end)
        how = (cfg.guidance_isg, cfg.isg_margin, cfg.isg_distance)
        isg = isg_loss(*segment, cond, uncond, *how, rng("isg", batch.ids))
        note(log, "isg", isg, cfg)
        loss = loss + cfg.w_isg * isg
    if draw.real:
        gan = gan_loss(nets.disc, draw.made, draw.reference, draw.text, draw.weight)
        note(log, "gan", gan, cfg)
        loss = loss + cfg.w_gan * gan
    return loss


def without_gradient(draw: Draw) -> Draw:
    """What the fake score and the discriminator need of it."""
    made = draw.made and [x.detach() for x in draw.made]
    return dataclasses.replace(draw, x0=draw.x0.detach(), path=(), made=made)


@torch.no_grad()
def real_features(
    batch: Batch, disc: Discriminator, cfg: Config, rng
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Features of the real images, as judged and as reference: one pass if alike. And the text."""
    real = reference = disc.features(batch.images)
    if cfg.disc_augment:
        sources = rng("augment real", batch.ids)
        real = disc.features(augment(batch.images, cfg.disc_augment, sources))
    if not cfg.disc_reference:
        reference = [torch.zeros_like(x) for x in reference]
    return real, reference, batch.text if cfg.disc_text else torch.zeros_like(batch.text)


def note(log: dict, name: str, loss: Tensor, cfg: Config) -> None:
    """The log has the mean over the parts of a batch."""
    log[name] = log.get(name, 0) + loss.detach() / cfg.accumulate


def collect(opt: Learner, loss: Tensor, part: int, cfg: Config) -> None:
    """Adds the gradient of a part of the batch."""
    parallel.exchange(opt.net, part == cfg.accumulate - 1)
    (loss / cfg.accumulate).backward()


LOSSES_OF = {"student": ("dmd", "isg", "gan"), "fake": ("fake",), "disc": ("disc",)}


def update(name: str, opts: dict[str, Learner], step: int, cfg: Config, log: dict) -> bool:
    """One AdamW step; no rank steps if any has a loss or gradient that is not finite.

    Returns whether it stepped.
    """
    opt, losses = opts[name], [log[loss] for loss in LOSSES_OF[name] if loss in log]
    norm = parallel.whole(nn.utils.clip_grad_norm_(opt.parameters(), cfg.clip))
    finite = all(bool(torch.isfinite(loss)) for loss in losses)
    sound = parallel.agree(finite and bool(torch.isfinite(norm)), norm.device)
    if sound:
        for group in opt.optimizer.param_groups:
            group["lr"] = opt.lr * lr_factor(step, cfg)
        opt.optimizer.step()
        torch.clear_autocast_cache()  # its bf16 copies of weights that move here, and in IDA
    opt.optimizer.zero_grad()
    log[f"norm_{name}"], log["skipped"] = norm, log.get("skipped", 0) + (not sound)
    return sound


def lr_factor(step: int, cfg: Config) -> float:
    """Linear warm-up from lr_start, times a cosine to lr_final at the last step."""
    risen = min(1.0, (step + 1) / (cfg.lr_warmup + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    warmup = cfg.lr_start + (1 - cfg.lr_start) * risen
    return warmup * (cfg.lr_final + (1 - cfg.lr_final) * cosine)


def anchors(cfg: Config, schedule) -> tuple[float, ...]:
    """The student's taus, descending from pure noise."""
    return cfg.taus or tuple(grid(schedule, cfg.student_steps))


# --- a run: networks, optimizers, data -----------------------------------------------------------


def build_nets(cfg: Config, device: torch.device, cache: Cache | None = None) -> Nets:
    """Student, fake score and average begin as the teacher. ValueError, OSError for a bad file.

    Several ranks share what is trained, as copies or as shards, and in shards the teacher too.
    """
    files = locate(cfg.teacher, cfg.weights, text=not cache, t5=cfg.t5, disc=cfg.w_gan > 0)
    frozen = torch.bfloat16 if cfg.bf16 else torch.float32
    disc = build_disc(cfg, files, frozen, device) if cfg.w_gan else None
    mesh = parallel.choose_mesh(cfg.shard, count_trained(cfg, disc), device)
    if disc:
        parallel.shard_heads(disc.heads, mesh, device)
    student = load_start(cfg.teacher, cfg.shift, files, parallel.home(mesh, device))

    def twin() -> nn.Module:
        net = copy.deepcopy(student)
        parallel.shard(net, mesh, device, cfg.bf16)
        return net

    fake, ema = twin(), twin().requires_grad_(False) if cfg.ema else student
    parallel.shard(student, mesh, device, cfg.bf16)
    if cfg.recompute:
        parallel.recompute(student)
        parallel.recompute(fake)
    sharded = mesh if mesh and mesh.size(-1) > 1 else None  # a frozen network has no need of copies
    where = parallel.home(sharded, device)
    teacher = load_teacher(cfg.teacher, cfg.shift, files, frozen, where).requires_grad_(False)
    parallel.shard(teacher, sharded, device, cfg.bf16)
    vae = load_vae(cfg.teacher, files, frozen, device)
    text = None if cache else load_text(cfg.teacher, files, frozen, device)
    reading = cfg.w_gan and not cache
    reader = load_reader(cfg.teacher, files, frozen, device) if reading else None
    null = read_null(cfg, text, device)
    return Nets(student, fake, teacher, disc, vae, ema, text, reader, null, cache)


def count_trained(cfg: Config, disc: Discriminator | None) -> int:
    """Weights of student, fake score and the discriminator's heads."""
    with torch.device("meta"):
        net = build(cfg.teacher, cfg.shift)
    heads = [disc.heads] if disc else []
    return sum(p.numel() for part in (net, net, *heads) for p in part.parameters())


def build_disc(
    cfg: Config, files: Files, dtype: torch.dtype, device: torch.device
) -> Discriminator:
    backbone = load_backbone(cfg.teacher, files, dtype, device)
    torch.manual_seed(generator(cfg.seed, "heads").initial_seed())
    maps, width = 1 + len(backbone.cfg.hooks), backbone.cfg.width
    words = embedding_width(cfg.teacher)
    disc = Discriminator(backbone, width, maps, words, cfg.disc_channels)
    return disc.to(device)


def build_learners(nets: Nets, cfg: Config) -> dict[str, Learner]:
    def learner(net: nn.Module, lr: float) -> Learner:
        trained = [p for p in net.parameters() if p.requires_grad]
        settings = {"betas": cfg.betas, "eps": cfg.eps, "weight_decay": 0.0}
        return Learner(net, torch.optim.AdamW(trained, lr=lr, **settings), lr)

    learners = {"student": learner(nets.student, cfg.lr), "fake": learner(nets.fake, cfg.lr_fake)}
    return learners | ({"disc": learner(nets.disc.heads, cfg.lr_disc)} if nets.disc else {})


def precision(cfg: Config, nets: Nets, device: torch.device) -> torch.autocast:
    """bf16 on one device; networks shared by several ranks cast by themselves."""
    enabled = cfg.bf16 and not parallel.is_shared(nets.student)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def ids_of(cfg: Config, step: int) -> range:
    """This rank's samples of a step, all parts of its batch."""
    return batch_ids(step, cfg.accumulate * cfg.batch, parallel.rank(), parallel.world())


@torch.no_grad()
def load_batch(ids: range, pairs, nets: Nets, cfg: Config, device: torch.device) -> Batch:
    """Latents, text and what the discriminator reads of it, from the cache or computed here."""
    if nets.cache:
        rows = nets.cache.rows(pairs, device)
    else:
        rows = frozen_rows(pairs, nets.text, nets.reader, nets.vae, cfg, device)
    cond = cond_of(rows)
    uncond = null_for(cfg.teacher, nets.null, cond) if nets.null else None
    if pairs.images is None:
        x0_real = torch.zeros(len(ids), *latent_shape(cfg.teacher, cfg.size), device=device)
        return Batch(ids, None, x0_real, cond, uncond, None)
    x0_real = rows["latent"].to(device, torch.float32)
    return Batch(ids, pairs.images.to(device), x0_real, cond, uncond, rows.get("reader"))


# --- a run: the loop -----------------------------------------------------------------------------


def train(cfg: Config, out: Path, nets: Nets, data, exam: Exam | None, device: torch.device) -> Run:
    """The loop: resume, iterate, examine, save."""
    opts, run, folder = build_learners(nets, cfg), Run(), out / "checkpoints"
    saved = {"student": nets.student, "fake": nets.fake}
    if nets.disc:
        saved["disc"] = nets.disc.heads
    if nets.ema is not nets.student:
        saved["ema"] = nets.ema
    optimizers = {name: opt.optimizer for name, opt in opts.items()}
    state, remarks = parallel.load_checkpoint(folder, saved, optimizers)
    first = run.resume(state) if state else 0
    for remark in remarks:
        say(remark)
    if state:
        say(f"continuing {out} at step {first} of {cfg.steps}")
    log = open_log(out / "log.csv", first) if parallel.rank() == 0 else None
    board = open_board(out, first) if parallel.rank() == 0 else None
    hidden = parallel.rank() > 0
    steps = range(first, cfg.steps)
    bar = tqdm(total=cfg.steps, initial=first, desc="train", disable=hidden)
    with bar, Ahead(data, partial(ids_of, cfg), cfg.workers, steps) as pairs_of:
        for step, pairs in zip(steps, pairs_of, strict=True):
            batch = load_batch(ids_of(cfg, step), pairs, nets, cfg, device)
            with precision(cfg, nets, device):
                values = train_step(step, batch, nets, opts, cfg)
            values = parallel.mean_over_ranks(values, device)
            if log:
                log.writerow({"step": step} | {name: f"{x:.6g}" for name, x in values.items()})
            for name, value in values.items() if board else ():
                board.add_scalar(name, value, step)
            bar.set_postfix({name: f"{values[name]:.3f}" for name in LOSSES if name in values})
            bar.update()
            if remark := data.remark():
                tqdm.write(remark)  # of whichever rank: each reads samples of its own
            run.count_skipped(values["skipped"])
            done, last = step + 1, step + 1 == cfg.steps
            due = cfg.exam_every and (last or done % cfg.exam_every == 0)
            examined = whole_net(nets.ema, cfg) if due and is_examined(cfg) else None
            if exam and due:
                row = exam.short(examined, anchors(cfg, nets.student.schedule))
                run.exams.append({"name": f"student, step {done}", "step": done} | row)
                say(format_table(run.exams[-1:]))
            if due and cfg.teacher != "digits":
                draw_sheet(cfg, nets, data, out / "samples" / f"step-{done:06d}.png", device)
            stop = not parallel.agree(not run.stop, device)
            if last or stop or done % cfg.save_every == 0:
                parallel.save_checkpoint(folder, done, saved, optimizers, run.state(), cfg.keep)
            if stop and not last:
                say(f"stopped by SIGTERM after step {done}, saved; the same command continues")
                raise SystemExit(0)
    return run


# --- the end of a run ----------------------------------------------------------------------------


def export(nets: Nets, cfg: Config, out: Path) -> Path:
    """The student as a safetensors file with the teacher's names, fit for sample.py."""
    path = out / "student.safetensors"
    metadata = {
        "modelspec.architecture": cfg.teacher,
        "modelspec.title": f"SenseFlow {cfg.student_steps}-step student of {cfg.teacher}",
        "teacher": cfg.teacher,
        "sampler": "x0",
        "steps": str(cfg.student_steps),
        "shift": str(cfg.shift),
        "size": json.dumps(cfg.size),
        "taus": json.dumps(anchors(cfg, nets.student.schedule)),
    }
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    prefix = prefix_of(cfg.teacher)
    shapes = {prefix + name: x.shape for name, x in sorted(nets.ema.state_dict().items())}
    tensors = ((prefix + name, x) for name, x in parallel.gather(nets.ema))
    if parallel.rank() == 0:
        stream_weights(tensors, shapes, path, dtype, metadata)
    else:
        collections.deque(tensors, maxlen=0)  # takes part, keeps nothing
    return path


def merge(cfg: Config, student: Path) -> None:
    """--export full: the official file of several networks, the student in its teacher's place."""
    net, about = load_student(student, torch.bfloat16 if cfg.bf16 else torch.float32)
    base = locate(cfg.teacher, cfg.weights, text=False)["denoiser"][0]
    merge_weights(net, student.with_name("full.safetensors"), base, about, prefix_of(cfg.teacher))


def is_examined(cfg: Config) -> bool:
    return cfg.teacher == "digits" and (cfg.table or cfg.exam_every > 0)


def whole_net(net: nn.Module, cfg: Config) -> nn.Module:
    """A denoiser that a rank can call alone. All ranks must ask for it."""
    if not parallel.is_shared(net):
        return net
    alone = build(cfg.teacher, cfg.shift)
    alone.load_state_dict(dict(parallel.gather(net)), assign=True)
    return alone.requires_grad_(False)


SHOWN = 4  # captions of the sheet


@torch.no_grad()
def draw_sheet(cfg: Config, nets: Nets, data, path: Path, device: torch.device) -> None:
    """The student's images for the first captions of the data, from fixed noise; by all ranks."""
    first = data(range(cfg.batch * cfg.accumulate if cfg.buckets else SHOWN))
    size = cfg.size if first.images is None else tuple(first.images.shape[-2:])
    taus, images = anchors(cfg, nets.student.schedule), []
    for k, caption in enumerate(first.captions[:SHOWN]):
        # the cache knows a sample by its image; without one there is no need to encode it
        parts = (first.images if nets.cache else None, first.sizes)
        one = Pairs([caption], *(None if x is None else x[k : k + 1] for x in parts))
        draw = [generator("sheet", k)]
        eps = normal(torch.empty(1, *latent_shape(cfg.teacher, size), device=device), draw)
        with precision(cfg, nets, device):
            cond = load_batch(range(1), one, nets, cfg, device).cond
            x0 = sample_x0(nets.ema, eps, cond, taus, generators=draw)
            images.append(nets.vae.decode(x0).cpu())
    if parallel.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        title = f"student, {len(taus)} steps"
        sheet(path, first.captions[:SHOWN], {title: torch.stack(images)})


def report(cfg: Config, out: Path, nets: Nets, exam: Exam | None, run: Run, seconds: float) -> None:
    """The table, the pictures and metrics.json."""
    level = exam.short_level() if exam else None
    curves(out / "curves.png", out / "log.csv", run.exams, level)
    metrics = {"config": dataclasses.asdict(cfg), "train_seconds": seconds, **run.state()}
    if exam:
        taus, start = anchors(cfg, nets.student.schedule), time.time()
        exam_pictures(out / "samples.png", exam, nets.teacher, nets.ema, taus)
        metrics["table"] = exam_table(exam, nets.ema, taus, nets.teacher if cfg.table else None)
        metrics["table_seconds"] = time.time() - start
        print(format_table(metrics["table"]))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))


def arguments() -> tuple[Config, argparse.Namespace]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    overwrite = "start anew where --out holds another run"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    add_plan_flags(parser)
    for part, field, off in (
        ("ida", "ida_decay", 1.0),
        ("isg", "w_isg", 0.0),
        ("gan", "w_gan", 0.0),
    ):
        same = f"the same as --{field.replace('_', '-')} {off:g}"
        parser.add_argument(f"--no-{part}", dest=field, action="store_const", const=off, help=same)
    return parse(parser)


def main() -> None:
    try:
        cfg, given = arguments()
        if given.plan:
            raise SystemExit(show_plan(cfg, given))
        device = parallel.start()
        cfg = cfg if given.overwrite else keep_samples(cfg, Path(cfg.out))
        check_size(cfg.teacher, cfg.size)
        how = (cfg.size, cfg.seed, cfg.crop, cfg.buckets, cfg.batch * cfg.accumulate)
        data = open_data(cfg.teacher, cfg.data, *how)
        if cfg.buckets and not isinstance(data, Images):
            raise ValueError(
                f"--buckets: {cfg.data or cfg.teacher} has no images of several shapes"
            )
        for size in data.sizes if cfg.buckets else ():
            check_size(cfg.teacher, size)
        if isinstance(data, Prompts) and cfg.w_gan:
            raise ValueError(f"--data {cfg.data} has no images to judge by; add --no-gan")
        if cfg.export == "full" and not prefix_of(cfg.teacher):
            raise ValueError(f"--export full: the file of {cfg.teacher} holds no other network")
        out = prepare_folder(cfg, given.overwrite)
        cache = fill_cache(cfg, data, device) if cfg.cache else None
        nets = build_nets(cfg, device, cache)
        exam = Exam(cfg.guidance) if is_examined(cfg) and parallel.rank() == 0 else None
        teacher = whole_net(nets.teacher, cfg) if is_examined(cfg) else None
        if exam:
            exam.ask_teacher(teacher)
    except (ValueError, OSError) as error:
        refuse(error)
    if parallel.rank() == 0:  # not before: what was refused leaves nothing behind
        settings = dataclasses.asdict(cfg) | {"world": parallel.world()}
        (out / "config.json").write_text(json.dumps(settings, indent=1))
    start = time.time()
    try:
        run = train(cfg, out, nets, data, exam, device)
        path = export(nets, cfg, out)
        if cfg.teacher != "digits":
            draw_sheet(cfg, nets, data, out / "samples.png", device)
        if is_examined(cfg):  # rank 0 examines, on whole networks that all ranks gather
            nets = dataclasses.replace(nets, ema=whole_net(nets.ema, cfg), teacher=teacher)
        if cfg.export == "full" and parallel.rank() == 0:
            merge(cfg, path)
        if parallel.rank() == 0:
            report(cfg, out, nets, exam, run, time.time() - start)
            print(f"{path}; samples.png, curves.png, log.csv and metrics.json are beside it")
    except ValueError as error:  # too many bad samples, or a cache of other data
        refuse(error)
    except (FloatingPointError, OSError) as error:
        newest = next(iter(parallel.checkpoints(out / "checkpoints")), "none")
        refuse(f"{error}; the last good checkpoint is {newest}")
    except KeyboardInterrupt:
        refuse("interrupted; the same command continues from the last checkpoint")
    parallel.stop()


if __name__ == "__main__":
    main()
