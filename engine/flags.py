"""The flags of every command, apart from what the command does: they are read without torch.

    train_arguments      a flag for each field of Config, those of the plan, and switches
    sample_arguments, evaluate_arguments, bench_arguments, ablation_arguments, pretrain_arguments

Each takes the command's docstring and returns what was given; --help, and what cannot be, end here.
A command that is run asks twice: on its first line, to answer before seconds of imports, and in
main, which tests call too.
"""

import argparse
import dataclasses
import os
from pathlib import Path

from config import (
    AMOUNT,
    ANY,
    BATCH,
    CALLS,
    COUNT,
    LAYERS,
    PLACES,
    POSITIVE,
    SIDE,
    STEPS,
    Choice,
    Config,
    Parser,
    Range,
    Refusal,
    Text,
    check_anchors,
    flag,
    home,
    near,
    place,
    refuse,
    shown,
)
from engine.cards import CARDS
from teachers import FOUND, configure, find, is_named, listed, names
from teachers.students import reading

DTYPE, SAMPLER = Choice(("bf16", "fp32")), Choice(("x0", "euler"))  # as in nets/weights, schedule
KINDS = {  # of the ablation's runs: title, flags of train.py
    "dmd": ("DMD", "--no-ida --no-isg --no-gan"),
    "ida": ("DMD + IDA", "--no-isg --no-gan"),
    "isg": ("DMD + ISG", "--no-ida --no-gan"),
    "gan": ("DMD + discriminator", "--no-ida --no-isg"),
    "no-gan": ("DMD + IDA + ISG", "--no-gan"),
    "no-isg": ("DMD + IDA + discriminator", "--no-isg"),
    "no-ida": ("DMD + ISG + discriminator", "--no-ida"),
    "all": ("all three", ""),
    "two": ("trained for 2 steps", "--student-steps 2"),
    "one": ("trained for 1 step", "--student-steps 1"),
    "lora": ("adapters, rank 16", "--adapter 16"),
    "lora-4": ("adapters, rank 4", "--adapter 4"),
    "lora-64": ("adapters, rank 64", "--adapter 64"),
    "lora-random": ("adapters, random A", "--adapter 16 --adapter-init random"),
    "lora-both": ("adapters, A trained too", "--adapter 16 --adapter-train both"),
    "lora-no-ida": ("adapters without IDA", "--adapter 16 --no-ida"),
}


# --- train.py ------------------------------------------------------------------------------------

SWITCHES = {  # parts of the method, and what turns them off
    "ida_decay": ("--no-ida", 1.0),
    "w_isg": ("--no-isg", 0.0),
    "w_gan": ("--no-gan", 0.0),
}


def train_arguments(about: str | None) -> tuple[Config, argparse.Namespace]:
    """The resolved configuration, and all arguments."""
    parser = Parser(description=about, usage="%(prog)s [--FLAG VALUE ...]", add_help=False)
    fields = add_fields(parser)
    call = parser.add_argument_group("this call alone")
    help = "start anew where --out holds another run"
    call.add_argument("--overwrite", action="store_true", help=help)
    help = "print bytes per GPU and FLOPs of an iteration, load nothing; exit code 1: does not fit"
    call.add_argument("--plan", action="store_true", help=help)
    help = "of the plan (default: 8)"
    call.add_argument("--gpus", type=int, default=8, may=COUNT, metavar="INT", help=help)
    help, how = "of the plan, GB (10^9 bytes) of each (default: 80)", {"metavar": "FLOAT"}
    call.add_argument("--gpu-memory", type=float, default=80.0, may=POSITIVE, help=help, **how)
    help = "of the plan: its memory and speed, and which card takes which batch"
    call.add_argument("--card", may=Choice(tuple(CARDS)), help=help)
    help = "this text, with the defaults of the --teacher and --student-steps beside it"
    call.add_argument("--help", "-h", action="store_true", help=help)
    given = parser.parse_args()
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(Config)}
    flags = {name: value for name, value in values.items() if value is not None}
    try:
        if given.help:
            fewer = given.student_steps in find(given.teacher).fewer
            steps = {"student_steps": given.student_steps} if fewer else {}
            for name, value in vars(configure(given.teacher, **steps)).items():
                fields[name].help += f" (default: {shown(value)})"
            parser.print_help()
            parser.exit()
        cfg = configure(**flags)
        FOUND[cfg.teacher] = reading(find(cfg.teacher), cfg.t5_length)  # whoever asks for it
        return cfg, given
    except Refusal as error:
        refuse(error)


