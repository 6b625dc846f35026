"""LoRA files read, whoever wrote them, and merged into a base (--merge).

    read_adapters   a file -> A and B by layer
    read_merged     several, as --merge names them, as one
    not_merged      a remark on what of a file is for text encoders

The update is B A alpha / rank; without alpha, B A. Layers may be called by any of the teacher's
tables, after any of STARTS; q, k and v may be apart or one.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter import Pairs
from config import Refusal
from nets.names import Known, Other, renamed
from nets.strict import listed, open_weights
from nets.weights import read_metadata

ALPHA = ".alpha"
# What precedes a layer's name in files of other programs; the longer first.
STARTS = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
)
STARTS += ("lora_unet_", "lora_transformer_", "")
ENDS = {  # what follows it, for A and for B
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ALPHA: "alpha",
}
OF_TEXT = ("lora_te", "text_encoder", "lora_text", "te1.", "te2.", "clip_l.", "clip_g.", "t5xxl.")
ABOUT = "lora_adapter_metadata"  # where diffusers says alpha


@dataclass(frozen=True)
class Place:
    """Rows of a layer of ours that an adapter has."""

    layer: str
    first: int
    rows: int
    swapped: bool


def places_of(known: Known, net: nn.Module) -> dict[str, list[Place]]:
    """By a name in a file, dots as dots and as underscores, whose rows its B has, in order."""
    found: dict[str, list[Place]] = {}
    kinds = (nn.Linear, nn.Conv2d)
    rows = {n: len(m.weight) for n, m in net.named_modules() if isinstance(m, kinds)}
    for table in known.tables.values():
        named = defaultdict(list)
        for layer, count in rows.items():
            other, first = renamed(table, layer) or Other((layer,)), 0
            for name, part in zip(other.names, other.rows(count), strict=True):
                named[name].append(Place(layer, first, part, other.swapped))
                first += part
        for name, those in named.items():
            found.setdefault(name, those)
            found.setdefault(name.replace(".", "_"), those)
    return found


def read_adapters(path: Path, known: Known, net: nn.Module, scale: float = 1.0) -> Pairs:
    """Every tensor of the file must belong to a layer of `net`, text encoders' aside. ValueError.

    A (rank, in) and B (out, rank) by layer, in fp32; what multiplies their product is in B.
    """
    with open_weights(path) as file:
        names = [name for name in file.keys() if not name.startswith(OF_TEXT)]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    adapters, odd = sorted_out(tensors)
    if not adapters:
        raise Refusal(f"{path} is no LoRA of {known.teacher}: {its_first(names)}")
    where, found = places_of(known, net), defaultdict(list)
    keys = {key: where.get(bare(key)) or where.get(key) for key in adapters}
    odd += [key for key, those in keys.items() if those is None]
    odd += [f"{key} with A or B alone" for key, x in adapters.items() if not {"A", "B"} <= x.keys()]
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise Refusal(f"{path} is no LoRA of {known.teacher}: nothing is called {min(odd)}{more}")
    given = said_scale(path)
    for key, parts in adapters.items():
        those = keys[key]
        down, up = (parts[x].float().flatten(1) for x in "AB")
        alpha = float(parts["alpha"]) / len(down) if "alpha" in parts else given
        shape = net.get_submodule(those[0].layer).weight.shape
        wanted = (sum(place.rows for place in those), shape[1:].numel())
        if (len(up), down.shape[1]) != wanted or len(down) != up.shape[1]:
            raise Refusal(f"{path} does not fit {key} of {known.teacher}; give its own LoRA")
        pieces = up.split([place.rows for place in those])
        for place, piece in zip(those, pieces, strict=True):
            found[place.layer].append((place, down, scale * alpha * swap(piece, place.swapped)))
    return {
        name: together(parts, len(net.get_submodule(name).weight)) for name, parts in found.items()
    }


def swap(up: Tensor, swapped: bool) -> Tensor:
    return torch.cat(up.chunk(2)[::-1]) if swapped else up


def sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A, B and alpha by what precedes their names' ends; and the names that end otherwise."""
    adapters, odd = defaultdict(dict), []
    for name, tensor in tensors.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end:
            adapters[name.removesuffix(end)][ENDS[end]] = tensor
        else:
            odd.append(name)
    return {key: parts for key, parts in adapters.items() if parts.keys() != {"alpha"}}, odd


def bare(key: str) -> str:
    return next(key.removeprefix(start) for start in STARTS if key.startswith(start))


def its_first(names: Collection[str]) -> str:
    return f"its first name is {min(names)}" if names else "it has nothing for the denoiser"


def together(parts: list[tuple[Place, Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """One A and one B of a layer, whose parts, or several adapters, have their own."""
    downs, ups = [], []
    for place, down, up in sorted(parts, key=lambda part: part[0].first):
        whole = up.new_zeros(rows, up.shape[1])
        whole[place.first : place.first + place.rows] = up
        downs.append(down)
        ups.append(whole)
    return torch.cat(downs), torch.cat(ups, dim=1)


def said_scale(path: Path) -> float:
    """alpha / rank as diffusers' metadata say it, where no tensor does; 1. ValueError."""
    text = read_metadata(path).get(ABOUT)
    if text is None:
        return 1.0
    try:
        about = {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}
        if about.get("alpha_pattern") or about.get("rank_pattern"):
            raise Refusal(f"{path} has another alpha for some layers, by {ABOUT}; not read here")
        return float(about.get("lora_alpha", 1)) / float(about.get("r", about.get("lora_alpha", 1)))
    except (TypeError, AttributeError, json.JSONDecodeError):
        raise Refusal(f"{path}: its {ABOUT} cannot be read") from None


# --- merging -------------------------------------------------------------------------------------


def parse_merge(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE. ValueError, FileNotFoundError."""
    name, colon, number = text.rpartition(":")
    path, scale = Path(text).expanduser(), 1.0
    if colon and not path.exists():
        try:
            path, scale = Path(name).expanduser(), float(number)
        except ValueError:
            raise Refusal(f"--merge {text}: {number} is no number; FILE or FILE:SCALE") from None
    if not math.isfinite(scale):
        raise Refusal(f"--merge {text}: the scale must be a finite number")
    if not path.is_file():
        raise FileNotFoundError(f"--merge {text}: there is no file {path}")
    return path, scale


def read_merged(merge: Sequence[str], known: Known, net: nn.Module) -> Pairs:
    """What --merge adds, as one: the deltas' sum is one product. ValueError."""
    found = defaultdict(list)
    for text in merge:
        path, scale = parse_merge(text)
        for name, (down, up) in read_adapters(path, known, net, scale).items():
            found[name].append((Place(name, 0, len(up), False), down, up))
    return {name: together(parts, len(parts[0][2])) for name, parts in found.items()}


def not_merged(text: str) -> str:
    """A remark on what of a LoRA is for text encoders; "": nothing."""
    path, _ = parse_merge(text)
    with open_weights(path) as file:
        names = sorted(name for name in file.keys() if name.startswith(OF_TEXT))  # noqa: SIM118
    return f"{path}: for text encoders, and not merged: {listed(names)}" if names else ""
