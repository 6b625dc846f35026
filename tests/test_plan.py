"""The plan against what really happens: bytes and FLOPs of train_step on networks of reduced width.

The real step's bytes are counted by torch's own memory tracker, its FLOPs by FlopCounterMode.
"""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
from conftest import refused
from small import SMALL, flux
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import teachers
import train
from engine import plan
from engine.plan import Measured, Turn, calls, flops, mean_flops, turns
from teachers import configure, find

SIZE = (96, 64)  # rectangular
WIDER = flux(guidance=True)
WIDER = replace(WIDER, denoiser=replace(WIDER.denoiser, width=72, heads=4, axes=(2, 8, 8)))
WIDER = find("flux-dev").resized(WIDER)


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for teacher, family in (SMALL | {"flux-dev": WIDER}).items():
        monkeypatch.setitem(teachers.FOUND, teacher, family)


def setup(teacher, **flags):
    """A real run's networks, random weights, after one iteration that made Adam's state."""
    cfg = configure(teacher, size=SIZE, batch=2, lr_warmup=0, ttur=1, w_gan=1.0, w_isg=1.0, **flags)
    torch.manual_seed(0)
    made = plan.networks(cfg)
    student, fake, real = made["student"][0], plan.networks(cfg)["student"][0], made["teacher"][0]
    frozen = torch.bfloat16 if cfg.bf16 else torch.float32
    vae, disc = made["VAE"][0].to(frozen), made["disc"][0]
    disc.backbone.to(frozen)
    nets = train.Nets(find(teacher), student, fake, real.to(frozen), disc, vae, student)
    opts = train.build_learners(nets, cfg)
    cond, uncond = (plan.conditioning(find(teacher), 2, frozen) for _ in range(2))
    batch = train.Batch(
        range(2),
        torch.rand(2, 3, *SIZE) * 2 - 1,
        torch.randn(2, *find(teacher).latent_shape(SIZE)),
        cond,
        uncond if find(teacher).uses_null else None,
        torch.randn(2, find(teacher).embedding_width()),
    )
    return cfg, nets, opts, batch


def step_of(cfg, batch, student, wanted):
    """A step whose anchor is judged, or is not, as `wanted`; and its kind of turn."""
    for step in range(100):
        rng = train.Rng(cfg.seed, step, "input", batch.ids)
        taus = train.anchors(cfg, student.schedule)
        i = int(torch.randint(len(taus), (), generator=rng.shared))
        backward = bool(torch.rand((), generator=rng.shared) < cfg.p_backward)
        turn = Turn(
            step % cfg.ttur == 0,
            bool(student.schedule.alpha(torch.tensor(taus[i])) > 0),
            i if backward else 0,
        )
        if turn.judged == wanted[0] and bool(turn.drawn) == wanted[1]:
            return step, turn
    raise AssertionError("no such step")


@functools.cache
def costs_of(cfg):
    return Measured(cfg, cuda=False)


def run(step, cfg, nets, opts, batch, counter):
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16), counter:
        train.train_step(step, batch, nets, opts, cfg)


class NoModules(contextlib.nullcontext):
    """In place of the list of modules that torch's counters keep: its hooks refuse frozen weights,
    networks called twice, and torch.autograd.grad. What is counted does not depend on it."""

    parents, is_bw = frozenset({"Global"}), False

    def register_user_hooks(self, *hooks):
        pass

    clear_user_hooks = register_user_hooks


def flop_counter():
    """torch's, which knows no attention of the CPU's."""
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = NoModules()
    return counter


# --- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("ttur", [1, 10**6], ids=["student's turn", "another turn"])
@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-medium"])
def test_flops_of_the_plan_are_those_of_a_real_train_step(teacher, ttur, kind):
    """Of every kind of turn, by torch's count; exactly, since both count the same formulas. SD 3.5
    has classifier-free guidance."""
    cfg, nets, opts, batch = setup(teacher)
    cfg = replace(cfg, ttur=ttur)
    step, turn = step_of(cfg, batch, nets.student, kind)
    counter = flop_counter()
    run(step, cfg, nets, opts, batch, counter)
    planned = sum(flops(costs_of(replace(cfg, ttur=1)).costs, calls(turn, cfg)).values())
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_mean_over_turns_is_the_table_in_closed_form():
    """Backward simulation draws p (K - 1) / 2 times on average; DMD and ISG ask the teacher on one
    turn in ttur; flows are judged at all anchors but the first."""
    cfg = setup("flux-dev")[0]
    costs, table = costs_of(cfg).costs, replace(cfg, ttur=5, p_backward=0.5)
    assert sum(p for p, _ in turns(table)) == pytest.approx(1)
    mean, cost = mean_flops(costs, table), {name: cost.flops for name, cost in costs.items()}
    forward, learn = cost["student: forward"], cost["student: learn"]
    assert mean["student"] == pytest.approx((0.5 * 1.5 + 0.8 + 0.2) * forward + 0.2 * learn)
    assert mean["teacher"] == pytest.approx(0.4 * cost["teacher: forward"])
    assert mean["fake"] == pytest.approx(0.2 * forward + learn)
    decoded = 0.8 * cost["VAE: decode"] + 0.2 * cost["VAE: decode, learn"]
    assert mean["VAE"] == pytest.approx(0.75 * decoded), "no decode at pure noise"
    by_turn = [mean_flops(costs, table, learn)["VAE"] for learn in (True, False)]
    assert mean["VAE"] == pytest.approx(0.2 * by_turn[0] + 0.8 * by_turn[1])


