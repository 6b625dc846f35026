"""Fine-tunes in place of the official denoiser, and LoRAs merged into it, in the layouts that
people have: always the same network, bit for bit; what is something else is said."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALL, make_official

import teachers
from config import Refusal
from engine import results, run
from engine.build import check_base
from engine.start import identities
from engine.views import load_base
from nets.names import stored_as
from nets.quantised import Quantised
from nets.weights import read_metadata, save_weights, shapes_there
from teachers import configure, find
from teachers.bases import base_files
from teachers.merging import parse_merge, read_adapters

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
COMFY = "model.diffusion_model."
TRAINED = [name for name in SMALL if name != "flux-schnell"]
FOREIGN = [name for name in TRAINED if len(SMALL[name].layouts()) > 1]


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for name, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, name, family)


def made(teacher: str) -> dict[str, torch.Tensor]:
    """Weights that 8 bits hold exactly, by their official names."""
    torch.manual_seed(2)
    state = SMALL[teacher].build(1.0).state_dict()
    return {name: torch.randn(x.shape).to(FP8).float() for name, x in state.items()}


def in_other_names(state: dict, table: dict) -> dict[str, torch.Tensor]:
    """As another program writes them: by the table, rows cut or put together, halves swapped."""
    found: dict[str, list] = {}
    for name, x in state.items():
        other = stored_as(table, name)
        x = torch.cat(x.chunk(2)[::-1]) if other.swapped else x
        pieces = x.split(other.rows(len(x))) if other.names[1:] else [x]
        for part, piece in zip(other.names, pieces, strict=True):
            found.setdefault(part, []).append(piece)
    return {name: torch.cat(parts).clone() for name, parts in found.items()}


def in_eight_bits(state: dict, scale: float | None) -> dict[str, torch.Tensor]:
    """Matrices alone, as ComfyUI's files; with a scale, which rounds nothing here, or without."""
    found = {}
    for name, x in state.items():
        wide = x.ndim < 2 or not name.endswith(".weight")
        found[name] = x.bfloat16() if wide else (x / (scale or 1)).to(FP8)
        if scale and not wide:
            found[name.removesuffix("weight") + "scale_weight"] = torch.tensor(scale)
            found[name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
    return found | ({"scaled_fp8": torch.zeros(2).to(FP8)} if scale else {})


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: x for name, x in state.items()}


def cast(state: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) for name, x in state.items()}


def write_shards(state: dict, folder: Path, index: bool) -> Path:
    """Dealt out without any order, in three."""
    folder.mkdir(parents=True)
    names, places = random.Random(0).sample([*state], len(state)), {}
    for k in range(3):
        file = f"diffusion_pytorch_model-{k + 1:05}-of-00003.safetensors"
        save_file({name: state[name] for name in names[k::3]}, folder / file)
        places |= dict.fromkeys(names[k::3], file)
    if index:
        about = json.dumps({"weight_map": places})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(about)
    return folder


def every_layout(teacher: str, place: Path) -> dict[str, Path]:
    """One base, as --base takes it."""
    state, found = made(teacher), {}

    def file(name: str, tensors: dict) -> None:
        found[name] = place / f"{name}.safetensors"
        save_file(tensors, found[name])

    file("fp32", state)
    file("fp16-comfy", prefixed(cast(state, torch.float16), COMFY))
    file("bf16-unet", prefixed(cast(state, torch.bfloat16), "unet."))
    file("fp8", in_eight_bits(state, None))
    file("fp8-scaled", prefixed(in_eight_bits(state, 0.5), COMFY))
    for table in [*SMALL[teacher].layouts().values()][1:]:
        other = in_other_names(state, table)
        inner = "unet" if teacher in ("sdxl", "sd15") else "transformer"
        write_shards(cast(other, torch.float16), place / "pipeline" / inner, index=True)
        found["pipeline"] = place / "pipeline"
        found["shards"] = write_shards(cast(other, torch.bfloat16), place / "shards", index=False)
        file("other-names", prefixed(other, "transformer."))
        file("other-fp8-scaled", in_eight_bits(other, 0.25))
    return found


