"""Checkpoints: every trained network and optimizer of a run, complete or absent.

    save_checkpoint   into a temporary folder, checked, renamed
    load_checkpoint   the newest sound one, on any number of ranks

A checkpoint is a folder `step-N` with the tensors, `extra.json`, and `digests.json`, written last:
a folder whose digests do not agree is damaged, and the one before it is used.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
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

    def write() -> None:
        with quiet():
            dcp.save(state_of(nets, optimizers), checkpoint_id=part, no_dist=alone)
        if rank() == 0:
            (part / "extra.json").write_text(json.dumps({"step": step, **extra}))

    def finish() -> None:
        if rank() == 0:
            (part / "digests.json").write_text(json.dumps(listed))
            sync(part / "digests.json")
            sync(part)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(part, final)
            sync(folder)
            for old in checkpoints(folder)[keep:]:
                shutil.rmtree(old)

    try:
        on_all_ranks(prepare)
        on_all_ranks(write)
        listed = digests(part)
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


def digests(path: Path) -> dict[str, str]:
    """Of every file in a checkpoint, each flushed to disk first; every rank reads its share."""
    files = sorted(p for p in path.iterdir() if p.name != "digests.json")
    every = on_all_ranks(lambda: {p.name: digest(p) for p in files[rank() :: world()]})
    return dict(sorted(pair for some in every for pair in some.items()))


def digest(path: Path) -> str:
    sync(path)
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
