"""LoRA files: adapters under the names that other programs know, out and in again.

    lora_tensors   A and B of each layer -> a file's tensors, in one of three formats
    read_lora      such a file, or anybody's -> A and B by layer; see merging.py
    rank_of        whether a file is one
    load_adapted   a student's LoRA on its teacher's file -> one ordinary network

    kohya       lora_unet_<our name, dots as underscores>.lora_down.weight, .lora_up.weight, .alpha
    comfyui     diffusion_model.<our name>.lora_A.weight, .lora_B.weight
    diffusers   transformer.<diffusers' name>.lora_A.weight, .lora_B.weight

The update is B A; alpha, where there is one, is the rank, so that nobody scales. A convolution's A
is one with `rank` channels, its B is 1 x 1. Of a fused layer (q, k, v) each part has the same A and
its own rows of B, which is exact. Knows the families' tables, no family.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter import Pairs, merged
from config import LORA_FORMATS, Refusal
from nets.names import renamed
from nets.weights import assign, open_weights
from teachers import Teacher
from teachers.merging import ALPHA, ENDS, read_adapters, swap

FORMATS = {  # what precedes a layer's name, and what follows for A and for B
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
    "comfyui": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
}


def format_of(family: Teacher, asked: str) -> str:
    """ValueError for a format in which the family's layers have no names."""
    chosen = family.lora_format if asked == "own" else asked
    if chosen == "diffusers" and not family.other_names():
        others = ", ".join(name for name in LORA_FORMATS if name != "diffusers")
        raise Refusal(f"--lora-format diffusers: {family.name} has no such names; choose {others}")
    return chosen


def stored_names(family: Teacher, kind: str, name: str, rows: int) -> list[tuple[str, int, bool]]:
    """What a layer is called in a file: keys without endings, rows of B, whether halves swap."""
    if kind != "diffusers":
        key = name.replace(".", "_") if kind == "kohya" else name
        return [(FORMATS[kind][0] + key, rows, False)]
    other = renamed(family.other_names(), name)
    assert other, f"{family.name}'s table of diffusers' names lacks {name}"
    keys = (FORMATS[kind][0] + key for key in other.names)
    return [(*part, other.swapped) for part in zip(keys, other.rows(rows), strict=True)]


def lora_tensors(family: Teacher, kind: str, added: Pairs, net: nn.Module) -> dict[str, Tensor]:
    """added: A (rank, in) and B (out, rank) by layer; net: the base, for the shapes of kernels."""
    _, ends_a, ends_b = FORMATS[kind]
    found = {}
    for name, (down, up) in added.items():
        kernel = net.get_submodule(name).weight.shape[1:]
        down = down.unflatten(1, kernel)
        ones = [1] * (len(kernel) - 1)
        stored = stored_names(family, kind, name, len(up))
        parts = up.split([rows for _, rows, _ in stored])
        for (key, rows, swapped), part in zip(stored, parts, strict=True):
            found[key + ends_a] = down.clone()  # a file has no tensor twice
            found[key + ends_b] = swap(part, swapped).reshape(rows, -1, *ones).clone()
            if kind == "kohya":
                found[key + ALPHA] = torch.tensor(float(len(down)))
    return found


def read_lora(path: Path, family: Teacher, net: nn.Module) -> Pairs:
    """Of whichever format; every tensor of the file must belong to a layer of `net`. ValueError."""
    return read_adapters(path, family.known(), net)


def rank_of(path: Path) -> int:
    """Of the first adapter in a file; 0: it holds none."""
    ends = tuple(end for end, part in ENDS.items() if part == "A")
    with open_weights(path) as file:
        first = next((name for name in file.keys() if name.endswith(ends)), None)  # noqa: SIM118
        return file.get_slice(first).get_shape()[0] if first else 0


def load_adapted(
    family: Teacher,
    path: Path,
    about: Mapping[str, str],
    base: list[Path],
    dtype: torch.dtype,
    device: torch.device | str,
    scale: float = 1.0,
    merge: Sequence[str] = (),
) -> nn.Module:
    """about: of the LoRA, its shift and guidance; scale: of what it adds; 0: the teacher. merge:
    into that, before."""
    net = family.load(float(about["shift"]), base, dtype, device, merge)
    added, own = read_lora(path, family, net), family.own_weights(net, float(about["guidance"]))
    state: Mapping[str, Tensor] = net.state_dict()
    touched = ((f"{name}.weight", state[f"{name}.weight"]) for name in added)
    for name, weight in itertools.chain(merged(touched, added, scale), own.items()):
        assign(net, name, weight.to(dtype))
    return net
