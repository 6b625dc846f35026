"""Weights in, weights out: safetensors only, strict, one tensor at a time.

load_weights    into a network built on any device, "meta" included; one file, or the shards of one
save_weights    written beside the target and renamed, so a reader never sees half a file
stream_weights  the same from tensors that come one at a time
each_weight     the tensors of a network from its file, one at a time; for whoever deals them out
merge_weights   the same into a copy of a file that holds other networks too
safetensors_of   the copy of a file that torch.save wrote
read_metadata, digest

A load is all or nothing: names and shapes are compared first, then every tensor is read, cast and
looked at, and only then is the first one assigned. With the network on the meta device that takes
the memory of the network and of one more tensor.
"""

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Refusal

MAPPED = 2**23  # bytes read through one mapping
SAMPLE = 2**12  # bytes of a tensor, at each of three places, that tell its file from another
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # as flags name them
EIGHT_BITS = "F8_E4M3"  # what people store large networks in; beside it, scales
SCALES = (".scale_weight", ".scale_input", "scaled_fp8")
IN_8_BITS = "fetch the original file, or train adapters on this: --adapter RANK --base-dtype fp8"
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


# --- reading -------------------------------------------------------------------------------------


def open_weights(path: Path):
    """A memory-mapped safetensors file. Raises ValueError or FileNotFoundError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it, or correct the path")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Refusal(
            f"{path} is damaged or no safetensors file; fetch it again ({error})"
        ) from None


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
    except (SafetensorError, TypeError) as error:
        raise Refusal(f"{copy} cannot be written ({first_line(error)})") from None
    return copy


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def shards(path: Path) -> list[Path]:
    """The files behind an index (`*.safetensors.index.json`), all of them there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch it, or correct the path")
    try:
        listed = json.loads(path.read_text())["weight_map"].items()
        files = {path.parent / file: name for name, file in listed}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(f"{path} is damaged or no index of shards; fetch it again") from None
    for file, name in files.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, a shard named in {path.name} (it holds {name}); fetch it"
            )
    return sorted(files)


def files_of(path: Path | Sequence[Path]) -> list[Path]:
    """The files of a network: a file, those behind an index of shards, or a list of files."""
    paths = [path] if isinstance(path, Path) else list(path)
    return shards(paths[0]) if paths[0].name.endswith(".index.json") else paths


def places(paths: Sequence[Path], prefix: str) -> dict[str, Path]:
    """The tensors whose names begin with `prefix`, and which file holds each."""
    found = {}
    for path in paths:
        with open_weights(path) as file:
            names = [name for name in sorted(file.keys()) if name.startswith(prefix)]
        for name in names:
            if name in found:
                raise Refusal(f"{name} is in {found[name]} and in {path}; give one of them")
            found[name] = path
    return found


def has_eight_bits(paths: Sequence[Path]) -> bool:
    """Whether a weight of these files is stored so."""
    for path in paths:
        with open_weights(path) as file:
            names = file.keys()
            if any(file.get_slice(name).get_dtype() == EIGHT_BITS for name in names):
                return True
    return False


def compare_names(wanted: Collection[str], found: Collection[str], path: Path) -> None:
    """Every name wanted is found, and no other."""
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise Refusal(
            f"{path} holds another network: "
            f"{len(missing)} names missing ({', '.join(missing[:5])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:5])}); give the file of this one"
        )


def compare_forms(wanted: Mapping[str, Tensor], path: Path, eight_bits: bool = False) -> None:
    """Each tensor of the file has the shape wanted, and floating-point numbers of 16 bits or more.

    eight_bits: or of 8.
    """
    allowed = (*FLOATS, EIGHT_BITS) if eight_bits else FLOATS
    with open_weights(path) as file:
        for name, tensor in wanted.items():
            stored = file.get_slice(name)
            if stored.get_shape() != list(tensor.shape):
                raise Refusal(
                    f"{path}: {name} has shape {stored.get_shape()}, "
                    f"the network wants {list(tensor.shape)}; give the file of this network"
                )
            if stored.get_dtype() not in allowed:
                remedy = f"fetch the original file, which has {', '.join(FLOATS)}"
                raise Refusal(
                    f"{path}: {name} is stored as {stored.get_dtype()}, a quantised or foreign "
                    f"copy; {IN_8_BITS if stored.get_dtype() == EIGHT_BITS else remedy}"
                )


