"""Images with captions on disk: where they are, in which order they come, how they are cut to size.

    ImageFiles, Shards  where: single files; members of WebDataset tars, by offset
    Epochs, in_batches  which item has number i; batches of one shape, if asked
    upright, cut        one image as RGB, scaled to cover the size and cropped to it
    Images              the data set: sample i, or the next good one where it is bad

Knows nothing of devices and ranks. Several threads may call a data set at once.
"""

import io
import json
import math
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import Refusal
from schedule import generator

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
# What pillow raises on damaged files (flipping bytes shows most of them), and we on captions.
BAD = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
# A run ends when more than this share of the samples it has seen are bad. It is taken of so many at
# least, or of all there are: two early ones of the first 20 do not tell.
BAD_SHARE, BAD_OF = 0.05, 200


@dataclass
class Pairs:
    captions: list[str]
    images: Tensor | None  # (B, 3, H, W) in [-1, 1]
    sizes: Tensor | None = None  # (B, 6) original height, width; crop top, left; height, width


# --- where: single files -------------------------------------------------------------------------


class ImageFiles:
    """Image files, each with its caption or the text file that holds it."""

    def __init__(self, images: list[Path], captions: list[str | Path], faults: dict[str, str]):
        self.images, self.captions, self.faults = images, captions, faults

    def __len__(self) -> int:
        return len(self.images)

    def name(self, item: int) -> str:
        return str(self.images[item])

    def image(self, item: int, limit: int = -1) -> bytes:
        """The file, or its first `limit` bytes."""
        with open(self.images[item], "rb") as file:
            return file.read(limit)

    def caption(self, item: int) -> str:
        caption = self.captions[item]
        return read_text(caption) if isinstance(caption, Path) else caption

    def order(self, draw: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=draw)


def list_folder(path: Path) -> ImageFiles:
    """NAME.jpg (.jpeg, .png, .webp) with NAME.txt beside it, in any depth of folders."""
    files = set(path.rglob("*"))
    images = sorted(p for p in files if p.suffix.lower() in SUFFIXES)
    chosen = [p for p in images if p.with_suffix(".txt") in files]
    bare = len(images) - len(chosen)
    faults = {str(path): f"{bare} images without a caption"} if bare else {}
    return ImageFiles(chosen, [p.with_suffix(".txt") for p in chosen], faults)


IMAGE_FIELDS = ("image", "image_path", "path", "file_name")
CAPTION_FIELDS = ("caption", "prompt", "text")


def list_json(path: Path) -> ImageFiles:
    """Paths relative to the list. Raises ValueError that says what it must look like.

    An object of parallel lists, {"keys": [], "image_paths": [], "prompts": []} in the official
    code; a list of objects {"image": "a.jpg", "caption": "..."}; or such objects, one a line.
    """
    text = read_text(path)
    try:
        if path.suffix == ".json":
            entries = json.loads(text)
        else:
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise Refusal(f"{path} is not the JSON its name says ({error})") from None
    if isinstance(entries, dict):
        images = field(entries, [f"{name}s" for name in IMAGE_FIELDS])
        captions = field(entries, [f"{name}s" for name in CAPTION_FIELDS])
        sound = isinstance(images, list) and isinstance(captions, list)
        if not sound or len(images) != len(captions):
            raise Refusal(f"{path} needs lists of one length, image_paths and prompts")
    else:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Refusal(f'{path} needs objects {{"image": ..., "caption": ...}}')
        images = [field(entry, IMAGE_FIELDS) for entry in entries]
        captions = [field(entry, CAPTION_FIELDS) for entry in entries]
    for number, image in enumerate(images, 1):
        if not isinstance(image, str) or not image:
            raise Refusal(f"{path}: entry {number} names no image")
    captions = [caption if isinstance(caption, str) else "" for caption in captions]
    return ImageFiles([path.parent / image for image in images], captions, {})


def field(entry: dict, names: Iterable[str]):
    """The first of these fields that is there, or None."""
    return next((entry[name] for name in names if name in entry), None)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Refusal(f"{path} is no UTF-8 text") from None


