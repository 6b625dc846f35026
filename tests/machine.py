"""A GPU that is not there: the project's own code, unmodified, at full size, without one.

    build_library     fake_cuda.cpp, compiled once: what autograd and attention ask of a device
    pretend           torch.cuda as if there were one; pretend_ranks: as one of torchrun's ranks
    Machine           inside it tensors of "cuda" have no memory, those of the CPU are real
    Machine.events    what waits for the GPU, and where in the project
    Machine.peak      bytes on the GPU, counted by storage; stages: the same by what is being done
    Machine.kernels   attention kernels; collectives: what ranks say to each other, in order
    CudaError         what a real GPU would have refused

    python -m tests.machine flux-dev --world 8     # one teacher by hand; see full_size.py

Import this before torch; it needs g++, and a build of torch without CUDA. Not there: values (a
number read off the GPU is 1, a truth is True, but see `answers`), NCCL itself, failures inside
kernels, time, fragmentation, and whatever writes tensors to a file.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = f"{HERE.parent}{os.sep}"
WATCHING = (f"{HERE}{os.sep}", f"{ROOT}engine{os.sep}meter.py")  # and not watched
CACHE = Path(tempfile.gettempdir(), f"fake-cuda-{os.getuid()}")


def build_library() -> Path:
    """The compiled fake_cuda.cpp, from the cache if it is of this source and this torch."""
    source, torch_at = HERE / "fake_cuda.cpp", importlib.util.find_spec("torch").origin
    told = source.read_bytes() + importlib.metadata.version("torch").encode() + torch_at.encode()
    library = CACHE / f"{hashlib.blake2b(told, digest_size=8).hexdigest()}.so"
    if not library.is_file():
        CACHE.mkdir(exist_ok=True)
        root, part = Path(torch_at).parent, library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        flags += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run([shutil.which("g++"), source, *flags, "-o", part], check=True)
        os.replace(part, library)
    return library


assert "torch" not in sys.modules, "torch asks once which devices there are: import this before it"
assert ctypes.CDLL(str(build_library())).fake_cuda_works()

from collections import Counter  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 (FSDP imports it, and it wants torch.cuda as it was)
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.optim.optimizer import _foreach_supported_types  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

from engine.meter import Storages, tensors_in  # noqa: E402

torch.set_num_threads(1)
aten = torch.ops.aten
BIG = 2**24  # bytes: a tensor of the CPU above that is fake too, where one can choose
MEMORY = 85_000_000_000  # what torch reports as an H100's total_memory

# --- torch.cuda as if there were one -------------------------------------------------------------


class Stream:
    """A stream or an event: nothing is ever under way."""

    device = torch.device("cuda", 0)

    def __init__(self, *_, **__):
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return event or Stream()

    def wait(self, *_) -> None:
        pass

    wait_stream = wait_event = record = synchronize = wait


LIBRARY = torch.library.Library("aten", "IMPL")


def no_kernel(*_):
    raise AssertionError("the machine answers for all of its tensors")


def pretend(memory: int = MEMORY) -> None:
    """For the rest of the process."""
    cuda, yes, nothing = torch.cuda, lambda *_, **__: True, lambda *_, **__: None
    cuda.is_available = cuda.is_bf16_supported = yes
    cuda._lazy_init = cuda.set_device = cuda.synchronize = cuda.empty_cache = nothing
    cuda.manual_seed_all = cuda.manual_seed = nothing
    cuda.device_count, cuda.current_device = (lambda: 8), (lambda: 0)
    cuda.Stream = cuda.Event = Stream
    cuda.stream = lambda _: nullcontext()
    cuda.current_stream = cuda.default_stream = Stream
    about = SimpleNamespace(total_memory=memory, major=9, minor=0, name="a GPU that is not there")
    cuda.get_device_properties, cuda.get_device_capability = (lambda *_: about), (lambda *_: (9, 0))
    fake_tensor.init_gpu_context = nothing
    torch.Tensor.pin_memory = lambda self: self
    FakeTensorMode.avoid_device_init = property(yes)
    # Else AdamW takes the loop, which hides its peak.
    _foreach_supported_types.append(FakeTensor)
    # CUDA has a kernel of its own for it, where torch without one computes it in seven.
    LIBRARY.impl("silu_backward", no_kernel, "CUDA")
    nn.Module._apply = moved


def moved(self: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, but that a parameter is replaced: torch swaps fake ones, and refuses where
    a weak reference is left."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for key, p in self._parameters.items():
        if p is not None:
            with torch.no_grad():
                new = fn(p)
            if new is not p:
                self._parameters[key] = nn.Parameter(new, p.requires_grad)
    for key, x in self._buffers.items():
        if x is not None:
            self._buffers[key] = fn(x)
    return self


def pretend_ranks(rank: int, world: int, each: int, collectives: list) -> None:
    """torchrun's variables, `each` ranks to a node, and a process group that talks to nobody."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, 0, world, each)), strict=True))
    dist.rendezvous = lambda *_, **__: iter([(FakeStore(), rank, world)])
    init = dist.init_process_group

    def init_process_group(backend, *, store, rank, world_size, timeout, device_id):
        init("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def all_gather_object(every, value, group=None):
        collectives.append(f"all_gather_object {type(value).__name__}")
        every[:] = [value] * len(every)

    dist.init_process_group, dist.all_gather_object = init_process_group, all_gather_object
    dist.barrier = lambda *_, **__: collectives.append("barrier")


# --- the machine ---------------------------------------------------------------------------------


class CudaError(RuntimeError):
    """What a real GPU would have refused."""


@dataclass(frozen=True)
class Event:
    """Something that happened between the CPU and the GPU."""

    kind: str  # item | nonzero | cpu->cuda | cuda->cpu; " ahead" after it: nobody waits
    where: str  # file.py:function, innermost in the project
    lines: str  # file.py:line < ...
    size: int  # bytes

    @property
    def waits(self) -> bool:
        return not self.kind.endswith("ahead")


def place(depth: int) -> tuple[str, str]:
    """file.py:function of the project, innermost, and file.py:line of so many.

    A backward pass is a thread of its own, and where nothing of ours is in it is where it began.
    No variable here holds this thread's own frame: it would hold itself, and every tensor that the
    frames above have, until garbage is collected.
    """
    found = place_from(sys._getframe(1), depth)
    if not found and threading.current_thread() is not threading.main_thread():
        found = place_from(sys._current_frames().get(threading.main_thread().ident), depth)
    return found or ("torch", "")


def place_from(frame, depth: int) -> tuple[str, str] | None:
    function, lines = "", []
    while frame and len(lines) < depth:
        file = frame.f_code.co_filename
        watched = file.startswith(ROOT) and not file.startswith(WATCHING)
        if watched and "site-packages" not in file:
            file = file.removeprefix(ROOT)
            function = function or f"{file}:{frame.f_code.co_qualname.split('.<locals>')[0]}"
            lines.append(f"{file}:{frame.f_lineno}")
        frame = frame.f_back
    return (function, " < ".join(lines)) if lines else None


def on_cuda(x) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def kind_of(device) -> str | None:
    return None if device is None else torch.device(device).type


OWN = (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)  # other classes unwrap themselves first
ATTENTION = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
    "_safe_softmax": "math",
}