@pytest.mark.parametrize("teacher", TRAINED)
def test_one_base_in_every_layout_is_the_same_network(teacher, tmp_path):
    """Official names with and without prefixes, other names with rows apart or together and halves
    swapped, folders and shards, five dtypes; whole, and as ranks are dealt it."""
    family, state, dtypes = SMALL[teacher], made(teacher), (torch.float32, torch.bfloat16)
    layouts = every_layout(teacher, tmp_path)
    assert len(layouts) == (9 if teacher in FOREIGN else 5)
    with torch.device("meta"):
        net = family.build(1.0)
    for k, (name, base) in enumerate(layouts.items()):
        paths, dtype = base_files(str(base)), dtypes[k % 2]
        read = dict(family.tensors_of(net, paths, dtype, CPU, ()))
        assert list(read) == list(state)
        for key, x in read.items():
            assert x.dtype == dtype and torch.equal(x, state[key].to(dtype)), (name, key)
    assert check_base(family, {"denoiser": paths}, ()) == []
    whole = family.load(1.0, paths, torch.float32)
    assert all(torch.equal(x, state[key]) for key, x in whole.state_dict().items())


@pytest.mark.parametrize("kind", ["fp8", "other-fp8-scaled"])
def test_a_base_in_eight_bits_is_kept_or_rounded_once(tmp_path, kind):
    """For --base-dtype: bytes as they are where a layer is one of the file's; what is put together
    of several, of different scales, is widened first."""
    layouts, family = every_layout("flux-dev", tmp_path), SMALL["flux-dev"]
    cfg, paths = configure("flux-dev", adapter=2, base_dtype="fp8"), [layouts[kind]]
    stored, state = load_file(layouts[kind]), made("flux-dev")
    net = load_base(cfg, family, paths, torch.float32, CPU)
    table = family.other_names() if kind != "fp8" else {}
    layers = {n: m for n, m in net.named_modules() if isinstance(m, Quantised)}
    for name, layer in layers.items():
        wide, wanted = layer.weight.float() * layer.scale, state[f"{name}.weight"]
        names = stored_as(table, f"{name}.weight").names
        if len(names) == 1:
            assert torch.equal(layer.weight.view(torch.uint8), stored[names[0]].view(torch.uint8))
            assert torch.equal(wide, wanted)
        assert (wide - wanted).abs().max() <= wanted.abs().max() / 16, name
    assert any("qkv" in name for name in layers)


# --- the tables at full size ---------------------------------------------------------------------

PUBLISHED = {  # tensors in diffusers' file, and some of them with their shapes
    "flux-dev": (
        1160,
        {
            "time_text_embed.guidance_embedder.linear_1.weight": [3072, 256],
            "transformer_blocks.18.attn.norm_added_k.weight": [128],
            "transformer_blocks.18.ff.net.0.proj.bias": [12288],
            "single_transformer_blocks.37.attn.to_v.weight": [3072, 3072],
            "single_transformer_blocks.37.proj_mlp.weight": [12288, 3072],
            "norm_out.linear.weight": [6144, 3072],
        },
    ),
    "klein": (
        169,
        {
            "time_guidance_embed.timestep_embedder.linear_2.weight": [3072, 3072],
            "transformer_blocks.4.ff_context.linear_in.weight": [18432, 3072],
            "transformer_blocks.0.attn.add_q_proj.weight": [3072, 3072],
            "single_transformer_blocks.19.attn.to_qkv_mlp_proj.weight": [27648, 3072],
            "single_stream_modulation.linear.weight": [9216, 3072],
        },
    ),
    "sd35-large": (
        1227,
        {
            "pos_embed.pos_embed": [1, 36864, 2432],
            "transformer_blocks.37.norm1_context.linear.weight": [4864, 2432],
            "transformer_blocks.0.attn.to_add_out.bias": [2432],
        },
    ),
    "sd35-medium": (
        909,
        {
            "pos_embed.proj.weight": [1536, 16, 2, 2],
            "transformer_blocks.12.attn2.to_out.0.weight": [1536, 1536],
            "transformer_blocks.12.norm1.linear.weight": [13824, 1536],
        },
    ),
    "sdxl": (
        1680,
        {
            "conv_in.weight": [320, 4, 3, 3],
            "add_embedding.linear_1.weight": [1280, 2816],
            "down_blocks.1.downsamplers.0.conv.weight": [640, 640, 3, 3],
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight": [1280, 2048],
            "mid_block.resnets.1.time_emb_proj.bias": [1280],
            "up_blocks.0.resnets.2.conv_shortcut.weight": [1280, 1920, 1, 1],
            "up_blocks.1.upsamplers.0.conv.weight": [640, 640, 3, 3],
            "up_blocks.2.resnets.0.norm1.weight": [960],
        },
    ),
    "sd15": (
        686,
        {
            "down_blocks.3.resnets.1.conv2.weight": [1280, 1280, 3, 3],
            "down_blocks.0.attentions.0.proj_in.weight": [320, 320, 1, 1],
            "up_blocks.0.upsamplers.0.conv.bias": [1280],
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight": [2560, 320],
            "conv_norm_out.bias": [320],
        },
    ),
}


