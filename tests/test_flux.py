"""FLUX.1 against reference numbers: small random weights in official names, made with independent
implementations, with the sizes in the file's metadata and the activations between blocks."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model import Flux, FluxConfig, kept_rotations, pack, silence_guidance, unpack
from nets.layers import attention, rotate
from nets.weights import read_metadata, save_weights
from schedule import Flow, guided
from teachers import find

HERE = Path(__file__).parent
TINY = FluxConfig(  # one block of each kind
    guidance=True,
    channels=4,
    width=12,
    heads=2,
    double=1,
    single=1,
    context_width=8,
    pooled_width=8,
    axes=(2, 2, 2),
)


def read_golden(name: str):
    """The network, its inputs and every tensor of a reference file."""
    path = HERE / "golden" / f"{name}.safetensors"
    golden, sizes = load_file(path), json.loads(read_metadata(path)["config"])
    cfg = FluxConfig(
        guidance=sizes["guidance_embed"],
        channels=sizes["in_channels"] // 4,
        width=sizes["hidden_size"],
        heads=sizes["num_heads"],
        double=sizes["depth"],
        single=sizes["depth_single_blocks"],
        mlp_ratio=int(sizes["mlp_ratio"]),
        context_width=sizes["context_in_dim"],
        pooled_width=sizes["vec_in_dim"],
        axes=tuple(sizes["axes_dim"]),
        theta=float(sizes["theta"]),
    )
    net = Flux(cfg, Flow())
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    cond = {"context": golden["inputs/txt"], "pooled": golden["inputs/y"]}
    if cfg.guidance:
        cond["guidance"] = golden["inputs/guidance"]
    return net, (golden["inputs/latent"], golden["inputs/timesteps"], cond), golden


@pytest.fixture(params=["flux_guidance", "flux_no_guidance"])
def reference(request):
    return read_golden(request.param)


@pytest.fixture
def dev():
    """The network with a guidance input, and its inputs."""
    return read_golden("flux_guidance")[:2]


def tiny(seed: int = 0, cfg: FluxConfig = TINY) -> Flux:
    torch.manual_seed(seed)
    return Flux(cfg, Flow())


def inputs(batch: int = 2, rows: int = 2, columns: int = 3, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw)
    cond = {"context": normal(batch, 5, 8), "pooled": normal(batch, 8)}
    cond["guidance"] = 1 + 7 * torch.rand(batch, generator=draw)
    return normal(batch, 4, 2 * rows, 2 * columns), torch.rand(batch, generator=draw), cond


# --- the reference -------------------------------------------------------------------------------


def test_flux_equals_the_reference_block_by_block(reference):
    """3 x 5 patches, so rows and columns cannot be swapped. References agree to 3e-6."""
    net, given, golden = reference
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)
    seen = {}
    for name, block in net.named_modules():
        if block in net.blocks():
            block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    close(net(*given), golden["outputs/velocity_latent"])
    close(net.embed(*given[1:]), golden["outputs/vec"])
    for name, out in seen.items():
        if name.startswith("double"):
            close(out[0], golden[f"outputs/{name}.txt"])
            close(out[1], golden[f"outputs/{name}.img"])
        else:
            close(out, golden[f"outputs/{name}"])
    assert len(seen) == 4, f"blocks() must be every block, got {list(seen)}"


def test_packing_is_channel_row_column_and_unpacking_its_inverse(reference):
    net, (x_t, _, _), golden = reference
    packed = pack(x_t, 3, 5)
    assert torch.equal(packed, golden["inputs/img"]), "a patch's values run over c, row, column"
    assert torch.equal(unpack(packed, 3, 5, net.cfg.patch), x_t)


@pytest.mark.parametrize("teacher, count", [("flux-dev", 780), ("flux-schnell", 776)])
def test_names_and_shapes_are_those_of_the_official_file(teacher, count):
    """At full size, on the meta device. The official file is BF16 throughout, as is a student's."""
    path = HERE / "manifests" / f"{teacher.replace('flux', 'flux1')}.json"
    official = json.loads(path.read_text())
    with torch.device("meta"):
        net = find(teacher).build(1.0)
    ours = {name: ["BF16", list(tensor.shape)] for name, tensor in net.state_dict().items()}
    assert ours == official and len(ours) == count


# --- numbers, gradients --------------------------------------------------------------------------


