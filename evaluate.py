"""The measures of students beside their teacher's, at several numbers of steps, for any teacher.

    python evaluate.py --student runs/digits/student.safetensors
    python evaluate.py --student FILE --prompts captions.txt --n 5000 --weights DIR
    torchrun --nproc_per_node 8 evaluate.py --student FILE --data DIR --images 5000
    python evaluate.py --student MINE THEIRS LORA --steps 4      # a row each; anybody's students

Teacher and students draw every prompt from the same noise: image k depends on its prompt and on
(seed, k) alone. Images are kept in --out, as PNGs that carry their settings; the same command draws
what is missing or was made otherwise, so it continues where it was interrupted. Ranks share the
images out. The text encoders leave memory before a denoiser comes, and the denoiser before the
networks that judge. A student that train.py did not write is described by --taus, --sampler and
--shift, or by what --remember kept; of several, these are for those that do not say it themselves.

Measured against the teacher's images, features by DINOv2 (the embedded task: by its judge, and by
its small ViT): the Frechet distance of whole images (FD) and of their middle 299 x 299 pixels
(patch FD); precision and recall (k-NN, k = 3); the kernel distance (KD: KID's formula, times 1000).
Of the images alone: the Vendi score, the mean distance (1 - cosine) between images of a prompt, the
CLIP score (ViT-L/14), and the pixels' brightness and saturation. "±" is half of a
95 % interval, by bootstrap over prompts. FD depends on the number of images: compare equal numbers.
With --inception also FID-T and patch FID-T, which takes the package torch-fidelity; with --clip-g,
--clip-h, --pickscore, --hpsv2 or --imagereward what those networks make of image and prompt. The
embedded task's own prompts add the exam: are named attributes right, how varied are the open ones.
Writes metrics.json and samples.png too.
"""

from engine.flags import denoiser_file, evaluate_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    evaluate_arguments(__doc__)

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import Refusal, legible
from dataset.captions import read_prompts
from dataset.sources import captions_of, open_data
from digits.exam import Exam, aligned, format_table
from engine import ranks
from engine.build import check_base, trained_on
from engine.drawing import (
    Sampling,
    Task,
    draw_missing,
    load_net,
    missing_images,
    read_images,
    settings_of,
)
from engine.pictures import save_png, side_by_side
from engine.run import say
from engine.start import check_denoiser, check_headers
from measure.scorers import (
    GIVEN,
    PIXELS,
    Features,
    check_scorers,
    embed_captions,
    feature_nets,
    judges,
    load_inception,
    locate_scorers,
    measure,
    unrepaired,
)
from nets.disk import hold, try_folder, write_text
from nets.weights import DTYPES
from teachers import Teacher
from teachers.students import Student, find_student, reading, remember, remembered, student_file

FEWEST = (4, 16)  # prompts, images: half of them must have neighbours


# --- the task ------------------------------------------------------------------------------------


def resolve_task(given: argparse.Namespace) -> tuple[Task, Exam | None]:
    """All that is drawn, from what was asked; every file is found. ValueError or OSError."""
    own_denoiser = denoiser_file(given.teacher)
    students = find_students(given, None if own_denoiser else given.teacher)
    first = next(iter(students.values()))
    tokens = given.t5_length or first.t5_length
    family, preset = reading(first.family, tokens), first.family.preset
    if family.own_data and given.data is not None:
        raise Refusal(f"--data {given.data}: {family.own_data} has its own; or give --prompts")
    size = given.size or one_size(students) or preset.size
    family.check_size(size)
    family.check_measured(size)
    out = given.out or first.path.parent / "evaluation"
    try_folder(out)
    adapted = any(student.is_lora for student in students.values())
    files = family.locate(given.weights, denoiser=not own_denoiser or adapted, base=given.base)
    for remark in check_base(family, files, given.merge) if given.base or given.merge else ():
        say(remark)
    for student in students.values():
        if student.is_lora and (remark := trained_on(student, files, given.merge)):
            say(remark)
    judged = given.imagereward is not None
    scorers = {} if family.own_features else locate_scorers(given.weights, judged)
    guidance = (preset.guidance if given.guidance is None else given.guidance) or None
    exam = family.exam(guidance) if given.prompts is None and family.examined else None
    prompts, each = ask(given, family, size, exam)
    drawn_by = {"teacher": [own_denoiser] if own_denoiser else files["denoiser"]}
    for who, student in students.items():
        drawn_by[who] = [*student.files, *(files["denoiser"] if student.is_lora else [])]
    task = Task(
        family=family,
        files=files,
        denoisers=drawn_by,
        scorers=scorers,
        size=tuple(size),
        dtype=given.dtype or ("bf16" if preset.bf16 else "fp32"),
        seed=given.seed,
        batch=given.batch or (family.measured_at_once if family.own_features else 1),
        prompts=prompts,
        each=each,
        samplings=ways(given, students, guidance, family),
        out=out,
        students=students,
        adapter_scale=given.adapter_scale,
        merge=tuple(given.merge),
        t5_length=tokens,
    )
    return task, exam


