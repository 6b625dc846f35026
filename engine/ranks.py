"""Ranks: beside the commands and checkpoint.py, the only file that knows of several processes.

    start, stop, rank, world          one process is a world of one; torchrun makes more
    choose_mesh                       whole copies on every rank, or shards, by size or by flag
    shard, shard_heads                a network is cut into shards
    deal, copy_shards                 its weights, from rank 0 tensor by tensor, or from a twin
    gather, whole_heads               and comes together again
    sync_gradients                    whether copies exchange their gradients in this backward pass
    agree, on_all_ranks               what all ranks must do alike
    recompute                         activations of a network's blocks are not kept
    refusals                          one line for what the user can put right, and for Ctrl-C

Replicas (DDP) and shards are one mechanism, FSDP2 on a mesh of (copies, shards): over N ranks
replicas are (N, 1), sharding is (N,), and over several nodes (nodes, ranks of a node). So a network
may be called several times in a step, with gradient and without, and keeps its names; the class
DistributedDataParallel wraps it, and counts on one forward pass per backward pass. Weights,
gradients and Adam's state are in fp32, each rank has its shard of them, and a block's weights come
together, in bf16, while it computes.
"""

import functools
import itertools
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, _sharding_prop, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint

from config import Refusal, is_refusal, legible, refuse
from nets.layers import send

TRAINED = 4 + 4 + 8  # bytes per trained weight in fp32: itself, its gradient, Adam's two moments
SHARE = 0.5  # of a GPU's memory: if the trained weights need more on every rank, they are sharded

PATIENCE = timedelta(hours=2)  # of ranks with each other: one may load, fill a cache or export

SHARED_STORE: list[dist.Store] = []  # of the process group, if there is one

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
        how = {"device_id": torch.device("cuda", local)} if cuda else {}
        how |= {"store": store, "rank": number, "world_size": count, "timeout": PATIENCE}
        dist.init_process_group(backend, **how)
        SHARED_STORE[:] = [store]
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def barrier() -> None:
    """No rank goes on before all are here."""
    if dist.is_initialized():
        dist.barrier()


def agree(yes: bool | Tensor, device: torch.device) -> bool:
    """True if it is true on every rank. Waits for the device."""
    if world() == 1:
        return bool(yes)
    votes = torch.zeros((), dtype=torch.int64, device=device) + yes
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of one device, for which the host waits once."""
    return dict(zip(values, torch.stack([*values.values()]).cpu().tolist(), strict=True))


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    if world() == 1:
        return values
    total = add_up(send(torch.tensor(list(values.values()), dtype=torch.float64), device))
    return dict(zip(values, (total / world()).cpu().tolist(), strict=True))


def add_up(tensor: Tensor) -> Tensor:
    """Summed over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_all_ranks(action: Callable) -> list:
    """What `action` returns on each rank; Refusal or OSError on all of them if it fails on one."""
    value, problem, number, refused = None, "", None, False
    try:
        value = action()
    except (OSError, Refusal, CheckpointException) as error:
        cause = cause_of(error)
        if not isinstance(cause, Exception):
            raise cause from None  # Ctrl-C, which is no failure
        refused, problem = isinstance(cause, Refusal), reason(cause)
        number = getattr(cause, "errno", None)
    every = [(value, problem, number, refused)] * world()
    if world() > 1:
        dist.all_gather_object(every, every[0])
    # Where torch says of a rank that another failed, it does not say why: a number comes first.
    for _, problem, number, refused in sorted(every, key=lambda told: told[2] is None):
        if problem:
            failed = Refusal(problem) if refused else OSError(problem)
            failed.errno = number
            raise failed
    return [value for value, *_ in every]


def cause_of(error: BaseException) -> BaseException:
    """torch.distributed.checkpoint wraps what happened, per rank."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def reason(error: BaseException) -> str:
    """On one line."""
    error = cause_of(error)
    if isinstance(error, OSError) and error.strerror and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        return legible(f"{where}{error.strerror}")
    ours = isinstance(error, (Refusal, OSError))  # whose line ends are in a name
    return (legible(error) if ours else str(error).split("\n")[0]) or type(error).__name__


@contextmanager
def refusals(
    also: tuple[type[Exception], ...] = (),
    note: Callable[[], str] = str,
    interrupted: str = "interrupted",
) -> Iterator[None]:
    """What the user can put right becomes one line and exit code 2; of several ranks one speaks.

    also: other errors that do; note: what is said after one that is no Refusal; interrupted: what
    is said on Ctrl-C, exit code 130, and on SIGTERM where it is heard as `Stopped`, 143.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        refuse(f"{interrupted}{note()}", spoken=is_first("refused"), code=128 + number)
    except Exception as error:
        if lost_peer(error):
            refuse(f"rank {rank()}: another rank has stopped ({reason(error)})", True, code=1)
        if short := out_of_memory(error):
            refuse(short, spoken=is_first("refused"))
        if not (is_refusal(error) or isinstance(error, also)):
            raise
        said = "" if isinstance(error, Refusal) else note()
        refuse(f"{reason(error)}{said}", spoken=is_first("refused"))


