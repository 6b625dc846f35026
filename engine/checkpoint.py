"""Checkpoints: every trained network and optimizer of a run, complete or absent.

    save_checkpoint   into a temporary folder, with digests of what was written, renamed
    load_checkpoint   the newest sound one, on any number of ranks

A checkpoint is a folder `step-N` with the tensors, `extra.json`, and `digests.json`, written last:
a folder whose digests do not agree is damaged, and the one before it is used.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from engine.ranks import on_all_ranks, rank, world

Optimizers = Sequence[torch.optim.Optimizer]  # of one network, each with parameters of its own


def state_of(nets: dict[str, nn.Module], optimizers: dict[str, Optimizers]) -> dict:
    """All tensors of a run by name. Optimizers belong to the network of their name."""
    state = {f"net.{name}": get_model_state_dict(net) for name, net in nets.items()}
    return state | {
        f"opt.{name}": get_optimizer_state_dict(nets[name], own) for name, own in optimizers.items()
    }


def save_checkpoint(
    folder: Path,
    step: int,
    nets: dict[str, nn.Module],
    optimizers: dict[str, Optimizers],
    extra: dict,
    keep: int,
) -> None:
    """folder/step-N, complete or absent; then the oldest beyond `keep` go.

    extra: anything JSON holds. OSError, on all ranks, if it cannot be written; nothing of it is
    left then, and the checkpoints before it are as they were.
    """
    final, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    alone = not dist.is_initialized()

    def prepare() -> None:
        if rank() == 0:
            for left_over in folder.glob("step-*.part"):  # of a save that was interrupted
                shutil.rmtree(left_over)
            part.mkdir(parents=True)

    def write() -> dict[str, str]:
        """Digests of this rank's files."""
        writer = dcp.FileSystemWriter(part)
        writer.fs = files = DigestedFiles()
        with quiet():
            dcp.save(state_of(nets, optimizers), storage_writer=writer, no_dist=alone)
        if rank() == 0:
            with files.create_stream(part / "extra.json", "wb") as file:
                file.write(json.dumps({"step": step, **extra}).encode())
        for name in files.digests:
            sync(part / name)
        return files.digests

    def finish() -> None:
        if rank() == 0:
            (part / "digests.json").write_text(json.dumps(joined(written)))
            sync(part / "digests.json")
            sync(part)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(part, final)
            sync(folder)
            for old in checkpoints(folder)[keep:]:
                shutil.rmtree(old)

    try:
        on_all_ranks(prepare)
        written = on_all_ranks(write)
        on_all_ranks(finish)
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{final} cannot be written, is the disk full? ({error})") from None


def load_checkpoint(
    folder: Path, nets: dict[str, nn.Module], optimizers: dict[str, Optimizers]
) -> tuple[dict | None, list[str]]:
    """Restores the newest sound checkpoint in place.

    Returns its extra, None if there is none, and remarks for the user.
    """
    remarks = []
    for path in checkpoints(folder):
        if not sound(path):
            remarks.append(f"{path} is damaged; using the checkpoint before it")
            continue
        state = state_of(nets, optimizers)
        with quiet():
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        for name, net in nets.items():
            set_model_state_dict(net, state[f"net.{name}"])
        for name, own in optimizers.items():
            set_optimizer_state_dict(nets[name], own, state[f"opt.{name}"])
        return json.loads((path / "extra.json").read_text()), remarks
    return None, remarks


def checkpoints(folder: Path) -> list[Path]:
    """Newest first, sound or not."""
    return sorted(folder.glob("step-????????"), reverse=True)


class DigestedFiles(FileSystem):
    """How torch.distributed.checkpoint comes to its files; keeps a digest of each that it wrote, so
    that nothing needs to be read again."""

    def __init__(self):
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator["DigestedFile"]:
        assert mode == "wb", f"files of a checkpoint are written once, not {mode}"
        with DigestedFile(path) as file:
            yield file
        self.digests[path.name] = file.total.hexdigest()

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.digests[new_path.name] = self.digests.pop(path.name)


class DigestedFile(io.BufferedWriter):
    """Written from its beginning to its end."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.total = hashlib.blake2b()

    def write(self, data) -> int:
        self.total.update(data)
        return super().write(data)


def digests(path: Path) -> dict[str, str]:
    """Of every file in a checkpoint; every rank reads its share."""
    files = sorted(p for p in path.iterdir() if p.name != "digests.json")
    return joined(on_all_ranks(lambda: {p.name: digest(p) for p in files[rank() :: world()]}))


def joined(every: list[dict[str, str]]) -> dict[str, str]:
    return dict(sorted(pair for some in every for pair in some.items()))


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def sound(path: Path) -> bool:
    listed = path / "digests.json"
    return listed.is_file() and listed.read_text() == json.dumps(digests(path))


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of files, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def quiet() -> warnings.catch_warnings:
    """torch.distributed.checkpoint remarks on being used by a single process."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
