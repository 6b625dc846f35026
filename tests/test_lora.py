"""LoRA files: names and shapes at full size, and what runs with adapters leave and take up."""

import json
import shutil
from functools import cache
from pathlib import Path

import processes
import pytest
import torch
from conftest import refused
from own import flags_of
from safetensors.torch import load_file, save_file
from small import SMALL, make_official

import sample
import teachers
import train
from adapter import Pairs, adapted, aim, anywhere, layers, merged, pairs
from engine.calls import conditioning
from engine.views import view_of
from nets.names import renamed
from teachers import find
from teachers.lora import format_of, lora_tensors, read_lora
from teachers.students import load_student

MANIFESTS = Path(__file__).parent / "manifests"
FULL = {  # manifest, prefix in it, the format that most programs read
    "flux-dev": ("flux1-dev", "", "kohya"),
    "sd35-large": ("sd3.5_large", "model.diffusion_model.", "diffusers"),
    "sd35-medium": ("sd3.5_medium", "model.diffusion_model.", "diffusers"),
    "sdxl": ("sd_xl_base_1.0", "model.diffusion_model.", "kohya"),
    "sd15": ("v1-5-pruned-emaonly", "model.diffusion_model.", "kohya"),
}


@cache
def at_full_size(teacher, rank):
    """The base and one view, on the meta device."""
    family = find(teacher)
    with torch.device("meta"):
        base = family.build(1.0).to(torch.bfloat16)
        where = {n: m for n, m in layers(base).items() if not n.startswith(family.not_adapted)}
        return family, base, adapted(base, where, rank)


def official(teacher):
    """Shapes by name, as the maker's file has them."""
    file, prefix, _ = FULL[teacher]
    listed = json.loads((MANIFESTS / f"{file}.json").read_text()).items()
    return {n.removeprefix(prefix): tuple(x) for n, (_, x) in listed if n.startswith(prefix)}


@pytest.mark.parametrize("teacher", FULL)
def test_a_lora_has_the_names_that_programs_read_at_full_size(teacher):
    """Each of its layers is one of the official file; kohya's and ComfyUI's names are the official
    ones, diffusers' split q, k, v. Each product B A has the shape of the weight that it is for."""
    family, base, view = at_full_size(teacher, 4)
    shapes, added = official(teacher), pairs(view)
    assert format_of(family, "own") == FULL[teacher][2]
    for kind in ("kohya", "comfyui", "diffusers") if family.other_names() else ("kohya", "comfyui"):
        with torch.device("meta"):
            tensors = lora_tensors(family, kind, added, base)
        ends = (".lora_down.weight", ".lora_up.weight")
        ends = ends if kind == "kohya" else (".lora_A.weight", ".lora_B.weight")
        keys = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
        alphas = {f"{key}.alpha" for key in keys if kind == "kohya"}
        assert set(tensors) == {key + end for key in keys for end in ends} | alphas
        total = sum(tensors[k + ends[1]].shape[0] * tensors[k + ends[0]][0].numel() for k in keys)
        wanted = [shapes[f"{name}.weight"] for name in added]
        assert total == sum(torch.Size(shape).numel() for shape in wanted)
        if kind == "diffusers":
            continue
        start = "lora_unet_" if kind == "kohya" else "diffusion_model."
        dots = (lambda n: n.replace(".", "_")) if kind == "kohya" else (lambda n: n)
        known = {start + dots(name.removesuffix(".weight")): x for name, x in shapes.items()}
        for key in keys:
            down, up, shape = tensors[key + ends[0]].shape, tensors[key + ends[1]].shape, known[key]
            assert (up[0], *down[1:]) == shape and up[1] == down[0] == 4, key


