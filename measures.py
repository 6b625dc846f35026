"""Measures of images, through features of them. Pure functions of tensors.

frechet_distance, recall   of two sets of features
round_8bit                 images as a PNG holds them
"""

import torch
from torch import Tensor

# --- measures of features ------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to two sets of features, (N, D) and (M, D), in fp64.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (gap + cov_a.trace() + cov_b.trace() - 2 * cross).item())


def recall(real: Tensor, made: Tensor, k: int = 3) -> float:
    """The share of real features (N, D) within reach of a made one (M, D).

    Reach: the made feature's distance to its k-th neighbour among the made.
    """
    radius = torch.cdist(made, made).kthvalue(k + 1, dim=1).values  # the first is the point itself
    return (torch.cdist(real, made) <= radius).any(dim=1).float().mean().item()


# --- images --------------------------------------------------------------------------------------


def round_8bit(images: Tensor) -> Tensor:
    """As a PNG would hold them."""
    return from_uint8(to_uint8(images))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