# --- where: WebDataset shards --------------------------------------------------------------------

WINDOW = 4096  # samples shuffled among each other: reads stay within some hundred megabytes


class Shards:
    """Tars of KEY.jpg (.jpeg, .png, .webp) and KEY.txt, or KEY.json with a "caption".

    Nothing is unpacked: the headers are read once, then members by their offset. The index is
    arrays, since a data set may have millions of samples.
    """

    def __init__(self, paths: list[Path]):
        with ThreadPoolExecutor() as pool:
            shards = list(pool.map(index_shard, paths))
        self.paths = paths
        counts = torch.tensor([0, *(len(shard.keys) for shard in shards)])
        self.starts = counts.cumsum(0)  # of each shard's samples, and the end
        self.keys = np.concatenate([np.array(shard.keys, dtype="S") for shard in shards])
        rows = [np.array(shard.rows, dtype=np.int64).reshape(-1, 5) for shard in shards]
        self.rows = np.concatenate(rows)
        self.faults = {
            str(path): shard.fault for path, shard in zip(paths, shards, strict=True) if shard.fault
        }

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, item: int) -> str:
        return f"{self._path(item)}:{self.keys[item].decode()}"

    def image(self, item: int, limit: int = -1) -> bytes:
        """The member, or its first `limit` bytes."""
        start, size = self.rows[item, :2]
        return self._read(item, start, size if limit < 0 else min(size, limit))

    def caption(self, item: int) -> str:
        start, size, is_json = self.rows[item, 2:]
        try:
            text = self._read(item, start, size).decode("utf-8-sig")
            caption = field(json.loads(text), ("caption",)) if is_json else text
        except UnicodeDecodeError:
            raise ValueError("its caption is no UTF-8 text") from None
        except (json.JSONDecodeError, TypeError):
            raise ValueError("its .json is no JSON object") from None
        return caption.strip() if isinstance(caption, str) else ""

    def order(self, draw: torch.Generator) -> Tensor:
        """Shards in random order, then samples within windows of that."""
        runs = [
            torch.arange(self.starts[shard], self.starts[shard + 1])
            for shard in torch.randperm(len(self.paths), generator=draw)
        ]
        windows = torch.cat(runs).split(WINDOW)
        return torch.cat([w[torch.randperm(len(w), generator=draw)] for w in windows])

    def _path(self, item: int) -> Path:
        return self.paths[int(torch.searchsorted(self.starts, item, right=True)) - 1]

    def _read(self, item: int, start: int, size: int) -> bytes:
        with open(self._path(item), "rb") as file:
            file.seek(start)
            return file.read(size)


@dataclass
class Shard:
    """What is in one tar."""

    keys: list[bytes]
    rows: list[tuple[int, ...]]  # image offset, size; caption offset, size; is that one JSON
    fault: str  # "" if there is none


def index_shard(path: Path) -> Shard:
    """Of a damaged tar, what comes before the damage."""
    samples, bare, fault = {}, 0, ""
    try:
        with open(path, "rb") as file:
            for name, start, size in tar_members(file):
                folder, _, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                parts = samples.setdefault(f"{folder}/{key}".lstrip("/"), {})
                parts[suffix.lower()] = (start, size)
    except ValueError as error:
        fault = str(error)
    shard = Shard([], [], fault)
    for key, parts in samples.items():
        image = field(parts, [suffix[1:] for suffix in SUFFIXES])
        caption = field(parts, ("txt", "json"))
        if image and caption:
            shard.keys.append(key.encode())
            shard.rows.append((*image, *caption, "txt" not in parts))
        elif image:
            bare += 1
    if bare:
        shard.fault = f"{bare} images without a caption" + (f", {fault}" if fault else "")
    return shard


BLOCK = 512  # bytes: a tar is made of such


