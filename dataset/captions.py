"""Captions as they are stored: text files, and fields of JSON objects.

read_text   a file of text
field       the first of several fields that is there
"""

from collections.abc import Iterable
from pathlib import Path

from config import Refusal

CAPTION_FIELDS = ("caption", "prompt", "text")


def field(entry: dict, names: Iterable[str]):
    """The first of these fields that is there, or None."""
    return next((entry[name] for name in names if name in entry), None)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Refusal(f"{path} is no UTF-8 text") from None
