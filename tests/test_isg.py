import math

import pytest
import torch
from conftest import Linear

from isg import distance_charbonnier, distance_l2, draw_mid, isg_loss
from schedule import DDPM, Flow, guided, uniform

START, END = torch.tensor([1.0, 0.7, 0.5]), torch.tensor([0.7, 0.4, 0.0])
RANGE = (2.0, 4.0)


class Constant:
    """The same prediction everywhere: under Flow, straight paths."""

    def __init__(self, value, schedule):
        self.value, self.schedule, self.calls = value, schedule, []

    def __call__(self, x_t, t, cond):
        self.calls.append(t)
        return (
            self.value[: len(x_t)] if len(x_t) <= len(self.value) else self.value.repeat(2, 1, 1, 1)
        )


@pytest.mark.parametrize("schedule", [Flow(), DDPM()], ids=["flow", "ddpm"])
@pytest.mark.parametrize("distance", ["l2", "charbonnier"])
def test_isg_vanishes_on_straight_paths(schedule, distance, x0, cond, rng):
    """Teacher and student agree on one constant velocity (DDPM: one noise): a detour over tau_mid
    ends where the direct step does. Rounding of two steps against one: 1e-9 squared."""
    x_t, net = torch.randn_like(x0), Constant(torch.randn_like(x0), schedule)
    args = (net, net, x_t, net.value, START, END, cond, None, RANGE, 0.02, distance, rng("isg"))
    assert isg_loss(*args).item() == pytest.approx(0, abs=2e-7)


def test_isg_on_a_curved_path_has_the_hand_computed_value(cond, rng):
    """Teacher's v = 3 everywhere, student's v = 1. From tau_start the student lands at
    x + (end - start), the target at x + 3 (mid - start) + (end - mid): apart by 2 (start - mid)."""
    x_t = torch.randn(3, 2, 4, 4)
    student, teacher = (Constant(torch.full_like(x_t, v), Flow()) for v in (1.0, 3.0))
    args = (student, teacher, x_t, student.value, START, END, cond, None, RANGE, 0.05)
    mid = draw_mid(START, END, 0.05, rng("isg"))
    d = 2 * (START - mid)
    got = isg_loss(*args, "l2", rng("isg"))
    assert got.item() == pytest.approx(d.square().mean().item(), rel=1e-5)
    got = isg_loss(*args, "charbonnier", rng("isg"))
    wanted = ((d.square() + 1e-6).sqrt() - 1e-3).mean()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("schedule", [Flow(2.0), DDPM()], ids=["flow", "ddpm"])
def test_target_is_the_teachers_guided_step_then_the_students(schedule, x0, cond, uncond, rng):
    """All of Eq. 12 once more, step by step; gradient only through the direct step."""
    student, teacher = Linear(schedule, seed=1), Linear(schedule, seed=2)
    x_t = torch.randn_like(x0)
    start, end = START.clamp_max(0.999), END
    prediction = student(x_t, start, cond)
    got = isg_loss(
        *(student, teacher, x_t, prediction, start, end, cond, uncond),
        *(RANGE, 0.02, "l2", rng("isg")),
    )
    draws = rng("isg")
    mid = draw_mid(start, end, 0.02, draws)
    g = uniform(x_t, draws.own, *RANGE)
    with torch.no_grad():
        v = guided(teacher, x_t, start, cond, uncond, g)
        x_mid = schedule.step(x_t, v, start, mid)
        x_tar = schedule.step(x_mid, student(x_mid, mid, cond), mid, end)
    wanted = (schedule.step(x_t, prediction, start, end) - x_tar).square().mean()
    torch.testing.assert_close(got, wanted)
    names = [name for name, _ in student.named_parameters()]
    ours = torch.autograd.grad(got, list(student.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(wanted, list(student.parameters()))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=f"gradient of {name}: the target must carry none")
    assert not any(p.grad is not None for p in teacher.parameters())


def test_mid_times_keep_their_margin_and_fill_the_segment(rng):
    start, end = torch.full((5000,), 0.8), torch.full((5000,), 0.5)
    mid = draw_mid(start, end, 0.05, rng("isg", 5000))
    assert mid.min() >= 0.55 - 1e-6 and mid.max() <= 0.75 + 1e-6
    assert (
        mid.min() < 0.56
        and mid.max() > 0.74
        and mid.mean().item() == pytest.approx(0.65, abs=0.005)
    )
    short = draw_mid(torch.full((4,), 0.53), torch.full((4,), 0.5), 0.05, rng("isg", 4))
    torch.testing.assert_close(short, torch.full((4,), 0.515))


def test_a_segment_runs_from_noisy_to_clean(rng):
    with pytest.raises(RuntimeError, match="noisy to clean"):
        draw_mid(END, START, 0.02, rng("isg"))


def test_the_teachers_step_can_be_held_to_the_unguided_norm(x0, cond, uncond, rng):
    """Only its own step: by hand, with the same held prediction."""
    student, teacher, x_t = Linear(seed=1), Linear(seed=2), torch.randn_like(x0)
    prediction, step = student(x_t, START, cond), student.schedule.step
    given = (student, teacher, x_t, prediction, START, END, cond, uncond, (6.0, 6.0), 0.02, "l2")
    got = isg_loss(*given, rng("isg"), rescale=0.5)
    mid = draw_mid(START, END, 0.02, rng("isg"))
    shown = guided(teacher, x_t, START, cond, uncond, 6.0, rescale=0.5)
    x_mid = step(x_t, shown, START, mid)
    target = step(x_mid, student(x_mid, mid, cond), mid, END)
    wanted = distance_l2(step(x_t, prediction, START, END), target)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert got.item() != pytest.approx(isg_loss(*given, rng("isg")).item(), rel=1e-3)


def test_charbonnier_is_squared_for_small_and_absolute_for_large_differences():
    x = torch.zeros(4)
    for d, wanted in ((1e-5, 1e-10 / 2e-3), (10.0, 10 - 1e-3)):
        assert distance_charbonnier(x + d, x).item() == pytest.approx(wanted, rel=0.05)
    assert distance_l2(x + 2, x).item() == 4
    assert math.isfinite(distance_charbonnier(x, x).item())
