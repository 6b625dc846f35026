"""WebDataset shards: tars of images and captions, read in place.

Shards        items by number: an image, its caption, its name
samples_of    which members of a tar belong together
tar_members   where the files of a tar are
expand        the paths of a pattern
"""

import io
import math
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from config import Refusal
from dataset.captions import (
    LARGEST_JSON,
    LONGEST,
    PARTS,
    TEXTS,
    as_text,
    caption_of,
    first_of,
    is_blank,
    json_caption,
)
from dataset.files import by_suffix, check_length, counted, is_hidden
from dataset.pixels import LARGEST, SUFFIXES

WINDOW = 4096  # samples shuffled among each other: reads stay within some hundred megabytes
Place = tuple[int, int]  # in a tar: offset and size


class Shards:
    """Tars of KEY.jpg (or another suffix of images) and KEY.txt, or KEY.json with a "caption".

    Nothing is unpacked: the headers are read once, then members by their offset. The index is
    arrays, since a data set may have millions of samples.
    """

    def __init__(self, paths: list[Path]):
        with ThreadPoolExecutor() as pool:
            shards = list(pool.map(index_shard, paths))
        self.paths = paths
        counts = (len(shard.keys) for shard in shards)
        self.starts = [0, *accumulate(counts)]  # of each shard's samples, and the end
        every = [key for shard in shards for key in shard.keys]
        self.names = b"".join(every)
        self.ends = np.cumsum([len(key) for key in every], dtype=np.int64)
        rows = [np.array(shard.rows, dtype=np.int64).reshape(-1, 6) for shard in shards]
        self.rows = np.concatenate(rows)
        self.faults = faults_of(paths, shards)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, item: int) -> str:
        return f"{self._path(item)}:{self._key(item)}"

    def keys(self, items: range) -> Iterator[str]:
        """Their names wherever the tars lie."""
        for item in items:
            yield f"{self._path(item).name}:{self._key(item)}"

    def image(self, item: int, limit: int = -1) -> bytes:
        """The member, or its first `limit` bytes."""
        return self._read(item, self.rows[item, :2], LARGEST, limit)

    def caption(self, item: int) -> str:
        """Of the text beside it; where that is blank or not there, of the JSON's field."""
        text, stored = self.rows[item, 2:4], self.rows[item, 4:]
        caption = ""
        if text[1] >= 0:
            caption = as_text(self._read(item, text, 4 * LONGEST, what="its caption"))
        if stored[1] < 0 or not is_blank(caption):
            return caption_of(caption)
        return json_caption(as_text(self._read(item, stored, LARGEST_JSON, what="its .json")))

    def order(self, draw: torch.Generator) -> Tensor:
        """Shards in random order, then samples within windows of that."""
        runs = [
            torch.arange(self.starts[shard], self.starts[shard + 1])
            for shard in torch.randperm(len(self.paths), generator=draw)
        ]
        windows = torch.cat(runs).split(WINDOW)
        return torch.cat([w[torch.randperm(len(w), generator=draw)] for w in windows])

    def _path(self, item: int) -> Path:
        return self.paths[bisect_right(self.starts, item) - 1]

    def _key(self, item: int) -> str:
        first = self.ends[item - 1] if item else 0
        return as_name(self.names[first : self.ends[item]])

    def _read(
        self, item: int, place: np.ndarray, most: int, limit: int = -1, what: str = "it"
    ) -> bytes:
        start, size = place.tolist()
        check_length(size, most, what)
        with open(self._path(item), "rb") as file:
            file.seek(start)
            return file.read(size if limit < 0 else min(size, limit))


@dataclass
class Shard:
    """What is in one tar."""

    keys: list[bytes] = field(default_factory=list)
    # Offset and size of image, text and JSON; -1 of what is not there.
    rows: list[tuple[int, ...]] = field(default_factory=list)
    passed: Counter = field(default_factory=Counter)  # what is in no sample, by reason
    fault: str = ""  # "" if there is none


def faults_of(paths: list[Path], shards: list[Shard]) -> dict[str, str]:
    """By tar what is wrong with it; what was passed over is counted over all of them."""
    total, where = Counter(), [k for k, shard in enumerate(shards) if shard.passed]
    for shard in shards:
        total += shard.passed
    faults = {}
    if len(where) > 1:
        faults[f"{len(where)} tars, {paths[where[0]]} and others"] = counted(total)
    for k, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        words = [counted(total)] if where == [k] else []
        words += [shard.fault] if shard.fault else []
        faults |= {str(path): ", ".join(words)} if words else {}
    return faults


