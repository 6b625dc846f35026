"""What a run shows, as PNGs.

save_png            one image, with its settings
check_finite        whether there is one
side_by_side        captions, and samples in columns
aligned             a table as text
curves              losses and exams over a run
points_and_graphs   the toy's: points in the plane, then graphs
graphs_alone        lines, with bands over runs
"""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from config import Refusal
from engine.lettering import LINE, SIZE, font_for, wrapped
from measure.distances import to_uint8
from measure.drift import DISTANCES, PIXELS
from nets.disk import whole


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
    save(enlarge(image, scale), path, pnginfo=text)


def save(picture: Image.Image, path: Path, **how) -> None:
    with whole(path) as part:
        picture.save(part, format="PNG", **how)


def check_finite(images: Tensor, whose: list[str]) -> None:
    """Refusal where an image (B, 3, H, W) holds what is no number, and would be black."""
    for image, name in zip(images, whose, strict=True):
        if not image.isfinite().all():
            raise Refusal(
                f"the image of {name} holds values that are not finite, and is not written; "
                "a smaller --guidance, or --dtype fp32, may be all that it takes"
            )


def side_by_side(
    path: Path, captions: list[str], columns: dict[str, Tensor], scale: int = 4
) -> None:
    """A PNG: one row per caption, one group of samples per column.

    columns: title -> (captions, samples, 3, H, W).
    """
    samples, _, rows, across = next(iter(columns.values())).shape[1:]
    height, width = scale * rows + 6, scale * across + 2
    left, top, group = 300, 28, samples * width + 16
    size = (left + len(columns) * group, top + len(captions) * height)
    picture, font = Image.new("RGB", size, "white"), ImageFont.load_default(SIZE)
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        own, y = font_for(caption), top + i * height + height // 2 - 12
        lines = wrapped(caption, own, left - 16, max(1, height // LINE))
        for k, line in enumerate(lines):
            at = (8, y + LINE * k - LINE * (len(lines) - 1) // 2)
            draw.text(at, line, fill="black", font=own)
    for column, (title, images) in enumerate(columns.items()):
        x = left + column * group
        (line,) = wrapped(title, font, group - 4, 1)
        draw.text((x, 6), line, fill="black", font=font)
        for i in range(len(captions)):
            for k in range(samples):
                picture.paste(enlarge(images[i, k], scale), (x + k * width, top + i * height))
    save(picture, path)


def sheet(
    path: Path, captions: list[str], columns: dict[str, Tensor], enlarged: int = 1, side: int = 256
) -> None:
    """`side_by_side` for images of any size: shrunk until no side is longer than `side`.

    columns: title -> (captions, samples, 3, H, W).
    """
    small = {
        title: shrunk(images.flatten(0, 1), side).unflatten(0, images.shape[:2])
        for title, images in columns.items()
    }
    side_by_side(path, captions, small, scale=enlarged)


def shrunk(images: Tensor, side: int = 256) -> Tensor:
    """(B, 3, H, W), no side longer than `side`."""
    scale = min(1.0, side / max(images.shape[-2:]))
    return F.interpolate(images, scale_factor=scale, mode="area")


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table of titles and rows, its columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "| " + " | ".join([row[0].ljust(widths[0]), *padded[1:]]) + " |"

    return "\n".join(map(line, [cells[0], rule, *cells[1:]]))


def pyplot():
    """matplotlib's, without a screen; imported only where a plot is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


CURVES = ("dmd", "isg", "fake", "gan disc", "fd", "accuracy clean", "digits colours arrangements")
CURVES += ("norm_student norm_fake norm_disc", " ".join(PIXELS), " ".join(DISTANCES))


def panels(columns: Iterable[str], exams: list[dict]) -> list[str]:
    """What is drawn together: of CURVES whatever there is, then each other column of the log."""
    there = {*columns, *(exams[0] if exams else ())}
    known = [names for names in CURVES if there.intersection(names.split())]
    drawn = {"step", *" ".join(known).split()}
    return known + [name for name in columns if name not in drawn]


def curves(path: Path, log: Path, exams: list[dict], level: dict | None) -> None:
    """All that is logged, and the short exams of the student (dashed: the teacher's 50 steps)."""
    plt = pyplot()
    with open(log, newline="") as file:
        reader = csv.DictReader(file)
        rows, shown = list(reader), panels(reader.fieldnames, exams)
    lines = max(1, math.ceil(len(shown) / 4))
    figure = plt.figure(figsize=(16, 3.25 * lines))
    inch = 1 / (3.25 * lines)
    figure.subplots_adjust(0.04, 0.55 * inch, 0.99, 1 - 0.35 * inch, wspace=0.2, hspace=0.4)
    for k, names in enumerate(shown):
        axis = figure.add_subplot(lines, 4, k + 1)
        for name in names.split():
            examined = exams and name in exams[0]
            source = exams if examined else [row for row in rows if row.get(name)]
            if source:
                points = [(int(row["step"]), float(row[name])) for row in source]
                style = {"marker": "o"} if examined else {"linewidth": 0.7}
                (line,) = axis.plot(*zip(*points, strict=True), label=name, **style)
                if examined:
                    axis.axhline(level[name], color=line.get_color(), linestyle="--", linewidth=0.8)
        title = names.replace(" ", ", ").replace("fd", "FD-T, few images")
        axis.set_title(title, y=1.0)  # where it is anyway, but looked for in each tick
        axis.set_xlabel("iteration")
        axis.locator_params(nbins=5)
        if " " in names and axis.lines:
            axis.legend()
    with whole(path) as part:
        figure.savefig(part, dpi=75, format="png")
    plt.close(figure)


@dataclass
class Graph:
    title: str
    xlabel: str
    scale: str  # of the y axis: "linear" | "log" | "symlog"
    lines: dict[str, tuple[list, list]]  # label -> x (N,), y (runs, N): mean, and band over runs


def points_and_graphs(
    path: Path, panels: dict[str, tuple[np.ndarray, np.ndarray]], graphs: list[Graph]
) -> None:
    """panels: title -> wanted points (grey) and made ones, (N, 2) each."""
    plt = pyplot()
    columns = next(n for n in (5, 4, 7, 3, 2, 1) if len(panels) % n == 0)
    rows = len(panels) // columns
    figure = plt.figure(figsize=(2.6 * columns, 2.6 * rows + 3.4), constrained_layout=True)
    above, below = figure.subfigures(2, 1, height_ratios=(2.6 * rows, 3.4))
    places = above.subplots(rows, columns, squeeze=False).flat
    for (title, (wanted, made)), axis in zip(panels.items(), places, strict=True):
        middle = wanted.mean(0)
        outside = (np.abs(made - middle).max(1) > 3).mean()
        axis.scatter(*wanted.T, s=1, color="0.8")
        axis.scatter(*made.T, s=1, color="C0")
        axis.set(xlim=(middle[0] - 3, middle[0] + 3), ylim=(middle[1] - 3, middle[1] + 3))
        axis.set(xticks=[], yticks=[], aspect="equal")
        lost = f"\n{100 * outside:.0f} % not in sight" if outside > 0.005 else ""
        axis.set_title(title + lost, fontsize=9)
    draw_graphs(below, graphs)
    save_figure(figure, path)


def draw_graphs(figure, graphs: list[Graph]) -> None:
    """Side by side, into a figure of matplotlib's or a part of one."""
    for graph, axis in zip(
        graphs, figure.subplots(1, len(graphs), squeeze=False).flat, strict=True
    ):
        for label, (x, runs) in graph.lines.items():
            y = np.array(runs)
            (line,) = axis.plot(x, y.mean(0), label=label, marker="." if len(x) < 8 else None)
            axis.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15)
        axis.set_yscale(graph.scale)
        axis.set(title=graph.title, xlabel=graph.xlabel)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(graph.lines) > 6 else {}
        axis.legend(fontsize=7, **beside)


def save_figure(figure, path: Path) -> None:
    """Few colours: a fifth of the bytes."""
    figure.set_dpi(70)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]
    save(Image.fromarray(np.ascontiguousarray(pixels)).quantize(128), path, optimize=True)
    pyplot().close(figure)


def graphs_alone(path: Path, graphs: list[Graph]) -> None:
    figure = pyplot().figure(figsize=(5.2 * len(graphs), 3.6), constrained_layout=True)
    draw_graphs(figure, graphs)
    save_figure(figure, path)
