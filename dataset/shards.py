"""WebDataset shards: tars of images and captions, read in place.

Shards        items by number: an image, its caption, its name
tar_members   where the files of a tar are
expand        the paths of a pattern
"""

import io
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dataset.captions import field
from dataset.pixels import SUFFIXES

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
