"""FLUX.2 [klein] as a teacher: files to a guided picture against the makers' pipeline, its times,
its names elsewhere, and what people may give in place of its files."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALL, make_official, write_qwen3_tokenizer

import evaluate
import sample
import teachers
from config import Refusal
from model import Flux2Config
from nets.names import stored_as
from nets.qwen3 import Qwen3Config
from nets.vae import VAEConfig
from nets.weights import read_metadata, save_weights
from schedule import Flow, grid, guided, sample_ode
from teachers import Networks, configure, find
from teachers.klein import ANCHORS, DIFFUSERS, SHIFT, Klein, mean_shift
from teachers.students import find_student

HERE = Path(__file__).parent
TIMES = json.loads((HERE / "golden" / "schedules_2026.json").read_text())
GOLDEN = load_file(HERE / "golden" / "flux2_klein_pipeline.safetensors")
ABOUT = json.loads(read_metadata(HERE / "golden" / "flux2_klein_pipeline.safetensors")["config"])


# --- the pipeline --------------------------------------------------------------------------------


def sizes() -> Networks:
    net, vae, llm = ABOUT["transformer"], ABOUT["vae"], ABOUT["text_encoder"]
    return Networks(
        Flux2Config(
            channels=net["in_channels"],
            width=net["hidden_size"],
            heads=net["num_heads"],
            double=net["depth"],
            single=net["depth_single_blocks"],
            context_width=net["context_in_dim"],
            axes=tuple(net["axes_dim"]),
        ),
        VAEConfig(
            channels=vae["z_channels"],
            fold=2,
            quant=True,
            width=vae["ch"],
            multipliers=tuple(vae["ch_mult"]),
            groups=vae["norm_num_groups"],
        ),
        llm=Qwen3Config(
            width=llm["hidden_size"],
            depth=llm["num_hidden_layers"],
            heads=llm["num_attention_heads"],
            groups=llm["num_key_value_heads"],
            head=llm["head_dim"],
            hidden=llm["intermediate_size"],
            taps=tuple(ABOUT["taps"]),
            vocabulary=llm["vocab_size"],
        ),
    )


def weights_of(part: str) -> dict[str, torch.Tensor]:
    start = f"weights/{part}/"
    return {k.removeprefix(start): v for k, v in GOLDEN.items() if k.startswith(start)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Its networks from files in ComfyUI's folders: text, denoiser, autoencoder; the teacher."""
    folder, family = tmp_path_factory.mktemp("klein"), find("klein").resized(sizes())
    family.tokens = ABOUT["text_length"]
    for part, name in (
        ("transformer", f"diffusion_models/{Klein.file}"),
        ("text_encoder", "text_encoders/qwen_3_4b.safetensors"),
        ("vae", "vae/flux2-vae.safetensors"),  # under the makers' names
    ):
        path = folder / name
        path.parent.mkdir()
        save_file(weights_of(part), path)
    write_qwen3_tokenizer(folder / "tokenizer.json")
    files = family.locate(str(folder))
    net = family.load(1.0, files["denoiser"]).requires_grad_(False)
    return family.load_text(files), net, family.load_vae(files), family


def close(got, wanted, atol=2e-4):
    torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-5)


def test_prompts_become_the_pipelines_states(pipeline):
    """Two prompts, one longer than the other's padding, and the empty one."""
    text = pipeline[0]
    for prompts, name in ((ABOUT["prompts"], ""), (2 * [""], "negative_")):
        ids, real = text.tokens(prompts)
        assert torch.equal(ids, GOLDEN[f"inputs/{name}input_ids"])
        assert torch.equal(real, GOLDEN[f"inputs/{name}attention_mask"].bool())
        wanted = GOLDEN[f"outputs/{name}prompt_embeds"]
        close(text(prompts)["context"], wanted, atol=2e-5)


