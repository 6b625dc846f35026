"""The teacher's images, in place of real ones: --make-reals N, where there are captions alone.

    make_reals     drawn once, by all ranks, and opened as a data set
    wanted         what is drawn: of which captions, and how
    teacher_calls  of the denoiser for one image; the plan asks

Kept in a folder (--reals) as evaluate.py keeps its images: PNGs that carry their settings, so that
whoever was interrupted goes on. Beside them list.json, written when all are there, which --data of
another run takes as it is. Image k depends on its caption and on k alone, whatever the run's seed.
"""

import dataclasses
import json
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from dataset.cache import check_purpose, write_purpose
from dataset.images import Images
from dataset.sources import captions_of, open_data
from engine import ranks
from engine.build import base_of, locate_files
from engine.drawing import Sampling, Task, alike, draw, missing_images
from engine.run import take_folder
from nets.disk import write_text
from teachers import Teacher

STEPS = 50  # the teacher's, as in sample.py and evaluate.py
SEED = 2  # of the images' noise: an exam's images have 0 and 1
ROUND = 1024  # images of a rank for which captions are encoded at a time: with FLUX's text 4 GB


def make_reals(cfg: Config, family: Teacher, device: torch.device) -> Images:
    """The data set of N images that the teacher draws of the data's captions.

    Refusal where the folder holds images made otherwise, or another list.
    """
    folder = Path(cfg.reals or Path(cfg.out, "reals"))
    task = wanted(cfg, family, folder)
    (way,) = task.samplings
    about = alike(task, way) | {"base": base_of(cfg, family)}
    check_purpose(folder, about, flag="--reals")
    listed, first = folder / "list.json", ranks.rank() == 0
    paths = [str(task.path(way, k).relative_to(folder)) for k in range(task.count)]
    text = json.dumps({"image_paths": paths, "prompts": task.prompts})
    there = listed.is_file() and listed.read_text() == text
    if not ranks.agree(there, device):  # asked before any rank writes
        with ExitStack() as held:
            take_folder(folder, held, "--reals")
            if first:
                write_purpose(folder, about)
                listed.unlink(missing_ok=True)
            draw_rounds(task, way, device)
            ranks.barrier()
            if first:
                write_text(listed, text)
        ranks.barrier()
    return open_data(str(listed), cfg.size, cfg.seed)


def wanted(cfg: Config, family: Teacher, folder: Path) -> Task:
    """All that is drawn: every caption as often as any other, or once more."""
    data = family.data(0) or open_data(cfg.data, cfg.size, 0)
    prompts = [*islice(cycle(captions_of(data, cfg.make_reals)), cfg.make_reals)]
    files = locate_files(dataclasses.replace(cfg, w_gan=0.0), family)
    guidance = cfg.guidance or None
    return Task(
        family=family,
        files=files,
        denoisers={"teacher": files["denoiser"]},
        scorers={},
        size=cfg.size,
        dtype="bf16" if cfg.bf16 else "fp32",
        seed=SEED,
        batch=family.sampled_at_once,
        prompts=prompts,
        each=1,
        samplings=(Sampling("teacher", STEPS, "euler", guidance, teacher_calls(cfg, family)),),
        out=folder,
        merge=cfg.merge,
    )


def draw_rounds(task: Task, way: Sampling, device: torch.device) -> None:
    """This rank's share of what is missing."""
    todo = missing_images(task, way, ranks.rank(), ranks.world())
    with tqdm(total=len(todo), desc="reals", disable=ranks.rank() > 0) as bar:
        for start in range(0, len(todo), ROUND):
            draw(task, {way: todo[start : start + ROUND]}, device, bar)


def teacher_calls(cfg: Config, family: Teacher) -> int:
    """With and without caption, where guidance takes both."""
    return STEPS * (2 if cfg.guidance and family.uses_null else 1)
