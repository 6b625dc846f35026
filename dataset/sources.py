"""The data set that --data names.

    open_data      images with captions (folders.py and shards.py have the forms), or captions alone
    Prompts        captions alone, the lines of a text file
    captions_of    captions alone, of any data set
    open_source    where the images are
    some_captions  a thousand, to look at
    Together       single files and shards of one folder

A data set is called with sample numbers and returns something with `captions`, `images`, (B, 3, H,
W) in [-1, 1] or None, and `sizes`, (B, 6) or None; `remark()` is what there is to say of bad
samples, and of what was passed over.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from config import Refusal, home
from dataset.captions import read_lines
from dataset.folders import ImageFiles, list_folder, list_json, look_through
from dataset.images import BAD_SHARE, Images, Pairs, named
from dataset.order import Epochs
from dataset.pixels import BAD
from dataset.shards import Shards, expand

FORMS = (
    "--data takes a folder of images with their captions in .txt files of the same names; a .json "
    "or .jsonl list of images and captions; WebDataset shards, as a folder of .tar files, one of "
    "them, or a pattern like 'shards/{000..127}.tar'; or a .txt file of prompts, one a line. "
    "To start without images: --data prompts.txt --no-gan, or --make-reals N"
)


class Prompts:
    """The lines of a text file."""

    def __init__(self, path: Path, seed: int):
        self.captions, faults = read_lines(path)
        self.bad = {f"{path}, line {number}": why for number, why in faults.items()}
        count, bad = len(self.captions), len(faults)
        if bad > BAD_SHARE * max(count + bad, 20) or bad and not count:
            raise Refusal(
                f"--data: {bad} of {count + bad} prompts are bad, repair or remove them: "
                f"{named(self.bad)}"
            )
        if not count:
            raise Refusal(f"--data {path} holds no prompt. {FORMS}")
        self.epochs = Epochs(count, lambda draw: torch.randperm(count, generator=draw), seed)
        self.said = not faults

    def __call__(self, ids: range | list[int]) -> Pairs:
        return Pairs([self.captions[self.epochs.item(i)] for i in ids], None)

    def remark(self) -> str:
        """Once, what lines were left out."""
        said, self.said = self.said, True
        return "" if said else f"bad data: {named(self.bad)}"


class Together:
    """Items of several sources, one after the other; an epoch mixes them."""

    def __init__(self, sources: list[ImageFiles | Shards]):
        self.sources = sources
        self.faults = {name: why for source in sources for name, why in source.faults.items()}

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def name(self, item: int) -> str:
        source, k = self._of(item)
        return source.name(k)

    def keys(self, items: range) -> Iterator[str]:
        for item in items:
            source, k = self._of(item)
            yield from source.keys(range(k, k + 1))

    def image(self, item: int, limit: int = -1) -> bytes:
        source, k = self._of(item)
        return source.image(k, limit)

    def caption(self, item: int) -> str:
        source, k = self._of(item)
        return source.caption(k)

    def order(self, draw: torch.Generator) -> Tensor:
        """Each source's own order, so that tars are read window by window; dealt out at random."""
        whose = torch.cat([torch.full((len(s),), k) for k, s in enumerate(self.sources)])
        whose = whose[torch.randperm(len(whose), generator=draw)]
        items, start = torch.empty_like(whose), 0
        for k, source in enumerate(self.sources):
            items[whose == k] = source.order(draw) + start
            start += len(source)
        return items

    def _of(self, item: int) -> tuple[ImageFiles | Shards, int]:
        for source in self.sources:
            if item < len(source):
                return source, item
            item -= len(source)
        raise IndexError(f"there are {len(self)} items")


def open_data(
    path: str,
    size: tuple[int, int],
    seed: int,
    crop: str = "centre",
    buckets: bool = False,
    batch: int = 1,
) -> Images | Prompts:
    """crop: "centre" | "random"; buckets: batches, of `batch` samples, of different aspect ratios.

    Raises ValueError or FileNotFoundError.
    """
    if crop not in ("centre", "random"):
        raise Refusal(f'--crop is "{crop}"; choose from centre, random')
    if buckets and (size[0] % 64 or size[1] % 64):
        raise Refusal(f"--size {size[0]} {size[1]}: with --buckets, sides are multiples of 64")
    if not path.strip():
        raise Refusal(f"--data is empty. {FORMS}")
    path = home(path)
    if Path(path).suffix.lower() == ".txt" and Path(path).is_file():
        return Prompts(Path(path), seed)
    source = open_source(path)
    if not len(source):
        why = f"; {named(source.faults)}" if source.faults else ""
        raise Refusal(f"--data {path} holds no image with a caption{why}. {FORMS}")
    return Images(source, size, seed, crop, buckets, batch)


def captions_of(data, count: int) -> list[str]:
    """At most `count` captions: of images, which are not looked at, in the order of their files;
    of any other data set those of its first samples."""
    if isinstance(data, Images):
        return list(islice(good_captions(data), count))
    return data(range(count)).captions


def good_captions(data: Images, every: int = 1) -> Iterator[str]:
    for item in range(0, len(data.source), every):
        with contextlib.suppress(*BAD):  # as in training, others take their place
            yield data.source.caption(item)


def some_captions(data: object, most: int = 1000) -> list[str]:
    """Evenly spread, without their images; none of what comes with the project."""
    if isinstance(data, Prompts):
        return data.captions[:: -(-len(data.captions) // most)]
    if not isinstance(data, Images):
        return []
    return [*good_captions(data, -(-len(data.source) // most))]


def open_source(path: str) -> ImageFiles | Shards | Together:
    where = Path(path)
    if where.is_dir():
        return open_folder(where)
    if where.suffix.lower() == ".tar":
        tars = [where] if where.is_file() else expand(path)
        missing = [tar for tar in tars if not tar.is_file()]
        if missing or not tars:
            first = f": {len(missing)} of {len(tars)} shards, first {missing[0]}" if tars else ""
            raise FileNotFoundError(f"--data {path} is missing, or no file{first}. {FORMS}")
        return Shards(tars)
    if not where.exists():
        raise FileNotFoundError(f"--data {path} is missing. {FORMS}")
    if where.suffix.lower() not in (".json", ".jsonl"):
        raise Refusal(f"--data {path} is none of these. {FORMS}")
    files = list_json(where)
    if len(files) and not any(image.is_file() for image in files.images[:20]):
        raise Refusal(
            f"--data {path}: {files.images[0]} is missing, and so are those listed next; "
            "paths are relative to the list"
        )
    return files


def open_folder(where: Path) -> ImageFiles | Shards | Together:
    """Its single files, its tars, or both."""
    found = look_through(where)
    files = list_folder(where, found)
    if not found.tars:
        return files
    shards = Shards(found.tars)
    both = Together([files, shards])
    for source in (shards, files):  # alone, its order is what it is without what is passed over
        if len(source) == len(both):
            source.faults = both.faults
            return source
    return both
