"""A teacher's networks by name: their sizes, their files, how it is guided and sampled.

    NETWORKS                 per teacher the sizes of its denoiser, VAE and text encoders
    locate                   the files of all of them, or one error for what is missing
    build, load_denoiser     the denoiser alone, without or with weights
    load_vae, load_text      what stands around it
    load_backbone, load_reader   the discriminator's frozen networks
    load_student             a file that train.py saved
    encode, encode_all, null_for   captions to cond, and to what guidance leads away from
    uses_null                whether guidance needs the null caption
    latent_shape, check_size, sampling_times   sizes, and a teacher's own times

Weights go to `dtype`, a tensor at a time. Errors are FileNotFoundError, PermissionError (a gated
repository) or ValueError, on one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    SD35_LARGE,
    SD35_MEDIUM,
    Flux,
    FluxConfig,
    MMDiT,
    MMDiTConfig,
    silence_guidance,
)
from nets.clip import CLIP, CLIP_G, CLIP_L, CLIPConfig, load_open_clip
from nets.files import NOT_WEIGHTS, OFFICIAL, SHARED, find_files
from nets.text import (
    SIZE_WIDTH,
    T5,
    T5_LENGTH,
    T5_XXL,
    FluxText,
    SceneText,
    SD15Text,
    SD35Text,
    SDXLText,
    T5Config,
    clip_tokenizer,
    t5_tokenizer,
)
from nets.unet import UNETS, UNet, UNetConfig
from nets.vae import VAE, VAES, Pixels, VAEConfig
from nets.vision import (
    CLIP_VIT_LARGE_TEXT,
    DIGITS_VIT,
    DINOV2_LARGE,
    ViT,
    ViTConfig,
    load_clip_text,
    load_vit,
)
from nets.weights import load_weights, read_metadata
from schedule import DDPM, Cond, Flow, grid, resolution_shift


@dataclass(frozen=True)
class Networks:
    denoiser: MMDiTConfig | FluxConfig | UNetConfig
    vae: VAEConfig | None = None  # None: the latents are the pixels
    clip_l: CLIPConfig | None = None
    clip_g: CLIPConfig | None = None
    t5: T5Config | None = None
    backbone: ViTConfig = DINOV2_LARGE  # of the discriminator
    reader: CLIPConfig = CLIP_VIT_LARGE_TEXT  # of captions, for the discriminator


DIGITS = MMDiTConfig(
    patch=4,
    channels=3,
    width=96,
    depth=5,
    heads=3,
    context_width=SceneText.context_width,
    pooled_width=SceneText.pooled_width,
    table=4,
)
NETWORKS = {
    "digits": Networks(DIGITS, backbone=DIGITS_VIT),
    "flux-dev": Networks(FluxConfig(guidance=True), VAES["flux"], CLIP_L, None, T5_XXL),
    "flux-schnell": Networks(FluxConfig(guidance=False), VAES["flux"], CLIP_L, None, T5_XXL),
    "sd35-large": Networks(SD35_LARGE, VAES["sd35"], CLIP_L, CLIP_G, T5_XXL),
    "sd35-medium": Networks(SD35_MEDIUM, VAES["sd35"], CLIP_L, CLIP_G, T5_XXL),
    "sdxl": Networks(UNETS["sdxl"], VAES["sdxl"], CLIP_L, CLIP_G),
    "sd15": Networks(UNETS["sd15"], VAES["sd15"], CLIP_L),
}
ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {
    "denoiser": [ASSETS / "teacher.safetensors"],
    "dinov2": [ASSETS / "backbone.safetensors"],
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Files = dict[str, list[Path]]  # per part of a teacher


def locate(
    teacher: str,
    weights: str = "",
    denoiser: bool = True,
    text: bool = True,
    t5: bool = True,
    disc: bool = False,
) -> Files:
    """Every file that will be wanted, found before anything is loaded.

    weights: a folder; "": the hub's cache, else downloaded. denoiser: not, where a student's file
    is given; text: not, where a cache is; t5: SD 3.5 also works without; disc: the discriminator's
    frozen networks too.
    """
    if teacher == "digits":
        return EMBEDDED
    if not t5 and not teacher.startswith("sd35"):
        raise ValueError(f"--no-t5: only SD 3.5 does without T5, {teacher} does not")
    parts = [*OFFICIAL[teacher], *(SHARED if disc else ())]
    unwanted = (set() if denoiser else {"denoiser"}) | (set() if t5 else {"t5", "t5_tokenizer"})
    if not text:
        unwanted |= {part for part in parts if part not in ("denoiser", "vae", "dinov2")}
    parts = [part for part in parts if part not in unwanted]
    return find_files(teacher, parts, Path(weights) if weights else None)


# --- the denoiser --------------------------------------------------------------------------------


def build(teacher: str, shift: float) -> MMDiT | Flux | UNet:
    """Weights not set. shift: of a flow's times; DDPM has none."""
    cfg = NETWORKS[teacher].denoiser
    if isinstance(cfg, UNetConfig):
        return UNet(cfg, DDPM())
    return Flux(cfg, Flow(shift)) if isinstance(cfg, FluxConfig) else MMDiT(cfg, Flow(shift))


