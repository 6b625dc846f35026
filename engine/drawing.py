"""Images that a teacher and its students draw from the same noise, kept in a folder.

    Sampling, Task   one way to draw all images; all that is drawn
    draw_missing     what is not there yet, or was made otherwise; draw: these images
    read_images      out of the folder

Image k depends on its prompt and on (seed, k) alone, and its PNG carries what it was made with.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from engine.batch import encode_all, stack_conds
from engine.pictures import check_finite, save_png
from measure.distances import from_uint8
from nets.files import Files, fingerprint
from nets.weights import DTYPES
from schedule import Cond, draw_samples, generator, normal
from teachers import Teacher
from teachers.merging import parse_merge
from teachers.students import Student, times_of


@dataclass(frozen=True)
class Sampling:
    """One way to draw all images."""

    who: str  # "teacher", or one of the task's students
    steps: int
    sampler: str  # "x0" | "euler"
    guidance: float | None
    nfe: int  # network evaluations per image
    taus: tuple[float, ...] = ()  # (): evenly spaced before the shift

    @property
    def name(self) -> str:
        return f"{self.who} {self.steps}"


@dataclass(frozen=True)
class Task:
    family: Teacher
    files: Files
    denoisers: dict[str, list[Path]]  # their files, by who draws
    scorers: Files  # of the networks that measure
    size: tuple[int, int]
    dtype: str
    seed: int
    batch: int
    prompts: list[str]
    each: int  # images of every prompt, one after the other
    samplings: tuple[Sampling, ...]  # the first is what the others are held against
    out: Path
    students: dict[str, Student] = field(default_factory=dict)  # by who draws
    adapter_scale: float = 1.0  # of a student's LoRA
    merge: tuple[str, ...] = ()  # LoRA files in the teacher, FILE or FILE:SCALE
    t5_length: int = 0  # tokens; 0: the teacher's own

    @property
    def count(self) -> int:
        return len(self.prompts) * self.each

    def folder(self, s: Sampling) -> Path:
        return self.out / "images" / s.name.replace(" ", "-")

    def path(self, s: Sampling, k: int) -> Path:
        return self.folder(s) / f"{k:06d}.png"


# --- images --------------------------------------------------------------------------------------


def alike(task: Task, s: Sampling) -> dict:
    """All that images depend on, but for prompt and number."""
    weights = [fingerprint(path) for path in task.denoisers[s.who]]
    found = {"teacher": task.family.name, "weights": weights, "size": list(task.size)}
    found |= {"steps": s.steps, "sampler": s.sampler, "guidance": s.guidance, "taus": list(s.taus)}
    found |= {"dtype": task.dtype, "seed": task.seed}
    found |= {"adapter_scale": task.adapter_scale} if task.adapter_scale != 1 else {}
    merged = [f"{fingerprint(path)}:{scale:g}" for path, scale in map(parse_merge, task.merge)]
    found |= {"merge": sorted(merged)} if merged else {}
    return found | ({"t5_length": task.t5_length} if task.t5_length else {})


def settings_of(task: Task, s: Sampling) -> Callable[[int], dict]:
    """k -> all that image k depends on, as its PNG carries it."""
    found = alike(task, s)
    return lambda k: found | {"prompt": task.prompts[k // task.each], "image": k}


def is_there(path: Path, settings: dict) -> bool:
    try:
        with Image.open(path) as picture:
            return json.loads(picture.text["settings"]) == settings
    except (OSError, KeyError, ValueError, SyntaxError, RecursionError):
        return False  # absent, damaged, or of another making


def missing_images(task: Task, s: Sampling, rank: int = 0, world: int = 1) -> list[int]:
    """The images that this rank has to draw: image k is rank k % world's."""
    settings = settings_of(task, s)
    return [k for k in range(rank, task.count, world) if not is_there(task.path(s, k), settings(k))]


def draw_missing(task: Task, device: torch.device, rank: int = 0, world: int = 1) -> None:
    """Of all ways to draw, this rank's share."""
    todo = {s: missing_images(task, s, rank, world) for s in task.samplings}
    todo = {s: ks for s, ks in todo.items() if ks}
    if not todo:
        return
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc="images", disable=rank > 0) as bar:
        draw(task, todo, device, bar)


def draw(task: Task, todo: dict[Sampling, list[int]], device: torch.device, bar: tqdm) -> None:
    """Text encoders first, then one denoiser after the other; nothing is loaded for nothing."""
    how = (DTYPES[task.dtype], device)
    conds = encode_prompts(task, {k // task.each for ks in todo.values() for k in ks}, *how)
    vae = task.family.load_vae(task.files, *how)
    for who in task.denoisers:
        net = None  # the other's memory is free before this one is loaded
        for s, ks in todo.items():
            if s.who == who:
                net = net or load_net(task, who, *how)
                bar.set_postfix_str(s.name)
                draw_images(task, s, ks, net, vae, conds, device, bar)


def encode_prompts(
    task: Task, numbers: set[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Cond]:
    """The cond of each of these prompts, and of none, on the CPU; the encoders go again."""
    text = task.family.load_text(task.files, dtype, device)
    captions = ["", *(task.prompts[i] for i in sorted(numbers))]
    return encode_all(text, captions, task.batch, device, task.size)


def load_net(task: Task, who: str, *how) -> nn.Module:
    """how: dtype and device."""
    family = task.family
    if who in task.students:
        more = {"scale": task.adapter_scale, "merge": task.merge}
        net = task.students[who].load(task.files.get("denoiser"), *how, **more)
    else:
        net = family.load(family.preset.shift, task.denoisers[who], *how, task.merge)
    return net.requires_grad_(False).eval()


@torch.no_grad()
def draw_images(
    task: Task,
    s: Sampling,
    ks: list[int],
    net: nn.Module,
    vae: nn.Module,
    conds: dict[str, Cond],
    device: torch.device,
    bar: tqdm,
) -> None:
    """Images ks, into their files."""
    settings = settings_of(task, s)
    taus = s.taus or times_of(task.family, net.schedule, s.steps, task.size, s.who in task.students)
    for start in range(0, len(ks), task.batch):
        part = ks[start : start + task.batch]
        # As in the exam, whose images of the embedded teacher come with the code.
        draws = [generator("exam", task.seed, k) for k in part]
        shape = task.family.latent_shape(task.size)
        eps = normal(torch.empty(len(part), *shape, device=device), draws)
        cond = stack_conds([conds[task.prompts[k // task.each]] for k in part], device)
        null = [conds[""]] * len(part)
        uncond = stack_conds(null, device) if s.guidance and task.family.uses_null else None
        how = (list(taus), s.sampler, uncond, s.guidance)
        images = vae.decode(draw_samples(net, eps, cond, *how, draws))
        check_finite(images, [f'"{task.prompts[k // task.each]}" ({s.name}, {k})' for k in part])
        for k, image in zip(part, images, strict=True):
            save_png(image, task.path(s, k), settings(k))
        bar.update(len(part))


def read_images(task: Task, s: Sampling, ks: range | list[int]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    images = [np.array(Image.open(task.path(s, k))) for k in ks]
    return from_uint8(torch.from_numpy(np.stack(images)).movedim(-1, 1))
