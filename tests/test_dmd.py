import pytest
import torch
from conftest import GaussianVelocity, Linear

from dmd import dmd_gradient, dmd_loss, fake_loss, split_gradient, student_input
from schedule import DDPM, Flow, draw_t, guided, normal, uniform

RANGE = (2.0, 5.0)


def test_dmd_gradient_vanishes_when_fake_equals_teacher(x0):
    x0_teacher = torch.randn_like(x0)
    assert dmd_gradient(x0, x0_teacher, x0_teacher).count_nonzero() == 0


def test_dmd_gradient_is_normalised_per_sample(x0):
    """By mean |x0 - x0_teacher|, each sample by its own."""
    x0_fake, x0_teacher = torch.randn_like(x0), torch.randn_like(x0)
    got = dmd_gradient(x0, x0_fake, x0_teacher)
    for b in range(3):
        wanted = (x0_fake[b] - x0_teacher[b]) / (x0[b] - x0_teacher[b]).abs().mean()
        torch.testing.assert_close(got[b], wanted)


def test_a_teacher_that_is_not_finite_gives_no_gradient_of_zero(x0):
    """NaN in the denominator is no agreement: it reaches the loss, where the guard skips it."""
    x0_teacher = x0 + 1
    x0_teacher[1, 0, 0, 0] = float("nan")
    got = dmd_gradient(x0, x0 + 2, x0_teacher)
    assert got[1].isnan().all() and torch.isfinite(got[0]).all()
    x0_teacher[1, 0, 0, 0] = float("inf")
    assert not torch.isfinite(dmd_gradient(x0, x0 + 2, x0_teacher)[1]).all()


def test_dmd_gradient_is_zero_not_nan_where_the_teacher_agrees(x0):
    """A zero denominator gives a zero gradient, in that sample alone."""
    x0_fake, x0_teacher = torch.randn_like(x0), torch.randn_like(x0)
    x0_teacher[1] = x0[1]
    got = dmd_gradient(x0, x0_fake, x0_teacher)
    assert torch.isfinite(got).all() and got[1].count_nonzero() == 0 and got[0].count_nonzero() > 0


@pytest.mark.parametrize("schedule", [Flow(2.0), DDPM()], ids=["flow", "ddpm"])
def test_autograd_of_dmd_loss_is_the_stated_direction(schedule, x0, cond, uncond, rng):
    """d loss / d x0 = gradient / elements, with the teacher guided and the fake score not. The
    random numbers are drawn again here in the order the docstring gives."""
    teacher, fake = Linear(schedule, seed=1), Linear(schedule, seed=2)
    x0 = x0.requires_grad_()
    dmd_loss(x0, teacher, fake, cond, uncond, RANGE, "uniform", rng("dmd")).backward()
    draws = rng("dmd")
    t = draw_t("uniform", schedule, x0, draws)
    x_t = schedule.noise(x0.detach(), normal(x0, draws.own), t)
    g = uniform(x0, draws.own, *RANGE)
    x0_teacher = schedule.x0(x_t, guided(teacher, x_t, t, cond, uncond, g), t)
    direction = dmd_gradient(x0.detach(), schedule.x0(x_t, fake(x_t, t, cond), t), x0_teacher)
    torch.testing.assert_close(x0.grad, direction / x0.numel(), atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for net in (teacher, fake) for p in net.parameters())


def test_both_parts_of_the_gradient_at_one_time_are_the_whole(x0):
    """fake - plain and plain - guided, each over the same distance. Alone, what guidance adds leads
    from the plain estimate to the guided one: descent goes against the gradient."""
    x0_fake, plain, made = (torch.randn_like(x0) for _ in range(3))
    whole = dmd_gradient(x0, x0_fake, made)
    torch.testing.assert_close(split_gradient(x0, x0_fake, (plain, made), (plain, made)), whole)
    other = (torch.randn_like(x0), torch.randn_like(x0))
    added = split_gradient(x0, plain, (plain, made), other)
    for b in range(3):
        away = (x0[b] - other[1][b]).abs().mean()
        torch.testing.assert_close(-added[b] * away, other[1][b] - other[0][b])


@pytest.mark.parametrize("schedule", [Flow(2.0), DDPM()], ids=["flow", "ddpm"])
def test_what_guidance_adds_has_times_and_noise_of_its_own(schedule, x0, cond, uncond, rng):
    """Drawn after those of the matching part; the scale is one for both."""
    teacher, fake = Linear(schedule, seed=1), Linear(schedule, seed=2)
    x0 = x0.requires_grad_()
    given = (teacher, fake, cond, uncond, RANGE, "uniform", rng("dmd"))
    dmd_loss(x0, *given, times_guidance="logit-normal").backward()
    draws, noisy = rng("dmd"), []

    def noise(kind):
        t = draw_t(kind, schedule, x0, draws)
        noisy.append((schedule.noise(x0.detach(), normal(x0, draws.own), t), t))

    def estimates(x_t, t):
        scales = (torch.ones(3), g)
        made = [guided(teacher, x_t, t, cond, uncond, scale) for scale in scales]
        return [schedule.x0(x_t, prediction, t) for prediction in made]

    noise("uniform")
    g = uniform(x0, draws.own, *RANGE)
    noise("logit-normal")
    (x_t, t), later = noisy
    x0_fake = schedule.x0(x_t, fake(x_t, t, cond), t)
    wanted = split_gradient(x0.detach(), x0_fake, estimates(x_t, t), estimates(*later))
    torch.testing.assert_close(x0.grad, wanted / x0.numel(), atol=1e-6, rtol=1e-4)