def index_shard(path: Path) -> Shard:
    """Of a damaged tar, what comes before the damage."""
    shard, members = Shard(), []
    try:
        with open(path, "rb") as file:
            for member in tar_members(file, shard.passed):
                members.append(member)
    except ValueError as error:
        shard.fault = str(error)
    for key, *places in samples_of(members, shard.passed):
        shard.keys.append(key.encode(errors="surrogateescape"))
        shard.rows.append(tuple(x for place in places for x in place))
    shard.passed = +shard.passed  # those that are more than none
    return shard


# --- which members belong together ---------------------------------------------------------------

NONE = (-1, -1)  # a place that is not there
Sample = tuple[str, Place, Place, Place]  # key; image, text, JSON


def samples_of(members: Iterable[tuple[str, int, int]], passed: Counter) -> list[Sample]:
    """Members of one name but for the suffix; else those of one name up to its first dot.

    Names may have dots (22.05.png, 22.05.txt), and WebDataset lets parts have their own
    (7.image.png, 7.caption.txt).
    """
    by_stem: dict[str, dict[str, Place]] = {}
    for name, start, size in members:
        *folders, base = (part for part in name.split("/") if part not in ("", "."))
        stem, suffix = os.path.splitext("/".join((*folders, base)))
        known = suffix.lower() in (*SUFFIXES, *PARTS)
        if any(map(is_hidden, (*folders, base))):
            passed["hidden or system files"] += known
        elif known:
            by_stem.setdefault(stem, {})[suffix.lower()] = start, size
        else:
            passed[by_suffix(suffix)] += 1
    samples, rest = [], {}
    for stem, parts in by_stem.items():
        if sample := one_sample(stem, parts):
            samples.append(sample)
            passed["images beside another of the same name"] += len(parts.keys() & SUFFIXES) - 1
        else:
            rest.setdefault(key_of(stem), []).extend(parts.items())
    taken = {key_of(stem) for stem, *_ in samples}
    for key, parts in rest.items():
        alone = dict(parts)
        sure = key not in taken and len(alone) == len(parts) and len(alone.keys() & SUFFIXES) == 1
        if sample := one_sample(key, alone) if sure else None:
            samples.append(sample)
            continue
        for suffix, _ in parts:
            why = "captions without an image" if suffix in TEXTS else by_suffix(suffix)
            passed["images without a caption" if suffix in SUFFIXES else why] += 1
    return sorted(samples, key=lambda sample: min(x for x, size in sample[1:] if size >= 0))


def key_of(stem: str) -> str:
    """As WebDataset has it: up to the first dot of a name."""
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.split(".")[0]


def one_sample(key: str, parts: dict[str, Place]) -> Sample | None:
    """Of parts by suffix; None without an image or a caption."""
    image, text = first_of(parts, SUFFIXES), first_of(parts, TEXTS)
    stored = parts.get(".json")
    if not image or not (text or stored):
        return None
    return key, image, text or NONE, stored or NONE


# --- a tar ---------------------------------------------------------------------------------------

BLOCK = 512  # bytes: a tar is made of such
MOST_NAME = 2**20  # bytes of what stands before a member: its long name and other records
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass
class Header:
    name: bytes
    size: int
    kind: bytes  # "0": a file
    link: bytes  # what a link leads to
    sparse: bool  # blocks of its map follow


def read_header(block: bytes, at: int) -> Header:
    """ValueError where the tar is damaged."""
    # The checksum is the sum of the header's bytes, with its own eight taken as spaces; some add
    # them as signed ones.
    blank = block[:148] + b" " * 8 + block[156:]
    signed = sum(blank) - 256 * sum(x > 127 for x in blank)
    size = number(block[124:136])
    if number(block[148:156]) not in (sum(blank), signed) or size < 0:
        packed = ": it is compressed, unpack it" if block.startswith(PACKED) and at == 0 else ""
        raise ValueError(f"the tar is damaged at byte {at}{packed}")
    name, link = (block[a : a + 100].split(b"\0")[0] for a in (0, 157))
    if block[257:263] == b"ustar\0" and block[345]:  # POSIX: the folder stands apart
        name = block[345:500].split(b"\0")[0] + b"/" + name
    return Header(name, size, block[156:157], link, block[482] != 0)


