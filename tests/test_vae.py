"""The KL autoencoder against reference numbers: small random weights in official names, made with
an independent implementation; FLUX's and SD 3.5's kind (16 channels) and SDXL's (4, with 1x1
convolutions around the latent)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from config import Refusal
from nets.vae import (
    FLUX2_NAMES,
    VAE,
    VAES,
    Pixels,
    VAEConfig,
    load_vae,
    renamed,
    to_diffusers,
)
from nets.weights import read_metadata

HERE = Path(__file__).parent


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def make(name):
    """A small autoencoder with the reference's weights, scale 1 and shift 0; and the reference."""
    path = HERE / "golden" / f"{name}.safetensors"
    golden, size = load_file(path), json.loads(read_metadata(path)["config"])
    cfg = VAEConfig(
        channels=size["z_channels"],
        scale=1.0,
        quant=size["quant_conv"],
        width=size["ch"],
        multipliers=tuple(size["ch_mult"]),
        blocks=size["num_res_blocks"],
        groups=size["norm_num_groups"],
    )
    net, prefix = VAE(cfg).requires_grad_(False), "weights/" + size["key_prefix"]
    net.load_state_dict(
        {key.removeprefix(prefix): value for key, value in golden.items() if prefix in key}
    )
    return net, golden


@pytest.fixture(scope="module", params=["vae_z16", "vae_z4"])
def vae(request):
    return make(request.param)


def scaled(net, scale, shift):
    """The same weights with another scale and shift of the latent."""
    other = VAE(replace(net.cfg, scale=scale, shift=shift))
    other.load_state_dict(net.state_dict())
    return other.requires_grad_(False)


def test_the_autoencoder_equals_the_reference(vae):
    """A rectangular image and another latent. References agree to 4e-6."""
    net, golden = vae
    mean, logvar = net.moments(golden["inputs/image"])
    close(mean, golden["outputs/mean"])
    close(logvar, golden["outputs/logvar"])
    close(net.encode(golden["inputs/image"]), golden["outputs/mean"])
    close(net.decode(golden["inputs/latent"]), golden["outputs/decoded"])


def test_names_and_shapes_are_those_of_the_official_files():
    """FLUX's by the list of its file; SDXL's and SD 1.5's by their count, four tensors more."""
    official = json.loads((HERE / "manifests" / "ae.json").read_text())
    with torch.device("meta"):
        nets = {name: VAE(cfg) for name, cfg in VAES.items()}
    for name in ("flux", "sd35"):
        shapes = {key: list(tensor.shape) for key, tensor in nets[name].state_dict().items()}
        assert shapes == {key: shape for key, (_, shape) in official.items()}
    for name in ("sdxl", "sd15"):
        added = nets[name].state_dict().keys() - official.keys()
        assert added == {f"{p}quant_conv.{q}" for p in ("", "post_") for q in ("weight", "bias")}
        assert sum(p.numel() for p in nets[name].parameters()) == 83_653_863


def test_latents_have_the_published_scale_and_shift(vae):
    """latent = (mean - shift) scale, and decoding takes both back."""
    net, golden = vae
    published = json.loads((HERE / "golden" / "schedules.json").read_text())["vae"]
    names = {"flux": "FLUX", "sd35": "SD3.5", "sdxl": "SDXL", "sd15": "SD1.5"}
    assert VAES.keys() == names.keys() | {"flux2"}
    for name in names:
        cfg = VAES[name]
        numbers = published[names[name]]
        scale, shift = numbers["scale"], numbers["shift"]
        assert (cfg.scale, cfg.shift, cfg.channels) == (scale, shift, numbers["channels"])
        own = scaled(net, scale, shift)
        close(own.encode(golden["inputs/image"]), (golden["outputs/mean"] - shift) * scale)
        latent = (golden["inputs/latent"] - shift) * scale
        close(own.decode(latent), golden["outputs/decoded"])


