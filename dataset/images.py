"""Images with captions on disk, by sample number.

    Pairs    what a data set gives
    aspect   the shape of an image, from its first bytes
    Images   the data set: sample i, or the next good one where it is bad

Where they are: folders.py, shards.py; which item has number i: order.py; one image: pixels.py.
Knows nothing of devices and ranks. Several threads may call a data set at once.
"""

import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from config import Refusal, legible
from dataset.folders import ImageFiles
from dataset.order import Epochs, bucket_sizes, in_batches
from dataset.pixels import BAD, FORMATS, cut, reason, upright
from dataset.shards import Shards
from schedule import generator

# A run ends when more than this share of the samples it has seen are bad. It is taken of so many at
# least, or of all there are: two early ones of the first 20 do not tell.
BAD_SHARE, BAD_OF = 0.05, 200


@dataclass
class Pairs:
    captions: list[str]
    images: Tensor | None  # (B, 3, H, W) in [-1, 1]
    sizes: Tensor | None = None  # (B, 6) original height, width; crop top, left; height, width


def aspect(source: ImageFiles | Shards, item: int) -> float:
    """Height over width, upright, from the start of the file if that tells; 1 where it is bad."""
    for limit in (1 << 16, -1):
        try:
            stored = source.image(item, limit)
            with Image.open(io.BytesIO(stored), formats=FORMATS) as image:
                if image.format == "TIFF":  # whose size pillow turns before or after it is decoded
                    image = upright(source.image(item))
                    return image.height / image.width
                # PNG's own getexif would decode all of the image to look behind it
                turned = Image.Image.getexif(image).get(0x0112, 1) >= 5
                return image.width / image.height if turned else image.height / image.width
        except BAD:
            continue
    return 1.0


class Images:
    """Images and captions by sample number.

    Sample i is a function of (seed, i) alone; with buckets of (seed, batch, i), and each call is
    then for the numbers k batch ... (k + 1) batch - 1, all of one size. A bad sample is replaced
    by the next good one and noted in `bad`; so are damaged tars and missing captions.
    """

    def __init__(
        self,
        source: ImageFiles | Shards,
        size: tuple[int, int],
        seed: int,
        crop: str = "centre",
        buckets: bool = False,
        batch: int = 1,
    ):
        self.source, self.size, self.seed, self.crop, self.batch = source, size, seed, crop, batch
        self.sizes = self.buckets = None  # the sizes to choose from; each item's choice
        if buckets:
            self.sizes = bucket_sizes(size)
            with ThreadPoolExecutor() as pool:
                aspects = list(pool.map(lambda item: aspect(source, item), range(len(source))))
            choices = torch.tensor([height / width for height, width in self.sizes])
            distance = (torch.tensor(aspects).log()[:, None] - choices.log()).abs()
            self.buckets = distance.argmin(dim=1)
        length = math.ceil(len(source) / batch) * batch if buckets else len(source)
        self.epochs = Epochs(length, self._order, seed)
        self.bad_items: dict[int, str] = {}  # why; a file may be several items, some of them good
        self.seen: set[int] = set()  # items
        self.said = -1  # how many of the bad have been named; -1: nor what was passed over
        self.lock = threading.Lock()

    def __call__(self, ids: range | list[int]) -> Pairs:
        """Raises ValueError when too many samples are bad."""
        shapes = {self._size(i) for i in ids}
        assert len(shapes) == 1, f"a batch is of one size, {ids} are of {shapes}"
        captions, images, sizes = zip(*(self._sample(i, *shapes) for i in ids), strict=True)
        return Pairs(list(captions), torch.stack(images), torch.tensor(sizes))

    @property
    def bad(self) -> dict[str, str]:
        """By name: what was passed over, damaged tars, bad samples; why."""
        return self.source.faults | {self.source.name(k): why for k, why in self.bad_items.items()}

    def remark(self) -> str:
        """What is new about bad samples, in one line, or ""."""
        with self.lock:
            first, news = self.said < 0, list(self.bad_items)[max(self.said, 0) :]
            self.said = len(self.bad_items)
            passed = self.source.faults if first else {}
            parts = {"passed over": passed, "bad data": self._why(news)}
            told = [f"{title}: {named(found)}" for title, found in parts.items() if found]
            if told and self.seen:
                told.append(f"{len(self.bad_items)} of {len(self.seen)} samples are bad")
            return "; ".join(told)

    def _order(self, draw: torch.Generator) -> Tensor:
        order = self.source.order(draw)
        return order if self.buckets is None else in_batches(order, self.buckets, self.batch)

    def _size(self, i: int) -> tuple[int, int]:
        if self.buckets is None:
            return self.size
        middle = i // self.batch * self.batch + self.batch // 2
        return self.sizes[self.buckets[self.epochs.item(middle)]]

    def _sample(self, i: int, size: tuple[int, int]) -> tuple[str, Tensor, tuple[int, ...]]:
        where = (0.5, 0.5)
        if self.crop == "random":
            where = torch.rand(2, generator=generator("crop", self.seed, i)).tolist()
        for k in range(i, i + self.epochs.length):
            item = self.epochs.item(k)
            if item in self.bad_items:
                continue
            try:
                caption = self.source.caption(item)
                image = upright(self.source.image(item))
            except BAD as error:
                self._note(item, reason(error))
                continue
            self._note(item)
            return caption, *cut(image, size, where)
        raise Refusal(f"no sample can be read: {named(self.bad)}")

    def _note(self, item: int, why: str = "") -> None:
        with self.lock:
            self.seen.add(item)
            if why:
                self.bad_items[item] = why
            bad, seen = len(self.bad_items), len(self.seen)
            if bad > BAD_SHARE * max(seen, 20, min(BAD_OF, len(self.source))):
                which = named(self._why(list(self.bad_items)))
                raise Refusal(f"{bad} of {seen} samples are bad, repair or remove them: {which}")

    def _why(self, items: list[int]) -> dict[str, str]:
        """By name, of bad items."""
        return {self.source.name(item): self.bad_items[item] for item in items}


def named(bad: dict[str, str]) -> str:
    """The first five, as they may be shown."""
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return ", ".join(f"{legible(name)} ({why})" for name, why in list(bad.items())[:5]) + more
