"""A teacher without files, and ranks that talk to nobody: for the plan, which loads nothing.

unloaded     the teacher, whose networks have no weights and whose text has the right shapes
Text         its text encoders, which read as many tokens as they would
one_of       this process as rank 0 of so many, eight to a node
"""

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import teachers
from config import Config
from discriminator import SpectralConv
from engine import build
from engine.batch import Batch, load_batch
from engine.meter import CPU, Meter
from teachers import Teacher, find

NODE = 8  # GPUs of one machine


class Text(nn.Module):
    def __init__(self, family: Teacher, meter: Meter, nets: list[tuple[nn.Module, int]], dtype):
        super().__init__()
        self.family, self.meter, self.dtype = family, meter, dtype
        self.nets = nn.ModuleList(meter.hollow(net, dtype) for net, _ in nets)
        self.lengths = [tokens for _, tokens in nets]
        self.requires_grad_(False)

    def forward(self, captions, device, sizes) -> dict[str, Tensor]:
        for net, length in zip(self.nets, self.lengths, strict=True):
            net(self.meter.empty(len(captions), length, dtype=torch.long))
        shapes = self.family.cond_shapes().items()
        return {name: self.meter.empty(len(captions), *x, dtype=self.dtype) for name, x in shapes}


class Reader(nn.Module):
    """What reads captions for the discriminator."""

    def __init__(self, net: nn.Module | None, width: int, meter: Meter):
        super().__init__()
        self.net, self.width, self.meter = net, width, meter

    def embedding(self, captions, device) -> Tensor:
        return self.meter.empty(len(captions), self.width)


