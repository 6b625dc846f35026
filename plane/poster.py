"""Algorithm 1 as one drawing, with the names of the code: assets/algorithm.png.

    python -m plane.poster

BOXES name functions as they stand in train.py, dmd.py, isg.py, ida.py and discriminator.py, and
tensors as those functions call them; tests/test_docs.py looks each up. Matplotlib draws it.
"""

from pathlib import Path

from config import Parser, place
from engine.pictures import pyplot, save_figure
from engine.ranks import refusals
from nets.disk import try_folder

COLOURS = {"net": "#dbe8f6", "loss": "#fbe3d0", "move": "#dcefdc", "data": "#f2f2f2"}
# By name: kind, x and y of the middle, width, height, the function (file:name) or "", and lines.
BOXES = {
    "real": ("data", 1.3, 6.5, 1.9, 0.8, "", "x0_real, captions\ncond, images"),
    "input": (
        *("data", 4.2, 6.5, 2.7, 0.8, "dmd.py:student_input"),
        "half: real data, noised\nhalf: backward simulation",
    ),
    "student": ("net", 7.2, 6.5, 1.9, 0.8, "", "student (theta)\nx_t, tau_start -> x0"),
    "decode": ("net", 10.1, 6.5, 2.2, 0.8, "", "vae.decode, augment,\ndisc.features: made"),
    "dmd": (
        *("loss", 1.9, 4.5, 3.1, 1.15, "dmd.py:dmd_loss"),
        "x0 noised to t, both estimate it:\n(x0_fake - x0_teacher) / scale",
    ),
    "isg": (
        *("loss", 5.65, 4.5, 3.4, 1.15, "isg.py:isg_loss"),
        "teacher to tau_mid, student to tau_end,\nagainst the student's one step",
    ),
    "gan": (
        *("loss", 9.5, 4.5, 3.3, 1.15, "discriminator.py:gan_loss"),
        "-mean(omega logits)\nreaches pixels, never the heads",
    ),
    "move": (
        *("move", 3.9, 2.75, 4.6, 0.75, "train.py:minimise"),
        "student: w_dmd dmd + w_isg isg + w_gan gan",
    ),
    "ida": (
        *("move", 8.9, 2.75, 3.8, 0.75, "ida.py:ida_update"),
        "phi <- lambda phi + (1 - lambda) theta",
    ),
    "fake": (
        *("loss", 3.9, 0.85, 4.6, 0.85, "dmd.py:fake_loss"),
        "the fake score (phi) learns x0, as data",
    ),
    "disc": (
        *("loss", 8.9, 0.85, 3.8, 0.85, "discriminator.py:disc_loss"),
        "hinge, times omega: real or made?",
    ),
}
ARROWS = ("real input", "input student", "student decode", "student dmd", "student isg")
ARROWS += ("decode gan", "dmd move", "isg move", "gan move", "move ida", "fake disc")
STAGES = {  # y of its upper edge, and what is written at its lower one
    7.25: "1  the student draws, at every step",
    5.45: "2  every ttur-th step: the student learns, and the fake score is pulled after it",
    1.65: "3  every step: the fake score and the discriminator learn what the student drew",
}


def poster(path: Path) -> None:
    figure = pyplot().figure(figsize=(13.2, 8.6))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 11.6), ylim=(-0.25, 7.85))
    axis.axis("off")
    axis.text(0.25, 7.5, "SenseFlow, Algorithm 1: train.py:train_step", fontsize=16, va="center")
    for (top, title), bottom in zip(STAGES.items(), (5.55, 1.75, -0.1), strict=True):
        size = {"width": 11.3, "height": top - bottom}
        frame = pyplot().Rectangle((0.15, bottom), **size, fill=False, edgecolor="0.75")
        axis.add_patch(frame)
        axis.text(0.3, bottom + 0.22, title, fontsize=12, va="center", color="0.3")
    for pair in ARROWS:
        axis.annotate("", *ends(*pair.split()), arrowprops={"arrowstyle": "->", "color": "0.35"})
    for kind, x, y, width, height, function, lines in BOXES.values():
        corner = (x - width / 2, y - height / 2)
        box = pyplot().Rectangle(corner, width, height, facecolor=COLOURS[kind], edgecolor="0.4")
        axis.add_patch(box)
        name = function.partition(":")[2]
        if name:
            axis.text(
                x, y + height / 2 - 0.2, name, ha="center", va="center", weight="bold", size=12
            )
        middle = y - (0.17 if name else 0)
        axis.text(x, middle, lines, ha="center", va="center", fontsize=10)
    save_figure(figure, path)


def ends(first: str, second: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where an arrow ends and begins: between sides in one row, else between edges."""
    (_, x, y, width, height, *_), (_, x2, y2, width2, height2, *_) = BOXES[first], BOXES[second]
    if y == y2:
        return (x2 - width2 / 2, y2), (x + width / 2, y)
    along = max(x2 - width2 / 2 + 0.2, min(x, x2 + width2 / 2 - 0.2))  # as steep as may be
    return (along, y2 + height2 / 2), (x, y - height / 2)


def main() -> None:
    parser = Parser(
        prog="python -m plane.poster",
        description=__doc__,
    )
    file = Path("assets/algorithm.png")
    parser.add_argument("--out", type=place, default=file, help=f"a PNG; default: {file}")
    given = parser.parse_args()
    with refusals():
        try_folder(given.out.parent)
    poster(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