DIFFUSERS = {  # as the makers of diffusers publish them: rows, channels in
    "flux-dev": {
        "transformer_blocks.18.attn.to_q": (3072, 3072),
        "transformer_blocks.0.attn.add_v_proj": (3072, 3072),
        "transformer_blocks.0.attn.to_add_out": (3072, 3072),
        "transformer_blocks.7.ff_context.net.2": (3072, 12288),
        "transformer_blocks.7.norm1_context.linear": (18432, 3072),
        "single_transformer_blocks.37.attn.to_k": (3072, 3072),
        "single_transformer_blocks.37.proj_mlp": (12288, 3072),
        "single_transformer_blocks.37.proj_out": (3072, 15360),
        "single_transformer_blocks.37.norm.linear": (9216, 3072),
    },
    "sd35-medium": {
        "transformer_blocks.12.attn2.to_v": (1536, 1536),
        "transformer_blocks.12.norm1.linear": (13824, 1536),
        "transformer_blocks.22.attn.add_q_proj": (1536, 1536),
        "transformer_blocks.0.ff.net.0.proj": (6144, 1536),
        "transformer_blocks.23.norm1_context.linear": (3072, 1536),
    },
}


@pytest.mark.parametrize("teacher", DIFFUSERS)
def test_diffusers_names_are_those_it_publishes(teacher):
    family, base, view = at_full_size(teacher, 4)
    with torch.device("meta"):
        tensors = lora_tensors(family, "diffusers", pairs(view), base)
    for name, (rows, columns) in DIFFUSERS[teacher].items():
        assert tensors[f"transformer.{name}.lora_A.weight"].shape == (4, columns), name
        assert tensors[f"transformer.{name}.lora_B.weight"].shape == (rows, 4), name


@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-large", "sd35-medium"])
def test_the_table_names_every_module_and_none_twice(teacher):
    """What fine-tunes in diffusers' layout are read by: all modules, in the blocks and outside."""
    family, base, _ = at_full_size(teacher, 4)
    owners = {name.rpartition(".")[0] for name, _ in base.named_parameters()} - {""}
    found = {name: renamed(family.other_names(), name) for name in owners}
    assert all(found.values()), [name for name in found if not found[name]][:5]
    named = [other for x in found.values() for other in x.names]
    assert len(named) == len(set(named)) and not any("*" in name for name in named)
    for name, other in found.items():
        weight = dict(base.get_submodule(name).named_parameters(recurse=False)).popitem()[1]
        assert sum(other.rows(len(weight))) == len(weight), name


# --- the same weights, whatever they are called --------------------------------------------------


def trained(teacher, kind=torch.float32) -> tuple[torch.nn.Module, Pairs]:
    torch.manual_seed(0)
    family = SMALL[teacher]
    base = family.build(1.0).requires_grad_(False)
    where = {n: m for n, m in layers(base).items() if not n.startswith(family.not_adapted)}
    view = adapted(base, where, 2)
    aim([view], anywhere(view, 0))
    with torch.no_grad():
        for up in view.parameters():
            up.normal_()
    return base, {name: (a.to(kind), b.to(kind)) for name, (a, b) in pairs(view).items()}


@pytest.mark.parametrize("teacher", [name for name in SMALL if name != "flux-schnell"])
def test_every_format_gives_the_same_merged_weights(teacher, tmp_path):
    """W + B A to bf16 rounding of A and B, which is all that the file rounds."""
    base, added = trained(teacher, torch.bfloat16)
    family, state = SMALL[teacher], base.state_dict()
    wanted = dict(merged(state.items(), added))
    kinds = ("kohya", "comfyui", "diffusers") if family.other_names() else ("kohya", "comfyui")
    for kind in kinds:
        tensors = lora_tensors(family, kind, added, base)
        save_file(tensors, tmp_path / kind)
        again = dict(merged(state.items(), read_lora(tmp_path / kind, family, base)))
        for name, weight in again.items():
            torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=1e-5, msg=name)
    assert not all(torch.equal(wanted[name], state[name]) for name in state)


