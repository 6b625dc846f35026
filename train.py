"""SenseFlow: distil a flow model into a few-step student (Algorithm 1 of the paper).

    python train.py                            # the embedded teacher, on a CPU, in minutes
    python train.py --student-steps 2          # a two-step student
    python train.py --no-ida --no-isg --no-gan # plain DMD; each part has its switch
    torchrun --nproc_per_node 8 train.py --teacher flux-dev --data DIR [--weights DIR]
    python train.py --teacher flux-dev --plan --gpus 8 --gpu-memory 80   # does it fit?
    python train.py --teacher klein --adapter 64 --data prompts.txt --make-reals 5000
    python train.py --teacher mine.py          # a teacher of your own: docs/own_teacher.md
    python train.py --help                     # every setting

The same command continues an interrupted run. Results are in runs/TEACHER (or --out):
student.safetensors, samples.png, progress.png, curves.png, log.csv, metrics.json.
"""

from engine.flags import train_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    train_arguments(__doc__)

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, legible
from dataset.ahead import Ahead
from dataset.sources import some_captions
from discriminator import Discriminator, augment, disc_loss, gan_loss, omega
from dmd import dmd_loss, fake_loss, student_input
from engine import checkpoint, ranks
from engine.batch import Batch, fill_cache, ids_of, load_batch, say_cut
from engine.build import (
    Learner,
    Nets,
    aim_adapters,
    anchors,
    build_learners,
    build_nets,
    precision,
)
from engine.plan import show_plan
from engine.progress import Progress, header
from engine.reals import make_reals
from engine.results import finish, show
from engine.run import LOSSES, LogFile, Run, begin, open_board, say
from engine.start import check_all, open_exam
from engine.watch import Watch
from ida import ida_update
from isg import isg_loss
from schedule import Rng, anchor_at
from teachers import find

Log = dict[str, list]  # by name: a value for each part of the batch
RngFor = Callable[[str, range], Rng]  # purpose and sample numbers -> their random numbers

# --- Algorithm 1 ---------------------------------------------------------------------------------


def train_step(
    step: int, batch: Batch, nets: Nets, opts: dict[str, Learner], cfg: Config
) -> dict[str, float]:
    """The fake score and the discriminator learn on every step, the student on every ttur-th.

    Returns what was noted. Each network's loss is the mean over the parts of the batch
    (--accumulate), one part at a time; then the network moves.
    """
    student, fake, disc = nets.student, nets.fake, nets.disc
    parts, rng_for = batch.split(cfg.accumulate), partial(Rng, cfg.seed, step)
    log, draws = defaultdict(list), []

    def student_losses() -> Iterator[Tensor]:
        for part in parts:
            draw = draw_student(part, nets, cfg, rng_for)
            yield student_loss(draw, part, nets, cfg, rng_for, log)
            draws.append(draw.detached())  # when its backward pass is done

    def fake_losses() -> Iterator[Tensor]:
        for part, draw in zip(parts, draws, strict=True):
            rng = rng_for("fake", part.ids)
            loss = fake_loss(fake=fake, x0=draw.x0, cond=part.cond, times=cfg.t_fake, rng=rng)
            yield note(log, "fake", loss)

    def disc_losses() -> Iterator[Tensor]:
        for draw in draws:
            yield note(log, "disc", disc_loss(disc=disc, real=draw.real, **draw.judged()))

    # 1. The student draws. Every ttur-th turn it learns, and IDA pulls the fake score after it.
    if step % cfg.ttur == 0:
        if minimise("student", student_losses(), opts, step, cfg, log):
            ida_update(fake=fake, student=student, decay=cfg.ida_decay)
            if nets.ema is not student:
                ida_update(fake=nets.ema, student=student, decay=cfg.ema)  # the same average
    else:
        with torch.no_grad():
            draws += [draw_student(part, nets, cfg, rng_for) for part in parts]
    # 2. The fake score learns the student's samples.
    minimise("fake", fake_losses(), opts, step, cfg, log)
    # 3. The discriminator learns to tell them from real images.
    if draws[0].real:
        with ranks.whole_heads(disc.heads):
            disc.power_iteration()
        minimise("disc", disc_losses(), opts, step, cfg, log)
    return ranks.to_host({name: sum(values) / len(values) for name, values in log.items()})


@dataclass
class Draw:
    """What the student drew for a batch, and what of it the others learn from."""

    x0: Tensor  # (B, C, h, w)
    x_t: Tensor  # where it was drawn from
    prediction: Tensor  # the student's there
    tau_start: Tensor  # (B,) the anchor
    tau_end: Tensor  # (B,) the next one
    weight: Tensor  # (B,) omega
    share: float = 1.0  # the anchor's weight in the student's loss
    real: list[Tensor] | None = None  # the discriminator's features of real images, if it has work
    reference: list[Tensor] | None = None  # of the same as reference
    made: list[Tensor] | None = None  # of what the student drew
    text: Tensor | None = None  # (B, E)

    def judged(self) -> dict:
        """What both of the discriminator's losses take."""
        return {name: getattr(self, name) for name in ("made", "reference", "text", "weight")}

    def detached(self) -> "Draw":
        made = self.made and [x.detach() for x in self.made]
        x0, prediction = self.x0.detach(), self.prediction.detach()
        return dataclasses.replace(self, x0=x0, prediction=prediction, made=made)


