"""Measures of images, through features of them. Pure functions of tensors.

    frechet_distance    between Gaussians fitted to two sets of features (FID's formula)
    kernel_distance     between two sets of features, without bias (KID's formula)
    recall, precision   the share of one set within reach of the other
    vendi_score         how many different features there are, in effect
    pairwise_distance   how different the images of one prompt are
    clip_score          how well image and caption agree
    brightness          of the pixels themselves; so is saturation
    bootstrap           a measure and how far chance may have moved it
    resize, fit, patch  images as feature networks take them
    round_8bit          and as a PNG holds them

Knows nothing of networks, files or teachers. N, M samples, D features, P prompts with S samples
each.
"""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from schedule import generator

# --- how near ------------------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to two sets of features, (N, D) and (M, D), in fp64.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2). With S = R^T R the singular
    values of R_a R_b^T are the roots of the eigenvalues of S_a S_b, so their sum is the last trace:
    no matrix needs full rank.
    """
    a, b = a.double(), b.double()
    root_a, root_b = covariance_root(a), covariance_root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (gap + root_a.square().sum() + root_b.square().sum() - 2 * cross).item())


def covariance_root(x: Tensor) -> Tensor:
    """R (min(N, D), D), R^T R the covariance of x (N, D). Warns if it lacks full rank."""
    root = torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R
    diagonal = root.diagonal().abs()
    if len(x) <= x.shape[1] or diagonal.min() <= 1e-12 * diagonal.max():
        warnings.warn(
            f"{len(x)} samples do not span their {x.shape[1]} features: the Frechet distance is "
            "finite, but depends on the number of samples; compare it at the same number alone",
            stacklevel=3,
        )
    return root


def kernel_distance(real: Tensor, made: Tensor) -> float:
    """1000 MMD^2 of two sets of features, (N, D) and (M, D), kernel (x . y / D + 1)^3, in fp64.

    KID's formula, on all samples at once: the unbiased estimate, whose mean does not depend on N
    and M, and which may fall below zero.
    """
    a, b = real.double(), made.double()
    assert min(len(a), len(b)) > 1, "one sample makes no pair"

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def pairs(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))  # less each sample with itself

    return 1000 * (pairs(a) + pairs(b) - 2 * kernel(a, b).mean()).item()


def recall(real: Tensor, made: Tensor, k: int = 3) -> float:
    """The share of real features (N, D) within reach of a made one (M, D), in fp64.

    Reach: the made feature's distance to its k-th neighbour among the made. (Distances come from
    products, |x|^2 - 2 x y + |y|^2: in fp32 neighbours far from the origin would be lost in them.)
    """
    assert len(made) > k, f"the {k}-th neighbour among {len(made)} does not exist"
    real, made = real.double(), made.double()
    radius = torch.cdist(made, made).kthvalue(k + 1, dim=1).values  # the first is the point itself
    return (torch.cdist(real, made) <= radius).any(dim=1).float().mean().item()


def precision(real: Tensor, made: Tensor, k: int = 3) -> float:
    """The share of made features (M, D) within reach of a real one (N, D)."""
    return recall(made, real, k)


# --- how varied ----------------------------------------------------------------------------------


def vendi_score(features: Tensor) -> float:
    """(N, D) -> 1 .. N: exp of the entropy of the eigenvalues of K / N, K cosine similarities."""
    unit = F.normalize(features.double(), dim=-1) / math.sqrt(len(features))
    values = torch.linalg.svdvals(unit).square()  # the eigenvalues above zero of unit unit^T
    return torch.special.entr(values).sum().exp().item()


def pairwise_distance(features: Tensor) -> float:
    """(P, S, D) -> 1 - cosine similarity, mean over the pairs of each prompt and over prompts."""
    return pairwise_distances(features).mean().item()


def pairwise_distances(features: Tensor) -> Tensor:
    """(P, S, D) -> (P,), of each prompt."""
    unit = F.normalize(features.double(), dim=-1)
    S = features.shape[1]
    assert S > 1, "one image of a prompt makes no pair"
    alike = (unit @ unit.transpose(1, 2)).sum((1, 2)) - S  # less each image with itself
    return 1 - alike / (S * (S - 1))


# --- how fitting ---------------------------------------------------------------------------------


def clip_score(images: Tensor, captions: Tensor) -> float:
    """Embeddings (N, D) of images and of their captions -> their mean cosine similarity."""
    return F.cosine_similarity(images.double(), captions.double(), dim=-1).mean().item()


# --- the pixels themselves -----------------------------------------------------------------------


def brightness(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): the mean of all pixels and colours."""
    return image.mean((1, 2, 3))


def saturation(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): HSV's, 1 - least / largest colour, mean over pixels."""
    low, high = image.aminmax(dim=1)
    return (1 - low / high.clamp_min(1e-6)).where(high > 0, 0.0).mean((1, 2))  # black has none


# --- how certain ---------------------------------------------------------------------------------


def bootstrap(
    measure: Callable[[Tensor], float], count: int, resamples: int = 100
) -> tuple[float, float]:
    """The measure of all, and half the width of its 95 % interval.

    measure: of the numbers of what is chosen, (n,), among `count`. Each resample is a half, drawn
    without replacement: a half scatters about the whole as the whole does about the truth. (Drawn
    with replacement, an image would be its own neighbour, and count as a lack of variety.)
    """
    assert count > 1, "chance cannot be seen in one"
    value, half = measure(torch.arange(count)), count // 2
    draw, again = generator("bootstrap", count), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole has been warned of
        for _ in range(resamples):
            again.append(measure(torch.randperm(count, generator=draw)[:half]))
    spread = torch.tensor(again, dtype=torch.float64).std().item()
    return value, 1.96 * spread * math.sqrt(half / (count - half))


# --- images --------------------------------------------------------------------------------------


def resize(image: Tensor, side: int, half: Callable[[float], int] = round) -> Tensor:
    """image (B, 3, H, W) in [0, 1] -> (B, 3, side, side): short side scaled, middle kept.

    Of the long side's pixels a fraction is dropped, as torchvision and transformers do. half: where
    the middle begins if it is between two pixels: torchvision's crop rounds to the even one,
    transformers' (math.floor) to the first.
    """
    height, width = image.shape[2:]
    short = min(height, width)
    size = (side * height // short, side * width // short)
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
    return middle(image, side, side, half).clamp(0, 1)  # bicubic overshoots


def fit(image: Tensor, side: int) -> Tensor:
    """image (B, 3, H, W) in [0, 1] -> (B, 3, side, side): long side scaled, black beside it.

    What bicubic overshoots is kept, as HPSv2's code does, which scales tensors and not pictures.
    """
    height, width = (round(side * size / max(image.shape[2:])) for size in image.shape[2:])
    image = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(image, (left, side - width - left, top, side - height - top))


def patch(image: Tensor, side: int = 299, unit: int = 1) -> Tensor:
    """image (B, 3, H, W) -> its middle at its own scale, whole where it is smaller than `side`.

    unit: the sides of what is returned are multiples of it.
    """
    height, width = (min(side, size) // unit * unit for size in image.shape[2:])
    return middle(image, height, width)


def middle(
    image: Tensor, height: int, width: int, half: Callable[[float], int] = math.floor
) -> Tensor:
    top, left = half((image.shape[2] - height) / 2), half((image.shape[3] - width) / 2)
    return image[:, :, top : top + height, left : left + width]


def round_8bit(images: Tensor) -> Tensor:
    """As a PNG would hold them."""
    return from_uint8(to_uint8(images))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
