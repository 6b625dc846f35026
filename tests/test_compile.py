"""Compiled blocks compute what they did, and are compiled once; weights may lie channels last.

Compiled here by what hands a graph back as it is, or with its gradient ("aot_eager"): which calls
get which graph is decided before a compiler is asked.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL, make_official
from torch._dynamo.utils import counters

import sample
import teachers
from config import Refusal
from engine import build, check, progress, timing
from teachers import configure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(build, "COMPILER", "aot_eager")
    for teacher, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, teacher, family)


def turns(bench: timing.Bench) -> list[dict[str, float]]:
    first, *_, last = check.turns_of(bench.cfg)
    return [check.turn(bench, *kind) for kind in (first, last)]


def tiny(teacher: str, **flags) -> timing.Bench:
    flags = {"size": (32, 32), "batch": 1, "p_backward": 0.0, "bf16": False} | flags
    return timing.prepare(configure(teacher, w_gan=1.0, w_isg=1.0, **flags), CPU)


@pytest.mark.parametrize("teacher, compiler", [("flux-dev", "aot_eager"), ("sdxl", "eager")])
def test_compiled_blocks_compute_what_they_did_and_are_compiled_once(
    teacher, compiler, monkeypatch
):
    """Losses and gradients of a student's turn and another to 1e-4, with recomputation, with an
    input's guidance and with twice the batch. After one of each nothing is compiled any more; all
    of a block is one graph; blocks alike share theirs."""
    monkeypatch.setattr(build, "COMPILER", compiler)
    plain, compiled = tiny(teacher), tiny(teacher, compile=True)
    assert compiled.cfg.recompute
    for one, two in zip(turns(plain), turns(compiled), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    blocks = [unit for block in compiled.nets.student.blocks() for unit in build.in_a_row(block)]
    assert 0 < graphs <= 4 * len(blocks)
    turns(compiled)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_a_copy_runs_its_own_blocks_and_what_was_said_last_counts():
    """Neither the first network's nor those of before: no weight but the copy's matters."""
    bench = tiny("flux-dev", compile=True)
    fake, batch = bench.nets.fake, bench.batch
    t = torch.tensor([0.5])
    with torch.no_grad():
        for p in bench.nets.student.parameters():
            p.zero_()
        made = fake(batch.x0_real, t, batch.cond)
        build.run_blocks(fake, compiled=False, recompute=False)
        assert not any("forward" in vars(block) for block in fake.blocks())
        torch.testing.assert_close(fake(batch.x0_real, t, batch.cond), made)
    assert made.abs().max() > 0


def test_channels_last_changes_where_numbers_lie_and_no_number():
    """Convolutions of student and autoencoder, and Adam's state of them; a checkpoint restores a
    run bit for bit. The heads of so small a network divide by deviations near zero."""
    plain, last = tiny("sdxl"), tiny("sdxl", channels_last=True)
    for one, two in zip(turns(plain), turns(last), strict=True):
        assert two.pop("norm_disc") == pytest.approx(one.pop("norm_disc"), rel=2e-3)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    for net in (last.nets.student, last.nets.vae):
        kernels = [p for p in net.parameters() if p.ndim == 4 and p.shape[2] > 1 < p.shape[1]]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    (adam,) = last.opts["student"].optimizers
    assert all(adam.state[p]["exp_avg"].stride() == p.stride() for p in adam.state)
    assert check.resume(last.cfg, CPU) == 0.0


def test_without_a_compiler_one_line_says_so(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(build, "COMPILER", broken)
    with pytest.raises(Refusal, match="--compile: torch.compile fails here .*broken"):
        build.check_compiler(CPU)


def test_the_header_says_what_numbers_are_rounded_to(monkeypatch):
    """And advises on memory where it is a GPU's and nothing was said."""
    cfg, gpu = configure("flux-dev", compile=True), torch.device("cuda")
    assert progress.numbers(cfg, CPU) == "bf16 with compiled blocks"
    words = progress.numbers(configure("flux-dev"), gpu)
    assert words == "bf16 with TF32 convolutions of the heads"
    assert "TF32" not in progress.numbers(configure("flux-dev", tf32=False), gpu)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert "expandable_segments:True" in progress.allocator(gpu) and not progress.allocator(CPU)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert progress.allocator(gpu) == ""


def test_sample_draws_the_same_with_compiled_blocks(command, tmp_path):
    """Pixels within one level of 255 of those drawn without."""
    make_official("flux-dev", tmp_path / "files")
    flags = ["--teacher", "flux-dev", "--weights", tmp_path / "files", "--prompt", "a red three"]
    flags += ["--size", 32, 48, "--steps", 2, "--dtype", "fp32"]
    pictures = []
    for name, more in (("a", []), ("b", ["--compile", "--channels-last"])):
        path = tmp_path / f"{name}.png"
        code, _, err = command(sample, *flags, *more, "--out", path)
        assert code == 0, err
        pictures.append(torch.tensor(np.array(Image.open(path)), dtype=torch.int))
    assert counters["stats"]["unique_graphs"] > 0
    assert (pictures[0] - pictures[1]).abs().max() <= 1