def tar_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar, from its headers alone.

    Raises ValueError where the tar is damaged; what came before is sound.
    """
    length, at, long_name = file.seek(0, io.SEEK_END), 0, ""
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):  # the end mark
            return
        if len(header) < BLOCK:
            raise ValueError("the tar ends early")
        # The checksum is the sum of the header's bytes, with its own eight taken as spaces.
        blank = header[:148] + b" " * 8 + header[156:]
        size, kind, start = octal(header[124:136]), header[156:157], at + BLOCK
        if sum(blank) != octal(header[148:156]) or size < 0:
            raise ValueError(f"the tar is damaged at byte {at}")
        if start + size > length:
            raise ValueError("the tar ends early")
        at = start + math.ceil(size / BLOCK) * BLOCK
        if kind == b"L":  # GNU: the next member's name, too long for its header
            long_name = file.read(size).rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":  # POSIX: likewise, among other things
            found = re.search(rb"\d+ path=([^\n]*)\n", file.read(size))
            long_name = found[1].decode(errors="replace") if found else ""
        else:
            name = header[:100].rstrip(b"\0")
            if header[257:263] == b"ustar\0" and header[345]:  # POSIX: the folder stands apart
                name = header[345:500].rstrip(b"\0") + b"/" + name
            if kind in (b"0", b"\0"):  # a file
                yield long_name or name.decode(errors="replace"), start, size
            long_name = ""


def octal(field: bytes) -> int:
    """A number of a tar header; -1 if it is none."""
    digits = field.strip(b"\0 ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else -1


def expand(pattern: str) -> list[Path]:
    """shards/{000..127}.tar -> its 128 paths."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [Path(pattern)]
    numbers = range(int(found[1]), int(found[2]) + 1)
    before, after, width = pattern[: found.start()], pattern[found.end() :], len(found[1])
    return [path for n in numbers for path in expand(f"{before}{n:0{width}d}{after}")]


# --- in which order ------------------------------------------------------------------------------


class Epochs:
    """Which of `length` items a sample number stands for: `order(draw)` lists an epoch's items."""

    def __init__(self, length: int, order: Callable[[torch.Generator], Tensor], seed: int):
        self.length, self.order, self.seed = length, order, seed
        self.recent: dict[int, Tensor] = {}

    def item(self, i: int) -> int:
        epoch, place = divmod(i, self.length)
        return int(self._of(epoch)[place])

    def _of(self, epoch: int) -> Tensor:
        known = self.recent.get(epoch)
        if known is None:  # two threads may both get here, and find the same
            known = self.order(generator("epoch", self.seed, epoch))
            self.recent = {n: o for n, o in self.recent.items() if abs(n - epoch) < 2}
            self.recent[epoch] = known
        return known