def add_fields(parser: Parser) -> dict[str, argparse.Action]:
    """A flag for each field of Config, in its group; None: not given. By field."""
    flags = {}
    for field in dataclasses.fields(Config):
        name, kind, about = flag(field.name), field.type, field.metadata
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        options = {"default": None, "help": about["help"].replace("%", "%%")}
        if field.name == "teacher":
            options["default"] = "digits"
            options["help"] += f": {listed()}, or a file of your own, mine.py"
        if kind is bool:
            action = argparse.BooleanOptionalAction
            flags[field.name] = group.add_argument(name, action=action, **options)
            continue
        if kind not in (int, float, str):  # a tuple
            kind, *rest = kind.__args__
            options["nargs"] = "*" if rest[-1] is Ellipsis else 1 + len(rest)
        if not isinstance(about["may"], Choice):
            options["metavar"] = kind.__name__.upper()
        kind = home if field.name in (*PLACES, "teacher", "merge") else kind
        flags[field.name] = group.add_argument(name, type=kind, may=about["may"], **options)
        if field.name in SWITCHES:
            switch, off = SWITCHES[field.name]
            how = {"dest": field.name, "action": "store_const", "const": off}
            group.add_argument(switch, help=f"the same as {name} {off:g}", **how)
    return flags


# --- the other commands --------------------------------------------------------------------------


def sample_arguments(about: str | None) -> argparse.Namespace:
    parser = Parser(description=about)
    student = "a student: saved by train.py, or anybody's, a file or a folder"
    parser.add_argument("--checkpoint", type=place, help=student)
    known = ", ".join(names(trained=False))
    teacher = f"a teacher itself: {known}, or mine.py (which beside --checkpoint names its teacher)"
    parser.add_argument("--teacher", type=home, help=teacher)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", may=Text(), help="what to draw")
    what.add_argument("--prompts", type=place, help="a text file, one prompt a line")
    rows = "no image: how other programs draw with this student"
    what.add_argument("--explain", type=place, metavar="STUDENT", help=rows)
    steps = "default: the student's own, 50 for a teacher (flux-schnell: 4)"
    parser.add_argument("--steps", type=int, may=CALLS, help=steps)
    sampler = "default: x0, euler for a teacher"
    parser.add_argument("--sampler", may=SAMPLER, help=sampler)
    guidance = "default: none, a teacher's own for a teacher"
    parser.add_argument("--guidance", type=float, may=AMOUNT, help=guidance)
    negative = "negative prompt, where guidance takes one"
    parser.add_argument("--negative", may=Text(), default="", help=negative)
    add_size(parser, "what the teacher was made for")
    seed = "one image of each prompt per seed"
    parser.add_argument("--seed", type=int, may=ANY, nargs="+", default=[0], help=seed)
    batch = "images at a time; default: 64 digits, else 1"
    parser.add_argument("--batch", type=int, may=BATCH, help=batch)
    parser.add_argument("--weights", type=home, default="", help="folder of the official files")
    add_base(parser)
    without = "SD 3.5: read prompts without T5, which need not be there then"
    parser.add_argument("--no-t5", action="store_true", help=without)
    add_t5_length(parser)
    parser.add_argument("--dtype", may=DTYPE, help="default: bf16, the embedded task fp32")
    compile = "compile the denoiser's blocks: for many images of one size"
    parser.add_argument("--compile", action="store_true", help=compile)
    last = "convolutions of UNet and autoencoder: channels innermost in memory"
    parser.add_argument("--channels-last", action="store_true", help=last)
    add_said(parser)
    add_adapter_scale(parser)
    scale = "enlargement; default: 1, the embedded task 8"
    parser.add_argument("--scale", type=int, may=Range(low=1, high=64), help=scale)
    parser.add_argument("--out", type=place, default=Path("out.png"), help="default: out.png")
    given = parser.parse_args()
    try:
        check_said(given)
        if given.teacher:
            find(given.teacher)
        elif not (given.checkpoint or given.explain):
            raise Refusal("one of --checkpoint and --teacher is needed: who shall draw?")
        if given.out.suffix.lower() != ".png":
            name = f"--out {given.out}"
            raise Refusal(f"{name}: images are written as PNG; give a name that ends in .png")
    except Refusal as error:
        refuse(error)
    return given


