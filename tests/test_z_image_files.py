"""Z-Image as a teacher, at reduced width: its files under two sets of names, its times and its
guidance, its captions in a cache."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALL, make_official

import sample
import teachers
import train
from config import Refusal
from engine.batch import cond_of, fill_cache, load_batch, read_null
from engine.build import open_training_data
from nets.names import stored_as
from nets.weights import as_named
from schedule import Flow
from teachers import configure, find
from teachers.students import find_student
from teachers.z_image import COMFYUI

HERE = Path(__file__).parent
CPU = torch.device("cpu")
FAMILY = SMALL["z-image"]


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    monkeypatch.setitem(teachers.FOUND, "z-image", FAMILY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("z-image")
    make_official("z-image", made)
    return made


def comfyui(official: dict, prefix: str = "") -> dict:
    """The same weights under ComfyUI's names."""
    together: dict[str, list] = {}
    for name in sorted(official, key=lambda name: name.replace("to_q", "to_a")):  # q, k, v
        (theirs,) = stored_as(COMFYUI, name).names
        together.setdefault(prefix + theirs, []).append(official[name])
    return {name: torch.cat(parts) for name, parts in together.items()}


def same(a, b) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


# --- names ---------------------------------------------------------------------------------------


def test_comfyuis_names_and_shapes_are_those_of_its_file():
    """453 tensors of the official 521, at full size: query, key and value are one."""
    manifests = (HERE / "manifests" / f"{name}.json" for name in ("z_image", "z_image_comfy"))
    official, theirs = (json.loads(path.read_text()) for path in manifests)
    made: dict[str, list] = {}
    for name, (dtype, shape) in official.items():
        entry = made.setdefault(*stored_as(COMFYUI, name).names, [dtype, [0, *shape[1:]]])
        entry[1][0] += shape[0]
    assert made == theirs and (len(official), len(theirs)) == (521, 453)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_either_set_of_names_gives_the_same_network(folder, tmp_path, prefix):
    """Also as it is dealt out to ranks, in the network's order; with a norm that nobody reads."""
    shards = FAMILY.locate(str(folder))["denoiser"]
    net = FAMILY.load(6.0, shards)
    official = {name: x for path in shards for name, x in load_file(path).items()}
    extra = {f"{prefix}norm_final.weight": torch.ones(12, dtype=torch.bfloat16)}
    path = tmp_path / "z_image_bf16.safetensors"
    save_file(comfyui(official, prefix) | extra, path)
    assert same(FAMILY.load(6.0, path), net)
    for given in (path, shards):
        read = dict(FAMILY.read(6.0, given, torch.float32, CPU))
        assert list(read) == list(net.state_dict())
        assert all(torch.equal(x, read[name]) for name, x in net.state_dict().items())


def test_a_folder_of_comfyuis_files_draws_the_same_picture(command, folder, tmp_path):
    """Transformer, language model and autoencoder each in one file, under its names."""
    place = tmp_path / "comfyui"
    files = FAMILY.locate(str(folder))
    parts = {
        "denoiser": "diffusion_models/z_image_bf16.safetensors",
        "llm": "text_encoders/qwen_3_4b.safetensors",
        "vae": "vae/ae.safetensors",
    }
    for name, where in parts.items():
        state = {key: x for path in files[name] for key, x in load_file(path).items()}
        state = comfyui(state) if name == "denoiser" else state
        (place / where).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, place / where)
    (place / "tokenizer.json").write_bytes(files["llm_tokenizer"][0].read_bytes())
    pictures = []
    for k, weights in enumerate((folder, place)):
        out = tmp_path / f"{k}.png"
        flags = ["--teacher", "z-image", "--weights", weights, "--size", 32, 48, "--steps", 2]
        code, _, err = command(sample, *flags, "--prompt", "a fox", "--out", out)
        assert code == 0, err
        pictures.append(Image.open(out).tobytes())
    assert pictures[0] == pictures[1]


def test_what_is_wrong_with_a_file_is_said(folder, tmp_path):
    """A quantised copy, a file of another network, a language model of another release."""
    shards = FAMILY.locate(str(folder))["denoiser"]
    official = {name: x for path in shards for name, x in load_file(path).items()}
    path = tmp_path / "file.safetensors"
    fused = comfyui(official)
    eighth = {"layers.0.attention.qkv.weight": fused["layers.0.attention.qkv.weight"].char()}
    for state, named in (
        (fused | eighth, "layers.0.attention.qkv.weight is stored as I8, a quantised"),
        ({k: v for k, v in fused.items() if "out" not in k}, "the network lacks 4 names: "),
        (official | {"x": torch.ones(1)}, "this is the network and one name more: x"),
    ):
        save_file(state, path)
        with pytest.raises(Refusal, match=named):
            FAMILY.load(6.0, path)
    about = folder / "text_encoder" / "config.json"
    about.write_text('{"rope_theta": 5000000}')
    with pytest.raises(Refusal, match="rope_theta is 5e\\+06, not 1e\\+06: another release"):
        FAMILY.load_text(FAMILY.locate(str(folder)))
    about.unlink()


