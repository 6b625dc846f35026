"""Vision networks against reference numbers: DINOv2 in both layouts, CLIP's two towers in both.

The reference networks are small, with random weights in official names, made with an independent
implementation; their fp32 agreement among themselves is 3e-6, a wrong formula is off by 3e-4.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import nn

from digits import ASSETS
from measure.scorers import SCORERS
from nets.clip import CLIP, TEXT_TOWER, VISION_TOWER, CLIPConfig, quick_gelu, to_open_clip
from nets.text import token_ids
from nets.vision import (
    CLIP_OPEN_TEXT,
    CLIP_OTHERS,
    CLIP_VIT_GIANT,
    CLIP_VIT_HUGE,
    CLIP_VIT_LARGE,
    CLIP_VIT_LARGE_TEXT,
    DINOV2_LARGE,
    POSITIONS,
    CLIPVision,
    CLIPVisionConfig,
    ViT,
    ViTConfig,
    hf_names,
    load_clip_text,
    load_clip_vision,
    load_vit,
)
from nets.weights import read_metadata
from teachers import find

HERE = Path(__file__).parent
SMALL = ViTConfig(patch=14, width=32, depth=4, heads=4, grid=5, hooks=(0, 2, 3))


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def golden(name):
    return load_file(HERE / "golden" / f"{name}.safetensors")


def weights_of(tensors, folder):
    """The weights in a reference file, as a file of their own."""
    path = folder / "model.safetensors"
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    save_file(weights, path)
    return path


def picture(pixels, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """What in [0, 1] standardises to these pixels."""
    return pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]


def random_vit(cfg=SMALL, seed=0):
    torch.manual_seed(seed)
    vit = ViT(cfg)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return vit.requires_grad_(False)


def official(name):
    manifest = json.loads((HERE / "manifests" / f"{name}.json").read_text())
    return {tensor: shape for tensor, (_, shape) in manifest.items()}


def shapes(net):
    return {name: list(tensor.shape) for name, tensor in net.state_dict().items()}


# --- DINOv2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "timm"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_dinov2_equals_the_reference(layout, positions, tmp_path):
    """A grid of 4 x 7 from a table of 5 x 5: the four ways to stretch it are .15 to .22 apart."""
    reference = golden(f"dinov2_{layout}")
    path = weights_of(reference, tmp_path)
    vit = load_vit(replace(SMALL, positions=positions), path)
    close(vit.positions(4, 7), reference[f"outputs/{positions}.pos_embed"])
    image = picture(reference["inputs/pixel_values"])
    close(vit(image), reference[f"outputs/{positions}.last_hidden_state"])
    native = picture(reference["inputs/pixel_values_native"])
    close(vit(native), reference["outputs/native.last_hidden_state"])


@pytest.mark.parametrize("positions", ["senseflow", "hf"])
def test_every_block_of_dinov2_equals_the_reference(positions, tmp_path):
    reference = golden("dinov2_timm")
    cfg = replace(SMALL, positions=positions, hooks=(0, 1, 2, 3))
    vit = load_vit(cfg, weights_of(reference, tmp_path))
    kept, last = vit.tokens(picture(reference["inputs/pixel_values"]))
    close(kept[0], reference[f"outputs/{positions}.embeddings"])
    for k in range(4):
        close(kept[1 + k], reference[f"outputs/{positions}.blocks.{k}"])
    assert last is kept[-1]


def test_what_the_discriminator_reads_equals_the_reference(tmp_path):
    """Before block 0 and after blocks 0, 2, 3, without final norm, class token added."""
    reference = golden("dinov2_hf")
    vit = load_vit(SMALL, weights_of(reference, tmp_path))
    maps = vit.maps(picture(reference["inputs/pixel_values"]))
    for got, name in zip(maps, ("pos_drop", "0", "2", "3"), strict=True):
        assert got.shape == (2, 32, 4, 7)
        close(got.flatten(2), reference[f"outputs/senseflow.readout.{name}"])


def test_dinov2s_names_and_shapes_are_those_of_both_official_files():
    """At full size, without memory. Of query, key and value each holds a third of our rows."""
    with torch.device("meta"):
        vit = ViT(DINOV2_LARGE)
    ours = shapes(vit)
    assert ours == official("dinov2_large_timm")
    theirs = official("dinov2_large_hf")
    assert theirs.pop("embeddings.mask_token") == [1, 1024]
    for name, shape in ours.items():
        parts = [theirs.pop(part) for part in hf_names(name)]
        assert len(parts) == (3 if "qkv" in name else 1)
        assert [sum(part[0] for part in parts), *parts[0][1:]] == shape, name
    assert not theirs, "tensors of the official file that nothing of ours is made from"
    assert DINOV2_LARGE.hooks == (2, 5, 8, 10, 14, 19, 23)


def as_hf(vit):
    """A ViT's weights in the other layout, written out by hand."""
    named = {
        "embeddings.cls_token": vit.cls_token,
        "embeddings.mask_token": torch.randn(1, vit.cfg.width),
        "embeddings.position_embeddings": vit.pos_embed,
        "embeddings.patch_embeddings.projection.weight": vit.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": vit.patch_embed.proj.bias,
        "layernorm.weight": vit.norm.weight,
        "layernorm.bias": vit.norm.bias,
    }
    for i, block in enumerate(vit.blocks):
        here = f"encoder.layer.{i}"
        for leaf in ("weight", "bias"):
            qkv = getattr(block.attn.qkv, leaf).chunk(3)
            for part, tensor in zip(("query", "key", "value"), qkv, strict=True):
                named[f"{here}.attention.attention.{part}.{leaf}"] = tensor
            named[f"{here}.attention.output.dense.{leaf}"] = getattr(block.attn.proj, leaf)
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                named[f"{here}.{layer}.{leaf}"] = getattr(block.get_submodule(layer), leaf)
        named[f"{here}.layer_scale1.lambda1"] = block.ls1.gamma
        named[f"{here}.layer_scale2.lambda1"] = block.ls2.gamma
    return {name: tensor.clone() for name, tensor in named.items()}


