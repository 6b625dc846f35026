"""Whether data are the same, wherever they lie: a digest of names and captions.

    identity   of a data set: how many samples, and what their names and captions come to
    changes    what differs between two

Samples are taken in PARTS runs, so that what differs can be named. All names are read; of captions,
which are files of their own in a folder, at most READ, evenly spread. Images are not.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from config import legible
from dataset.images import Images
from dataset.pixels import BAD
from dataset.sources import Prompts

PARTS = 64
READ = 16_384  # captions: seconds, on a disk far away too


def identity(data: object) -> dict:
    """Of --data; {} of what comes with the project."""
    if isinstance(data, Prompts):
        names, captions = {}, data.captions.__getitem__
        count = len(data.captions)
    elif isinstance(data, Images):
        count, captions = len(data.source), lambda item: caption_or_none(data.source, item)
        names = {"names": [digest(data.source.keys(run)) for run in runs(count)]}
    else:
        return {}
    every = -(-count // READ)  # of each so many, the first
    with ThreadPoolExecutor(8) as pool:
        read = [digest(pool.map(captions, run[::every])) for run in runs(count)]
    return {"samples": count} | names | {"captions": read}


def caption_or_none(source, item: int) -> str:
    try:
        return source.caption(item)
    except BAD:
        return ""


def runs(count: int) -> list[range]:
    edges = [count * k // PARTS for k in range(PARTS + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def digest(words: Iterable[str]) -> str:
    total = hashlib.blake2b(digest_size=6)
    for word in words:
        total.update(word.encode(errors="surrogatepass") + b"\0")
    return total.hexdigest()


def changes(old: dict, now: dict, path: str, data: object) -> list[str]:
    """In words, "data: ..." each. old: what config.json says, its "identity" among it, if it has
    one; now: that of `data`, which --data names as `path`."""
    was = old.get("identity")
    if not was or not now:  # of a run before there was one, or of a task's own data
        return [] if old.get("data") == path else [f"data: {old.get('data')} -> {path}"]
    if was.get("samples") != now["samples"]:
        return [f"data: {was.get('samples')} samples -> {now['samples']}"]
    told = []
    for what in ("names", "captions"):
        a, b = was.get(what, []), now.get(what, [])
        run = next(
            (run for run, x, y in zip(runs(now["samples"]), a, b, strict=False) if x != y), None
        )
        if run or len(a) != len(b):
            told.append(f"data: other {what}{first_of(run, data) if run else ''}")
    return told


def first_of(run: range, data: object) -> str:
    """Where a run of samples is."""
    source = data.source if isinstance(data, Images) else None
    name = legible(source.name(run[0])) if source else f"prompt {run[0] + 1}"
    return f" at {name}" if len(run) == 1 else f" among {len(run)} samples from {name} on"
