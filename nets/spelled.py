"""Files in folders whose names UTF-8 cannot hold, for libraries that take no other names."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nets.letters import is_text


@contextmanager
def spelled(path: Path, written: bool = False) -> Iterator[Path]:
    """The file, to be opened or written, under a name that UTF-8 can hold: a link, if need be."""
    if is_text(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        folder, link = Path(place, "folder"), Path(place, "file")
        folder.symlink_to(path.parent.absolute())
        if is_text(path.name):
            yield folder / path.name
        elif not written:
            link.symlink_to(path.absolute())
            yield link
        else:  # made in its folder, then called what it shall be called
            made = folder / f"{os.getpid()}.part"
            yield made
            os.replace(made, path)
