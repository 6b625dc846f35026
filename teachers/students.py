"""Students: whose a file is, and how it draws. train.py says so in its files' metadata; of anybody
else's, flags do, and --remember keeps it in a student.json beside the file.

Student        a file or the shards of one, what is known of it, the network
find_student   all of that, of a path
student_file   a folder stands for the student in it: train.py's, or in diffusers' layout
checked        what a file says is looked at as flags are
remember       for the next call
reading        a teacher whose T5 reads more of a caption, or less
times_of       where it, or its teacher, is called
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from config import AMOUNT, COUNT, POSITIVE, Choice, Range, Refusal, check_anchors
from teachers import FAMILIES, Teacher, find

if TYPE_CHECKING:
    from torch import nn

About = dict[str, str]  # as in a file's metadata: all are text
SAMPLERS = ("x0", "euler")  # those of schedule.py
SAID = ("teacher", "taus", "sampler", "shift", "guidance", "size")  # what student.json may say
NAMES = ("student", "pytorch_lora_weights", "diffusion_pytorch_model", "model")
FOLDERS = (".", "transformer", "unet")  # of diffusers' layout


@dataclass(frozen=True)
class Student:
    """A student's file, or the index of its shards, and what is known of it."""

    path: Path
    about: About  # teacher, taus, steps, sampler, shift; may be size, rank, guidance
    family: Teacher
    foreign: bool  # train.py did not write it

    @property
    def title(self) -> str:
        """Its file's name; its folder's, where files are called alike. Fit for a path."""
        stem, folder = self.path.name.split(".")[0], self.path.resolve().parent
        folder = folder.parent if folder.name in FOLDERS else folder
        return re.sub(r"[^\w.-]+", "-", folder.name if stem in NAMES else self.path.stem)

    @property
    def is_lora(self) -> bool:
        """Whether it is adapters, to which the teacher's file belongs."""
        return "rank" in self.about

    @property
    def taus(self) -> tuple[float, ...]:
        return student_taus(self.about)

    @property
    def steps(self) -> int:
        return len(self.taus)

    @property
    def size(self) -> tuple[int, int] | None:
        return tuple(json.loads(self.about["size"])) if "size" in self.about else None

    @property
    def t5_length(self) -> int:
        """Tokens of a caption that T5 read; 0: as many as its teacher's does."""
        return int(self.about.get("t5_length", 0))

    @cached_property
    def fitted(self) -> Teacher:
        """Its teacher, or one without what the file lacks."""
        return self.family if self.is_lora else self.family.fitting(self.path)

    @property
    def guidance(self) -> float | None:
        """The scale it is given where it is drawn with, if its network takes one."""
        if self.is_lora or "guidance" not in self.about or self.fitted.guided_by != "input":
            return None
        return float(self.about["guidance"])

    def check_said(self, said: dict) -> None:
        """Refusal for flags that say otherwise of what train.py wrote."""
        given = [name for name, value in said.items() if value is not None]
        if given and not self.foreign:
            raise Refusal(f"--{given[0]}: {self.path} says itself where it is called")

    @property
    def files(self) -> list[Path]:
        from nets.weights import files_of

        return files_of(self.path)

    def load(
        self, base: list[Path], *how, scale: float = 1.0, merge: Sequence[str] = ()
    ) -> nn.Module:
        """The network. base: files of its teacher, on which a LoRA stands; how: dtype and device,
        as in `Teacher.load`; scale: of what a LoRA adds; merge: LoRAs that go into its base."""
        from teachers.lora import load_adapted

        if self.is_lora:
            more = {"scale": scale, "merge": merge}
            return load_adapted(self.family, self.path, self.about, base, *how, **more)
        return self.fitted.load(float(self.about["shift"]), self.path, *how)


def student_taus(about: About) -> tuple[float, ...]:
    """The student's anchors."""
    return tuple(json.loads(about["taus"]))


def find_student(path: Path, teacher: str | None = None, **said) -> Student:
    """What a file says of itself; else what its makers, student.json beside it and flags say.

    teacher: --teacher, needed where it is one of one's own; said: taus, sampler, shift, guidance by
    flags, None: not. FileNotFoundError or ValueError.
    """
    from nets.weights import files_of, read_metadata

    path = student_file(path)
    about = read_metadata(files_of(path)[0])
    foreign = "teacher" not in about
    if foreign:
        about = described(path, {"teacher": teacher} | said)
    name = about["teacher"]
    if teacher is None and name not in FAMILIES:
        raise Refusal(
            f'{path} is a student of "{name}", a teacher of your own; give its file: --teacher FILE'
        )
    family = find(teacher or name)
    if foreign:
        about = completed(path, about | {"teacher": family.name}, family)
    elif family.name != name:
        raise Refusal(f"--teacher {teacher}: {path} is a student of {name}")
    return Student(path, checked(about, str(path)), family, foreign)


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
) -> tuple[nn.Module, About]:
    """A student and its metadata. how: dtype and device, as in `Teacher.load`.

    weights: folder of its teacher's files, if it is a LoRA; scale: of what that adds.
    """
    student = find_student(path, teacher)
    locate = student.family.locate
    base = locate(weights, text=False)["denoiser"] if student.is_lora else []
    return student.load(base, *how, scale=scale), student.about


