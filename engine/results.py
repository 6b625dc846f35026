"""What a run leaves: the student's file, sheets of its images, curves, the table, metrics.json.

show          while the student learns: a short exam, or a sheet of its images
finish        all that is left at the end
export        the student as a safetensors file with its teacher's names; or, of adapters, a LoRA
keep_best     --keep-best: the same, where the student is better than it was before
merge         --export full: an official file, the student in its teacher's place
report        the table, the pictures and metrics.json
"""

import collections
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from adapter import merged, pairs
from config import MEASURED, Config, Refusal, legible
from engine import ranks
from engine.build import Nets, anchors, base_of, whole_net
from engine.pictures import curves
from engine.run import Run, say
from engine.sheets import draw_progress, draw_sheet, is_watched, keep_column
from nets.disk import write_text
from nets.weights import as_named, merge_weights, read_metadata, stream_weights, write
from teachers import Teacher, find
from teachers.elsewhere import modelspec
from teachers.lora import format_of, lora_tensors, read_lora


def show(
    done: int, cfg: Config, out: Path, nets: Nets, data, exam, run: Run, device: torch.device
) -> None:
    """A sheet of the student's images, and a short exam where the task has one; by all ranks.

    done: iterations; 0: before the first, of which there is no exam.
    """
    samples = out / "samples"
    captions, images = draw_sheet(cfg, nets, data, samples / f"step-{done:06d}.png", device)
    if ranks.rank() == 0:
        keep_column(samples / "progress.safetensors", captions, done, images)
    if not (nets.family.examined and done):
        return
    student, row = whole_net(nets.ema, cfg, nets), {}
    if exam:
        row = exam.short(student, anchors(cfg, nets.student.schedule))
        run.exams.append({"name": f"student, step {done}", "step": done} | row)
        say(exam.show(run.exams[-1:]))
    if cfg.keep_best in MEASURED:
        keep_best(done, row.get(cfg.keep_best), cfg, out, nets, run, device)


def finish(
    cfg: Config, out: Path, nets: Nets, data, exam, run: Run, device: torch.device, start: float
) -> None:
    """The student's file, then what shows it."""
    about, family = about_of(cfg, nets, run), nets.family
    path = export(nets, cfg, out, about)
    if not family.examined:
        draw_sheet(cfg, nets, data, out / "samples.png", device)
    if is_examined(cfg, family):  # rank 0 examines, on whole networks that all ranks gather
        whole = {name: whole_net(getattr(nets, name), cfg, nets) for name in ("ema", "teacher")}
        nets = dataclasses.replace(nets, **whole)
    if cfg.export == "full" and ranks.rank() == 0:
        merge(cfg, nets, path, about)
    if ranks.rank() == 0:
        report(cfg, out, nets, exam, run, time.time() - start)
        made = (name for name in LEFT if (out / name).exists())
        print(f"{legible(path)}; beside it: {', '.join(made)}")


def is_examined(cfg: Config, family: Teacher) -> bool:
    return family.examined and (cfg.table or cfg.exam_every > 0)


def check_export(cfg: Config, family: Teacher) -> None:
    """ValueError for a file that cannot be written at the end."""
    if cfg.export == "full" and not cfg.adapter and not family.prefix():
        raise Refusal(f"--export full: the file of {family.name} holds no other network")
    if cfg.adapter:
        format_of(family, cfg.lora_format)


def metadata_of(cfg: Config, nets: Nets) -> dict[str, str]:
    """What a student's file says of itself."""
    read = {"t5_length": str(cfg.t5_length)} if cfg.t5_length else {}
    return read | {
        "format": "pt",  # without it some loaders refuse the file
        **modelspec(nets.family, cfg.student_steps, cfg.size),
        "teacher": nets.family.name,
        "sampler": "x0",
        "steps": str(cfg.student_steps),
        "shift": str(cfg.shift),
        "size": json.dumps(cfg.size),
        "taus": json.dumps(anchors(cfg, nets.student.schedule)),
        "base": base_of(cfg, nets.family),
    }


def about_of(cfg: Config, nets: Nets, run: Run) -> dict[str, str]:
    """And what it was trained with."""
    parts = {name: x["digest"] for name, x in run.settings.get("parts", {}).items()}
    return metadata_of(cfg, nets) | {"parts": json.dumps(parts)}


LOWER = ("fd", "watch")  # measures of which less is better


def keep_best(
    done: int,
    value: float | None,
    cfg: Config,
    out: Path,
    nets: Nets,
    run: Run,
    device: torch.device,
) -> None:
    """student-best.safetensors, where the student is better by --keep-best than it was before; by
    all ranks. value: of that measure, on rank 0.

    A run that goes back behind the file, to a checkpoint, has no best until it comes by again.
    """
    path, first = out / f"{BEST}.safetensors", ranks.rank() == 0
    if not ranks.agree(not first or is_better(value, cfg.keep_best, run.best, path), device):
        return
    run.best = {"value": value, "step": str(done), "measure": cfg.keep_best}
    about = {"step": str(done), "best": f"{cfg.keep_best} {value}"}
    export(nets, cfg, out, about_of(cfg, nets, run) | about, BEST)
    if first:
        told = f"the best so far by {cfg.keep_best}, {value:.4g}"
        say(f"{told}: {path.name} is of iteration {done}")