def test_missing_files_and_impossible_flags_are_refused(command, folder, tmp_path):
    given = ["--teacher", "z-image", "--prompt", "fox", "--weights"]
    (tmp_path / "empty").mkdir()
    files = [file for part in find("z-image").parts().values() for file in part.files]
    refused(command(sample, *given, tmp_path / "empty"), *files, "hf download Tongyi-MAI/Z-Image")
    refused(command(sample, *given, folder, "--size", 32, 40), "40 is no multiple of 16")
    refused(command(sample, *given, folder, "--size", 32, 8208), "at most 8192 pixels a side")
    refused(command(sample, *given, folder, "--dtype", "fp16"), "choose from bf16, fp32")
    refused(command(sample, *given, folder, "--no-t5"), "only SD 3.5 does without T5")


# --- times, guidance -----------------------------------------------------------------------------


def test_times_and_guidance_are_the_official_ones(tmp_path):
    """The times of its sampler for any number of steps and any size; the anchors are those of four.
    The official scale g is g + 1 here. Its makers' own few-step model has other times."""
    golden = json.loads((HERE / "golden" / "schedules_2026.json").read_text())
    cfg, about = find("z-image").preset, golden["z_image"]
    for steps, times in about["times"].items():
        for size in ((1024, 1024), (512, 768)):
            ours = FAMILY.sampling_times(Flow(cfg.shift), int(steps), size)
            assert [*ours, 0.0] == pytest.approx(times, abs=1e-12)
    anchors = train.anchors(cfg, Flow(cfg.shift))
    assert anchors == pytest.approx([1, 0.9474, 0.8571, 0.6667], abs=1e-4)
    assert cfg.shift == about["shift"] and cfg.guidance == 4.0 + 1
    save_file({"x": torch.ones(1)}, tmp_path / "z_image_turbo_bf16.safetensors")
    turbo = find_student(tmp_path / "z_image_turbo_bf16.safetensors").about
    assert [*json.loads(turbo["taus"]), 0.0] == pytest.approx(about["times_turbo"]["8"], abs=1e-4)
    assert float(turbo["shift"]) == about["shift_turbo"]


# --- captions in training ------------------------------------------------------------------------


def pictures(place: Path) -> Path:
    """Captions of 10 to 40 tokens and more."""
    place.mkdir()
    for k in range(4):
        Image.new("RGB", (48, 32), (60 * k, 90, 120)).save(place / f"{k}.png")
        (place / f"{k}.txt").write_text("a red fox " * (1 + 3 * k))
    return place


def test_a_cache_gives_the_captions_of_a_batch_with_their_lengths(folder, tmp_path):
    """As the encoder does, null caption included; lengths on the host, where nobody waits."""
    data = str(pictures(tmp_path / "data"))
    cfg = configure(teacher="z-image", weights=str(folder), data=data, size=(32, 48))
    cfg = dataclasses.replace(cfg, batch=4, w_gan=0.0, bf16=False, cache=str(tmp_path / "cache"))
    family, pairs = find("z-image"), open_training_data(cfg, find("z-image"))
    cache = fill_cache(cfg, family, pairs, CPU)
    text = family.load_text(family.locate(cfg.weights))
    ids = train.ids_of(cfg, 0)
    cond = cond_of(cache.rows(pairs(ids), CPU))
    wanted = text(pairs(ids).captions)
    assert torch.equal(cond["length"], wanted["length"]) and len(set(cond["length"].tolist())) > 1
    torch.testing.assert_close(cond["context"], wanted["context"], atol=1e-5, rtol=1e-5)
    null = read_null(cfg, family, None, CPU)
    nets = train.Nets(family, *[None] * 6, null=null, cache=cache)
    batch = load_batch(ids, pairs(ids), nets, cfg, CPU)
    assert batch.uncond["length"].tolist() == text([""])["length"].tolist() * 4
    halves = batch.split(2)
    assert torch.equal(halves[1].cond["length"], wanted["length"][2:])
    assert halves[0].uncond["context"].shape == halves[0].cond["context"].shape


def test_a_run_from_a_cache_goes_on_without_the_text_encoder(command, folder, tmp_path):
    """Begun again after its first iteration it ends bit for bit alike; its student has the official
    names, in one file, and draws."""
    place, out = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(folder, place)
    flags = ["--teacher", "z-image", "--weights", place, "--data", pictures(tmp_path / "data")]
    flags += ["--size", 32, 48, "--batch", 2, "--steps", 2, "--ttur", 1, "--no-gan", "--out", out]
    flags += ["--cache", tmp_path / "cache", "--lr", 1e-3, "--workers", 0, "--save-every", 1]
    flags += ["--exam-every", 0]
    code, _, err = command(train, *flags)
    assert code == 0, err
    first = load_file(out / "student.safetensors")
    shutil.rmtree(out / "checkpoints" / "step-00000002")
    for path in [out / "student.safetensors", *(place / "text_encoder").iterdir()]:
        path.unlink()
    code, _, err = command(train, *flags)
    assert code == 0, err
    again = load_file(out / "student.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    shards = FAMILY.locate(str(folder))["denoiser"]
    assert FAMILY.layout(shards, FAMILY.build(6.0))["stored"] is as_named
    assert first.keys() == {name for path in shards for name in load_file(path)}
    taken = ["--checkpoint", out, "--prompt", "fox", "--weights", folder]
    code, _, err = command(sample, *taken, "--out", tmp_path / "drawn.png")
    assert code == 0, err