def test_a_drawn_latent_is_mean_plus_deviation_times_noise(vae):
    """The scale comes after the draw."""
    net, golden = vae
    mean, logvar = golden["outputs/mean"], golden["outputs/logvar"]
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    got = scaled(net, 0.3611, 0.1159).encode(golden["inputs/image"], eps)
    close(got, (mean + (0.5 * logvar).exp() * eps - 0.1159) * 0.3611)


def test_the_log_variance_is_clamped_to_minus_30_and_20():
    """Weights that ask for +-100: the last convolution's biases of the second half."""
    net, golden = make("vae_z16")
    bias = net.encoder.conv_out.bias
    for asked, kept in [(100.0, 20.0), (-100.0, -30.0)]:
        bias[16:] = asked
        mean, logvar = net.moments(golden["inputs/image"])
        assert (logvar == kept).all()
        close(mean, golden["outputs/mean"])


@pytest.mark.parametrize("height, width", [(16, 16), (16, 48), (40, 24)])
def test_any_size_divisible_by_eight_works(vae, height, width):
    net, _ = vae
    latent = net.encode(torch.zeros(2, 3, height, width))
    assert latent.shape == (2, net.channels, height // net.factor, width // net.factor)
    assert net.decode(latent).shape == (2, 3, height, width)


def test_every_image_is_coded_by_itself(vae):
    net, _ = vae
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 16, 24, generator=draw) * 2 - 1
    latent = net.encode(image)
    for b in range(3):
        close(net.encode(image[b : b + 1]), latent[b : b + 1])
        close(net.decode(latent[b : b + 1]), net.decode(latent)[b : b + 1])


def test_gradients_reach_the_latent(vae):
    """Through frozen weights, as the student's adversarial loss needs: along a direction they equal
    the central difference of a step of 1e-4, in fp64."""
    net, golden = vae
    net, latent = scaled(net, 0.3611, 0.1159).double(), golden["inputs/latent"].double()
    latent.requires_grad_(True)
    way = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0), dtype=latent.dtype)
    net.decode(latent).square().sum().backward()
    with torch.no_grad():
        ahead, back = (net.decode(latent + s * way).square().sum() for s in (1e-4, -1e-4))
    assert (latent.grad * way).sum().item() == pytest.approx((ahead - back).item() / 2e-4, rel=1e-5)


