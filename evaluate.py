"""The measures of a student beside its teacher's, at several numbers of steps, for any teacher.

    python evaluate.py --student runs/digits/student.safetensors
    python evaluate.py --student FILE --prompts captions.txt --n 5000 --weights DIR
    torchrun --nproc_per_node 8 evaluate.py --student FILE --data DIR --images 5000

Teacher and student draw every prompt from the same noise: image k depends on its prompt and on
(seed, k) alone. Images are kept in --out, as PNGs that carry their settings; the same command draws
what is missing or was made otherwise, so it continues where it was interrupted. Ranks share the
images out. The text encoders leave memory before a denoiser comes, and the denoiser before the
networks that judge.

Measured against the teacher's images, features by DINOv2 (the embedded task: by its judge, and by
its small ViT): the Frechet distance of whole images (FD) and of their middle 299 x 299 pixels
(patch FD); precision and recall (k-NN, k = 3). Of the images alone: the Vendi score, the mean
distance (1 - cosine) between images of a prompt, and the CLIP score (ViT-L/14). "±" is half of a
95 % interval, by bootstrap over prompts. FD depends on the number of images: compare equal numbers.
With --inception also FID-T and patch FID-T, which takes the package torch-fidelity; with --clip-g,
--clip-h, --pickscore or --hpsv2 what those networks make of image and prompt. The embedded task's
own prompts add the exam: are named attributes right, how varied are the open ones. Writes
metrics.json and samples.png too.
"""

import argparse
import hashlib
import json
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import parallel
from config import TEACHERS, Config, Parser, refuse
from data import open_data
from exam import Exam, aligned, format_table
from images import BAD, Images, read_text
from judges import (
    GIVEN,
    Features,
    check_scorers,
    embed_captions,
    feature_nets,
    load_inception,
    locate_judges,
    measure,
)
from measures import from_uint8
from pictures import save_png, side_by_side
from schedule import Cond, draw_samples, generator, normal
from teachers import (
    DTYPES,
    Files,
    check_size,
    encode_all,
    latent_shape,
    load_denoiser,
    load_student,
    load_teacher,
    load_text,
    load_vae,
    locate,
    read_student,
    sampling_times,
    uses_null,
)

FEWEST = (4, 16)  # prompts, images: half of them must have neighbours


# --- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """One way to draw all images."""

    who: str  # "teacher" | "student"
    steps: int
    sampler: str  # "x0" | "euler"
    guidance: float | None
    nfe: int  # network evaluations per image
    taus: tuple[float, ...] = ()  # (): evenly spaced before the shift

    @property
    def name(self) -> str:
        return f"{self.who} {self.steps}"


@dataclass(frozen=True)
class Plan:
    teacher: str  # its name
    preset: Config
    own_teacher: bool  # the denoiser is a file of the user's, not the official one
    files: Files
    denoisers: dict[str, list[Path]]  # of teacher and student
    judges: Files
    size: tuple[int, int]
    dtype: str
    seed: int
    batch: int
    prompts: list[str]
    each: int  # images of every prompt, one after the other
    samplings: tuple[Sampling, ...]  # the first is what the others are held against
    out: Path

    @property
    def count(self) -> int:
        return len(self.prompts) * self.each

    def folder(self, s: Sampling) -> Path:
        return self.out / "images" / s.name.replace(" ", "-")

    def path(self, s: Sampling, k: int) -> Path:
        return self.folder(s) / f"{k:06d}.png"


def numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is no list of step numbers such as 1,2,4,8')
    return tuple(dict.fromkeys(values))


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    student = "a student saved by train.py"
    parser.add_argument("--student", type=Path, required=True, help=student)
    teacher = f"{', '.join(TEACHERS)}, or a file of its denoiser; default: the student's"
    parser.add_argument("--teacher", help=teacher)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    data = "the captions of these images, or prompts; as for train.py"
    what.add_argument("--data", help=f"{data} (default: data; the embedded task: its exam)")
    steps = "the student's numbers of steps; default: 1,2,4,8"
    parser.add_argument("--steps", type=numbers, default=(1, 2, 4, 8), metavar="N,N", help=steps)
    steps = "of the teacher's images that others are held against; default: 50"
    parser.add_argument("--teacher-steps", type=int, default=50, help=steps)
    sampler = "the student's; default: its own"
    parser.add_argument("--sampler", choices=("x0", "euler"), help=sampler)
    parser.add_argument("--guidance", type=float, help="the teacher's; default: its own")
    count = "images each teacher and student draws; default: 5000, the embedded task's exam 2816"
    # torchrun takes --n for one of its own.
    parser.add_argument("--n", "--images", type=int, metavar="N", help=count)
    each = "images of each prompt; default: 1, or what it takes for --n; the exam 8"
    parser.add_argument("--per-prompt", type=int, help=each)
    parser.add_argument("--seed", type=int, default=1, help="of the images' noise; default: 1")
    size = "of the images, pixels; default: the student's"
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size)
    parser.add_argument("--batch", type=int, help="images at a time; default: 256 digits, else 1")
    parser.add_argument("--weights", default="", help="folder of the official files")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, the embedded task fp32")
    parser.add_argument("--inception", type=Path, help="weights file of the FID's network")
    for title, repo, file in (
        ("CLIP-g", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.safetensors"),
        ("CLIP-H", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin"),
        ("PickScore", "yuvalkirstain/PickScore_v1", "model.safetensors"),
        ("HPSv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    ):
        weights = f"its weights, adds {title}; {file} of {repo}"
        parser.add_argument(f"--{title.lower()}", type=Path, metavar="FILE", help=weights)
    resamples = "of the bootstrap; default: 50"
    parser.add_argument("--resamples", type=int, default=50, help=resamples)
    out = "folder of images and results; default: evaluation/ beside the student"
    parser.add_argument("--out", type=Path, help=out)
    return parser.parse_args()


def decide(given: argparse.Namespace) -> tuple[Plan, Exam | None]:
    """All that is drawn, from what was asked; every file is found. ValueError or OSError."""
    for name in ("n", "per_prompt", "teacher_steps", "batch"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {getattr(given, name)}; it must be at least 1")
    if given.resamples < 2:
        raise ValueError(f"--resamples is {given.resamples}; it must be at least 2")
    about = read_student(given.student)
    name, preset = about["teacher"], TEACHERS[about["teacher"]]
    own_teacher = given.teacher not in (None, *TEACHERS)
    if own_teacher and not Path(given.teacher).is_file():
        known = ", ".join(TEACHERS)
        raise ValueError(f'unknown teacher "{given.teacher}": no file; choose from {known}')
    if given.teacher in TEACHERS and given.teacher != name:
        raise ValueError(f"--teacher {given.teacher}: {given.student} is a student of {name}")
    if name == "digits" and given.data:
        raise ValueError(f"--data {given.data}: the embedded task has its own; or give --prompts")
    size = tuple(given.size or json.loads(about.get("size", "null")) or preset.size)
    check_size(name, size)
    if name == "digits" and size != preset.size:
        raise ValueError(f"--size {size[0]} {size[1]}: the embedded judge reads 16 x 16 alone")
    files = locate(name, given.weights, denoiser=not own_teacher)
    judges = locate_judges(name, given.weights)
    guidance = (preset.guidance if given.guidance is None else given.guidance) or None
    examined = name == "digits" and given.prompts is None
    exam = Exam(guidance) if examined else None
    prompts, each = ask(given, name, size, exam)
    plan = Plan(
        teacher=name,
        preset=preset,
        own_teacher=own_teacher,
        files=files,
        denoisers={
            "teacher": [Path(given.teacher)] if own_teacher else files["denoiser"],
            "student": [given.student],
        },
        judges=judges,
        size=size,
        dtype=given.dtype or ("bf16" if preset.bf16 else "fp32"),
        seed=given.seed,
        batch=given.batch or (256 if name == "digits" else 1),
        prompts=prompts,
        each=each,
        samplings=ways(given, about, guidance),
        out=given.out or given.student.parent / "evaluation",
    )
    return plan, exam


def prepare(
    plan: Plan, exam: Exam | None, given: argparse.Namespace, device: torch.device
) -> dict[str, Path]:
    """Rank 0: what can go wrong before an image is drawn. Per score the file of its network."""
    if parallel.rank() > 0:
        return {}
    paths = {title: getattr(given, title.lower().replace("-", "_")) for title in GIVEN}
    asked = {title: path for title, path in paths.items() if path}
    scorers = check_scorers(plan.teacher, plan.judges, asked)
    plan.out.mkdir(parents=True, exist_ok=True)
    if exam:
        ask_teacher(plan, exam, device)
    return scorers


def ask(
    given: argparse.Namespace, teacher: str, size: tuple[int, int], exam: Exam | None
) -> tuple[list[str], int]:
    """The prompts, and how many images of each."""
    if exam:
        prompts, n = exam.prompts[:: exam.samples], given.n or len(exam.prompts)
        each = exam.samples
        if given.per_prompt not in (None, each):
            raise ValueError(f"--per-prompt is {given.per_prompt}; the exam draws {each}")
    else:
        n = given.n or 5000
        prompts = read_prompts(given, teacher, size, n)
        each = given.per_prompt or max(1, n // len(prompts))
    prompts = prompts[: n // each]
    if len(prompts) < FEWEST[0] or len(prompts) * each < FEWEST[1]:
        what = f"{len(prompts)} prompts with {each} images each say too little"
        raise ValueError(f"{what}; at least {FEWEST[0]} prompts and {FEWEST[1]} images are needed")
    return prompts, each


def read_prompts(
    given: argparse.Namespace, teacher: str, size: tuple[int, int], count: int
) -> list[str]:
    """The lines of --prompts, or captions of --data, at most `count`."""
    if given.prompts:
        prompts = [line.strip() for line in read_text(given.prompts).splitlines()]
        prompts = [prompt for prompt in prompts if prompt]
        if not prompts:
            raise ValueError(f"{given.prompts} holds no prompt; give one a line")
        return prompts
    data = open_data(teacher, given.data or TEACHERS[teacher].data, size, 0)
    if isinstance(data, Images):  # whose images are not wanted
        return list(islice(good_captions(data), count))
    return data(range(count)).captions


def good_captions(data: Images) -> Iterator[str]:
    for item in range(len(data.source)):
        try:
            caption = data.source.caption(item)
        except BAD:  # as in training, others take its place
            continue
        if caption:
            yield caption


def ways(given: argparse.Namespace, about: dict[str, str], guidance: float | None) -> tuple:
    """The teacher's many steps, its few, then the student's."""
    own, sampler = int(about["steps"]), given.sampler or about["sampler"]
    calls = 2 if guidance and uses_null(about["teacher"]) else 1
    samplings = [
        Sampling("teacher", n, "euler", guidance, n * calls)
        for n in dict.fromkeys((given.teacher_steps, own))
    ]
    for n in given.steps:
        taus = tuple(json.loads(about["taus"])) if n == own else ()
        samplings.append(Sampling("student", n, sampler, None, n, taus))
    return tuple(samplings)


# --- images --------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Of a file's length and of 64 KiB in each 64th of it: of a small file, all."""
    size, piece = path.stat().st_size, 2**16
    total = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for i in range(64):
            file.seek(max(i * piece, i * size // 64))
            total.update(file.read(piece))
    return total.hexdigest()


def settings_of(plan: Plan, s: Sampling) -> Callable[[int], dict]:
    """k -> all that image k depends on, as its PNG carries it."""
    weights = [fingerprint(path) for path in plan.denoisers[s.who]]
    alike = {"teacher": plan.teacher, "weights": weights, "size": list(plan.size)}
    alike |= {"steps": s.steps, "sampler": s.sampler, "guidance": s.guidance, "taus": list(s.taus)}
    alike |= {"dtype": plan.dtype, "seed": plan.seed}
    return lambda k: alike | {"prompt": plan.prompts[k // plan.each], "image": k}


def is_there(path: Path, settings: dict) -> bool:
    try:
        with Image.open(path) as picture:
            return json.loads(picture.text["settings"]) == settings
    except (OSError, KeyError, ValueError):
        return False  # absent, damaged, or of another making


def missing(plan: Plan, s: Sampling, rank: int = 0, world: int = 1) -> list[int]:
    """The images that this rank has to draw: image k is rank k % world's."""
    settings = settings_of(plan, s)
    return [k for k in range(rank, plan.count, world) if not is_there(plan.path(s, k), settings(k))]


def save(image: Tensor, path: Path, settings: dict) -> None:
    """Renamed when it is whole."""
    part = path.with_name(f"{path.stem}.part.png")
    save_png(image, part, settings)
    os.replace(part, path)


def draw_missing(plan: Plan, device: torch.device, rank: int = 0, world: int = 1) -> None:
    """Text encoders first, then one denoiser after the other; nothing is loaded for nothing."""
    todo = {s: missing(plan, s, rank, world) for s in plan.samplings}
    todo = {s: ks for s, ks in todo.items() if ks}
    if not todo:
        return
    how = (DTYPES[plan.dtype], device)
    conds = encode_prompts(plan, {k // plan.each for ks in todo.values() for k in ks}, *how)
    vae = load_vae(plan.teacher, plan.files, *how)
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc="images", disable=rank > 0) as bar:
        for who in ("teacher", "student"):
            net = None  # the other's memory is free before this one is loaded
            for s, ks in todo.items():
                if s.who == who:
                    net = net or load_net(plan, who, *how)
                    bar.set_postfix_str(s.name)
                    draw(plan, s, ks, net, vae, conds, device, bar)


def encode_prompts(
    plan: Plan, numbers: set[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Cond]:
    """The cond of each of these prompts, and of none, on the CPU; the encoders go again."""
    text = load_text(plan.teacher, plan.files, dtype, device)
    captions = ["", *(plan.prompts[i] for i in sorted(numbers))]
    return encode_all(text, captions, plan.batch, device, plan.size)


def load_net(plan: Plan, who: str, *how) -> nn.Module:
    """how: dtype and device."""
    if who == "student":
        net, _ = load_student(plan.denoisers["student"][0], *how)
    elif plan.own_teacher:
        file = plan.denoisers["teacher"][0]
        net = load_denoiser(plan.teacher, plan.preset.shift, file, *how)
    else:
        net = load_teacher(plan.teacher, plan.preset.shift, plan.files, *how)
    return net.requires_grad_(False).eval()


@torch.no_grad()
def draw(
    plan: Plan,
    s: Sampling,
    ks: list[int],
    net: nn.Module,
    vae: nn.Module,
    conds: dict[str, Cond],
    device: torch.device,
    bar: tqdm,
) -> None:
    """Images ks, into their files."""

    def stack(captions: list[str]) -> Cond:
        return {
            name: torch.stack([conds[caption][name] for caption in captions]).to(device)
            for name in conds[""]
        }

    plan.folder(s).mkdir(parents=True, exist_ok=True)
    settings = settings_of(plan, s)
    how = (net.schedule, s.steps, plan.size, s.who == "student")
    taus = s.taus or sampling_times(plan.teacher, *how)
    for start in range(0, len(ks), plan.batch):
        part = ks[start : start + plan.batch]
        # As in the exam, whose images of the embedded teacher come with the code.
        draws = [generator("exam", plan.seed, k) for k in part]
        shape = latent_shape(plan.teacher, plan.size)
        eps = normal(torch.empty(len(part), *shape, device=device), draws)
        cond = stack([plan.prompts[k // plan.each] for k in part])
        uncond = stack([""] * len(part)) if s.guidance and uses_null(plan.teacher) else None
        how = (list(taus), s.sampler, uncond, s.guidance)
        images = vae.decode(draw_samples(net, eps, cond, *how, draws))
        for k, image in zip(part, images, strict=True):
            save(image, plan.path(s, k), settings(k))
        bar.update(len(part))


def read_images(plan: Plan, s: Sampling, ks: range | list[int]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    images = [np.array(Image.open(plan.path(s, k))) for k in ks]
    return from_uint8(torch.from_numpy(np.stack(images)).movedim(-1, 1))


def ask_teacher(plan: Plan, exam: Exam, device: torch.device) -> None:
    """The exam's images of the teacher, which are this evaluation's too if made the same way."""
    exam.ask_teacher(load_net(plan, "teacher", DTYPES[plan.dtype], device))
    reference = plan.samplings[0]
    if (reference.steps, plan.seed) != (50, 1):
        return
    plan.folder(reference).mkdir(parents=True, exist_ok=True)
    settings = settings_of(plan, reference)
    for k in missing(plan, reference):
        save(exam.floor[k], plan.path(reference, k), settings(k))


# --- measures ------------------------------------------------------------------------------------


@torch.no_grad()
def features_of(
    plan: Plan, s: Sampling, nets: dict[str, Callable], device: torch.device, bar: tqdm
) -> Features:
    parts = {title: [] for title in nets}
    batch = 256 if plan.teacher == "digits" else 8
    for start in range(0, plan.count, batch):
        ks = range(start, min(start + batch, plan.count))
        images = (read_images(plan, s, ks).to(device) + 1) / 2
        for title, net in nets.items():
            parts[title].append(net(images).float())
        bar.update(len(ks))
    return {title: torch.cat(part).unflatten(0, (-1, plan.each)) for title, part in parts.items()}


FORMS = {"precision": ".3f", "recall": ".3f", "distance": ".4f"}
FORMS |= dict.fromkeys(("CLIP", "CLIP-g", "CLIP-H", "HPSv2"), ".4f")


def measures_table(rows: list[dict]) -> str:
    """Markdown. Each row: name, nfe, and the measures as `measure` gives them."""
    titles = [title for title in rows[0] if any(row[title] is not None for row in rows)]
    cells = [["images of", "NFE", *titles[2:]]]
    for row in rows:
        cells.append([row["name"], str(row["nfe"])])
        for title in titles[2:]:
            form, value = FORMS.get(title, ".2f"), row[title]
            cell = "-" if value is None else f"{value[0]:{form}} ± {value[1]:{form}}"
            cells[-1].append(cell)
    return aligned(cells)


def measure_all(
    plan: Plan,
    scorers: dict[str, Path],
    inception: nn.Module | None,
    resamples: int,
    device: torch.device,
) -> list[dict]:
    """A row for each way to draw; the first is what the others are held against."""
    captions = embed_captions(plan.judges, scorers, plan.prompts, device)
    nets = feature_nets(plan.teacher, plan.judges, scorers, inception, device)
    rows, reference = [], None
    with tqdm(total=len(plan.samplings) * plan.count, desc="features") as bar:
        every = [features_of(plan, s, nets, device, bar) for s in plan.samplings]
    for s, made in zip(tqdm(plan.samplings, desc="measures"), every, strict=True):
        values = measure(made, reference, captions, resamples)
        rows.append({"name": s.name, "nfe": s.nfe} | values)
        reference = every[0]
    return rows


def examine(plan: Plan, exam: Exam) -> list[dict]:
    """The exam's rows for the same images."""
    rows = [{"name": "real, held out", "nfe": 0} | exam.row(exam.real[: plan.count])]
    for s in plan.samplings:
        images = read_images(plan, s, range(plan.count))
        rows.append({"name": s.name, "nfe": s.nfe} | exam.row(images))
    return rows


def picture(plan: Plan, path: Path) -> None:
    """The first prompts: the teacher's many steps, its few, the student's own number."""
    own = next((s for s in plan.samplings if s.taus), plan.samplings[-1])
    shown, samples = min(8, len(plan.prompts)), min(4, plan.each)
    columns = {}
    for s in dict.fromkeys((*plan.samplings[:2], own)):
        ks = [i * plan.each + k for i in range(shown) for k in range(samples)]
        images = read_images(plan, s, ks)
        shrink = max(1, max(images.shape[2:]) // 192)
        columns[s.name] = F.avg_pool2d(images, shrink).unflatten(0, (shown, samples))
    captions = [textwrap.shorten(prompt, 40, placeholder=" ...") for prompt in plan.prompts[:shown]]
    side_by_side(path, captions, columns, scale=max(1, 64 // min(images.shape[2:])))


def main() -> None:
    given = arguments()
    try:
        device = parallel.start()
        inception = load_inception(given.inception)
        plan, exam = decide(given)
        scorers, *_ = parallel.on_all_ranks(partial(prepare, plan, exam, given, device))
        draw_missing(plan, device, parallel.rank(), parallel.world())
    except (ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        refuse("interrupted; the same command draws what is missing")
    parallel.barrier()
    if parallel.rank() == 0:
        try:
            rows = measure_all(plan, scorers, inception, given.resamples, device)
        except (ValueError, OSError) as error:
            refuse(error)
        print(measures_table(rows))
        metrics = {"teacher": given.teacher or plan.teacher, "student": str(given.student)}
        metrics |= {"prompts": len(plan.prompts), "images": plan.count, "seed": plan.seed}
        metrics |= {"size": plan.size, "dtype": plan.dtype, "measures": rows}
        if exam:
            metrics["table"] = examine(plan, exam)
            print("\n" + format_table(metrics["table"]))
        (plan.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
        picture(plan, plan.out / "samples.png")
        print(f"{plan.out}: images, metrics.json, samples.png")
    parallel.stop()


if __name__ == "__main__":
    main()
