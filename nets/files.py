"""Where the official files are: in a folder, in the hub's cache, or on the hub.

    Part         a network or a tokenizer: its repository, its files, and other names they go by
    SHARED       parts that all teachers' training has in common: the discriminator's networks
    find_files   the paths of the parts asked for, or one error for all that is missing
    fingerprint  whether a file is the same as before

Each teacher has the table of its own parts in teachers/. huggingface_hub is imported when the hub
is asked.
"""

import hashlib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, list[Path]]  # per part, in the order of its table


@dataclass(frozen=True)
class Part:
    """One network's weights, or one tokenizer."""

    repo: str  # on the hub; "": on none, in a folder alone
    files: tuple[str, ...]  # all of these, as in the repository ...
    others: tuple[tuple[str, ...], ...] = ()  # ... or all of one of these, in a folder only
    prefix: str = ""  # of this network's names, where one file holds several networks
    folder: str = ""  # `files` are below this one of a folder: repositories share names
    revision: str = ""  # a commit of the repository, which the hub is asked for; "": its newest

    def pinned(self) -> dict[str, str]:
        """As huggingface_hub's functions take it."""
        return {"revision": self.revision} if self.revision else {}


# --- the table of what teachers share ------------------------------------------------------------

# Stability's files hold both, under these prefixes.
COMBINED = {"denoiser": "model.diffusion_model.", "vae": "first_stage_model."}


TIMM = "vit_large_patch14_dinov2.lvd142m"  # DINOv2 under timm's names
CLIP = "clip-vit-large-patch14"
SHARED = {
    "dinov2": Part(
        "facebook/dinov2-large",
        ("model.safetensors",),
        (("dinov2-large.safetensors",), (f"{TIMM}/model.safetensors",), (f"{TIMM}.safetensors",)),
        folder="dinov2-large",
    ),
    "clip_vit": Part(
        f"openai/{CLIP}", ("model.safetensors",), ((f"{CLIP}.safetensors",),), folder=CLIP
    ),
    "clip_vit_tokenizer": Part(
        f"openai/{CLIP}",
        ("vocab.json", "merges.txt"),
        (("tokenizer/vocab.json", "tokenizer/merges.txt"), ("vocab.json", "merges.txt")),
        folder=CLIP,
    ),
}


# --- finding -------------------------------------------------------------------------------------


def find_files(wanted: Mapping[str, Part], weights: Path | None = None) -> Files:
    """Per part its files, in the table's order.

    weights: a folder, and then nothing is looked for elsewhere; None: the hub's cache, and what is
    not there is downloaded. Raises FileNotFoundError, or PermissionError for a gated repository.
    """
    if weights is None:
        return from_hub(wanted)
    if not weights.is_dir():
        raise FileNotFoundError(f"--weights {weights} is no folder; give the one with the files")
    found = {name: in_folder(part, weights) for name, part in wanted.items()}
    lacking = [part for name, part in wanted.items() if not found[name]]
    if lacking:
        names = dict.fromkeys(accepted(part, weights) for part in lacking)
        files = [(part, file) for part in lacking for file in absent(part, weights)]
        command = fetch(files, weights)
        how = f"; fetch with: {command}" if command else ""
        raise FileNotFoundError(f"{weights} lacks {', '.join(names)}{how}")
    return found


def absent(part: Part, folder: Path) -> list[str]:
    return [file for file in part.files if not (folder / part.folder / file).is_file()]


def in_folder(part: Part, folder: Path) -> list[Path]:
    """The files under the first names that are all there; none if no such names."""
    below = [folder / part.folder / name for name in part.files]
    for paths in (below, *([folder / name for name in names] for names in part.others)):
        if all(path.is_file() for path in paths):
            return paths
    return []


def accepted(part: Part, folder: Path) -> str:
    """What is missing of a part, and the other names it may have."""
    others = "".join(f" (or {' and '.join(names)})" for names in part.others)
    return " and ".join(str(Path(part.folder, file)) for file in absent(part, folder)) + others


def fetch(files: Iterable[tuple[Part, str]], folder: Path | str) -> str:
    """The command that fetches (part, file) pairs to where they are looked for in a folder."""
    by_repo: dict[tuple[str, str, Path], dict[str, None]] = {}
    for part, file in files:  # parts may share a file
        if not part.repo:
            continue
        where = (part.repo, part.revision, Path(folder, part.folder))
        by_repo.setdefault(where, {})[file] = None
    commands = []
    for (repo, revision, target), names in by_repo.items():
        pinned = ["--revision", revision] if revision else []
        words = ["hf", "download", repo, *names, *pinned, "--local-dir", str(target)]
        commands.append(shlex.join(words))  # to be copied: a name may have spaces, or worse
    return " && ".join(commands)


def cached(part: Part, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(part.repo, file, **part.pinned())
    return Path(found) if isinstance(found, str) else None  # or what is known not to exist


def from_hub(wanted: Mapping[str, Part]) -> Files:
    """Out of the cache where all is there, without a connection; else downloaded into it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError

    every = [(part, file) for part in wanted.values() for file in part.files]
    for part, file in every:
        if not part.repo:
            raise FileNotFoundError(f"{file} is on no hub; give its folder: --weights DIR")
        if cached(part, file):
            continue
        try:
            hf_hub_download(part.repo, file, **part.pinned())
        except (HfHubHTTPError, EntryNotFoundError, ConnectionError) as error:
            missing = [(part, file) for part, file in every if not cached(part, file)]
            raise explain(error, part.repo, missing) from None
    return {name: [cached(part, file) for file in part.files] for name, part in wanted.items()}


def explain(error: Exception, repo: str, missing: list[tuple[Part, str]]) -> OSError:
    """What to do when the hub gave no file: get access, or bring the files another way."""
    command = fetch(missing, "DIR")
    if no_access(error):
        return PermissionError(
            f"{repo} is gated: accept its licence on https://huggingface.co/{repo}, run "
            f"`hf auth login`, then start again, or {command} and give --weights DIR"
        )
    files = ", ".join(dict.fromkeys(file for _, file in missing))
    return FileNotFoundError(
        f"neither in the hub's cache nor to be had from the hub ({type(error).__name__}): {files}; "
        f"where there is a connection, {command}, then give --weights DIR"
    )


def no_access(error: Exception | None) -> bool:
    """The hub answered 401 or 403 (its own wording may be the cause of another error)."""
    from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):  # also what it calls a gated one
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (401, 403)
    return error is not None and no_access(error.__cause__)


# --- the same file? -------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Of a file's length and of 64 KiB in each 64th of it: of a small file, all."""
    size, piece = path.stat().st_size, 2**16
    total = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for i in range(64):
            file.seek(max(i * piece, i * size // 64))
            total.update(file.read(piece))
    return total.hexdigest()
