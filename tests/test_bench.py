"""bench.py at tiny sizes: its FLOPs are the plan's, its two orders do the same work on weights; and
the check of a GPU, here of the CPU beside itself."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from conftest import refused
from small import AROUND, SIZES

import teachers
import train
from engine import bench, build, calls, check, plan, timing
from schedule import Rng
from teachers import FOUND, configure, find

CPU = torch.device("cpu")
ONE = {"backbone": replace(AROUND["backbone"], depth=2, hooks=())}  # one head of the discriminator
REDUCED = {name: replace(sizes, **ONE) for name, sizes in SIZES.items()}
FLUX = REDUCED["flux-dev"]  # a block of each kind
REDUCED["flux-dev"] = replace(FLUX, denoiser=replace(FLUX.denoiser, double=1, single=1))


def tiny(teacher="flux-dev", **flags):
    """Of that teacher; recomputation and bf16 as in its preset."""
    cfg = configure(teacher, batch=2, lr_warmup=0, p_backward=0.0, **flags)
    torch.manual_seed(0)
    return cfg, timing.prepare(cfg, CPU)


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for teacher, sizes in REDUCED.items():
        monkeypatch.setitem(teachers.FOUND, teacher, find(teacher).resized(sizes))


@pytest.fixture(scope="module", autouse=True)
def planned_once():
    """A plan takes seconds at any size, and these tests ask for the same one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "measure", functools.cache(plan.measure))
        yield


def trained(made):
    nets = made.nets
    return [x.detach().clone() for net in (nets.student, nets.fake) for x in net.parameters()]


@pytest.mark.parametrize("teacher", ["flux-dev", "sdxl", "sd15"])
def test_a_turn_that_is_timed_draws_as_its_kind_does_on_average(teacher):
    """In backward simulation, to half a call; a flow's turn from pure noise never draws. sd15 has
    no discriminator here: one kind for all anchors."""
    cfg = configure(teacher)
    with torch.device("meta"):
        schedule = find(teacher).build(cfg.shift).schedule
    taus, every = train.anchors(cfg, schedule), calls.turns(cfg)
    for (learn, judged), (p, step, how) in timing.kinds(cfg).items():
        alike = [(q, t.drawn) for q, t in every if (t.learn, t.judged) == (learn, judged)]
        assert p == pytest.approx(sum(q for q, _ in alike))
        shared = Rng(cfg.seed, step, "input", ()).shared
        i = int(torch.randint(len(taus), (), generator=shared))
        backward = bool(torch.rand((), generator=shared) < cfg.p_backward)
        mean = sum(q * drawn for q, drawn in alike) / p
        assert abs((i if backward else 0) - mean) < 0.5 and (step % how.ttur == 0) == learn


