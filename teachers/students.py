"""Students: files that train.py saved, and whose they are.

read_student   what a file says of itself
teacher_of     its teacher
load_student   the network
reading        a teacher whose T5 reads more of a caption, or less
times_of       where it, or its teacher, is called
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import Refusal
from teachers import FAMILIES, Teacher, find

if TYPE_CHECKING:
    from torch import nn


def read_student(path: Path) -> dict[str, str]:
    """The metadata of a student's file: teacher, taus, steps, sampler, shift, size."""
    from nets.weights import read_metadata

    about = read_metadata(path)
    if "teacher" in about:
        return about
    for name in FAMILIES:
        if path.name in find(name).released:
            return find(name).released[path.name] | {"teacher": name}
    raise Refusal(f"{path} is not a student saved by train.py: it does not name its teacher")


def teacher_of(path: Path, given: str | None = None) -> Teacher:
    """The teacher of a student's file. given: --teacher, needed where it is one of one's own."""
    name = read_student(path)["teacher"]
    if given is None and name not in FAMILIES:
        raise Refusal(
            f'{path} is a student of "{name}", a teacher of your own; give its file: --teacher FILE'
        )
    found = find(given or name)
    if found.name != name:
        raise Refusal(f"--teacher {given}: {path} is a student of {name}")
    return found


def reading(family: Teacher, tokens: int) -> Teacher:
    """The teacher whose T5 reads so many tokens of a caption; 0: as many as it does. ValueError."""
    if not tokens:
        return family
    if not family.optional:
        raise Refusal(
            f"--t5-length {tokens}: only of SD 3.5's T5 is it open, {family.name} has its own"
        )
    return family.reading(tokens)


def load_student(
    path: Path, *how, teacher: str | None = None, weights: str = "", scale: float = 1.0
) -> tuple[nn.Module, dict[str, str]]:
    """A student and its metadata. how: dtype and device, as in `Teacher.load`.

    weights: folder of its teacher's files, if it is a LoRA; scale: of what that adds.
    """
    about, family = read_student(path), teacher_of(path, teacher)
    base = family.locate(weights, text=False)["denoiser"] if is_lora(about) else []
    return load_saved(family, [path, *base], *how, scale=scale), about


def is_lora(about: dict[str, str]) -> bool:
    """Whether metadata are of adapters, to which the teacher's file belongs."""
    return "rank" in about


def load_saved(
    family: Teacher, paths: list[Path], *how, scale: float = 1.0, merge: Sequence[str] = ()
) -> nn.Module:
    """paths: a student's file and, of adapters, their base's; merge: LoRAs that go into that."""
    from teachers.lora import load_adapted

    path, *base = paths
    about = read_student(path)
    if not is_lora(about):
        return family.load(float(about["shift"]), path, *how)
    return load_adapted(family, path, base, *how, scale=scale, merge=merge)


def times_of(family: Teacher, schedule, steps: int, size, student: bool) -> list[float]:
    """Where a teacher is called; a student at another number of steps than its own: evenly."""
    from schedule import grid

    return grid(schedule, steps) if student else family.sampling_times(schedule, steps, size)


def student_taus(about: dict[str, str]) -> tuple[float, ...]:
    """The student's anchors."""
    return tuple(json.loads(about["taus"]))