def test_classifier_free_guidance_doubles_the_teachers_call_and_flux_has_none():
    """FLUX's guided call is one forward pass and an embedder; SD 3.5's is two, exactly."""
    for teacher, times in (("flux-dev", 1), ("sd35-medium", 2)):
        costs = costs_of(setup(teacher)[0]).costs
        ratio = costs["teacher: forward"].flops / costs["student: forward"].flops
        assert ratio == pytest.approx(times, rel=2e-3)


def test_what_is_computed_again_is_the_blocks_forward_pass():
    """So the rest of a learning pass costs what it does without recomputation."""
    cfg = setup("flux-dev")[0]
    again, kept = costs_of(cfg).costs, costs_of(replace(cfg, recompute=False)).costs
    spared = again["student: learn"].flops - again["student: learn"].again
    assert spared == kept["student: learn"].flops and kept["student: learn"].again == 0
    assert 0.9 < again["student: learn"].again / again["student: forward"].flops < 1


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, flags",
    [
        ("flux-dev", {}),
        ("flux-dev", {"recompute": False}),
        ("flux-dev", {"bf16": False}),
        ("sd35-medium", {}),
    ],
)
def test_the_planned_peak_is_that_of_a_real_iteration(teacher, flags):
    """A student's turn with everything on, by torch's memory tracker; within 5 %."""
    cfg, nets, opts, batch = setup(teacher, **flags)
    step, turn = step_of(cfg, batch, nets.student, (True, False))
    run(step, cfg, nets, opts, batch, contextlib.nullcontext())  # makes Adam's state
    tracker = MemTracker()
    tracker._mod_tracker = NoModules()
    parts = [nets.student, nets.fake, nets.teacher, nets.vae, nets.disc]
    given = [batch.images, batch.x0_real, batch.text, *batch.cond.values()]
    given += [] if batch.uncond is None else batch.uncond.values()
    tracker.track_external(*parts, *given, *(o for opt in opts.values() for o in opt.optimizers))
    run(step, cfg, nets, opts, batch, tracker)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    measured = costs_of(cfg)
    stages = measured.moments(turn, gpus=1, cached=True)
    parts = measured.plan(1, cached=True).parts
    assert sum(parts.values()) + max(stages.values()) == pytest.approx(peak, rel=0.05)


def test_sharding_divides_what_is_trained_and_the_teacher_and_nothing_else():
    """Frozen networks that are small are on every GPU; a cache does without the text encoders."""
    measured = costs_of(setup("flux-dev")[0])
    one, four = (measured.plan(gpus).parts for gpus in (1, 4))
    sharded = {name for name in one if one[name] == pytest.approx(4 * four[name], rel=1e-3)}
    assert sharded - {"blocks made whole"} == {
        "student and fake score, fp32",
        "heads of the discriminator, fp32",
        "Adam's two moments, fp32",
        "teacher",
    }
    assert one["blocks made whole"] == 0 < four["blocks made whole"]
    cached = measured.plan(4, cached=True).parts
    assert {name for name in four if four[name] != cached[name]} == {"text encoders"}
    count = sum(p.numel() for p in measured.nets["student"][0].parameters())
    assert one["student and fake score, fp32"] == 8 * count


def test_gradients_are_shared_out_as_they_come():
    """A peak early in the backward pass has few of them, one at its end all."""
    history = [(10, 0), (7, 4), (5, 8)]
    assert [plan.peak(history, gpus) for gpus in (1, 2, 8)] == [13, 10, 10]
    measured = costs_of(setup("flux-dev", bf16=False)[0])
    weights = plan.count_trained(measured.nets["student"])
    turn = Turn(learn=True, judged=True, drawn=0)
    update = [measured.moments(turn, gpus, True)["student's update"] for gpus in (1, 4)]
    assert update[0] - update[1] == pytest.approx(3 / 4 * 4 * weights, rel=1e-3)


def test_norms_are_as_wide_as_cudas_autocast_makes_them_and_only_inside():
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with plan.norms_in_fp32():
            assert torch.nn.functional.layer_norm(x, (8,)).dtype == torch.float32
        assert torch.nn.functional.layer_norm(x, (8,)).dtype == torch.bfloat16


def test_recomputation_is_what_makes_activations_small():
    """As planned, the student keeps its blocks' inputs; all kept is what it keeps without."""
    cfg = setup("flux-dev")[0]
    planned, every = costs_of(cfg).plan(1).activations
    assert costs_of(replace(cfg, recompute=False)).plan(1).activations == (every, every)
    assert planned < every / 5


# --- the command ---------------------------------------------------------------------------------


def test_plan_prints_its_table_and_whether_it_fits(command):
    """Exit code 0 or 1; where it does not fit, what to change and what that brings."""
    flags = ["--teacher", "flux-dev", "--size", *SIZE, "--no-gan", "--plan"]
    code, out, err = command(train, *flags)
    assert (code, err) == (0, "") and "fits" in out and "8 x 80 GB" in out
    cfg = configure("flux-dev", size=SIZE, w_gan=0.0)
    one, many = (costs_of(cfg).plan(gpus).total for gpus in (1, 16))
    between = (plan.RESERVE + (one + many) / 2) / 1e9
    code, out, _ = command(train, *flags, "--gpus", 1, "--gpu-memory", between)
    assert code == 1 and "does not fit" in out
    for change in (" GPUs", "cache", "--size 48 32"):
        assert change in out.split("what to change")[1]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--gpus", 0], "--gpus is 0"),
        (["--gpu-memory", -1], "--gpu-memory is -1.0"),
        (["--size", 40, 48], "40 is no multiple of 16"),
        (["--gpus", "many"], "many"),
    ],
)
def test_plan_refuses_what_cannot_be(command, flags, named):
    refused(command(train, "--teacher", "flux-dev", "--plan", *flags), "train.py: ", named)
