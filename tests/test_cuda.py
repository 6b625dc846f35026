"""On a GPU: every network and an iteration of every teacher equal what the CPU computes in fp32.

At a tenth of the width and random weights. Where there is no GPU these tests are skipped; there
tests/test_full_size.py runs every line of the project on a GPU that is not there.
"""

import copy
from dataclasses import replace

import pytest
import torch

import train
from engine import bench
from teachers import FOUND, configure, find, names

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def exact():
    """fp32 is fp32."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.fixture(params=names())
def small(request, monkeypatch):
    """A teacher's benchmark on the CPU, in fp32: networks without text encoders, and a batch."""
    family = find(request.param)
    size = family.preset.size if family.examined else (128, 128)
    if not family.examined:
        sizes = replace(family.sizes, clip_l=None, clip_g=None, t5=None)
        family = family.resized(sizes).scaled(0.1, 4)
        family.text_networks = lambda t5=True: []
        monkeypatch.setitem(FOUND, request.param, family)
    cfg = configure(request.param, size=size, batch=2, bf16=False, ttur=2, recompute=False)
    cfg = replace(cfg, p_backward=0.0, ema=0.0, w_gan=cfg.w_gan or 1.0, w_isg=cfg.w_isg or 1.0)
    return bench.prepare(cfg, CPU)


def moved(x, dtype=None):
    """To the GPU; numbers in `dtype`."""
    if isinstance(x, dict):
        return {name: moved(tensor, dtype) for name, tensor in x.items()}
    return x if x is None else x.to(GPU, dtype if x.is_floating_point() else None)


def apart(a, b) -> float:
    """Of two results, relative."""
    a, b = a.float().cpu(), b.float()
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_networks_on_a_gpu_equal_those_on_the_cpu(small, dtype, most):
    """fp32 to rounding (seen: 5e-6); bf16 to the rounding of its weights (seen: 3.5e-2)."""
    nets, batch, t = small.nets, small.batch, torch.tensor([0.3, 0.759])
    x = batch.x0_real

    def all_of(denoiser, vae, backbone, move):
        image = move(batch.images)
        yield denoiser(move(x), move(t), {k: move(v) for k, v in batch.cond.items()})
        yield vae.decode(move(x))
        yield vae.encode(image)
        yield from backbone.maps((image + 1) / 2)

    with torch.no_grad():
        parts = (nets.student, nets.vae, nets.disc.backbone)
        wanted = list(all_of(*parts, lambda y: y))
        there = [copy.deepcopy(net).to(GPU, dtype) for net in parts]
        for got, want in zip(all_of(*there, moved), wanted, strict=True):
            assert apart(got, want) < most


def test_an_iteration_on_a_gpu_is_that_of_the_cpu(small):
    """Four steps, every loss and norm (seen: 1.5e-5); AdamW and IDA in between."""
    here, there = small, bench.prepare(small.cfg, GPU)
    for name in ("student", "fake", "teacher", "vae", "disc"):
        getattr(there.nets, name).load_state_dict(getattr(here.nets, name).state_dict())
    b = here.batch
    batch = train.Batch(b.ids, *map(moved, (b.images, b.x0_real, b.cond, b.uncond, b.text)))
    for step in range(4):
        one = train.train_step(step, b, here.nets, here.opts, here.cfg)
        two = train.train_step(step, batch, there.nets, there.opts, there.cfg)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