def test_both_layouts_of_one_network_load_bit_for_bit(tmp_path):
    vit = random_vit()
    for name, tensors in {"timm": vit.state_dict(), "hf": as_hf(vit)}.items():
        save_file(tensors, tmp_path / name)
        got = load_vit(SMALL, tmp_path / name)
        assert not any(p.requires_grad or p.is_meta for p in got.parameters())
        for key, tensor in got.state_dict().items():
            assert torch.equal(tensor, vit.state_dict()[key]), f"{key} from {name}"


def without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


KEY = "encoder.layer.1.attention.attention.key.weight"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: without(t, KEY), f"the network lacks one name: {KEY}; give a file that has all"),
        (
            lambda t: t | {"head.weight": torch.zeros(2)},
            "this is the network and one name more: head.weight; give",
        ),
        (lambda t: t | {KEY: torch.zeros(96, 32)}, f"{KEY} has shape [96, 32], the network wants"),
        (lambda t: {"norm.weight": t["layernorm.weight"]}, "61 names missing (blocks.0.attn.proj"),
    ],
    ids=["missing", "unexpected", "shape", "neither layout"],
)
def test_a_file_of_another_network_is_refused(change, named, tmp_path):
    save_file(change(as_hf(random_vit())), tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_vit(SMALL, tmp_path / "model.safetensors")
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("height, width", [(57, 100), (14, 14), (33, 47)])
def test_any_resolution_is_rounded_down_to_whole_patches(batch, height, width):
    """Pixels beyond the last whole patch, right and below, change nothing."""
    vit = random_vit()
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = height // 14, width // 14
    maps = vit.maps(image)
    assert [tuple(x.shape) for x in maps] == 4 * [(batch, 32, rows, columns)]
    for x, cut in zip(maps, vit.maps(image[..., : 14 * rows, : 14 * columns]), strict=True):
        assert torch.equal(x, cut)
    close(vit.maps(image[-1:])[-1], maps[-1][-1:])  # an image is read alike alone and among others


@pytest.mark.parametrize("how", ["loaded", "cast"])
def test_a_bf16_backbone_is_close_to_fp32(how, tmp_path):
    """Every map within two percent of its norm; positions and standardised pixels are fp32 before
    they are cast."""
    reference = golden("dinov2_timm")
    path = weights_of(reference, tmp_path)
    full = load_vit(SMALL, path)
    low = (
        load_vit(SMALL, path, torch.bfloat16)
        if how == "loaded"
        else load_vit(SMALL, path).bfloat16()
    )
    image = picture(reference["inputs/pixel_values"])
    for got, wanted in zip(low.maps(image), full.maps(image), strict=True):
        assert got.dtype == torch.bfloat16
        error = (got.float() - wanted).norm() / wanted.norm()
        assert error < 0.02, f"{error:.4f}"


def test_recomputation_keeps_less_and_gives_the_same_gradient():
    """Bit for bit; a block runs once more in the backward pass, and only there."""
    image = torch.rand(2, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    gradients, runs, kept = [], [], []

    def count(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for recompute in (False, True):
        vit, pixels = random_vit(replace(SMALL, recompute=recompute)), image.clone()
        runs.append(0)
        for block in vit.blocks:
            block.register_forward_pre_hook(lambda *_: runs.append(runs.pop() + 1))
        vit.maps(pixels)
        assert runs[-1] == 4, "without a gradient there is nothing to run again"
        pixels.requires_grad_()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            maps = vit.maps(pixels)
        sum(x.square().mean() for x in maps).backward()
        gradients.append(pixels.grad)
    assert runs == [8, 12]
    assert gradients[0].norm() > 0 and torch.equal(*gradients)
    assert kept[1] < kept[0] / 3, f"numbers kept, of which patches and pixels 36k: {kept}"


def test_the_embedded_backbone_is_the_same_class_at_another_size():
    vit = load_vit(find("digits").backbone(), ASSETS / "backbone.safetensors", torch.bfloat16)
    assert vit.cfg == find("digits").backbone() and not find("digits").backbone().recompute
    assert vit.cls_token.dtype == torch.bfloat16
    assert [tuple(x.shape) for x in vit.maps(torch.rand(2, 3, 16, 16))] == 3 * [(2, 64, 8, 8)]


# --- CLIP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The reference, a file of its weights, and the sizes of both towers."""
    reference = golden("clip_vit")
    path = weights_of(reference, tmp_path_factory.mktemp("clip"))
    size = json.loads(read_metadata(HERE / "golden" / "clip_vit.safetensors")["config"])
    vision, text = size["vision"], size["text"]
    vision_cfg = CLIPVisionConfig(
        patch=vision["patch_size"],
        grid=vision["image_size"] // vision["patch_size"],
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        hidden=vision["intermediate_size"],
        embedding=size["projection_dim"],
    )
    text_cfg = CLIPConfig(
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        hidden=text["intermediate_size"],
        activation=quick_gelu,
        projected=True,
        length=text["max_position_embeddings"],
        vocabulary=text["vocab_size"],
        embedding=size["projection_dim"],
    )
    image = picture(reference["inputs/pixel_values"], size["image_mean"], size["image_std"])
    return reference, path, vision_cfg, text_cfg, image


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """A vocab.json of single bytes, and a merges.txt without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder / "vocab.json", folder / "merges.txt"


def test_clips_vision_tower_equals_the_reference(clip):
    """Every block, and the embedding, normalised."""
    reference, path, cfg, _, image = clip
    net = load_clip_vision(path, cfg=cfg)
    for i, state in enumerate(net.states(image)):
        close(state, reference[f"outputs/vision.hidden_states.{i}"])
    assert i == cfg.depth
    close(net(image), reference["outputs/image_embeds_normalised"])


def test_clips_text_tower_equals_the_reference(clip, tokenizer_files):
    """The end token's state, projected to another width, then normalised."""
    reference, path, _, cfg, _ = clip
    net = load_clip_text(path, *tokenizer_files, cfg=cfg)
    ids = reference["inputs/input_ids"]
    close(net.clip(ids)[2], reference["outputs/text_embeds"])
    close(net.encode(ids), reference["outputs/text_embeds_normalised"])


def test_clips_names_and_shapes_are_those_of_the_official_file():
    """Both towers at full size; what is left over in the file is no weight of theirs."""
    with torch.device("meta"):
        ours = shapes(CLIP(CLIP_VIT_LARGE_TEXT)) | shapes(CLIPVision(CLIP_VIT_LARGE))
    theirs = official("clip_vit_large_patch14")
    assert {name for name in theirs if name not in ours} == set(CLIP_OTHERS)
    assert ours == {name: shape for name, shape in theirs.items() if name in ours}


def test_open_clips_towers_equal_the_reference(tokenizer_files, tmp_path):
    """Both towers out of a file with open_clip's names: GELU, a hidden width of no whole ratio."""
    reference = golden("open_clip_vit")
    path = weights_of(reference, tmp_path)
    vision = CLIPVisionConfig(14, 2, 32, 2, 2, 139, embedding=20, activation=F.gelu)
    close(
        load_clip_vision(path, cfg=vision)(reference["inputs/image"]),
        reference["outputs/image_embeds_normalised"],
    )
    text = CLIPConfig(24, 2, 2, 96, F.gelu, True, length=12, vocabulary=50, embedding=20)
    net = load_clip_text(path, *tokenizer_files, cfg=text)
    close(net.encode(reference["inputs/input_ids"]), reference["outputs/text_embeds_normalised"])


@pytest.mark.parametrize("cfg, name", [(CLIP_VIT_HUGE, "h"), (CLIP_VIT_GIANT, "g")])
def test_open_clips_names_and_shapes_at_full_size(cfg, name):
    """Both towers, as open_clip 3.3 builds them; `logit_scale` is all that is left over."""
    with torch.device("meta"):
        text, vision = CLIP(CLIP_OPEN_TEXT), CLIPVision(cfg)
    ours = to_open_clip(text.state_dict(), CLIP_OPEN_TEXT.depth, TEXT_TOWER)
    ours |= to_open_clip(vision.state_dict(), cfg.depth, VISION_TOWER)
    theirs = official(f"open_clip_vit_{name}")
    assert theirs.pop("logit_scale") == []
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == theirs


def test_open_clips_towers_have_its_heads_and_activation():
    """What shapes do not show: heads of 80, 88 and 64 channels in open_clip's published sizes, and
    GELU where OpenAI's towers have its quick approximation."""
    channels = [cfg.width // cfg.heads for cfg in (CLIP_VIT_HUGE, CLIP_VIT_GIANT, CLIP_OPEN_TEXT)]
    assert channels == [80, 88, 64]
    for cfg in (CLIP_VIT_HUGE, CLIP_VIT_GIANT, CLIP_OPEN_TEXT):
        assert cfg.activation is F.gelu
    for cfg in (CLIP_VIT_LARGE, CLIP_VIT_LARGE_TEXT):
        assert cfg.activation is quick_gelu and cfg.width // cfg.heads == 64
    for title in ("CLIP-H", "PickScore", "HPSv2"):
        assert SCORERS[title].vision == CLIP_VIT_HUGE and SCORERS[title].text == CLIP_OPEN_TEXT
    assert SCORERS["CLIP-g"].vision == CLIP_VIT_GIANT


def test_a_tower_is_read_out_of_a_file_that_is_clips_alone(clip, tmp_path):
    """What neither tower nor the table of known others names is refused, as is a tensor missing."""
    reference, path, cfg, _, _ = clip
    save_file(load_file(path) | {"lora.weight": torch.zeros(2)}, tmp_path / "more")
    with pytest.raises(ValueError, match="one name more: lora.weight"):
        load_clip_vision(tmp_path / "more", cfg=cfg)
    save_file(without(load_file(path), "visual_projection.weight"), tmp_path / "less")
    with pytest.raises(ValueError, match="lacks one name: visual_projection.weight"):
        load_clip_vision(tmp_path / "less", cfg=cfg)


def test_clip_takes_images_of_its_own_size_alone(clip):
    _, path, cfg, _, image = clip
    with pytest.raises(AssertionError, match="CLIP reads 35 x 35"):
        load_clip_vision(path, cfg=cfg)(image[..., :28])


def test_captions_become_unit_vectors_alike_alone_and_among_others(tokenizer_files, tmp_path):
    cfg = CLIPConfig(12, 2, 2, 24, quick_gelu, projected=True, vocabulary=514, embedding=8)
    torch.manual_seed(0)
    save_file(CLIP(cfg).state_dict(), tmp_path / "model.safetensors")
    for dtype, atol in ((torch.float32, 2e-5), (torch.bfloat16, 0.03)):
        net = load_clip_text(tmp_path / "model.safetensors", *tokenizer_files, dtype, cfg=cfg)
        captions = ["a red digit", "", "three"]
        got = net.embedding(captions)
        assert got.shape == (3, 8) and got.dtype == torch.float32 and not got.requires_grad
        close(got.norm(dim=-1), torch.ones(3))
        assert token_ids(net.tokenizer, captions).shape == (3, 77)
        for b, caption in enumerate(captions):
            alone = net.embedding([caption])
            torch.testing.assert_close(alone, got[b : b + 1], atol=atol, rtol=0)
        assert not torch.allclose(got[0], got[1], atol=0.05)


def test_clip_in_bf16_is_close_to_fp32(clip):
    """Unit vectors within five percent, and fp32 when they come out."""
    _, path, cfg, _, image = clip
    full, low = (
        load_clip_vision(path, dtype, cfg=cfg)(image) for dtype in (torch.float32, torch.bfloat16)
    )
    assert low.dtype == torch.float32
    assert (low - full).norm(dim=-1).max() < 0.05