def draw_student(batch: Batch, nets: Nets, cfg: Config, rng_for: RngFor) -> Draw:
    """x0 from noised data or from the student's own previous output (backward simulation).

    And the discriminator's features, none where omega is zero for the whole batch.
    """
    student, disc, schedule = nets.student, nets.disc, nets.student.schedule
    taus = anchors(cfg, schedule)
    x_t, i = student_input(
        student=student,
        x0_real=batch.x0_real,
        cond=batch.cond,
        taus=taus,
        rng=rng_for("input", batch.ids),
        p_backward=1.0 if batch.images is None else cfg.p_backward,
    )
    tau_start, tau_end = (anchor_at(taus, k, x_t) for k in (i, i + 1))
    prediction = student(x_t, tau_start, batch.cond)
    x0, weight = schedule.x0(x_t, prediction, tau_start), omega(schedule, tau_start)
    share = cfg.anchor_weights[i] if cfg.anchor_weights else 1.0
    draw = Draw(x0, x_t, prediction, tau_start, tau_end, weight, share)
    if cfg.w_gan > 0 and omega(schedule, torch.as_tensor(taus[i])).any():  # the host knows
        draw.real, draw.reference, draw.text = real_features(batch, disc, cfg, rng_for)
        image = augment(nets.vae.decode(x0), cfg.disc_augment, rng_for("augment made", batch.ids))
        draw.made = disc.features(image)
    return draw


def student_loss(
    draw: Draw, batch: Batch, nets: Nets, cfg: Config, rng_for: RngFor, log: Log
) -> Tensor:
    """Distribution matching, intra-segment guidance and the discriminator's word."""
    text = {"cond": batch.cond, "uncond": batch.uncond}
    dmd = dmd_loss(
        x0=draw.x0,
        teacher=nets.teacher,
        fake=nets.fake,
        **text,
        guidance=cfg.guidance_dmd,
        times=cfg.t_dmd,
        rng=rng_for("dmd", batch.ids),
        rescale=cfg.guidance_rescale,
        times_guidance=None if cfg.t_guidance == "same" else cfg.t_guidance,
    )
    loss = cfg.w_dmd * note(log, "dmd", dmd)
    if cfg.w_isg > 0:
        isg = isg_loss(
            student=nets.student,
            teacher=nets.teacher,
            x_t=draw.x_t,
            prediction=draw.prediction,
            tau_start=draw.tau_start,
            tau_end=draw.tau_end,
            **text,
            guidance=cfg.guidance_isg,
            margin=cfg.isg_margin,
            distance=cfg.isg_distance,
            rng=rng_for("isg", batch.ids),
            rescale=cfg.guidance_rescale,
        )
        loss = loss + cfg.w_isg * note(log, "isg", isg)
    if draw.real:
        loss = loss + cfg.w_gan * note(log, "gan", gan_loss(disc=nets.disc, **draw.judged()))
    return draw.share * loss


