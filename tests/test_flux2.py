"""FLUX.2 [klein] against reference numbers: small random weights in official names; the makers'
implementation and another agree to 3e-6, a wrong formula is off by 1.8e-3 or more."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import (
    Flux2,
    Flux2Config,
    Flux2DoubleBlock,
    Flux2SingleBlock,
    FluxEmbedder,
    Modulation,
    kept_rotations,
    pack,
    unpack,
)
from nets.weights import read_metadata
from schedule import Flow, guided

HERE = Path(__file__).parent
TINY = Flux2Config(
    channels=4, width=16, heads=2, double=1, single=1, context_width=8, axes=(2, 2, 2, 2)
)
close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def reference():
    """The network, its inputs and every tensor of the reference file."""
    path = HERE / "golden" / "flux2_klein.safetensors"
    golden, sizes = load_file(path), json.loads(read_metadata(path)["config"])
    cfg = Flux2Config(
        channels=sizes["in_channels"],
        width=sizes["hidden_size"],
        heads=sizes["num_heads"],
        double=sizes["depth"],
        single=sizes["depth_single_blocks"],
        mlp_ratio=int(sizes["mlp_ratio"]),
        context_width=sizes["context_in_dim"],
        axes=tuple(sizes["axes_dim"]),
        theta=float(sizes["theta"]),
    )
    net = Flux2(cfg, Flow())
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    cond = {"context": golden["inputs/txt"]}
    return net, (golden["inputs/latent"], golden["inputs/timesteps"], cond), golden


def tiny(seed: int = 0) -> Flux2:
    torch.manual_seed(seed)
    return Flux2(TINY, Flow())


def inputs(batch: int = 2, rows: int = 2, columns: int = 3):
    draw = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=draw)
    cond = {"context": normal(batch, 5, 8)}
    return normal(batch, 4, rows, columns), torch.rand(batch, generator=draw), cond


# --- the reference -------------------------------------------------------------------------------


def test_flux2_equals_the_reference_block_by_block(reference):
    """3 x 5 places of the latent, so rows and columns cannot be swapped; each sample its time."""
    net, given, golden = reference
    seen, hooks = {}, []
    kinds = (FluxEmbedder, Modulation, Flux2DoubleBlock, Flux2SingleBlock)
    for name, module in net.named_modules():
        if isinstance(module, kinds):
            keep = partial(lambda name, _, __, out: seen.update({name: out}), name)
            hooks.append(module.register_forward_hook(keep))
    close(net(*given), golden["outputs/velocity_latent"])
    for hook in hooks:
        hook.remove()
    close(seen.pop("time_in"), golden["outputs/vec"])
    for name, out in seen.items():
        if name.startswith("double_blocks"):
            close(out[0], golden[f"outputs/{name}.txt"])
            close(out[1], golden[f"outputs/{name}.img"])
        else:
            out = torch.cat(out, dim=-1) if "modulation" in name else out
            close(out, golden[f"outputs/{name}"])
    assert len(seen) == len(net.blocks()) + 3, f"and three modulations, got {list(seen)}"


def test_text_is_turned_by_its_index_and_patches_by_row_and_column(reference):
    """Unlike FLUX.1's, where all text is at one place. In fp32 the reference's angles are good to
    2e-7 of their size."""
    net, _, golden = reference
    cfg = net.cfg
    for k, name in enumerate(("cos", "sin")):
        table = kept_rotations(3, 5, 7, cfg.axes, cfg.theta, torch.device("cpu"))[k]
        close(table[:7], golden[f"outputs/rotary.txt.{name}"])
        close(table[7:], golden[f"outputs/rotary.img.{name}"])


def test_a_latents_pixels_are_tokens_row_by_row(reference):
    _, (x_t, _, _), golden = reference
    packed = pack(x_t, 3, 5)
    assert torch.equal(packed, golden["inputs/img"])
    assert torch.equal(unpack(packed, 3, 5, 1), x_t)


def test_names_and_shapes_are_those_of_the_official_file():
    """At full size, on the meta device: BF16 throughout, no bias anywhere."""
    path = HERE / "manifests" / "flux-2-klein-base-4b.json"
    official = json.loads(path.read_text())
    with torch.device("meta"):
        net = Flux2(Flux2Config(), Flow())
    ours = {name: ["BF16", list(tensor.shape)] for name, tensor in net.state_dict().items()}
    assert ours == official and len(ours) == 149
    assert sum(p.numel() for p in net.parameters()) == 3_875_544_576


# --- numbers, gradients --------------------------------------------------------------------------


def test_bf16_is_within_two_percent_of_fp32(reference):
    """Of the same, rounded weights, over both samples. Weights as a network begins give .5 %. The
    reference's are larger, so that each block is most of what leaves it, and pile up 2.2 %."""
    net, (x_t, t, cond), _ = reference
    torch.manual_seed(0)
    for full, limit in ((Flux2(net.cfg, Flow()), 1e-2), (net, 2.5e-2)):
        low = copy.deepcopy(full).bfloat16()
        exact = copy.deepcopy(low).float()
        with torch.no_grad():
            wanted = exact(x_t, t, cond)
            error = (low(x_t, t, cond) - wanted).norm() / wanted.norm()
        assert error < limit, f"relative error {error:.4f}"


