"""A frozen base in 8 bits, and decoding in tiles: what they cost in numbers."""

import re

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from small import SMALL, make_official
from torch import nn

import teachers
import train
from adapter import layers
from engine.calls import conditioning
from engine.plan import eight_bits
from engine.views import load_base, off_by
from nets.quantised import KINDS, Quantised, quantised
from nets.tiles import Tiled, spans
from nets.vae import VAE
from teachers import configure, find

# --- 8 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, error", [("int8", 0.009), ("fp8", 0.03)])
def test_eight_bits_keep_a_matrix_to_a_percent_or_three(kind, error):
    """Of the norm, on Gaussian rows of very different sizes; zeros stay zeros."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * torch.logspace(-6, 6, 64)[:, None]
    weight[7] = 0
    bits, scale = quantised(weight, KINDS[kind])
    assert bits.dtype == KINDS[kind] and scale.shape == (64, 1) and not bits[7].float().any()
    off = (bits.float() * scale - weight).norm(dim=1) / weight.norm(dim=1).clamp_min(1e-30)
    assert 0.3 * error < off.mean() < error and off.max() < 1.5 * error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_what_its_dequantised_weight_would(kind, dtype):
    """And its input's gradient; the weight wants none."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 40).to(dtype)
    layer = Quantised(plain, KINDS[kind])
    bits, scale = quantised(plain.weight.detach(), KINDS[kind])
    layer.weight, layer.scale = nn.Parameter(bits, requires_grad=False), scale
    plain.weight = nn.Parameter((bits.float() * scale).to(dtype))
    grads = []
    for net in (layer, plain):
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = net(x.requires_grad_())
        assert y.dtype == dtype
        y.square().sum().backward()
        grads.append((y, x.grad))
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, **near)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """official(teacher): a folder of its files at reduced width."""
    for name, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, name, family)

    def get(teacher):
        make_official(teacher, tmp_path / teacher)
        return tmp_path / teacher

    return get


def base_of(teacher, folder, kind, dtype=torch.bfloat16):
    family = find(teacher)
    cfg = configure(teacher, adapter=2, base_dtype=kind)
    path = family.locate(str(folder), text=False)["denoiser"]
    return load_base(cfg, family, path, dtype, torch.device("cpu"))


@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-medium", "sdxl"])
def test_a_bases_velocity_is_off_by_a_percent_or_three(official, teacher):
    """int8 several times less than fp8. In fp32 elsewhere, so that nothing else rounds."""
    family, folder = find(teacher), official(teacher)
    torch.manual_seed(0)
    x_t, t = torch.randn(2, *family.latent_shape((64, 64))), torch.tensor([0.3, 0.8])
    cond = conditioning(family, 2, torch.float32)
    made = {}
    for kind in ("bf16", "int8", "fp8"):
        net = base_of(teacher, folder, kind, torch.float32)
        held = {type(m) for m in layers(net).values() if isinstance(m, nn.Linear)}
        assert held == ({nn.Linear} if kind == "bf16" else {Quantised})
        made[kind] = net(x_t, t, cond)
    off = {k: ((made[k] - made["bf16"]).norm() / made["bf16"].norm()).item() for k in KINDS}
    net = base_of(teacher, folder, "bf16", torch.float32)
    assert {k: off_by(k, net, x_t, t, cond) for k in KINDS} == pytest.approx(off, rel=1e-3)
    assert 0 < 2 * off["int8"] < off["fp8"] < 0.1, off


def test_the_plan_says_what_eight_bits_change():
    """The digits' own size, others' a tenth of the width: transformer and U-Net."""
    for teacher in ("digits", "flux-dev", "sd15"):
        flags = {"adapter": 4} | ({} if teacher == "digits" else {"size": (64, 64)})
        said = {k: eight_bits(configure(teacher, **flags, base_dtype=k)) for k in KINDS}
        off = {k: float(re.search(r"([\d.]+) %", line)[1]) for k, line in said.items()}
        assert 0.1 < 2 * off["int8"] < off["fp8"] < 30, said