def test_the_teachers_norm_is_held_in_the_loss(x0, cond, uncond, rng):
    """With all of it held, a scale of 8 is no larger step than a scale of 1."""
    teacher, fake = Linear(seed=1), Linear(seed=2)
    held, free, plain = (
        dmd_loss(x0, teacher, fake, cond, uncond, (g, g), "uniform", rng("dmd"), rescale=share)
        for g, share in ((8.0, 1.0), (8.0, 0.0), (1.0, 1.0))
    )
    assert held != free and plain == dmd_loss(
        x0, teacher, fake, cond, uncond, (1.0, 1.0), "uniform", rng("dmd")
    )


class NoiseView(torch.nn.Module):
    """A flow network as a DDPM's: x_t is scaled to the flow's, v is turned into eps."""

    def __init__(self, flow):
        super().__init__()
        self.flow, self.schedule = flow, DDPM()

    def forward(self, x_t, t, cond):
        alpha, sigma = (
            f(t)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma)
        )
        x_flow, t_flow = x_t / (alpha + sigma), flow_time(t)
        return self.flow.schedule.eps(x_flow, self.flow(x_flow, t_flow, cond), t_flow)


def flow_time(t):
    """Where a flow has DDPM's ratio of noise to signal at t (B,)."""
    alpha, sigma = DDPM().alpha(t), DDPM().sigma(t)
    return sigma / (alpha + sigma)


def test_flow_and_ddpm_give_the_same_dmd_direction(x0, cond, uncond, rng):
    """For networks written in both parametrisations, with the same noise at times that match.

    The x_t of the one is a multiple of the other's, the estimates of x0 are equal, guidance
    included. DDPM divides by alpha, .08 at t = .98: four digits.
    """
    schedule = Flow()
    schedule.warp = flow_time  # the same draws, at matching times
    pairs = [(flow, NoiseView(flow)) for flow in (Linear(schedule, seed=i) for i in (1, 2))]
    grads = []
    for teacher, fake in zip(*pairs, strict=True):
        x = x0.clone().requires_grad_()
        dmd_loss(x, teacher, fake, cond, uncond, RANGE, "uniform", rng("dmd")).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
    swapped = x0.clone().requires_grad_()
    (fake, _), (teacher, _) = pairs
    dmd_loss(swapped, teacher, fake, cond, uncond, RANGE, "uniform", rng("dmd")).backward()
    assert not torch.allclose(swapped.grad, grads[0], rtol=0.1), "the direction has its sense"


def test_dmd_descent_moves_samples_to_the_teachers_distribution(rng):
    """Exact scores of Gaussians: student samples around 0, known exactly to the fake score; data
    around 3. Every sample must move up; with teacher and fake swapped, or the sign flipped,
    down."""
    x0 = 0.5 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    teacher, fake = GaussianVelocity(3.0, 0.5), GaussianVelocity(0.0, 0.5)
    x0.requires_grad_()
    dmd_loss(x0, teacher, fake, {}, None, (1, 1), "uniform", rng("dmd", 8)).backward()
    assert (x0.grad.mean((1, 2, 3)) < 0).all(), "descent must increase x0"


def test_fake_loss_is_least_at_the_true_velocity_of_the_students_samples(rng):
    """Samples N(1, .5^2): the exact velocity beats those of a shifted and a narrower Gaussian."""
    x0 = 1 + 0.5 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = {
        (mean, std): fake_loss(GaussianVelocity(mean, std), x0, {}, "uniform", rng("fake", 64))
        for mean, std in ((1.0, 0.5), (1.4, 0.5), (1.0, 0.25))
    }
    assert min(losses, key=losses.get) == (1.0, 0.5)


def test_no_gradient_of_the_fake_loss_reaches_the_student(x0, cond, rng):
    student, fake = Linear(seed=1), Linear(seed=2)
    sample = student(x0, torch.ones(3), cond)
    fake_loss(fake, sample, cond, "logit-normal", rng("fake")).backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in fake.parameters())


TAUS = (1.0, 0.75, 0.5, 0.25)


def test_student_input_without_backward_simulation_is_noised_data(schedule, x0, cond, rng):
    student = Linear(schedule)
    x_t, i = student_input(student, x0, cond, TAUS, rng("input"), p_backward=0.0)
    eps = normal(x0, rng("input").own)
    torch.testing.assert_close(x_t, schedule.noise(x0, eps, torch.full((3,), TAUS[i])))


def test_backward_simulation_is_the_x0_sampler_stopped_before_its_anchor(schedule, x0, cond, rng):
    """By hand from the same noise; steps are tried until each anchor has come up."""
    student, seen = Linear(schedule), set()
    for step in range(30):
        x_t, i = student_input(student, x0, cond, TAUS, rng("input", step=step), p_backward=1.0)
        own = rng("input", step=step).own
        wanted = normal(x0, own)
        for k in range(i):
            t, t_next = torch.full((3,), TAUS[k]), torch.full((3,), TAUS[k + 1])
            estimate = schedule.x0(wanted, student(wanted, t, cond), t)
            wanted = schedule.noise(estimate, normal(x0, own), t_next)
        torch.testing.assert_close(x_t, wanted)
        assert not x_t.requires_grad
        seen.add(i)
    assert seen == {0, 1, 2, 3}


def test_half_of_the_inputs_are_backward_simulation(x0, cond, rng):
    """400 steps: pure data shows as x_t near x0 at a tiny anchor; the share is .5 within .08."""
    student = Linear()
    data = sum(
        torch.allclose(
            student_input(student, x0, cond, (1e-6,), rng("i", step=s))[0], x0, atol=1e-3
        )
        for s in range(400)
    )
    assert data / 400 == pytest.approx(0.5, abs=0.08)