@pytest.mark.parametrize("kind", [(True, True), (False, True), (False, False)])
def test_both_orders_move_student_and_fake_score_alike(kind):
    """The released order is slower, not another method: without bf16, and so with nothing that
    decodes differently, one iteration leaves the same student and fake score, to 1e-6."""
    cfg, made = tiny(bf16=False, size=(48, 32))
    _, step, how = timing.kinds(cfg)[kind]
    other = copy.copy(made)
    other.nets = copy.deepcopy(made.nets)
    timing.run_blocks(other, False)
    other.opts = build.build_learners(other.nets, cfg)
    before = trained(made)
    timing.our_step(step, made, how)
    timing.released_step(step, other, how)
    for ours, theirs in zip(trained(made), trained(other), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    moved = [not torch.equal(x, y) for x, y in zip(before, trained(made), strict=True)]
    assert any(moved[: len(moved) // 2]) == kind[0] and any(moved[len(moved) // 2 :])


def test_fp32_weights_move_at_a_small_learning_rate_and_bf16_ones_do_not():
    """At 1e-6, and under IDA: the reason why trained weights are fp32."""
    _, made = tiny(size=(32, 32))
    moved = timing.precision(made, 1)
    for name in ("Adam moves", "IDA moves"):
        assert moved["fp32"][name] > 0.95 and moved["bf16"][name] < 0.1


@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-medium", "sdxl", "sd15", "digits"])
def test_any_teacher_is_made_narrow_and_shallow(teacher, monkeypatch):
    """Whole heads and groups; depth as asked for; it can be built."""
    monkeypatch.undo()
    for scale, depth in ((0.1, 2), (0.3, 0)):
        monkeypatch.setitem(FOUND, teacher, find(teacher).scaled(scale, depth))
        with torch.device("meta"):
            net = find(teacher).build(1.0)
        blocks = len(net.blocks())
        assert blocks == 2 or depth == 0 or teacher in ("sdxl", "sd15")
        monkeypatch.undo()


def test_bench_prints_its_table_and_writes_json(command, tmp_path):
    """Seconds in both orders, a ratio, seconds by part, peak memory near the planned. FLOPs,
    counted while the calls really run, are the plan's; the model's alone, so what is computed again
    does not count."""
    flags = ["--teacher", "flux-dev", "--size", 32, 32, "--iterations", 1, "--batch", 1]
    code, out, err = command(bench, *flags, "--out", tmp_path / "b.json")
    assert code == 0, err
    for word in ("ratio", "MFU", "peak memory", "IDA moves", "math", "average iteration"):
        assert word in out
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["peak"] == pytest.approx(found["planned"], rel=0.1)
    assert all(row["released"] > 0 < row["ours"] for row in found["orders"].values())
    cfg = configure("flux-dev", size=(32, 32), batch=1, p_backward=0.0, ema=0.0)
    told = plan.measure(replace(cfg, cache="cache"), train.train_step)
    once = {
        which: replace(turn, flops=turn.flops - turn.again) for which, turn in told.turns.items()
    }
    planned = plan.mean_flops(replace(told, turns=once))
    assert set(found["parts"]) == {"student", "fake", "teacher", "discriminator", "VAE"}
    for part, row in found["parts"].items():
        assert row["flops"] == pytest.approx(planned[part], rel=0.01) and row["seconds"] > 0


SIZES = check.Sizes(
    **{"width": 1.0, "blocks": 0, "few": 32, "side": 32, "batches": (1,), "depths": (0,)},
    **{"steps": (1, 2), "iterations": 1},
)


def run_check(parts, out) -> dict:
    assert check.run(parts, out, CPU, SIZES) == 0
    return json.loads(out.read_text())["parts"]


def test_the_check_of_a_gpu_times_iterations_and_images(monkeypatch, capsys, tmp_path):
    """Parts 2 and 4; blocks are compiled by what runs them as they are."""
    monkeypatch.setattr(build, "COMPILER", "eager")
    flux, images = run_check((4, 2), tmp_path / "c.json").values()
    assert flux["compile"]["parts"]["student"]["seconds"] > 0 < flux["compile"]["compiling"]
    assert flux["peak"] == pytest.approx(flux["planned"], rel=0.1)
    assert all(row["released"] > 0 < row["ours"] for row in flux["orders"].values())
    assert sum(flux["attention"].values()) > 10
    assert {steps: s > 0 for steps, s in images["images"]["compiled"].items()} == {
        "1 steps": True,
        "2 steps": True,
    }
    printed = capsys.readouterr().out
    for line in ("compiled blocks", "MFU", "peak memory", "ratio", "an image in 2 steps, eager"):
        assert line in printed


def test_the_check_of_a_gpu_finds_what_is_not_alike(monkeypatch, tmp_path, capsys):
    """Part 1, the CPU beside itself: nothing differs, and a run goes on bit for bit. A network that
    gives one percent more when it is called again is found wrong, and said to be."""
    monkeypatch.setattr(check, "names", lambda: ["sdxl"])
    (found,) = run_check([1], tmp_path / "c.json").values()
    checks = {name: value for name, value in found.items() if name != "seconds"}
    assert len(checks) == 5 and all(value["ok"] for value in checks.values())
    assert checks["iteration"]["difference"] == checks["resume"]["difference"] == 0.0
    cfg, _ = check.reduced("sdxl", SIZES)
    small, factors = timing.prepare(cfg, CPU), iter((1.0, 1.01))
    small.nets.student.register_forward_hook(lambda net, given, out: out * next(factors))
    told = check.networks(small, CPU, torch.float32)
    found["networks, fp32"] = check.judged(told["difference"], check.MOST["fp32"])
    assert not check.sound(found) and "<- wrong" in "".join(check.lines(found))


def test_the_check_of_a_gpu_goes_on_after_a_piece_that_fails(monkeypatch, tmp_path, capsys):
    """For lack of memory, which is no error, or by a bug, which is."""

    def full(found):
        found["depth"], found["flags"] = 12, {}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    pieces = {1: {"full": full}, 2: {"broken": lambda found: found["missing"]}}
    monkeypatch.setattr(check, "pieces", lambda part, *_: pieces[part])
    assert check.run([1], tmp_path / "c.json", CPU) == 0
    assert check.run([1, 2], tmp_path / "c.json", CPU) == 1
    found = json.loads((tmp_path / "c.json").read_text())["parts"]
    assert "Tried to allocate" in found["1: full"]["out of memory"]
    assert "KeyError" in found["2: broken"]["failed"] and "KeyError" in capsys.readouterr().out


def test_what_is_too_large_is_made_smaller(monkeypatch, tmp_path):
    """As a GPU without memory would have it: the next way is taken, and the table says so."""
    tried = []

    def timed(cfg, sizes, device, found):
        tried.append(find("flux-dev").sizes.denoiser.double)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "timed"

    monkeypatch.setattr(check, "timed", timed)
    found, ways = {}, [(depth, {}) for depth in (12, 9, 6)]
    with check.standing_in("flux-dev", find("flux-dev")):
        assert check.largest("flux-dev", ways, 1, check.Sizes(), CPU, found) == "timed"
    assert tried == [4, 3, 2] and found["too large"] == ["12 blocks", "9 blocks"]


def test_there_is_no_check_without_a_gpu(command):
    refused(command(bench, "--gpu-check"), "bench.py: ", "--gpu-check", "no CUDA GPU")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--teacher", "flux"], 'unknown teacher "flux"'),
        (["--width-scale", 0], "--width-scale is 0.0"),
        (["--depth", -1], "--depth is -1"),
        (["--iterations", 0], "--iterations is 0"),
        (["--size", 40, 48], "40 is no multiple of 16"),
        (["--out", "nowhere/b.json"], "no folder nowhere"),
        (["--widths", 1], "--widths"),
        (["--gpu-check", "--parts", 5], "--parts is 5"),
    ],
)
def test_bench_refuses_what_cannot_be(command, flags, named):
    given = ["--teacher", "flux-dev", *flags]
    refused(command(bench, *given), "bench.py: ", named)