def test_bf16_is_within_two_percent_of_fp32(reference):
    """Of the same, rounded weights, over both samples. Eight bits of mantissa give about a third of
    a percent per rounding, and four blocks of large random weights pile them up."""
    net, given, _ = reference
    low = net.bfloat16()
    exact = copy.deepcopy(low).float()
    with torch.no_grad():
        error = (low(*given) - exact(*given)).norm() / exact(*given).norm()
    assert error < 2e-2, f"relative error {error:.4f}"


def test_time_stays_in_fp32():
    """1000 t needs more than bf16's eight bits: .759 would be embedded as 756."""
    net, (x_t, t, cond) = tiny().bfloat16(), inputs()
    assert net(x_t, t, cond).dtype == torch.float32, "the prediction has the dtype of x_t"
    with pytest.raises(AssertionError, match="time must come in fp32"):
        net(x_t, t.bfloat16(), cond)


def test_every_weight_gets_a_gradient(reference):
    """All of them: unlike in MM-DiT, text is read to the end."""
    net, given, _ = reference
    net(*given).square().sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert not still, f"no gradient: {sorted(still)}"


def test_a_blocks_gradient_is_the_derivative():
    """By finite differences in fp64; positions are fp32 constants and do not limit it."""
    net = tiny().double()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    context, x = draw(1, 2, 12).requires_grad_(), draw(1, 2, 12).requires_grad_()
    c, rope = draw(1, 12).requires_grad_(), kept_rotations(1, 2, 2, (2, 2, 2), 1e4, context.device)
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda *given: net.double_blocks[0](*given, rope), (context, x, c))
    joined = draw(1, 4, 12).requires_grad_()
    assert gradcheck(lambda *given: net.single_blocks[0](*given, rope), (joined, c))


def test_recomputing_each_block_changes_no_gradient():
    """Applied from outside, block by block; the same operations in the same order, so bit for
    bit."""
    plain, given = tiny(), inputs()
    again = copy.deepcopy(plain)
    for block in again.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for net in (plain, again):
        net(*given).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_compiled_network_is_one_graph_and_equal():
    """In eager's own kernels, so bit for bit; the first call is after an eager one, whose positions
    are already kept."""
    net, given = tiny(), inputs()
    wanted = net(*given)
    torch.testing.assert_close(
        torch.compile(net, fullgraph=True, backend="eager")(*given), wanted, atol=0, rtol=0
    )


# --- attention, positions ------------------------------------------------------------------------


def test_attention_takes_a_fused_kernel():
    """No mask, contiguous, so flash attention accepts what the blocks make; and it is the same."""
    net, given = tiny(), inputs()
    q, k, v = torch.randn(3, 2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).transpose(2, 3)
    with sdpa_kernel(SDPBackend.MATH):
        wanted, plain = net(*given), attention(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(attention(q, k, v), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(*given), wanted, atol=1e-5, rtol=1e-5)


def test_attention_depends_on_the_distance_of_positions_alone():
    """q at place m, k at place n: their product is a function of n - m, per axis; text is at 0."""
    q, k = torch.randn(2, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0)).unbind(0)
    rope = kept_rotations(6, 7, 2, (4, 4, 4), 1e4, q.device)  # 2 text tokens, 6 x 7 patches
    q, k = rotate(q.expand(1, 1, 44, 12), rope)[0, 0], rotate(k.expand(1, 1, 44, 12), rope)[0, 0]
    products = (q @ k.T)[2:, 2:].unflatten(0, (6, 7)).unflatten(2, (6, 7))
    torch.testing.assert_close(products[1, 2, 3, 5], products[2, 1, 4, 4], atol=1e-5, rtol=1e-5)
    assert (products[1, 2, 3, 5] - products[1, 2, 5, 3]).abs() > 1e-3, "rows are not columns"
    torch.testing.assert_close(q[:2], q[2:3].expand(2, 12))  # text, as patch (0, 0), is not turned


def test_positions_are_computed_once_per_size_and_device():
    net, misses = tiny(), lambda: kept_rotations.cache_info().misses
    kept_rotations.cache_clear()
    with torch.inference_mode():
        net(*inputs())
    net(*inputs()).sum().backward()  # what inference mode kept can be trained with
    copy.deepcopy(net)(*inputs(batch=1))
    assert misses() == 1
    net(*inputs(rows=3, columns=2))
    with torch.device("meta"):
        other = tiny()
    x_t, t, cond = inputs()
    cond = {name: tensor.to("meta") for name, tensor in cond.items()}
    assert other(x_t.to("meta"), t.to("meta"), cond).shape == x_t.shape
    assert misses() == 3, "another shape with as many patches, another device"


