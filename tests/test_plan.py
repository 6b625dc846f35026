"""The plan against what really happens: bytes and FLOPs of train_step on networks of reduced width.

The real step's FLOPs are counted by torch's FlopCounterMode, its bytes by torch's memory tracker.
The GPU that is not there checks it at full width: test_full_size.py.
"""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
from conftest import refused
from small import AROUND, SIZES
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import teachers
import train
from engine import calls, plan
from engine.cards import CARDS
from engine.meter import Meter
from engine.plan import flops_of, mean_flops, measure
from teachers import configure, find

SIZE = (96, 64)  # rectangular
ONE = {"backbone": replace(AROUND["backbone"], depth=2, hooks=())}  # one head of the discriminator
WIDER = {"width": 72, "heads": 4, "axes": (2, 8, 8), "double": 1}
REDUCED = {name: replace(sizes, **ONE) for name, sizes in SIZES.items()}
FLUX = REDUCED["flux-dev"]
REDUCED["flux-dev"] = replace(FLUX, denoiser=replace(FLUX.denoiser, **WIDER))
EVERYTHING = {"size": SIZE, "batch": 2, "lr_warmup": 0, "w_gan": 1.0, "w_isg": 1.0}


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for teacher, sizes in REDUCED.items():
        monkeypatch.setitem(teachers.FOUND, teacher, find(teacher).resized(sizes))


def configured(teacher, **flags):
    return configure(teacher, **(EVERYTHING | {"cache": "cache"} | flags))


@functools.cache
def planned(cfg, gpus=1):
    return measure(cfg, train.train_step, gpus)


def setup(cfg):
    """A real run's networks, random weights, after one iteration that made Adam's state."""
    torch.manual_seed(0)
    made, family = calls.networks(cfg), find(cfg.teacher)
    student, fake, real = made["student"][0], calls.networks(cfg)["student"][0], made["teacher"][0]
    frozen = torch.bfloat16 if cfg.bf16 else torch.float32
    vae, disc = made["VAE"][0].to(frozen), made["disc"][0]
    disc.backbone.to(frozen)
    nets = train.Nets(family, student, fake, real.to(frozen), disc, vae, student)
    opts = train.build_learners(nets, cfg)
    cond, uncond = (calls.conditioning(family, 2, frozen) for _ in range(2))
    batch = train.Batch(
        range(2),
        torch.rand(2, 3, *SIZE) * 2 - 1,
        torch.randn(2, *family.latent_shape(SIZE)),
        cond,
        uncond if family.uses_null else None,
        torch.randn(2, family.embedding_width()),
    )
    return nets, opts, batch


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


@pytest.mark.parametrize(
    "teacher, kinds",
    [
        ("flux-dev", [(True, 0), (True, 2), (False, 1)]),
        ("sd35-medium", [(True, 1)]),
    ],
)
def test_flops_of_the_plan_are_those_of_a_real_train_step(teacher, kinds):
    """By torch's count; SD 3.5 has classifier-free guidance. Two of the eight kinds of turn are run
    by the plan, the others derived."""
    cfg = configured(teacher)
    nets, opts, batch = setup(cfg)
    taus = train.anchors(cfg, nets.student.schedule)
    for learn, drawn in kinds:
        step = plan.find_step(cfg, taus, learn, drawn)
        counter = flop_counter()
        run(step, cfg, nets, opts, batch, counter)
        told = sum(flops_of(planned(cfg), learn, drawn > 0, drawn).values())
        assert told == pytest.approx(counter.get_total_flops(), rel=2e-3), (learn, drawn)


def test_the_mean_over_turns_weighs_each_by_its_probability():
    """A quarter of FLUX's turns is at pure noise, where nothing is decoded; backward simulation
    draws p (K - 1) / 2 times on average; DMD and ISG ask the teacher on one turn in ttur."""
    cfg = configured("flux-dev", ttur=5, p_backward=0.5)
    assert sum(p for p, _ in calls.turns(cfg)) == pytest.approx(1)
    told = planned(cfg)
    mean, learn, other = mean_flops(told), *(told.turns[which] for which in (True, False))
    assert mean["teacher"] == pytest.approx(learn.flops["teacher"] / 5)
    assert mean["VAE"] == pytest.approx(0.75 * (learn.flops["VAE"] + 4 * other.flops["VAE"]) / 5)
    ran = (learn.flops["student"] + 4 * other.flops["student"]) / 5
    assert mean["student"] == pytest.approx(ran + (0.5 * 1.5 - 1) * learn.call)
    for only in (True, False):
        assert mean_flops(told, only)["fake"] == pytest.approx(told.turns[only].flops["fake"])