def test_four_guided_steps_give_the_pipelines_picture(pipeline):
    """Every latent on the way, then the picture; and the same noise without guidance. Two
    implementations of the loop agree to 2e-5."""
    text, net, vae, family = pipeline
    cond, null = text(ABOUT["prompts"]), text([ABOUT["negative_prompt"]])
    uncond, size = family.null_for(null, cond), (ABOUT["height"], ABOUT["width"])
    times = family.sampling_times(net.schedule, ABOUT["steps"], size)
    assert [*times, 0.0] == pytest.approx(GOLDEN["outputs/times"].tolist(), abs=1e-6)
    noise, first = GOLDEN["inputs/noise"], GOLDEN["inputs/noise"].new_full((2,), times[0])
    assert noise.shape[1:] == family.latent_shape(size)
    close(net(noise, first, cond), GOLDEN["outputs/v_cond.0"], atol=2e-5)
    close(net(noise, first, uncond), GOLDEN["outputs/v_uncond.0"], atol=2e-5)
    x_t, guidance = noise, ABOUT["guidance"]
    for k, (tau, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        t, t_next = x_t.new_full((2,), tau), x_t.new_full((2,), after)
        v = guided(net, x_t, t, cond, uncond, guidance)
        x_t = net.schedule.step(x_t, v, t, t_next)
        close(x_t, GOLDEN[f"outputs/latents.{k + 1}"])
    close(x_t, GOLDEN["outputs/final_latent"])
    close(sample_ode(net, noise, cond, times), GOLDEN["outputs/final_latent_unguided"])
    close(vae.decode(x_t), GOLDEN["outputs/image"])


# --- times and guidance --------------------------------------------------------------------------


def test_the_samplers_times_are_the_published_ones():
    """By size and number of steps; the shift falls at 4300 tokens."""
    family, schedule, checked = find("klein"), Flow(SHIFT), 0
    for name, by_steps in TIMES["klein"]["mu"].items():
        tokens = TIMES["klein"]["image_tokens"][name]
        for steps, mu in by_steps.items():
            assert mean_shift(tokens, int(steps)) == pytest.approx(mu, abs=1e-9)
    for name, by_steps in TIMES["klein"]["times"].items():
        size = tuple(map(int, name.split("x")))
        for steps, times in by_steps.items():
            got = family.sampling_times(schedule, int(steps), size)
            assert [*got, 0.0] == pytest.approx(times, abs=1e-9)
            checked += 1
    assert checked > 20
    assert mean_shift(4290, 50) - mean_shift(4355, 50) > 0.8


def test_the_preset_trains_on_the_times_at_1024():
    """The losses' shift is that of the teacher's 50 steps; the anchors are the makers' few."""
    family, preset = find("klein"), find("klein").preset
    assert preset.shift == SHIFT == round(math.exp(mean_shift(4096, 50)), 2)
    for steps, taus in ANCHORS.items():
        own = family.sampling_times(Flow(), steps, (1024, 1024))
        assert taus == tuple(round(t, 4) for t in own)
        assert configure("klein", student_steps=steps).taus == taus
    assert preset.guidance == TIMES["klein"]["teacher_guidance"]
    assert configure("klein-9b").taus == preset.taus


def test_guidance_is_the_published_formula():
    numbers = TIMES["guidance"]
    yes, no = (torch.tensor(numbers[f"v_{x}"]).reshape(1, 6, 1, 1) for x in ("cond", "uncond"))

    def net(x_t, t, cond):
        return torch.where(cond["c"].reshape(-1, 1, 1, 1) > 0, yes, no)

    one = torch.ones(1)
    for scale, wanted in numbers["klein"]["results"].items():
        got = guided(net, torch.zeros_like(yes), one, {"c": one}, {"c": -one}, float(scale))
        assert got.flatten().tolist() == pytest.approx(wanted, abs=1e-5)


# --- names ---------------------------------------------------------------------------------------


def official() -> dict[str, list[int]]:
    path = HERE / "manifests" / "flux-2-klein-base-4b.json"
    return {name: shape for name, (_, shape) in json.loads(path.read_text()).items()}


def test_diffusers_names_are_one_for_each_third_of_a_fused_tensor():
    """169 tensors stand for the 149; each name of ours is in the table once."""
    every = [stored_as(DIFFUSERS, name) for name in official()]
    found = [name for other in every for name in other.names]
    assert len(found) == len(set(found)) == 169 and not {*found} & {*official()}
    assert [other.names for other in every if other.swapped] == [("norm_out.linear.weight",)]
    assert "transformer_blocks.4.attn.add_k_proj.weight" in found
    assert "single_transformer_blocks.19.attn.to_qkv_mlp_proj.weight" in found


def test_a_students_header_is_the_official_one(tmp_path):
    """All 25 blocks in miniature: names and their order on disk."""
    from test_flux import read_header

    cfg = replace(SMALL["klein"].sizes.denoiser, double=5, single=20)
    net = SMALL["klein"].resized(replace(SMALL["klein"].sizes, denoiser=cfg)).build(1.0)
    save_weights(net, tmp_path / "student.safetensors", torch.bfloat16, {"teacher": "klein"})
    assert [name for name, *_ in read_header(tmp_path / "student.safetensors")] == list(official())


def test_the_9b_sizes_are_configuration_alone():
    """Widths of the makers' table: 9.08 billion weights; its text is three states of Qwen3-8B."""
    family = find("klein-9b")
    with torch.device("meta"):
        net = family.build(1.0)
    assert len(net.double_blocks) == 8 and len(net.single_blocks) == 24
    assert round(sum(p.numel() for p in net.parameters()) / 1e9, 2) == 9.08
    assert family.cond_shapes() == {"context": (512, 3 * family.sizes.llm.width)}
    assert "klein-9b (non-commercial licence)" in teachers.listed()


# --- files people have ---------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The small teacher's official folder."""
    monkeypatch.setitem(teachers.FOUND, "klein", SMALL["klein"])
    make_official("klein", tmp_path / "files")
    return tmp_path / "files"


def test_the_text_encoder_of_another_release_is_refused_before_it_is_read(command, small, tmp_path):
    (small / "text_encoder" / "config.json").write_text('{"rope_theta": 5000000}')
    flags = ["--teacher", "klein", "--weights", small, "--prompt", "fox", "--size", 32, 48]
    refused(command(sample, *flags, "--out", tmp_path / "a.png"), "2507", "text_encoder")


def test_an_fp8_copy_of_the_text_encoder_is_refused(command, small, tmp_path):
    shards = sorted((small / "text_encoder").glob("*.safetensors"))
    state = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    state = {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in state.items()}
    shutil.rmtree(small / "text_encoder")
    save_file(state, small / "qwen_3_4b.safetensors")
    flags = ["--teacher", "klein", "--weights", small, "--prompt", "fox", "--size", 32, 48]
    refused(command(sample, *flags, "--out", tmp_path / "a.png"), "F8_E4M3", "fetch the original")


def test_another_autoencoder_or_transformer_is_refused(small):
    """FLUX.1's ae.safetensors; one weight of diffusers' transformer."""
    family = SMALL["klein"]
    path = small / "vae" / "diffusion_pytorch_model.safetensors"
    vae = {k: v for k, v in load_file(path).items() if "bn." not in k and "quant" not in k}
    path.unlink()
    save_file(vae, small / "ae.safetensors")
    with pytest.raises(Refusal, match="ae.safetensors: the network lacks 6 names: bn.running_mean"):
        family.load_vae(family.locate(str(small)))
    save_file({"x_embedder.weight": torch.zeros(2, 2)}, small / family.file)
    with pytest.raises(Refusal, match="holds another network"):
        family.load(1.0, [small / family.file])


def test_the_makers_own_student_is_sampled_and_evaluated_as_one(
    command, small, tmp_path, monkeypatch
):
    """By the name of its file, since its tensors' names are the teacher's: four unguided steps at
    the makers' times."""
    theirs = tmp_path / "flux-2-klein-4b.safetensors"
    shutil.copy(small / Klein.file, theirs)
    assert find_student(theirs).family.name == "klein"
    flags = ["--weights", small, "--size", 32, 48]
    out, what = tmp_path / "a.png", ["--prompt", "a fox"]
    code, _, err = command(sample, "--checkpoint", theirs, *flags, *what, "--out", out)
    assert code == 0, err
    with Image.open(out) as image:
        about, drawn = json.loads(image.text["settings"]), np.asarray(image)
    assert about["taus"] == list(ANCHORS[4]) and about["sampler"] == "euler"
    assert about["guidance"] is None and drawn.shape == (32, 48, 3)
    refused(command(sample, "--checkpoint", small / Klein.file, *what), "does not name its teacher")
    (tmp_path / "prompts.txt").write_text("a red fox\n" * 20)
    flags += ["--student", theirs, "--prompts", tmp_path / "prompts.txt"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    task, _ = evaluate.resolve_task(evaluate.evaluate_arguments(None))
    assert task.family.name == "klein" and task.denoisers["student"] == [theirs]
    times = grid(Flow(float(find_student(theirs).about["shift"])), 4)
    assert times == pytest.approx(ANCHORS[4], abs=1e-3)
