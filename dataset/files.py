"""Stored bytes: of files alone, and never more of them than may be.

    what_is      what a path is that is no file
    read_bytes   a file, or its first bytes
    is_hidden    what systems and programs leave beside data

A pipe, a socket or a device has no end; a folder may be called 0.png.
"""

import os
import re
import stat
from collections import Counter
from pathlib import Path

from config import legible

KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def what_is(mode: int) -> str:
    """Of `st_mode`: "" for a file."""
    return next((name for test, name in KINDS.items() if test(mode)), "")


def read_bytes(path: Path, most: int, limit: int = -1, what: str = "it") -> bytes:
    """The file, or its first `limit` bytes. ValueError for what is no file or has over `most`.

    what: what the file is of a sample.
    """
    about = os.stat(path)
    if kind := what_is(about.st_mode):
        raise ValueError(f"{what} is {kind}, no file")
    check_length(about.st_size, most, what)
    with open(path, "rb") as file:
        return file.read(about.st_size if limit < 0 else limit)


def check_length(size: int, most: int, what: str = "it") -> None:
    if size > most:
        raise ValueError(f"{what} has {in_bytes(size)}, more than {in_bytes(most)}")


def in_bytes(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


# Of macOS, Windows, disks, and network storage: copies, thumbnails, what was thrown away.
SYSTEM = {
    "__macosx", "network trash folder", "temporary items", "$recycle.bin", "recycler", "recycled",
    "$extend", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found",
    "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "@__thumb", "#recycle",
    "#snapshot", "~snapshot", "__pycache__",
}  # fmt: skip
FOUND = re.compile(r"found\.\d{3}")  # what a disk's check has put together


def is_hidden(name: str) -> bool:
    """A file's or a folder's own name."""
    plain = name.casefold()
    return name.startswith(".") or plain in SYSTEM or bool(FOUND.fullmatch(plain))


def counted(passed: Counter) -> str:
    """What was passed over, by reason: the most frequent first, eight of them."""
    told = [f"{count} {legible(why)}" for why, count in passed.most_common(8)]
    rest = passed.total() - sum(count for _, count in passed.most_common(8))
    return ", ".join(told) + (f" and {rest} more" if rest else "")


def by_suffix(suffix: str) -> str:
    """The reason for a file that is neither image nor caption."""
    return f"{suffix[:16]} files" if len(suffix) > 1 else "files without a suffix"
