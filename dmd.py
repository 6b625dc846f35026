"""Distribution matching distillation: move the student's samples to the teacher's distribution.

    student input (Algorithm 1)   student_input   noised data, or the student's own output again
    DMD gradient                  dmd_gradient    from the fake score's estimate to the teacher's
    DMD loss                      dmd_loss        carries that gradient, over the element count
    fake score                    fake_loss       learns the student's samples by denoising them

Knows nothing of devices, files, ranks or configuration. Latents are (B, C, H, W), times (B,); see
schedule.py for `net`, `cond` and `rng`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from schedule import Cond, Rng, anchor_at, draw_t, guided, normal, per_sample, uniform


@torch.no_grad()
def student_input(
    student: Callable,
    x0_real: Tensor,
    cond: Cond,
    taus: Sequence[float] | Tensor,
    rng: Rng,
    p_backward: float = 0.5,
) -> tuple[Tensor, int]:
    """x_t (B, C, H, W) at the anchor taus[i], and i. taus: K, or (K, B) of samples; see anchor_at.

    Backward simulation (with p_backward): from noise, the student's own estimate at every anchor
    before i, each noised again to the next, as in sampling. Otherwise real latents, noised. All
    ranks take the same branch and anchor.
    """
    schedule = student.schedule
    i = int(torch.randint(len(taus), (), generator=rng.shared))
    backward = torch.rand((), generator=rng.shared) < p_backward
    t = [anchor_at(taus, k, x0_real) for k in range(i + 1)]
    if not backward:
        return schedule.noise(x0_real, normal(x0_real, rng.own), t[i]), i
    x_t = normal(x0_real, rng.own)
    for k in range(i):
        x0 = schedule.x0(x_t, student(x_t, t[k], cond), t[k])
        x_t = schedule.noise(x0, normal(x0, rng.own), t[k + 1])
    return x_t, i


def dmd_gradient(x0: Tensor, x0_fake: Tensor, x0_teacher: Tensor) -> Tensor:
    """(x0_fake - x0_teacher) / mean|x0 - x0_teacher|, the mean per sample; zero where that is zero.

    All (B, C, H, W). What is not finite stays so, and the guard sees it.
    """
    x0, x0_fake, x0_teacher = x0.float(), x0_fake.float(), x0_teacher.float()
    scale = per_sample((x0 - x0_teacher).abs().flatten(1).mean(1), x0)
    return torch.where(scale == 0, 0.0, (x0_fake - x0_teacher) / scale)


def dmd_loss(
    x0: Tensor,
    teacher: Callable,
    fake: Callable,
    cond: Cond,
    uncond: Cond | None,
    guidance: tuple[float, float] | None,
    times: str,
    rng: Rng,
) -> Tensor:
    """0.5 mean |x0 - sg(x0 - gradient)|^2 on the student's estimate x0, a scalar in fp32.

    The teacher is guided, with a scale drawn per sample from the range `guidance` (None: it is
    not); the fake score never is. times: see draw_t.
    """
    schedule = teacher.schedule
    with torch.no_grad():
        t = draw_t(times, schedule, x0, rng)
        x_t = schedule.noise(x0, normal(x0, rng.own), t)
        g = uniform(x0, rng.own, *guidance) if guidance else None
        x0_teacher = schedule.x0(x_t, guided(teacher, x_t, t, cond, uncond, g), t)
        x0_fake = schedule.x0(x_t, fake(x_t, t, cond), t)
        target = x0.float() - dmd_gradient(x0, x0_fake, x0_teacher)
    return 0.5 * F.mse_loss(x0.float(), target)


def fake_loss(fake: Callable, x0: Tensor, cond: Cond, times: str, rng: Rng) -> Tensor:
    """Flow matching (DDPM: noise prediction) on the student's samples, which get no gradient.

    Scalar, fp32.
    """
    schedule, x0 = fake.schedule, x0.detach()
    t, eps = draw_t(times, schedule, x0, rng), normal(x0, rng.own)
    prediction = fake(schedule.noise(x0, eps, t), t, cond)
    return F.mse_loss(prediction.float(), schedule.target(x0, eps).float())