def in_eight_bits(path, prefix, scaled):
    """As ComfyUI's files: names equal, matrices of the blocks in fp8, with a scale or without."""
    tensors = load_file(path)
    for name, x in list(tensors.items()):
        if name.startswith(prefix) and name.endswith(".weight") and x.ndim == 2 and "block" in name:
            scale = torch.tensor(0.01 if scaled else 1.0)
            tensors[name] = (x.float() / scale).to(torch.float8_e4m3fn)
            if scaled:
                tensors[name.removesuffix("weight") + "scale_weight"] = scale
    tensors |= {f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-medium"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_file_in_fp8_is_a_base_as_it_is(command, official, tmp_path, teacher, scaled):
    """Its bytes are kept, bit for bit; a file that --export full makes of it has 16 bits again."""
    folder, family = official(teacher), find(teacher)
    (path,), prefix = family.locate(str(folder))["denoiser"], family.prefix()
    stored = in_eight_bits(path, prefix, scaled)
    net = base_of(teacher, folder, "fp8")
    for name, layer in layers(net).items():
        bits = stored[f"{prefix}{name}.weight"]
        assert torch.equal(layer.weight.view(torch.uint8), bits.view(torch.uint8)), name
        assert torch.equal(layer.scale, torch.full((len(bits), 1), 0.01 if scaled else 1.0))
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    flags = ["--teacher", teacher, "--weights", folder, "--data", tmp_path / "prompts.txt"]
    flags += ["--no-gan", "--size", 32, 48, "--steps", 1, "--workers", 0, "--exam-every", 0]
    flags += ["--adapter-init", "random", "--adapter", 2, "--out", tmp_path / "run"]
    if scaled and teacher == "flux-dev":
        assert command(train, *flags, "--base-dtype", "fp8", "--export", "full")[0] == 0
        full = load_file(tmp_path / "run" / "full.safetensors")
        left = (".scale_weight", "scaled_fp8")
        assert full.keys() == {name for name in stored if not name.endswith(left)}
        assert {x.dtype for x in full.values()} == {torch.bfloat16}


def test_what_is_trained_whole_has_no_base(command, tmp_path):
    refused(command(train, "--base-dtype", "int8", "--out", tmp_path), "--base-dtype int8")


# --- tiles ---------------------------------------------------------------------------------------


class Local(nn.Module):
    """Decodes by what is near: a convolution, then each latent as 2 x 2 pixels."""

    factor, channels = 2, 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 12, 3, padding=1)

    def decode(self, latent):
        return nn.functional.pixel_shuffle(self.conv(latent).tanh(), 2)


def both_ways(vae, tile, size):
    """Image and latent's gradient, whole and in tiles."""
    found = []
    for decode in (vae.decode, Tiled(vae, tile).decode):
        draw = torch.Generator().manual_seed(1)
        latent = torch.randn(1, vae.channels, *size, generator=draw).requires_grad_()
        image = decode(latent)
        weight = torch.randn(image.shape, generator=draw)
        (weight * image).sum().backward()
        found.append((image.detach(), latent.grad))
    return found


def test_tiles_cover_a_side_and_overlap():
    for length in (5, 16, 17, 40, 128):
        starts = spans(length, 16)
        assert starts[0] == 0 and starts[-1] == max(0, length - 16)
        assert all(b - a <= 12 for a, b in zip(starts, starts[1:], strict=False))


def test_tiles_of_a_local_decoder_are_the_whole_away_from_seams():
    """Pixels and gradients, to rounding, where no tile's border is near; near one, blended."""
    (image, grad), (tiled, grad_tiled) = both_ways(Local(), 32, (16, 40))  # three tiles of 16
    inner = torch.ones(40, dtype=torch.bool)
    for edge in (12, 16, 24, 28):
        inner[edge - 2 : edge + 2] = False
    pixels = inner.repeat_interleave(2)
    torch.testing.assert_close(tiled[..., pixels], image[..., pixels], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad_tiled[..., inner], grad[..., inner], atol=1e-6, rtol=1e-5)
    assert 0 < (tiled - image).abs().max() < 0.5


def test_an_autoencoders_tiles_are_near_the_whole():
    """With group norms and attention of each tile alone: gradients point the same way."""
    torch.manual_seed(0)
    vae = VAE(SMALL["flux-dev"].sizes.vae).requires_grad_(False)
    (image, grad), (tiled, grad_tiled) = both_ways(vae, 128, (16, 24))
    assert torch.equal(*(x[0] for x in both_ways(vae, 256, (16, 24)))), "one tile is the whole"
    assert nn.functional.cosine_similarity(grad.flatten(), grad_tiled.flatten(), dim=0) > 0.9
    assert (tiled - image).norm() < 0.3 * image.norm()
