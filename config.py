"""Choices: one flat dataclass, whose fields say what they are and what they may be.

    Config          every choice of a run
    Range, Choice   what a value may be; Text: what UTF-8 can hold
    home, place     paths as one writes them after a flag
    legible         what may be shown on a screen
    resolve         a teacher's preset, what its number of student steps changes, then the flags
    check           refuses what cannot be
    Parser          of a command's flags: one line for an error, with the nearest thing there is

Presets are in teachers/, each with its teacher; the flags of each command in engine/flags.py.
Imports nothing of ours.
"""

import argparse
import ast
import dataclasses
import errno
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nets.letters import is_text, legible

if sys.version_info < (3, 11):  # noqa: UP036  every command comes here first; old Pythons read it
    print(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)


def say_interrupted(kind: type[BaseException], error: BaseException, trace) -> None:
    """Ctrl-C where no command is listening yet, while its imports take seconds: one line."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: interrupted", file=sys.stderr)
    sys.exit(130)


sys.excepthook = say_interrupted


# --- what a value may be -------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A finite number, or several, each within bounds; without bounds, any."""

    low: float | None = None  # and more
    high: float | None = None  # and less
    above: float | None = None  # more than
    below: float | None = None  # less than

    def words(self) -> str:
        if None not in (self.low, self.high):
            return f"from {self.low:,} to {self.high:,}"
        bounds = {"at least": self.low, "above": self.above, "below": self.below}
        bounds["at most"] = self.high
        return ", ".join(f"{word} {x:,}" for word, x in bounds.items() if x is not None)

    def check(self, name: str, value) -> None:
        """ValueError with the flag's name, the value and what it may be."""
        several = isinstance(value, (tuple, list))
        for x in value if several else (value,):
            finite = abs(x) < math.inf  # nan is not
            within = (
                (self.low is None or x >= self.low)
                and (self.high is None or x <= self.high)
                and (self.above is None or x > self.above)
                and (self.below is None or x < self.below)
            )
            if not (finite and within):
                allowed = ["" if finite else "a finite number", self.words()]
                must = f"{'each' if several else 'it'} must be {', '.join(filter(None, allowed))}"
                raise Refusal(f"{name} is {shown(value)}; {must}")


@dataclass(frozen=True)
class Choice:
    """One of these words, or several."""

    words: tuple[str, ...]

    def check(self, name: str, value) -> None:
        """ValueError with the flag's name, the value and what it may be."""
        several = isinstance(value, (tuple, list))
        for word in value if several else (value,):
            if word not in self.words:
                known = f"choose from {', '.join(self.words)}{near(word, self.words)}"
                raise Refusal(f'{name} {"has" if several else "is"} "{word}"; {known}')


@dataclass(frozen=True)
class Text:
    """Words for a network that reads, or several such: an argument need not be UTF-8."""

    def check(self, name: str, value) -> None:
        """ValueError with the flag's name and the value."""
        for text in value if isinstance(value, (tuple, list)) else (value,):
            if not is_text(text):
                raise Refusal(f'{name} is "{text[:60]}", which is no UTF-8 text')


def home(text: str) -> str:
    """A path, or a pattern of paths, whose ~ is the home folder."""
    return os.path.expanduser(text)


def place(text: str) -> Path:
    """A path that a flag gives. Nothing is none: it would stand for the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return Path(home(text))


def near(word: str, known: Iterable[str]) -> str:
    """ "; did you mean flux-dev?", or nothing."""
    import difflib

    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def shown(value) -> str:
    """As one writes it after a flag."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    return str(value) or "none"


def setting(default, help: str, may: Range | Choice | Text | None = None, group: str = ""):
    """A field of Config. group: the title that --help gives to this field and those after it."""
    about = {"help": help, "may": may, "group": group}
    return dataclasses.field(default=default, metadata=about)


# --- every choice --------------------------------------------------------------------------------


