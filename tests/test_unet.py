"""The UNets of SDXL and SD 1.5 against reference numbers: small random weights in official names,
made with independent implementations, with the sizes in the file's metadata."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import OFFICIAL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nets.clip import CLIP, CLIP_G, CLIP_L, load_open_clip, to_open_clip
from nets.layers import attention, time_embedding
from nets.unet import UNETS, Transformer, TransformerBlock, UNet, UNetConfig
from nets.vae import VAE, VAES
from nets.weights import load_weights, merge_weights, read_metadata, save_weights
from schedule import DDPM
from teachers import find

HERE = Path(__file__).parent
PREFIX = "model.diffusion_model."
FILES = {"sdxl": "sd_xl_base_1.0", "sd15": "v1-5-pruned-emaonly"}
TINY = {  # every kind of part, once
    "sdxl": replace(
        UNETS["sdxl"],
        multipliers=(1, 2),
        depths=(0, 1),
        middle=1,
        context_width=5,
        pooled_width=7,
        head=3,
        width=6,
        blocks=1,
        groups=3,
    ),
    "sd15": replace(
        UNETS["sd15"],
        multipliers=(1, 2),
        depths=(1, 0),
        middle=1,
        context_width=5,
        heads=2,
        width=6,
        blocks=1,
        groups=3,
    ),
}


def read_golden(name: str):
    """The network, its inputs and every tensor of a reference file."""
    path = HERE / "golden" / f"unet_{name}.safetensors"
    golden, sizes = load_file(path), json.loads(read_metadata(path)["config"])
    multipliers, depths = sizes["channel_mult"], sizes["transformer_depth"]
    attended = [2**level in sizes["attention_resolutions"] for level in range(len(multipliers))]
    cfg = UNetConfig(
        multipliers=tuple(multipliers),
        depths=tuple(d if has else 0 for d, has in zip(depths, attended, strict=True)),
        middle=depths[-1],
        context_width=sizes["context_dim"],
        pooled_width=sizes["adm_in_channels"] or 0,
        heads=sizes["num_heads"] or 0,
        head=sizes["num_head_channels"] or 0,
        linear=sizes["use_linear_in_transformer"],
        channels=sizes["in_channels"],
        width=sizes["model_channels"],
        blocks=sizes["num_res_blocks"],
        groups=sizes["norm_num_groups"],
    )
    net, start = UNet(cfg, DDPM()), "weights/" + PREFIX
    weights = {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    cond = {"context": golden["inputs/context"]}
    if cfg.pooled_width:
        cond["pooled"] = golden["outputs/adm_vector"]
    return net, (golden["inputs/latent"], golden["inputs/timesteps"] / 1000, cond), golden


@pytest.fixture(params=["sdxl", "sd15"])
def name(request):
    return request.param


@pytest.fixture
def reference(name):
    return read_golden(name)


def tiny(name: str, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(TINY[name], DDPM())


def inputs(net: UNet, batch: int = 2, height: int = 4, width: int = 6, seed: int = 1):
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    cond = {"context": normal(batch, 3, net.cfg.context_width)}
    if net.cfg.pooled_width:
        cond["pooled"] = normal(batch, net.cfg.pooled_width)
    return normal(batch, 4, height, width), torch.tensor([0.999, 0.249])[:batch], cond


# --- the reference -------------------------------------------------------------------------------


def test_the_unet_equals_the_reference_stage_by_stage(reference):
    """A rectangular latent, two times. References agree to 3e-6."""
    net, given, golden = reference
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)
    seen = {}
    for name, stage in net.named_modules():
        if stage in net.blocks():
            stage.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    close(net(*given), golden["outputs/eps"])
    stages = [
        key.removeprefix("outputs/") for key in golden if "_block" in key and "outputs" in key
    ]
    assert len(stages) >= 3
    for name in stages:
        close(seen[name], golden[f"outputs/{name}"])
    _, t, cond = given
    close(net.time_embed(time_embedding(1000 * t, net.cfg.width)), golden["outputs/time_embed"])


def test_times_are_whole_entries_of_the_table(reference):
    """In between the schedule takes the nearest entry, and the network is told the same one."""
    net, (x_t, t, cond), _ = reference
    entry, near = torch.tensor([0.749, 0.999]), torch.tensor([0.7493, 1.0])
    assert torch.equal(net(x_t, near, cond), net(x_t, entry, cond))
    assert torch.equal(net.schedule.alpha(near), net.schedule.alpha(entry))
    assert not torch.allclose(net(x_t, entry - 0.001, cond), net(x_t, entry, cond))


# --- the official files --------------------------------------------------------------------------


def official(name: str) -> dict:
    return json.loads((HERE / "manifests" / f"{FILES[name]}.json").read_text())


def build(name: str, unet: UNetConfig, vae, clip_l, clip_g) -> dict:
    """The networks of a file, by part."""
    nets = {"denoiser": UNet(unet, DDPM()), "vae": VAE(vae), "clip_l": CLIP(clip_l)}
    return nets | {"clip_g": CLIP(clip_g)} if name == "sdxl" else nets


def file_tensors(name: str, nets: dict) -> dict[str, torch.Tensor]:
    """The networks' tensors under the names of the one file that holds them all."""
    tensors = {}
    for part, net in nets.items():
        state = net.state_dict()
        if part == "clip_g":
            state = to_open_clip(state, net.cfg.depth)
        prefix = OFFICIAL[name][part].prefix
        tensors |= {prefix + key: tensor for key, tensor in state.items()}
    return tensors


