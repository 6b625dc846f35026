"""Intra-segment guidance: the teacher shows the student what happens between two of its anchors.

    a time in a segment   draw_mid   tau_mid, with tau_start > tau_mid > tau_end
    ISG loss (Eq. 12)     isg_loss   the student's one step over the segment, against the teacher's
                                     step to tau_mid and the student's from there

    tau_start ---- teacher, guided ----> tau_mid ---- student ----> tau_end   target, no gradient
    tau_start ------------------------ student -------------------> tau_end   learns to get there

Knows nothing of devices, files, ranks or configuration. Latents are (B, C, H, W), times (B,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from schedule import Cond, Rng, guided, uniform


def draw_mid(tau_start: Tensor, tau_end: Tensor, margin: float, rng: Rng) -> Tensor:
    """(B,) uniform inside the segment, `margin` off its ends (the middle, if it is too short)."""
    # an assertion for which nobody waits: a GPU stops when it comes to it
    torch._assert_async((tau_start > tau_end).all(), "a segment runs from noisy to clean")
    margin = torch.minimum(torch.full_like(tau_start, margin), (tau_start - tau_end) / 2)
    u = uniform(tau_start, rng.own)
    return tau_end + margin + u * (tau_start - tau_end - 2 * margin)


def distance_l2(x: Tensor, x_tar: Tensor) -> Tensor:
    """Paper, Eq. 12: mean squared difference, fp32."""
    return (x.float() - x_tar.float()).square().mean()


def distance_charbonnier(x: Tensor, x_tar: Tensor) -> Tensor:
    """Official code: mean of sqrt(d^2 + 1e-6) - 1e-3, fp32; squared for small d, else absolute."""
    return ((x.float() - x_tar.float()).square() + 1e-6).sqrt().sub(1e-3).mean()


# By name: of the student's x and the target x_tar, both (B, C, H, W), a scalar. A new distance is
# a line here; --isg-distance takes it, and its help lists it.
DISTANCES = {"l2": distance_l2, "charbonnier": distance_charbonnier}


def isg_loss(
    student: Callable,
    teacher: Callable,
    x_t: Tensor,
    prediction: Tensor,
    tau_start: Tensor,
    tau_end: Tensor,
    cond: Cond,
    uncond: Cond | None,
    guidance: tuple[float, float] | None,
    margin: float,
    distance: str,
    rng: Rng,
    rescale: float = 0.0,
) -> Tensor:
    """Eq. 12: the student's one step over the segment against the target; a scalar in fp32.

    prediction: the student's at (x_t, tau_start), already made for DMD, carrying the gradient;
    guidance: range of the teacher's scale, drawn per sample, or None; distance: of DISTANCES;
    rescale: see schedule.guided.
    """
    step = student.schedule.step
    with torch.no_grad():
        tau_mid = draw_mid(tau_start, tau_end, margin, rng)
        g = uniform(x_t, rng.own, *guidance) if guidance else None
        shown = guided(teacher, x_t, tau_start, cond, uncond, g, rescale)
        x_mid = step(x_t, shown, tau_start, tau_mid)
        x_tar = step(x_mid, student(x_mid, tau_mid, cond), tau_mid, tau_end)
    x = step(x_t, prediction, tau_start, tau_end)
    return DISTANCES[distance](x, x_tar)