class Stopped(KeyboardInterrupt):
    """A signal that asks this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def lost_peer(error: Exception) -> bool:
    """Whether ranks were to do something together and one was no more; its own message says why."""
    if not dist.is_initialized() or world() == 1:
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return said or isinstance(error, dist.DistError)


def out_of_memory(error: Exception) -> str:
    """What to say of memory that there was not, with the number; "" for another error."""
    text = str(error).split("\n")[0]
    cpu = re.search(r"tried to allocate (\d+) bytes", text)
    if cpu and "DefaultCPUAllocator" in text:
        text = f"{int(cpu[1]) / 1e9:,.1f} GB at once"
    elif isinstance(error, MemoryError):
        text = text or "of the host"
    elif not isinstance(error, torch.OutOfMemoryError):
        return ""
    return f"out of memory: {text}; a smaller --size or --batch takes less"


def is_first(what: str) -> bool:
    """Whether no other rank came here before; also where the one that kept count is no more."""
    try:
        return not dist.is_initialized() or SHARED_STORE[0].add(what, 1) == 1
    except dist.DistError:
        return True


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
            raise Refusal(f"--shard {kind} is for several ranks; start them with torchrun")
        return None
    if kind == "none" and world() == 1:
        return None
    if kind == "none":
        raise Refusal(f"--shard none is for one process, these are {world()}; choose auto")
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


def shard(net: nn.Module, mesh: DeviceMesh, device: torch.device, bf16: bool) -> None:
    """Block by block, then the rest, on `device` with weights not set. bf16: to compute in.

    Blocks run in their order, so each asks for the next one's weights before it computes, and on
    the way back for those before it.
    """
    blocks = net.blocks()
    shard_units(net, [*blocks, net], mesh, device, torch.bfloat16 if bf16 else None)
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    # FSDP2 sends every tensor to the device, and whoever goes by a count would wait for it.
    net.register_forward_pre_hook(cover_counts, prepend=True)  # before FSDP2's own
    net.register_forward_pre_hook(uncover_counts)  # after it


@dataclass
class Covered:
    """A tensor that is not seen as one."""

    tensor: Tensor


def cover_counts(net: nn.Module, given: tuple) -> tuple:
    """x_t, t, cond -> the same with the whole numbers of cond covered; see dataset/cache.py."""
    *others, cond = given
    whole = {name: Covered(x) for name, x in cond.items() if not x.is_floating_point()}
    return *others, cond | whole


def uncover_counts(net: nn.Module, given: tuple) -> tuple:
    *others, cond = given
    return *others, {k: x.tensor if isinstance(x, Covered) else x for k, x in cond.items()}


def shard_heads(heads: nn.ModuleList, mesh: DeviceMesh | None, device: torch.device) -> None:
    """The discriminator's, which compute in fp32; on the device whole, or rank 0's in shards."""
    if mesh is None:
        heads.to(device)
        return
    made = heads.state_dict()
    shard_units(heads, [*heads], mesh, device, None)
    deal(heads, iter(made.items()), device)
    for head in heads:
        register_fsdp_forward_method(head, "condition")


def shard_units(
    net: nn.Module,
    units: list[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Shards each unit; the weights are not set.

    Networks cast their own inputs: times and rotary tables stay in fp32. A root keeps its weights
    together after a forward pass unless told, and IDA wants shards.
    """
    look_once()
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    shards = mesh.size(-1)

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


def look_once() -> None:
    """For each tensor of a call torch 2.13 looks through all of them for strided shards: minutes,
    where AdamW takes the thousands of a network at once. From now on it looks once a call."""
    name = "_propagate_use_strided_shard_flag"
    look = getattr(_sharding_prop, name, None)
    if look is None or hasattr(look, "__wrapped__"):
        return
    last, found = None, False

    @functools.wraps(look)
    def once(strategy, call) -> None:
        nonlocal last, found
        if call is not last:
            kinds = (kind for spec in call.args_spec for kind in spec.placements)
            last, found = call, any(isinstance(kind, _StridedShard) for kind in kinds)
        if found:
            look(strategy, call)

    setattr(_sharding_prop, name, once)


@torch.no_grad()
def deal(net: nn.Module, tensors: Iterator[tuple[str, Tensor]], device: torch.device) -> None:
    """Sets the weights of a network in shards, one tensor at a time; no rank ever has all of them.

    tensors: by name in the order of `state_dict`, asked for by rank 0 alone.
    """
    for name, place in net.state_dict().items():
        if rank() == 0:
            given, whole = next(tensors)
            assert given == name, f"tensors come in the network's order: {given}, not {name}"
            whole = whole.to(device, place.dtype)
        else:
            whole = torch.empty(place.shape, dtype=place.dtype, device=device)
        dist.broadcast(whole, src=0)
        if isinstance(place, DTensor):
            where = (place.device_mesh, place.placements)
            whole = distribute_tensor(whole, *where, src_data_rank=None)
        place.copy_(whole)


@torch.no_grad()
def copy_shards(net: nn.Module, other: nn.Module) -> None:
    """Sets the weights of a network from one that is cut alike; ranks say nothing to each other."""
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    for place, tensor in pairs:
        place.copy_(tensor)


def from_first(tensor: Tensor) -> None:
    """Sets it to what it is on rank 0."""
    if world() > 1:
        dist.broadcast(tensor, src=0)


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


def shards_of(net: nn.Module) -> int:
    """Into how many shards a shared network is cut; 1: copies."""
    return next(net.parameters()).device_mesh.size(-1)


def sync_gradients(net: nn.Module, last: bool) -> None:
    """Copies exchange gradients in the last backward pass before an update, not in those before.

    Shards of one copy do in each: whole gradients to be added up would not fit. So do the heads: a
    backward pass comes to their parts one by one, which FSDP2 does not add up.
    """
    if isinstance(net, FSDPModule):
        net.set_requires_all_reduce(last)


def recompute(net: nn.Module) -> None:
    """Each of net.blocks() is computed again in the backward pass, in place of being remembered."""
    for block in net.blocks():
        how = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw nothing
        block.forward = functools.partial(checkpoint, block.forward, **how)
