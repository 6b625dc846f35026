"""Sizes of a teacher's networks; and smaller ones, for tests and the benchmark."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Networks:
    """The sizes of a teacher's networks, as their modules take them.

    A denoiser's have `channels` of the latents and `patch`.
    """

    denoiser: object
    vae: object = None  # None: the latents are the pixels
    clip_l: object = None
    clip_g: object = None
    t5: object = None
    llm: object = None  # a language model that reads captions
    backbone: object = None  # of the discriminator; None: DINOv2 ViT-L/14
    reader: object = None  # of captions, for the discriminator; None: CLIP ViT-L/14


def scaled_heads(cfg, scale: float) -> dict[str, int]:
    """Heads and width of a transformer, its heads as wide as before."""
    count = max(1, round(scale * cfg.heads))
    return {"heads": count, "width": count * cfg.width // cfg.heads}


def scaled_groups(cfg, scale: float) -> dict[str, int]:
    """Width of a convolutional network, in whole groups."""
    return {"width": max(1, round(scale * cfg.width / cfg.groups)) * cfg.groups}


def scaled_sizes(cfg, scale: float, depth: int = 0):
    """Sizes with a width in whole heads or groups; those that name neither stay as they are."""
    named = {field.name for field in fields(cfg)}
    deep = {"depth": depth} if depth and "depth" in named else {}
    if "heads" in named:
        return replace(cfg, **scaled_heads(cfg, scale), **deep)
    return replace(cfg, **(scaled_groups(cfg, scale) if "groups" in named else {}), **deep)