def test_classifier_free_guidance_doubles_the_teachers_call_and_flux_has_none():
    """FLUX's guided call is one forward pass and an embedder; SD 3.5's is two, exactly."""
    for teacher, times in (("flux-dev", 1), ("sd35-medium", 2)):
        turn = planned(configured(teacher)).turns[True]
        ratio = turn.flops["teacher"] / 2 / turn.call  # DMD, ISG
        assert ratio == pytest.approx(times, rel=2e-3)


def test_what_is_computed_again_is_the_blocks_forward_pass():
    """So the rest of a turn costs what it does without recomputation, and peaks lower."""
    cfg = configured("flux-dev")
    again, kept = planned(cfg), planned(replace(cfg, recompute=False))
    for part in ("student", "fake"):
        one, other = again.turns[True], kept.turns[True]
        assert one.flops[part] - one.again[part] == other.flops[part] and other.again[part] == 0
        assert 0.9 < one.again[part] / one.call < 1
    assert again.total < kept.total


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"recompute": False}], ids=["recomputed", "kept"])
def test_the_planned_peak_is_that_of_a_real_iteration(flags):
    """A student's turn with everything on, by torch's memory tracker; within 3 %. In fp32, where
    the CPU does as a GPU."""
    cfg = configured("flux-dev", bf16=False, **flags)
    nets, opts, batch = setup(cfg)
    taus = train.anchors(cfg, nets.student.schedule)
    step = plan.find_step(cfg, taus, True, 1)
    run(step, cfg, nets, opts, batch, contextlib.nullcontext())  # makes Adam's state
    tracker = MemTracker()
    tracker._mod_tracker = NoModules()
    parts = [nets.student, nets.fake, nets.teacher, nets.vae, nets.disc]
    given = [batch.images, batch.x0_real, batch.text, *batch.cond.values()]
    tracker.track_external(*parts, *given, *(o for opt in opts.values() for o in opt.optimizers))
    run(step, cfg, nets, opts, batch, tracker)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert planned(cfg).turns[True].peak == pytest.approx(peak, rel=0.03)


def test_what_is_always_there_is_counted_to_the_byte():
    cfg = configured("flux-dev", cache="", ema=0.99)
    parts, made = planned(cfg).parts, calls.networks(cfg)
    count = {
        part: sum(p.numel() for net in nets for p in net.parameters())
        for part, nets in made.items()
    }
    assert parts["student"] == parts["fake score"] == parts["average of the student"]
    assert parts["student"] == 4 * count["student"] and parts["teacher"] == 2 * count["teacher"]
    heads = parts["heads of the discriminator"]
    buffers = sum(x.nbytes for net in made["heads"] for x in net.buffers())
    assert heads == 4 * count["heads"] + buffers
    assert parts["text encoders"] >= 2 * (count["text"] + count["reader"])
    silenced = sum(p.numel() for p in made["student"][0].parameters() if not p.requires_grad)
    state = 8 * (2 * (count["student"] - silenced) + count["heads"])
    assert parts["state of the optimizers"] == pytest.approx(state, rel=0.01)
    assert planned(cfg).saved == pytest.approx(12 * count["student"] + heads + state, rel=0.01)


def test_shards_divide_what_is_trained_and_the_teacher_and_nothing_else():
    """Frozen networks that are small are on every GPU; a cache does without the text encoders."""
    cfg = configured("flux-dev", shard="fsdp", cache="", ttur=1, w_isg=0.0)
    one, four = planned(replace(cfg, shard="auto")).parts, planned(cfg, 4).parts
    sharded = {name for name in one if four[name] < one[name] / 3}
    trained = {"student", "fake score", "heads of the discriminator", "state of the optimizers"}
    assert sharded == trained | {"teacher"}
    cached = planned(replace(cfg, shard="auto", cache="cache")).parts
    assert one.keys() - cached.keys() == {"text encoders"}
    told = planned(cfg, 4).turns[True].collectives
    assert told["_allgather_base_"] > told["_reduce_scatter_base_"] > 0


def test_another_optimizer_has_another_state():
    """Whatever it keeps is there: Muon one moment of the matrices of blocks, SGD none."""
    cfg = configured("flux-dev", w_gan=0.0, ttur=1)
    state = {
        name: planned(replace(cfg, optimizer=name)).parts.get("state of the optimizers", 0)
        for name in ("adamw", "muon", "torch.optim.SGD")
    }
    assert 0 == state["torch.optim.SGD"] < state["muon"] < state["adamw"]


def test_a_networks_weights_are_no_memory_and_the_hosts_tensors_are_real():
    meter = Meter()
    with torch.device("meta"):
        net = torch.nn.Linear(2**20, 2**20)
    with meter:
        net = meter.hollow(net)
        out = net(torch.ones(3, 2**20))
        assert out.shape == (3, 2**20) and torch.ones(2).sum().item() == 2
        assert meter.now == 4 * (2**40 + 2**20 + 2 * 3 * 2**20)
        assert meter.flops[""] == 2 * 3 * 2**40 and bool(out.isfinite().all()) and meter.waits == 1


