"""bench.py at tiny sizes: its FLOPs are the plan's, its two orders do the same work on weights."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import refused
from small import SMALL

import teachers
from engine import bench, plan
from teachers import FOUND, configure, find

CPU = torch.device("cpu")


def tiny(teacher="flux-dev", **flags):
    """Of that teacher; recomputation and bf16 as in its preset."""
    cfg = configure(teacher, size=(48, 32), batch=2, lr_warmup=0, p_backward=0.0, **flags)
    torch.manual_seed(0)
    return cfg, bench.prepare(cfg, CPU)


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for teacher, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, teacher, family)


def test_flops_by_part_are_the_plans():
    """Counted while the calls really run, against the plan's; the model's alone, so what is
    computed again does not count."""
    cfg, made = tiny()
    parts, costs = bench.by_part(made, 1), plan.Measured(cfg, cuda=False).costs
    work = {name: replace(cost, flops=cost.flops - cost.again) for name, cost in costs.items()}
    planned = plan.mean_flops(work, cfg)
    for part, row in parts.items():
        assert row["flops"] == pytest.approx(planned[part], rel=0.01) and row["seconds"] > 0


def trained(made):
    nets = made.nets
    return [x.detach().clone() for net in (nets.student, nets.fake) for x in net.parameters()]


@pytest.mark.parametrize("kind", [(True, True), (False, True), (False, False)])
def test_both_orders_move_student_and_fake_score_alike(kind):
    """The released order is slower, not another method: without bf16, and so with nothing that
    decodes differently, one iteration leaves the same student and fake score, to 1e-6."""
    cfg, made = tiny(bf16=False)
    _, step, how = bench.kinds(cfg)[kind]
    other = copy.copy(made)
    other.nets = copy.deepcopy(made.nets)
    plan.ranks.recompute(other.nets.fake)
    other.opts = bench.train.build_learners(other.nets, cfg)
    before = trained(made)
    bench.our_step(step, made, how)
    bench.released_step(step, other, how)
    for ours, theirs in zip(trained(made), trained(other), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    moved = [not torch.equal(x, y) for x, y in zip(before, trained(made), strict=True)]
    assert any(moved[: len(moved) // 2]) == kind[0] and any(moved[len(moved) // 2 :])


def test_fp32_weights_move_at_a_small_learning_rate_and_bf16_ones_do_not():
    """At 1e-6, and under IDA: the reason why trained weights are fp32."""
    _, made = tiny()
    moved = bench.precision(made, 1)
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
    """Seconds in both orders, a ratio, seconds and FLOPs by part, peak memory near the planned."""
    flags = ["--teacher", "flux-dev", "--size", 48, 32, "--iterations", 1]
    code, out, err = command(bench, *flags, "--out", tmp_path / "b.json")
    assert code == 0, err
    for word in ("ratio", "MFU", "peak memory", "IDA moves", "math", "average iteration"):
        assert word in out
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["peak"] == pytest.approx(found["planned"], rel=0.1)
    assert set(found["parts"]) == {"student", "fake", "teacher", "discriminator", "VAE"}
    assert all(row["released"] > 0 < row["ours"] for row in found["orders"].values())


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
    ],
)
def test_bench_refuses_what_cannot_be(command, flags, named):
    given = ["--teacher", "flux-dev", *flags]
    refused(command(bench, *given), "bench.py: ", named)
