"""Z-Image against reference numbers: small random weights in official names, two captions of
different lengths, every block of either sample. Two independent implementations agree exactly."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import write_qwen3_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from config import Refusal
from nets.layers import rotations
from nets.qwen3 import Qwen3, Qwen3Config, qwen3_tokenizer
from nets.vae import VAE, VAEConfig
from nets.weights import read_metadata
from nets.z_image import (
    ZImage,
    ZImageConfig,
    ZImageText,
    attend,
    caption_places,
    filled,
    kept_positions,
    token_places,
)
from schedule import Flow, grid, guided, sample_ode

HERE = Path(__file__).parent
TINY = ZImageConfig(
    channels=4,
    width=12,
    heads=2,
    depth=1,
    refiners=1,
    context_width=8,
    time_hidden=10,
    time_width=6,
    axes=(2, 2, 2),
)
TOKENS = json.loads((HERE / "golden" / "qwen3_tokens.json").read_text(encoding="utf-8"))
close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)


def config_of(sizes: dict) -> ZImageConfig:
    """From a reference file's metadata."""
    return ZImageConfig(
        patch=sizes["patch_size"],
        channels=sizes["in_channels"],
        width=sizes["dim"],
        heads=sizes["n_heads"],
        depth=sizes["n_layers"],
        refiners=sizes["n_refiner_layers"],
        context_width=sizes["cap_feat_dim"],
        time_hidden=sizes["t_mid"],
        time_width=sizes["adaln_dim"],
        axes=tuple(sizes["axes_dims"]),
        theta=sizes["rope_theta"],
    )


def stack_captions(captions: list, width: int = 0) -> dict:
    """Captions (T, D) of several lengths as cond."""
    longest = max(width, *map(len, captions))
    padded = [F.pad(x, (0, 0, 0, longest - len(x))) for x in captions]
    return {"context": torch.stack(padded), "length": torch.tensor([len(x) for x in captions])}


@pytest.fixture
def reference():
    """The network, its inputs and every tensor of the reference file."""
    path = HERE / "golden" / "z_image.safetensors"
    golden, sizes = load_file(path), json.loads(read_metadata(path)["config"])
    net = ZImage(config_of(sizes), Flow(6.0))
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    cond = stack_captions([golden[f"inputs/captions.{b}"] for b in (0, 1)])
    return net, (golden["inputs/latent"], golden["inputs/t"], cond), golden


def tiny(seed: int = 0, cfg: ZImageConfig = TINY) -> ZImage:
    """With tokens to fill up with, which are zeros until they are loaded."""
    torch.manual_seed(seed)
    net = ZImage(cfg, Flow(6.0))
    torch.nn.init.normal_(net.x_pad_token)
    torch.nn.init.normal_(net.cap_pad_token)
    return net