class Machine(Storages):
    """As a context: everything inside runs on it."""

    def __init__(self):
        super().__init__()
        self.answers = {"any": True}  # by the function that made it: what a truth read off is
        self.made_by = WeakIdKeyDictionary()  # truths on the GPU -> that function
        self.now, self.host, self.host_peak = 0, 0, 0  # host: fake tensors of the CPU
        self.stage = ""
        self.reset()

    def reset(self) -> None:
        """Counts anew what happens and what is highest; what is alive stays."""
        self.peak, self.peak_at, self.ops = self.now, "", 0
        self.stages: dict[str, int] = {}
        self.events: list[Event] = []
        self.collectives: list[str] = []
        self.kernels: Counter[str] = Counter()

    # --- bytes -----------------------------------------------------------------------------------

    def count(self, counted: list, size: int) -> None:
        (before, device, _), counted[0] = counted, size
        change = size - before
        if device == "meta":
            return
        if device == "cpu":
            self.host += change
            self.host_peak = max(self.host_peak, self.host)
            return
        self.now += change
        self.stages[self.stage] = max(self.stages.get(self.stage, 0), self.now)
        if self.now > self.peak + 2**20:  # a place for every byte would take long to look up
            self.peak_at = f"{self.stage}: {place(4)[1]}"
        self.peak = max(self.peak, self.now)

    def __enter__(self):
        self.lift, self.resize = torch._C._only_lift_cpu_tensors(), torch.UntypedStorage.resize_
        torch._C._set_only_lift_cpu_tensors(True)
        torch.UntypedStorage.resize_ = self.heard(self.resize)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.lift)
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    # --- what happens ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if any(kind not in OWN for kind in types):
            return NotImplemented
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor asks for shapes, of the whole: no memory
        flat = tensors_in((args, *kwargs.values()))
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self.say(func, flat)
        device = kind_of(kwargs.get("device"))
        if device != "cuda" and not any(isinstance(x, FakeTensor) for x in flat):
            big = is_big(func, args, device)
            return self.make(func, args, kwargs) if big else func(*args, **kwargs)
        self.ops += 1
        if func is aten._local_scalar_dense.default:
            return self.read(args[0])
        if func is aten._to_copy.default:
            return self.moved(func, args, kwargs, device)
        if func is aten.copy_.default:
            return self.copied(func, args, kwargs)
        if func in (aten.index.Tensor, aten.index_put_.default):
            self.look_up(args)
        elif func in (aten.nonzero.default, aten.masked_select.default, aten.equal.default):
            self.note("nonzero", 1)
        out = self.make(func, args, kwargs)
        if kernel := ATTENTION.get(func.__name__.split(".")[0]):
            shape = "x".join(map(str, args[0].shape))
            self.kernels[f"{kernel} {shape} {place(1)[0]}"] += 1
        if isinstance(out, FakeTensor) and out.dtype == torch.bool and out.ndim == 0:
            self.made_by[out] = func.__name__.split(".")[0]
        return out

    def make(self, func, args, kwargs):
        """What comes of it, without memory."""
        out, _ = self.compute.run(func, tensors_in((args, *kwargs.values())), args, kwargs)
        for x in tensors_in(out):
            if isinstance(x, FakeTensor):
                self.see(x)
        return out

    def note(self, kind: str, size: int, ahead: bool = False) -> None:
        self.events.append(Event(kind + " ahead" * bool(ahead), *place(3), size))

    def say(self, func, flat: list[Tensor]) -> None:
        name = func.__name__.split(".")[0]
        if name != "wait_tensor":
            self.collectives.append(f"{name} {[tuple(x.shape) for x in flat]}")

    def read(self, x: FakeTensor):
        """A number is 1, a truth what `answers` has of it."""
        if on_cuda(x):
            self.note("item", x.dtype.itemsize)
        if x.dtype == torch.bool:
            return self.answers.get(self.made_by.get(x, ""), True)
        return 1.0 if x.dtype.is_floating_point else 1

    def moved(self, func, args, kwargs, device: str | None):
        """To another device or dtype. What comes to the CPU and is small is real there: ones."""
        x, dtype = args[0], kwargs.get("dtype") or args[0].dtype
        if device == "cuda" and not on_cuda(x):
            self.note("cpu->cuda", x.nbytes, kwargs.get("non_blocking"))
            if not isinstance(x, FakeTensor):  # leave no weak reference to it
                how = {"dtype": dtype, "device": kwargs["device"]}
                return self.make(aten.empty_strided.default, (x.shape, x.stride()), how)
        elif device == "cpu" and on_cuda(x):
            self.note("cuda->cpu", x.nbytes, kwargs.get("non_blocking"))
            if x.numel() * dtype.itemsize <= BIG:
                return torch.ones(x.shape, dtype=dtype)
        return self.make(func, args, kwargs)

    def copied(self, func, args, kwargs):
        into, x = args[:2]
        if on_cuda(into) != on_cuda(x) and (x.ndim or on_cuda(x)):  # else a number among arguments
            kind = "cpu->cuda" if on_cuda(into) else "cuda->cpu"
            self.note(kind, x.nbytes, len(args) > 2 and args[2])
        return self.make(func, args, kwargs) if isinstance(into, FakeTensor) else into

    def look_up(self, args) -> None:
        """Indices may be on the CPU, and are copied; a table on the CPU takes none of the GPU."""
        table, indices = args[0], [x for x in args[1] if isinstance(x, Tensor)]
        if any(map(on_cuda, indices)) and not on_cuda(table):
            raise CudaError(f"indices on cuda, table on cpu ({place(3)[1]})")
        if on_cuda(table):
            for x in indices:
                if not on_cuda(x):
                    self.note("cpu->cuda", x.nbytes)
        if any(x.dtype == torch.bool for x in indices):
            self.note("nonzero", 1)


def is_big(func, args, device: str | None) -> bool:
    """Whether it makes a tensor of the CPU that need not be real."""
    if func is aten._to_copy.default:
        return args[0].device.type == "cpu" and args[0].nbytes > BIG
    empty = func is aten.empty.memory_format and device == "cpu"
    return empty and 4 * torch.Size(args[0]).numel() > BIG


if __name__ == "__main__":
    sys.modules["machine"] = sys.modules[__name__]  # full_size.py imports it by that name
    sys.path.insert(0, str(HERE))
    from full_size import main

    main()
