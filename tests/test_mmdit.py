"""MM-DiT against reference numbers: small random weights in official names, made with independent
implementations, with the sizes in the file's metadata and the activations between blocks. Large is
the plain kind, Medium has a second attention in its first blocks; in both the last text block has
no MLP."""

import copy
import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import OFFICIAL, embedded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from digits.words import SceneText
from nets.layers import attention
from nets.mmdit import MMDiT, MMDiTConfig
from nets.vae import VAE, VAES
from nets.weights import load_weights, read_metadata, save_weights
from schedule import Flow, guided
from teachers import find
from teachers.students import load_student

HERE = Path(__file__).parent
PREFIX = "model.diffusion_model."
OFFICIAL_SIZES = {name: find(f"sd35-{name}").sizes.denoiser for name in ("large", "medium")}
TINY = {  # every kind of block
    "large": MMDiTConfig(2, 4, 12, 2, 2, context_width=8, pooled_width=6, table=5),
    "medium": MMDiTConfig(2, 4, 12, 3, 2, context_width=8, pooled_width=6, table=5, dual_blocks=1),
}


def read_golden(name: str):
    """The network, its inputs and every tensor of a reference file."""
    path = HERE / "golden" / f"mmdit_{name}.safetensors"
    golden, sizes = load_file(path), json.loads(read_metadata(path)["config"])
    dual = sizes["dual_attention_layers"]
    assert dual == list(range(len(dual))), "the first blocks are the dual ones"
    cfg = MMDiTConfig(
        patch=sizes["patch_size"],
        channels=sizes["in_channels"],
        width=sizes["hidden_size"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        context_width=sizes["context_dim"],
        pooled_width=sizes["pooled_dim"],
        table=sizes["pos_embed_max_size"],
        dual_blocks=len(dual),
    )
    net, start = MMDiT(cfg, Flow(3.0)), "weights/" + PREFIX
    weights = {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    cond = {"context": golden["inputs/context"], "pooled": golden["inputs/y"]}
    return net, (golden["inputs/latent"], golden["inputs/timesteps"] / 1000, cond), golden


@pytest.fixture(params=["large", "medium"])
def name(request):
    return request.param


@pytest.fixture
def reference(name):
    return read_golden(name)


def tiny(name: str, seed: int = 0) -> MMDiT:
    """With a position table, which is made of zeros until it is loaded."""
    torch.manual_seed(seed)
    net = MMDiT(TINY[name], Flow(3.0))
    torch.nn.init.normal_(net.pos_embed)
    return net


def inputs(batch: int = 2, rows: int = 2, columns: int = 3, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw)
    cond = {"context": normal(batch, 5, 8), "pooled": normal(batch, 6)}
    return normal(batch, 4, 2 * rows, 2 * columns), torch.rand(batch, generator=draw), cond


# --- the reference -------------------------------------------------------------------------------


def test_mmdit_equals_the_reference_block_by_block(reference):
    """4 x 6 patches of a 9 x 9 table, so the centre crop matters. References agree to 3e-6."""
    net, given, golden = reference
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)
    seen = {}
    for key, block in net.named_modules():
        if block in net.blocks():
            block.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
    close(net(*given), golden["outputs/velocity"])
    close(net.embed(*given[1:]), golden["outputs/c"])
    close(
        net.x_embedder(given[0]) + net.positions(4, 6), golden["outputs/x_embedder_plus_pos_embed"]
    )
    assert list(seen) == [f"joint_blocks.{i}" for i in range(3)], "blocks() must be every block"
    for i, (context, x) in enumerate(seen.values()):
        close(x, golden[f"outputs/joint_blocks.{i}.x"])
        if i < 2:  # nothing reads the last one's text
            close(context, golden[f"outputs/joint_blocks.{i}.context"])


def test_positions_are_the_centre_of_the_table():
    """(9 - 4) // 2 rows above, (9 - 6) // 2 columns to the left: the odd one is below, right."""
    net = MMDiT(replace(TINY["large"], width=2, heads=1, table=9), Flow())
    places = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0))  # row, column
    net.load_state_dict({"pos_embed": places[None]}, strict=False)
    got = net.positions(4, 6)[0].unflatten(0, (4, 6))
    assert got[0, 0].tolist() == [2, 1] and got[-1, -1].tolist() == [5, 6]
    assert torch.equal(net.positions(9, 9)[0], places)


# --- the official files --------------------------------------------------------------------------


def official(name: str) -> dict:
    return json.loads((HERE / "manifests" / f"sd3.5_{name}.json").read_text())


def file_tensors(nets: dict) -> dict[str, torch.Tensor]:
    """The tensors of both networks under the names of the one file that holds them."""
    prefixes = {part: OFFICIAL["sd35-large"][part].prefix for part in nets}
    return {prefixes[p] + k: v for p, net in nets.items() for k, v in net.state_dict().items()}


