"""Are these the same weights? What a run, a cache and a student keep of each file they were made
with, and how two of them are held against each other.

    identity       of a part's files: a digest, and some of its values
    same_weights   equal digests; or a copy in other bits of the same values
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from nets.files import fingerprint
from nets.weights import digest, files_of, read_header

VALUES = 64  # of a part, spread over its tensors
WIDTHS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def identity(paths: Sequence[Path], prefix: str = "") -> dict[str, str]:
    """Of one part: its digest, the dtype that most of its tensors have, a digest of names and
    shapes, and VALUES values, in hexadecimal, as fp32.

    prefix: see `digest`. Where a file is none of weights, its fingerprint alone. Seconds for 24 GB.
    """
    paths = files_of(paths)
    if any(path.suffix not in (".safetensors", ".sft") for path in paths):
        return {"digest": "+".join(map(fingerprint, paths))}
    forms, kinds = {}, []
    for path in paths:
        begin, header = read_header(path)
        for name, form in header.items():
            if name.startswith(prefix):
                forms[name.removeprefix(prefix)] = (path, begin, form)
                kinds.append(form["dtype"])
    names = sorted((name, tuple(form["shape"])) for name, (_, _, form) in forms.items())
    floats = [name for name, _ in names if forms[name][2]["dtype"] in WIDTHS]
    floats = [name for name in floats if 0 not in forms[name][2]["shape"]]
    chosen = [floats[k * len(floats) // VALUES] for k in range(VALUES)] if floats else []
    values = [middle(*forms[name], k) for k, name in enumerate(chosen)]
    return {
        "digest": digest(paths, prefix),
        "dtype": max(sorted(set(kinds)), key=kinds.count, default=""),
        "names": hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest(),
        "values": torch.tensor(values, dtype=torch.float32).numpy().tobytes().hex(),
    }


def middle(path: Path, begin: int, form: dict, k: int) -> float:
    """A value of a tensor in a file, another for each k."""
    dtype = WIDTHS[form["dtype"]]
    first, last = form["data_offsets"]
    count = (last - first) // dtype.itemsize
    with path.open("rb") as file:
        file.seek(begin + first + dtype.itemsize * (count * (2 * k + 1) // (2 * VALUES)))
        data = bytearray(file.read(dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).item()


def same_weights(one: dict[str, str], two: dict[str, str]) -> bool:
    """Whether the digests are equal; or names and shapes are, and the values too as far as the
    fewer bits of the two dtypes tell: an fp16 copy of a file is the same network."""
    if one["digest"] == two["digest"]:
        return True
    if one.get("dtype") == two.get("dtype") or one.get("names") != two.get("names"):
        return False
    if one.get("merged") != two.get("merged"):  # LoRAs, added where they are loaded
        return False
    if not one.get("values") or one["dtype"] not in WIDTHS or two["dtype"] not in WIDTHS:
        return False
    read = (bytearray.fromhex(x["values"]) for x in (one, two))
    a, b = (torch.frombuffer(data, dtype=torch.float32) for data in read)
    if {one["dtype"], two["dtype"]} == {"F16", "BF16"}:  # both rounded, from what neither has
        return bool(torch.isclose(a, b, rtol=2**-7, atol=2**-24).all())
    fewer = min((WIDTHS[x["dtype"]] for x in (one, two)), key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(fewer), b.to(fewer))
