"""Files that torch.save wrote (.pt, .pth, .bin), as safetensors: judges are published so.

safetensors_of   the copy of such a file
first_line       of an error, for a message
"""

import pickle
from pathlib import Path

import torch

from config import Refusal
from nets.weights import write

# What torch.load raises for a damaged file, and what follows from one of something else.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError)
UNREADABLE += (AttributeError, TypeError)


def safetensors_of(path: Path) -> Path:
    """A file that torch.save wrote (.pt, .pth, .bin) -> its copy beside it, NAME.safetensors.

    The copy is made once, and again if the file is newer. Tensors alone are read: what else a file
    can hold is code, which would run. A dict of tensors, or one under "state_dict". ValueError.
    """
    if path.suffix not in (".pt", ".pth", ".bin") or not path.is_file():
        return path
    copy = path.with_name(path.name + ".safetensors")
    if copy.is_file() and copy.stat().st_mtime >= path.stat().st_mtime:
        return copy
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    except UNREADABLE as error:
        reason = first_line(error)
        raise Refusal(f"{path} is damaged, or no dict of tensors ({reason})") from None
    try:
        write(tensors, copy, {})
    except TypeError as error:
        raise Refusal(f"{path} is no dict of tensors ({first_line(error)})") from None
    return copy


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
