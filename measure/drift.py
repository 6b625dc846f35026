"""Has the student drifted? Its images beside its teacher's, of the same prompts.

    contrast, chroma, high_frequency    of the pixels, beside brightness in distances.py
    PIXELS      what is watched of them: a new measure is a line there
    distances   how different the images of each prompt are
    leaves      which measures are out of the band, and to which side
    farthest    the one that is most so
    advice      what usually helps

All is a ratio, the student's over the teacher's. Knows nothing of networks, files or teachers.
"""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from measure.distances import brightness, pairwise_distances


def contrast(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): the standard deviation of its grey values."""
    return image.mean(1).flatten(1).std(1, correction=0)


def chroma(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): the largest colour less the least, mean over pixels.

    HSV's saturation times its value: by itself that makes as much of what is nearly black.
    """
    low, high = image.aminmax(dim=1)
    return (high - low).mean((1, 2))


def high_frequency(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): the mean square of what a blur over 3 x 3 pixels takes away.

    A chequerboard of 0 and 1 has (4 / 9)^2, a ramp none.
    """
    inner = image[..., 1:-1, 1:-1]
    return (inner - F.avg_pool2d(image, 3, stride=1)).square().mean((1, 2, 3))


# By name, as log.csv has it: images (B, 3, H, W) in [0, 1] -> (B,).
PIXELS = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": chroma,
    "high_frequency": high_frequency,
}
DISTANCES = ("distance_latents", "distance_features")  # within a prompt
MEASURES = (*PIXELS, *DISTANCES)


def distances(latents: Tensor, features: Tensor | None) -> list[Tensor]:
    """Latents (P, S, C, h, w), features (P, S, D) -> (P,) each: 1 - cosine similarity, mean over
    the pairs of a prompt. Of latents each channel's mean is taken off: 1 - correlation, which a
    brighter image does not change.
    """
    shapes = latents - latents.mean((-2, -1), keepdim=True)
    found = [shapes] if features is None else [shapes, features]
    return [pairwise_distances(x.flatten(2)) for x in found]


def ratio(student: float, teacher: float) -> float:
    """1 where neither has any."""
    return (student + 1e-6) / (teacher + 1e-6)


def leaves(
    ratios: Mapping[str, float], start: Mapping[str, float], band: tuple[float, float]
) -> dict[str, str]:
    """Which are out of the band, and to which side: "low" | "high".

    start: where the student began, for measures that have not been within the band since. They are
    on their way to it, and are out only where they are farther from it than they began.
    """
    out = {}
    for name, value in ratios.items():
        began = start.get(name, 1.0)
        if value < min(band[0], began):
            out[name] = "low"
        elif value > max(band[1], began):
            out[name] = "high"
    return out


def farthest(ratios: Mapping[str, float]) -> tuple[str, float]:
    """Its name and ratio; half is as far as twice."""
    return max(ratios.items(), key=lambda pair: far(pair[1]))


def far(value: float) -> float:
    """|log| of a ratio; infinite where that is no number above zero."""
    return abs(math.log(value)) if 0 < value < math.inf else math.inf


def advice(name: str, side: str) -> str:
    """What usually helps."""
    if name in DISTANCES and side == "low":
        return "a prompt's images grow alike: a lower --guidance-dmd, a higher --w-gan or --lr-fake"
    if name in DISTANCES:
        return "more than variety, or noise: a lower --lr, a higher --w-isg"
    if side == "high":
        less = "a lower --guidance-dmd, --guidance-rescale .7, no momentum (--betas 0 .999)"
        return f"too strong: {less}, a higher --w-isg"
    return "too weak: a higher --w-gan or --guidance-dmd, or more --steps"
