"""What a run leaves: the student's file, sheets of its images, curves, the table, metrics.json.

show          while the student learns: a short exam, or a sheet of its images
finish        all that is left at the end
export        the student as a safetensors file with its teacher's names
merge         --export full: the official file, the student in its teacher's place
draw_sheet    the student's images for the first captions of the data
report        the table, the pictures and metrics.json
"""

import collections
import dataclasses
import json
import time
from pathlib import Path

import torch

from config import Config
from dataset.images import Pairs
from engine import ranks
from engine.batch import load_batch
from engine.build import Nets, anchors, precision, whole_net
from engine.pictures import curves, sheet
from engine.run import Run, say
from nets.weights import merge_weights, stream_weights
from schedule import Cond, generator, normal, sample_x0
from teachers import Teacher, find
from teachers.students import read_student


def show(
    done: int, cfg: Config, out: Path, nets: Nets, data, exam, run: Run, device: torch.device
) -> None:
    """A sheet of the student's images, and a short exam where the task has one; by all ranks."""
    draw_sheet(cfg, nets, data, out / "samples" / f"step-{done:06d}.png", device)
    if not nets.family.examined:
        return
    student = whole_net(nets.ema, cfg, nets.family)
    if exam:
        row = exam.short(student, anchors(cfg, nets.student.schedule))
        run.exams.append({"name": f"student, step {done}", "step": done} | row)
        say(exam.show(run.exams[-1:]))


def finish(
    cfg: Config, out: Path, nets: Nets, data, exam, run: Run, device: torch.device, start: float
) -> None:
    """The student's file, then what shows it."""
    path, family = export(nets, cfg, out), nets.family
    if not family.examined:
        draw_sheet(cfg, nets, data, out / "samples.png", device)
    if is_examined(cfg, family):  # rank 0 examines, on whole networks that all ranks gather
        whole = {name: whole_net(getattr(nets, name), cfg, family) for name in ("ema", "teacher")}
        nets = dataclasses.replace(nets, **whole)
    if cfg.export == "full" and ranks.rank() == 0:
        merge(cfg, path)
    if ranks.rank() == 0:
        report(cfg, out, nets, exam, run, time.time() - start)
        made = (name for name in LEFT if (out / name).exists())
        print(f"{path}; beside it: {', '.join(made)}")


def is_examined(cfg: Config, family: Teacher) -> bool:
    return family.examined and (cfg.table or cfg.exam_every > 0)


def export(nets: Nets, cfg: Config, out: Path) -> Path:
    """Fit for sample.py; all ranks take part."""
    path, name, prefix = out / "student.safetensors", nets.family.name, nets.family.prefix()
    metadata = {
        "modelspec.architecture": name,
        "modelspec.title": f"SenseFlow {cfg.student_steps}-step student of {name}",
        "teacher": name,
        "sampler": "x0",
        "steps": str(cfg.student_steps),
        "shift": str(cfg.shift),
        "size": json.dumps(cfg.size),
        "taus": json.dumps(anchors(cfg, nets.student.schedule)),
    }
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    shapes = {prefix + name: x.shape for name, x in sorted(nets.ema.state_dict().items())}
    tensors = ((prefix + name, x) for name, x in ranks.gather(nets.ema))
    if ranks.rank() == 0:
        stream_weights(tensors, shapes, path, dtype, metadata)
    else:
        collections.deque(tensors, maxlen=0)  # takes part, keeps nothing
    return path


def merge(cfg: Config, student: Path) -> None:
    """The official file of several networks, the student in its teacher's place."""
    family, dtype = find(cfg.teacher), torch.bfloat16 if cfg.bf16 else torch.float32
    net = family.load(cfg.shift, student, dtype)
    base = family.locate(cfg.weights, text=False)["denoiser"][0]
    about, path = read_student(student), student.with_name("full.safetensors")
    merge_weights(net, path, base, about, family.prefix())


SHOWN = 4  # captions of the sheet
LEFT = ("full.safetensors", "samples.png", "samples/", "curves.png", "log.csv", "metrics.json")


@torch.no_grad()
def draw_sheet(cfg: Config, nets: Nets, data, path: Path, device: torch.device) -> None:
    """The student's images for --show, else for the data's first captions, from fixed noise.

    By all ranks.
    """
    taus, images = anchors(cfg, nets.student.schedule), []
    with precision(cfg, nets, device):
        shown, size = (nets.shown, cfg.size) if nets.shown else first_conds(cfg, nets, data, device)
        for k, cond in enumerate(shown.values()):
            draw = [generator("sheet", k)]
            eps = normal(torch.empty(1, *nets.family.latent_shape(size), device=device), draw)
            x0 = sample_x0(nets.ema, eps, cond, taus, generators=draw)
            images.append(nets.vae.decode(x0).cpu())
    if ranks.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        title = f"student, {len(taus)} steps"
        sheet(path, list(shown), {title: torch.stack(images)}, nets.family.enlarged)


def first_conds(
    cfg: Config, nets: Nets, data, device: torch.device
) -> tuple[dict[str, Cond], tuple[int, int]]:
    """The cond of the data's first captions, and the size of their images."""
    first = data(range(cfg.batch * cfg.accumulate if cfg.buckets else SHOWN))
    found = {}
    for k, caption in enumerate(first.captions[:SHOWN]):
        # the cache knows a sample by its image; without one there is no need to encode it
        parts = (first.images if nets.cache else None, first.sizes)
        one = Pairs([caption], *(None if x is None else x[k : k + 1] for x in parts))
        found[caption] = load_batch(range(1), one, nets, cfg, device).cond
    return found, cfg.size if first.images is None else tuple(first.images.shape[-2:])


def report(cfg: Config, out: Path, nets: Nets, exam, run: Run, seconds: float) -> None:
    """exam: of the teacher's task, or None; nets: whole, on rank 0."""
    level = exam.short_level() if exam else None
    curves(out / "curves.png", out / "log.csv", run.exams, level)
    metrics = {"config": dataclasses.asdict(cfg), "train_seconds": seconds, **run.state()}
    if exam:
        taus, start = anchors(cfg, nets.student.schedule), time.time()
        exam.pictures(out / "samples.png", nets.teacher, nets.ema, taus)
        metrics["table"] = exam.table(nets.ema, taus, nets.teacher if cfg.table else None)
        metrics["table_seconds"] = time.time() - start
        print(exam.show(metrics["table"]))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
