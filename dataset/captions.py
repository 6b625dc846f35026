"""Captions as they are stored: text files, lines, fields of JSON objects.

    caption_of    a caption, or why it is none
    parse_json    JSON, or why it is none
    json_caption  the caption in an object
    read_beside   of an image, from the files beside it
    read_text     all of a file; lines, where it has several
    read_lines    prompts, one a line

A ValueError here says of a sample what is wrong with it; a Refusal, of a file that a flag names.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from config import Refusal
from dataset.files import read_bytes
from nets.letters import is_text

CAPTION_FIELDS = ("caption", "prompt", "text")
TEXTS = (".txt", ".caption")  # captions beside images; the first that is there ...
PARTS = (*TEXTS, ".json")  # ... and where it is blank or none is, this one's field
LONGEST = 100_000  # letters of a caption: encoders read some hundred words
LARGEST, LARGEST_JSON = 2**31, 2**24  # bytes of a list, and of an image's .json
BREAK = re.compile("\r\n|\n|\r")  # no other ends a line: U+2028 and form feeds are text


def caption_of(value: object) -> str:
    """Without blanks around it. ValueError for what is no caption."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        raise ValueError("its caption is empty")
    if not isinstance(value, str):
        raise ValueError(f"its caption is no text but {named(value)}")
    if not is_text(value):
        raise ValueError("its caption is no UTF-8 text")
    if len(value) > LONGEST:
        raise ValueError(f"its caption has {len(value):,} letters, more than {LONGEST:,}")
    return BREAK.sub("\n", value.strip())


def named(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object")


def is_blank(text: str) -> bool:
    """Whether nothing of it is seen: blanks, control characters, marks of width nought."""
    kinds = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return all(unicodedata.category(letter) in kinds for letter in text)


def as_text(stored: bytes) -> str:
    try:
        if not has_zeros(stored):
            return stored.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise ValueError("its caption is no UTF-8 text")


def has_zeros(stored: bytes) -> bool:
    """As UTF-16 has, which may pass for UTF-8: every other byte is one, of letters of English."""
    return 4 * stored.count(0) > len(stored)


def parse_json(text: str) -> object:
    """ValueError in one line."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    except ValueError:  # Python reads no number of thousands of digits
        raise ValueError("it has a number of too many digits") from None


def first_of(entry: dict, names: Iterable[str]):
    """The first of these fields that is there, or None."""
    return next((entry[name] for name in names if name in entry), None)


def json_caption(text: str) -> str:
    """ValueError for what is no object with a caption."""
    try:
        entry = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its .json is no JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError("its .json is no JSON object")
    return caption_of(first_of(entry, CAPTION_FIELDS))


def read_beside(beside: dict[str, Path]) -> str:
    """By suffix the files beside an image."""
    text, caption = first_of(beside, TEXTS), ""
    if text:
        caption = as_text(read_bytes(text, 4 * LONGEST, what="its caption"))
    if ".json" not in beside or not is_blank(caption):
        return caption_of(caption)
    return json_caption(as_text(read_bytes(beside[".json"], LARGEST_JSON, what="its .json")))


def read_whole(path: Path) -> bytes:
    """A file that a flag names. Refusal, or OSError."""
    try:
        stored = read_bytes(path, LARGEST)
    except ValueError as error:
        raise Refusal(f"{path}: {error}") from None
    if stored.startswith((b"\xff\xfe", b"\xfe\xff")) or has_zeros(stored):
        raise Refusal(f"{path} is no UTF-8 text but UTF-16; save it as UTF-8")
    return stored


def read_text(path: Path) -> str:
    """A file that a flag names. Refusal, or OSError."""
    try:
        return read_whole(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refusal(f"{path} is no UTF-8 text") from None


def lines(text: str) -> list[str]:
    return BREAK.split(text)


def read_lines(path: Path) -> tuple[list[str], dict[int, str]]:
    """The lines of a file of prompts that are not blank; by number, why one of them is none."""
    prompts, faults = [], {}
    stored = read_whole(path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(re.split(BREAK.pattern.encode(), stored), 1):
        try:
            text = as_text(line)
            if not is_blank(text):
                prompts.append(caption_of(text))
        except ValueError as error:
            faults[number] = str(error).replace("its caption", "it")
    return prompts, faults


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, all of which are wanted. Refusal, or OSError."""
    prompts, faults = read_lines(path)
    if faults:
        first = ", ".join(f"line {number} ({why})" for number, why in list(faults.items())[:5])
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise Refusal(f"{path}: {first}{more}")
    if not prompts:
        raise Refusal(f"{path} holds no prompt; give one a line")
    return prompts