def test_positions_that_were_rounded_are_refused():
    """Whoever casts a block's inputs to bf16 would turn by the wrong angles."""
    net, rope = tiny(), kept_rotations(2, 3, 5, (2, 2, 2), 1e4, torch.device("cpu"))
    with pytest.raises(AssertionError, match="positions must stay in fp32"):
        net.single_blocks[0](
            torch.zeros(1, 11, 12), torch.zeros(1, 12), tuple(part.bfloat16() for part in rope)
        )


# --- batches, sizes ------------------------------------------------------------------------------


def test_each_sample_has_its_own_time_text_and_guidance(reference):
    """A batch of two equals two batches of one."""
    net, (x_t, t, cond), _ = reference
    both = net(x_t, t, cond)
    for b in range(2):
        alone = net(x_t[b : b + 1], t[b : b + 1], {k: v[b : b + 1] for k, v in cond.items()})
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows, columns, batch", [(1, 1, 1), (1, 6, 3), (5, 2, 2)])
def test_any_even_size_and_any_batch(rows, columns, batch):
    given = inputs(batch, rows, columns)
    assert tiny()(*given).shape == given[0].shape


@pytest.mark.parametrize("height, width", [(5, 4), (4, 5)])
def test_sizes_that_patches_do_not_divide_are_refused(height, width):
    _, t, cond = inputs()
    with pytest.raises(AssertionError, match=f"2 x 2 patches, got {height} x {width}"):
        tiny()(torch.zeros(2, 4, height, width), t, cond)


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_is_read_as_the_raw_scale(dev):
    """`guided` hands the scale over in `cond`; the factor 1000 is the network's own."""
    net, (x_t, t, cond) = dev
    rest = {name: tensor for name, tensor in cond.items() if name != "guidance"}
    assert torch.equal(guided(net, x_t, t, rest, None, cond["guidance"]), net(x_t, t, cond))
    assert not torch.equal(guided(net, x_t, t, rest, None, 2.0), net(x_t, t, cond))


def test_a_silenced_student_ignores_guidance(dev):
    """Bit for bit, whatever the scale and without one: zero times anything finite, plus zero."""
    net, (x_t, t, cond) = dev
    silence_guidance(net)
    rest = {name: tensor for name, tensor in cond.items() if name != "guidance"}
    wanted = net(x_t, t, rest)
    for scale in (0.0, 1.0, 3.5, 100.0):
        assert torch.equal(guided(net, x_t, t, rest, None, scale), wanted), scale


def test_a_silenced_student_trains_everything_but_its_guidance(dev):
    """The embedder's first layer has no gradient behind a zero layer, so it is frozen as well."""
    net, given = dev
    silence_guidance(net)
    net(*given).square().sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert still == frozen == {name for name in net.state_dict() if name.startswith("guidance_in.")}


def test_a_network_without_guidance_refuses_a_scale():
    net, (x_t, t, cond) = tiny(cfg=replace(TINY, guidance=False)), inputs()
    with pytest.raises(AssertionError, match="takes no guidance"):
        net(x_t, t, cond)


def test_a_students_header_is_the_teachers(tmp_path):
    """All 57 blocks in miniature: names and order of the official file, metadata beside them."""
    cfg = replace(TINY, double=19, single=38)
    official = json.loads((HERE / "manifests" / "flux1-dev.json").read_text())
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    net = tiny(cfg=cfg)
    save_weights(net, teacher, torch.bfloat16, {})
    silence_guidance(net)
    save_weights(net, student, torch.bfloat16, {"teacher": "flux-dev", "steps": "4"})
    headers = [read_header(path) for path in (teacher, student)]
    assert headers[0] == headers[1]
    assert [name for name, *_ in headers[1]] == list(official), "order on disk"
    assert {dtype for _, dtype, _ in headers[1]} == {"BF16"}
    assert read_metadata(student) == {"teacher": "flux-dev", "steps": "4"}
    assert not load_file(student)["guidance_in.out_layer.weight"].any()


def read_header(path: Path) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of every tensor, in the order of their bytes."""
    with safe_open(path, framework="pt") as file:
        slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
        return [(name, part.get_dtype(), part.get_shape()) for name, part in slices]