def test_diffusers_file_is_what_its_own_layout_needs():
    """Merged part by part, as diffusers does it, then put together as our layout has it: rows of
    q, k, v one below the other, halves of the last block's context modulation swapped."""
    base, added = trained("sd35-large")
    family = SMALL["sd35-large"]
    tensors = lora_tensors(family, "diffusers", added, base)

    def product(name):
        up, down = (tensors[f"transformer.{name}.lora_{x}.weight"] for x in "BA")
        return up @ down

    fused = [product(f"transformer_blocks.1.attn.to_{x}") for x in "qkv"]
    down, up = added["joint_blocks.1.x_block.attn.qkv"]
    torch.testing.assert_close(torch.cat(fused), up @ down)
    scale, shift = product("transformer_blocks.2.norm1_context.linear").chunk(2)
    down, up = added["joint_blocks.2.context_block.adaLN_modulation.1"]
    torch.testing.assert_close(torch.cat([shift, scale]), up @ down)


def test_a_file_of_another_network_is_refused(tmp_path):
    base, added = trained("sd35-large")
    family, path = SMALL["sd35-large"], tmp_path / "lora"
    with pytest.raises(ValueError, match="no LoRA of sd35-large: its first name is"):
        save_file({"x": torch.ones(1)}, path)
        read_lora(path, family, base)
    tensors = lora_tensors(family, "comfyui", added, base)
    save_file(tensors | {"diffusion_model.other.lora_A.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="nothing is called diffusion_model.other"):
        read_lora(path, family, base)
    with pytest.raises(ValueError, match="--lora-format diffusers: sdxl has no such names"):
        format_of(SMALL["sdxl"], "diffusers")


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def reduced(monkeypatch, tmp_path):
    """reduced(teacher): flags for a short run on reduced official files."""
    for name, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, name, family)

    def get(teacher):
        make_official(teacher, tmp_path / teacher)
        (tmp_path / "prompts.txt").write_text("a red fox\nthree foxes\n")
        flags = ["--teacher", teacher, "--weights", tmp_path / teacher, "--size", 32, 48]
        flags += ["--data", tmp_path / "prompts.txt", "--no-gan", "--w-isg", 1, "--ida-decay", 0.9]
        flags += ["--steps", 2, "--ttur", 1, "--batch", 2, "--lr", 0.05, "--lr-fake", 0.05]
        flags += ["--adapter-init", "random"]  # to draw otherwise takes batches
        return [*flags, "--adapter", 2, "--workers", 0, "--exam-every", 0, "--lr-warmup", 0]

    return get


@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-medium", "sd15", "klein", "z-image"])
def test_a_run_leaves_a_lora_and_a_merged_file_that_draw_alike(command, reduced, tmp_path, teacher):
    """The LoRA on its base, and --export full alone: the same network to bf16 rounding, under the
    official file's names, shapes and order; what is not adapted is bit for bit the base's."""
    out = tmp_path / "run"
    code, _, err = command(train, *reduced(teacher), "--export", "full", "--out", out)
    assert code == 0, err
    lora, whole = out / "student.safetensors", out / "full.safetensors"
    where, family = str(tmp_path / teacher), find(teacher)
    base = {n: x for file in family.locate(where)["denoiser"] for n, x in load_file(file).items()}
    full = load_file(whole)
    assert {n: x.shape for n, x in full.items()} == {n: x.shape for n, x in base.items()}
    one, about = load_student(lora, torch.float32, "cpu", weights=where)
    two, _ = load_student(whole)
    assert about["rank"] == about["alpha"] == "2"
    assert len(about["base"]) == 16
    assert about["lora_format"] == (FULL[teacher][2] if teacher in FULL else "comfyui")
    changed = set()
    for name, x in one.state_dict().items():
        torch.testing.assert_close(x, two.state_dict()[name], atol=1e-3, rtol=1e-2, msg=name)
        changed |= {name} if not torch.equal(x, base[family.prefix() + name].float()) else set()
    assert changed >= {f"{name}.weight" for name in read_lora(lora, family, one)}
    none, _ = load_student(lora, torch.float32, "cpu", weights=where, scale=0.0)
    own = family.own_weights(none, 3.5)
    for name, x in none.state_dict().items():
        assert name in own or torch.equal(x, base[family.prefix() + name].float()), name
    drawn = ["--checkpoint", lora, "--weights", where, "--prompt", "a fox", "--adapter-scale", 0.5]
    code, out, _ = command(sample, *drawn, "--out", tmp_path / "out.png")
    assert code == 0 and "trained on other weights" not in out


def test_a_students_guidance_is_part_of_it_and_the_teachers_is_free(command, reduced, tmp_path):
    """FLUX.1: student and fake score begin as the teacher at --guidance, and no other scale moves
    them, in training and in the merged file; the base keeps its input."""
    cfg = teachers.configure("flux-dev", adapter=2, w_gan=0.0, guidance=2.0)
    reduced("flux-dev")
    family = find("flux-dev")
    torch.manual_seed(0)
    base = family.build(1.0).requires_grad_(False)
    torch.nn.init.normal_(base.final_layer.linear.weight)
    view = view_of(base, cfg, family)
    cond = conditioning(family, 2, torch.float32)
    x_t, t = torch.randn(2, *family.latent_shape((32, 48))), torch.tensor([0.3, 0.8])

    def at(net, scale=None):
        given = {"guidance": torch.full((2,), scale)} if scale else {}
        return net(x_t, t, cond | given)

    torch.testing.assert_close(at(view), at(base, 2.0), atol=1e-6, rtol=1e-5)
    assert torch.equal(at(view), at(view, 7.0))
    assert not torch.allclose(at(base, 2.0), at(base, 7.0))


def test_a_run_on_another_base_is_not_continued(command, own, tmp_path):
    shutil.copytree(own, tmp_path / "own")
    flags = [*flags_of(tmp_path / "own"), *SHORT, tmp_path / "run"]
    assert command(train, *flags)[0] == 0
    path = tmp_path / "own" / "mine.safetensors"
    save_file({name: 2 * x for name, x in load_file(path).items()}, path)
    named = ("the weights of the denoiser: the official file ", " -> ", "--overwrite")
    refused(command(train, *flags), *named)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--adapter-layers", "nowhere"], "no layer has that in its name, such as"),
        (["--lora-format", "diffusers"], "digits has no such names; choose own, kohya, comfyui"),
        (["--adapter-init", "svd"], "choose from inputs, random"),
    ],
)
def test_training_refuses_what_adapters_cannot_do(command, tmp_path, flags, named):
    refused(command(train, "--adapter", 2, *flags, "--out", tmp_path / "run"), named)


SHORT = ["--adapter", 2, "--steps", 4, "--batch", 2, "--ttur", 2, "--save-every", 1]
SHORT += ["--no-gan", "--exam-every", 0, "--out"]


def test_a_killed_run_with_adapters_is_the_same_bit_for_bit(own, tmp_path):
    """SIGKILL as soon as a checkpoint is there: A is taken up, not drawn again."""
    outs, printed = (tmp_path / "killed", tmp_path / "whole"), tmp_path / "printed.txt"
    run = processes.launch(processes.command, 0, printed, [*flags_of(own), *SHORT, outs[0]])
    processes.wait_for("checkpoints/step-????????", outs[0], run)
    run[0].kill()
    processes.join(run)
    assert not (outs[0] / "student.safetensors").exists(), "it was to be interrupted"
    for out in outs:
        processes.finish(processes.command, 0, printed, [*flags_of(own), *SHORT, out])
    one, two = (load_file(out / "student.safetensors") for out in outs)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (outs[0] / "log.csv").read_text() == (outs[1] / "log.csv").read_text()