@pytest.mark.parametrize(
    "name, count, size", [("sdxl", 2515, 2567463684), ("sd15", 1145, 859520964)]
)
def test_names_and_shapes_are_those_of_the_official_file(name, count, size):
    """All networks at full size on the meta device, and what is known to be no weight: nothing is
    missing, nothing left over."""
    wanted = {key: shape for key, (_, shape) in official(name).items()}
    assert len(wanted) == count
    with torch.device("meta"):
        nets = build(name, UNETS[name], VAES[name], CLIP_L, CLIP_G)
    ours = {key: list(tensor.shape) for key, tensor in file_tensors(name, nets).items()}
    for key in find(name).not_weights:
        assert key not in ours
        ours[key] = wanted[key]
    assert ours == wanted
    assert sum(p.numel() for p in nets["denoiser"].parameters()) == size


@pytest.fixture
def whole_file(name, tmp_path):
    """Every tensor of the official file, at a small width, in the dtypes it has there."""
    torch.manual_seed(0)
    unet = replace(UNETS[name], context_width=2, width=4, groups=2)
    unet = replace(unet, pooled_width=3, head=2) if name == "sdxl" else replace(unet, heads=2)
    vae = replace(VAES[name], width=2, groups=2)
    clip_l, clip_g = (
        replace(c, width=4, heads=2, hidden=4, vocabulary=9) for c in (CLIP_L, CLIP_G)
    )
    nets = build(name, unet, vae, clip_l, clip_g)
    forms = official(name)
    tensors = file_tensors(name, nets) | {key: torch.zeros(3) for key in find(name).not_weights}
    path = tmp_path / "whole.safetensors"
    kinds = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}
    stored = {key: tensor.to(kinds[forms[key][0]]) for key, tensor in tensors.items()}
    assert stored.keys() == forms.keys()
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, path)
    return path, nets


