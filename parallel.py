"""Ranks and checkpoints: beside the commands, the only file that knows of several processes.

    start, stop, rank, world          one process is a world of one; torchrun makes more
    choose_mesh                       whole copies on every rank, or shards, by size or by flag
    home, shard, shard_heads          a network is loaded once and dealt out, tensor by tensor
    gather, whole_heads               and comes together again
    exchange                          whether copies exchange their gradients in this backward pass
    agree, on_all_ranks               what all ranks must do alike
    recompute                         activations of a network's blocks are not kept
    save_checkpoint, load_checkpoint  into a temporary folder, checked, renamed

Replicas (DDP) and shards are one mechanism, FSDP2 on a mesh of (copies, shards): over N ranks
replicas are (N, 1), sharding is (N,), and over several nodes (nodes, ranks of a node). So a network
may be called several times in a step, with gradient and without, and keeps its names; the class
DistributedDataParallel wraps it, and counts on one forward pass per backward pass. Weights,
gradients and Adam's state are in fp32, each rank has its shard of them, and a block's weights come
together, in bf16, while it computes.

A checkpoint is a folder `step-N` with the tensors, `extra.json`, and `digests.json`, written last:
a folder whose digests do not agree is damaged, and the one before it is used. The tensors may be
read on any number of ranks.
"""

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

TRAINED = 4 + 4 + 8  # bytes per trained weight in fp32: itself, its gradient, Adam's two moments
SHARE = 0.5  # of a GPU's memory: if the trained weights need more on every rank, they are sharded

# --- ranks ---------------------------------------------------------------------------------------


def start() -> torch.device:
    """Joins the process group if torchrun started us; returns this rank's device.

    torchrun --max-restarts keeps its store: what ranks of an earlier attempt left there is hidden.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if "RANK" in os.environ:
        store, number, count = next(dist.rendezvous("env://"))
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if kept else "0"
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """No rank goes on before all are here."""
    if dist.is_initialized():
        dist.barrier()


def agree(yes: bool, device: torch.device) -> bool:
    """True if it is true on every rank."""
    if world() == 1:
        return yes
    votes = torch.tensor(int(yes), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    if world() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / world()).tolist(), strict=True))


def on_all_ranks(action: Callable) -> list:
    """What `action` returns on each rank; OSError on all of them if it fails on one."""
    value, problem = None, ""
    try:
        value = action()
    except (OSError, ValueError, CheckpointException) as error:
        problem = reason(error)
    every = [(value, problem)] * world()
    if world() > 1:
        dist.all_gather_object(every, (value, problem))
    for _, problem in every:
        if problem:
            raise OSError(problem)
    return [value for value, _ in every]


def reason(error: BaseException) -> str:
    """On one line. torch.distributed.checkpoint wraps what happened, per rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).split("\n")[0] or type(error).__name__


# --- networks on several ranks -------------------------------------------------------------------