@torch.no_grad()
def real_features(
    batch: Batch, disc: Discriminator, cfg: Config, rng_for: RngFor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Features of the real images, as judged and as reference: one pass if alike. And the text."""
    real = reference = disc.features(batch.images)
    if cfg.disc_augment:
        rng = rng_for("augment real", batch.ids)
        real = disc.features(augment(batch.images, cfg.disc_augment, rng))
    if not cfg.disc_reference:
        reference = [torch.zeros_like(x) for x in reference]
    return real, reference, batch.text if cfg.disc_text else torch.zeros_like(batch.text)


def note(log: Log, name: str, value: Tensor) -> Tensor:
    """A scalar for log.csv, TensorBoard and the curves, by any name; returns the value."""
    log[name].append(value.detach())
    return value


# --- one network learns --------------------------------------------------------------------------


def minimise(
    name: str, losses: Iterable[Tensor], opts: dict[str, Learner], step: int, cfg: Config, log: Log
) -> bool:
    """Gradients of the losses' mean, one loss at a time, then one step of the network's optimizers.

    No rank steps if any has a loss or a gradient that is not finite. Returns whether it stepped.
    """
    opt, total = opts[name], 0.0
    opt.zero_grad()  # of what losses of other networks, which came through this one, left in it
    for k, loss in enumerate(losses):
        ranks.sync_gradients(opt.net, last=k == cfg.accumulate - 1)
        (loss / cfg.accumulate).backward()
        total = total + loss.detach()
    norm = ranks.whole(nn.utils.clip_grad_norm_(opt.parameters(), cfg.clip))
    sound = ranks.agree(torch.isfinite(total) & torch.isfinite(norm), norm.device)
    if sound:
        opt.step(lr_factor(step, cfg))
        torch.clear_autocast_cache()  # its bf16 copies of weights that move here, and in IDA
    opt.zero_grad()
    note(log, f"norm_{name}", norm)
    log["skipped"] = [sum(log["skipped"]) + norm.new_full((), not sound)]  # networks of this step
    if not sound:
        note(log, f"skipped_{name}", norm.new_ones(()))
    return sound


def lr_factor(step: int, cfg: Config) -> float:
    """Linear warm-up from lr_start, times a cosine to lr_final at the last step."""
    risen = min(1.0, (step + 1) / (cfg.lr_warmup + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    warmup = cfg.lr_start + (1 - cfg.lr_start) * risen
    return warmup * (cfg.lr_final + (1 - cfg.lr_final) * cosine)


# --- a run ---------------------------------------------------------------------------------------


def train(cfg: Config, out: Path, nets: Nets, data, exam, run: Run, device: torch.device) -> None:
    """The loop: resume, iterate, examine, save. exam: of the teacher's task, or None."""
    opts, folder = build_learners(nets, cfg), out / "checkpoints"
    saved = nets.trained(), {name: opt.optimizers for name, opt in opts.items()}
    state, remarks = checkpoint.load_checkpoint(folder, *saved)
    first = run.resume(state) if state else 0
    if cfg.adapter and not state:
        aim_adapters(cfg, nets, data, device)
    for line in (
        *remarks,
        *header(cfg, nets, out, first, cfg.data or nets.family.own_data, device),
    ):
        say(line)
    if nets.text:
        say_cut(nets.text, some_captions(data), "captions")
    if cfg.exam_every and not first:
        show(0, cfg, out, nets, data, exam, run, device)
    watch = Watch(cfg, out, nets, data, run, device)
    log = LogFile(out / "log.csv", first) if ranks.rank() == 0 else None
    board = open_board(out, first) if ranks.rank() == 0 else None
    steps, bar = range(first, cfg.steps), Progress(cfg, first, LOSSES)
    ahead = Ahead(data, partial(ids_of, cfg), cfg.workers, steps)
    with bar, ahead as pairs_of, run.iterating():
        for step, pairs in zip(steps, pairs_of, strict=True):
            batch = load_batch(ids_of(cfg, step), pairs, nets, cfg, device)
            with precision(cfg, nets, device):
                values = train_step(step, batch, nets, opts, cfg)
            values, done = ranks.mean_over_ranks(values, device), step + 1
            values |= watch.look(done)
            if log:
                log.write(step, values)
            for name, value in values.items() if board else ():
                board.add_scalar(name, value, step)
            bar.show(values)
            if remark := data.remark():
                tqdm.write(legible(remark))  # of whichever rank: each reads samples of its own
            if news := run.count(values):
                say(news)
            if cfg.exam_every and (done == cfg.steps or done % cfg.exam_every == 0):
                show(done, cfg, out, nets, data, exam, run, device)
            save, stop = run.is_due(cfg, done, device)
            if save:
                state = run.state() | {"config": run.settings}
                checkpoint.save_checkpoint(folder, done, *saved, state, cfg.keep)
            if stop:
                say(f"stopped by {run.stop or 'a signal'} after step {done}, saved; {CONTINUES}")
                raise SystemExit(0)
    run.check_learned()


CONTINUES = "the same command continues"


def what_is_left(out: Path) -> str:
    """Said after what ended a run."""
    newest = next(iter(checkpoint.checkpoints(out / "checkpoints")), None)
    return f"; the last good checkpoint is {newest}, where {CONTINUES}" if newest else ""


def main() -> None:
    cfg, given = train_arguments(__doc__)
    if given.plan:
        with ranks.refusals():
            raise SystemExit(show_plan(cfg, given, train_step))
    out, held = Path(cfg.out), ExitStack()
    with ranks.refusals((FloatingPointError,), partial(what_is_left, out), "stopped"), held:
        device, run = ranks.start(), Run()
        torch.backends.cudnn.allow_tf32 = cfg.tf32
        cfg, data, run.settings = check_all(cfg, given.overwrite, held)
        family, parts = find(cfg.teacher), run.settings["parts"]
        data = make_reals(cfg, family, device) if cfg.make_reals else data
        cache = fill_cache(cfg, family, data, device, parts) if cfg.cache else None
        nets = build_nets(cfg, device, cache)
        exam = open_exam(cfg, nets)
        begin(out, run.settings, given.overwrite)
        start = time.time()
        train(cfg, out, nets, data, exam, run, device)
        finish(cfg, out, nets, data, exam, run, device, start)
    ranks.stop()


if __name__ == "__main__":
    main()
