"""Whether a file is what was asked for, told by its header.

open_weights    a safetensors file; or what the file is instead
compare_names   all names that a network wants, and none more but what is known to be no weight
compare_forms   shapes and dtypes
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import Refusal
from nets.disk import check_file
from nets.spelled import spelled

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")  # what people store large networks in
SCALES = (".scale_weight", ".weight_scale")  # of a layer in them, beside its weight
NO_SCALES = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")  # of no use here
# What trainers and mergers leave beside weights, and nobody reads.
NO_WEIGHTS = re.compile(
    r"(\.|^)(position_ids|logit_scale|attn_mask|text_projection(\.weight)?|num_batches_tracked)$"
    r"|(\.|^)loss\.|^model_ema\.|(\.|^)ema_decay$"
)


def open_weights(path: Path):
    """A memory-mapped safetensors file. Raises ValueError or FileNotFoundError in one line."""
    check_file(path)
    try:
        with spelled(path) as named:
            return safe_open(named, framework="pt")
    except SafetensorError as error:
        raise Refusal(
            f"{path} is damaged or no safetensors file; fetch it again ({seen(path) or error})"
        ) from None


BEGINNINGS = {  # of files that are often there in place of weights
    b"version https://git-lfs": "this is git-lfs's pointer to it: git lfs pull",
    b"GGUF": "this is GGUF, which is quantised",
    b"PK": "torch.save wrote this, which may hold code that would run",
    b"\x80": "torch.save wrote this, which may hold code that would run",
    b"<": "this is a web page",
}


def seen(path: Path) -> str:
    """What a file is that is no safetensors file; "": nothing known."""
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        return "it is empty"
    return next((words for begin, words in BEGINNINGS.items() if first.startswith(begin)), "")


def compare_names(wanted: Collection[str], found: Collection[str], path: Path) -> None:
    """Every name wanted is found, and no other but of what is known to be no weight."""
    missing = sorted(set(wanted) - set(found))
    more = sorted(name for name in set(found) - set(wanted) if not NO_WEIGHTS.search(name))
    if not missing and not more:
        return
    scales = [name for name in more if name.endswith(SCALES + NO_SCALES)]
    if scales:
        raise Refusal(f"{path} has weights in 8 bits, with {scales[0]}; fetch the original file")
    if not missing:
        start = f"{path}: this is the network" if len(more) == 1 else f"{path} holds this network"
        raise Refusal(f"{start} and {listed(more, 'more')}; give a file of it alone")
    if not more and 2 * len(missing) < len(wanted):
        raise Refusal(f"{path}: the network lacks {listed(missing)}; give a file that has all")
    raise Refusal(
        f"{path} holds another network: {len(missing)} names missing ({', '.join(missing[:5])}), "
        f"{len(more)} unexpected ({', '.join(more[:5])}); give the file of this one"
    )


def listed(names: Sequence[str], what: str = "") -> str:
    """ "one name more: x", "7 names: a, b, c, d, e, ..."."""
    count = "one name" if len(names) == 1 else f"{len(names)} names"
    shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"{count} {what}: {shown}" if what else f"{count}: {shown}"


def compare_forms(wanted: Mapping[str, Tensor], path: Path, eight_bits: bool = False) -> None:
    """Each tensor of the file has the shape wanted, and floating-point numbers of 16 bits or more.

    eight_bits: or of 8.
    """
    allowed = (*FLOATS, *EIGHT_BITS) if eight_bits else FLOATS
    with open_weights(path) as file:
        for name, tensor in wanted.items():
            stored = file.get_slice(name)
            if stored.get_shape() != list(tensor.shape):
                raise Refusal(
                    f"{path}: {name} has shape {stored.get_shape()}, "
                    f"the network wants {list(tensor.shape)}; give the file of this network"
                )
            if stored.get_dtype() not in allowed:
                raise Refusal(
                    f"{path}: {name} is stored as {stored.get_dtype()}, a quantised or foreign "
                    f"copy; fetch the original file, which has {', '.join(FLOATS)}"
                )
