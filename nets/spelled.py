"""Files in folders whose names UTF-8 cannot hold, for libraries that take no other names."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nets.letters import is_text


@contextmanager
def spelled(path: Path) -> Iterator[Path]:
    """The file, to be opened, or made where its own name is text, under one that UTF-8 can hold."""
    if is_text(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        folder, link = Path(place, "folder"), Path(place, "file")
        folder.symlink_to(path.parent.absolute())
        if is_text(path.name):
            yield folder / path.name
        else:
            link.symlink_to(path.absolute())
            yield link
