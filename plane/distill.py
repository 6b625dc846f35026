"""Algorithm 1 without a discriminator, in the plane.

    distill       a student of a teacher, measured as it learns
    anchor_loss   the control for ISG: regression on the teacher, no point inside the segment

dmd.py, ida.py, isg.py and schedule.py are used as they are for the large teachers.
"""

import copy
import time

import torch
from torch import Tensor, nn

from dmd import dmd_loss, fake_loss, student_input
from ida import ida_update
from isg import distance_l2, isg_loss
from plane.denoisers import MLP
from plane.measures import MEASURES, Seen, draw_points
from plane.settings import BATCH, EVERY, Setting
from plane.targets import TARGETS
from schedule import Rng, generator

UNGUIDED = {"cond": {}, "uncond": None, "guidance": (1.0, 1.0)}  # points have no captions


def distill(setting: Setting, seed: int, teacher: nn.Module, start: MLP) -> dict:
    """Algorithm 1 without a discriminator.

    Returns curves (a list per measure), points (COUNT, 2) of the last measurement, and seconds.
    """
    began, s = time.perf_counter(), setting
    student, fake = (copy.deepcopy(start).requires_grad_(True) for _ in range(2))
    opt = torch.optim.Adam(student.parameters(), lr=s.lr, fused=True)
    opt_fake = torch.optim.Adam(fake.parameters(), lr=s.lr_fake, fused=True)
    schedule, target, draw = student.schedule, TARGETS[s.target], generator(seed, "data")
    curves = {name: [] for name in s.measures}
    for step in range(s.iterations):
        rng = {name: Rng(seed, step, name, [0]) for name in ("input", "dmd", "isg", "fake")}
        x0_real = target.sample(BATCH, draw)
        x_t, i = student_input(
            student=student, x0_real=x0_real, cond={}, taus=s.taus, rng=rng["input"]
        )
        tau_start, tau_end = (x_t.new_full((BATCH,), tau) for tau in (*s.taus, 0.0)[i : i + 2])
        prediction = student(x_t, tau_start, {})
        x0 = schedule.x0(x_t, prediction, tau_start)
        if step % s.ttur == 0:
            loss = dmd_loss(
                x0=x0, teacher=teacher, fake=fake, **UNGUIDED, times="uniform", rng=rng["dmd"]
            )
            segment = dict(x_t=x_t, prediction=prediction, tau_start=tau_start, tau_end=tau_end)
            if s.w_isg:
                isg = isg_loss(
                    student=student,
                    teacher=teacher,
                    **segment,
                    **UNGUIDED,
                    margin=0.02,
                    distance=s.distance,
                    rng=rng["isg"],
                )
                loss = loss + s.w_isg * isg
            if s.w_anchor:
                loss = loss + s.w_anchor * anchor_loss(student, teacher, **segment)
            update(opt, loss)
            followed = student if s.pull == "student" else start
            ida_update(fake=fake, student=followed, decay=s.ida)
        update(opt_fake, fake_loss(fake=fake, x0=x0, cond={}, times="uniform", rng=rng["fake"]))
        if (step + 1) % EVERY == 0:
            seen = Seen(s, seed, student, fake, draw_points(student, s.taus, "x0", seed))
            for name in s.measures:
                curves[name].append(MEASURES[name](seen))
    result = {"curves": curves, "points": seen.points.numpy()}
    return result | {"seconds": time.perf_counter() - began}


def update(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
    opt.step()


def anchor_loss(
    student: nn.Module,
    teacher: nn.Module,
    x_t: Tensor,
    prediction: Tensor,
    tau_start: Tensor,
    tau_end: Tensor,
) -> Tensor:
    """The control for ISG: the teacher's step over the whole segment, no point inside it.

    x_t, prediction: (B, 2, 1, 1); tau_start, tau_end: (B,); a scalar.
    """
    step = student.schedule.step
    with torch.no_grad():
        x_tar = step(x_t, teacher(x_t, tau_start, {}), tau_start, tau_end)
    return distance_l2(step(x_t, prediction, tau_start, tau_end), x_tar)
