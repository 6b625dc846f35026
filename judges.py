"""The networks that judge images, and what they say of one sampler's beside the teacher's.

    locate_judges    their files, where they are not embedded
    load_inception   the FID's network, which takes a package of its own
    feature_nets     images -> features, by measure
    embed_captions   what CLIP makes of the prompts
    measure          features -> every measure with its interval

P prompts, S samples of each, D features.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from measures import (
    bootstrap,
    clip_score,
    frechet_distance,
    pairwise_distance,
    patch,
    precision,
    recall,
    resize,
    to_uint8,
    vendi_score,
)
from nets.files import find_files
from nets.vision import (
    CLIP_VIT_LARGE,
    CLIP_VIT_LARGE_TEXT,
    DINOV2_LARGE,
    load_clip_text,
    load_clip_vision,
    load_judge,
    load_vit,
)
from teachers import EMBEDDED, load_backbone

# Its table of positions stretched as in the code that its features are published with.
DINOV2 = replace(DINOV2_LARGE, positions="facebook", hooks=(), recompute=False)
JUDGES = ("dinov2", "clip_vit", "clip_vit_tokenizer")  # in nets/files.py
Files = dict[str, list[Path]]
Features = dict[str, Tensor]  # per measure (P, S, D)


def locate_judges(teacher: str, weights: str = "") -> Files:
    """Their files. weights: a folder; "": the hub's cache, else downloaded."""
    if teacher == "digits":
        return {}
    return find_files(teacher, JUDGES, Path(weights) if weights else None)


def load_inception(path: Path | None) -> nn.Module | None:
    """The FID's network, as a package keeps it. ValueError or FileNotFoundError."""
    if path is None:
        return None
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # absent, or made for another torch
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--inception takes a package: pip install torch-fidelity ({reason})"
        ) from None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the package would run its code
        return FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--inception {path} is no file of its weights ({reason})") from None


def feature_nets(
    teacher: str, files: Files, inception: nn.Module | None, device: torch.device
) -> dict[str, Callable[[Tensor], Tensor]]:
    """By measure: images (B, 3, H, W) in [0, 1] -> features (B, D).

    The features of the first are also those of precision, recall and variety.
    """
    if teacher == "digits":
        judge, vit = (
            load_judge()[0].to(device),
            load_backbone("digits", EMBEDDED, torch.float32, device),
        )
        nets = {
            "FD judge": lambda x: judge.judge(2 * x - 1).features,
            "FD ViT": lambda x: vit(x)[:, 0],
        }
    else:
        vit = load_vit(DINOV2, *files["dinov2"], device=device)
        clip = load_clip_vision(*files["clip_vit"], device=device, cfg=CLIP_VIT_LARGE)
        unit, side = vit.cfg.patch, clip.cfg.patch * clip.cfg.grid
        nets = {
            "FD-DINOv2": lambda x: vit(resize(x, 16 * unit))[:, 0],  # 224 pixels
            "patch FD-DINOv2": lambda x: vit(patch(x, unit=unit))[:, 0],
            "CLIP": lambda x: clip(resize(x, side)),
        }
    if inception:
        inception.to(device)
        nets["FID-T"] = lambda x: inception(to_uint8(2 * x - 1))[0]
        nets["patch FID-T"] = lambda x: inception(to_uint8(2 * patch(x) - 1))[0]
    return nets


def embed_captions(
    teacher: str, files: Files, prompts: list[str], device: torch.device
) -> Tensor | None:
    """What CLIP makes of the prompts (P, 1, D)."""
    if teacher == "digits":
        return None
    paths = (*files["clip_vit"], *files["clip_vit_tokenizer"])
    text = load_clip_text(*paths, device=device, cfg=CLIP_VIT_LARGE_TEXT)
    parts = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
    return torch.cat([text.embedding(part, device) for part in parts])[:, None]


def measure(
    made: Features, reference: Features | None, captions: Tensor | None, resamples: int
) -> dict[str, tuple[float, float] | None]:
    """By measure: its value and half of its interval, or None where there is none.

    reference: of the teacher's images; None: these are the teacher's own.
    """
    main = next(iter(made))
    P, S = made[main].shape[:2]

    def against(of: Callable[[Tensor, Tensor], float], title: str) -> tuple[float, float] | None:
        if reference is None:
            return None

        def chosen(i: Tensor) -> float:
            return of(reference[title][i].flatten(0, 1), made[title][i].flatten(0, 1))

        return bootstrap(chosen, P, resamples)

    def fits(i: Tensor) -> float:
        return clip_score(made["CLIP"][i], captions[i])

    values = {title: against(frechet_distance, title) for title in made if title != "CLIP"}
    values["precision"], values["recall"] = against(precision, main), against(recall, main)
    of_all = made[main]
    values["Vendi"] = bootstrap(lambda i: vendi_score(of_all[i].flatten(0, 1)), P, resamples)
    apart = bootstrap(lambda i: pairwise_distance(of_all[i]), P, resamples) if S > 1 else None
    values["distance"] = apart
    values["CLIP"] = bootstrap(fits, P, resamples) if captions is not None else None
    return values
