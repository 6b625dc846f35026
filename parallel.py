"""Ranks and checkpoints: beside the commands, the only file that knows of several processes.

    start, stop, rank, world          one process is a world of one; torchrun makes more
    copy_from_rank_zero               replicas begin alike
    average_gradients                 and stay alike
    agree                             a yes or no on which all ranks must act alike
    recompute                         activations of a network's blocks are not kept
    save_checkpoint, load_checkpoint  into a temporary folder, checked, renamed

A checkpoint is a folder `step-N` with the tensors, `extra.json`, and `digests.json`, written last:
a folder whose digests do not agree is damaged, and the one before it is used.
"""

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.checkpoint import checkpoint

# --- ranks ---------------------------------------------------------------------------------------


def start() -> torch.device:
    """Joins the process group if torchrun started us; returns this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def copy_from_rank_zero(net: nn.Module) -> None:
    if world() > 1:
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean over ranks, in one message."""
    if world() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        parts = (flat / world()).split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        )


def agree(yes: bool, device: torch.device) -> bool:
    """True if it is true on every rank."""
    if world() == 1:
        return yes
    votes = torch.tensor(int(yes), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def recompute(net: nn.Module) -> None:
    """Each of net.blocks() is computed again in the backward pass, in place of being remembered."""
    for block in net.blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    if world() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / world()).tolist(), strict=True))


# --- checkpoints ---------------------------------------------------------------------------------


def state_of(nets: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """All tensors of a run by name. An optimizer belongs to the network of its name."""
    state = {f"net.{name}": get_model_state_dict(net) for name, net in nets.items()}
    return state | {
        f"opt.{name}": get_optimizer_state_dict(nets[name], o) for name, o in optimizers.items()
    }


def save_checkpoint(
    folder: Path,
    step: int,
    nets: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    extra: dict,
    keep: int,
) -> None:
    """folder/step-N, complete or absent; then the oldest beyond `keep` go.

    extra: anything JSON holds.
    """
    final, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    if rank() == 0:
        for left_over in folder.glob("step-*.part"):  # of a save that was interrupted
            shutil.rmtree(left_over)
        part.mkdir(parents=True)
    barrier()
    with quiet():
        dcp.save(state_of(nets, optimizers), checkpoint_id=part, no_dist=world() == 1)
    if rank() == 0:
        (part / "extra.json").write_text(json.dumps({"step": step, **extra}))
        sync_file(part / "digests.json", json.dumps(digests(part)))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(part, final)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(
    folder: Path, nets: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
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
            dcp.load(state, checkpoint_id=path, no_dist=world() == 1)
        for name, net in nets.items():
            set_model_state_dict(net, state[f"net.{name}"])
        for name, optimizer in optimizers.items():
            set_optimizer_state_dict(nets[name], optimizer, state[f"opt.{name}"])
        return json.loads((path / "extra.json").read_text()), remarks
    return None, remarks


def newest(folder: Path) -> Path | None:
    """The newest sound checkpoint."""
    return next((path for path in checkpoints(folder) if sound(path)), None)


def checkpoints(folder: Path) -> list[Path]:
    """Newest first, sound or not."""
    return sorted(folder.glob("step-????????"), reverse=True)


def digests(path: Path) -> dict[str, str]:
    """Of every file in a checkpoint, each flushed to disk first."""
    out = {}
    for file in sorted(p for p in path.iterdir() if p.name != "digests.json"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            out[file.name] = hashlib.file_digest(handle, "blake2b").hexdigest()
    return out


def sound(path: Path) -> bool:
    listed = path / "digests.json"
    return listed.is_file() and listed.read_text() == json.dumps(digests(path))


def sync_file(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def quiet() -> warnings.catch_warnings:
    """torch.distributed.checkpoint remarks on being used by a single process."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
