"""Weights in, weights out: safetensors only, strict, one tensor at a time.

load_weights    into a network built on any device, "meta" included; one file, or the shards of one
each_weight     the tensors of a network from its file, one at a time; for whoever deals them out
save_weights    written beside the target and renamed, so a reader never sees half a file
stream_weights  the same from tensors that come one at a time
merge_weights   the same into a copy of a file that holds other networks too
digest          whether weights are the same as before
read_metadata

A load is all or nothing: names and shapes are compared first, then every tensor is read, cast and
looked at, and only then is the first one assigned. With the network on the meta device that takes
the memory of the network and of one more tensor.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Refusal
from nets.disk import check_file, whole
from nets.names import Other
from nets.spelled import spelled
from nets.strict import NO_SCALES, SCALES, compare_forms, compare_names, open_weights

MAPPED = 2**23  # bytes read through one mapping
AVERAGES = "model_ema.diffusion_model"  # of a denoiser's weights, in files that were trained on
SAMPLE = 2**12  # bytes of a tensor, at each of three places, that tell its file from another
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # as flags name them
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


# --- reading -------------------------------------------------------------------------------------


def shards(path: Path) -> list[Path]:
    """The files behind an index (`*.safetensors.index.json`), all of them there."""
    check_file(path)
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


def each_tensor(
    names: Collection[str],
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    wide: Collection[str] = (),
    scales: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file by name, cast to `dtype` (None: as stored), finite.

    wide: those that are cast to fp32 instead. scales: of those in 8 bits, unless as stored. Through
    many mappings: the pages of a mapping count as memory until it is closed. And copied, so that no
    tensor depends on a file that may be replaced.
    """
    waiting = list(reversed(names))
    while waiting:
        with open_weights(path) as file:
            read = 0
            while waiting and read < MAPPED:
                name = waiting.pop()
                stored = file.get_tensor(name)
                read += stored.nbytes
                kind = torch.float32 if name in wide else dtype
                tensor = stored.to(device, kind or stored.dtype, copy=True)
                if kind and scales and name in scales:  # 8 bits are exact in 16: rounded once
                    tensor = (tensor.float() * scales[name].to(device)).to(kind)
                check_finite(tensor, name, path)
                yield name, tensor