@pytest.mark.parametrize("teacher", PUBLISHED)
def test_diffusers_layout_has_the_published_names_and_shapes(teacher, monkeypatch):
    """At full size on the meta device: no name of ours is without another, none is twice."""
    monkeypatch.delitem(teachers.FOUND, teacher)
    family = find(teacher)
    with torch.device("meta"):
        state = family.build(1.0).state_dict()
    parts = {name: stored_as(family.layouts()["diffusers'"], name) for name in state}
    every = [name for other in parts.values() for name in other.names]
    wanted, _ = shapes_there(state, parts, dict.fromkeys(every, 1))
    count, some = PUBLISHED[teacher]
    assert len(every) == len(wanted) == count
    same = {name for name in wanted if name in state}
    assert all(name.startswith("context_embedder.") for name in same), same
    assert {name: [*wanted[name].shape] for name in some} == some
    assert {other.names[0] for other in parts.values() if other.swapped} == {
        f"{name}.{leaf}" for name in SWAPPED.get(teacher, ()) for leaf in ("weight", "bias")
    } & {*wanted}


SWAPPED = {  # what is shift, scale here and scale, shift there
    "flux-dev": ["norm_out.linear"],
    "klein": ["norm_out.linear"],
    "sd35-large": ["norm_out.linear", "transformer_blocks.37.norm1_context.linear"],
    "sd35-medium": ["norm_out.linear", "transformer_blocks.23.norm1_context.linear"],
}


# --- single files --------------------------------------------------------------------------------


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


INCLUDED = {  # what precedes the networks in a single file that ComfyUI writes
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}