def test_a_recomputed_decoder_has_the_same_image_and_gradient_and_keeps_less(vae):
    """Bit for bit: the same kernels run again on the same numbers. Bytes kept for the backward
    pass, by storage, are less than half."""
    net, golden = vae
    found = []
    for recompute in (True, False):
        net.decoder.recompute = recompute
        z, kept = golden["inputs/latent"].clone().requires_grad_(), {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            image = net.decode(z)
        (gradient,) = torch.autograd.grad(image.square().sum(), z)
        found.append((image, gradient, sum(kept.values())))
    net.decoder.recompute = True
    (image, gradient, less), (same, alike, more) = found
    assert torch.equal(image, same) and torch.equal(gradient, alike)
    assert less < more / 2, f"{less} bytes recomputed, {more} not"


def test_low_precision_weights_keep_the_dtype_of_what_they_are_given(vae):
    """bf16 weights, fp32 in and out; three digits of bf16, some 30 layers: within 3 % of fp32."""
    net, golden = vae
    low = scaled(net, 1.0, 0.0).bfloat16()
    for got, wanted in [
        (low.encode(golden["inputs/image"]), golden["outputs/mean"]),
        (low.decode(golden["inputs/latent"]), golden["outputs/decoded"]),
    ]:
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.03 * wanted.norm()


# --- FLUX.2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    """Sizes, the reference, and files of its weights under the makers' and diffusers' names."""
    path, folder = HERE / "golden" / "vae_flux2.safetensors", tmp_path_factory.mktemp("flux2")
    golden, size = load_file(path), json.loads(read_metadata(path)["config"])
    cfg = VAEConfig(
        channels=size["z_channels"],
        fold=2,
        quant=True,
        width=size["ch"],
        multipliers=tuple(size["ch_mult"]),
        blocks=size["num_res_blocks"],
        groups=size["norm_num_groups"],
    )
    bfl = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    files = {"bfl": bfl, "diffusers": {}}
    for name, theirs in size["diffusers_names"].items():
        matrix = ".attentions." in theirs and bfl[name].ndim == 4
        files["diffusers"][theirs] = bfl[name].flatten(1) if matrix else bfl[name]
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return cfg, golden, folder


NOT_WEIGHTS = ("bn.num_batches_tracked",)


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_flux2s_autoencoder_equals_the_reference_under_either_names(flux2, names):
    """Mean, folding, statistics; the way back. References agree to 7e-6."""
    cfg, golden, folder = flux2
    with torch.device("meta"):
        net = VAE(cfg)
    load_vae(net, folder / f"{names}.safetensors", ignore=NOT_WEIGHTS).requires_grad_(False)
    mean, logvar = net.moments(golden["inputs/image"])
    close(mean, golden["outputs/mean"])
    close(logvar, golden["outputs/logvar"])
    latent, packed = net.encode(golden["inputs/image"]), golden["outputs/packed"]
    close(F.pixel_unshuffle(mean, 2), packed)
    close(latent, golden["outputs/latent"])
    assert latent.shape[1] == net.channels == 16 and net.factor == 16
    close(net.bn.restore(golden["inputs/latent"]), golden["outputs/denormalised"])
    close(F.pixel_shuffle(golden["outputs/denormalised"], 2), golden["outputs/unpacked"])
    close(net.decode(golden["inputs/latent"]), golden["outputs/decoded"])


@pytest.mark.parametrize("manifest, table", [("flux2_ae", FLUX2_NAMES), ("flux2_klein_vae", None)])
def test_flux2s_names_and_shapes_are_those_of_the_official_files(manifest, table):
    """At full size; in diffusers' file the attention's weights are matrices."""
    official = json.loads((HERE / "manifests" / f"{manifest}.json").read_text())
    assert official.pop(*NOT_WEIGHTS)[0] == "I64"
    with torch.device("meta"):
        net = VAE(VAES["flux2"])
    ours = {}
    for name, tensor in net.state_dict().items():
        theirs = to_diffusers(name, 4) if table is None else renamed(name, table)
        ours[theirs] = list(tensor.shape[:2] if ".attentions." in theirs else tensor.shape)
    assert ours == {name: shape for name, (_, shape) in official.items()}
    assert len(ours) == 250 and net.channels == 128 and net.factor == 16


def test_flux1s_autoencoder_is_read_under_diffusers_names_too(tmp_path):
    """As Z-Image's repository has it. Bit for bit."""
    net, _ = make("vae_z16")
    theirs = {to_diffusers(name, 4): tensor for name, tensor in net.state_dict().items()}
    theirs = {k: v.flatten(1) if ".to_" in k and v.ndim == 4 else v for k, v in theirs.items()}
    save_file(theirs, tmp_path / "vae.safetensors")
    with torch.device("meta"):
        other = VAE(net.cfg)
    load_vae(other, tmp_path / "vae.safetensors")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name


def test_another_autoencoder_is_refused_under_either_names(flux2, tmp_path):
    """FLUX.2's where FLUX.1's is wanted: names in one line, and nothing is assigned."""
    cfg, _, folder = flux2
    net = VAE(replace(cfg, fold=1, quant=False))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for names, first in (("bfl", "bn.running_mean"), ("diffusers", "bn.running_mean")):
        with pytest.raises(Refusal, match="holds this network and 6 names more") as error:
            load_vae(net, folder / f"{names}.safetensors", ignore=NOT_WEIGHTS)
        assert first in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_pixels_are_latents_of_factor_one():
    image = torch.rand(2, 3, 4, 6)
    vae = Pixels()
    assert (vae.factor, vae.channels) == (1, 3)
    assert vae.encode(image) is image and vae.decode(image) is image