def student_file(path: Path) -> Path:
    """Of several in a folder the first of FOLDERS and NAMES; of shards their index."""
    if not path.is_dir():
        return path
    for folder in FOLDERS:
        for name in NAMES:
            for end in (".safetensors", ".safetensors.index.json"):
                if (path / folder / f"{name}{end}").is_file():
                    return path / folder / f"{name}{end}"
    return path / "student.safetensors"


# --- students of others --------------------------------------------------------------------------


def described(path: Path, said: dict) -> About:
    """Flags over what is remembered over what the makers say."""
    about = remembered(path)
    for name in () if about else FAMILIES:
        if path.name in find(name).released:
            about = find(name).released[path.name] | {"teacher": name}
    about |= {name: as_text(value) for name, value in said.items() if value is not None}
    lacking = [name for name in ("teacher", "taus", "sampler") if name not in about]
    if lacking:
        flags = {"teacher": "--teacher NAME", "taus": "--taus ...", "sampler": "--sampler x0|euler"}
        raise Refusal(
            f"{path} is not a student saved by train.py: it does not name its "
            f"{', '.join(lacking)}; add {' '.join(flags[name] for name in lacking)} "
            "(--remember keeps them beside it)"
        )
    return about


def completed(path: Path, about: About, family: Teacher) -> About:
    """What follows from the rest, or from the file."""
    from teachers.lora import rank_of

    taus = parsed(about["taus"])
    about = {"shift": str(family.preset.shift)} | about
    about["steps"] = str(len(taus)) if isinstance(taus, list) else "0"
    rank = rank_of(path) if path.suffix == ".safetensors" else 0
    if rank:
        about = {"guidance": str(family.preset.guidance)} | about | {"rank": str(rank)}
    return about


def parsed(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return None


def as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def memory(path: Path) -> Path:
    return path.with_name("student.json")


def remembered(path: Path) -> About:
    """What student.json beside it says of this file. ValueError where it is damaged."""
    where = memory(path)
    if not where.is_file():
        return {}
    try:
        found = json.loads(where.read_text())[path.name]
        unknown = found.keys() - {*SAID}
    except KeyError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise Refusal(f"{where} is damaged; correct it, or remove it") from None
    if unknown:
        raise Refusal(f"{where}: {path.name} says {min(unknown)}; it may say {', '.join(SAID)}")
    return {name: as_text(value) for name, value in found.items()}


def remember(student: Student) -> Path | None:
    """What is known of a student of others, into student.json beside it; None: of train.py's."""
    if not student.foreign:
        return None
    from nets.disk import write_text

    where, said = memory(student.path), {}
    for name in SAID:
        if name in student.about:
            text = student.about[name]
            said[name] = text if name in ("teacher", "sampler") else json.loads(text)
    every = json.loads(where.read_text()) if where.is_file() else {}
    write_text(where, json.dumps(every | {student.path.name: said}, indent=1))
    return where


# --- what a file may say -------------------------------------------------------------------------


def checked(about: About, where: str) -> About:
    """What is said of a student, or Refusal that names file and key."""

    def number(name: str, kind: type, may: Range) -> None:
        try:
            value = kind(about[name])
        except ValueError:
            raise Refusal(f'{where}: {name} is "{about[name]}", which is no number') from None
        may.check(f"{where}: {name}", value)

    def numbers(name: str, kinds: tuple[type, ...], may: Range) -> list:
        values = parsed(about[name])
        sound = isinstance(values, list) and values and all(type(x) in kinds for x in values)
        if not sound:
            raise Refusal(f'{where}: {name} is "{about[name]}", which is no list of numbers')
        may.check(f"{where}: {name}", values)
        return values

    for name in ("teacher", "taus", "steps", "sampler", "shift"):
        if name not in about:
            raise Refusal(f"{where} does not say its {name}; it is no whole file of train.py's")
    taus = numbers("taus", (int, float), Range(above=0, high=1))
    check_anchors(f"{where}: taus", taus)
    number("steps", int, COUNT)
    if int(about["steps"]) != len(taus):
        raise Refusal(f"{where}: steps is {about['steps']}, taus has {len(taus)} anchors")
    Choice(SAMPLERS).check(f"{where}: sampler", about["sampler"])
    number("shift", float, POSITIVE)
    for name, kind, may in (
        ("guidance", float, AMOUNT),
        ("rank", int, COUNT),
        ("t5_length", int, COUNT),
    ):
        if name in about:
            number(name, kind, may)
    if "size" in about and len(numbers("size", (int,), COUNT)) != 2:
        raise Refusal(f"{where}: size is {about['size']}; it must be height and width")
    if "rank" in about and "guidance" not in about:
        raise Refusal(f"{where} does not say its guidance; it is no whole file of train.py's")
    return about


def times_of(family: Teacher, schedule, steps: int, size, student: bool) -> list[float]:
    """Where a teacher is called; a student at another number of steps than its own: evenly."""
    from schedule import grid

    return grid(schedule, steps) if student else family.sampling_times(schedule, steps, size)