@pytest.mark.parametrize(
    "name, count, size, table",
    [("large", 1167, 8_056_627_520, 89_653_248), ("medium", 909, 2_243_171_520, 226_492_416)],
)
def test_names_and_shapes_are_those_of_the_official_file(name, count, size, table):
    """Transformer and autoencoder at full size on the meta device; nothing is missing, nothing left
    over. The file is in halves throughout (two bytes by its size; that it is F16 is not known)."""
    with torch.device("meta"):
        nets = {"denoiser": MMDiT(OFFICIAL_SIZES[name], Flow(3.0)), "vae": VAE(VAES["sd35"])}
    ours = {key: ["F16", list(tensor.shape)] for key, tensor in file_tensors(nets).items()}
    assert ours == official(name) and len(ours) == count
    sizes = {key: p.numel() for key, p in nets["denoiser"].named_parameters()}
    assert sizes["pos_embed"] == table and sum(sizes.values()) == size + table


@pytest.fixture
def combined(name, tmp_path):
    """Every tensor of the official file, at a small width."""
    torch.manual_seed(0)
    small = {"width": 4, "heads": 2, "context_width": 3, "pooled_width": 3, "table": 2}
    nets = {
        "denoiser": MMDiT(replace(OFFICIAL_SIZES[name], **small), Flow(3.0)).half(),
        "vae": VAE(replace(VAES["sd35"], width=2, groups=2)).half(),
    }
    path = tmp_path / f"sd3.5_{name}.safetensors"
    save_file(file_tensors(nets), path)
    return path, nets


def test_both_networks_of_a_combined_file_load_back_bit_for_bit(name, combined):
    """By the prefixes of the table of files, onto the meta device."""
    path, nets = combined
    for part, net in nets.items():
        with torch.device("meta"):
            again = MMDiT(net.cfg, Flow(3.0)) if part == "denoiser" else VAE(net.cfg)
        prefix = OFFICIAL[f"sd35-{name}"][part].prefix
        load_weights(again, path, torch.float16, prefix=prefix)
        for (key, tensor), loaded in zip(
            net.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, loaded), f"{part}: {key}"


def test_an_exported_transformer_has_the_official_names_and_order(name, combined, tmp_path):
    """All its blocks in miniature, alone under its prefix, metadata beside them."""
    _, nets = combined
    path = tmp_path / "student.safetensors"
    save_weights(nets["denoiser"], path, torch.float16, {"teacher": f"sd35-{name}"}, prefix=PREFIX)
    with safe_open(path, framework="pt") as file:
        header = [(key, file.get_slice(key).get_dtype()) for key in file.offset_keys()]
    assert header == [(k, form) for k, (form, _) in official(name).items() if k.startswith(PREFIX)]
    assert read_metadata(path) == {"teacher": f"sd35-{name}"}


# --- numbers, gradients --------------------------------------------------------------------------


def test_bf16_is_within_two_percent_of_fp32(reference):
    """Of the same, rounded weights, over both samples, fp32 in and out: one percent."""
    net, given, _ = reference
    low = net.bfloat16()
    exact = copy.deepcopy(low).float()
    with torch.no_grad():
        got, wanted = low(*given), exact(*given)
    assert got.dtype == torch.float32, "the prediction has the dtype of x_t"
    error = (got - wanted).norm() / wanted.norm()
    assert error < 2e-2, f"relative error {error:.4f}"


def test_inputs_in_bf16_are_taken_by_fp32_weights(name):
    """As a text encoder in bf16 gives them; what is lost is their rounding."""
    net, (x_t, t, cond) = tiny(name), inputs()
    low = {key: tensor.bfloat16() for key, tensor in cond.items()}
    got = net(x_t.bfloat16(), t, low)
    assert got.dtype == torch.bfloat16
    assert torch.equal(
        got, net(x_t.bfloat16().float(), t, {k: v.float() for k, v in low.items()}).bfloat16()
    )


def test_autocast_computes_in_bf16_with_fp32_weights(name):
    """As a trained network does on one device: the same tolerance, gradients in fp32, and every
    block in bf16 with the fused norms (torch warns where it cannot take them)."""
    net, given = tiny(name), inputs()
    seen = []
    for block in net.blocks():
        block.register_forward_hook(lambda _, given, out: seen.extend([*given, *out]))
    wanted = net(*given)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Mismatch dtype between input and weight")
        got = net(*given)
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16} and got.dtype == torch.float32
    assert (got - wanted).norm() < 2e-2 * wanted.norm()
    got.square().sum().backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_time_stays_in_fp32(name):
    """1000 t needs more than bf16's eight bits: .759 would be embedded as 756."""
    net, (x_t, t, cond) = tiny(name).bfloat16(), inputs()
    with pytest.raises(AssertionError, match="time must come in fp32"):
        net(x_t, t.bfloat16(), cond)


def test_every_weight_gets_a_gradient(reference):
    """But for the last text block's query norm: nothing reads the text's own attention there, so
    its queries (and their third of `qkv`) are in the file and move nothing."""
    net, given, _ = reference
    net(*given).square().sum().backward()
    still = {key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"joint_blocks.2.context_block.attn.ln_q.weight"}
    queries, keys, values = net.joint_blocks[2].context_block.attn.qkv.weight.grad.chunk(3)
    assert not queries.any() and keys.any() and values.any()