def find_students(given: argparse.Namespace, teacher: str | None) -> dict[str, Student]:
    """By the name of each row, of one teacher all."""
    said, found = {"taus": given.taus, "shift": given.shift}, {}
    for path in given.student:
        unsaid = len(given.student) == 1 or not remembered(student_file(path))
        flags = said | {"sampler": given.sampler} if unsaid else {}
        student = find_student(path, teacher, **flags)
        name, alike = student.title, sum(s.title == student.title for s in found.values())
        name += f"-{alike + 1}" if alike or name == "teacher" else ""
        found["student" if len(given.student) == 1 else name] = student
    if not any(student.foreign for student in found.values()):
        student.check_said(said)
    teachers = dict.fromkeys(student.family.name for student in found.values())
    if len(teachers) > 1:
        raise Refusal(f"--student: of {' and of '.join(teachers)}; give those of one teacher")
    return found


def one_size(students: dict[str, Student]) -> tuple[int, int] | None:
    """Of the students that say theirs."""
    sizes = {student.size: student.path for student in students.values() if student.size}
    if len(sizes) > 1:
        each = ", ".join(f"{path} {size[0]} x {size[1]}" for size, path in sizes.items())
        raise Refusal(f"--student: of several sizes ({each}); give --size HEIGHT WIDTH")
    return next(iter(sizes), None)