def test_every_part_of_a_single_file_loads_back_bit_for_bit(name, whole_file):
    """By prefix, without what is no weight; in the file's own dtype nothing is rounded."""
    path, nets = whole_file
    dtype = torch.float16 if name == "sdxl" else torch.float32
    for part, net in nets.items():
        with torch.device("meta"):
            again = UNet(net.cfg, DDPM()) if part == "denoiser" else type(net)(net.cfg)
        load = load_open_clip if part == "clip_g" else load_weights
        load(again, path, dtype, prefix=OFFICIAL[name][part].prefix, ignore=find(name).not_weights)
        for (key, tensor), loaded in zip(
            net.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(tensor.to(dtype), loaded), f"{part}: {key}"


def header(path: Path, prefix: str = "") -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of every tensor under a prefix, in the order of their bytes."""
    with safe_open(path, framework="pt") as file:
        slices = [
            (key, file.get_slice(key)) for key in file.offset_keys() if key.startswith(prefix)
        ]
        return [(key, part.get_dtype(), part.get_shape()) for key, part in slices]


def test_an_exported_unet_has_the_official_names_and_order(name, whole_file, tmp_path):
    """Alone under its prefix, or in a copy of the whole file, whose header stays the same."""
    path, nets = whole_file
    student = copy.deepcopy(nets["denoiser"])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    alone, full = tmp_path / "alone.safetensors", tmp_path / "full.safetensors"
    save_weights(student, alone, torch.float16, {"teacher": name}, prefix=PREFIX)
    assert [key for key, *_ in header(alone)] == [k for k in official(name) if k.startswith(PREFIX)]
    merge_weights(student.state_dict().items(), full, [path], {"teacher": name}, PREFIX)
    assert header(full) == header(path) and read_metadata(full) == {"teacher": name}
    before, after = load_file(path), load_file(full)
    for key, tensor in student.state_dict().items():
        assert torch.equal(after.pop(PREFIX + key), tensor.to(before.pop(PREFIX + key).dtype)), key
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_student_of_another_size_is_not_merged(name, whole_file, tmp_path):
    path, nets = whole_file
    other = UNet(replace(nets["denoiser"].cfg, channels=3), DDPM())
    with pytest.raises(ValueError, match="input_blocks.0.0.weight has shape"):
        merge_weights(other.state_dict().items(), tmp_path / "full.safetensors", [path], {}, PREFIX)
    with pytest.raises(ValueError, match="names missing"):
        merge_weights(
            nets["vae"].state_dict().items(), tmp_path / "full.safetensors", [path], {}, PREFIX
        )
    assert not (tmp_path / "full.safetensors").exists()


# --- numbers, gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("weights, most", [("tiny", 2e-2), ("reference", 4e-2)])
def test_bf16_is_within_percents_of_fp32(name, weights, most):
    """Of the same, rounded weights, over both samples, .9 %. The reference's weights are large, its
    heads three channels wide, and it is deeper: 1.6 % and 2.9 %."""
    net = tiny(name) if weights == "tiny" else read_golden(name)[0]
    given = inputs(net) if weights == "tiny" else read_golden(name)[1]
    low = net.bfloat16()
    exact = copy.deepcopy(low).float()
    with torch.no_grad():
        got, wanted = low(*given), exact(*given)
    assert got.dtype == torch.float32, "the prediction has the dtype of x_t"
    error = (got - wanted).norm() / wanted.norm()
    assert error < most, f"relative error {error:.4f}"


def test_autocast_computes_in_bf16_with_fp32_weights(name):
    """As a trained network does on one device: the same tolerance, and gradients in fp32."""
    net = tiny(name)
    given = inputs(net)
    wanted = net(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*given)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 2e-2 * wanted.norm()
    got.square().sum().backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_time_stays_in_fp32(name):
    """1000 t needs more than bf16's eight bits: .759 would be embedded as 756."""
    net = tiny(name).bfloat16()
    x_t, t, cond = inputs(net)
    with pytest.raises(AssertionError, match="time must come in fp32"):
        net(x_t, t.bfloat16(), cond)


def test_every_weight_gets_a_gradient(reference):
    net, given, _ = reference
    net(*given).square().sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert not still, f"no gradient: {sorted(still)}"


def test_the_gradient_is_the_derivative(name):
    """By finite differences in fp64; time's embedding is an fp32 constant and does not limit it."""
    net = tiny(name).double()
    x_t, t, cond = inputs(net)
    x_t, cond = x_t.double().requires_grad_(), {k: v.double() for k, v in cond.items()}
    context = cond["context"].requires_grad_()
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda x, c: net(x, t, cond | {"context": c}), (x_t, context))


