import json
import math
from pathlib import Path

import pytest
import torch
from conftest import GaussianVelocity, Linear

from schedule import (
    DDPM,
    Flow,
    Rng,
    draw_t,
    grid,
    guided,
    normal,
    resolution_shift,
    sample_ode,
    sample_x0,
    uniform,
)

T = torch.tensor([0.999, 0.5, 0.1])
PUBLISHED = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())


def test_flow_and_ddpm_round_trip_x0_and_eps(schedule, x0):
    """Mixing and reading the right prediction gives back what went in; DDPM divides by alpha ~ .07
    at t = .999, so fp32 rounding grows by 15."""
    eps = torch.randn_like(x0)
    x_t, right = schedule.noise(x0, eps, T), schedule.target(x0, eps)
    torch.testing.assert_close(schedule.x0(x_t, right, T), x0, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(schedule.eps(x_t, right, T), eps, atol=1e-5, rtol=1e-5)


def test_noise_is_alpha_x0_plus_sigma_eps(schedule, x0):
    eps = torch.randn_like(x0)
    alpha, sigma = schedule.alpha(T)[:, None, None, None], schedule.sigma(T)[:, None, None, None]
    torch.testing.assert_close(schedule.noise(x0, eps, T), alpha * x0 + sigma * eps)


def test_step_keeps_x0_and_eps_and_moves_t(schedule, x0):
    eps, t_next = torch.randn_like(x0), torch.tensor([0.7, 0.2, 0.0])
    stepped = schedule.step(schedule.noise(x0, eps, T), schedule.target(x0, eps), T, t_next)
    torch.testing.assert_close(stepped, schedule.noise(x0, eps, t_next), atol=2e-5, rtol=1e-5)


def test_the_ends_are_data_and_noise(schedule, x0):
    """t = 0 is clean for both; t = 1 is pure noise for flows only (SDXL's last entry is not)."""
    eps, zero, one = torch.randn_like(x0), torch.zeros(3), torch.ones(3)
    assert torch.equal(schedule.noise(x0, eps, zero), x0)
    assert torch.equal(schedule.noise(x0, eps, one), eps) == isinstance(schedule, Flow)


def test_ddpm_table_has_the_published_values():
    """alpha-bar at the entries of the four-step students and at the first, to 1e-6."""
    table = PUBLISHED["ddpm"]["alphas_cumprod"]
    got = DDPM().alpha_bar[[int(i) for i in table]]
    assert got.tolist() == pytest.approx([*table.values()], abs=1e-6)
    assert DDPM().alpha(torch.tensor([0.999])).item() == pytest.approx(0.0046601**0.5, abs=1e-6)


def test_grids_are_those_of_the_teachers():
    assert grid(Flow(3.0), 4) == [1, 0.9, 0.75, 0.5]  # SD 3.5
    assert grid(Flow(), 4) == [1, 0.75, 0.5, 0.25]
    assert grid(Flow(2.0), 4) == pytest.approx([1, 6 / 7, 2 / 3, 0.4])  # the embedded teacher


def test_flux_dev_samples_on_its_published_grids():
    """The shift grows with the image; the lists end with the clean image, ours do not."""
    flux = PUBLISHED["flux"]
    for tokens, sigmas in [(4096, flux["sigmas_1024"]), (1024, flux["sigmas_512"])]:
        assert resolution_shift(tokens) == pytest.approx(math.exp(flux["mu"][str(tokens)]))
        for steps, wanted in sigmas.items():
            got = grid(Flow(resolution_shift(tokens)), int(steps))
            assert [*got, 0.0] == pytest.approx(wanted, abs=1e-6)
    assert resolution_shift(4096) == pytest.approx(flux["shift_factor_exp_mu_1024"], abs=1e-6)
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))


def test_ddpm_samples_on_the_last_entries_of_equal_parts():
    """999, 749, 499, 249 for four steps, as SDXL's students; every entry for 1000 steps."""
    assert grid(DDPM(), 4) == [0.999, 0.749, 0.499, 0.249]
    assert grid(DDPM(), 1) == [0.999]
    for steps in (3, 30, 1000):
        entries = DDPM().index(torch.tensor(grid(DDPM(), steps))).tolist()
        assert len(set(entries)) == steps and entries == sorted(entries, reverse=True)
    assert entries == list(range(999, -1, -1))
    low = DDPM().alpha(torch.tensor(grid(DDPM(), 1000)[-1])).item()
    assert low == pytest.approx(0.99915**0.5, abs=1e-7), "entry 0, not clean data"


