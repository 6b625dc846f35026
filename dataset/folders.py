"""Image files with their captions, from a folder or from a list.

ImageFiles    items by number: an image, its caption, its name
list_folder   images with text files beside them
list_json     what a list names
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from config import Refusal
from dataset.captions import CAPTION_FIELDS, field, read_text
from dataset.pixels import SUFFIXES


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