def test_a_blocks_gradient_is_the_derivative(name):
    """By finite differences in fp64."""
    net = tiny(name).double()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = [draw(1, 2, 12), draw(1, 3, 12), draw(1, 12)]
    for block in net.blocks():
        assert torch.autograd.gradcheck(block, [x.requires_grad_() for x in given], fast_mode=True)


def test_recomputing_each_block_changes_no_gradient(name):
    """Applied from outside, block by block; the same operations in the same order, so bit for
    bit."""
    plain, given = tiny(name), inputs()
    again = copy.deepcopy(plain)
    for block in again.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for net in (plain, again):
        net(*given).square().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key


def test_blocks_hold_all_but_the_ends(name):
    """What is outside them stays whole where blocks are sharded."""
    with torch.device("meta"):
        net = MMDiT(OFFICIAL_SIZES[name], Flow(3.0))
    inside = {id(p) for block in net.blocks() for p in block.parameters()}
    outside = {key.split(".")[0] for key, p in net.named_parameters() if id(p) not in inside}
    embedders = {"x_embedder", "t_embedder", "y_embedder", "context_embedder"}
    assert outside == embedders | {"pos_embed", "final_layer"}


def test_a_compiled_network_is_one_graph_and_equal(name):
    """In eager's own kernels, so bit for bit."""
    net, given = tiny(name), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), net(*given), atol=0, rtol=0)


# --- attention -----------------------------------------------------------------------------------


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind(0)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), (weights @ v).transpose(1, 2).flatten(2))


def test_attention_takes_a_fused_kernel(name):
    """No mask, contiguous, so flash attention accepts what the blocks make; and it is the same."""
    net, given = tiny(name), inputs()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = net(*given)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(net(*given), wanted, atol=1e-5, rtol=1e-5)


# --- batches, sizes ------------------------------------------------------------------------------


def test_each_sample_has_its_own_time_and_text(reference):
    """A batch of two equals two batches of one."""
    net, (x_t, t, cond), _ = reference
    both = net(x_t, t, cond)
    for b in range(2):
        alone = net(x_t[b : b + 1], t[b : b + 1], {k: v[b : b + 1] for k, v in cond.items()})
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-5, rtol=1e-5)


def test_guidance_is_one_batched_call_of_two_texts(reference):
    """Classifier-free: without text towards with text, per sample its own scale."""
    net, (x_t, t, cond), _ = reference
    empty = {key: tensor.flip(0) for key, tensor in cond.items()}
    g = torch.tensor([4.0, 1.0])
    yes, no = net(x_t, t, cond), net(x_t, t, empty)
    got = guided(net, x_t, t, cond, empty, g)
    torch.testing.assert_close(got, no + g[:, None, None, None] * (yes - no), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows, columns, batch", [(1, 1, 1), (1, 5, 3), (5, 2, 2)])
def test_any_size_up_to_the_table_and_any_batch(name, rows, columns, batch):
    given = inputs(batch, rows, columns)
    assert tiny(name)(*given).shape == given[0].shape


@pytest.mark.parametrize("height, width", [(12, 4), (4, 12)])
def test_latents_larger_than_the_position_table_are_refused(name, height, width):
    _, t, cond = inputs()
    rows, columns = height // 2, width // 2
    with pytest.raises(AssertionError, match=f"at most 5 patches a side, got {rows} x {columns}"):
        tiny(name)(torch.zeros(2, 4, height, width), t, cond)


@pytest.mark.parametrize("height, width", [(5, 4), (4, 5)])
def test_sizes_that_patches_do_not_divide_are_refused(name, height, width):
    _, t, cond = inputs()
    with pytest.raises(AssertionError, match=f"2 x 2 patches, got {height} x {width}"):
        tiny(name)(torch.zeros(2, 4, height, width), t, cond)


# --- the embedded teacher ------------------------------------------------------------------------


def test_teacher_loads_and_predicts_velocity():
    """The embedded teacher on its own task: at t = .5 it explains most of the velocity."""
    from digits.scenes import DigitScenes

    teacher, scenes = (
        embedded(),
        DigitScenes(seed=9, handwriting="held-out")(range(64)),
    )
    eps = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.full((64,), 0.5)
    with torch.no_grad():
        v = teacher(teacher.schedule.noise(scenes.images, eps, t), t, SceneText()(scenes.captions))
    wanted = eps - scenes.images
    assert (v - wanted).var() < 0.15 * wanted.var()


def test_student_file_loads_back_bit_for_bit(tmp_path):
    net, path = find("digits").build(2.0), tmp_path / "student.safetensors"
    about = {"teacher": "digits", "shift": "2.0", "steps": "2", "taus": "[1, 0.5]", "sampler": "x0"}
    save_weights(net, path, torch.float32, about)
    again, about = load_student(path)
    assert about["steps"] == "2" and again.schedule.shift == 2.0
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