def test_flux_schnell_samples_unshifted():
    assert [*grid(Flow(), 4), 0.0] == PUBLISHED["flux"]["schnell_unshifted"]["4"]


def test_sd35s_students_are_asked_at_entries_of_the_shifted_table():
    """999, 749, 499, 249 of a thousand, entry i at the shifted (i + 1) / 1000: exactly the grid of
    four steps."""
    u = (torch.tensor([999, 749, 499, 249], dtype=torch.float64) + 1) / 1000
    assert Flow(3.0).warp(u).tolist() == [1, 0.9, 0.75, 0.5] == grid(Flow(3.0), 4)


def test_sd35_samples_on_its_published_grids():
    """Plain, and as the official sampler does, which shifts the low end twice."""
    sd35, flow = PUBLISHED["sd35"], Flow(PUBLISHED["sd35"]["shift"])
    for steps, wanted in sd35["plain_sigmas"].items():
        assert [*grid(flow, int(steps)), 0.0] == pytest.approx(wanted, abs=1e-6)
    last = flow.warp(torch.tensor(1 / 1000, dtype=torch.float64)).item()
    for steps, wanted in sd35["official_sigmas"].items():
        assert [*grid(flow, int(steps), last), 0.0] == pytest.approx(wanted, abs=1e-6)


def test_guidance_is_uncond_plus_g_times_the_difference(x0, cond, uncond):
    """Per-sample scales, and one batched call instead of two."""
    net, t, g = Linear(), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([1.0, 0.0, 4.0])
    got = guided(net, x0, t, cond, uncond, g)
    yes, no = net(x0, t, cond), net(x0, t, uncond)
    torch.testing.assert_close(got, no + g[:, None, None, None] * (yes - no))
    torch.testing.assert_close(got[0], yes[0])
    torch.testing.assert_close(got[1], no[1])
    counted = GaussianVelocity(0, 1)
    guided(counted, x0, t, cond, uncond, 2.0)
    assert [shape[0] for shape in counted.calls] == [6]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_held_prediction_has_its_own_direction_and_a_norm_nearer_to_the_conditional_ones(
    x0, cond, uncond, share
):
    """Sample by sample: (1 - share) of its own norm and share of the other's."""
    net, g = Linear(), torch.tensor([1.0, 3.0, 8.0])
    free, yes = guided(net, x0, T, cond, uncond, g), net(x0, T, cond)
    got = guided(net, x0, T, cond, uncond, g, rescale=share)
    norms = [x.flatten(1).norm(dim=1) for x in (got, free, yes)]
    torch.testing.assert_close(norms[0], (1 - share) * norms[1] + share * norms[2])
    unit = [x / norm[:, None, None, None] for x, norm in zip((got, free), norms, strict=False)]
    torch.testing.assert_close(*unit)
    assert (norms[1][1:] > 1.2 * norms[2][1:]).all(), "there is something to hold"
    torch.testing.assert_close(got[0], yes[0])


def test_without_uncond_the_scale_is_an_input(x0, cond):
    """FLUX.1-dev embeds the guidance scale; with guidance None no net sees any."""
    seen = []

    def net(x_t, t, cond):
        seen.append(cond.get("guidance"))
        return x_t

    guided(net, x0, T, cond, None, 3.5)
    guided(net, x0, T, cond, None, None)
    assert (
        torch.equal(seen[0], torch.full((3,), 3.5)) and seen[1] is None and "guidance" not in cond
    )