def evaluate_arguments(about: str | None) -> argparse.Namespace:
    parser = Parser(description=about)
    student = "students: saved by train.py, or anybody's, files or folders; a row each"
    how = {"type": place, "nargs": "+", "metavar": "STUDENT", "required": True}
    parser.add_argument("--student", help=student, **how)
    teacher = f"{', '.join(names())}, a file of its denoiser, or mine.py; default: the student's"
    parser.add_argument("--teacher", type=home, help=teacher)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompts", type=place, help="a text file, one prompt a line")
    data = "the captions of these images, or prompts; as for train.py"
    what.add_argument(
        "--data", type=home, help=f"{data} (default: data; the embedded task: its exam)"
    )
    steps = "the student's numbers of steps; default: 1,2,4,8"
    parser.add_argument("--steps", type=numbers, default=(1, 2, 4, 8), metavar="N,N", help=steps)
    steps = "of the teacher's images that others are held against; default: 50"
    parser.add_argument("--teacher-steps", type=int, may=CALLS, default=50, help=steps)
    parser.add_argument("--sampler", may=SAMPLER, help="the student's; default: its own")
    guidance = "the teacher's; default: its own"
    parser.add_argument("--guidance", type=float, may=AMOUNT, help=guidance)
    count = "images each teacher and student draws; default: 5000, the embedded task's exam 2816"
    # torchrun takes --n for one of its own.
    parser.add_argument("--n", "--images", type=int, may=STEPS, metavar="N", help=count)
    each = "images of each prompt; default: 1, or what it takes for --n; the exam 8"
    parser.add_argument("--per-prompt", type=int, may=COUNT, help=each)
    seed = "of the images' noise; default: 1"
    parser.add_argument("--seed", type=int, may=ANY, default=1, help=seed)
    add_size(parser, "the student's")
    batch = "images at a time; default: 256 digits, else 1"
    parser.add_argument("--batch", type=int, may=BATCH, help=batch)
    parser.add_argument("--weights", type=home, default="", help="folder of the official files")
    parser.add_argument("--dtype", may=DTYPE, help="default: bf16, the embedded task fp32")
    add_base(parser)
    add_said(parser)
    add_t5_length(parser)
    add_adapter_scale(parser)
    parser.add_argument("--inception", type=place, help="weights file of the FID's network")
    for title, repo, file in (
        ("CLIP-g", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.safetensors"),
        ("CLIP-H", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin"),
        ("PickScore", "yuvalkirstain/PickScore_v1", "model.safetensors"),
        ("HPSv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("ImageReward", "THUDM/ImageReward", "ImageReward.pt"),
    ):
        weights = f"its weights, adds {title}; {file} of {repo}"
        parser.add_argument(f"--{title.lower()}", type=place, metavar="FILE", help=weights)
    resamples = "of the bootstrap; default: 50"
    parser.add_argument(
        "--resamples", type=int, may=Range(low=2, high=10**6), default=50, help=resamples
    )
    out = "folder of images and results; default: evaluation/ beside the first student"
    parser.add_argument("--out", type=place, help=out)
    given = parser.parse_args()
    try:
        check_said(given)
        if given.teacher and not denoiser_file(given.teacher):
            find(given.teacher)
    except Refusal as error:
        refuse(error)
    return given


def numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if min(values) < 1 or max(values) > CALLS.high:
        raise argparse.ArgumentTypeError(f'"{text}" is no list of step numbers such as 1,2,4,8')
    return tuple(dict.fromkeys(values))


def denoiser_file(teacher: str | None) -> Path | None:
    """--teacher as a file of weights, and not a name or a Python file. ValueError."""
    if teacher is None or is_named(teacher):
        return None
    if not Path(teacher).is_file():
        known = f"choose from {', '.join(names())}{near(teacher, names())}"
        raise Refusal(f'unknown teacher "{teacher}": no file; {known}')
    return Path(teacher)


def bench_arguments(about: str | None) -> tuple[Config, argparse.Namespace]:
    """The preset with what of it was given, and all arguments."""
    parser = Parser(description=about)
    teacher = f"whose preset is timed: {', '.join(names())}, or mine.py; default: digits"
    parser.add_argument("--teacher", type=home, default="digits", help=teacher)
    add_size(parser, "the preset's")
    batch = "samples; default: the preset's"
    parser.add_argument("--batch", type=int, may=BATCH, help=batch)
    scale, may = "of all networks' widths; default: 1", Range(above=0, high=4)
    parser.add_argument("--width-scale", type=float, may=may, default=1.0, help=scale)
    depth = "of the denoiser; default: 0, as it is"
    parser.add_argument("--depth", type=int, may=Range(low=0, high=1000), default=0, help=depth)
    channels = "as in train.py; default: 0"
    parser.add_argument("--disc-channels", type=int, may=LAYERS, default=0, help=channels)
    recompute = "as in train.py; default: the preset's"
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, help=recompute)
    iterations = "timed, of each thing; default: 3"
    parser.add_argument("--iterations", type=int, may=CALLS, default=3, help=iterations)
    parser.add_argument("--compile", action="store_true", help="time compiled blocks too")
    check = "is this GPU right, and how fast? Minutes; of the flags here only --parts and --out"
    parser.add_argument("--gpu-check", action="store_true", help=check)
    parts, every = "of --gpu-check; default: all four, see engine/check.py", (1, 2, 3, 4)
    may, how = Range(low=1, high=4), {"metavar": "N", "nargs": "+", "default": every}
    parser.add_argument("--parts", type=int, may=may, help=parts, **how)
    out = "a JSON file; default: none, of --gpu-check gpu-check.json"
    parser.add_argument("--out", type=place, help=out)
    given = parser.parse_args()
    flags = {name: getattr(given, name) for name in ("size", "batch", "recompute", "disc_channels")}
    try:
        if given.out and not given.out.parent.is_dir():
            raise Refusal(f"--out {given.out}: there is no folder {given.out.parent}")
        flags = {name: value for name, value in flags.items() if value is not None}
        return configure(given.teacher, **flags), given
    except Refusal as error:
        refuse(error)


def ablation_arguments(
    about: str | None, known: dict = KINDS, seeds: tuple = (0, 1, 2), out: str = "runs/ablation"
) -> argparse.Namespace:
    """known: of kinds; digits/search.py has others, which are tried with fewer seeds."""
    kinds = "\n".join(
        f"  {name:12}{title}: {flags or '(none)'}" for name, (title, flags) in known.items()
    )
    parser = Parser(description=about, epilog=f"kinds and their flags:\n{kinds}")
    kinds, every = Choice(tuple(known)), f"any of {', '.join(known)}; default: all of them"
    parser.add_argument(
        "--kinds", nargs="+", may=kinds, default=list(known), metavar="KIND", help=every
    )
    help, seeds = f"default: {' '.join(map(str, seeds))}", list(seeds)
    parser.add_argument("--seeds", type=int, may=ANY, nargs="+", default=seeds, help=help)
    steps = "iterations of a run; default: the preset's"
    parser.add_argument("--steps", type=int, may=STEPS, help=steps)
    jobs, cores = "runs at once; default: {}, the number of cores", os.cpu_count()
    parser.add_argument("--jobs", type=int, may=CALLS, default=cores, help=jobs.format(cores))
    parser.add_argument("--out", type=place, default=Path(out), help=f"default: {out}")
    parser.set_defaults(known=known)
    given = parser.parse_args()
    if "RANK" in os.environ:
        refuse("torchrun is not needed; --jobs runs several at once")
    return given


def pretrain_arguments(about: str | None) -> argparse.Namespace:
    parser = Parser(description=about)
    which = Choice(("all", "judge", "backbone", "teacher", "samples"))
    parser.add_argument("which", nargs="?", default="all", may=which, help="default: all")
    return parser.parse_args()


def add_t5_length(parser: Parser) -> None:
    help = "SD 3.5: tokens of a prompt that T5 reads; default: the student's, else 256"
    parser.add_argument("--t5-length", type=int, may=Range(low=1, high=512), default=0, help=help)


def add_adapter_scale(parser: Parser) -> None:
    help = "of what a student that is a LoRA adds to its teacher; default: 1"
    parser.add_argument("--adapter-scale", type=float, may=ANY, default=1.0, help=help)


def add_base(parser: Parser) -> None:
    base = "a fine-tune in place of the teacher's denoiser; as for train.py"
    parser.add_argument("--base", type=home, default="", metavar="FILE", help=base)
    merge = "LoRA files added to that first"
    how = {"type": home, "nargs": "+", "default": [], "metavar": "FILE[:SCALE]"}
    parser.add_argument("--merge", help=merge, **how)


def add_said(parser: Parser) -> None:
    """What a student that train.py did not write leaves unsaid."""
    taus = "where such a student is called, falling from 1, after any shift"
    how = {"type": float, "nargs": "+", "metavar": "T", "may": Range(above=0, high=1)}
    parser.add_argument("--taus", help=taus, **how)
    shift = "of its flow's times at other numbers of steps; default: its teacher's preset"
    parser.add_argument("--shift", type=float, may=POSITIVE, help=shift)
    keep = "keep what flags say of it in a student.json beside it"
    parser.add_argument("--remember", action="store_true", help=keep)


def check_said(given: argparse.Namespace) -> None:
    """ValueError for anchors that cannot be."""
    check_anchors("--taus", given.taus or ())


def add_size(parser: Parser, default: str) -> None:
    sides, help = ("HEIGHT", "WIDTH"), f"of the images, pixels; default: {default}"
    parser.add_argument("--size", type=int, may=SIDE, nargs=2, metavar=sides, help=help)
