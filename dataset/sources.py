"""The data set that --data names.

    open_data     images with captions (folders.py and shards.py have the forms), or captions alone
    Prompts       captions alone, the lines of a text file
    open_source   where the images are

A data set is called with sample numbers and returns something with `captions`, `images`, (B, 3, H,
W) in [-1, 1] or None, and `sizes`, (B, 6) or None; `remark()` is what there is to say of bad
samples.
"""

from pathlib import Path

import torch

from config import Refusal
from dataset.captions import read_text
from dataset.folders import ImageFiles, list_folder, list_json
from dataset.images import Images, Pairs
from dataset.order import Epochs
from dataset.shards import Shards, expand

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
            raise Refusal(f"--data {path} holds no prompt. {FORMS}")
        count = len(self.captions)
        self.epochs = Epochs(count, lambda draw: torch.randperm(count, generator=draw), seed)

    def __call__(self, ids: range | list[int]) -> Pairs:
        return Pairs([self.captions[self.epochs.item(i)] for i in ids], None)

    def remark(self) -> str:
        return ""


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
    if Path(path).suffix == ".txt" and Path(path).is_file():
        return Prompts(Path(path), seed)
    source = open_source(path)
    if not len(source):
        broken = "".join(f"; {name}: {why}" for name, why in list(source.faults.items())[:5])
        raise Refusal(f"--data {path} holds no image with a caption{broken}. {FORMS}")
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
        raise Refusal(f"--data {path} is none of these. {FORMS}")
    files = list_json(where)
    if len(files) and not any(image.is_file() for image in files.images[:20]):
        raise Refusal(
            f"--data {path}: {files.images[0]} is missing, and so are those listed next; "
            "paths are relative to the list"
        )
    return files
