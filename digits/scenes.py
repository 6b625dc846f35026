"""The embedded task's scenes: two real handwritten digits, coloured, side by side or stacked.

    DigitScenes   scenes by number, each with a caption that names some attributes and leaves others
                  open; scene i is a function of (seed, i) alone
    load_digits   the handwriting

A data set like those of dataset/: called with sample numbers, it returns captions and images.
"""

from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from config import Refusal
from digits import ASSETS
from digits.words import ANY_DIGIT, COLOURS, DIGITS, WORD_ID, attributes
from schedule import generator

HORIZONTAL, VERTICAL = 0, 1
RGB = torch.tensor(  # in the order of COLOURS
    [
        [1.0, 0.15, 0.15],
        [1.0, 0.85, 0.1],
        [0.2, 0.9, 0.2],
        [0.1, 0.85, 0.9],
        [0.25, 0.35, 1.0],
        [1.0, 0.35, 0.8],
    ]
)
# Where the caption's first object is, seen from its second.
ARRANGEMENTS = ("left", "right", "above", "below")
# (colour, digit) pairs never trained on.
HELD_OUT = {(c, (3 * c + 1) % 10) for c in range(len(COLOURS))}
TRAIN_DIGITS = 1437  # of 1,797; the rest are held out
OPEN = {  # share of captions that leave open: a colour, a digit, the relation
    "some": (0.4, 0.5, 0.3),
    "all": (0.0, 0.0, 0.0),
    "digits": (1.0, 0.0, 1.0),
}


@dataclass
class Scenes:
    """What is in B scenes. Objects are in caption order."""

    colours: Tensor  # (B, 2) indices into COLOURS
    digits: Tensor  # (B, 2) 0..9
    arrangement: Tensor  # (B,) index into ARRANGEMENTS
    captions: list[str]
    images: Tensor  # (B, 3, 16, 16) in [-1, 1], black ground
    sizes: None = None  # whole, as they are

    @property
    def axis(self) -> Tensor:
        """(B,) HORIZONTAL or VERTICAL."""
        return self.arrangement // 2

    @property
    def by_place(self) -> tuple[Tensor, Tensor]:
        """Colours and digits (B, 2) each, the left or upper object first."""
        swapped = (self.arrangement % 2).bool()[:, None]
        return (
            torch.where(swapped, self.colours.flip(1), self.colours),
            torch.where(swapped, self.digits.flip(1), self.digits),
        )


