"""The embedded task's exam: what is in each image, held against its caption.

    read_scene, effective_number  are all *named* attributes right, how varied are the *open* ones
    Exam                          one sampler's images -> one row of the table
    exam_row                      one network's images at given times
    teacher_rows                  real scenes and the teacher, which no student changes
    exam_table, format_table      teacher beside student

Never read "clean" without FD-T: an over-contrasted student is clean and wrong.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from zipfile import BadZipFile
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Refusal
from digits import ASSETS
from digits.judge import Verdict, load_judge
from digits.scenes import HORIZONTAL, VERTICAL, DigitScenes
from digits.words import DIGITS, WORD_ID, SceneText, attributes
from engine.pictures import aligned, side_by_side
from measure.distances import frechet_distance, from_uint8, recall, round_8bit
from nets.weights import digest
from schedule import draw_samples, generator, grid, normal

# --- reading a scene -----------------------------------------------------------------------------


@dataclass
class Reading:
    """B images held against their captions, objects in caption order."""

    right: Tensor  # (B,) all named attributes are there
    digits: Tensor  # (B, 2) as seen
    colours: Tensor  # (B, 2)
    arrangement: Tensor  # (B,) index into data.ARRANGEMENTS
    open_digits: Tensor  # (B, 2) the caption leaves it open
    open_colours: Tensor  # (B, 2)
    open_arrangement: Tensor  # (B,) "and", between objects whose names tell them apart


def read_scene(verdict: Verdict, ids: Tensor) -> Reading:
    """What is seen, held against caption tokens ids (B, 5).

    With "and", object 1 may stand in either place: the better match counts.
    """
    colours, digits = attributes(ids)  # (B, 2) each
    open_colours, open_digits = colours < 0, digits == len(DIGITS)
    either, above = ids[:, 2] == WORD_ID["and"], ids[:, 2] == WORD_ID["above"]

    def found(seen_colours: Tensor, seen_digits: Tensor) -> Tensor:
        """(B,) how many of the four attributes fit, open ones included."""
        fits = (open_colours | (seen_colours == colours), open_digits | (seen_digits == digits))
        return torch.cat(fits, dim=1).sum(1)

    straight = found(verdict.colours, verdict.digits)  # object 1 in the first place
    crossed = found(verdict.colours.flip(1), verdict.digits.flip(1))
    swapped = either & (crossed > straight)
    axis_fits = either | (verdict.axis == torch.where(above, VERTICAL, HORIZONTAL))
    other_colour = (colours[:, 0] != colours[:, 1]) & ~open_colours.any(1)
    other_digit = (digits[:, 0] != digits[:, 1]) & ~open_digits.any(1)
    flip = swapped[:, None]
    return Reading(
        right=(torch.where(swapped, crossed, straight) == 4) & axis_fits,
        digits=torch.where(flip, verdict.digits.flip(1), verdict.digits),
        colours=torch.where(flip, verdict.colours.flip(1), verdict.colours),
        arrangement=2 * verdict.axis + swapped,
        open_digits=open_digits,
        open_colours=open_colours,
        open_arrangement=either & (other_colour | other_digit),
    )


def effective_number(seen: Tensor, is_open: Tensor) -> float:
    """1 / P(two samples of one caption agree); inf if none do.

    seen (captions, samples), is_open (captions,): which captions count.
    """
    seen = seen[is_open]
    samples = seen.shape[1]
    agree = (seen[:, :, None] == seen[:, None, :]).sum((1, 2)) - samples
    return (samples * (samples - 1) / agree.float().mean()).item()


# --- the questions -------------------------------------------------------------------------------


class Exam:
    """The embedded task's questions, and the judge.

    It asks for `samples` images of each of `captions` captions as in training; of `new` ones that
    name everything, with (colour, digit) pairs held out of training; and of `placed` captions like
    "a one and a two", for how objects are placed if nothing is said. Images are rounded to 8 bits
    before they are judged.

    FD-T compares with the teacher's guided samples of 50 steps, seed 0; everything is examined with
    seed 1, so the row of the teacher's 50 steps is the floor of FD-T.
    """

    def __init__(self, guidance: float, captions=256, new=32, placed=64, samples=8):
        self.judge, self.ghost_limit = load_judge()
        self.guidance, self.samples, self.text = guidance, samples, SceneText()
        asked = (
            DigitScenes(seed=4, handwriting="held-out"),
            DigitScenes(seed=5, handwriting="held-out", pairs="held-out", say="all"),
            DigitScenes(seed=6, handwriting="held-out", say="digits"),
        )
        counts = (captions, new, placed)
        every = [scenes(range(count)).captions for scenes, count in zip(asked, counts, strict=True)]
        self.prompts = [caption for part in every for caption in part for _ in range(samples)]
        self.count, self.count_new = captions * samples, new * samples
        self.ids = self.text.tokens(self.prompts)
        parts = self.ids.split([samples * count for count in counts])
        parts = [scenes.matching(ids) for scenes, ids in zip(asked, parts, strict=True)]
        self.real = torch.cat(parts)  # real scenes that fit the prompts
        self.real_features = self.features(self.real)
        self.reference = self.real_features  # features of the teacher's samples: `ask_teacher`
        self.floor = self.real  # the teacher's images with other noise: likewise

    def features(self, images: Tensor) -> Tensor:
        """What FD-T and recall compare (N, 96): images of the captions as in training."""
        return self.judge.judge(round_8bit(images[: self.count])).features

    def sample(
        self,
        net: nn.Module,
        taus: list[float],
        sampler: str,
        guided: bool = False,
        seed: int = 1,
        count: int | None = None,
    ) -> Tensor:
        """Images (N, 3, 16, 16) in [-1, 1] for the prompts in order.

        taus, sampler: see `draw_samples`; count: only the first so many.
        """
        prompts, parts = self.prompts[:count], []
        device = next(net.parameters()).device
        for start in range(0, len(prompts), 256):
            part = prompts[start : start + 256]
            cond, uncond = self.text(part, device), self.text([""] * len(part), device)
            draws = [generator("exam", seed, start + k) for k in range(len(part))]
            eps = normal(torch.empty(len(part), 3, 16, 16, device=device), draws)
            scale = self.guidance if guided else None
            images = draw_samples(net, eps, cond, taus, sampler, uncond, scale, draws)
            parts.append(images.cpu())
        return torch.cat(parts)

    def fingerprint(self, teacher: nn.Module) -> str:
        """Of all that the teacher's samples depend on."""
        prompts = crc32(repr(self.prompts).encode())
        return f"weights {digest(teacher)}, guidance {self.guidance}, prompts {prompts}"

    def ask_teacher(self, teacher: nn.Module) -> None:
        """The teacher's 50-step samples, from assets/ if they were made with these weights."""
        self.compare_with(cached_samples(self.fingerprint(teacher)) or self.draw_teacher(teacher))

    def draw_teacher(self, teacher: nn.Module) -> list[Tensor]:
        """Its 50-step samples for the prompts in order, from two noises."""
        seeds, taus = tqdm((0, 1), desc="teacher, 50 steps"), grid(teacher.schedule, 50)
        return [self.sample(teacher, taus, "euler", guided=True, seed=s) for s in seeds]

    def compare_with(self, images: list[Tensor]) -> None:
        """The teacher's 50-step samples, from two noises."""
        self.reference, self.floor = self.features(images[0]), images[1]

    def row(self, images: Tensor) -> dict[str, float | None]:
        """The measures of images (N, 3, 16, 16) for the prompts in order, or the first of them."""
        verdict = self.judge.judge(round_8bit(images))
        read, n = read_scene(verdict, self.ids[: len(images)]), min(len(images), self.count)
        features, right_new = verdict.features[:n], read.right[n : n + self.count_new]

        def number(seen: Tensor, is_open: Tensor) -> float:
            """What is open depends on the caption alone; both objects of a caption count."""
            seen = seen.unflatten(0, (-1, self.samples)).movedim(1, -1).reshape(-1, self.samples)
            return effective_number(seen, is_open[:: self.samples].flatten())

        return {
            "accuracy": 100 * read.right[:n].float().mean().item(),
            "clean": 100 * (verdict.ghost[:n] <= self.ghost_limit).float().mean().item(),
            "fd": frechet_distance(features, self.reference[:n]),
            "digits": number(read.digits, read.open_digits),
            "colours": number(read.colours, read.open_colours),
            "arrangements": number(read.arrangement, read.open_arrangement),
            "recall": 100 * recall(self.real_features, features),
            "new": 100 * right_new.float().mean().item() if len(right_new) else None,
        }

    def short(self, student: nn.Module, taus: tuple[float, ...]) -> dict[str, float | None]:
        """A quarter of the captions, with the student's own anchors."""
        images = self.sample(student, list(taus), "x0", count=self.count // 4)
        return {"nfe": len(taus)} | self.row(images)

    def short_level(self) -> dict[str, float | None]:
        """What the teacher's 50 steps reach in the short exam."""
        return self.row(self.floor[: self.count // 4])

    def table(
        self, student: nn.Module, taus: tuple[float, ...], teacher: nn.Module | None
    ) -> list[dict]:
        """The rows of `exam_table`."""
        return exam_table(self, student, taus, teacher)

    def show(self, rows: list[dict]) -> str:
        """Rows as text."""
        return format_table(rows)

    def pictures(
        self, path: Path, teacher: nn.Module, student: nn.Module, taus: tuple[float, ...]
    ) -> None:
        """Teacher 50, teacher and student with the student's number of steps, one noise."""
        chosen, shown, K = (0, 1, 2, 3, 4, 6, 8, 9), 4, len(taus)  # captions, samples of each
        count = (max(chosen) + 1) * self.samples
        columns = {
            "teacher, 50 steps (100 evaluations)": self.floor,
            f"teacher, {K} steps ({2 * K})": self.sample(
                teacher, grid(teacher.schedule, K), "euler", guided=True, count=count
            ),
            f"student, {K} steps ({K})": self.sample(student, list(taus), "x0", count=count),
        }
        rows = torch.tensor([[i * self.samples + k for k in range(shown)] for i in chosen])
        captions = [self.prompts[i * self.samples] for i in chosen]
        side_by_side(path, captions, {title: images[rows] for title, images in columns.items()})


def cached_samples(fingerprint: str) -> list[Tensor] | None:
    """What pretrain.py left in assets/; None if it is absent, or of other weights or questions."""
    path = ASSETS / "teacher_samples.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            if str(file["fingerprint"]) != fingerprint:
                return None
            return [from_uint8(torch.from_numpy(file[f"seed{seed}"])) for seed in (0, 1)]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise Refusal(
            f"{path} is damaged ({error}); make it anew: python -m digits.pretrain samples"
        ) from None


def exam_row(
    exam: Exam, who: str, net: nn.Module, taus: list[float], sampler: str, guided: bool = False
) -> dict:
    """One row for format_table: what this network draws at these times, examined."""
    kind = sampler if who == "student" else "guided" if guided else "unguided"
    steps, images = len(taus), exam.sample(net, taus, sampler, guided)
    return {"name": f"{who} {steps}, {kind}", "nfe": steps * (1 + guided)} | exam.row(images)


def student_times(net: nn.Module, taus: tuple[float, ...], steps: int) -> list[float]:
    """The student's own anchors taus; an even grid for another number of steps."""
    return list(taus) if steps == len(taus) else grid(net.schedule, steps)


def teacher_rows(exam: Exam, teacher: nn.Module) -> list[dict]:
    """What no student changes: from assets/ if made with these networks and questions."""
    try:
        kept = json.loads((ASSETS / ROWS).read_text())
        if kept["fingerprint"] == rows_fingerprint(exam, teacher):
            return kept["rows"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # absent or damaged
    return draw_rows(exam, teacher)


ROWS = "teacher_rows.json"


def rows_fingerprint(exam: Exam, teacher: nn.Module) -> str:
    """Of all that the teacher's rows depend on, but for the code."""
    return f"{exam.fingerprint(teacher)}, judge {digest(exam.judge)}"


def draw_rows(exam: Exam, teacher: nn.Module) -> list[dict]:
    """Real scenes, and the teacher at several numbers of steps."""
    rows = [
        {"name": "real, held out", "nfe": 0} | exam.row(exam.real),
        {"name": "teacher 50, guided", "nfe": 100} | exam.row(exam.floor),
    ]
    for guided, steps in tqdm([*product((True, False), (8, 4, 2, 1))], desc="teacher's rows"):
        times = grid(teacher.schedule, steps)
        rows.append(exam_row(exam, "teacher", teacher, times, "euler", guided))
    return rows


def exam_table(
    exam: Exam, student: nn.Module, taus: tuple[float, ...], teacher: nn.Module | None
) -> list[dict]:
    """Rows for format_table: the teacher's, then the student's at several numbers of steps, and at
    its own anchors taus by Euler too. Without a teacher: only at its own anchors.
    """
    rows = teacher_rows(exam, teacher) if teacher is not None else []
    counts = sorted({1, 2, 4, 8, len(taus)}) if rows else [len(taus)]
    plan = [(student_times(student, taus, steps), "x0") for steps in counts]
    plan.append((list(taus), "euler"))
    return rows + [exam_row(exam, "student", student, *how) for how in tqdm(plan, desc="table")]


# --- the table -----------------------------------------------------------------------------------

COLUMNS = (
    ("accuracy", "accuracy", ".1f"),
    ("clean", "clean", ".1f"),
    ("fd", "FD-T", ".2f"),
    ("digits", "digits", ".2f"),
    ("colours", "colours", ".2f"),
    ("arrangements", "arrangements", ".2f"),
    ("recall", "recall", ".1f"),
    ("new", "new pairs", ".1f"),
)


def format_table(rows: list[dict]) -> str:
    """Markdown, aligned. Each row: name, nfe (network evaluations per image) and the measures."""
    cells = [["sampler", "NFE", *(title for _, title, _ in COLUMNS)]]
    for row in rows:
        values = ["-" if row[key] is None else format(row[key], form) for key, _, form in COLUMNS]
        cells.append([row["name"], str(row["nfe"] or "-"), *values])
    return aligned(cells)
