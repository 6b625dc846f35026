"""Checkpoints: every trained network and optimizer of a run, complete or absent.

    save_checkpoint   into a temporary folder, with digests of what was written, renamed
    load_checkpoint   the newest sound one, on any number of ranks
    Writer            torch's, for thousands of small tensors
    Reader, Planner   nothing that is read can run: only what a checkpoint of ours is made of

A checkpoint is a folder `step-N` with the tensors, `extra.json`, and `digests.json`, written last:
a folder whose digests do not agree is damaged, and the one before it is used.
"""

import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from config import Refusal
from engine.ranks import on_all_ranks, rank, reason, world
from nets import disk
from nets.disk import sync

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

    extra: anything JSON holds. On all ranks, OSError if it cannot be written, FloatingPointError if
    a value is not finite; nothing of it is left then, and the checkpoints before it are as they
    were.
    """
    final, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    alone, state = not dist.is_initialized(), state_of(nets, optimizers)

    def prepare() -> None:
        if rank() == 0:
            for left_over in folder.glob("step-*.part"):  # of a save that was interrupted
                disk.remove(left_over)
            part.mkdir(parents=True)

    def write() -> dict[str, str]:
        """Digests of this rank's files."""
        writer = Writer(part)
        files = writer.fs
        try:
            with quiet():
                dcp.save(state, storage_writer=writer, no_dist=alone)
        except CheckpointException:
            if files.failed:  # of which torch makes an error of its own, without the reason
                raise files.failed from None
            raise
        if rank() == 0:
            with files.create_stream(part / "extra.json", "wb") as file:
                file.write(json.dumps({"step": step, **extra}).encode())
        for name in files.digests:
            sync(part / name)
        return files.digests

    def finish() -> None:
        if rank() == 0:
            disk.write_text(part / "digests.json", json.dumps(joined(written)))
            disk.remove(final)
            os.rename(part, final)
            sync(folder)
            for old in outdated(folder, final, keep):
                disk.remove(old)

    for name in filter(None, on_all_ranks(lambda: not_finite(state))):
        raise FloatingPointError(f"{name} has values that are not finite: {final} is not saved")
    try:
        on_all_ranks(prepare)
        written = on_all_ranks(write)
        on_all_ranks(finish)
    except OSError as error:
        if rank() == 0:
            disk.remove(part)
        raise disk.failed(final, error) from None


def outdated(folder: Path, newest: Path, keep: int) -> list[Path]:
    """All but `newest` and those that go before it, `keep` together. What is called newer was
    passed over as damaged."""
    others = [path for path in checkpoints(folder) if path != newest]
    before = [path for path in others if path < newest]
    return [path for path in others if path not in before[: keep - 1]]


def not_finite(state: dict) -> str:
    """The name of a tensor with a value that is not finite; "" if there is none."""
    shards = [(name, x) for name, x in tensors_of(state) if x.is_floating_point() and x.numel()]
    if not shards:
        return ""
    sound = [torch.stack(torch.aminmax(x)).isfinite().all().cpu() for _, x in shards]
    return next((name for (name, _), fine in zip(shards, sound, strict=True) if not fine), "")


def tensors_of(tree: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Of shards those of this rank."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, torch.Tensor):
        yield name, tree.to_local() if isinstance(tree, DTensor) else tree


def load_checkpoint(
    folder: Path, nets: dict[str, nn.Module], optimizers: dict[str, Optimizers]
) -> tuple[dict | None, list[str]]:
    """Restores the newest sound checkpoint in place.

    Returns its extra, None if there are no checkpoints, and remarks for the user. Refusal, alike on
    all ranks, if there are some and none is sound.
    """
    faults = {}
    for path in checkpoints(folder):
        faults[path] = fault(path) or restore(path, nets, optimizers)
        if not faults[path]:
            damaged = [f"{bad} is damaged ({why})" for bad, why in faults.items() if why]
            remarks = [f"{said}; using {path}, a checkpoint before it" for said in damaged]
            return json.loads((path / "extra.json").read_text()), remarks
    if not faults:
        return None, []
    listed = "; ".join(f"{path.name}: {why}" for path, why in faults.items())
    raise Refusal(
        f"no checkpoint in {folder} is sound ({listed}); nothing was changed: "
        "put a sound one back, or start anew with --overwrite"
    )


def restore(path: Path, nets: dict[str, nn.Module], optimizers: dict[str, Optimizers]) -> str:
    """Why not, "" if all is restored."""
    state = state_of(nets, optimizers)
    try:
        with quiet():
            alone = not dist.is_initialized()
            dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=alone)
    except CheckpointException as error:
        return reason(error)
    for name, net in nets.items():
        set_model_state_dict(net, state[f"net.{name}"])
    for name, own in optimizers.items():
        set_optimizer_state_dict(nets[name], own, state[f"opt.{name}"])
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """Newest first, sound or not."""
    return sorted(folder.glob("step-????????"), reverse=True)


# --- is it whole? --------------------------------------------------------------------------------