class DigitScenes:
    """Scenes by number.

    handwriting: "train" or "held-out" images; pairs: "seen", "held-out" or "all" (colour, digit)
    pairs; say: captions name "some" attributes, as in training, "all", or the two "digits" alone.
    """

    size = 16  # pixels

    def __init__(
        self, seed: int = 0, handwriting: str = "train", pairs: str = "seen", say: str = "some"
    ):
        images, labels = load_digits()
        part = slice(0, TRAIN_DIGITS) if handwriting == "train" else slice(TRAIN_DIGITS, None)
        self.images = images[part]  # (N, 8, 8) in [0, 1]
        self.by_digit = labels[part].argsort(stable=True)  # which images are of a zero, a one, ...
        self.counts = labels[part].bincount(minlength=10)
        every = {(c, d) for c in range(len(COLOURS)) for d in range(10)}
        wanted = {"seen": every - HELD_OUT, "held-out": HELD_OUT, "all": every}[pairs]
        self.pairs = torch.tensor(sorted(wanted))
        self.seed, self.open = seed, OPEN[say]

    def __call__(self, ids: range | list[int]) -> Scenes:
        u, jitter = self._choices("scene", ids)
        pairs = self.pairs[(u[:, 0:2] * len(self.pairs)).long()]  # (B, 2, 2)
        colours, digits = pairs[..., 0], pairs[..., 1]
        named_relation = u[:, 2] >= self.open[2]
        arrangement = torch.where(named_relation, 2 * (u[:, 3] * 2).long(), (u[:, 3] * 4).long())
        captions = [
            self._caption(*row)
            for row in zip(colours, digits, arrangement, named_relation, u, strict=True)
        ]
        images = self._draw(colours, digits, arrangement, u, jitter)
        return Scenes(colours, digits, arrangement, captions, images)

    def remark(self) -> str:
        return ""

    def matching(self, ids: Tensor) -> Tensor:
        """An image of a scene that fits, for each of the captions ids (B, 5): (B, 3, 16, 16)."""
        u, jitter = self._choices("matching", range(len(ids)))
        named_colours, named_digits = (named[..., None] for named in attributes(ids))  # (B, 2, 1)
        fits = (named_colours < 0) | (self.pairs[:, 0] == named_colours)
        fits &= (named_digits == len(DIGITS)) | (self.pairs[:, 1] == named_digits)
        which = (u[:, :2] * fits.sum(-1)).long()[..., None]  # of those that fit, counted from 0
        first = (fits.cumsum(-1) > which).int().argmax(-1)
        colours, digits = self.pairs[first].unbind(-1)  # (B, 2)
        either = ids[:, 2] == WORD_ID["and"]
        arrangement = torch.where(either, (4 * u[:, 3]).long(), 2 * (ids[:, 2] == WORD_ID["above"]))
        return self._draw(colours, digits, arrangement, u, jitter)

    def _choices(self, purpose: str, ids: range | list[int]) -> tuple[Tensor, Tensor]:
        """All random numbers of each scene: uniform (B, 16), and the jitter of its colours."""
        draws = [generator(purpose, self.seed, i) for i in ids]
        u = torch.stack([torch.rand(16, generator=g) for g in draws])
        return u, torch.stack([torch.randn(2, 3, generator=g) for g in draws])

    def _caption(
        self, colours: Tensor, digits: Tensor, arrangement: Tensor, relation: Tensor, u: Tensor
    ) -> str:
        say_colour, say_digit = u[4:6] >= self.open[0], u[6:8] >= self.open[1]
        objects = []
        for k in range(2):
            words = [COLOURS[colours[k]]] if say_colour[k] else []
            words.append(DIGITS[digits[k]] if say_digit[k] else ANY_DIGIT)
            objects.append(("an " if words[0] == "eight" else "a ") + " ".join(words))
        between = {0: "left of", 2: "above"}[arrangement.item()] if relation else "and"
        return f"{objects[0]} {between} {objects[1]}"

    def _draw(
        self, colours: Tensor, digits: Tensor, arrangement: Tensor, u: Tensor, jitter: Tensor
    ) -> Tensor:
        canvas, pixels = torch.zeros(len(u), 3, self.size, self.size), torch.arange(8)
        which = (u[:, 9:11] * self.counts[digits]).long()  # of the images of a digit
        first = self.counts.cumsum(0) - self.counts
        shapes = self.images[self.by_digit[first[digits] + which]]  # (B, 2, 8, 8)
        paint = (RGB[colours] * (1 + 0.06 * jitter)).clamp(0, 1)  # (B, 2, 3)
        second = torch.arange(2) ^ (arrangement % 2)[:, None]  # object 1 is, when right or below
        along, across = 8 * second, 4 * (u[:, 8:9] * 3).long()  # across the axis: 0, 4 or 8
        beside = (arrangement < 2)[:, None]
        row, column = torch.where(beside, across, along), torch.where(beside, along, across)
        rows = row[..., None, None] + pixels[:, None]  # (B, 2, 8, 1)
        columns = column[..., None, None] + pixels
        scene = torch.arange(len(u))[:, None, None, None]
        canvas[scene, :, rows, columns] = shapes[..., None] * paint[:, :, None, None]
        return 2 * canvas - 1


def load_digits() -> tuple[Tensor, Tensor]:
    """The UCI optical digits, images (1797, 8, 8) in [0, 1] and labels (1797,).

    Raises ValueError if the file is missing or damaged.
    """
    path = ASSETS / "digits.npz"
    try:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise Refusal(
            f"{path} is missing or damaged ({error}); restore it with: git checkout assets"
        ) from None
    if images.shape != (1797, 8, 8) or labels.shape != (1797,):
        raise Refusal(
            f"{path} does not hold the 1,797 digits; restore it with: git checkout assets"
        )
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