def choose_mesh(kind: str, weights: int, device: torch.device) -> DeviceMesh | None:
    """How ranks share the trained networks: a mesh of (copies, shards), or of shards if there is
    one copy; None for one process.

    kind: "none" | "ddp": a copy on every rank | "fsdp": one on every node, in shards | "auto": fsdp
    where `weights`, the number of trained ones, would take too much of a GPU. ValueError for what
    cannot be.
    """
    if not dist.is_initialized():
        if kind in ("ddp", "fsdp"):
            raise ValueError(f"--shard {kind} is for several ranks; start them with torchrun")
        return None
    if kind == "none" and world() == 1:
        return None
    if kind == "none":
        raise ValueError(f"--shard none is for one process, these are {world()}; choose auto")
    if kind == "auto":
        cuda = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if cuda else float("inf")
        kind = "fsdp" if wants_shards(weights, memory) else "ddp"
    shards = int(os.environ["LOCAL_WORLD_SIZE"]) if kind == "fsdp" else 1
    names = ("copies", "shards")
    mesh = init_device_mesh(device.type, (world() // shards, shards), mesh_dim_names=names)
    return mesh["shards"] if shards == world() else mesh


def wants_shards(weights: int, memory: float) -> bool:
    """Whether so many trained weights take too much of a GPU with `memory` bytes."""
    return TRAINED * weights > SHARE * memory


def home(mesh: DeviceMesh | None, device: torch.device) -> torch.device:
    """Where a network is loaded that `shard` will deal out: the memory of rank 0's host."""
    if mesh is None:
        return device
    return torch.device("cpu" if rank() == 0 else "meta")


def shard(net: nn.Module, mesh: DeviceMesh | None, device: torch.device, bf16: bool) -> None:
    """Block by block, then the rest. bf16: to compute in; the weights stay as they are."""
    if mesh is not None:
        deal_out(net, [*net.blocks(), net], mesh, device, torch.bfloat16 if bf16 else None)


def shard_heads(heads: nn.ModuleList, mesh: DeviceMesh | None, device: torch.device) -> None:
    """The discriminator's, which compute in fp32."""
    if mesh is not None:
        deal_out(heads, [*heads], mesh, device, None)
        for head in heads:
            register_fsdp_forward_method(head, "condition")


@torch.no_grad()
def deal_out(
    net: nn.Module,
    units: list[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Shards each unit and sends the weights of rank 0, one tensor at a time.

    Networks cast their own inputs: times and rotary tables stay in fp32. A root keeps its weights
    together after a forward pass unless told, and IDA wants shards.
    """
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    state, shards = net.state_dict(), mesh.size(-1)

    def placement(weight: nn.Parameter) -> Shard:
        """By rows; a table with a single one (SD 3.5's positions) by its entries."""
        single = weight.ndim > 1 and weight.shape[0] == 1 and weight.shape[1] % shards == 0
        return Shard(1 if single else 0)

    # Blocks return views; nobody writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    net.to("meta")
    how = {"mesh": mesh, "mp_policy": policy, "shard_placement_fn": placement}
    for unit in units:
        fully_shard(unit, **how, reshard_after_forward=True)
    net.to_empty(device=device)
    for name, tensor in net.state_dict().items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if rank() == 0:
            whole.copy_(state[name])
        dist.broadcast(whole, src=0)
        if isinstance(tensor, DTensor):
            where = (tensor.device_mesh, tensor.placements)
            whole = distribute_tensor(whole, *where, src_data_rank=None)
        tensor.copy_(whole)


def gather(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names, sorted, and whole tensors, one at a time; every rank must ask for all of them."""
    for name, tensor in sorted(net.state_dict().items()):
        yield name, whole(tensor)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_heads(heads: nn.ModuleList) -> Iterator[None]:
    """Their weights are together inside the block."""
    sharded = [head for head in heads if isinstance(head, FSDPModule)]
    for head in sharded:
        head.unshard()
    yield
    for head in sharded:
        head.reshard()


def is_shared(net: nn.Module) -> bool:
    """Whether ranks share it, as copies or as shards; then `shard` chose what it computes in."""
    return isinstance(net, FSDPModule)


def exchange(net: nn.Module, last: bool) -> None:
    """Copies exchange gradients in the last backward pass before an update, not in those before.

    Shards of one copy do in each: whole gradients to be added up would not fit. So do the heads: a
    backward pass comes to their parts one by one, which FSDP2 does not add up.
    """
    if isinstance(net, FSDPModule):
        net.set_requires_all_reduce(last)


def recompute(net: nn.Module) -> None:
    """Each of net.blocks() is computed again in the backward pass, in place of being remembered."""
    for block in net.blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


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
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        for name, net in nets.items():
            set_model_state_dict(net, state[f"net.{name}"])
        for name, optimizer in optimizers.items():
            set_optimizer_state_dict(nets[name], optimizer, state[f"opt.{name}"])
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