def bucket_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Heights and widths in multiples of 64, nearly the area of `size` and never above it, no side
    over twice the other; from wide to tall. For 1024 x 1024 they are among SDXL's own.
    """
    area = size[0] * size[1]
    least = math.ceil(math.sqrt(area / 2) / 64) * 64
    pairs = [(short, area // (64 * short) * 64) for short in range(least, math.isqrt(area) + 1, 64)]
    return sorted({*pairs, *(pair[::-1] for pair in pairs), size}, key=lambda s: s[0] / s[1])


def in_batches(order: Tensor, buckets: Tensor, batch: int) -> Tensor:
    """An epoch's order (N,) rearranged so that each `batch` in a row share a bucket: (M,), M >= N.

    buckets: of every item. The items, bucket after bucket but otherwise in their order, are cut
    into batches: one at the border of two buckets has items of both, and is cropped to the size of
    its middle one. So each item comes once an epoch; only the last batch is filled up, with items
    next to its own. Batches come in the order of their earliest items.
    """
    places = buckets[order].argsort(stable=True)
    n = torch.arange(math.ceil(len(order) / batch) * batch)
    n = torch.where(n < len(order), n, (n - batch) % len(order))
    batches = places[n].unflatten(0, (-1, batch))
    return order[batches[batches.amin(dim=1).argsort(stable=True)].flatten()]


# --- one image -----------------------------------------------------------------------------------


def upright(stored: bytes) -> Image.Image:
    """An image file as RGB, turned as its EXIF data says, what is transparent over white."""
    with Image.open(io.BytesIO(stored), formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cut(
    image: Image.Image, size: tuple[int, int], where: tuple[float, float]
) -> tuple[Tensor, tuple[int, ...]]:
    """The image scaled to cover `size`, cropped to it: (3, H, W) in [-1, 1], and its six sizes.

    where: the crop's place down and across, from 0 to below 1; .5 is the middle. Of the six sizes,
    as SDXL means them, the crop's are in pixels of the scaled image.
    """
    scale = max(size[0] / image.height, size[1] / image.width)
    spare = [int(side * scale - s + 1e-6) for side, s in zip(image.size[::-1], size, strict=True)]
    top, left = (int(u * (pixels + 1)) for u, pixels in zip(where, spare, strict=True))
    right = min(image.width, (left + size[1]) / scale)  # rounding must not lead out of the image
    bottom = min(image.height, (top + size[0]) / scale)
    box = (left / scale, top / scale, right, bottom)
    scaled = image.resize(size[::-1], Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.array(scaled)).movedim(-1, 0).float() / 127.5 - 1
    return pixels, (image.height, image.width, top, left, *size)


def aspect(source: ImageFiles | Shards, item: int) -> float:
    """Height over width, upright, from the start of the file if that tells; 1 where it is bad."""
    for limit in (1 << 16, -1):
        try:
            with Image.open(io.BytesIO(source.image(item, limit)), formats=FORMATS) as image:
                # PNG's own getexif would decode all of the image to look behind it
                turned = Image.Image.getexif(image).get(0x0112, 1) >= 5
                return image.width / image.height if turned else image.height / image.width
        except BAD:
            continue
    return 1.0


# --- the data set --------------------------------------------------------------------------------


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
        self.bad: dict[str, str] = dict(source.faults)  # name -> reason
        self.seen: set[int] = set()  # items
        self.said = 0  # how many of the bad have been named
        self.lock = threading.Lock()

    def __call__(self, ids: range | list[int]) -> Pairs:
        """Raises ValueError when too many samples are bad."""
        shapes = {self._size(i) for i in ids}
        assert len(shapes) == 1, f"a batch is of one size, {ids} are of {shapes}"
        captions, images, sizes = zip(*(self._sample(i, *shapes) for i in ids), strict=True)
        return Pairs(list(captions), torch.stack(images), torch.tensor(sizes))

    def remark(self) -> str:
        """What is new about bad samples, in one line, or ""."""
        with self.lock:
            news, self.said = list(self.bad.items())[self.said :], len(self.bad)
            if not news:
                return ""
            return f"bad data: {self._named(news)}; {self._count()} of {len(self.seen)} samples"

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
            if self.source.name(item) in self.bad:
                continue
            try:
                caption = self.source.caption(item)
                if not caption:
                    raise ValueError("its caption is empty")
                image = upright(self.source.image(item))
            except BAD as error:
                self._note(item, reason(error))
                continue
            self._note(item)
            return caption, *cut(image, size, where)
        raise Refusal(f"no sample can be read: {self._named(list(self.bad.items()))}")

    def _note(self, item: int, why: str = "") -> None:
        with self.lock:
            self.seen.add(item)
            if why:
                self.bad[self.source.name(item)] = why
            bad, seen = self._count(), len(self.seen)
            if bad > BAD_SHARE * max(seen, 20, min(BAD_OF, len(self.source))):
                named = self._named(list(self.bad.items()))
                raise Refusal(f"{bad} of {seen} samples are bad, repair or remove them: {named}")

    def _count(self) -> int:
        return len(self.bad) - len(self.source.faults)

    def _named(self, bad: list[tuple[str, str]]) -> str:
        """The first five."""
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        return ", ".join(f"{name} ({why})" for name, why in bad[:5]) + more


def reason(error: Exception) -> str:
    """What to say of a bad sample, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its own text names no file but an address
        return "no JPEG, PNG or WebP image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