def is_better(value: float, measure: str, best: dict, path: Path) -> bool:
    """Than the best so far, by the same measure and still there."""
    if best.get("measure") != measure or not path.is_file():
        return True
    if read_metadata(path).get("step") != best["step"]:
        return True
    sign = -1 if measure in LOWER else 1
    return sign * value > sign * best["value"]


BEST = "student-best"  # its file's name


def export(
    nets: Nets, cfg: Config, out: Path, about: dict[str, str], name: str = "student"
) -> Path:
    """A file fit for sample.py; all ranks take part."""
    path = out / f"{name}.safetensors"
    (export_lora if cfg.adapter else export_whole)(nets, cfg, path, about)
    return path


def export_whole(nets: Nets, cfg: Config, path: Path, about: dict[str, str]) -> None:
    prefix = nets.family.prefix()
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    shapes = {prefix + name: x.shape for name, x in sorted(nets.ema.state_dict().items())}
    tensors = ((prefix + name, x) for name, x in ranks.gather(nets.ema))
    if ranks.rank() == 0:
        stream_weights(finite(tensors, dtype, path), shapes, path, dtype, about)
    else:
        collections.deque(tensors, maxlen=0)  # takes part, keeps nothing


def finite(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, path: Path
) -> Iterator[tuple[str, Tensor]]:
    """On the host, as they are written. FloatingPointError for a value that would not be finite."""
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"{name} has values that are not finite: {path} is not written"
            )
        yield name, tensor


def export_lora(nets: Nets, cfg: Config, path: Path, about: dict[str, str]) -> None:
    """The student's adapters, fit for other programs too."""
    family = nets.family
    added = pairs(whole_net(nets.ema, cfg, nets))
    if ranks.rank() == 0:
        kind = format_of(family, cfg.lora_format)
        dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        tensors = lora_tensors(family, kind, added, nets.teacher)
        tensors = dict(finite(tensors.items(), dtype, path))
        more = modelspec(family, cfg.student_steps, cfg.size, lora=True)
        more |= {"guidance": str(cfg.guidance), "lora_format": kind}
        more |= {"rank": str(cfg.adapter), "alpha": str(cfg.adapter)}
        write(tensors, path, about | more)


def merge(cfg: Config, nets: Nets, student: Path, about: dict[str, str]) -> None:
    """An official file, the student in its teacher's place; of adapters, added to that in fp32."""
    family, path = find(cfg.teacher), student.with_name("full.safetensors")
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    base = family.locate(cfg.weights, text=False, base=cfg.base)["denoiser"]
    form = family.load(cfg.shift, base, dtype, "meta")
    if cfg.adapter:
        state = merged_weights(cfg, nets, student, base)
    else:
        state = family.load(cfg.shift, student, dtype).state_dict().items()
    whole, layout = base, family.layout(base, form)
    about = kept_metadata(base) | about
    if layout["stored"] is not as_named:  # under names that are not a student's
        if not family.prefix():
            shapes = {name: x.shape for name, x in form.state_dict().items()}
            return stream_weights(state, shapes, path, dtype, about)
        whole = family.locate(cfg.weights, text=False)["denoiser"]
        about = kept_metadata(whole) | about
        layout = family.layout(whole, form)
    merge_weights(state, path, whole, about, layout["prefix"], layout["ignore"])


def kept_metadata(paths: list[Path]) -> dict[str, str]:
    """What files say of themselves, licence included; but for the hash of their bytes."""
    every = {key: value for path in paths for key, value in read_metadata(path).items()}
    return {key: value for key, value in every.items() if not key.endswith("hash_sha256")}


def merged_weights(
    cfg: Config, nets: Nets, student: Path, base: list[Path]
) -> Iterator[tuple[str, Tensor]]:
    """Of the teacher's files and the LoRA as it was written, one by one, in fp32."""
    family = nets.family
    own = family.own_weights(nets.teacher, cfg.guidance)
    weights = family.read(cfg.shift, base, torch.float32, "cpu", cfg.merge)
    for name, weight in merged(weights, read_lora(student, family, nets.teacher)):
        yield name, own.get(name, weight)


LEFT = (f"{BEST}.safetensors", "full.safetensors", "samples.png", "samples/", "progress.png")
LEFT += ("curves.png", "log.csv", "metrics.json")


def report(cfg: Config, out: Path, nets: Nets, exam, run: Run, seconds: float) -> None:
    """exam: of the teacher's task, or None; nets: whole, on rank 0."""
    level = exam.short_level() if exam else None
    curves(out / "curves.png", out / "log.csv", run.exams, level)
    draw_progress(out, nets.family.enlarged, is_watched(cfg))
    metrics = {"config": dataclasses.asdict(cfg), "train_seconds": seconds, **run.state()}
    if exam:
        taus, start = anchors(cfg, nets.student.schedule), time.time()
        exam.pictures(out / "samples.png", nets.teacher, nets.ema, taus)
        metrics["table"] = exam.table(nets.ema, taus, nets.teacher if cfg.table else None)
        metrics["table_seconds"] = time.time() - start
        print(exam.show(metrics["table"]))
    write_text(out / "metrics.json", json.dumps(metrics, indent=1))