def test_time_stays_in_fp32():
    net, (x_t, t, cond) = tiny().bfloat16(), inputs()
    assert net(x_t, t, cond).dtype == torch.float32, "the prediction has the dtype of x_t"
    with pytest.raises(AssertionError, match="time must come in fp32"):
        net(x_t, t.bfloat16(), cond)


def test_every_weight_gets_a_gradient(reference):
    """The shared modulations from every block that they are handed to."""
    net, given, _ = reference
    net.zero_grad()
    net(*given).square().sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert not still, f"no gradient: {sorted(still)}"


def test_a_blocks_gradient_is_the_derivative():
    """By finite differences in fp64, the modulation handed in included."""
    net = tiny().double()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rope = kept_rotations(1, 2, 2, TINY.axes, TINY.theta, torch.device("cpu"))
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
    given = [draw(1, 2, 16).requires_grad_() for _ in range(2)]
    mods = [draw(1, 16).requires_grad_() for _ in range(12)]
    double, single = net.double_blocks[0], net.single_blocks[0]
    assert gradcheck(lambda a, b, *m: double(a, b, (m[:6], m[6:]), rope), (*given, *mods))
    joined = draw(1, 4, 16).requires_grad_()
    assert gradcheck(lambda x, *m: single(x, m, rope), (joined, *mods[:3]))


def test_a_compiled_network_is_one_graph_and_equal():
    net, given = tiny(), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), net(*given), atol=0, rtol=0)


def test_attention_takes_a_fused_kernel():
    """No mask: the states of padding take part."""
    net, given = tiny(), inputs()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = net(*given)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(net(*given), wanted, atol=1e-5, rtol=1e-5)


# --- batches, sizes, guidance --------------------------------------------------------------------


def test_each_sample_has_its_own_time_and_text(reference):
    net, (x_t, t, cond), _ = reference
    both = net(x_t, t, cond)
    for b in range(2):
        alone = net(x_t[b : b + 1], t[b : b + 1], {"context": cond["context"][b : b + 1]})
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows, columns, batch", [(1, 1, 1), (1, 6, 3), (5, 2, 2)])
def test_any_size_and_any_batch(rows, columns, batch):
    given = inputs(batch, rows, columns)
    assert tiny()(*given).shape == given[0].shape


def test_guidance_is_away_from_another_text(reference):
    """One call for both; the scale is no input of the network."""
    net, (x_t, t, cond), _ = reference
    uncond = {"context": cond["context"].flip(0)}
    yes, no = net(x_t, t, cond), net(x_t, t, uncond)
    got = guided(net, x_t, t, cond, uncond, 4.0)
    torch.testing.assert_close(got, no + 4 * (yes - no), atol=1e-4, rtol=1e-5)


def test_sizes_of_positions_that_do_not_fill_a_head_are_refused():
    with pytest.raises(AssertionError, match="positions turn every channel"):
        Flux2(Flux2Config(channels=4, width=16, heads=2), Flow())
