"""What a run shows: PNGs with their settings, teacher and student side by side, learning curves."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from measures import Exam, to_uint8
from schedule import grid


def enlarge(image: Tensor, scale: int) -> Image.Image:
    """image (3, H, W) in [-1, 1]; each pixel becomes a square."""
    pixels = np.ascontiguousarray(to_uint8(image).movedim(0, -1).cpu().numpy())  # (H, W, 3)
    picture = Image.fromarray(pixels)
    size = (scale * picture.width, scale * picture.height)
    return picture.resize(size, Image.Resampling.NEAREST)


def save_png(image: Tensor, path: Path, settings: dict, scale: int = 1) -> None:
    """The settings go into the PNG's text field "settings", as JSON."""
    text = PngInfo()
    text.add_text("settings", json.dumps(settings))
    enlarge(image, scale).save(path, pnginfo=text)


def side_by_side(
    path: Path, captions: list[str], columns: dict[str, Tensor], scale: int = 4
) -> None:
    """A PNG: one line per caption, one group of samples per column.

    columns: title -> (captions, samples, 3, H, W).
    """
    samples, _, rows, across = next(iter(columns.values())).shape[1:]
    height, width = scale * rows + 6, scale * across + 2
    left, top, group = 300, 28, samples * width + 16
    size = (left + len(columns) * group, top + len(captions) * height)
    picture, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=15)
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        draw.text((8, top + i * height + height // 2 - 12), caption, fill="black", font=font)
    for column, (title, images) in enumerate(columns.items()):
        x = left + column * group
        draw.text((x, 6), title, fill="black", font=font)
        for i in range(len(captions)):
            for k in range(samples):
                picture.paste(enlarge(images[i, k], scale), (x + k * width, top + i * height))
    picture.save(path)


def exam_pictures(
    path: Path, exam: Exam, teacher: nn.Module, student: nn.Module, taus: tuple[float, ...]
) -> None:
    """Teacher 50, teacher and student with the student's number of steps, from the same noise."""
    chosen, shown, K = (0, 1, 2, 3, 4, 6, 8, 9), 4, len(taus)  # captions, samples of each, steps
    count = (max(chosen) + 1) * exam.samples
    columns = {
        "teacher, 50 steps (100 evaluations)": exam.floor,
        f"teacher, {K} steps ({2 * K})": exam.sample(
            teacher, grid(teacher.schedule, K), "euler", guided=True, count=count
        ),
        f"student, {K} steps ({K})": exam.sample(student, list(taus), "x0", count=count),
    }
    rows = torch.tensor([[i * exam.samples + k for k in range(shown)] for i in chosen])
    captions = [exam.prompts[i * exam.samples] for i in chosen]
    side_by_side(path, captions, {title: images[rows] for title, images in columns.items()})


CURVES = ("dmd", "isg", "fake", "gan disc", "fd", "accuracy clean", "digits colours arrangements")


def curves(path: Path, log: Path, exams: list[dict], level: dict | None) -> None:
    """Losses, and the short exams of the student (dashed: the teacher's 50 steps)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(2, 4, figsize=(16, 6.5), constrained_layout=True)
    for axis, names in zip(axes.flat, CURVES, strict=False):
        for name in names.split():
            examined = exams and name in exams[0]
            source = exams if examined else [row for row in rows if row.get(name)]
            if source:
                points = [(int(row["step"]), float(row[name])) for row in source]
                style = {"marker": "o"} if examined else {"linewidth": 0.7}
                (line,) = axis.plot(*zip(*points, strict=True), label=name, **style)
                if examined:
                    axis.axhline(level[name], color=line.get_color(), linestyle="--", linewidth=0.8)
        axis.set_title(names.replace(" ", ", ").replace("fd", "FD-T, few images"))
        axis.set_xlabel("iteration")
        if " " in names and axis.lines:
            axis.legend()
    axes.flat[-1].axis("off")
    figure.savefig(path, dpi=75)
    plt.close(figure)
