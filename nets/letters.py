"""Text as people have it: whether UTF-8 can hold it, and how it is shown on a screen."""

import unicodedata

# What turns the direction of what follows on a screen, and the mark of byte order.
TURNS = {
    *map(chr, (*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A))),
    "\ufeff",
}


def legible(text: object) -> str:
    """On one line, with nothing that a screen obeys or cannot show: escapes stand for that."""
    line = str(text)
    if line.isprintable():
        return line
    return "".join(escape(x) if is_control(x) else x for x in line)


def is_control(letter: str) -> bool:
    """Control characters, line ends, turns, and halves of what UTF-8 has in one piece."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in TURNS


def escape(letter: str) -> str:
    r"""As Python writes it; a byte that was no UTF-8 (of a file's name) is \xNN again."""
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: not half of an emoji, nor bytes of another encoding."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
