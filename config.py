"""Choices: one flat dataclass, and the flags made from it.

    Config    every choice of a run
    resolve   a teacher's preset, what its number of student steps changes, then the flags
    parse     a flag for each field
    check     refuses what cannot be

Presets are in teachers/, each with its teacher. Imports nothing of ours.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Config:
    # fmt: off
    teacher: str = "digits"                 # whose network is distilled; sets all defaults
    size: tuple[int, int] = (1024, 1024)    # height and width of the images, pixels
    data: str = "data"                      # images with captions, or prompts (digits: its own)
    crop: str = "centre"                    # of an image of another shape: centre | random
    buckets: bool = False                   # batches of several aspect ratios, of size's area
    cache: str = ""                         # folder for text embeddings and latents, computed once
    weights: str = ""                       # folder of the official files; "": the hub
    t5: bool = True                         # SD 3.5: read captions with T5 too, not with CLIP alone
    bf16: bool = True                       # compute in bf16; trained weights and losses stay fp32
    # the student
    student_steps: int = 4                  # K anchors, evenly spaced before the shift
    taus: tuple[float, ...] = ()            # the anchors, descending, if not evenly spaced
    shift: float = 1.0                      # resolution shift of the flow's times, in training
    p_backward: float = 0.5                 # share of inputs from backward simulation
    ttur: int = 5                           # fake and discriminator updates per student update
    ema: float = 0.0                        # decay of the exported average of weights; 0: none
    guidance: float = 3.5                   # the teacher's, where its images are shown
    # distribution matching
    w_dmd: float = 1.0                      # weight of the DMD loss
    guidance_dmd: tuple[float, float] = (1.0, 8.0)  # range of the teacher's guidance scale
    t_dmd: str = "uniform"                  # times of the DMD loss: uniform | logit-normal
    t_fake: str = "logit-normal"            # times of the fake loss: likewise
    # implicit distribution alignment
    ida_decay: float = 0.97                 # lambda; 1 turns IDA off
    # intra-segment guidance
    w_isg: float = 1.0                      # weight of the ISG loss; 0 turns ISG off
    isg_distance: str = "l2"                # l2 (paper), charbonnier (its code)
    isg_margin: float = 0.02                # how far tau_mid keeps off the segment's ends
    guidance_isg: tuple[float, float] = (1.0, 8.0)  # range of the teacher's guidance scale
    # discriminator
    w_gan: float = 1.0                      # weight of the adversarial loss; 0: no discriminator
    disc_channels: int = 0                  # channels of its heads; 0: as wide as the backbone
    disc_augment: tuple[str, ...] = ()      # DiffAugment: any of colour translation cutout
    disc_text: bool = True                  # condition it on the caption
    disc_reference: bool = True             # condition it on a real image of the same caption
    # optimisation
    steps: int = 750                        # iterations
    batch: int = 32                         # samples per rank, at a time
    accumulate: int = 1                     # such batches per rank and iteration
    optimizer: str = "adamw"                # adamw | muon | package.module.Name of any other
    lr: float = 1e-5                        # learning rate of the student
    lr_fake: float = 1e-5                   # of the fake score
    lr_disc: float = 1e-5                   # of the discriminator
    lr_warmup: int = 0                      # iterations of linear warm-up
    lr_start: float = 0.5                   # share of the learning rate at which warm-up begins
    lr_final: float = 1.0                   # share of it at the end of a cosine; 1: constant
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8                       # of AdamW
    clip: float = 1.0                       # gradient norm
    recompute: bool = True                  # recompute the blocks' activations: less memory
    shard: str = "auto"                     # over ranks: auto | ddp (copies) | fsdp (shards) | none
    seed: int = 0                           # of every random number
    # housekeeping: these may change when a run is resumed
    out: str = ""                           # output folder; default runs/TEACHER
    export: str = "student"                 # the student alone, or full: the official file too
    save_every: int = 250                   # iterations between checkpoints
    workers: int = 4                        # threads that read data ahead; 0: none
    keep: int = 2                           # checkpoints kept
    exam_every: int = 125                   # iterations between exams or sheets of samples; 0: none
    table: bool = True                      # the teacher too in the table at the end
    # fmt: on


HOUSEKEEPING = (
    "out",
    "export",
    "cache",
    "weights",
    "workers",
    "save_every",
    "keep",
    "exam_every",
    "table",
)
SHARED_OUT = ("batch", "accumulate", "shard")  # ranks may change, the samples of an iteration not


class Parser(argparse.ArgumentParser):
    """Errors on one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def refuse(error: Exception | str) -> NoReturn:
    """Stop on what the user can put right: one line, exit code 2."""
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
    sys.exit(2)


