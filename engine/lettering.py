"""Captions in pictures: in a font that has their letters, and no wider than their place.

font_for   a font for a text
drawn      a text as a font can draw it
wrapped    its lines
"""

import importlib.util
import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from config import home
from nets.letters import escape, is_control

SIZE = 15  # pixels
LINE = 18  # from one line to the next
Font = ImageFont.FreeTypeFont

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
FOLDERS += ("/System/Library/Fonts", "/Library/Fonts", "C:/Windows/Fonts")
MOST, MOST_TEXT = 400, 2000  # fonts that are tried; letters of a text that are looked at
# Of many letters first, and upright ones; the rest by name.
WIDE = ("cjk", "sourcehan", "arialuni", "arial unicode", "wqy", "fallback", "unifont", "dejavusans")
WIDE += ("freesans", "notosans", "pingfang", "hiragino", "msyh", "malgun", "nirmala")
SLANTED = ("bold", "italic", "oblique", "black", "light", "thin", "mono", "condensed")


def font_for(text: str) -> Font:
    """Pillow's own, where it has all letters of the text; else of this machine's the first that
    has, or the one that has most of them."""
    letters = {x for x in text[:MOST_TEXT] if not is_control(x)}
    own = ImageFont.load_default(SIZE)
    missing = frozenset(x for x in letters if not has(own, x))
    if not missing:
        return own
    found = best_font(frozenset(letters), len(letters) - len(missing))
    return open_font(found) if found else own


@lru_cache(maxsize=64)
def best_font(letters: frozenset[str], least: int) -> Path | None:
    """Of this machine's; None if none has more than `least` of the letters."""
    best = None
    for path in fonts():
        font = open_font(path)
        count = sum(has(font, x) for x in letters) if font else 0
        if count > least:
            best, least = path, count
        if count == len(letters):
            break
    return best


@lru_cache(maxsize=1)
def fonts() -> tuple[Path, ...]:
    """This machine's, and the one that comes with matplotlib."""
    found = []
    for folder in map(home, FOLDERS):
        for place, _, names in os.walk(folder):
            found += [
                Path(place, name)
                for name in names
                if os.path.splitext(name)[1].lower() in (".ttf", ".otf", ".ttc")
            ]

    def order(path: Path) -> tuple:
        name = path.name.lower()
        slanted = any(word in name for word in SLANTED)
        return slanted, not any(word in name for word in WIDE), name

    spec = importlib.util.find_spec("matplotlib")
    plots = [Path(place) for place in spec.submodule_search_locations] if spec else []
    plots = [place / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" for place in plots]
    return *(path for path in plots if path.is_file()), *sorted(found, key=order)[:MOST]


@lru_cache(maxsize=MOST)
def open_font(path: Path) -> Font | None:
    try:
        return ImageFont.truetype(str(path), SIZE)
    except OSError:  # damaged, or of coloured pictures
        return None


def has(font: Font, letter: str) -> bool:
    """Whether it draws something else than for what no font has."""
    if unicodedata.category(letter) in ("Cf", "Mn", "Me", "Zs"):
        return True
    drawn, nothing = font.getmask(letter), font.getmask("\uffff")
    return (drawn.size, bytes(drawn)) != (nothing.size, bytes(nothing))


def drawn(text: str, font: Font) -> str:
    """On one line; a letter that the font lacks as what it is composed of, or as an escape."""
    line = " ".join(text.split())
    letters = {x: x if not is_control(x) and has(font, x) else replaced(x) for x in {*line}}
    return "".join(letters[x] for x in line)


def replaced(letter: str) -> str:
    plain = unicodedata.normalize("NFKD", letter)
    plain = "".join(x for x in plain if not unicodedata.combining(x))
    return plain if plain.isascii() and plain.isprintable() else escape(letter)


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """At most so many lines, none wider than `width` pixels; what is left out ends in "..."."""
    lines, words = [], drawn(text[:MOST_TEXT], font).split(" ")
    while words and len(lines) < most:
        line = ""
        while words and font.getlength(f"{line} {words[0]}".strip()) <= width:
            line = f"{line} {words.pop(0)}".strip()
        if words and not line:  # a word longer than a line
            line = fitting(words[0], font, width)
            words[0] = words[0][len(line) :]
        lines.append(line)
    if words or len(text) > MOST_TEXT:
        lines[-1] = fitting(lines[-1], font, width - round(font.getlength(" ..."))) + " ..."
    return lines


def fitting(line: str, font: Font, width: int) -> str:
    """As much of it as is no wider, and one letter at least."""
    low, high = 1, len(line)  # the longest that fits is between
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(line[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return line[:low]