def fault(path: Path) -> str:
    """What is wrong with a checkpoint, "" if nothing is; alike on all ranks, of which each reads
    its share."""

    def listed() -> dict[str, str]:
        try:
            return json.loads((path / "digests.json").read_bytes())
        except ValueError:
            raise OSError("digests.json is no JSON") from None

    try:
        wanted, *others = on_all_ranks(listed)
        found = digests(path)
    except OSError as error:
        return str(error)
    if any(other != wanted for other in others):
        return "ranks do not see the same files"
    named = wanted if isinstance(wanted, dict) else {}
    wrong = sorted(name for name in {*named, *found} if named.get(name) != found.get(name))
    return f"not as it was written: {', '.join(wrong[:3])}" if wrong or not found else ""


class DigestedFiles(FileSystem):
    """How torch.distributed.checkpoint comes to its files; keeps a digest of each that it wrote, so
    that nothing needs to be read again."""

    def __init__(self):
        self.digests: dict[str, str] = {}
        self.failed: OSError | None = None

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator["DigestedFile"]:
        assert mode == "wb", f"files of a checkpoint are written once, not {mode}"
        with DigestedFile(path) as file:
            try:
                yield file
            finally:
                self.failed = self.failed or file.failed
        self.digests[path.name] = file.total.hexdigest()

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.digests[new_path.name] = self.digests.pop(path.name)


class DigestedFile(io.BufferedWriter):
    """Written from its beginning to its end."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.total, self.failed = hashlib.blake2b(), None

    def write(self, data) -> int:
        self.total.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def digests(path: Path) -> dict[str, str]:
    """Of every file in a checkpoint; every rank reads its share."""

    def mine() -> dict[str, str]:
        inside = sorted(p for p in path.iterdir() if p.name != "digests.json")
        for other in (p for p in inside if not p.is_file()):
            raise OSError(f"{other.name} is no file")
        return {p.name: digest(p) for p in inside[rank() :: world()]}

    return joined(on_all_ranks(mine))


def joined(every: list[dict[str, str]]) -> dict[str, str]:
    return dict(sorted(pair for some in every for pair in some.items()))


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def quiet() -> warnings.catch_warnings:
    """torch.distributed.checkpoint remarks on being used by a single process."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


# --- many small tensors --------------------------------------------------------------------------


class Writer(dcp.FileSystemWriter):
    """What is written is torch's format. torch makes a zip archive for each tensor, in which a
    small one, as most are, takes ten times as long as its digest."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.fs = DigestedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """All that is this rank's, in one file."""
        name, written, done = f"{plan.storage_data.prefix}0.distcp", [], Future()
        with self.fs.create_stream(self.path / name, "wb") as file:
            for item in plan.items:
                start, value = file.tell(), planner.resolve_data(item)
                if isinstance(value, io.BytesIO):  # what is no tensor
                    file.write(value.getbuffer())
                else:
                    write_tensor(value.detach().cpu(), file)
                length = file.tell() - start
                written.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        done.set_result(written)
        return done


SMALL = 1 << 16  # bytes
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.int64)


def write_tensor(tensor: torch.Tensor, file: io.BufferedWriter) -> None:
    """As torch.load reads it."""
    if tensor.nbytes <= SMALL and tensor.dtype in PLAIN:
        file.write(ahead_of_values(tensor.shape, tensor.dtype))
        file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    else:
        alone = tensor.nbytes == tensor.untyped_storage().nbytes()  # else all of that is written
        torch.save(tensor if alone else tensor.clone(), file)


@cache
def ahead_of_values(shape: torch.Size, dtype: torch.dtype) -> bytes:
    """What the format that torch.save had before its archives begins with. The values end it."""
    whole, tensor = io.BytesIO(), torch.zeros(shape, dtype=dtype)
    torch.save(tensor, whole, _use_new_zipfile_serialization=False)
    return whole.getvalue()[: len(whole.getvalue()) - tensor.nbytes]


# --- nothing that is read can run ----------------------------------------------------------------

# torch.distributed.checkpoint keeps its table of contents as a pickle, which can name any function
# to be called. These are what ours name.
METADATA, PLACES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
KNOWN = {
    METADATA: (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    PLACES: ("_StorageInfo", "StorageMeta"),
    "torch": ("Size", *(name for name, x in vars(torch).items() if isinstance(x, torch.dtype))),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, as none of ours does")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        with open(self.path / ".metadata", "rb") as file:
            found = Contents(file).load()
        found.storage_meta.load_id = self.load_id
        return found

    def _slice_file(self, file: io.BufferedReader, place: _StorageInfo) -> io.IOBase:
        """torch reads a part of a file in a dozen steps, each of which is looked after."""
        if place.length > 2 * SMALL:
            return super()._slice_file(file, place)
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))


class Planner(DefaultLoadPlanner):
    """torch's own unpickles, of any class, what is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        super().load_bytes(read_item, io.BytesIO(plain.getvalue()))