def load_denoiser(
    teacher: str,
    shift: float,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MMDiT | Flux | UNet:
    """device: "meta" for the form alone; no file is read then."""
    with torch.device("meta"):
        net = build(teacher, shift)
    if torch.device(device).type == "meta":
        return net.to(dtype)
    return load_weights(net, path, dtype, device, prefix_of(teacher))


def load_teacher(teacher: str, shift: float, files: Files = EMBEDDED, *how) -> nn.Module:
    """how: dtype and device, as in `load_denoiser`."""
    return load_denoiser(teacher, shift, files["denoiser"], *how)


def load_start(teacher: str, shift: float, files: Files, device: torch.device | str) -> nn.Module:
    """What student and fake score begin as: the teacher in fp32, its guidance input silenced."""
    net = load_teacher(teacher, shift, files, torch.float32, device)
    if isinstance(net, Flux):
        silence_guidance(net)
    return net


def load_student(path: Path, *how) -> tuple[nn.Module, dict]:
    """A student saved by train.py, and its metadata: teacher, taus, steps, sampler, shift."""
    about = read_student(path)
    return load_denoiser(about["teacher"], float(about["shift"]), path, *how), about


def read_student(path: Path) -> dict[str, str]:
    """The metadata of a student's file."""
    about = read_metadata(path)
    if about.get("teacher") not in NETWORKS:
        raise ValueError(f"{path} is not a student saved by train.py: it does not name its teacher")
    return about


def prefix_of(teacher: str, part: str = "denoiser") -> str:
    """What precedes a network's names in the official file, and in a student's."""
    return OFFICIAL[teacher][part].prefix if teacher in OFFICIAL else ""


# --- what stands around it -----------------------------------------------------------------------


def load_vae(teacher: str, files: Files, *how) -> nn.Module:
    """how: dtype and device, as in `load_denoiser`."""
    cfg = NETWORKS[teacher].vae
    return load_part(VAE, cfg, teacher, "vae", files, *how) if cfg else Pixels()


def load_text(teacher: str, files: Files, *how) -> nn.Module:
    """Captions -> cond; see `encode`. how: dtype and device, as in `load_denoiser`."""
    nets = NETWORKS[teacher]
    if nets.clip_l is None:
        return SceneText()
    clip_l = load_part(CLIP, nets.clip_l, teacher, "clip_l", files, *how)
    tokenizer_l = clip_tokenizer(*files["clip_l_tokenizer"])
    t5 = ()
    if "t5" in files:
        pieces = t5_tokenizer(*files["t5_tokenizer"], T5_LENGTH[teacher])
        t5 = load_part(T5, nets.t5, teacher, "t5", files, *how), pieces
    if isinstance(nets.denoiser, FluxConfig):
        return FluxText(clip_l, t5[0], tokenizer_l, t5[1])
    if nets.clip_g is None:
        return SD15Text(clip_l, tokenizer_l)
    clip_g = load_part(CLIP, nets.clip_g, teacher, "clip_g", files, *how)
    both = clip_l, clip_g, tokenizer_l, clip_tokenizer(*files["clip_g_tokenizer"], 0)
    if isinstance(nets.denoiser, UNetConfig):
        return SDXLText(*both)
    blank = T5_LENGTH[teacher], nets.denoiser.context_width  # what stands there without T5
    return SD35Text(*both, *t5, blank=blank)


def load_part(
    kind: type,
    cfg: VAEConfig | CLIPConfig | T5Config,
    teacher: str,
    part: str,
    files: Files,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A frozen network of a teacher's."""
    with torch.device("meta"):
        net = kind(cfg)
    open_clip = teacher == "sdxl" and part == "clip_g"
    load = load_open_clip if open_clip else load_weights
    ignore = T5.duplicates if part == "t5" else NOT_WEIGHTS.get(teacher, ())
    load(net, files[part], dtype, device, prefix_of(teacher, part), ignore)
    return net.requires_grad_(False).eval()


def load_backbone(teacher: str, files: Files, *how) -> ViT:
    """The discriminator's. how: dtype and device, as in `load_denoiser`."""
    return load_vit(NETWORKS[teacher].backbone, files["dinov2"][0], *how)


def load_reader(teacher: str, files: Files, *how) -> nn.Module:
    """What reads captions for the discriminator (its `embedding`)."""
    if teacher == "digits":
        return SceneText()
    where = (*files["clip_vit"], *files["clip_vit_tokenizer"])
    return load_clip_text(*where, *how, cfg=NETWORKS[teacher].reader)


def embedding_width(teacher: str) -> int:
    """Of what the reader makes of a caption."""
    if teacher == "digits":
        return SceneText.pooled_width
    cfg = NETWORKS[teacher].reader
    return cfg.embedding or cfg.width


def encode(
    text: nn.Module,
    captions: list[str],
    device: torch.device | str,
    sizes: Tensor | tuple[int, ...],
) -> Cond:
    """Captions -> cond.

    sizes (6,) or (B, 6): original height and width, crop's top and left, height and width made, in
    pixels; only SDXL is told.
    """
    if isinstance(text, SDXLText):
        return text(captions, device, sizes)
    return text(captions, device)


def uncropped(size: tuple[int, int]) -> tuple[int, ...]:
    """`sizes` of a whole image of this height and width."""
    return (*size, 0, 0, *size)


def encode_all(
    text: nn.Module, captions: list[str], batch: int, device: torch.device, size: tuple[int, int]
) -> dict[str, Cond]:
    """The cond of every caption (no batch dimension), on the CPU, so that the encoders can go."""
    captions, conds = list(dict.fromkeys(captions)), {}
    for start in tqdm(range(0, len(captions), batch), desc="prompts", leave=False):
        part = captions[start : start + batch]
        cond = encode(text, part, device, uncropped(size))
        for k, caption in enumerate(part):
            conds[caption] = {name: tensor[k].cpu() for name, tensor in cond.items()}
    return conds


def null_for(teacher: str, null: Cond, cond: Cond) -> Cond:
    """The null caption, encoded once (1, ...), for every row of `cond`; SDXL: of the same sizes."""
    rows = {name: tensor.expand_as(cond[name]) for name, tensor in null.items()}
    if teacher == "sdxl":
        words, sizes = rows["pooled"], cond["pooled"][:, -SIZE_WIDTH:]
        rows["pooled"] = torch.cat([words[:, :-SIZE_WIDTH], sizes], dim=1)
    return rows


# --- guidance, sizes, times ----------------------------------------------------------------------


def uses_null(teacher: str) -> bool:
    """Whether guidance is classifier-free; FLUX.1 has the scale as an input, or none."""
    return not isinstance(NETWORKS[teacher].denoiser, FluxConfig)


def latent_shape(teacher: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of an image of `size`, height and width in pixels."""
    nets, factor = NETWORKS[teacher], factor_of(teacher)
    return nets.denoiser.channels, size[0] // factor, size[1] // factor


def factor_of(teacher: str) -> int:
    """Pixels per latent along a side."""
    vae = NETWORKS[teacher].vae
    return vae.factor if vae else Pixels.factor


def check_size(teacher: str, size: tuple[int, int]) -> None:
    """Raises ValueError for an image, height and width in pixels, that the networks cannot make."""
    cfg, asked = NETWORKS[teacher].denoiser, f"--size {size[0]} {size[1]}"
    divisor = 2 ** (len(cfg.multipliers) - 1) if isinstance(cfg, UNetConfig) else cfg.patch
    unit = divisor * factor_of(teacher)
    for side in size:
        if side < unit or side % unit:
            near = " or ".join(str(unit * n) for n in (side // unit, side // unit + 1) if n > 0)
            raise ValueError(f"{asked}: {side} is no multiple of {unit}; the nearest: {near}")
        if isinstance(cfg, MMDiTConfig) and side > unit * cfg.table:
            raise ValueError(f"{asked}: {teacher} makes at most {unit * cfg.table} pixels a side")


def sampling_times(
    teacher: str, schedule: Flow | DDPM, steps: int, size: tuple[int, int], student: bool = False
) -> list[float]:
    """The times a teacher's official sampler visits. FLUX.1-dev's shift grows with the image.

    student: those of a student at another number of steps than its own, evenly spaced.
    """
    if student:
        return grid(schedule, steps)
    if teacher == "flux-dev":
        _, height, width = latent_shape(teacher, size)
        patch = NETWORKS[teacher].denoiser.patch
        return grid(Flow(resolution_shift(height * width // patch**2)), steps)
    if teacher.startswith("sd35"):
        last = float(schedule.warp(torch.tensor(0.001, dtype=torch.float64)))
        return grid(schedule, steps, last)
    return grid(schedule, steps)