def prepare(
    task: Task, exam: Exam | None, given: argparse.Namespace, device: torch.device, held: ExitStack
) -> dict[str, Path]:
    """Rank 0: what can go wrong before an image is drawn. Per score the file of its network.

    The folder is this evaluation's alone until `held` is closed.
    """
    if ranks.rank() > 0:
        return {}
    check_headers(task.family, task.files)
    check_denoiser(task.family, task.denoisers["teacher"])
    for student in task.students.values():
        if not student.is_lora:
            check_denoiser(student.fitted, student.files)
    paths = {title: getattr(given, title.lower().replace("-", "_")) for title in GIVEN}
    asked = {title: path for title, path in paths.items() if path}
    if task.family.own_features and asked:
        title = next(iter(asked))
        raise Refusal(f"{title} reads 224 x 224 pixels; {task.family.own_features}")
    scorers = {} if task.family.own_features else check_scorers(task.scorers, asked)
    if remark := unrepaired(scorers, task.prompts):
        say(remark)
    held.enter_context(hold(task.out))
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
            raise Refusal(f"--per-prompt is {given.per_prompt}; the exam draws {each}")
    else:
        n = given.n or 5000
        prompts = prompts_of(given, family, size, n)
        each = given.per_prompt or max(1, n // len(prompts))
    prompts = prompts[: n // each]
    if len(prompts) < FEWEST[0] or len(prompts) * each < FEWEST[1]:
        what = f"{len(prompts)} prompts with {each} images each say too little"
        raise Refusal(f"{what}; at least {FEWEST[0]} prompts and {FEWEST[1]} images are needed")
    return prompts, each


def prompts_of(
    given: argparse.Namespace, family: Teacher, size: tuple[int, int], count: int
) -> list[str]:
    """The lines of --prompts, or captions of --data, at most `count`."""
    if given.prompts:
        return read_prompts(given.prompts)
    data = open_data(family.preset.data if given.data is None else given.data, size, 0)
    if remark := data.remark():
        say(remark)
    return captions_of(data, count)


def ways(
    given: argparse.Namespace,
    students: dict[str, Student],
    guidance: float | None,
    family: Teacher,
) -> tuple[Sampling, ...]:
    """The teacher's many steps, its few, then each student's."""
    calls = 2 if guidance and family.uses_null else 1
    few = [student.steps for student in students.values()]
    samplings = [
        Sampling("teacher", n, "euler", guidance, n * calls)
        for n in dict.fromkeys((given.teacher_steps, *few))
    ]
    for who, student in students.items():
        sampler = given.sampler or student.about["sampler"]
        for n in given.steps:
            taus = student.taus if n == student.steps else ()
            samplings.append(Sampling(who, n, sampler, student.guidance, n, taus))
    return tuple(samplings)


def ask_teacher(task: Task, exam: Exam, device: torch.device) -> None:
    """The exam's images of the teacher, which are this evaluation's too if made the same way."""
    exam.ask_teacher(load_net(task, "teacher", DTYPES[task.dtype], device))
    reference = task.samplings[0]
    if (reference.steps, task.seed) != (50, 1):
        return
    settings = settings_of(task, reference)
    for k in missing_images(task, reference):
        save_png(exam.floor[k], task.path(reference, k), settings(k))


# --- measures ------------------------------------------------------------------------------------


@torch.no_grad()
def features_of(
    task: Task,
    s: Sampling,
    nets: dict[str, Callable],
    asking: dict[str, Callable],
    device: torch.device,
    bar: tqdm,
) -> Features:
    """nets: of images; asking: of images and their prompts."""
    parts = {title: [] for title in (*nets, *asking)}
    batch = task.family.measured_at_once
    for start in range(0, task.count, batch):
        ks = range(start, min(start + batch, task.count))
        images = (read_images(task, s, ks).to(device) + 1) / 2
        for title, net in nets.items():
            parts[title].append(net(images).float())
        asked = [task.prompts[k // task.each] for k in ks]
        for title, net in asking.items():
            parts[title].append(net(images, asked).float())
        bar.update(len(ks))
    return {title: torch.cat(part).unflatten(0, (-1, task.each)) for title, part in parts.items()}


FORMS = {"precision": ".3f", "recall": ".3f", "distance": ".4f"}
FORMS |= dict.fromkeys(PIXELS, ".3f")
FORMS |= dict.fromkeys(("CLIP", "CLIP-g", "CLIP-H", "HPSv2"), ".4f")
FORMS["ImageReward"] = ".3f"


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
    asking, rows, reference = judges(task.scorers, scorers, device), [], None
    with tqdm(total=len(task.samplings) * task.count, desc="features") as bar:
        every = [features_of(task, s, nets, asking, device, bar) for s in task.samplings]
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
    """The first prompts: the teacher's many steps, its few, each student's own number."""
    own = [s for s in task.samplings if s.taus] or [task.samplings[-1]]
    shown, samples = min(8, len(task.prompts)), min(4, task.each)
    columns = {}
    for s in dict.fromkeys((*task.samplings[:2], *own)):
        ks = [i * task.each + k for i in range(shown) for k in range(samples)]
        images = read_images(task, s, ks)
        shrink = max(1, max(images.shape[2:]) // 192)
        columns[s.name] = F.avg_pool2d(images, shrink).unflatten(0, (shown, samples))
    side_by_side(path, task.prompts[:shown], columns, scale=max(1, 64 // min(images.shape[2:])))


def main() -> None:
    given, held = evaluate_arguments(__doc__), ExitStack()
    stopped = "interrupted; the same command draws what is missing"
    with ranks.refusals(interrupted=stopped), held:
        device = ranks.start()
        inception = load_inception(given.inception)
        task, exam = resolve_task(given)
        how = (task, exam, given, device, held)
        scorers, *_ = ranks.on_all_ranks(partial(prepare, *how))
        draw_missing(task, device, ranks.rank(), ranks.world())
        ranks.barrier()
        if ranks.rank() == 0:
            rows = measure_all(task, scorers, inception, given.resamples, device)
            report(given, task, exam, rows)
    ranks.stop()


def report(given: argparse.Namespace, task: Task, exam: Exam | None, rows: list[dict]) -> None:
    print(measures_table(rows))
    who = {name: str(student.path) for name, student in task.students.items()}
    metrics = {"teacher": given.teacher or task.family.name, "students": who}
    metrics |= {"prompts": len(task.prompts), "images": task.count, "seed": task.seed}
    metrics |= {"size": task.size, "dtype": task.dtype, "measures": rows}
    if exam:
        metrics["table"] = examine(task, exam)
        print("\n" + format_table(metrics["table"]))
    write_text(task.out / "metrics.json", json.dumps(metrics, indent=1))
    picture(task, task.out / "samples.png")
    for student in task.students.values() if given.remember else ():
        remember(student)
    print(f"{legible(task.out)}: images, metrics.json, samples.png")


if __name__ == "__main__":
    main()