@pytest.mark.parametrize("teacher", ["sdxl", "sd35-medium", "flux-dev"])
def test_a_single_file_with_its_own_networks_is_read_whole(teacher, tmp_path):
    """VAE and text encoders are its own, no official weights are needed beside it; what trainers
    and mergers left in it is named once, and a UNet alone takes the rest from where it was."""
    family, official, one = find(teacher), tmp_path / "official", tmp_path / "mine.safetensors"
    make_official(teacher, official)
    files, state = family.locate(str(official)), {}
    networks = {*INCLUDED} & {*files}
    for name in networks:
        prefix = family.prefix(name) or INCLUDED[name].replace("first_stage_model.", "vae.")
        for path in files[name]:
            tensors = {
                k.removeprefix(family.prefix(name)): x
                for k, x in load_file(path).items()
                if k.startswith(family.prefix(name))
            }
            state |= prefixed(cast(tensors, torch.float16), prefix)
    state |= prefixed(cast(made(teacher), torch.float16), COMFY)
    left = {
        "model_ema.diffusion_modeloutbias": torch.zeros(3),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    clip = next(
        k for k in sorted(state) if "clip_l" in k or "embedders.0" in k or "cond_stage" in k
    )
    clip = clip[: clip.index("text_model")]
    left |= {clip + "text_model.embeddings.position_ids": torch.arange(77.0)[None]}
    left |= {clip + "text_projection.weight": torch.eye(12)}
    save_file(state | left, one)
    mine = family.locate(str(official), base=str(one))
    assert {name for name, paths in mine.items() if paths == [one]} == {"denoiser", *networks}
    (remark,) = check_base(family, mine, ())
    usual = {*left} - {*family.not_weights}
    assert all(name in remark for name in usual) and f"{len(usual)} names" in remark
    how = (torch.float16, "cpu")
    assert same(family.load_text(mine, *how), family.load_text(files, *how))
    assert same(family.load_vae(mine, *how), family.load_vae(files, *how))
    alone = tmp_path / "alone.safetensors"
    save_file({name: x for name, x in state.items() if name.startswith(COMFY)}, alone)
    parts = family.locate(str(official), base=str(alone))
    assert parts == files | {"denoiser": [alone]} and check_base(family, parts, ()) == []


def test_an_old_clip_is_read(tmp_path):
    """SD 1.5's, before its names had text_model. in them."""
    family, one = SMALL["sd15"], tmp_path / "mine.safetensors"
    make_official("sd15", tmp_path)
    files = family.locate(str(tmp_path))
    state = load_file(files["denoiser"][0])
    save_file(
        {name.replace(".transformer.text_model.", ".transformer."): x for name, x in state.items()},
        one,
    )
    mine = family.locate(str(tmp_path), base=str(one))
    assert mine["clip_l"] == [one] and check_base(family, mine, ()) == []
    assert same(family.load_text(mine), family.load_text(files))


def test_no_prefix_tells_networks_apart_by_their_names(tmp_path):
    """A denoiser with bare names in one file with an autoencoder."""
    family, one = SMALL["sd35-medium"], tmp_path / "mine.safetensors"
    make_official("sd35-medium", tmp_path)
    official = load_file(family.locate(str(tmp_path))["denoiser"][0])
    save_file({name.removeprefix(COMFY): x for name, x in official.items()}, one)
    files = family.locate(str(tmp_path), base=str(one))
    assert files["vae"] == [one] and check_base(family, files, ()) == []
    again = family.load(1.0, files["denoiser"])
    assert same(again, family.load(1.0, family.locate(str(tmp_path))["denoiser"]))


# --- what is something else ----------------------------------------------------------------------


def refusal(family, state: dict, path: Path, metadata: dict | None = None) -> str:
    save_file(state, path, metadata=metadata)
    with pytest.raises(Refusal) as caught:
        check_base(family, {"denoiser": [path]}, ())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_called_by_what_it_looks_like(tmp_path):
    """And what would be taken is said; one name more or less is no other network."""
    family, path, state = SMALL["flux-dev"], tmp_path / "x.safetensors", made("flux-dev")
    for other, words in [
        (made("klein"), "FLUX.2 in its makers' names"),
        (in_other_names(made("klein"), find("klein").other_names()), "FLUX.2 in diffusers' names"),
        (prefixed(made("sd35-large"), COMFY), "SD 3 in its makers' names"),
        (made("sdxl"), "a UNet of SDXL's kind"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(4, 4)}, "a LoRA"),
        ({"decoder.conv_in.weight": torch.zeros(2)}, "an autoencoder"),
        ({"x": torch.zeros(2)}, "which has one name: x"),
    ]:
        said = refusal(family, other, path)
        assert words in said and "takes its makers' or diffusers' names, with or" in said, said
    more = prefixed(state, COMFY) | {COMFY + "img_in.momenta": torch.zeros(1)}
    assert f"and one name more: {COMFY}img_in.momenta;" in refusal(family, more, path)
    less = {name: x for name, x in state.items() if "guidance_in" not in name}
    assert "the network lacks 4 names: guidance_in.in_layer.bias" in refusal(family, less, path)
    blocks = state | {"img_in.weight_scale": torch.ones(3, 5)}
    assert "of scales by blocks" in refusal(family, blocks, path)
    wide = state | {"img_in.weight": torch.zeros(12, 17)}
    assert "img_in.weight has shape [12, 17]" in refusal(family, wide, path)
    for data, words in [
        (b"", "it is empty"),
        (b"GGUF\x03", "this is GGUF"),
        (b"<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04", "torch.save wrote this"),
    ]:
        path.write_bytes(data)
        with pytest.raises(Refusal, match=words):
            check_base(family, {"denoiser": [path]}, ())


