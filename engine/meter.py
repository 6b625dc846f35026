"""What a run takes of a GPU, read off the run itself: no GPU, no memory, no compiler.

    Meter          inside it a tensor without memory stands for one of the GPU's, a real one for the
                   host's; what a tensor of the GPU takes part in is the GPU's
    Storages       what the tensors seen inside hold; tests/machine.py counts by it too
    Meter.hollow   a network whose weights have no memory; making: all that is made is so
    Meter.watch    what a network does, forward and backward, counts as its own

All are tensors of the CPU to torch, which then does as it does for CUDA where the two differ: norms
under autocast, fused optimizers, contiguous attention. A number read off the GPU is 1, a truth is
True. torch's own FakeTensor knows the shape of every result; most are looked up, since the same few
hundred calls come back a hundred thousand times.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FORMULAS = flop_registry | {  # torch counts the attention kernels of GPUs; these are the CPU's
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}
OWN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)  # other classes unwrap themselves first
CPU = torch.device("cpu")
FAKE = torch._C._TorchDispatchModeKey.FAKE
RESIZING = ("resize_", "set_", "resize_as_")  # in place, and of another size


EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default}
FILLED = {aten.zeros.default, aten.ones.default, aten.full.default, aten.randn.default}


def is_weight(args, how: dict) -> bool:
    """Whether a new tensor could be a network's, or FSDP's, which is where weights come together:
    the host makes no empty one of floats."""
    like = args[0].dtype if isinstance(args[0], Tensor) else torch.float32
    dtype, device = how.get("dtype") or like, how.get("device")
    return dtype.is_floating_point and (device is None or device.type == "cpu")


def tensors_in(given) -> list[Tensor]:
    """However deep; torch's own tree_leaves takes as long as all the rest."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, (tuple, list)):
        return [x for part in given for x in tensors_in(part)]
    return []


def form(given) -> object:
    """Of arguments, all on which the form of a result depends."""
    if isinstance(given, Tensor):
        device = given.fake_device if isinstance(given, FakeTensor) else given.device
        return given.shape, given.stride(), given.dtype, device
    if isinstance(given, (tuple, list)):
        return tuple([form(part) for part in given])
    if isinstance(given, dict):
        return tuple([(name, form(part)) for name, part in given.items()])
    return type(given), given  # 1 and 1.0 are equal, and make other dtypes


@functools.cache
def kind_of(func) -> str:
    """view: of its first argument; in place: it changes
    its first alone; new: tensors of their own; else other."""
    schema = func._schema
    returned = [r.alias_info for r in schema.returns]
    if func.namespace != "aten" or func.__name__.split(".")[0] in RESIZING:
        return "other"
    if schema.is_mutable:
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        first = written == [schema.arguments[0].name]
        return "in place" if not returned or (len(returned) == 1 and first) else "other"
    if any(returned):
        return "view" if len(tensors_in(returned)) == 0 and all(returned) else "other"
    return "new"