def inputs(lengths=(5, 33), rows: int = 2, columns: int = 3, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    cond = stack_captions([torch.randn(n, 8, generator=draw) for n in lengths], 40)
    x_t = torch.randn(len(lengths), 4, 2 * rows, 2 * columns, generator=draw)
    return x_t, torch.rand(len(lengths), generator=draw), cond


def only(given, b: int):
    """One sample of a batch."""
    x_t, t, cond = given
    return x_t[b : b + 1], t[b : b + 1], {name: x[b : b + 1] for name, x in cond.items()}


# --- the reference -------------------------------------------------------------------------------


def test_z_image_equals_the_reference_block_by_block(reference):
    """3 x 5 patches, so rows and columns cannot be swapped; captions of 32 and 45 tokens, filled up
    to 32 and 64. What the batch adds beyond a sample's own tokens is nobody's."""
    net, given, golden = reference
    seen = {}
    for name, block in net.named_modules():
        if block in net.blocks() or name == "t_embedder":
            block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    close(net(*given), golden["outputs/velocity"])
    close(seen.pop("t_embedder"), golden["outputs/adaln_input"])
    close(net.embed_image(given[0], 3, 5)[1], golden["outputs/image_tokens.1"])
    caption = net.embed_caption(given[2], 64)
    close(caption[0, :32], golden["outputs/caption_tokens.0"])
    close(caption[1], golden["outputs/caption_tokens.1"])
    assert len(seen) == 6, f"blocks() must be every block, got {list(seen)}"
    for name, out in seen.items():
        for b in (0, 1):
            wanted = golden[f"outputs/{name}.{b}"]
            close(out[b, : len(wanted)], wanted)


def test_a_sample_is_the_same_alone(reference):
    """Without what the batch adds, and without anything that looks longer than it is."""
    net, given, golden = reference
    for b in (0, 1):
        x_t, t, cond = only(given, b)
        close(net(x_t, t, cond), golden["outputs/velocity"][b : b + 1])
        exact = {"context": golden[f"inputs/captions.{b}"][None]}  # no length: all are its own
        close(net(x_t, t, exact), golden["outputs/velocity"][b : b + 1])


def test_positions_are_the_references(reference):
    """The image begins behind the caption, filled up: so positions differ between samples."""
    golden = reference[-1]
    for b, length in enumerate((32, 64)):
        places = token_places(3, 5, length, torch.device("cpu"))
        assert torch.equal(places, golden[f"outputs/positions.image.{b}"])
        places = caption_places(length, torch.device("cpu"))
        assert torch.equal(places, golden[f"outputs/positions.caption.{b}"])


def test_patches_are_row_column_channel_and_unpacking_is_the_inverse():
    net, x = tiny(), torch.arange(2 * 4 * 4 * 6.0).reshape(2, 4, 4, 6)
    packed = net.pack(x, 2, 3)  # (B, L, P P C)
    assert torch.equal(packed[1, 4].unflatten(0, (2, 2, 4)), x[1, :, 2:4, 2:4].movedim(0, -1))
    assert torch.equal(net.unpack(packed, 2, 3), x)


def test_names_and_shapes_are_those_of_the_official_file():
    """At full size, on the meta device; 6.15 billion weights. Every name is in either shard."""
    official = json.loads((HERE / "manifests" / "z_image.json").read_text())
    with torch.device("meta"):
        state = ZImage(ZImageConfig(), Flow()).state_dict()
    ours = {name: ["BF16", list(tensor.shape)] for name, tensor in state.items()}
    assert ours == official and len(ours) == 521
    assert sum(tensor.numel() for tensor in state.values()) == 6_154_908_736


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5, 33, 31, 40), (7, 7), (1, 32)])
def test_a_result_does_not_depend_on_what_else_is_in_the_batch(lengths):
    """Any lengths together, in any width of the tensor that holds them."""
    net, given = tiny(), inputs(lengths)
    together = net(*given)
    for b, length in enumerate(lengths):
        x_t, t, cond = only(given, b)
        cond["context"] = cond["context"][:, :length]
        close(net(x_t, t, cond), together[b : b + 1])


def test_guidance_leads_away_from_a_caption_of_another_length():
    """Both in one call, as everywhere; the same as two calls."""
    net, (x_t, t, cond) = tiny(), inputs((33, 40))
    uncond = {name: x[:1].expand_as(cond[name]) for name, x in inputs((4, 6), seed=2)[2].items()}
    yes, no = net(x_t, t, cond), net(x_t, t, uncond)
    close(guided(net, x_t, t, cond, uncond, 5.0), no + 5 * (yes - no))


def test_what_fills_up_is_seen_and_what_the_batch_adds_is_not():
    net, given = tiny(), inputs((5, 33))
    before = net(*given)
    for token in (net.x_pad_token, net.cap_pad_token):
        with torch.no_grad():
            token.add_(1)
        after = net(*given)
        assert (after - before).abs().flatten(1).amax(1).min() > 1e-4, "both samples see it"
        before = after
    given[2]["context"][0, 5:] = 1e6  # beyond the caption's length
    assert torch.equal(net(*given), before)


def test_attention_takes_a_fused_kernel_whatever_the_lengths():
    """No mask, contiguous: flash attention accepts each group, and it is the same."""
    net, given = tiny(), inputs((5, 33, 33))
    with sdpa_kernel(SDPBackend.MATH):
        wanted = net(*given)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        close(net(*given), wanted)