def read_tensors(
    names: Collection[str], path: Path, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    return dict(each_tensor(names, path, dtype, device))


def read_scales(wanted: Mapping[str, Tensor], found: Mapping[str, Path]) -> dict[str, Tensor]:
    """Of weights in 8 bits, by their names: one number, or one for each row. found: see `places`.

    Of most files none.
    """
    scales = {}
    for name, path in found.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if not name.endswith(SCALES) or weight not in wanted:
            continue
        with open_weights(path) as file:
            scale, shape = file.get_tensor(name).float(), wanted[weight].shape
        if scale.shape not in {(), (1,), (1, 1), (shape[0],), (shape[0], 1)}:
            raise Refusal(
                f"{path}: {name} has shape {[*scale.shape]}, of scales by blocks; "
                "fetch the original file"
            )
        scales[weight] = scale.reshape(-1, *[1] * (len(shape) - 1))
    return scales


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    if tensor.dtype.itemsize == 1:  # has no such function
        tensor = tensor.bfloat16()
    ends = tensor.aminmax()  # NaN if any element is; unlike isfinite(), takes no memory
    if not all(math.isfinite(x) for x in torch.stack(ends).tolist()):
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
    wide: Collection[str] = (),
    eight_bits: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors in the order of `wanted`, whose names and shapes they must have, cast to
    `dtype`; None: as stored. wide: names of those that are cast to fp32 instead.

    path: see `files_of`. prefix: what precedes this network's names in a file that holds several
    networks; the others are not looked at. ignore: whole names, prefix included, of what is in the
    file and no weight. eight_bits: weights may be stored so, with scales or without. device:
    "meta", to compare the headers alone and read nothing. Raises
    ValueError or FileNotFoundError.
    """
    paths = files_of(path)
    wanted = {prefix + name: tensor for name, tensor in wanted.items()}
    found = places(paths, prefix)
    scales = {name for name in found if name.endswith(SCALES + NO_SCALES)} if eight_bits else set()
    compare_names(wanted, found.keys() - set(ignore) - scales, paths[0])
    for file in paths:
        forms = {name: wanted[name] for name in wanted if found[name] == file}
        compare_forms(forms, file, eight_bits)
    if torch.device(device).type == "meta":  # headers alone
        for name, tensor in wanted.items():
            form = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
            yield name.removeprefix(prefix), form
        return
    how = (dtype, device, {prefix + name for name in wide}, read_scales(wanted, found))
    for file, names in groupby(wanted, found.get):
        for name, tensor in each_tensor(list(names), file, *how):
            yield name.removeprefix(prefix), tensor


def read_weights(wanted: Mapping[str, Tensor], *how, **more) -> dict[str, Tensor]:
    """All of `stored_weights`."""
    return dict(stored_weights(wanted, *how, **more))


def as_named(name: str) -> Other:
    return Other((name,))


def shapes_there(
    state: Mapping[str, Tensor], parts: Mapping[str, Other], owners: Mapping[str, int]
) -> tuple[dict[str, Tensor], set[str]]:
    """What the file must have, as forms by its names; and which of ours are one of those alone."""
    wanted, alone = {}, set()
    for name, x in state.items():
        other = parts[name]
        if len(other.names) == owners[other.names[0]] == 1:
            wanted[other.names[0]] = x
            alone |= set() if other.swapped else {name}
            continue
        for part, rows in zip(other.names, other.rows(len(x)), strict=True):
            wanted[part] = torch.empty(rows * owners[part], *x.shape[1:], device="meta")
    return wanted, alone


def each_weight(
    net: nn.Module,
    path: Path | Sequence[Path],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
    stored: Callable[[str], Other] = as_named,
    wide: Collection[str] = (),
    eight_bits: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors by name, in its own order, cast to `dtype`; see `stored_weights`.

    stored: where a tensor of the network is in the file. Where neighbours are in one, each of them
    is an equal share of its rows. wide: names of tensors that come in fp32 instead. dtype None: as
    stored, the scale of a layer before its weight (NAME.scale_weight); what is put together of
    several, in fp32.
    """
    state = net.state_dict()
    parts = {name: stored(name) for name in state}
    owners = Counter(part for other in parts.values() for part in other.names)
    together = [(names, [*ours]) for names, ours in groupby(state, lambda name: parts[name].names)]
    assert len(together) == len({names for names, _ in together}), "only neighbours share"
    wanted, alone = shapes_there(state, parts, owners)
    if dtype is None:
        wide = state.keys() - {name for name in alone if name not in wide}
    widened = {part for name in wide for part in parts[name].names}
    scales = {}
    if dtype is None:
        raw = {prefix + parts[name].names[0]: state[name] for name in alone - wide}
        scales = read_scales(raw, places(files_of(path), prefix))
    tensors = stored_weights(wanted, path, dtype, device, prefix, ignore, widened, eight_bits)
    for names, ours in together:
        pieces = [tensor for _, tensor in islice(tensors, len(names))]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if parts[ours[0]].swapped:
            whole = torch.cat(whole.chunk(2)[::-1])
        if prefix + names[0] in scales:
            yield ours[0].removesuffix(".weight") + SCALES[0], scales[prefix + names[0]]
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
    stored: Callable[[str], Other] = as_named,
    eight_bits: bool = False,
) -> nn.Module:
    """Assigns each tensor of the file, all or none; see `each_weight`."""
    how = {"stored": stored, "eight_bits": eight_bits}
    read = list(each_weight(net, path, dtype, device, prefix, ignore, **how))
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
    with whole(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), wanted in zip(tensors, shapes, strict=True):
            assert name == wanted, f"tensors come in the order of shapes: {name}, not {wanted}"
            data = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(data.view(torch.uint8).numpy())


def merge_weights(
    state: Iterable[tuple[str, Tensor]],
    path: Path,
    base: Sequence[Path],
    metadata: dict[str, str],
    prefix: str,
    ignore: Collection[str] = (),
) -> None:
    """A copy of the file `base`, in however many shards, with the network under `prefix` replaced.

    state: by name, its tensors. Each keeps the dtype it has in `base`, so names, dtypes, shapes and
    order are those of `base`; but 8 bits become 16, without their scales, and averages of the
    weights that were there are left out. ignore: as in `stored_weights`.
    """
    tensors, ours = {}, []
    for part in base:
        with open_weights(part) as file:
            names = [*file.keys()]
            kept = [name for name in names if not name.startswith(AVERAGES)]
            tensors |= {name: file.get_tensor(name) for name in kept}
    theirs = {name for name in tensors if name.startswith(prefix)} - {*ignore}
    scales = {name for name in theirs if name.endswith(SCALES + NO_SCALES)}
    tensors = {name: x for name, x in tensors.items() if name not in scales}
    for name, tensor in ((prefix + name, x) for name, x in state):
        ours.append(name)
        stored = tensors.get(name, tensor)
        if stored.shape != tensor.shape:
            raise Refusal(
                f"{base[0]}: {name} has shape {[*stored.shape]}, the network wants "
                f"{[*tensor.shape]}; give the file of this network"
            )
        dtype = torch.bfloat16 if stored.dtype.itemsize == 1 else stored.dtype
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    compare_names(ours, theirs - scales, base[0])
    write(tensors, path, metadata)


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """OSError if it cannot be written."""
    with whole(path) as part, spelled(part) as named:
        save_file(tensors, named, metadata=metadata)


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
