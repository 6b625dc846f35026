"""The teacher of docs/own_teacher.md, with weights and pictures: quick to start and to save."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parent.parent / "docs" / "own_teacher.md"
MINE, MAKE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
WORDS = ("red", "green", "blue")


def make_own(folder: Path) -> None:
    """mine.py, its weights, made as the page says, and six pictures with captions."""
    (folder / "mine.py").write_text(MINE)
    (folder / "make.py").write_text(MAKE)
    pictures = folder / "pictures"
    pictures.mkdir()
    for k in range(6):
        image = np.full((40 + k, 48 - k, 3), 30, dtype=np.uint8)
        image[8 + k : 28, 10:30, k % 3] = 255
        Image.fromarray(image).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"a {WORDS[k % 3]} square {k}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make.py", str(pictures), "3"])
        patch.syspath_prepend(folder)
        runpy.run_path(str(folder / "make.py"), run_name="__main__")
    sys.modules.pop("mine")


def settings_of(folder: Path) -> dict:
    """Of a configuration: rectangular images."""
    files = {"teacher": str(folder / "mine.py"), "data": str(folder / "pictures")}
    return {**files, "size": (16, 32)}


def flags_of(folder: Path) -> list:
    """The same for train.py."""
    return ["--teacher", folder / "mine.py", "--data", folder / "pictures", "--size", 16, 32]
