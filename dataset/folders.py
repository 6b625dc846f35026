"""Image files with their captions: what a folder holds, what a list names.

ImageFiles     items by number: an image, its caption, its name
look_through   all that is in a folder and below it, by what it is
list_folder    images with text files beside them
list_json      what a list names
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import Refusal, home
from dataset.captions import (
    CAPTION_FIELDS,
    PARTS,
    caption_of,
    first_of,
    lines,
    parse_json,
    read_beside,
    read_text,
)
from dataset.files import by_suffix, counted, is_hidden, read_bytes, what_is
from dataset.pixels import LARGEST, SUFFIXES


class Beside(dict):
    """Files of captions beside an image, by suffix."""


class ImageFiles:
    """Image files, each with its caption, as a list has it, or with the files beside it.

    root: what their names begin at; None: at what they have in common.
    """

    def __init__(
        self,
        images: list[Path],
        captions: list[object],
        faults: dict[str, str],
        root: Path | None = None,
    ):
        self.images, self.captions, self.faults, self.root = images, captions, faults, root

    def __len__(self) -> int:
        return len(self.images)

    def name(self, item: int) -> str:
        return str(self.images[item])

    def keys(self, items: range) -> Iterator[str]:
        """Their names wherever they lie."""
        if self.root is None and self.images:
            folders = {os.path.dirname(os.path.abspath(image)) for image in self.images}
            self.root = Path(os.path.commonpath(folders))
        start = f"{self.root}{os.sep}"
        for item in items:  # of which there may be millions
            name = str(self.images[item])
            inside = name.startswith(start)
            yield name.removeprefix(start) if inside else os.path.relpath(name, self.root)

    def image(self, item: int, limit: int = -1) -> bytes:
        """The file, or its first `limit` bytes."""
        return read_bytes(self.images[item], LARGEST, limit)

    def caption(self, item: int) -> str:
        caption = self.captions[item]
        return read_beside(caption) if isinstance(caption, Beside) else caption_of(caption)

    def order(self, draw: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=draw)


# --- a folder ------------------------------------------------------------------------------------


@dataclass
class Found:
    """What is in a folder."""

    images: list[Path] = field(default_factory=list)
    texts: dict[str, Beside] = field(default_factory=dict)  # by path without suffix
    tars: list[Path] = field(default_factory=list)
    passed: Counter = field(default_factory=Counter)  # what is none of these, by reason


def look_through(root: Path) -> Found:
    """In any depth; folders that links lead to too, each folder once. OSError if it cannot be read.

    Hidden files, and those that systems leave, are never data.
    """
    found = Found()
    for folder, name in walk(root, found.passed):
        path = Path(folder, name)
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in SUFFIXES:
            found.images.append(path)
        elif suffix.lower() in PARTS:
            found.texts.setdefault(stem, Beside()).setdefault(suffix.lower(), path)
        elif suffix.lower() == ".tar":
            found.tars.append(path)
        else:
            found.passed[by_suffix(suffix)] += 1
    found.images.sort()
    found.tars.sort()
    return found


def walk(root: Path, passed: Counter) -> Iterator[tuple[str, str]]:
    """Folder and name of every file that is not hidden; what else there is, into `passed`.

    Folders first, then those that links lead to: what is reached both ways is read once, there.
    """
    seen: set[tuple[int, int]] = set()
    real, linked = [str(root)], []
    while real or linked:
        folder = real.pop() if real else linked.pop()
        try:
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                passed["links to folders that are there already"] += 1
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if folder == str(root):
                raise
            passed[f"folders that cannot be read ({error.strerror})"] += 1
            continue
        for entry in inside:
            kind = kind_of(entry)
            if is_hidden(entry.name):
                suffix = os.path.splitext(entry.name)[1].lower()
                data = kind == "a file" and suffix in (*SUFFIXES, *PARTS, ".tar")
                passed["hidden or system files"] += data
                passed["hidden or system folders"] += kind == "a folder"
            elif kind == "a folder":
                (linked if entry.is_symlink() else real).append(entry.path)
            elif kind == "a file":
                yield folder, entry.name
            else:
                passed["links to nothing" if "link" in kind else f"{kind[2:]}s"] += 1


def kind_of(entry: os.DirEntry) -> str:
    """What it is, or what a link leads to."""
    if entry.is_file(follow_symlinks=False):  # known without asking the disk
        return "a file"
    try:
        return what_is(entry.stat().st_mode) or "a file"
    except OSError:
        return "a link to nothing"


def list_folder(path: Path, found: Found) -> ImageFiles:
    """NAME.jpg (or another suffix of images) with NAME.txt, .caption or .json beside it."""
    images, texts, passed = [], [], Counter(found.passed)
    unused = dict(found.texts)
    for image in found.images:
        stem = os.path.splitext(image)[0]
        stem = stem if stem in found.texts else str(image)  # a.jpg.txt beside a.jpg
        unused.pop(stem, None)
        if beside := found.texts.get(stem):
            images.append(image)
            texts.append(beside)
        else:
            passed["images without a caption"] += 1
    for beside in unused.values():
        text = beside.keys() - {".json"}
        passed["captions without an image" if text else by_suffix(".json")] += 1
    passed = +passed  # those that are more than none
    return ImageFiles(images, texts, {str(path): counted(passed)} if passed else {}, path)


# --- a list --------------------------------------------------------------------------------------

IMAGE_FIELDS = ("image", "image_path", "path", "file_name")


def list_json(path: Path) -> ImageFiles:
    """Paths relative to the list. Raises ValueError that says what it must look like.

    An object of parallel lists, {"keys": [], "image_paths": [], "prompts": []} in the official
    code; a list of objects {"image": "a.jpg", "caption": "..."}; or such objects, one a line.
    """
    entries = read_entries(path)
    if isinstance(entries, dict):
        images = first_of(entries, [f"{name}s" for name in IMAGE_FIELDS])
        captions = first_of(entries, [f"{name}s" for name in CAPTION_FIELDS])
        sound = isinstance(images, list) and isinstance(captions, list)
        if not sound or len(images) != len(captions):
            raise Refusal(f"{path} needs lists of one length, image_paths and prompts")
    else:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Refusal(f'{path} needs objects {{"image": ..., "caption": ...}}')
        images = [first_of(entry, IMAGE_FIELDS) for entry in entries]
        captions = [first_of(entry, CAPTION_FIELDS) for entry in entries]
    for number, image in enumerate(images, 1):
        if not isinstance(image, str) or not image:
            raise Refusal(f"{path}: entry {number} names no image")
        if image.startswith(("http://", "https://")):
            raise Refusal(f"{path}: entry {number} is an address ({image[:60]}); fetch the images")
    return ImageFiles([listed(path.parent, image) for image in images], captions, {})


def read_entries(path: Path):
    """What a list's JSON is. Refusal."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        try:
            return parse_json(text)
        except ValueError as error:
            raise Refusal(f"{path} is not the JSON its name says ({error})") from None
    entries = []
    for number, line in enumerate(lines(text), 1):
        try:
            entries += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            why = f"line {number}: {error}"
            raise Refusal(f"{path} is not the JSON its name says ({why})") from None
    return entries


def listed(folder: Path, image: str) -> Path:
    """An image of a list in `folder`; Windows has backslashes between folders."""
    path = folder / home(image)
    if "\\" in image and not os.path.lexists(path):
        return folder / image.replace("\\", "/")
    return path