def test_euler_on_the_exact_velocity_reaches_the_data():
    """Data N(2, .5^2): 200 steps; the statistic of 40,000 samples is within .01."""
    eps = torch.randn(4, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    net = GaussianVelocity(2.0, 0.5)
    x = sample_ode(net, eps, {}, grid(net.schedule, 200))
    assert x.mean().item() == pytest.approx(2, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.01)


class MixtureNoise(torch.nn.Module):
    """The exact prediction for points that are a mixture of Gaussians under DDPM, closed form."""

    def __init__(self, weights, means, std):
        super().__init__()
        self.schedule, self.weights, self.means, self.std = DDPM(), weights, means, std

    def forward(self, x_t, t, cond):
        alpha, sigma = (
            f(t)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma)
        )
        x, variance = x_t[..., None], (alpha**2 * self.std**2 + sigma**2)[..., None]
        away = x - alpha[..., None] * self.means  # (B, C, H, W, parts)
        share = (self.weights.log() - away.square() / (2 * variance)).softmax(dim=-1)
        return sigma * (share * away / variance).sum(-1)  # eps = -sigma times the score


def test_ddim_on_the_exact_score_reaches_the_data():
    """A quarter of the points at -1.5 +- .2, the others at .5: 1000 steps; of 4,000 points the
    share is within .02, the means and deviations within .02."""
    net = MixtureNoise(torch.tensor([0.25, 0.75]), torch.tensor([-1.5, 0.5]), 0.2)
    eps = torch.randn(1, 1, 40, 100, generator=torch.Generator().manual_seed(0))
    x = sample_ode(net, eps, {}, grid(net.schedule, 1000))
    left, right = x[x < -0.5], x[x >= -0.5]
    assert len(left) / x.numel() == pytest.approx(0.25, abs=0.02)
    for points, mean in ((left, -1.5), (right, 0.5)):
        assert points.mean().item() == pytest.approx(mean, abs=0.02)
        assert points.std().item() == pytest.approx(0.2, abs=0.02)


def test_x0_sampler_noises_its_estimate_again(cond):
    """Two anchors, by hand, with the sampler's own noise."""
    net, eps = Linear(), torch.randn(3, 2, 4, 4)
    draws = [torch.Generator().manual_seed(i) for i in range(3)]
    got = sample_x0(net, eps, cond, (1.0, 0.4), generators=draws)
    fresh = normal(eps, [torch.Generator().manual_seed(i) for i in range(3)])
    one, later = torch.ones(3), torch.full((3,), 0.4)
    x0 = eps - net(eps, one, cond)
    x_t = 0.6 * x0 + 0.4 * fresh
    torch.testing.assert_close(got, x_t - 0.4 * net(x_t, later, cond))


def test_noise_of_a_sample_does_not_depend_on_its_batch(x0):
    """What two ranks draw for samples 0..3 is what one rank draws."""
    one = Rng(0, 7, "dmd", range(4))
    two = [Rng(0, 7, "dmd", range(0, 2)), Rng(0, 7, "dmd", range(2, 4))]
    like = torch.empty(4, 2, 3, 3)
    alone = torch.cat([normal(like[:2], rng.own) for rng in two])
    assert torch.equal(normal(like, one.own), alone)
    assert torch.equal(
        uniform(like, one.own), torch.cat([uniform(like[:2], rng.own) for rng in two])
    )
    whole = Rng(0, 7, "dmd", [0])  # one source for four rows: all different
    assert len(uniform(like, whole.own).unique()) == 4
    draws = {torch.rand((), generator=rng.shared).item() for rng in (one, *two)}
    assert len(draws) == 1, "a shared draw must be equal on all ranks"


def test_random_numbers_differ_by_seed_step_purpose_and_sample():
    keys = [(0, 0, "dmd"), (1, 0, "dmd"), (0, 1, "dmd"), (0, 0, "fake")]
    numbers = torch.stack(
        [uniform(torch.empty(8), Rng(*key, range(8)).own) for key in keys]
    ).flatten()
    assert len(numbers.unique()) == 32


def test_times_follow_their_distribution_and_the_shift():
    """20,000 draws: uniform has mean .5, logit-normal median .5; shift 3 maps a half to three
    quarters.
    """
    points, rng = torch.empty(20000, 2, 1, 1), Rng(0, 0, "t", [0])
    t = draw_t("uniform", Flow(), points, rng)
    assert t.min() >= 0.02 and t.max() <= 0.98 and t.mean().item() == pytest.approx(0.5, abs=0.01)
    t = draw_t("logit-normal", Flow(3.0), points, rng)
    assert t.median().item() == pytest.approx(0.75, abs=0.01)
    with pytest.raises(ValueError, match="beta"):
        draw_t("beta", Flow(), points, rng)
