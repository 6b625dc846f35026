"""Weights in, weights out: safetensors only, strict, one tensor at a time.

load_weights   into a network built on any device, "meta" included; every name and shape must match
save_weights   written beside the target and renamed, so a reader never sees half a file
read_metadata, digest
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


def open_weights(path: Path):
    """A memory-mapped safetensors file. Raises ValueError or FileNotFoundError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file; fetch it again ({error})"
        ) from None


def load_weights(
    net: nn.Module, path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """Assigns each tensor of the file, cast to `dtype`.

    Nothing is assigned unless every name and shape agrees.
    """
    wanted = net.state_dict()
    with open_weights(path) as file:
        names = set(file.keys())
        missing, unexpected = sorted(wanted.keys() - names), sorted(names - wanted.keys())
        if missing or unexpected:
            raise ValueError(
                f"{path} holds another network: "
                f"{len(missing)} names missing ({', '.join(missing[:5])}), "
                f"{len(unexpected)} unexpected ({', '.join(unexpected[:5])})"
            )
        for name, tensor in wanted.items():
            shape = file.get_slice(name).get_shape()
            if shape != list(tensor.shape):
                raise ValueError(
                    f"{path}: {name} has shape {shape}, the network wants {list(tensor.shape)}"
                )
        tensors = {}
        for name in wanted:
            tensors[name] = file.get_tensor(name).to(device, dtype)
            if not torch.isfinite(tensors[name]).all():
                raise ValueError(
                    f"{path}: {name} holds values that are not finite; fetch the file again"
                )
    for name, tensor in tensors.items():
        assign(net, name, tensor)
    return net


def assign(net: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replaces one parameter or buffer by name."""
    owner, _, leaf = name.rpartition(".")
    module = net.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(
            tensor, requires_grad=module._parameters[leaf].requires_grad
        )
    else:
        module._buffers[leaf] = tensor


def save_weights(net: nn.Module, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Every tensor in the network's own order and names, in `dtype`."""
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in net.state_dict().items()
    }
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=metadata)
    os.replace(part, path)


def read_metadata(path: Path) -> dict[str, str]:
    with open_weights(path) as file:
        return file.metadata() or {}


def digest(net: nn.Module) -> str:
    """A short fingerprint of a network's weights."""
    total = hashlib.blake2b(digest_size=8)
    for name, tensor in net.state_dict().items():
        total.update(json.dumps([name, *tensor.shape]).encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
