"""What frozen networks make of the data set, computed once: text embeddings and latents.

    check_purpose   a folder is for one purpose, and for the weights that it was made with
    write_cache     every sample of an epoch, in shards; continues where it was interrupted
    Cache           the rows of a batch, by what its samples are
    send_rows       where they are wanted

A cache is a folder with `about.json`, what it was made for, and shards of SHARD samples. A sample
is found by a digest of its caption, sizes and pixels, so a cache never answers for other data.
Training from one holds no text encoder.
"""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Refusal
from dataset.images import Pairs
from nets.disk import write_text
from nets.layers import send
from nets.same import same_weights
from nets.weights import open_weights, write

SHARD = 256  # samples in a file: with FLUX's text 1 GiB


def digests(pairs: Pairs) -> list[str]:
    """What a sample is, in 128 bits."""
    found = []
    for k, caption in enumerate(pairs.captions):
        total = hashlib.blake2b(caption.encode(), digest_size=16)
        for part in (pairs.sizes, pairs.images):
            if part is not None:
                total.update(part[k].contiguous().numpy().tobytes())
        found.append(total.hexdigest())
    return found


def check_purpose(folder: Path, about: dict, flag: str = "--cache") -> None:
    """Whether the folder, if it is there, was made for the same. Writes nothing. Refusal.

    about["parts"]: by part its identity; see nets/same.py. flag: the folder's own.
    """
    path = folder / "about.json"
    if not path.is_file():
        return
    try:
        was = json.loads(path.read_bytes())
        before, now = was.get("parts", {}), about.get("parts", {})
        changed = [
            f"the weights of {part}: {before[part]['digest']} -> {now[part]['digest']}"
            for part in now
            if part in before and not same_weights(before[part], now[part])
        ]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise Refusal(f"{path} is damaged; choose another {flag}, or remove it") from None
    others = about.keys() - {"parts"}
    changed += [
        f"{k}: {was.get(k)} -> {about[k]}" for k in about if k in others and was.get(k) != about[k]
    ]
    if changed:
        raise Refusal(
            f"{flag} {folder} was made for something else ({'; '.join(changed)}); "
            "choose another folder"
        )


def write_purpose(folder: Path, about: dict) -> None:
    """Where it is not there yet."""
    if not (folder / "about.json").is_file():
        write_text(folder / "about.json", json.dumps(about, indent=1))


def write_cache(
    folder: Path,
    data: Callable[[range], Pairs],
    count: int,
    batch: int,
    compute: Callable[[Pairs], dict[str, Tensor]],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Samples 0 .. count - 1, `batch` at a time; each rank writes what is missing of its shards.

    compute: what to keep of a batch, rows by name.
    """
    mine = range(-(-count // SHARD))[rank::world]  # the same whatever other ranks have written
    missing = [k for k in mine if not shard_path(folder, k).is_file()]
    for k in tqdm(missing, desc="cache", disable=rank > 0):
        keys, rows = [], []
        first, last = k * SHARD, min((k + 1) * SHARD, count)
        for start in range(first, last, batch):
            pairs = data(range(start, min(start + batch, last)))
            keys += digests(pairs)
            rows.append({name: x.detach().cpu() for name, x in compute(pairs).items()})
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        write(tensors, shard_path(folder, k), {"keys": json.dumps(keys)})


def complete(folder: Path, count: int, null: bool = False) -> bool:
    """Every shard is there, and the null caption if there is to be one."""
    if null and not (folder / "null.safetensors").is_file():
        return False
    return all(shard_path(folder, k).is_file() for k in range(-(-count // SHARD)))


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"shard-{k:06d}.safetensors"


class Cache:
    """Rows of a finished cache; files stay mapped, nothing is kept in memory but the keys."""

    def __init__(self, folder: Path):
        self.folder, self.places = folder, {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            with open_weights(path) as file:
                keys = json.loads((file.metadata() or {}).get("keys", "[]"))
            self.places |= {key: (path, row) for row, key in enumerate(keys)}
        self.open = lru_cache(maxsize=64)(open_weights)

    def rows(self, pairs: Pairs, device: torch.device | str) -> dict[str, Tensor]:
        """What `compute` gave for these samples. Raises ValueError for one that is not there."""
        found = []
        for key, caption in zip(digests(pairs), pairs.captions, strict=True):
            if key not in self.places:
                raise Refusal(
                    f'--cache {self.folder} does not hold "{caption[:40]}" as it is now: '
                    "the data have changed; choose another folder"
                )
            path, row = self.places[key]
            file = self.open(path)
            names = file.keys()
            found.append({name: file.get_slice(name)[row : row + 1] for name in names})
        return send_rows(
            {name: torch.cat([row[name] for row in found]) for name in found[0]}, device
        )


def send_rows(rows: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """On `device`, but whole numbers, which are counts (of a caption's tokens): networks go by
    them, so they stay on the host, where nobody waits for them."""
    return {name: send(x, device) if x.is_floating_point() else x for name, x in rows.items()}