def test_a_folder_that_is_no_base_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        base_files(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="has no safetensors file; --base takes"):
        base_files(str(tmp_path))
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(Refusal, match=r"several files \(a.safetensors, b.safetensors\); give one"):
        base_files(str(tmp_path))
    folder = write_shards(made("sd15"), tmp_path / "unet", index=False)
    assert len(base_files(str(tmp_path))) == 3
    next(folder.glob("*00002-of*")).unlink()
    with pytest.raises(FileNotFoundError, match="has 2 of 3 shards"):
        base_files(str(tmp_path))


@pytest.mark.parametrize(
    "tensors, metadata, seen",
    [
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, "v_pred, ztsnr"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, {}, "edm_mean, edm_std"),
        ({"edm_vpred.sigma_max": torch.ones(())}, {}, "edm_vpred.sigma_max"),
        ({}, {"modelspec.prediction_type": "v"}, "modelspec.prediction_type: v"),
        ({}, {"ss_v_parameterization": "True"}, "ss_v_parameterization: True"),
        ({}, {"ss_zero_terminal_snr": "True"}, "ss_zero_terminal_snr: True"),
        ({}, {"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}, "v1-refiner"),
        ({}, {"modelspec.architecture": "flux-1-dev"}, "modelspec.architecture: flux-1-dev"),
    ],
)
def test_a_unet_that_predicts_something_else_is_refused_with_what_was_seen(
    tmp_path, tensors, metadata, seen
):
    state = prefixed(made("sdxl"), COMFY)
    said = refusal(SMALL["sdxl"], state | tensors, tmp_path / "x.safetensors", metadata)
    assert "is no model that predicts noise as sdxl does" in said and seen in said


def test_a_scheduler_beside_a_unet_says_what_it_predicts(tmp_path):
    """And metadata of the usual kind are no obstacle."""
    family = SMALL["sdxl"]
    folder = write_shards(made("sdxl"), tmp_path / "unet", index=True)
    about, config = tmp_path / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"}
    about.parent.mkdir()
    files = {"denoiser": base_files(str(tmp_path))}
    about.write_text(json.dumps(config))
    assert check_base(family, files, ()) == []
    for key, value, words in [
        ("prediction_type", "v_prediction", "prediction_type v_prediction"),
        ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr true"),
        ("_class_name", "EDMEulerScheduler", "EDMEulerScheduler"),
    ]:
        about.write_text(json.dumps(config | {key: value}))
        with pytest.raises(Refusal, match=f"scheduler_config.json: {words}"):
            check_base(family, files, ())
    about.unlink()
    usual = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "licence": "free"}
    usual |= {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}
    save_file(made("sdxl"), folder / "one.safetensors", metadata=usual)
    assert check_base(family, {"denoiser": [folder / "one.safetensors"]}, ()) == []


# --- LoRAs ---------------------------------------------------------------------------------------


