"""Captions and images.

    DigitScenes   the embedded task: two real handwritten digits, coloured, side by side or stacked,
                  with a caption that names some attributes and leaves others open
    Prompts       captions alone; images with captions are in images.py
    open_data     the one that --data names
    Ahead         its batches, read by threads while the networks learn

Sample i of a data set is a function of (seed, i) alone, so nothing needs saving to resume, and any
number of ranks and threads sees the same samples: `batch_ids` deals them out. A data set is called
with sample numbers and returns something with `captions`, `images`, (B, 3, H, W) in [-1, 1] or
None, and `sizes`, (B, 6) or None; `remark()` is what there is to say of bad samples.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from images import (
    Epochs,
    ImageFiles,
    Images,
    Pairs,
    Shards,
    expand,
    list_folder,
    list_json,
    read_text,
)
from nets.text import ANY_DIGIT, COLOURS, DIGITS, WORD_ID, attributes
from schedule import generator

ASSETS = Path(__file__).parent / "assets"
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
HORIZONTAL, VERTICAL = 0, 1
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


def batch_ids(step: int, batch: int, rank: int = 0, world: int = 1) -> range:
    """The global sample numbers of this rank's batch.

    Disjoint over ranks and steps, without gaps.
    """
    start = (step * world + rank) * batch
    return range(start, start + batch)


# --- the embedded task ---------------------------------------------------------------------------


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
        self.by_digit = [(labels[part] == d).nonzero()[:, 0] for d in range(10)]
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
        wanted = zip(*attributes(ids), u, strict=True)
        fitting = [[self._fitting(c[k], d[k], row[k]) for k in range(2)] for c, d, row in wanted]
        colours, digits = torch.stack([torch.stack(pair) for pair in fitting]).unbind(-1)  # (B, 2)
        either = ids[:, 2] == WORD_ID["and"]
        arrangement = torch.where(either, (4 * u[:, 3]).long(), 2 * (ids[:, 2] == WORD_ID["above"]))
        return self._draw(colours, digits, arrangement, u, jitter)

    def _choices(self, purpose: str, ids: range | list[int]) -> tuple[Tensor, Tensor]:
        """All random numbers of each scene: uniform (B, 16), and the jitter of its colours."""
        draws = [generator(purpose, self.seed, i) for i in ids]
        u = torch.stack([torch.rand(16, generator=g) for g in draws])
        return u, torch.stack([torch.randn(2, 3, generator=g) for g in draws])

    def _fitting(self, colour: Tensor, digit: Tensor, u: Tensor) -> Tensor:
        """A (colour, digit) pair that fits what is named of an object."""
        fits = (colour < 0) | (self.pairs[:, 0] == colour)
        fits &= (digit == len(DIGITS)) | (self.pairs[:, 1] == digit)
        pairs = self.pairs[fits]
        return pairs[int(u * len(pairs))]

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
        canvas = torch.zeros(len(u), 3, self.size, self.size)
        for b in range(len(u)):
            offset = 4 * int(u[b, 8] * 3)  # across the axis: 0, 4 or 8
            for k in range(2):
                choices = self.by_digit[digits[b, k]]
                digit = self.images[choices[int(u[b, 9 + k] * len(choices))]]  # (8, 8)
                colour = (RGB[colours[b, k]] * (1 + 0.06 * jitter[b, k])).clamp(0, 1)
                second = k ^ (int(arrangement[b]) % 2)  # object 1 is, when right or below
                along = 8 * second
                row, column = (offset, along) if arrangement[b] < 2 else (along, offset)
                canvas[b, :, row : row + 8, column : column + 8] = colour[:, None, None] * digit
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
        raise ValueError(
            f"{path} is missing or damaged ({error}); restore it with: git checkout assets"
        ) from None
    if images.shape != (1797, 8, 8) or labels.shape != (1797,):
        raise ValueError(
            f"{path} does not hold the 1,797 digits; restore it with: git checkout assets"
        )
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()


# --- images and captions of one's own ------------------------------------------------------------

FORMS = (
    "--data takes a folder of images with their captions in .txt files of the same names; a .json "
    "or .jsonl list of images and captions; WebDataset shards, as a folder of .tar files, one of "
    "them, or a pattern like 'shards/{000..127}.tar'; or a .txt file of prompts, one a line. "
    "To start without images: --data prompts.txt --no-gan"
)


class Prompts:
    """The lines of a text file."""

    def __init__(self, path: Path, seed: int):
        self.captions = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not self.captions:
            raise ValueError(f"--data {path} holds no prompt. {FORMS}")
        count = len(self.captions)
        self.epochs = Epochs(count, lambda draw: torch.randperm(count, generator=draw), seed)

    def __call__(self, ids: range | list[int]) -> Pairs:
        return Pairs([self.captions[self.epochs.item(i)] for i in ids], None)

    def remark(self) -> str:
        return ""


def open_data(
    teacher: str,
    path: str,
    size: tuple[int, int],
    seed: int,
    crop: str = "centre",
    buckets: bool = False,
    batch: int = 1,
) -> DigitScenes | Images | Prompts:
    """crop: "centre" | "random"; buckets: batches, of `batch` samples, of different aspect ratios.

    Raises ValueError or FileNotFoundError.
    """
    if teacher == "digits":
        return DigitScenes(seed)
    if crop not in ("centre", "random"):
        raise ValueError(f'--crop is "{crop}"; choose from centre, random')
    if buckets and (size[0] % 64 or size[1] % 64):
        raise ValueError(f"--size {size[0]} {size[1]}: with --buckets, sides are multiples of 64")
    if Path(path).suffix == ".txt" and Path(path).is_file():
        return Prompts(Path(path), seed)
    source = open_source(path)
    if not len(source):
        broken = "".join(f"; {name}: {why}" for name, why in list(source.faults.items())[:5])
        raise ValueError(f"--data {path} holds no image with a caption{broken}. {FORMS}")
    return Images(source, size, seed, crop, buckets, batch)


def open_source(path: str) -> ImageFiles | Shards:
    where = Path(path)
    if where.is_dir():
        tars = sorted(where.glob("*.tar"))
        return Shards(tars) if tars else list_folder(where)
    if where.suffix == ".tar":
        tars = expand(path)
        missing = [tar for tar in tars if not tar.is_file()]
        if missing or not tars:
            first = f": {len(missing)} of {len(tars)} shards, first {missing[0]}" if tars else ""
            raise FileNotFoundError(f"--data {path} is missing{first}. {FORMS}")
        return Shards(tars)
    if not where.exists():
        raise FileNotFoundError(f"--data {path} is missing. {FORMS}")
    if where.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--data {path} is none of these. {FORMS}")
    files = list_json(where)
    if len(files) and not any(image.is_file() for image in files.images[:20]):
        raise ValueError(
            f"--data {path}: {files.images[0]} is missing, and so are those listed next; "
            "paths are relative to the list"
        )
    return files


# --- reading ahead -------------------------------------------------------------------------------


class Ahead:
    """The batches of these steps, in order; `workers` threads read two batches each in advance.

        with Ahead(data, ids_of_step, workers, range(first, last)) as batches:
            for batch in batches:

    Threads suffice: pillow decodes and scales outside of the interpreter's lock. Without workers
    each batch is read when asked for. An error comes with the batch it belongs to.
    """

    def __init__(
        self,
        data: Callable[[range], Pairs | Scenes],
        ids_of_step: Callable[[int], range],
        workers: int,
        steps: Iterable[int],
    ):
        self.data, self.ids_of_step, self.steps = data, ids_of_step, iter(steps)
        self.pool = ThreadPoolExecutor(workers, "data") if workers else None
        self.waiting: deque[Future] = deque()
        for _ in range(2 * workers):
            self._ask()

    def __iter__(self) -> Iterator[Pairs | Scenes]:
        return self

    def __next__(self) -> Pairs | Scenes:
        if self.pool is None:
            return self.data(self.ids_of_step(next(self.steps)))
        if not self.waiting:
            raise StopIteration
        batch = self.waiting.popleft().result()
        self._ask()
        return batch

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        """Returns when no thread is left: what is being read is finished, what waits is dropped."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
            self.waiting.clear()

    def _ask(self) -> None:
        step = next(self.steps, None)
        if step is not None:
            self.waiting.append(self.pool.submit(self.data, self.ids_of_step(step)))
