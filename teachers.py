"""A teacher's networks by name: their sizes, their files, how it is guided and sampled.

    NETWORKS                 per teacher the sizes of its denoiser, VAE and text encoders
    locate                   the files of all of them, or one error for what is missing
    build, load_denoiser     the denoiser alone, without or with weights
    load_vae, load_text      what stands around it
    load_student             a file that train.py saved
    null_cond, check_size, sampling_times

Weights go to `dtype`, a tensor at a time. Errors are FileNotFoundError, PermissionError (a gated
repository) or ValueError, on one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model import Flux, FluxConfig, MMDiT, MMDiTConfig
from nets.clip import CLIP, CLIP_L, CLIPConfig
from nets.files import OFFICIAL, find_files
from nets.text import (
    T5,
    T5_LENGTH,
    T5_XXL,
    FluxText,
    SceneText,
    T5Config,
    clip_tokenizer,
    t5_tokenizer,
)
from nets.vae import VAE, VAES, Pixels, VAEConfig
from nets.weights import load_weights, read_metadata
from schedule import Cond, Flow, grid, resolution_shift


@dataclass(frozen=True)
class Networks:
    denoiser: MMDiTConfig | FluxConfig
    vae: VAEConfig | None = None  # None: the latents are the pixels
    clip_l: CLIPConfig | None = None
    t5: T5Config | None = None


NETWORKS = {
    "digits": Networks(
        MMDiTConfig(
            patch=4,
            channels=3,
            width=96,
            depth=5,
            heads=3,
            context_width=SceneText.context_width,
            pooled_width=SceneText.pooled_width,
            table=4,
        )
    ),
    "flux-dev": Networks(FluxConfig(guidance=True), VAES["flux"], CLIP_L, T5_XXL),
    "flux-schnell": Networks(FluxConfig(guidance=False), VAES["flux"], CLIP_L, T5_XXL),
}
EMBEDDED = {"denoiser": [Path(__file__).parent / "assets" / "teacher.safetensors"]}
Files = dict[str, list[Path]]  # per part of a teacher


def locate(teacher: str, weights: str = "", student: bool = False) -> Files:
    """Every file a teacher is made of, found before anything is loaded.

    weights: a folder; "": the hub's cache, else downloaded. student: its denoiser is in a file of
    its own, so the teacher's is not wanted.
    """
    if teacher == "digits":
        return EMBEDDED
    parts = [part for part in OFFICIAL[teacher] if not (student and part == "denoiser")]
    return find_files(teacher, parts, Path(weights) if weights else None)


# --- loading -------------------------------------------------------------------------------------


def build(teacher: str, shift: float) -> MMDiT | Flux:
    """A teacher's denoiser, weights not set."""
    cfg = NETWORKS[teacher].denoiser
    kind = Flux if isinstance(cfg, FluxConfig) else MMDiT
    return kind(cfg, Flow(shift))


def load_denoiser(
    teacher: str,
    shift: float,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MMDiT | Flux:
    with torch.device("meta"):
        net = build(teacher, shift)
    return load_weights(net, path, dtype, device)


def load_teacher(teacher: str, shift: float, files: Files = EMBEDDED, *how) -> MMDiT | Flux:
    """how: dtype and device, as in `load_denoiser`."""
    return load_denoiser(teacher, shift, files["denoiser"], *how)


def load_student(path: Path, *how) -> tuple[MMDiT | Flux, dict]:
    """A student saved by train.py, and its metadata: teacher, taus, steps, sampler, shift."""
    about = read_student(path)
    return load_denoiser(about["teacher"], float(about["shift"]), path, *how), about


def read_student(path: Path) -> dict:
    """The metadata of a student's file."""
    about = read_metadata(path)
    if about.get("teacher") not in NETWORKS:
        raise ValueError(f"{path} is not a student saved by train.py: it does not name its teacher")
    return about


def load_vae(
    teacher: str,
    files: Files,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    cfg = NETWORKS[teacher].vae
    if cfg is None:
        return Pixels()
    with torch.device("meta"):
        vae = VAE(cfg)
    return load_weights(vae, files["vae"], dtype, device).requires_grad_(False).eval()


def load_text(
    teacher: str,
    files: Files,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Captions -> cond."""
    if teacher == "digits":
        return SceneText()
    with torch.device("meta"):
        clip, t5 = CLIP(NETWORKS[teacher].clip_l), T5(NETWORKS[teacher].t5)
    words = clip_tokenizer(*files["clip_l_tokenizer"])
    pieces = t5_tokenizer(*files["t5_tokenizer"], T5_LENGTH[teacher])
    load_weights(clip, files["clip_l"], dtype, device)
    load_weights(t5, files["t5"], dtype, device, ignore=T5.duplicates)
    return FluxText(clip, t5, words, pieces).requires_grad_(False).eval()


# --- guidance, sizes, times ----------------------------------------------------------------------


def null_cond(teacher: str, text: nn.Module, captions: list[str], device) -> Cond | None:
    """What classifier-free guidance leads away from: "", or a negative prompt.

    None where the scale is an input of the network (FLUX.1).
    """
    if isinstance(NETWORKS[teacher].denoiser, FluxConfig):
        return None
    return text(captions, device)


def check_size(teacher: str, height: int, width: int) -> None:
    """Raises ValueError for a size, in pixels, that the networks cannot make."""
    nets, asked = NETWORKS[teacher], f"--size {height} {width}"
    unit = nets.denoiser.patch * (2 ** (len(nets.vae.multipliers) - 1) if nets.vae else 1)
    for size in (height, width):
        if size < unit or size % unit:
            near = " or ".join(str(unit * n) for n in (size // unit, size // unit + 1) if n)
            raise ValueError(f"{asked}: {size} is no multiple of {unit}; the nearest: {near}")
        if isinstance(nets.denoiser, MMDiTConfig) and size > unit * nets.denoiser.table:
            most = unit * nets.denoiser.table
            raise ValueError(f"{asked}: {teacher} makes at most {most} pixels a side")


def sampling_times(teacher: str, schedule: Flow, steps: int, tokens: int) -> list[float]:
    """The times a teacher samples at; tokens: of the image, FLUX.1-dev's shift depends on them."""
    if teacher == "flux-dev":
        return grid(Flow(resolution_shift(tokens)), steps)
    return grid(schedule, steps)
