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
(patch FD); precision and recall (k-NN, k = 3); the kernel distance (KD: KID's formula, times 1000).
Of the images alone: the Vendi score, the mean distance (1 - cosine) between images of a prompt, the
CLIP score (ViT-L/14), and the pixels' brightness and saturation. "±" is half of a
95 % interval, by bootstrap over prompts. FD depends on the number of images: compare equal numbers.
With --inception also FID-T and patch FID-T, which takes the package torch-fidelity; with --clip-g,
--clip-h, --pickscore or --hpsv2 what those networks make of image and prompt. The embedded task's
own prompts add the exam: are named attributes right, how varied are the open ones. Writes
metrics.json and samples.png too.
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import Parser, refuse
from dataset.images import BAD, Images, read_text
from dataset.sources import open_data
from digits.exam import Exam, aligned, format_table
from engine import ranks
from engine.drawing import (
    Sampling,
    Task,
    draw_missing,
    load_net,
    missing_images,
    read_images,
    save_image,
    settings_of,
)
from engine.pictures import side_by_side
from measure.scorers import (
    GIVEN,
    PIXELS,
    Features,
    check_scorers,
    embed_captions,
    feature_nets,
    load_inception,
    locate_scorers,
    measure,
)
from nets.weights import DTYPES
from teachers import FAMILIES, Teacher, names, read_student, student_taus, teacher_of

FEWEST = (4, 16)  # prompts, images: half of them must have neighbours


# --- what is asked for ---------------------------------------------------------------------------


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
    teacher = f"{', '.join(names())}, a file of its denoiser, or mine.py; default: the student's"
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


def resolve_task(given: argparse.Namespace) -> tuple[Task, Exam | None]:
    """All that is drawn, from what was asked; every file is found. ValueError or OSError."""
    for name in ("n", "per_prompt", "teacher_steps", "batch"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {getattr(given, name)}; it must be at least 1")
    if given.resamples < 2:
        raise ValueError(f"--resamples is {given.resamples}; it must be at least 2")
    about, own_denoiser = read_student(given.student), denoiser_file(given.teacher)
    family = teacher_of(given.student, None if own_denoiser else given.teacher)
    preset = family.preset
    if family.own_data and given.data:
        raise ValueError(f"--data {given.data}: {family.own_data} has its own; or give --prompts")
    size = tuple(given.size or json.loads(about.get("size", "null")) or preset.size)
    family.check_size(size)
    family.check_measured(size)
    files = family.locate(given.weights, denoiser=not own_denoiser)
    scorers = {} if family.own_features else locate_scorers(given.weights)
    guidance = (preset.guidance if given.guidance is None else given.guidance) or None
    exam = family.exam(guidance) if given.prompts is None and family.examined else None
    prompts, each = ask(given, family, size, exam)
    task = Task(
        family=family,
        files=files,
        denoisers={
            "teacher": [own_denoiser] if own_denoiser else files["denoiser"],
            "student": [given.student],
        },
        scorers=scorers,
        size=size,
        dtype=given.dtype or ("bf16" if preset.bf16 else "fp32"),
        seed=given.seed,
        batch=given.batch or (family.measured_at_once if family.own_features else 1),
        prompts=prompts,
        each=each,
        samplings=ways(given, about, guidance, family),
        out=given.out or given.student.parent / "evaluation",
    )
    return task, exam


def denoiser_file(teacher: str | None) -> Path | None:
    """--teacher as a file of weights, and not a name or a Python file. ValueError."""
    if teacher is None or teacher in FAMILIES or teacher.endswith(".py"):
        return None
    if not Path(teacher).is_file():
        known = ", ".join(names())
        raise ValueError(f'unknown teacher "{teacher}": no file; choose from {known}')
    return Path(teacher)


def prepare(
    task: Task, exam: Exam | None, given: argparse.Namespace, device: torch.device
) -> dict[str, Path]:
    """Rank 0: what can go wrong before an image is drawn. Per score the file of its network."""
    if ranks.rank() > 0:
        return {}
    paths = {title: getattr(given, title.lower().replace("-", "_")) for title in GIVEN}
    asked = {title: path for title, path in paths.items() if path}
    if task.family.own_features and asked:
        title = next(iter(asked))
        raise ValueError(f"{title} reads 224 x 224 pixels; {task.family.own_features}")
    scorers = {} if task.family.own_features else check_scorers(task.scorers, asked)
    task.out.mkdir(parents=True, exist_ok=True)
    if exam:
        ask_teacher(task, exam, device)
    return scorers


def ask(
    given: argparse.Namespace, family: Teacher, size: tuple[int, int], exam: Exam | None
) -> tuple[list[str], int]:
    """The prompts, and how many images of each."""
    if exam:
        prompts, n = exam.prompts[:: exam.samples], given.n or len(exam.prompts)
        each = exam.samples
        if given.per_prompt not in (None, each):
            raise ValueError(f"--per-prompt is {given.per_prompt}; the exam draws {each}")
    else:
        n = given.n or 5000
        prompts = read_prompts(given, family, size, n)
        each = given.per_prompt or max(1, n // len(prompts))
    prompts = prompts[: n // each]
    if len(prompts) < FEWEST[0] or len(prompts) * each < FEWEST[1]:
        what = f"{len(prompts)} prompts with {each} images each say too little"
        raise ValueError(f"{what}; at least {FEWEST[0]} prompts and {FEWEST[1]} images are needed")
    return prompts, each


def read_prompts(
    given: argparse.Namespace, family: Teacher, size: tuple[int, int], count: int
) -> list[str]:
    """The lines of --prompts, or captions of --data, at most `count`."""
    if given.prompts:
        prompts = [line.strip() for line in read_text(given.prompts).splitlines()]
        prompts = [prompt for prompt in prompts if prompt]
        if not prompts:
            raise ValueError(f"{given.prompts} holds no prompt; give one a line")
        return prompts
    data = open_data(given.data or family.preset.data, size, 0)
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


def ways(
    given: argparse.Namespace, about: dict[str, str], guidance: float | None, family: Teacher
) -> tuple[Sampling, ...]:
    """The teacher's many steps, its few, then the student's."""
    own, sampler = int(about["steps"]), given.sampler or about["sampler"]
    calls = 2 if guidance and family.uses_null else 1
    samplings = [
        Sampling("teacher", n, "euler", guidance, n * calls)
        for n in dict.fromkeys((given.teacher_steps, own))
    ]
    for n in given.steps:
        taus = student_taus(about) if n == own else ()
        samplings.append(Sampling("student", n, sampler, None, n, taus))
    return tuple(samplings)


def ask_teacher(task: Task, exam: Exam, device: torch.device) -> None:
    """The exam's images of the teacher, which are this evaluation's too if made the same way."""
    exam.ask_teacher(load_net(task, "teacher", DTYPES[task.dtype], device))
    reference = task.samplings[0]
    if (reference.steps, task.seed) != (50, 1):
        return
    task.folder(reference).mkdir(parents=True, exist_ok=True)
    settings = settings_of(task, reference)
    for k in missing_images(task, reference):
        save_image(exam.floor[k], task.path(reference, k), settings(k))


# --- measures ------------------------------------------------------------------------------------


@torch.no_grad()
def features_of(
    task: Task, s: Sampling, nets: dict[str, Callable], device: torch.device, bar: tqdm
) -> Features:
    parts = {title: [] for title in nets}
    batch = task.family.measured_at_once
    for start in range(0, task.count, batch):
        ks = range(start, min(start + batch, task.count))
        images = (read_images(task, s, ks).to(device) + 1) / 2
        for title, net in nets.items():
            parts[title].append(net(images).float())
        bar.update(len(ks))
    return {title: torch.cat(part).unflatten(0, (-1, task.each)) for title, part in parts.items()}


FORMS = {"precision": ".3f", "recall": ".3f", "distance": ".4f"}
FORMS |= dict.fromkeys(PIXELS, ".3f")
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
    task: Task,
    scorers: dict[str, Path],
    inception: nn.Module | None,
    resamples: int,
    device: torch.device,
) -> list[dict]:
    """A row for each way to draw; the first is what the others are held against."""
    captions = embed_captions(task.scorers, scorers, task.prompts, device)
    nets = feature_nets(task.scorers, scorers, inception, device, task.family.features(device))
    rows, reference = [], None
    with tqdm(total=len(task.samplings) * task.count, desc="features") as bar:
        every = [features_of(task, s, nets, device, bar) for s in task.samplings]
    for s, made in zip(tqdm(task.samplings, desc="measures"), every, strict=True):
        values = measure(made, reference, captions, resamples)
        rows.append({"name": s.name, "nfe": s.nfe} | values)
        reference = every[0]
    return rows


def examine(task: Task, exam: Exam) -> list[dict]:
    """The exam's rows for the same images."""
    rows = [{"name": "real, held out", "nfe": 0} | exam.row(exam.real[: task.count])]
    for s in task.samplings:
        images = read_images(task, s, range(task.count))
        rows.append({"name": s.name, "nfe": s.nfe} | exam.row(images))
    return rows


def picture(task: Task, path: Path) -> None:
    """The first prompts: the teacher's many steps, its few, the student's own number."""
    own = next((s for s in task.samplings if s.taus), task.samplings[-1])
    shown, samples = min(8, len(task.prompts)), min(4, task.each)
    columns = {}
    for s in dict.fromkeys((*task.samplings[:2], own)):
        ks = [i * task.each + k for i in range(shown) for k in range(samples)]
        images = read_images(task, s, ks)
        shrink = max(1, max(images.shape[2:]) // 192)
        columns[s.name] = F.avg_pool2d(images, shrink).unflatten(0, (shown, samples))
    captions = [textwrap.shorten(prompt, 40, placeholder=" ...") for prompt in task.prompts[:shown]]
    side_by_side(path, captions, columns, scale=max(1, 64 // min(images.shape[2:])))


def main() -> None:
    given = arguments()
    try:
        device = ranks.start()
        inception = load_inception(given.inception)
        task, exam = resolve_task(given)
        scorers, *_ = ranks.on_all_ranks(partial(prepare, task, exam, given, device))
        draw_missing(task, device, ranks.rank(), ranks.world())
    except (ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        refuse("interrupted; the same command draws what is missing")
    ranks.barrier()
    if ranks.rank() == 0:
        try:
            rows = measure_all(task, scorers, inception, given.resamples, device)
        except (ValueError, OSError) as error:
            refuse(error)
        print(measures_table(rows))
        metrics = {"teacher": given.teacher or task.family.name, "student": str(given.student)}
        metrics |= {"prompts": len(task.prompts), "images": task.count, "seed": task.seed}
        metrics |= {"size": task.size, "dtype": task.dtype, "measures": rows}
        if exam:
            metrics["table"] = examine(task, exam)
            print("\n" + format_table(metrics["table"]))
        (task.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
        picture(task, task.out / "samples.png")
        print(f"{task.out}: images, metrics.json, samples.png")
    ranks.stop()


if __name__ == "__main__":
    main()
