"""Distribution matching distillation: move the student's samples to the teacher's distribution.

    student input (Algorithm 1)   student_input   noised data, or the student's own output again
    DMD gradient                  dmd_gradient    from the fake score's estimate to the teacher's
    the same at two times         split_gradient  what guidance adds, at times of its own
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
    return normalised(x0_fake.float() - x0_teacher.float(), x0, x0_teacher)


def normalised(gap: Tensor, x0: Tensor, x0_teacher: Tensor) -> Tensor:
    """gap / mean|x0 - x0_teacher|, the mean per sample; zero where that is zero."""
    away = (x0.float() - x0_teacher.float()).abs()
    scale = per_sample(away.flatten(1).mean(1), x0)
    return torch.where(scale == 0, 0.0, gap / scale)


def split_gradient(
    x0: Tensor,
    x0_fake: Tensor,
    teacher: tuple[Tensor, Tensor],
    teacher_later: tuple[Tensor, Tensor],
) -> Tensor:
    """The same in two parts, from the teacher's estimates (at scale 1, guided) at a time each:

    (x0_fake - x0_plain) / mean|x0 - x0_guided|, where distributions are matched, and
    (x0_plain - x0_guided) / mean|x0 - x0_guided| at the guidance's own time. At one time they add
    up to `dmd_gradient`. arXiv:2511.22677.
    """
    (plain, made), (plain_later, made_later) = teacher, teacher_later
    matching = normalised(x0_fake.float() - plain.float(), x0, made)
    return matching + normalised(plain_later.float() - made_later.float(), x0, made_later)


def dmd_loss(
    x0: Tensor,
    teacher: Callable,
    fake: Callable,
    cond: Cond,
    uncond: Cond | None,
    guidance: tuple[float, float] | None,
    times: str,
    rng: Rng,
    rescale: float = 0.0,
    times_guidance: str | None = None,
) -> Tensor:
    """0.5 mean |x0 - sg(x0 - gradient)|^2 on the student's estimate x0, a scalar in fp32.

    The teacher is guided, with a scale drawn per sample from the range `guidance` (None: it is
    not); the fake score never is. times: see draw_t; rescale: see schedule.guided; times_guidance:
    of what guidance adds, see `split_gradient`; None: the same times.
    """
    schedule = teacher.schedule

    def noised(kind: str) -> tuple[Tensor, Tensor]:
        t = draw_t(kind, schedule, x0, rng)
        return schedule.noise(x0, normal(x0, rng.own), t), t

    def estimate(x_t: Tensor, t: Tensor, scale: Tensor | float | None) -> Tensor:
        return schedule.x0(x_t, guided(teacher, x_t, t, cond, uncond, scale, rescale), t)

    with torch.no_grad():
        x_t, t = noised(times)
        g = uniform(x0, rng.own, *guidance) if guidance else None
        x0_teacher = estimate(x_t, t, g)
        x0_fake = schedule.x0(x_t, fake(x_t, t, cond), t)
        if times_guidance is None:
            gradient = dmd_gradient(x0, x0_fake, x0_teacher)
        else:
            later = noised(times_guidance)
            both = estimate(x_t, t, 1.0), x0_teacher
            both_later = estimate(*later, 1.0), estimate(*later, g)
            gradient = split_gradient(x0, x0_fake, both, both_later)
        target = x0.float() - gradient
    return 0.5 * F.mse_loss(x0.float(), target)


def fake_loss(fake: Callable, x0: Tensor, cond: Cond, times: str, rng: Rng) -> Tensor:
    """Flow matching (DDPM: noise prediction) on the student's samples, which get no gradient.

    Scalar, fp32.
    """
    schedule, x0 = fake.schedule, x0.detach()
    t, eps = draw_t(times, schedule, x0, rng), normal(x0, rng.own)
    prediction = fake(schedule.noise(x0, eps, t), t, cond)
    return F.mse_loss(prediction.float(), schedule.target(x0, eps).float())