class Queries(TorchFunctionMode):
    """Notes the shape of the queries of each attention."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, called, types, args=(), kwargs=None):
        if called is F.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return called(*args, **(kwargs or {}))


def test_equal_lengths_attend_together():
    """Neighbours of one length in one call; beyond it there is nothing."""
    q = torch.randn(4, 1, 9, 2, generator=torch.Generator().manual_seed(0))
    with Queries() as seen:
        out = attend(q, q, q, [9, 9, 4, 4])
    assert seen.shapes == [(2, 1, 9, 2), (2, 1, 4, 2)]
    assert not out[2:, 4:].any() and out[:2].all()


def test_positions_are_kept_for_each_length_of_caption():
    net = tiny()
    kept_positions.cache_clear()
    with torch.inference_mode():
        net(*inputs((5, 33)))
    net(*inputs((31, 40))).sum().backward()  # as ordinary tensors, though first made for inference
    assert kept_positions.cache_info().misses == 2


def test_lengths_that_cannot_be_are_said():
    x_t, t, cond = inputs((5, 33))
    cond["length"] = torch.tensor([0, 33])
    with pytest.raises(AssertionError, match=r"captions of 1 to 40 tokens, got \[0, 33\]"):
        tiny()(x_t, t, cond)
    assert [filled(n) for n in (1, 32, 33)] == [32, 32, 64]


# --- numbers, gradients --------------------------------------------------------------------------


def test_bf16_is_within_two_percent_of_fp32(reference):
    """Of the same, rounded weights, over both samples; time and positions stay in fp32."""
    net, given, _ = reference
    low = net.bfloat16()
    exact = copy.deepcopy(low).float()
    with torch.no_grad():
        error = (low(*given) - exact(*given)).norm() / exact(*given).norm()
    assert error < 2e-2, f"relative error {error:.4f}"
    with pytest.raises(AssertionError, match="time must come in fp32"):
        low(given[0], given[1].bfloat16(), given[2])


def test_fp16_is_refused_with_its_reason():
    with pytest.raises(Refusal, match="overflows in fp16"):
        tiny().half()(*inputs())


def test_autocast_computes_in_bf16():
    """As on one device, where trained weights are fp32: the residual stream is bf16."""
    net, given, seen = tiny(), inputs(), []
    net.layers[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(*given).dtype == torch.float32
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("lengths, rows", [((5, 33), 2), ((32, 32), 32)])
def test_every_weight_has_a_gradient(lengths, rows):
    """Also those of the tokens that fill up, zeros where nothing is to be: ranks must agree on what
    has one."""
    net = tiny()
    net(*inputs(lengths, rows, 1 + (rows == 2))).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    still = {name for name, p in net.named_parameters() if not p.grad.any()}
    assert still == (set() if rows == 2 else {"x_pad_token", "cap_pad_token"})


def test_a_blocks_gradient_is_the_derivative():
    """By finite differences in fp64, for two samples of different lengths."""
    net = tiny().double()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, c = draw(2, 4, 12).requires_grad_(), draw(2, 6).requires_grad_()
    rope = rotations(caption_places(4, x.device), (2, 2, 2), 256.0)
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda x, c: net.layers[0](x, rope, (3, 4), c), (x, c))
    assert gradcheck(lambda x: net.context_refiner[0](x, rope, (4, 4)), (x,))


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


def test_a_side_longer_than_the_positions_is_refused():
    net = tiny(cfg=replace(TINY, longest=2))
    with pytest.raises(AssertionError, match="at most 2 patches a side, got 2 x 3"):
        net(*inputs())


# --- text, and the whole way from prompts to a picture -------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3") / "tokenizer.json"
    write_qwen3_tokenizer(path)
    return qwen3_tokenizer(path, 512, pad=False)


def part(golden: dict, name: str) -> dict:
    start = f"weights/{name}/"
    return {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    """Text, transformer, autoencoder, the reference file and its sizes."""
    path = HERE / "golden" / "z_image_pipeline.safetensors"
    golden, about = load_file(path), json.loads(read_metadata(path)["config"])
    sizes = about["text_encoder"]
    cfg = Qwen3Config(
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        groups=sizes["num_key_value_heads"],
        head=sizes["head_dim"],
        hidden=sizes["intermediate_size"],
        taps=(sizes["num_hidden_layers"] - 1,),
        vocabulary=sizes["vocab_size"],
        theta=sizes["rope_theta"],
    )
    qwen3, net = Qwen3(cfg), ZImage(config_of(about["transformer"]), Flow(6.0))
    sizes = about["vae"]
    vae = VAE(
        VAEConfig(
            channels=sizes["z_channels"],
            scale=sizes["scale"],
            shift=sizes["shift"],
            width=sizes["ch"],
            multipliers=tuple(sizes["ch_mult"]),
            blocks=sizes["num_res_blocks"],
            groups=sizes["norm_num_groups"],
        )
    )
    for part_of, name in ((qwen3, "text_encoder"), (net, "transformer"), (vae, "vae")):
        weights = part(golden, name)
        for unread in getattr(part_of, "duplicates", ()):
            weights.pop(unread, None)
        part_of.load_state_dict(weights)
        part_of.requires_grad_(False)
    return ZImageText(qwen3, tokenizer), net, vae, golden, about


def test_captions_are_read_as_the_pipeline_reads_them(pipeline):
    """Ids, lengths and states of two prompts and of their negatives."""
    text, _, _, golden, about = pipeline
    for k, (prompts, name) in enumerate((("prompts", ""), ("negative_prompts", "negative_"))):
        ids, length = text.tokens(about[prompts])
        wanted = golden[f"inputs/{name}attention_mask"]
        assert length.tolist() == about["caption_lengths"][k] == wanted.sum(1).tolist()
        cond = text(about[prompts])
        assert cond["context"].shape == (2, 512, 24) and torch.equal(cond["length"], length)
        for b, n in enumerate(length):
            assert torch.equal(ids[b, :n], golden[f"inputs/{name}input_ids"][b, :n])
            close(cond["context"][b, :n], golden[f"outputs/{name}captions.{b}"])
            assert not cond["context"][b, n:].any(), "zeros behind it"


def test_four_guided_steps_equal_the_pipelines(pipeline):
    """From prompts to the decoded picture. The usual scale of guidance, which this project has
    throughout, is the official one plus 1. The official sampler's times are the schedule's own."""
    text, net, vae, golden, about = pipeline
    near = partial(torch.testing.assert_close, atol=2e-4, rtol=1e-5)
    cond, uncond = text(about["prompts"]), text(about["negative_prompts"])
    times = grid(net.schedule, about["steps"])
    near(torch.tensor([*times, 0.0]), golden["outputs/times"])
    assert about["usual_guidance"] == about["guidance"] + 1
    x_t, t = golden["inputs/noise"], torch.ones(2)
    near(net(x_t, t, cond), golden["outputs/v_cond.0"])
    near(net(x_t, t, uncond), golden["outputs/v_uncond.0"])
    final = sample_ode(net, x_t, cond, times, uncond, about["usual_guidance"])
    near(final, golden["outputs/final_latent"])
    near(sample_ode(net, x_t, cond, times), golden["outputs/final_latent_unguided"])
    near(vae.decode(final), golden["outputs/image"])


def test_a_caption_ends_with_the_assistants_turn(tokenizer):
    """All of klein's ids but the four of its think block, and none to fill up with."""
    prompts = TOKENS["prompts"]
    ids, length = ZImageText(None, tokenizer).tokens([prompt["text"] for prompt in prompts])
    for row, n, prompt in zip(ids, length, prompts, strict=True):
        assert n == prompt["z_image_length"] and row[:n].tolist() == prompt["klein"][:n]


def test_a_caption_is_read_alike_alone_and_among_longer_ones(pipeline):
    text = pipeline[0]
    captions = ["fox", "a red fox and three foxes in the garden by the river " * 3, ""]
    together = text(captions)
    for b, caption in enumerate(captions):
        alone = text([caption])
        assert alone["length"].item() == together["length"][b].item()
        close(alone["context"][0], together["context"][b])