def keys_of(file: str, table: str) -> tuple[str, ...]:
    """The keys of a dict at the top of a file, which is read and not run: it would import torch."""
    for node in ast.parse((Path(__file__).parent / file).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == table:
            return tuple(key.value for key in node.value.keys)
    raise AssertionError(f"{file} has no {table}")


COUNT, AMOUNT, SHARE = Range(low=1), Range(low=0), Range(low=0, high=1)
POSITIVE, ANY = Range(above=0), Range()
# What no memory holds, or nobody means.
SIDE, BATCH, LAYERS = Range(low=1, high=2**15), Range(low=1, high=2**16), Range(low=0, high=2**13)
CALLS, THREADS = Range(low=1, high=1000), Range(low=0, high=256)
STEPS = Range(low=1, high=10**8 - 1)  # a checkpoint's name has eight digits
PIXELS = 2**40  # bytes of a batch's, in fp32
TIMES = Choice(("uniform", "logit-normal"))
MEASURED = ("fd", "accuracy", "clean", "digits", "colours", "arrangements", "recall")  # by an exam
LORA_FORMATS = ("own", "kohya", "comfyui", "diffusers")  # see teachers/lora.py


@dataclass(frozen=True)
class Config:
    teacher: str = setting(
        "digits", "whose network is distilled; sets all defaults", group="teacher"
    )
    size: tuple[int, int] = setting(
        (1024, 1024), "height and width of the images, in pixels: their resolution", SIDE
    )
    weights: str = setting("", "folder of the official files; none: the hub")
    base: str = setting(
        "", "a fine-tune in place of its denoiser: a file, shards, or diffusers' folder"
    )
    merge: tuple[str, ...] = setting((), "LoRA files added to that first, FILE or FILE:SCALE")
    t5: bool = setting(True, "SD 3.5: read captions with T5 too, not with CLIP alone")
    t5_length: int = setting(
        0,
        "SD 3.5: tokens of a caption that T5 reads; 0: 256 as in diffusers; ComfyUI: 77",
        Range(low=0, high=512),
    )
    bf16: bool = setting(True, "compute in bf16; trained weights and losses stay fp32")
    tf32: bool = setting(
        True, "convolutions in fp32, as the discriminator's heads have, round to 10 bits on a GPU"
    )
    compile: bool = setting(False, "compile the denoisers' blocks: faster, after minutes of it")
    channels_last: bool = setting(
        False, "convolutions of UNet and autoencoder, in no shards: channels innermost in memory"
    )
    guidance: float = setting(3.5, "the teacher's scale where its images are shown", AMOUNT)

    student_steps: int = setting(
        4, "K anchors, evenly spaced before the shift", CALLS, group="student"
    )
    taus: tuple[float, ...] = setting(
        (), "the anchors, descending, if not evenly spaced", Range(above=0, high=1)
    )
    shift: float = setting(1.0, "resolution shift of the flow's times, in training", POSITIVE)
    p_backward: float = setting(0.5, "share of inputs from backward simulation", SHARE)
    ttur: int = setting(5, "fake and discriminator updates per student update", COUNT)
    anchor_weights: tuple[float, ...] = setting(
        (), "of the student's loss, one for each anchor; none: 1", AMOUNT
    )
    ema: float = setting(0.0, "decay of the exported average of weights; 0: none", SHARE)

    w_dmd: float = setting(1.0, "weight of the DMD loss", AMOUNT, group="distribution matching")
    guidance_dmd: tuple[float, float] = setting(
        (1.0, 8.0), "range of the teacher's guidance scale", AMOUNT
    )
    guidance_rescale: float = setting(
        0.0,
        "how far the guided prediction is drawn to the unguided one's norm, in ISG too",
        SHARE,
    )
    t_dmd: str = setting("uniform", "times of the DMD loss", TIMES)
    t_guidance: str = setting(
        "same", "times of what guidance adds to its gradient", Choice(("same", *TIMES.words))
    )
    t_fake: str = setting("logit-normal", "times of the fake loss", TIMES)

    ida_decay: float = setting(
        0.97, "lambda; 1 turns IDA off", SHARE, group="implicit distribution alignment (IDA)"
    )

    w_isg: float = setting(
        1.0, "weight of the ISG loss; 0 turns ISG off", AMOUNT, group="intra-segment guidance (ISG)"
    )
    isg_distance: str = setting(
        "l2", "l2: paper; charbonnier: official code", Choice(keys_of("isg.py", "DISTANCES"))
    )
    isg_margin: float = setting(0.02, "how far tau_mid keeps off the segment's ends", SHARE)
    guidance_isg: tuple[float, float] = setting(
        (1.0, 8.0), "range of the teacher's guidance scale", AMOUNT
    )

    w_gan: float = setting(
        1.0, "weight of the adversarial loss; 0: no discriminator", AMOUNT, group="discriminator"
    )
    disc_channels: int = setting(0, "channels of its heads; 0: as wide as the backbone", LAYERS)
    disc_augment: tuple[str, ...] = setting(
        (), "DiffAugment: any of these", Choice(keys_of("discriminator.py", "AUGMENTATIONS"))
    )
    disc_text: bool = setting(True, "condition it on the caption")
    disc_reference: bool = setting(True, "condition it on a real image of the same caption")

    adapter: int = setting(
        0, "rank of adapters on one frozen base; 0: full training", LAYERS, group="adapters"
    )
    adapter_layers: tuple[str, ...] = setting(
        (), "words, one of which is in a layer's name; none: all layers of the blocks"
    )
    adapter_init: str = setting(
        "inputs", "A reads where a layer's inputs are, or anywhere", Choice(("inputs", "random"))
    )
    adapter_train: str = setting(
        "B", "B alone, with which IDA is exact, or A and B", Choice(("B", "both"))
    )
    base_dtype: str = setting(
        "bf16", "of the base's layers; int8, fp8: weights alone", Choice(("bf16", "int8", "fp8"))
    )
    lora_format: str = setting(
        "own", "whose names the LoRA has; own: what most programs read", Choice(LORA_FORMATS)
    )

    steps: int = setting(750, "iterations", STEPS, group="optimisation")
    batch: int = setting(32, "samples per rank, at a time", BATCH)
    accumulate: int = setting(1, "such batches per rank and iteration", BATCH)
    optimizer: str = setting("adamw", "adamw, muon, or package.module.Name of any other")
    lr: float = setting(1e-5, "learning rate of the student", AMOUNT)
    lr_fake: float = setting(1e-5, "learning rate of the fake score", AMOUNT)
    lr_disc: float = setting(1e-5, "learning rate of the discriminator", AMOUNT)
    lr_warmup: int = setting(0, "iterations of linear warm-up", AMOUNT)
    lr_start: float = setting(0.5, "share of the learning rate at which warm-up begins", SHARE)
    lr_final: float = setting(1.0, "share of it at the end of a cosine; 1: constant", SHARE)
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW", Range(low=0, below=1))
    eps: float = setting(1e-8, "of AdamW", POSITIVE)
    clip: float = setting(1.0, "the gradient norm to which longer ones are shortened", POSITIVE)
    recompute: bool = setting(True, "recompute the blocks' activations: less memory")
    vae_tile: int = setting(
        0, "pixels a side of the tiles that images are decoded in; 0: whole", AMOUNT
    )
    shard: str = setting(
        "auto", "over ranks: copies (ddp), shards (fsdp)", Choice(("auto", "none", "ddp", "fsdp"))
    )
    seed: int = setting(0, "of every random number", ANY)

    data: str = setting("data", "images with captions, or prompts (digits: its own)", group="data")
    crop: str = setting("centre", "of an image of another shape", Choice(("centre", "random")))
    buckets: bool = setting(False, "batches of several aspect ratios, of size's area")
    cache: str = setting("", "folder for text embeddings and latents, computed once")
    make_reals: int = setting(
        0, "images that the teacher draws once of the captions, in place of real ones", AMOUNT
    )
    reals: str = setting("", "folder for those; none: reals in --out")
    workers: int = setting(4, "threads that read data ahead; 0: none", THREADS)

    out: str = setting("", "output folder", group="run")
    export: str = setting(
        "student", "the student alone, or full: an official file too", Choice(("student", "full"))
    )
    save_every: int = setting(250, "iterations between checkpoints", COUNT)
    save_minutes: float = setting(0.0, "minutes between them, whichever is first; 0: any", AMOUNT)
    keep: int = setting(2, "checkpoints kept", COUNT)
    exam_every: int = setting(125, "iterations between exams and sheets; 0: none", AMOUNT)
    watch_every: int = setting(
        500, "iterations between looks at drift: images beside the teacher's; 0: none", AMOUNT
    )
    watch_band: tuple[float, float] = setting(
        (0.6, 1.6), "student over teacher; what leaves it is said (why: docs/results.md)", POSITIVE
    )
    keep_best: str = setting(
        "none",
        "keep student-best.safetensors too: by the exam (fd ...), or by the watch",
        Choice(("none", *MEASURED, "watch")),
    )
    show: tuple[str, ...] = setting(
        (), "prompts of the sheets; none: the data's first captions", Text()
    )
    table: bool = setting(True, "the teacher too in the table at the end")


PLACES = ("weights", "data", "cache", "out", "base")  # paths
HOUSEKEEPING = (
    "out",
    "export",
    "lora_format",
    "cache",
    "reals",
    "weights",
    "base",  # these two: a digest tells whether the weights are the same
    "merge",
    "compile",  # this one and the next: numbers are rounded otherwise, and mean the same
    "channels_last",
    "workers",
    "save_every",
    "save_minutes",
    "keep",
    "exam_every",
    *("watch_every", "watch_band", "keep_best"),
    "show",
    "table",
)
SHARED_OUT = ("batch", "accumulate", "shard")  # ranks may change, the samples of an iteration not


class Value(argparse.Action):
    """A flag's value, or values. may: what they may be, checked where the flag is read."""

    def __init__(self, *, may: Range | Choice | Text | None = None, **options):
        super().__init__(**options)
        self.may = may
        if isinstance(may, Choice) and self.metavar is None:
            self.metavar = "{" + ",".join(may.words) + "}"

    def __call__(self, parser, given, value, name=None):
        try:
            if self.may:
                self.may.check(name or self.dest, value)
        except ValueError as error:
            parser.error(str(error))
        setattr(given, self.dest, tuple(value) if isinstance(value, list) else value)


class Parser(argparse.ArgumentParser):
    """Errors on one line, exit code 2. `add_argument` takes `may` too, what a value may be."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **options)
        self.register("action", None, Value)  # what a flag is that names no other action

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        for stream in (sys.stdout, sys.stderr):  # whose encoding may lack what is said
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            wrong = next((word for word in unknown if word.startswith("--")), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.nearest(wrong)}")
        return given

    def nearest(self, wrong: str) -> str:
        """What may be meant, by its help's words or by its name: --learning-rate is --lr."""
        flags = self._option_string_actions  # by name; argparse has no other list of them
        name = wrong.split("=")[0]
        words = set(name.strip("-").split("-"))
        for known, action in flags.items():
            if words <= set(re.findall(r"\w+", action.help or "")):
                return f"; did you mean {known}?"
        return near(name, flags)

    def error(self, message: str) -> NoReturn:
        text = f"{self.prog}: {legible(message)} ({self.prog} --help lists the options)\n"
        self.exit(2, text if os.environ.get("RANK", "0") == "0" else None)


class Refusal(ValueError):
    """What the user can put right: one line with the value and the remedy, and exit code 2."""


def refuse(error: Exception | str, spoken: bool | None = None, code: int = 2) -> NoReturn:
    """Stop on what the user can put right: one line, exit code 2, or another.

    spoken: whether this rank says it; None: the first does.
    """
    if os.environ.get("RANK", "0") == "0" if spoken is None else spoken:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {legible(error)}", file=sys.stderr)
    sys.exit(code)


# What a machine may lack, as errno names it; an OSError without a number is one of ours.
LACKING = "ENOENT ENOTDIR EISDIR EEXIST EACCES EPERM EROFS ENOSPC EDQUOT EFBIG"
LACKING += " EIO ESTALE EBUSY ELOOP ENAMETOOLONG"  # and disks that fail, or are on a network
LACKING = (None, *(getattr(errno, name) for name in LACKING.split()))


def is_refusal(error: Exception) -> bool:
    """A refusal, a missing file, no permission, a full disk. Anything else is a bug of ours, and
    keeps its traceback."""
    return isinstance(error, Refusal) or (isinstance(error, OSError) and error.errno in LACKING)


def resolve(preset: Config, fewer: dict[int, dict], name: str, **flags) -> Config:
    """Preset, then what the number of student steps asks for, then the flags.

    fewer: per number of student steps what else changes; name: of the default folder. Raises
    ValueError on a value that cannot be.
    """
    steps = flags.get("student_steps", preset.student_steps)
    cfg = dataclasses.replace(preset, **fewer.get(steps, {}))
    cfg = dataclasses.replace(cfg, **flags)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"runs/{name}")
    places = {name: home(getattr(cfg, name)) for name in PLACES}
    cfg = dataclasses.replace(cfg, **places, merge=tuple(map(home, cfg.merge)))
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """Raises ValueError that names the flag, its value and what it may be."""
    for field in dataclasses.fields(cfg):
        if field.metadata["may"]:
            field.metadata["may"].check(flag(field.name), getattr(cfg, field.name))
    pixels = 12 * math.prod((*cfg.size, cfg.batch, cfg.accumulate))
    if pixels > PIXELS:
        raise Refusal(
            f"--size {shown(cfg.size)} with --batch {cfg.batch} x --accumulate {cfg.accumulate}: "
            f"{pixels / 1e9:,.0f} GB of pixels in an iteration, which no memory holds"
        )
    for name in ("guidance_dmd", "guidance_isg", "watch_band"):
        low, high = getattr(cfg, name)
        if low > high:
            raise Refusal(f"{flag(name)} is {low} {high}; the smaller number comes first")
    if cfg.anchor_weights and len(cfg.anchor_weights) != cfg.student_steps:
        count = f"{len(cfg.anchor_weights)} numbers, --student-steps is {cfg.student_steps}"
        raise Refusal(f"--anchor-weights has {count}; give one for each anchor")
    check_anchors("--taus", cfg.taus)
    if cfg.taus and len(cfg.taus) != cfg.student_steps:
        raise Refusal(
            f"--taus has {len(cfg.taus)} anchors, --student-steps is {cfg.student_steps}; give both"
        )