def parse(
    parser: argparse.ArgumentParser,
    configure: Callable[..., Config],
    arguments: Sequence[str] | None = None,
    tables: dict[str, Iterable[str]] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Adds a flag per field of Config; returns the resolved configuration, and all arguments.

    configure: the flags that are given -> the configuration; `teachers.configure`. tables: by field
    the names to choose from, where a table lists them that is not read here.
    """
    comments, tables = field_comments(), tables or {}
    for name, table in tables.items():
        comments[name] += f"; one of {' | '.join(table)}"
    for field in dataclasses.fields(Config):
        name, kind = flag(field.name), field.type
        options = {"default": None, "help": comments[field.name]}
        if field.name == "teacher":
            options["default"] = "digits"
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        elif kind in (int, float, str):
            parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), **options)
        else:  # a tuple
            item = kind.__args__[0]
            count = "*" if kind.__args__[-1] is Ellipsis else len(kind.__args__)
            parser.add_argument(
                name, type=item, nargs=count, metavar=item.__name__.upper(), **options
            )
    given = parser.parse_args(arguments)
    flags = {
        f.name: getattr(given, f.name)
        for f in dataclasses.fields(Config)
        if getattr(given, f.name) is not None
    }
    flags = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()
    }
    cfg = configure(**flags)
    for name, table in tables.items():
        check_choice(cfg, name, table)
    return cfg, given


def resolve(preset: Config, fewer: dict[int, dict], name: str, **flags) -> Config:
    """Preset, then what the number of student steps asks for, then the flags.

    fewer: per number of student steps what else changes; name: of the default folder. Raises
    ValueError on a value that cannot be.
    """
    steps = flags.get("student_steps", preset.student_steps)
    cfg = dataclasses.replace(preset, **fewer.get(steps, {}))
    cfg = dataclasses.replace(cfg, **flags)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"runs/{name}")
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """Raises ValueError that names the flag, its value and what it may be."""
    choices = {
        "crop": ("centre", "random"),
        "export": ("student", "full"),
        "t_dmd": ("uniform", "logit-normal"),
        "t_fake": ("uniform", "logit-normal"),
        "shard": ("auto", "none", "ddp", "fsdp"),
    }
    for name, allowed in choices.items():
        check_choice(cfg, name, allowed)
    for name in cfg.disc_augment:
        if name not in ("colour", "translation", "cutout"):
            raise ValueError(
                f'--disc-augment has "{name}"; choose from colour, translation, cutout'
            )
    for name in ("student_steps", "ttur", "steps", "batch", "accumulate", "save_every", "keep"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{flag(name)} is {getattr(cfg, name)}; it must be at least 1")
    for name in (
        "w_dmd",
        "w_isg",
        "w_gan",
        "lr",
        "lr_fake",
        "lr_disc",
        "lr_warmup",
        "exam_every",
        "workers",
        "disc_channels",
        "isg_margin",
    ):
        if getattr(cfg, name) < 0:
            raise ValueError(f"{flag(name)} is {getattr(cfg, name)}; it must not be negative")
    for name in ("p_backward", "ida_decay", "ema", "lr_start", "lr_final"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"{flag(name)} is {getattr(cfg, name)}; it must be from 0 to 1")
    for name in ("guidance_dmd", "guidance_isg"):
        low, high = getattr(cfg, name)
        if low > high:
            raise ValueError(f"{flag(name)} is {low} {high}; the smaller number comes first")
    falling = all(a > b for a, b in zip(cfg.taus, cfg.taus[1:], strict=False))
    if cfg.taus and not (falling and cfg.taus[0] <= 1 and cfg.taus[-1] > 0):
        raise ValueError(
            f"--taus {' '.join(map(str, cfg.taus))}: anchors fall from at most 1 and stay above 0"
        )
    if cfg.taus and len(cfg.taus) != cfg.student_steps:
        raise ValueError(
            f"--taus has {len(cfg.taus)} anchors, --student-steps is {cfg.student_steps}; give both"
        )


def check_choice(cfg: Config, name: str, allowed: Iterable[str]) -> None:
    if getattr(cfg, name) not in allowed:
        raise ValueError(
            f'{flag(name)} is "{getattr(cfg, name)}"; choose from {", ".join(allowed)}'
        )


def differences(old: dict, new: Config) -> list[str]:
    """Fields, housekeeping aside, in which a saved configuration differs: "field: old -> new"."""
    now = dataclasses.asdict(new)
    as_list = {
        name: list(value) if isinstance(value, tuple) else value for name, value in now.items()
    }
    names = [name for name in as_list if name not in HOUSEKEEPING + SHARED_OUT]
    return [
        f"{name}: {old.get(name)} -> {as_list[name]}"
        for name in names
        if old.get(name) != as_list[name]
    ]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def field_comments() -> dict[str, str]:
    """The trailing comment of every field of Config, for --help."""
    with open(__file__, encoding="utf-8") as file:
        body = file.read().split("# fmt: off")[1].split("# fmt: on")[0]
    fields = [line.strip().split("  # ", 1) for line in body.splitlines() if " = " in line]
    return {code.split(":")[0]: comment.replace("%", "%%") for code, comment in fields}