def adapter(net: torch.nn.Module, seed: int, rank: int = 2) -> dict:
    """A and B of all its layers."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, layer in net.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            out, size = len(layer.weight), layer.weight[0].numel()
            down = torch.randn(rank, size, generator=draw)
            found[name] = down, torch.randn(out, rank, generator=draw)
    return found


def as_file(net, added: dict, table: dict, start: str, ends: str, alpha: float | None):
    """Under another set of names, q, k, v apart or as one, whatever that set has."""
    kohya, found = start == "lora_unet_", {}
    up_end, down_end = {
        "AB": (".lora_B.weight", ".lora_A.weight"),
        "up": (".lora_up.weight", ".lora_down.weight"),
    }[ends]
    groups: dict[tuple, list] = {}
    for name in added:
        groups.setdefault(stored_as(table, name + ".weight").names, []).append(name)
    for theirs, ours in groups.items():
        other = stored_as(table, ours[0] + ".weight")
        down = added[ours[0]][0]
        up = torch.cat([added[name][1] for name in ours])
        up = torch.cat(up.chunk(2)[::-1]) if other.swapped else up
        kernel = net.get_submodule(ours[0]).weight.shape[1:]
        for part, piece in zip(theirs, up.split(other.rows(len(up))), strict=True):
            key = part.removesuffix(".weight")
            key = start + (key.replace(".", "_") if kohya else key)
            found[key + down_end] = down.unflatten(1, kernel).clone()
            found[key + up_end] = piece.reshape(len(piece), -1, *[1] * (len(kernel) - 1)).clone()
            if alpha is not None:
                found[key + ".alpha"] = torch.tensor(alpha)
    return found


WRITERS = [  # what precedes a layer's name, what A and B are called, alpha at rank 2
    ("lora_unet_", "up", 1.0),
    ("diffusion_model.", "AB", None),
    ("transformer.", "AB", 4.0),
    ("unet.", "up", None),
    ("", "AB", None),
]


@pytest.mark.parametrize("teacher", [name for name in TRAINED if name != "sd15"])
def test_a_lora_is_merged_under_every_set_of_names(teacher, tmp_path):
    """W + scale alpha / rank B A in fp32, rounded once: to bf16, from a file in fp32. All layers,
    not those of the blocks alone; where theirs has q, k, v as one, these share A."""
    family, base, path = SMALL[teacher], tmp_path / "base", tmp_path / "lora"
    with torch.device("meta"):
        net = family.build(1.0)
    state = made(teacher)
    save_file(state, base)
    added = adapter(net, 0)
    for q in [name for name in added if name.endswith("attention.to_q")]:  # Z-Image's, ComfyUI's
        for x in "kv":
            added[q[:-1] + x] = added[q][0], added[q[:-1] + x][1]
    for table in family.layouts().values():
        for start, ends, alpha in WRITERS if teacher == "klein" else WRITERS[:2]:
            save_file(as_file(net, added, table, start, ends, alpha), path)
            scale = 0.5 * (1.0 if alpha is None else alpha / 2)
            for name, x in family.tensors_of(net, base, torch.bfloat16, CPU, [f"{path}:0.5"]):
                wanted, layer = state[name], name.removesuffix(".weight")
                if layer in added and layer != name:
                    down, up = added[layer]
                    wanted = wanted + (scale * up @ down).view_as(wanted)
                wanted = wanted.bfloat16()  # products' last bits decide a tie now and then
                assert torch.allclose(x.float(), wanted.float(), rtol=2**-8, atol=0), (start, name)
                assert (x == wanted).float().mean() > 0.99, (start, name)


@pytest.fixture
def flux(tmp_path):
    """The form of the small FLUX.1, its base, and two LoRAs in diffusers' names."""
    family = SMALL["flux-dev"]
    with torch.device("meta"):
        net = family.build(1.0)
    save_file(made("flux-dev"), tmp_path / "base")
    for k in (0, 1):
        state = as_file(net, adapter(net, k), family.other_names(), "transformer.", "AB", None)
        save_file(state, tmp_path / f"lora-{k}.safetensors")
    return family, net, tmp_path


