"""Weights in, weights out: safetensors only, strict, one tensor at a time.

load_weights   into a network built on any device, "meta" included; one file, or the shards of one
save_weights   written beside the target and renamed, so a reader never sees half a file
read_metadata, digest

A load is all or nothing: names and shapes are compared first, then every tensor is read, cast and
looked at, and only then is the first one assigned. With the network on the meta device that takes
the memory of the network and of one more tensor.
"""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


# --- reading -------------------------------------------------------------------------------------


def open_weights(path: Path):
    """A memory-mapped safetensors file. Raises ValueError or FileNotFoundError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it, or correct the path")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file; fetch it again ({error})"
        ) from None


def shards(path: Path) -> list[Path]:
    """The files behind an index (`*.safetensors.index.json`), all of them there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it, or correct the path")
    try:
        listed = json.loads(path.read_text())["weight_map"].items()
        files = {path.parent / file: name for name, file in listed}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged or no index of shards; fetch it again") from None
    for file, name in files.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, a shard named in {path.name} (it holds {name}); fetch it"
            )
    return sorted(files)


def places(paths: Sequence[Path], prefix: str) -> dict[str, Path]:
    """The tensors whose names begin with `prefix`, and which file holds each."""
    found = {}
    for path in paths:
        with open_weights(path) as file:
            names = [name for name in sorted(file.keys()) if name.startswith(prefix)]
        for name in names:
            if name in found:
                raise ValueError(f"{name} is in {found[name]} and in {path}; give one of them")
            found[name] = path
    return found


def compare_names(wanted: Collection[str], found: Collection[str], path: Path) -> None:
    """Every name wanted is found, and no other."""
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"{path} holds another network: "
            f"{len(missing)} names missing ({', '.join(missing[:5])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:5])}); give the file of this one"
        )


def compare_form(name: str, shape: Sequence[int], path: Path) -> None:
    """A tensor of the file has the shape wanted, and floating-point numbers."""
    with open_weights(path) as file:
        stored = file.get_slice(name)
    if stored.get_shape() != list(shape):
        raise ValueError(
            f"{path}: {name} has shape {stored.get_shape()}, the network wants {list(shape)}; "
            f"give the file of this network"
        )
    if stored.get_dtype() not in FLOATS:
        raise ValueError(
            f"{path}: {name} is stored as {stored.get_dtype()}, a quantised or foreign copy; "
            f"fetch the original file, which has {', '.join(FLOATS)}"
        )


def read_tensor(name: str, path: Path, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """One tensor, cast to `dtype`, finite.

    Through a mapping of its own: the pages of a mapping count as memory until it is closed. And
    copied, so that no tensor depends on a file that may be replaced.
    """
    with open_weights(path) as file:
        tensor = file.get_tensor(name).to(device, dtype, copy=True)
    low, high = tensor.aminmax()  # NaN if any element is; unlike isfinite(), takes no memory
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(
            f"{path}: {name} holds values that are not finite in {dtype}; fetch the file again"
        )
    return tensor


def load_weights(
    net: nn.Module,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
) -> nn.Module:
    """Assigns each tensor of the file, cast to `dtype`. Raises ValueError or FileNotFoundError.

    path: a file, an index of shards, or a list of files. prefix: what precedes this network's names
    in a file that holds several networks. ignore: names in the file of what is no weight.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    if paths[0].name.endswith(".index.json"):
        paths = shards(paths[0])
    wanted = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    found = places(paths, prefix)
    compare_names(wanted, found.keys() - set(ignore), paths[0])
    for name, tensor in wanted.items():
        compare_form(name, tensor.shape, found[name])
    tensors = {name: read_tensor(name, found[name], dtype, device) for name in wanted}
    for name, tensor in tensors.items():
        assign(net, name.removeprefix(prefix), tensor)
    return net


def assign(net: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces one parameter or buffer by name."""
    owner, _, leaf = name.rpartition(".")
    module = net.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(
            tensor, requires_grad=module._parameters[leaf].requires_grad
        )
    else:
        module._buffers[leaf] = tensor


def read_metadata(path: Path) -> dict[str, str]:
    with open_weights(path) as file:
        return file.metadata() or {}


# --- writing -------------------------------------------------------------------------------------


def save_weights(net: nn.Module, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Every tensor in `dtype`, in the order of names, as in the official files."""
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in net.state_dict().items()
    }
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def digest(net: nn.Module) -> str:
    """A short fingerprint of a network's weights."""
    total = hashlib.blake2b(digest_size=8)
    for name, tensor in net.state_dict().items():
        total.update(json.dumps([name, *tensor.shape]).encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
