"""Student, fake score and average as views of one frozen base: --adapter.

    load_views     the base, which is the teacher too, and its views
    off_by         how much an 8-bit base is off
    view_of        one more
    whole_view     of a view that ranks share, one that a rank can call alone
    one_fixed      A of all views in one place; on all ranks as on the first
    adapter_bytes  what is trained and what is not, for who plans

Every rank has the whole base; ranks share the adapters, as copies or as shards.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from adapter import adapted, adapters, layers
from config import Config, Refusal
from engine import ranks
from nets.quantised import KINDS, load_quantised
from teachers import Teacher

Roles = tuple[nn.Module, nn.Module, nn.Module, nn.Module]


def check_views(cfg: Config) -> None:
    """ValueError for what views cannot do."""
    if not cfg.adapter:
        raise Refusal(
            f"--base-dtype {cfg.base_dtype}: what is trained whole has no base; --adapter"
        )
    if cfg.adapter_train == "both" and ranks.world() > 1:
        raise Refusal("--adapter-train both is for one process; choose B")


def load_views(
    cfg: Config,
    family: Teacher,
    path: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> Roles:
    """Student, fake score, average (the student itself without one) and the base, the teacher."""
    base = load_base(cfg, family, path, dtype, device).requires_grad_(False)
    student, fake = view_of(base, cfg, family), view_of(base, cfg, family)
    ema = view_of(base, cfg, family).requires_grad_(False) if cfg.ema else student
    for net in {student: 0, fake: 0, ema: 0} if mesh else ():
        ranks.shard(net, mesh, device, cfg.bf16)
        with torch.no_grad():
            for weight in net.parameters():
                weight.zero_()
    one_fixed(student, fake, ema)
    return student, fake, ema, base


def load_base(
    cfg: Config, family: Teacher, path: list[Path], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """With --base-dtype, linear layers of the blocks in 8 bits, one after the other."""
    if cfg.base_dtype == "bf16":
        return family.load(cfg.shift, path, dtype, device, cfg.merge)
    net = family.load(cfg.shift, path, dtype, torch.device("meta"))
    tensors = family.read(cfg.shift, path, None, device, cfg.merge)
    return load_quantised(net, linear_layers(net), KINDS[cfg.base_dtype], tensors, dtype)


def linear_layers(net: nn.Module) -> list[str]:
    return [name for name, m in layers(net).items() if isinstance(m, nn.Linear)]


@torch.no_grad()
def off_by(kind: str, net: nn.Module, *given) -> float:
    """|v in 8 bits - v| / |v| of a network's prediction v, called with `given`; kind: of KINDS. All
    else is in the network's own dtype."""
    eight = load_quantised(
        copy.deepcopy(net).to("meta"),
        linear_layers(net),
        KINDS[kind],
        net.state_dict().items(),
        next(net.parameters()).dtype,
    )
    whole = net(*given)
    return ((eight(*given) - whole).norm() / whole.norm()).item()


def view_of(base: nn.Module, cfg: Config, family: Teacher) -> nn.Module:
    """ValueError where --adapter-layers leaves none."""
    found = layers(base, cfg.adapter_layers)
    found = {name: m for name, m in found.items() if not name.startswith(family.not_adapted)}
    if not found:
        words, names = " ".join(cfg.adapter_layers), ", ".join([*layers(base)][:3])
        raise Refusal(f"--adapter-layers {words}: no layer has that in its name, such as {names}")
    dtype = next(base.parameters()).dtype
    own = family.own_weights(base, cfg.guidance)
    own = {name: weight.to(dtype) for name, weight in own.items()}
    return adapted(base, found, cfg.adapter, cfg.adapter_train == "both", own)


def whole_view(view: nn.Module, base: nn.Module, cfg: Config, family: Teacher) -> nn.Module:
    """All ranks must ask for it."""
    alone = view_of(base, cfg, family)
    alone.load_state_dict(dict(ranks.gather(view)))
    return alone.requires_grad_(False)


def one_fixed(student: nn.Module, *others: nn.Module) -> None:
    """The student's A, where it is fixed, is that of the others too; the first rank's, of all."""
    for name, adapter in adapters(student).items():
        if "down" in adapter._buffers:
            ranks.from_first(adapter.down)
            for other in others:
                other.get_submodule(name).down = adapter.down


def adapter_bytes(views: list[nn.Module], base: nn.Module) -> tuple[int, int]:
    """Of what is trained (fp32; gradients and Adam's moments are three times that more) and of what
    is not: the base, A, and weights that roles have of their own. Each tensor once."""
    trained = {p for view in views for p in view.parameters() if p.requires_grad}
    frozen = {*base.parameters(), *base.buffers(), *(x for view in views for x in view.buffers())}
    return sum(x.nbytes for x in trained), sum(x.nbytes for x in frozen)
