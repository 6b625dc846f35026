"""Files that are whole or as they were, in folders that one process at a time writes into.

whole         a file beside its place, synced and renamed: the way anything is written here
write_text    a small one
failed        what to say of a write that failed
check_file    whether one can be read
try_folder    whether anything can be written there: asked before minutes of loading
hold          a folder is this process's; the lock goes with the process
"""

import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EDQUOT, ENOSPC, EWOULDBLOCK
from pathlib import Path

from safetensors import SafetensorError

from config import Refusal
from nets.letters import is_text

PART = re.compile(r"\.\d+\.part(\.\w+)?$")  # how the name of a file ends that is being written
LOCK = ".lock"
TAKEN = (EWOULDBLOCK, EAGAIN, EACCES)  # what flock says of a file that another process holds


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends; its folder is made if need be.

    It is synced and renamed, so whoever reads sees the old file or the new one, also after a
    crash; its permissions are those of any new file (safetensors makes its own for the owner
    alone). Where the block fails nothing of it is left. OSError, in one line, if it cannot be
    written.
    """
    name = path.name if is_text(path.name) else "file"  # what it is written with takes no other
    name, dot, suffix = name.rpartition(".") if "." in name[1:] else (name, "", "")
    part = path.with_name(f"{name}.{os.getpid()}.part{dot}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        if part.stat().st_mode != mode:
            part.chmod(mode)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise failed(path, error) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of files, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Whatever it is, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def failed(path: Path, error: Exception) -> OSError:
    """What could not be written, and why; it keeps the error's number."""
    number = number_of(error)
    why = os.strerror(number) if number else str(error).split("\n")[0]
    made = OSError(f"{path} cannot be written ({why}){full(error)}")
    made.errno = number
    return made


def number_of(error: Exception) -> int | None:
    """As in errno. safetensors says it in words."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"os error (\d+)", str(error))
    return int(said[1]) if said else None


def full(error: Exception) -> str:
    """A question, where a full disk or a quota is what failed."""
    return "; is the disk full?" if number_of(error) in (ENOSPC, EDQUOT) else ""


def check_file(path: Path) -> None:
    """That it can be read. FileNotFoundError, or Refusal, which says what is there instead."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise Refusal(f"{path} is a folder; give a file")
        if not stat.S_ISREG(mode):
            raise Refusal(f"{path} is no ordinary file")
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        link = ", a link to what is not there" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path} is missing{link}; fetch it, or correct the path") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror})") from None


# --- folders -------------------------------------------------------------------------------------


def try_folder(folder: Path, flag: str = "--out") -> None:
    """Writes a little there, or where the folder would be made, and takes it away again.

    Refusal, which names the flag.
    """
    place = folder.absolute()
    try:
        while not place.exists() and not place.is_symlink():
            place = place.parent
        with tempfile.NamedTemporaryFile(dir=place, prefix=".try") as file:
            file.write(bytes(2**16))
            os.fsync(file.fileno())
    except OSError as error:
        raise closed(folder, flag, error, place) from None


def closed(folder: Path, flag: str, error: OSError, place: Path) -> Refusal:
    """What to say of a folder that cannot be written to. place: where that was tried."""
    why = f"{error.strerror}: {place}" if error.strerror else str(error)
    return Refusal(f"{flag} {folder} cannot be written to ({why}){full(error)}; choose another")


@contextmanager
def hold(folder: Path, flag: str = "--out") -> Iterator[None]:
    """No other process writes there until the block or this process ends, however it ends.

    Makes the folder; what a command that was refused leaves empty goes again. Parts of files that
    a killed process left go too. Refusal, which says who holds it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(path, f"{flag} {folder}")
    except OSError as error:
        raise closed(folder, flag, error, folder) from None
    try:
        sweep(folder)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(file)
        for place in made:  # the innermost first
            with suppress(OSError):
                place.rmdir()


def sweep(folder: Path) -> None:
    """Parts of files that a killed process left, but for folders below that others hold."""
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if not Path(place, name, LOCK).exists()]
        for name in filter(PART.search, names):
            Path(place, name).unlink(missing_ok=True)


def lock(path: Path, name: str) -> int:
    """A handle that holds the file as long as it is open, and says so in it. Refusal."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        holder = os.pread(handle, 300, 0).decode(errors="replace").split("\n")[0]
        taken = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A disk without locks: the holder's line is all there is to go by.
            taken = error.errno in TAKEN or lives_here(holder)
        if taken:
            os.close(handle)
            raise Refusal(
                f"{name} is {holder or 'held by another process'}; wait for it, or stop it"
            )
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # whoever held it has taken it away
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    line = f"held by pid {os.getpid()} on host {socket.gethostname()} since {since}\n"
    os.ftruncate(handle, 0)
    os.pwrite(handle, line.encode(), 0)
    return handle


def lives_here(holder: str) -> bool:
    """Whether that process is one of this machine's, and there."""
    said = re.match(r"held by pid (\d+) on host (\S+) since", holder)
    if not said or said[2] != socket.gethostname() or int(said[1]) == os.getpid():
        return False
    return Path(f"/proc/{said[1]}").exists()