def tar_members(file: BinaryIO, passed: Counter | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar, from its headers alone; of a link, those of the
    file it leads to.

    passed: what is no file and no folder is counted there. Raises ValueError where the tar is
    damaged; what came before is sound.
    """
    passed = Counter() if passed is None else passed
    length, at, more, links = file.seek(0, io.SEEK_END), 0, {}, []
    places: dict[str, Place] = {}
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):  # the end mark
            break
        if len(block) < BLOCK:
            raise ValueError("the tar ends early")
        head, start = read_header(block, at), at + BLOCK
        long = head.kind in (b"L", b"K", b"x", b"g")
        size = head.size if long else more.get("size", head.size)
        if start + size > length:
            raise ValueError("the tar ends early")
        if long and size > MOST_NAME:
            raise ValueError(f"the tar is damaged at byte {at}: a name of {size} bytes")
        while head.kind == b"S" and head.sparse:  # its map goes on in blocks of its own
            block = file.read(BLOCK)
            head.sparse, start = block[504:505] not in (b"", b"\0"), start + BLOCK
        at = start + math.ceil(size / BLOCK) * BLOCK
        if long:
            more |= records(head.kind, file.read(size), start)
            continue
        name = as_name(more.get("path", head.name)).removeprefix("./")
        to = as_name(more.get("linkpath", head.link))
        kind = b"S" if "sparse" in more else head.kind
        more = {}
        if kind in (b"0", b"\0", b"7") and not name.endswith("/"):  # the oldest folders end so
            places[name] = start, size
            yield name, start, size
        elif kind in (b"1", b"2"):
            near = os.path.normpath(os.path.join(os.path.dirname(name), to))
            links.append((name, to.removeprefix("./") if kind == b"1" else near))
        elif kind not in (b"5", b"0", b"\0", b"7"):
            passed["sparse files" if kind == b"S" else "devices and the like"] += 1
    for name, to in links:
        if to in places:
            yield name, *places[to]
        passed["links to what is not in the tar"] += to not in places
    file.seek(at)
    if file.read(2**16).strip(b"\0"):
        raise ValueError("the tar goes on after its end mark, which is not read")


def records(kind: bytes, stored: bytes, at: int) -> dict:
    """What is said ahead of the next member: GNU's long names, POSIX's records. ValueError."""
    if kind in (b"L", b"K"):
        return {"path" if kind == b"L" else "linkpath": stored.split(b"\0")[0]}
    found, begin = {}, 0
    while kind == b"x" and begin < len(stored):  # "g" is of the whole tar
        digits = stored[begin : begin + 9].split(b" ")[0]
        end = begin + int(digits) if digits.isdigit() else begin
        key, _, value = stored[begin + len(digits) + 1 : end].partition(b"=")
        if not value.endswith(b"\n"):
            raise ValueError(f"the tar is damaged at byte {at}")
        if key in (b"path", b"linkpath"):
            found[key.decode()] = value[:-1]
        elif key == b"size" and value[:-1].isdigit():
            found["size"] = int(value[:20])
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = True
        begin = end
    return found


def as_name(stored: bytes) -> str:
    """What is no UTF-8 in it stays apart."""
    return stored.decode(errors="surrogateescape")


def number(digits: bytes) -> int:
    """A number of a tar header: octal, or from 8 GiB on its bytes; -1 if it is none."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    digits = digits.strip(b"\0 ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else -1


MOST_SHARDS = 1_000_000


def expand(pattern: str) -> list[Path]:
    """shards/{000..127}.tar -> its 128 paths. Refusal for too many."""
    found = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if not found:
        return [Path(pattern)]
    numbers = range(int(found[1]), int(found[2]) + 1)
    before, after, width = pattern[: found.start()], pattern[found.end() :], len(found[1])
    rest = expand(after)
    if len(numbers) * len(rest) > MOST_SHARDS:
        raise Refusal(f"{pattern} names more than {MOST_SHARDS:,} shards")
    return [Path(f"{before}{n:0{width}d}{path}") for n in numbers for path in rest]