class Kernels:
    """What a kernel makes, without its values: forms alone, each kind of call asked once."""

    known: dict[object, tuple] = {}  # of all: call -> (whether many, form of each result, FLOPs)

    def __init__(self):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.stencils: dict[torch.device, dict] = {}

    def make(self, shape, stride, dtype: torch.dtype, device: torch.device = CPU) -> FakeTensor:
        return self.stand_in(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    def stand_in(self, x: Tensor, device: torch.device) -> FakeTensor:
        """As torch makes it of a tensor of the meta device, whose constructor takes longer than all
        the rest of a call."""
        if device not in self.stencils:
            self.stencils[device] = vars(FakeTensor(self.fake, x, device))
        made = Tensor._make_subclass(
            FakeTensor, x, False, dispatch_device=True, device_for_backend_keys=device
        )
        vars(made).update(self.stencils[device])
        return made

    def run(self, func, flat: list[Tensor], args, kwargs) -> tuple[object, int | None]:
        """flat: all tensors of args and kwargs. Returns the result and its FLOPs, None of a view.

        Raises what torch does where devices, dtypes or shapes do not fit.
        """
        kind = kind_of(func)
        if kind == "view" and all([isinstance(x, FakeTensor) for x in flat]):
            with in_kernel_invocation_manager(self.fake):
                seen = func(*args, **kwargs)
            device = args[0].fake_device
            if isinstance(seen, (list, tuple)):
                return [self.stand_in(x, device) for x in seen], None
            return self.stand_in(seen, device), None
        if kind not in ("new", "in place"):
            return self.fake.dispatch(func, (), args, kwargs), 0
        key = func, form(args), form(kwargs)
        if key not in self.known:
            out, flops = self.fake.dispatch(func, (), args, kwargs), 0
            if kind == "new":
                formula = FORMULAS.get(func._overloadpacket)
                flops = formula(*args, **kwargs, out_val=out) if formula else 0
            parts = out if isinstance(out, (list, tuple)) else [out]
            forms = [x if x is None else form(x) for x in parts]
            if all(x is None or isinstance(x, FakeTensor) for x in parts):
                self.known[key] = parts is out, forms, flops
            return out, flops
        many, forms, flops = self.known[key]
        if kind == "in place":
            return (args[0] if func._schema.returns else None), 0
        made = [each and self.make(*each) for each in forms]
        return (made if many else made[0]), flops


class Storages(TorchDispatchMode):
    """Hears of every storage that is seen inside it: what it holds, until its end. See `count`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self):
        super().__init__()
        self.compute = Kernels()
        # By address: its bytes, the kind of its device, who hears of its end.
        self.storages: dict[int, list] = {}

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.storages:
            end = weakref.ref(storage, functools.partial(self.forget, address))
            self.storages[address] = counted = [0, tensor.device.type, end]
            self.count(counted, storage.nbytes())

    def forget(self, address: int, _) -> None:
        self.count(self.storages.pop(address), 0)

    def count(self, counted: list, size: int) -> None:
        """Bytes of one storage, an entry of `storages`, are now `size`."""
        raise NotImplementedError

    def heard(self, resize: Callable) -> Callable:
        """Of storages, which FSDP resizes to free memory and to take it."""

        def resize_(storage, size):
            resize(storage, size)
            if counted := self.storages.get(storage._cdata):
                self.count(counted, storage.nbytes())
            return storage

        return resize_


class Meter(Storages):
    def __init__(self):
        super().__init__()
        self.now, self.is_making = 0, False
        self.part, self.doing = "", "forward"  # which network, and what it does
        self.back = ""  # which one a backward pass is in
        self.reset()

    def reset(self) -> None:
        """Counts anew what happens and what is highest; what is alive stays."""
        self.peak, self.waits, self.read = self.now, 0, None
        self.stages: dict[tuple[str, str], int] = {}  # (network, what it does) -> highest
        self.flops: Counter[str] = Counter()  # by network
        self.again: Counter[str] = Counter()  # of these, what a backward pass computes again
        self.kernels: Counter[tuple[int, int, bool]] = Counter()  # (FLOPs, bytes, in 16 bits)
        self.collectives: Counter[str] = Counter()  # bytes
        # Of a network's last call without a gradient.
        self.flops_of_call: dict[str, int] = {}
        self.kernels_of_call: dict[str, Counter] = {}

    # --- networks --------------------------------------------------------------------------------

    def hollow(self, net: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A network of the meta device, its weights in `dtype`."""
        for module in net.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                weight = self.make(p.shape, p.stride(), dtype or p.dtype)
                setattr(module, name, nn.Parameter(weight, p.requires_grad))
            for name, x in list(module.named_buffers(recurse=False)):
                setattr(module, name, self.make(x.shape, x.stride(), x.dtype))
        return net

    def make(self, shape, stride, dtype: torch.dtype) -> FakeTensor:
        x = self.compute.make(shape, stride, dtype)
        self.see(x)
        return x

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> FakeTensor:
        return self.make(shape, torch.empty(shape, device="meta").stride(), dtype)

    @contextmanager
    def making(self) -> Iterator[None]:
        """New tensors inside have no memory, as networks are built of."""
        self.is_making = True
        yield
        self.is_making = False

    def watch(self, net: nn.Module, part: str, *methods: str) -> None:
        """What these do counts as the part's, and the backward passes from what they return."""
        for name in methods:
            setattr(net, name, functools.partial(self.run, getattr(net, name), part))

    def run(self, method: Callable, part: str, *args, **kwargs):
        before, self.part, flops = self.part, part, sum(self.flops.values())
        kernels = Counter(self.kernels)
        try:
            out = method(*args, **kwargs)
        finally:
            self.part = before
        if not torch.is_grad_enabled():
            self.flops_of_call[part] = sum(self.flops.values()) - flops
            self.kernels_of_call[part] = self.kernels - kernels
        for x in tensors_in(out):
            if x.requires_grad:
                x.register_hook(functools.partial(self.enter, part))
        return out

    def enter(self, part: str, gradient: Tensor) -> None:
        self.back = part

    def watch_updates(self, optimizer: torch.optim.Optimizer, part: str) -> None:
        def begin(*_) -> None:
            self.part, self.doing = part, "update"

        def end(*_) -> None:
            self.part, self.doing = "", "forward"

        optimizer.register_step_pre_hook(begin)
        optimizer.register_step_post_hook(end)

    def stage(self) -> tuple[str, str]:
        if torch._C._current_graph_task_id() >= 0:
            return self.back, "backward"
        return self.part, self.doing

    # --- bytes -----------------------------------------------------------------------------------

    def count(self, counted: list, size: int) -> None:
        self.now, counted[0] = self.now + size - counted[0], size
        stage = self.stage()
        self.stages[stage] = max(self.stages.get(stage, 0), self.now)
        self.peak = max(self.peak, self.now)

    def __enter__(self):
        leave = torch.autocast.__exit__

        def left(self, *error):
            leave(self, *error)
            if torch._C._current_graph_task_id() >= 0:  # a GPU's backward pass has its own thread,
                torch.clear_autocast_cache()  # whose outermost autocast this is

        self.replaced = []
        self.replace(torch.autocast, "__exit__", left)
        resize = torch.UntypedStorage.resize_
        self.replace(torch.UntypedStorage, "resize_", self.heard(resize))
        for kind in (FakeTensor, DTensor):
            self.replace(kind, "is_cuda", True)
            self.replace(kind, "is_cpu", False)
        self.replace(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        for name in ("layer_norm", "group_norm", "rms_norm", "interpolate"):
            self.replace(F, name, in_fp32(getattr(F, name)))
        return super().__enter__()

    def replace(self, owner: object, name: str, value: object) -> None:
        """Until the meter is left."""
        self.replaced.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, value)

    def __exit__(self, *error):
        for owner, name, before, own in self.replaced:
            setattr(owner, name, before) if own else delattr(owner, name)
        return super().__exit__(*error)

    # --- what happens ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if any(kind not in OWN for kind in types):
            return NotImplemented
        if torch._C._get_dispatch_mode(FAKE) is not None:
            return func(*args, **kwargs)  # DTensor asks for shapes, of the whole: no memory
        flat = tensors_in((args, *kwargs.values()))
        if not any([isinstance(x, FakeTensor) for x in flat]):
            new = func in EMPTY or (self.is_making and func in FILLED)
            if not (new and is_weight(args, kwargs)):
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            storage = args[0].untyped_storage()._cdata  # a list comes number by number
            self.waits, self.read = self.waits + (storage != self.read), storage
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives[func.__name__.split(".")[0]] += sum(x.nbytes for x in flat)
        return self.run_kernel(func, flat, args, kwargs)

    def run_kernel(self, func, flat: list[Tensor], args, kwargs):
        """Without its values."""
        out, flops = self.compute.run(func, flat, args, kwargs)
        if flops is None:
            return out
        made = [x for x in tensors_in(out) if isinstance(x, FakeTensor)]
        for x in (*made, *flat):  # flat: also what the host has sent
            self.see(x)
        size = sum([x.nbytes for x in flat]) + sum([x.nbytes for x in made])
        half = bool(flat) and flat[0].dtype.itemsize == 2
        self.kernels[flops, size, half] += 1
        if flops:
            network, doing = self.stage()
            self.flops[network] += flops
            # Only what is computed again wants a gradient inside a backward pass.
            again = doing == "backward" and torch.is_grad_enabled()
            self.again[network] += flops if again else 0
        return out


def in_fp32(function: Callable) -> Callable:
    """As CUDA's autocast computes it; the CPU's takes what comes."""

    def widened(*args, **kwargs) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = [x.float() if isinstance(x, Tensor) else x for x in args]
        return function(*args, **kwargs)

    return widened