# --- the command ---------------------------------------------------------------------------------


def test_plan_prints_its_table_and_whether_it_fits(command, monkeypatch):
    """Exit code 0 or 1; where it does not fit, what to change and what that brings, if anything."""
    whole = plan.measure

    @functools.cache  # one process shares nothing, however much memory there is
    def measured(cfg, gpus):
        return whole(cfg, train.train_step, gpus)

    monkeypatch.setattr(plan, "measure", lambda cfg, step, gpus, memory: measured(cfg, gpus))
    flags = ("--teacher", "sd15", "--size", 64, 64, "--plan", "--gpus", 1)
    code, out, err = command(train, *flags, "--card", "4090")
    assert (code, err) == (0, "") and "fits" in out and "1 x 24 GB" in out
    for line in ("waits for the GPU", "a checkpoint", "TFLOP", "largest batch", *CARDS):
        assert line in out
    looks = out.split("looks at drift, share of the run")[1].split()
    assert looks[1] == "%" and 0 < float(looks[0]) <= 3
    every = plan.changes
    monkeypatch.setattr(plan, "changes", lambda told: [("no less", {}, 1), *every(told)[-1:]])
    code, out, _ = command(train, *flags, "--gpu-memory", 4.001)
    _, changes = out.split("what to change")
    assert code == 1 and "does not fit" in out and "--size 32 32" in changes
    assert "no less" not in changes


def test_the_plan_says_how_long_the_teachers_images_take():
    """Guided with and without caption where that is two calls, 50 times each; of all GPUs' time."""
    for teacher, calls_each in (("flux-dev", 50), ("sd35-medium", 100)):
        cfg = configured(teacher)
        found = replace(planned(cfg), cfg=replace(cfg, make_reals=80), gpus=4)
        each, hours = plan.reals(found, "h100")
        other = found.turns[False]
        assert each.startswith("making 80 images, TFLOP of each")
        assert float(each.split()[-1]) == pytest.approx(calls_each * other.call / 2e12, rel=1e-3)
        call = CARDS["h100"].seconds(other.call_kernels) * calls_each / 2  # a batch of two
        assert other.call_kernels and "4 x h100" in hours
        assert float(hours.split()[4]) == pytest.approx(80 * call / 4 / 3600, rel=1e-2)


def test_the_plan_says_what_share_of_a_run_the_watch_is():
    """The student's calls, at its own steps, in each look, with one before the first iteration; the
    teacher's once, guided; decoded and seen. Ranks share the prompts: of eight, four draw one."""
    for teacher, times in (("flux-dev", 1), ("sd35-medium", 2)):
        cfg = configured(teacher, steps=1000, watch_every=100)
        alone = replace(planned(configured(teacher)), cfg=cfg)
        students, teachers = plan.watch(alone)
        call, seen = alone.turns[False].call / cfg.batch, alone.look[1] / cfg.batch
        assert students == pytest.approx(11 * 8 * (4 * call + seen))
        assert teachers == pytest.approx(8 * (50 * times * call + seen))
        decoded = alone.turns[False].flops["VAE"] / cfg.batch
        assert seen > decoded, "and the backbone sees it"
        shared = plan.watch(replace(alone, gpus=8))
        assert shared == pytest.approx((students / 4, teachers / 4))
        whole = sum(mean_flops(alone).values()) * 1000
        assert f"{100 * (students + teachers) / whole:.2g} %" in plan.watched(alone)


def test_what_makes_it_smaller_is_what_is_not_so_already():
    cfg = configured("flux-dev", recompute=False)
    found = {name for name, *_ in plan.changes(planned(cfg))}
    assert found == {"2 GPUs", "4 GPUs", "--recompute", "--disc-channels 256", "--batch 1"} | {
        "--size 48 32"
    }


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_traffic():
    card = CARDS["h100"]
    assert card.seconds({(989 * 10**12, 1, True): 2}) == pytest.approx(2)
    assert card.seconds({(1, 3350 * 10**9, True): 1}) == pytest.approx(1)
    assert card.seconds({(67 * 10**12, 1, False): 1}) == pytest.approx(1)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--gpus", 0], "--gpus is 0"),
        (["--gpu-memory", -1], "--gpu-memory is -1.0"),
        (["--size", 40, 48], "40 is no multiple of 16"),
        (["--gpus", "many"], "many"),
        (["--card", "h10"], "did you mean h100?"),
    ],
)
def test_plan_refuses_what_cannot_be(command, flags, named):
    refused(command(train, "--teacher", "flux-dev", "--plan", *flags), "train.py: ", named)