def check_anchors(name: str, taus: Sequence[float]) -> None:
    """ValueError for times that do not fall."""
    if any(a <= b for a, b in itertools.pairwise(taus)):
        raise Refusal(f"{name} is {shown(taus)}; anchors fall, each below the one before")


def differences(old: dict, new: Config) -> list[str]:
    """Fields, housekeeping aside, in which a saved configuration differs: "field: old -> new".

    Whether the data are the same, dataset/identity.py says: their path does not.
    """
    now = dataclasses.asdict(new)
    as_list = {
        name: list(value) if isinstance(value, tuple) else value for name, value in now.items()
    }
    # Fields that runs begun earlier do not have.
    later = {"t5_length": 0, "anchor_weights": [], "guidance_rescale": 0.0, "t_guidance": "same"}
    why = {"steps": f", over which the learning rate falls to --lr-final {new.lr_final:g}"}
    if new.lr_final == 1.0:  # nothing depends on how many there are
        why = {"steps": ": a run may be given more, not fewer"}
        if new.steps > old.get("steps", new.steps):
            as_list.pop("steps")
    names = [name for name in as_list if name not in (*HOUSEKEEPING, *SHARED_OUT, "data")]
    return [
        f"{name}: {old.get(name, later.get(name))} -> {as_list[name]}{why.get(name, '')}"
        for name in names
        if old.get(name, later.get(name)) != as_list[name]
    ]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
