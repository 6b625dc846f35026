"""Sheets: what the student draws of some prompts, now and then; and all of them side by side.

shown_conds    the prompts: those of --show, else the data's first captions
draw_sheet     the student's images of them, from fixed noise
keep_column    what a sheet shows, kept small
draw_progress  progress.png, of what was kept
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from config import Config, Refusal
from dataset.images import Pairs
from engine import ranks
from engine.batch import load_batch
from engine.build import Nets, anchors, precision
from engine.pictures import sheet, shrunk
from measure.distances import from_uint8, to_uint8
from nets.weights import open_weights, read_metadata, write
from schedule import Cond, generator, normal, sample_x0

SHOWN = 4  # captions of the sheet


@torch.no_grad()
def draw_sheet(
    cfg: Config, nets: Nets, data, path: Path, device: torch.device
) -> tuple[list[str], Tensor]:
    """The student's images for --show, else for the data's first captions, from fixed noise.

    By all ranks. Returns captions and images (captions, 1, 3, H, W).
    """
    taus, images = anchors(cfg, nets.student.schedule), []
    with precision(cfg, nets, device):
        shown, size = shown_conds(cfg, nets, data, device)
        for k, cond in enumerate(shown.values()):
            draw = [generator("sheet", k)]
            eps = normal(torch.empty(1, *nets.family.latent_shape(size), device=device), draw)
            x0 = sample_x0(nets.ema, eps, cond, taus, generators=draw)
            images.append(nets.vae.decode(x0).cpu())
    captions, images = list(shown), torch.stack(images)
    if ranks.rank() == 0:
        title = f"student, {len(taus)} steps"
        sheet(path, captions, {title: images}, nets.family.enlarged)
    return captions, images


def shown_conds(
    cfg: Config, nets: Nets, data, device: torch.device, count: int = SHOWN
) -> tuple[dict[str, Cond], tuple[int, int]]:
    """The cond of --show, else of the data's first captions, and the size of their images."""
    if nets.shown:
        return nets.shown, cfg.size
    first = data(range(cfg.batch * cfg.accumulate if cfg.buckets else count))
    found = {}
    for k, caption in enumerate(first.captions[:count]):
        # the cache knows a sample by its image; without one there is no need to encode it
        parts = (first.images if nets.cache else None, first.sizes)
        one = Pairs([caption], *(None if x is None else x[k : k + 1] for x in parts))
        found[caption] = load_batch(range(1), one, nets, cfg, device).cond
    return found, cfg.size if first.images is None else tuple(first.images.shape[-2:])


COLUMNS = 10  # of progress.png, the teacher's aside
TEACHERS = "watch.safetensors"  # in a run's folder: the teacher's images, if the watch is on


def keep_column(path: Path, captions: list[str], done: int, images: Tensor) -> None:
    """What a sheet shows, small, for `draw_progress`; of steps after it nothing is kept."""
    found = read_columns(path, captions)
    found = {step: x for step, x in found.items() if int(step) < done}
    found[str(done)] = to_uint8(shrunk(images[:, 0]))
    write(found, path, {"captions": json.dumps(captions)})


def read_columns(path: Path, captions: list[str] | None = None) -> dict[str, Tensor]:
    """By step, in order, uint8 (captions, 3, h, w); none where there are none of these captions."""
    try:
        with open_weights(path) as file:
            if captions and json.loads(file.metadata()["captions"]) != captions:
                return {}
            return {step: file.get_tensor(step) for step in sorted(file.keys(), key=int)}
    except (Refusal, OSError, ValueError, KeyError, TypeError):
        return {}  # absent or damaged


def is_watched(cfg: Config) -> bool:
    """Whether there is a look at drift at all; see watch.py."""
    return 0 < cfg.watch_every <= cfg.steps


def draw_progress(out: Path, enlarged: int, watched: bool) -> None:
    """progress.png: a row for each caption, a column for each sheet, or every so many; the last is
    the teacher's, of the same noise, where the watch has asked it."""
    path = out / "samples" / "progress.safetensors"
    if not (columns := read_columns(path)):
        return
    captions, steps = json.loads(read_metadata(path)["captions"]), list(columns)
    many = min(len(steps), COLUMNS)
    steps = [steps[round(k * (len(steps) - 1) / max(1, many - 1))] for k in range(many)]
    shown = {step: columns[step] for step in steps}
    if watched and (out / TEACHERS).is_file():
        about = read_metadata(out / TEACHERS)
        if json.loads(about["captions"])[: len(captions)] == captions:
            with open_weights(out / TEACHERS) as file:
                drawn = file.get_tensor("pictures")[: len(captions)]
            shown[f"teacher, {about['steps']} steps"] = drawn
    shown = {title: from_uint8(x)[:, None] for title, x in shown.items()}
    sheet(out / "progress.png", captions, shown, enlarged)