def test_recomputing_each_block_changes_no_gradient(name):
    """Applied from outside, block by block; the same operations in the same order, so bit for
    bit."""
    plain = tiny(name)
    again, given = copy.deepcopy(plain), inputs(plain)
    for block in again.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for net in (plain, again):
        net(*given).square().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key


def test_blocks_hold_all_but_the_ends(name):
    """What is outside them stays whole where blocks are sharded: it must be little."""
    with torch.device("meta"):
        net = UNet(UNETS[name], DDPM())
    inside = {id(p) for block in net.blocks() for p in block.parameters()}
    outside = {key.split(".")[0] for key, p in net.named_parameters() if id(p) not in inside}
    assert outside == {"time_embed", "out"} | ({"label_emb"} if name == "sdxl" else set())


def test_a_compiled_network_is_one_graph_and_equal():
    """In eager's own kernels, so bit for bit. Blocks of SDXL's: test_compile.py."""
    net = tiny("sd15")
    given = inputs(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), net(*given), atol=0, rtol=0)


def test_attention_takes_a_fused_kernel(name):
    """No mask, contiguous, so flash attention accepts what the blocks make; and it is the same."""
    net = tiny(name)
    given = inputs(net)
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        wanted, plain = net(*given), attention(q, k, k)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(attention(q, k, k), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(*given), wanted, atol=1e-5, rtol=1e-5)


def test_projections_are_the_same_map_linear_or_convolution():
    torch.manual_seed(0)
    linear = Transformer(6, 5, heads=2, depth=1, linear=True, groups=3)
    conv = Transformer(6, 5, heads=2, depth=1, linear=False, groups=3)
    state = {k: v.reshape(conv.state_dict()[k].shape) for k, v in linear.state_dict().items()}
    conv.load_state_dict(state)
    x, context = torch.randn(2, 6, 3, 4), torch.randn(2, 7, 5)
    assert torch.equal(linear(x, context), conv(x, context))
    tokens = x.flatten(2).transpose(1, 2)
    by_conv = conv.proj_in(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv.project(tokens, conv.proj_in), by_conv)


# --- batches, sizes ------------------------------------------------------------------------------


def test_each_sample_has_its_own_time_and_text(reference):
    """A batch of two equals two batches of one."""
    net, (x_t, t, cond), _ = reference
    both = net(x_t, t, cond)
    for b in range(2):
        alone = net(x_t[b : b + 1], t[b : b + 1], {k: v[b : b + 1] for k, v in cond.items()})
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("height, width, batch", [(2, 2, 1), (2, 8, 2), (6, 4, 2)])
def test_any_size_that_halving_divides(name, height, width, batch):
    net = tiny(name)
    given = inputs(net, batch, height, width)
    assert net(*given).shape == given[0].shape


def test_the_divisor_is_that_of_the_levels():
    with torch.device("meta"):
        divisors = {name: UNet(cfg, DDPM()).divisor for name, cfg in UNETS.items()}
    assert divisors == {"sdxl": 4, "sd15": 8}


@pytest.mark.parametrize("height, width", [(5, 4), (4, 3)])
def test_sizes_that_halving_does_not_divide_are_refused(name, height, width):
    net = tiny(name)
    _, t, cond = inputs(net)
    with pytest.raises(AssertionError, match=f"multiples of 2, got {height} x {width}"):
        net(torch.zeros(2, 4, height, width), t, cond)


def test_heads_are_64_channels_wide_in_sdxl_and_eight_in_sd15():
    heads = {}
    for name, cfg in UNETS.items():
        with torch.device("meta"):
            net = UNet(cfg, DDPM())
        blocks = [m for m in net.modules() if isinstance(m, TransformerBlock)]
        heads[name] = {(b.norm1.weight.numel(), b.attn1.heads, b.attn2.heads) for b in blocks}
    assert heads["sdxl"] == {(640, 10, 10), (1280, 20, 20)}
    assert heads["sd15"] == {(320, 8, 8), (640, 8, 8), (1280, 8, 8)}