def test_several_loras_add_up_in_any_order(flux):
    """The sum of their deltas, rounded once with the weight; scales as given."""
    family, net, place = flux
    one, two = (f"{place}/lora-{k}.safetensors" for k in (0, 1))
    deltas = [read_adapters(Path(file), family.known(), net) for file in (one, two)]
    orders = [[f"{one}:0.25", f"{two}:-1"], [f"{two}:-1", f"{one}:0.25"]]
    reads = [dict(family.tensors_of(net, place / "base", torch.float32, CPU, x)) for x in orders]
    for name, weight in made("flux-dev").items():
        torch.testing.assert_close(reads[0][name], reads[1][name], atol=1e-5, rtol=1e-6)
        if (layer := name.removesuffix(".weight")) in deltas[0] and layer != name:
            (a, b), (c, d) = (delta[layer] for delta in deltas)
            wanted = weight + (0.25 * (b @ a) - d @ c).view_as(weight)
            torch.testing.assert_close(reads[0][name], wanted, atol=1e-5, rtol=1e-6)


def test_a_lora_of_a_part_of_a_fused_layer_leaves_the_rest(flux):
    """q alone, of q, k, v and MLP in one."""
    family, net, place = flux
    state = load_file(place / "lora-0.safetensors")
    key = "transformer.single_transformer_blocks.1.attn.to_q"
    only = {name: x for name, x in state.items() if name.startswith(key)}
    save_file(only, place / "q")
    (layer,) = (added := read_adapters(place / "q", family.known(), net))
    product = added[layer][1] @ added[layer][0]
    assert layer == "single_blocks.1.linear1" and product.shape == (7 * 12, 12)
    q = only[f"{key}.lora_B.weight"] @ only[f"{key}.lora_A.weight"]
    assert torch.equal(product[:12], q) and not product[12:].any()


def test_a_lora_that_does_not_fit_is_refused_by_its_keys(flux):
    family, net, place = flux
    state, path = load_file(place / "lora-0.safetensors"), place / "x.safetensors"
    key = "transformer.proj_out.lora_A.weight"
    klein = SMALL["klein"].build(1.0)
    for change, words in [
        ({"transformer.blocks.0.lora_A.weight": torch.zeros(2, 2)}, "called transformer.blocks.0"),
        ({"transformer.x_embedder.dora_scale": torch.ones(1)}, "x_embedder.dora_scale"),
        ({key: torch.zeros(2, 5)}, "does not fit transformer.proj_out of flux-dev"),
        ({key: None}, "nothing is called transformer.proj_out with A or B alone"),
    ]:
        save_file({name: x for name, x in (state | change).items() if x is not None}, path)
        with pytest.raises(Refusal, match=words):
            read_adapters(path, family.known(), net)
    save_file(as_file(klein, adapter(klein, 0), {}, "lora_unet_", "up", 1.0), path)
    with pytest.raises(Refusal, match=r"no LoRA of flux-dev: nothing is called lora.*and \d+ more"):
        read_adapters(path, family.known(), net)
    save_file(made("flux-dev"), path)
    with pytest.raises(Refusal, match="no LoRA of flux-dev: its first name is double_blocks.0"):
        read_adapters(path, family.known(), net)
    for text, words in [("x:y", "y is no number"), (f"{path}:nan", "a finite number")]:
        with pytest.raises(Refusal, match=words):
            parse_merge(f"{place}/{text}" if text[0] == "x" and text[1] == ":" else text)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        parse_merge(f"{place}/nowhere.safetensors:0.5")
    (place / "a:0.5").write_bytes(path.read_bytes())
    assert parse_merge(f"{place}/a:0.5") == (place / "a:0.5", 1.0)


