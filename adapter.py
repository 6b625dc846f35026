"""Adapters: one frozen network in several roles, of which only small additions are trained.

    W x + B (A x)   Adapted         a layer of the base, and what a role adds to it
    a role          adapted         a view of the base: its weights, never copied, and adapters
    A               watched, aim    reads where most of a layer's input is (or `anywhere`)
    W + B A         merged          the weights of one ordinary network

A (rank, in) is fixed before training and shared by all roles; B (out, rank) begins as zero and is
all that a role trains. The average of two roles' B is then that of their weights: IDA stays exact
(but where A is trained too, `both`). A's rows are orthogonal, of length sqrt(in / rank): a step of
Adam moves a row of W as far as training all of W would, at any rank.

`named_parameters()` of a view gives its adapters alone; the weights that it shares are hidden from
optimizers, checkpoints and shards. It has modules of its own around them, so what a backward pass
computes again has the role of its forward pass. Knows nothing of ranks, files or configuration.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schedule import generator

Pairs = dict[str, tuple[Tensor, Tensor]]  # A (rank, in), B (out, rank) by a layer's name


class Adapted(nn.Module):
    """W x + bias + B (A x). A convolution's A makes `rank` channels, B mixes them at each place.

    `down` is A, in the base's dtype; `up` is B, in fp32, as is a trained A.
    """

    def __init__(self, layer: nn.Module, rank: int, dtype: torch.dtype, both: bool):
        super().__init__()
        self.shared = (layer,)  # in a tuple, where a module does not look
        size, weight = layer.weight[0].numel(), layer.weight
        rank = min(rank, size, len(weight))
        down = torch.zeros(rank, size, dtype=torch.float32 if both else dtype, device=weight.device)
        self.up = nn.Parameter(down.new_zeros(len(weight), rank, dtype=torch.float32))
        if both:
            self.down = nn.Parameter(down)
        else:
            self.register_buffer("down", down)

    def forward(self, x: Tensor) -> Tensor:
        layer, down, up = self.shared[0], self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            down = down.unflatten(1, layer.weight.shape[1:])
            low = F.conv2d(x, down, None, layer.stride, layer.padding)
            return layer(x) + F.conv2d(low, up[..., None, None])
        return layer(x) + F.linear(F.linear(x, down), up)


def layers(base: nn.Module, words: Collection[str] = ()) -> dict[str, nn.Module]:
    """Linear layers and convolutions of the blocks, by names that have one of the words."""
    inside = {module for block in base.blocks() for module in block.modules()}
    named = {n: m for n, m in base.named_modules() if any(word in n for word in words or ("",))}
    found = {n: m for n, m in named.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {n: m for n, m in found.items() if m in inside and getattr(m, "groups", 1) == 1}


def adapted(
    base: nn.Module,
    where: Mapping[str, nn.Module],
    rank: int,
    both: bool = False,
    own: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A view of `base` that computes what `base` does until its B are trained.

    where: of `layers`; own: weights, by name, that this role has in place of the base's.
    """
    shared = {id(x): x for x in (*base.parameters(), *base.buffers(), *where.values())}
    view = copy.deepcopy(base, shared)  # with modules of its own around what is shared
    dtype = next(base.parameters()).dtype
    for name, layer in where.items():
        view.set_submodule(name, Adapted(layer, rank, dtype, both))
    for module in view.modules():
        module.__dict__.pop("forward", None)  # how the base's is run, compiled or not, is its own
        weights = {**module._parameters, **module._buffers}
        for name, weight in () if isinstance(module, Adapted) else weights.items():
            delattr(module, name)
            setattr(module, name, None if weight is None else weight.detach())  # no parameter
    for name, weight in (own or {}).items():
        setattr(view.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], weight)
    return view


def adapters(view: nn.Module) -> dict[str, Adapted]:
    return {name: m for name, m in view.named_modules() if isinstance(m, Adapted)}


def pairs(view: nn.Module) -> Pairs:
    return {name: (m.down.detach(), m.up.detach()) for name, m in adapters(view).items()}


@contextmanager
def watched(views: Iterable[nn.Module], rows: int) -> Iterator[dict[str, Tensor]]:
    """By layer, random mixtures (rows, in) of all that comes in while the views are called."""
    found, draws = {}, {}

    def see(adapter: Adapted, given: tuple[Tensor], name: str) -> None:
        layer, x = adapter.shared[0], given[0].detach().float()
        if isinstance(layer, nn.Conv2d):  # what the kernel sees at each place
            x = F.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride).mT
        draw, x = draws.setdefault(x.device, torch.Generator(x.device)), x.flatten(0, -2)
        mix = torch.randn(rows, len(x), device=x.device, generator=draw)
        with torch.autocast(x.device.type, enabled=False):
            found[name] = found.get(name, 0) + mix @ x

    every = [pair for view in views for pair in adapters(view).items()]
    hooks = [m.register_forward_pre_hook(partial(see, name=name)) for name, m in every]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def anywhere(view: nn.Module, seed: int) -> dict[str, Tensor]:
    """As if what comes in had no direction that it prefers."""
    draw = generator(seed, "adapter")
    return {n: torch.randn(m.down.shape, generator=draw) for n, m in adapters(view).items()}


@torch.no_grad()
def aim(views: Collection[nn.Module], found: Mapping[str, Tensor]) -> None:
    """Sets A in all views: its rows are the leading singular directions of these mixtures."""
    for name, mixtures in found.items():
        directions = torch.linalg.svd(mixtures, full_matrices=False).Vh
        for down in (view.get_submodule(name).down for view in views):
            down.copy_(directions[: len(down)] * (down.shape[1] / len(down)) ** 0.5)


@torch.no_grad()
def merged(
    weights: Iterable[tuple[str, Tensor]], added: Pairs, scale: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """The base's weights, one by one -> an ordinary network's: W + scale B A, in fp32."""
    for name, weight in weights:
        pair = added.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair:
            down, up = (x.to(weight.device, torch.float32) for x in pair)
            product = up @ down
            weight = product.mul_(scale).view_as(weight).add_(weight)  # one tensor more, no other
        yield name, weight
