"""Captions in pictures can be read, whatever their script and length."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import Refusal
from engine import lettering
from engine.lettering import SIZE, drawn, font_for, has, wrapped
from engine.pictures import check_finite, side_by_side

CAPTIONS = [
    "a red three left of a blue seven",
    "лиса в снегу, кот и пёс",
    "中文 a fox",
    "שלום",
    "\U0001f98a fox \x1b[31m\u202e",
    "word " * 300,
    "x" * 5000,
    "\ufb01ne \u2460 \ud83e",
    "",
]


def test_every_letter_is_drawn_or_written_as_an_escape():
    """No box stands for what a font lacks; Cyrillic is in a font that comes with matplotlib."""
    for caption in CAPTIONS:
        font = font_for(caption)
        line = drawn(caption, font)
        assert all(has(font, x) for x in line) and line.isprintable()
    assert drawn(CAPTIONS[0], font_for(CAPTIONS[0])) == CAPTIONS[0]
    assert drawn(CAPTIONS[1], font_for(CAPTIONS[1])) == CAPTIONS[1]
    assert font_for(CAPTIONS[0]).getname()[0] != font_for(CAPTIONS[1]).getname()[0]
    own = lettering.ImageFont.load_default(SIZE)
    assert drawn("中 \ufb01ne \x1b", own) in (r"\u4e2d fine \x1b", "\\u4e2d \ufb01ne \\x1b")
    assert not has(own, "中") and has(own, "a") and has(own, " ")


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("most", [1, 3])
def test_lines_are_no_wider_than_their_place(caption, most):
    """And together they are the text, or say that it goes on."""
    font = font_for(caption)
    lines = wrapped(caption, font, 284, most)
    assert 1 <= len(lines) <= most
    assert all(font.getlength(line) <= 284 for line in lines)
    whole = drawn(caption, font)
    if not lines[-1].endswith(" ..."):
        assert "".join(lines).replace(" ", "") == whole.replace(" ", "")
    else:
        assert len(caption) > 20 and whole.startswith(lines[0][:10])


def test_captions_and_titles_keep_to_their_place(tmp_path):
    """Left of the images, and above their own column; the images are as they were."""
    images = torch.zeros(len(CAPTIONS), 2, 3, 16, 16)
    side_by_side(tmp_path / "x.png", CAPTIONS, {"a title " * 9: images, "second": images})
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    height, group = 4 * 16 + 6, 2 * (4 * 16 + 2) + 16
    assert (pixels[:, 294:300] == 255).all(), "captions end before the images"
    assert (pixels[:28, 300 + group - 3 : 300 + group] == 255).all(), "a title before the next"
    for row in range(len(CAPTIONS)):
        inside = pixels[28 + row * height : 28 + row * height + 64, 300 : 300 + 64]
        assert len(np.unique(inside)) == 1
        beside = pixels[28 + row * height : 28 + (row + 1) * height, :294]
        assert (beside < 128).any() == bool(CAPTIONS[row])
        assert (pixels[28 + row * height - 2 : 28 + row * height, :294] == 255).all(), "in its row"


def test_an_image_that_is_no_number_is_refused():
    images = torch.zeros(3, 3, 4, 4)
    check_finite(images, ["a", "b", "c"])
    for wrong in (float("nan"), float("inf")):
        images[1, 0, 0, 0] = wrong
        with pytest.raises(Refusal, match='the image of "b" holds values that are not finite'):
            check_finite(images, ['"a"', '"b"', '"c"'])