def test_a_loras_text_encoders_are_named_and_its_metadatas_alpha_is_heeded(flux):
    family, net, place = flux
    state, path = load_file(place / "lora-0.safetensors"), place / "x.safetensors"
    text = {f"lora_te1_text_model_{k}.lora_up.weight": torch.zeros(2, 2) for k in range(7)}
    about = {"transformer.r": 2, "transformer.lora_alpha": 8}
    save_file(state | text, path, metadata={"lora_adapter_metadata": json.dumps(about)})
    files = {"denoiser": [place / "base"]}
    (remark,) = check_base(family, files, [str(path)])
    assert "for text encoders, and not merged: 7 names: lora_te1_text_model_0" in remark
    plain = read_adapters(place / "lora-0.safetensors", family.known(), net)
    for name, (_, up) in read_adapters(path, family.known(), net).items():
        assert torch.equal(up, 4 * plain[name][1])


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_base_alone(tmp_path):
    """Wherever that lies now, in whatever order its LoRAs are named; both are named otherwise."""
    family, place = SMALL["sd15"], tmp_path / "mine.safetensors"
    make_official("sd15", tmp_path)
    with torch.device("meta"):
        net = family.build(1.0)
    save_file(made("sd15"), place)
    loras = [str(tmp_path / f"{k}.lora") for k in (0, 1)]
    for k, lora in enumerate(loras):
        save_file(as_file(net, adapter(net, k), {}, "lora_unet_", "up", None), lora)

    def begin(base, merge=()):
        cfg = configure("sd15", weights=str(tmp_path), out=str(tmp_path / "run"), base=str(base))
        cfg = dataclasses.replace(cfg, merge=tuple(merge))
        settings = run.settings_of(cfg, identities(cfg, family), {})
        run.check_run(cfg, tmp_path / "run", settings)
        run.begin(tmp_path / "run", settings, overwrite=False)
        return settings["parts"]["denoiser"]["digest"]

    first = begin(place, [f"{loras[0]}:0.5", loras[1]])
    moved = place.rename(tmp_path / "moved.safetensors")
    assert begin(moved, [loras[1], f"{loras[0]}:0.50"]) == first
    for base, merge in [(moved, loras), (moved, ()), ("", ())]:
        named = str(base) or "the official file"
        with pytest.raises(
            Refusal, match=f"the weights of the denoiser: {moved} {first[:16]}"
        ) as e:
            begin(base, merge)
        assert f" -> {named} " in str(e.value) and "--overwrite" in str(e.value)


@pytest.mark.parametrize("layout", ["official", "in eight bits", "diffusers'"])
def test_a_merged_full_file_keeps_what_the_base_says_of_itself(tmp_path, monkeypatch, layout):
    """Every entry that is not the student's own, licence included, and the other networks. Under
    other names, the official file's other networks, with which it was trained."""
    family, base = SMALL["sdxl"], tmp_path / "mine.safetensors"
    make_official("sdxl", tmp_path)
    state = load_file(family.locate(str(tmp_path))["denoiser"][0])
    said = {"modelspec.license": "CreativeML", "modelspec.author": "me", "merged_from": "a, b"}
    kept = dict(state)
    if layout == "in eight bits":
        state = state | prefixed(in_eight_bits(made("sdxl"), 0.5), COMFY)
    if layout == "diffusers'":
        state = in_other_names(made("sdxl"), family.layouts()["diffusers'"])
    average = {"model_ema.diffusion_modelx": torch.zeros(2), "model_ema.decay": torch.zeros(())}
    average = {} if layout == "diffusers'" else average
    save_file(state | average, base, metadata=said | {"modelspec.hash_sha256": "0xold"})
    student = tmp_path / "student.safetensors"
    net = family.load(1.0, base).float()
    save_weights(net, student, torch.bfloat16, {}, COMFY)
    cfg = configure("sdxl", weights=str(tmp_path), base=str(base), export="full")
    results.merge(cfg, None, student, {"teacher": "sdxl", "modelspec.title": "a student"})
    full = tmp_path / "full.safetensors"
    about = said | {"teacher": "sdxl", "modelspec.title": "a student"}
    assert read_metadata(full) == about
    found, learnt = load_file(full), load_file(student)
    assert found.keys() == kept.keys() | ({"model_ema.decay"} & {*average})
    for name, x in found.items():
        wanted = learnt[name] if name.startswith(COMFY) else (kept | average)[name]
        assert torch.equal(x.float(), wanted.float()), name