def each_tensor(
    names: Collection[str], path: Path, dtype: torch.dtype | None, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file by name, cast to `dtype` (None: as stored), finite.

    Through many mappings: the pages of a mapping count as memory until it is closed. And copied, so
    that no tensor depends on a file that may be replaced.
    """
    waiting = list(reversed(names))
    while waiting:
        with open_weights(path) as file:
            read = 0
            while waiting and read < MAPPED:
                name = waiting.pop()
                stored = file.get_tensor(name)
                read += stored.nbytes
                tensor = stored.to(device, dtype or stored.dtype, copy=True)
                check_finite(tensor, name, path)
                yield name, tensor


def read_tensors(
    names: Collection[str], path: Path, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    return dict(each_tensor(names, path, dtype, device))


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    if tensor.dtype == torch.float8_e4m3fn:  # has no such function
        tensor = tensor.bfloat16()
    low, high = tensor.aminmax()  # NaN if any element is; unlike isfinite(), takes no memory
    if not low.isfinite() & high.isfinite():
        raise Refusal(
            f"{path}: {name} holds values that are not finite in {tensor.dtype}; "
            "fetch the file again"
        )


def stored_weights(
    wanted: Mapping[str, Tensor],
    path: Path | Sequence[Path],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors in the order of `wanted`, whose names and shapes they must have, cast to
    `dtype`; None: as stored, be it in 8 bits, and scales of those are not looked at.

    path: see `files_of`. prefix: what precedes this network's names in a file that holds several
    networks; the others are not looked at. ignore: whole names, prefix included, of what is in the
    file and no weight. Raises ValueError or FileNotFoundError.
    """
    paths = files_of(path)
    wanted = {prefix + name: tensor for name, tensor in wanted.items()}
    found = places(paths, prefix)
    scales = {name for name in found if name.endswith(SCALES)}
    if scales and dtype is not None:
        raise Refusal(f"{paths[0]} has weights in 8 bits, {min(scales)} among them; {IN_8_BITS}")
    compare_names(wanted, found.keys() - set(ignore) - scales, paths[0])
    for file in paths:
        forms = {name: wanted[name] for name in wanted if found[name] == file}
        compare_forms(forms, file, eight_bits=dtype is None)
    for file, names in groupby(wanted, found.get):
        for name, tensor in each_tensor(list(names), file, dtype, device):
            yield name.removeprefix(prefix), tensor


def read_weights(
    wanted: Mapping[str, Tensor],
    path: Path | Sequence[Path],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
) -> dict[str, Tensor]:
    """All of `stored_weights`."""
    return dict(stored_weights(wanted, path, dtype, device, prefix, ignore))


def as_named(name: str) -> tuple[str, ...]:
    return (name,)


def share(shape: Sequence[int], count: int, of: int = 1) -> Sequence[int]:
    """The shape of one of `count` tensors whose rows are those of `of` tensors of `shape`."""
    return shape if count == of else (shape[0] * of // count, *shape[1:])


def each_weight(
    net: nn.Module,
    path: Path | Sequence[Path],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
    stored: Callable[[str], tuple[str, ...]] = as_named,
) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors by name, in its own order, cast to `dtype`; see `stored_weights`.

    stored: from a name of the network to the file's; of several, each holds an equal share of the
    rows. Where it gives neighbours one name, each of them is an equal share of that tensor's rows.
    """
    state = net.state_dict()
    parts = {name: stored(name) for name in state}
    owners = Counter(part for names in parts.values() for part in names)
    assert len([*groupby(parts.values())]) == len(set(parts.values())), "only neighbours share"
    wanted = {
        part: torch.empty(share(state[name].shape, len(names), owners[part]), device="meta")
        for name, names in parts.items()
        for part in names
    }
    tensors = stored_weights(wanted, path, dtype, device, prefix, ignore)
    for names, ours in groupby(state, parts.get):
        pieces = [tensor for _, tensor in islice(tensors, len(names))]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        ours = list(ours)
        if len(ours) == 1:
            yield ours[0], whole
            continue
        for name, part in zip(ours, whole.chunk(len(ours)), strict=True):
            yield name, part.clone()  # none keeps the others' memory


def load_weights(
    net: nn.Module,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
    stored: Callable[[str], tuple[str, ...]] = as_named,
) -> nn.Module:
    """Assigns each tensor of the file, all or none; see `each_weight`."""
    read = list(each_weight(net, path, dtype, device, prefix, ignore, stored))
    for name, tensor in read:
        assign(net, name, tensor)
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


def save_weights(
    net: nn.Module, path: Path, dtype: torch.dtype, metadata: dict[str, str], prefix: str = ""
) -> None:
    """Every tensor in `dtype`, in the order of names, as in the official files.

    prefix: what precedes the names in a file that holds several networks.
    """
    tensors = {
        prefix + name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in net.state_dict().items()
    }
    write(tensors, path, metadata)


def stream_weights(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    path: Path,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """The same file from tensors in the order of `shapes`; takes the memory of one of them.

    The format: the header's length in 8 bytes, the header in JSON, the tensors' bytes in order.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        form = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = form
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, tensor), wanted in zip(tensors, shapes, strict=True):
                assert name == wanted, f"tensors come in the order of shapes: {name}, not {wanted}"
                data = tensor.detach().to("cpu", dtype).contiguous().flatten()
                file.write(data.view(torch.uint8).numpy())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def merge_weights(
    state: Iterable[tuple[str, Tensor]],
    path: Path,
    base: Sequence[Path],
    metadata: dict[str, str],
    prefix: str,
) -> None:
    """A copy of the file `base`, in however many shards, with the network under `prefix` replaced.

    state: by name, its tensors. Each keeps the dtype it has in `base`, so names, dtypes, shapes and
    order are those of `base`.
    """
    tensors = {}
    for part in base:
        with open_weights(part) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    theirs, ours = [name for name in tensors if name.startswith(prefix)], []
    for name, tensor in ((prefix + name, x) for name, x in state):
        ours.append(name)
        stored = tensors.get(name, tensor)
        if stored.shape != tensor.shape:
            raise Refusal(
                f"{base[0]}: {name} has shape {[*stored.shape]}, the network wants "
                f"{[*tensor.shape]}; give the file of this network"
            )
        tensors[name] = tensor.detach().to("cpu", stored.dtype).contiguous()
    compare_names(ours, theirs, base[0])
    write(tensors, path, metadata)


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def digest(weights: nn.Module | Path | Sequence[Path], prefix: str = "") -> str:
    """A short fingerprint of a network's weights, or of files.

    Of a network, names, shapes and all bytes. Of files, the same but for the bytes, of which each
    tensor gives three samples: seconds for 24 GB, and blind to a change between them. Metadata, and
    how tensors are dealt out to shards, do not count; the dtype does, so that an fp16 copy of a
    bf16 file has another. What is no file of weights, a tokenizer's, counts whole. prefix: of the
    tensors that count, without it, where files hold several networks. Refusal, FileNotFoundError.
    """
    total = hashlib.blake2b(digest_size=8)
    if isinstance(weights, nn.Module):
        state = weights.state_dict().items()
        parts = ((name, x.shape, x.detach().cpu().contiguous()) for name, x in state)
        parts = ((name, shape, x.view(torch.uint8).numpy().tobytes()) for name, shape, x in parts)
    else:
        parts = sampled(files_of(weights), prefix)
    for name, shape, data in parts:
        total.update(json.dumps([name, *shape]).encode())
        total.update(data)
    return total.hexdigest()


def sampled(paths: Sequence[Path], prefix: str) -> Iterator[tuple[str, list[int], bytes]]:
    """Name, shape and some bytes of each tensor, by name; of another file, all its bytes."""
    found = {}
    for path in paths:
        if path.suffix in (".json", ".txt"):
            yield path.name, [], path.read_bytes()
            continue
        begin, header = read_header(path)
        forms = ((name, x) for name, x in header.items() if name.startswith(prefix))
        found |= {name: (path, begin, form) for name, form in forms}
    for name, (path, begin, form) in sorted(found.items()):
        first, last = (begin + x for x in form["data_offsets"])
        places = (first, (first + last - SAMPLE) // 2, last - SAMPLE)
        with path.open("rb") as file:
            data = b"".join(read_at(file, max(first, place), last) for place in places)
        yield name.removeprefix(prefix), form["shape"], form["dtype"].encode() + data


def read_at(file: BinaryIO, place: int, end: int) -> bytes:
    file.seek(place)
    return file.read(min(SAMPLE, end - place))


def read_header(path: Path) -> tuple[int, dict[str, dict]]:
    """Where the tensors' bytes begin, and what the file says of each tensor by name: dtype, shape,
    data_offsets. The file is whole, as far as its length tells."""
    open_weights(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header