def unloaded(family: Teacher, meter: Meter, cached: bool, t5: bool = True) -> Teacher:
    """cached: text comes from a cache, so its encoders are not there."""

    def form(make: Callable, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            net = make()
        return meter.hollow(net, dtype)

    def frozen(make: Callable, dtype: torch.dtype) -> nn.Module:
        return form(make, dtype).requires_grad_(False).eval()

    class Unloaded(type(family)):
        def locate(self, *_, **__):
            return defaultdict(list)

        def load(self, shift, path, dtype=torch.float32, device="cpu", merge=()):
            if torch.device(device).type == "meta":
                return super().load(shift, path, dtype, device)
            return form(partial(self.build, shift), dtype)

        def read(self, shift, path, dtype, device, merge=()):
            for name, x in self.load(shift, path, dtype, "meta").state_dict().items():
                yield name, meter.empty(*x.shape, dtype=x.dtype)

        def load_vae(self, files, dtype, device):
            return frozen(self.build_vae, dtype)

        def load_backbone(self, files, dtype, device):
            return frozen(self.build_backbone, dtype)

        def load_text(self, files, dtype, device):
            with torch.device("meta"):
                nets = [] if cached else self.text_networks(t5)
            return Text(self, meter, nets, dtype)

        def load_reader(self, files, dtype, device):
            alone = not (cached or self.reads_itself)
            net = frozen(self.build_reader, dtype) if alone else None
            return Reader(net, self.embedding_width(), meter)

    other = copy.copy(family)
    other.__class__ = Unloaded
    return other


@contextmanager
def one_of(gpus: int) -> Iterator[None]:
    if gpus == 1:
        yield
        return
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(max(n for n in range(1, NODE + 1) if gpus % n == 0))
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.pop("LOCAL_WORLD_SIZE")
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


@contextmanager
def without_files(teacher: str, meter: Meter, cached: bool, t5: bool) -> Iterator[None]:
    """Inside, `find` gives it so."""
    family = find(teacher)
    teachers.FOUND[teacher] = unloaded(family, meter, cached, t5)
    try:
        yield
    finally:
        teachers.FOUND[teacher] = family


@contextmanager
def without_numbers() -> Iterator[None]:
    """Inside, heads are built without looking for their singular vectors: there is nothing to find,
    and it takes longer than all else of building."""
    before, SpectralConv.power_iteration = SpectralConv.power_iteration, lambda conv: None
    try:
        yield
    finally:
        SpectralConv.power_iteration = before


# --- a run without memory ------------------------------------------------------------------------


class Run:
    """Networks, optimizers and batches as train.py has them; `meter` is entered."""

    def __init__(self, cfg: Config, meter: Meter, cached: bool):
        self.cfg, self.meter, self.cached = cfg, meter, cached
        with meter.making(), without_numbers():
            self.nets = build.build_nets(cfg, CPU)
        self.built = meter.peak
        self.opts = build.build_learners(self.nets, cfg)
        for name, opt in self.opts.items():
            for p in opt.parameters():
                p.grad = torch.zeros_like(p)
            opt.step(1.0)  # the optimizers' state, as after an iteration
            opt.zero_grad()
            for optimizer in opt.optimizers:
                meter.watch_updates(optimizer, name)
        nets, disc = self.nets, self.nets.disc
        for part in ("student", "teacher", "fake"):
            meter.watch(getattr(nets, part), part, "forward")
        meter.watch(nets.vae, "VAE", "decode", "encode")
        meter.watch(nets.text, "text", "forward")
        if disc:
            meter.watch(disc, "discriminator", "features", "condition", "forward")

    def load(self, ids: range) -> Batch:
        """From the encoders, or as a cache would have it."""
        cfg, nets, empty = self.cfg, self.nets, self.meter.empty
        captions, images = [""] * len(ids), empty(len(ids), 3, *cfg.size)
        if self.cached:
            rows = {f"cond.{name}": x for name, x in nets.text(captions, CPU, ()).items()}
            rows["latent"] = empty(len(ids), *nets.family.latent_shape(cfg.size))
            if nets.reader:
                rows["reader"] = nets.reader.embedding(captions, CPU)
            nets.cache = SimpleNamespace(rows=lambda *_: rows)
        pairs = SimpleNamespace(captions=captions, images=images, sizes=None)
        return load_batch(ids, pairs, nets, cfg, CPU)

    def latents(self, count: int) -> Tensor:
        """Of so many images, at most a batch."""
        shape = self.nets.family.latent_shape(self.cfg.size)
        return self.meter.empty(min(count, self.cfg.batch), *shape)

    def resident(self) -> dict[str, int]:
        """Bytes that are always there."""
        nets, state = self.nets, [x for opt in self.opts.values() for x in states(opt)]
        heads = nets.disc.heads if nets.disc else None
        parts = {
            "student": [nets.student],
            "fake score": [nets.fake],
            "average of the student": [nets.ema] if nets.ema is not nets.student else [],
            "heads of the discriminator": [heads] if heads else [],
            "teacher": [nets.teacher],
            "VAE": [nets.vae],
            "backbone of the discriminator": [nets.disc.backbone] if nets.disc else [],
            "text encoders": [net for net in (nets.text, nets.reader) if net],
        }
        found = {name: held(tensors(*part)) for name, part in parts.items()}
        found["state of the optimizers"] = held(state)
        return {name: size for name, size in found.items() if size}

    def saved(self) -> int:
        """Bytes of a checkpoint: whole weights, and the optimizers' state."""
        trained = [p for net in self.nets.trained().values() for p in net.state_dict().values()]
        state = [x for opt in self.opts.values() for x in states(opt)]
        return sum(x.numel() * x.element_size() for x in [*trained, *state])

    def loading(self) -> int:
        """Bytes of rank 0's host: the heads, drawn there, or the largest tensor of a file."""
        nets = self.nets
        drawn = sum(4 * p.numel() for p in nets.disc.heads.parameters()) if nets.disc else 0
        return drawn + max(4 * p.numel() for p in nets.student.parameters())


def tensors(*nets: nn.Module) -> list[Tensor]:
    return [x for net in nets for x in (*net.parameters(), *net.buffers())]


def states(opt: build.Learner) -> list[Tensor]:
    every = (s for optimizer in opt.optimizers for s in optimizer.state.values())
    return [x for s in every for x in s.values() if isinstance(x, Tensor)]


def held(found: Iterable[Tensor]) -> int:
    """Bytes of this rank."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in found)
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in local}.values())
