"""Students that train.py did not write: loaded, believed in nothing, remembered, put into one
table; and students in other programs, whose sampling rules are written out here."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import Linear, refused
from safetensors.torch import save_file
from small import SMALL, embedded
from test_bases import in_other_names

import evaluate
import sample
import teachers
from config import Refusal
from engine.build import anchors
from model import silence_guidance
from nets.weights import digest, save_weights
from schedule import DDPM, Flow, draw_samples
from teachers import find
from teachers.elsewhere import comfyui, diffusers, explain, modelspec
from teachers.lora import lora_tensors
from teachers.students import Student, find_student, remember

SAID = {"taus": (1.0, 0.9, 0.75, 0.5), "sampler": "x0"}


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for name, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, name, family)


def made(teacher: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = find(teacher).build(3.0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def alike(net: torch.nn.Module, wanted: dict) -> bool:
    state = net.state_dict()
    return state.keys() == wanted.keys() and all(
        torch.equal(x, wanted[n]) for n, x in state.items()
    )


# --- files of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["klein", "sd35-medium", "sdxl", "z-image"])
def test_a_foreign_student_is_loaded_bit_for_bit(tmp_path, teacher):
    """A file of any name, and a folder of shards with their index as diffusers writes it."""
    net, prefix = made(teacher), find(teacher).prefix()
    state = {prefix + name: x for name, x in net.state_dict().items()}
    save_file(state, tmp_path / "theirs.safetensors")
    folder = tmp_path / "theirs" / ("unet" if teacher == "sdxl" else "transformer")
    folder.mkdir(parents=True)
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path / "theirs.safetensors", tmp_path / "theirs"):
        student = find_student(path, teacher, **SAID)
        assert student.foreign and student.title == "theirs" and student.steps == 4
        assert alike(student.load([]), net.state_dict())
        assert float(student.about["shift"]) == find(teacher).preset.shift


@pytest.mark.parametrize("teacher", ["flux-dev", "sd35-large", "klein", "sdxl", "z-image"])
def test_a_foreign_student_may_have_another_programs_names(tmp_path, teacher):
    """diffusers', as the paper's authors released theirs, of FLUX.1 without the guidance embedder;
    of Z-Image, whose own those are, ComfyUI's: query, key and value in one."""
    state, family = made(teacher).state_dict(), find(teacher)
    state = {name: x for name, x in state.items() if not name.startswith("guidance_in")}
    *_, table = family.layouts().values()
    theirs = in_other_names(state, table)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir()
    save_file(theirs, path)
    student = find_student(tmp_path, teacher, **SAID)
    assert theirs.keys() != state.keys() and student.title == tmp_path.name
    assert alike(student.load([]), state)


def test_a_flux_student_without_guidance_is_ours_with_it_silenced(tmp_path):
    """As the paper's authors released theirs: no guidance embedder at all. And one that has it, and
    listens to it, is given the scale that was said."""
    net = made("flux-dev")
    silence_guidance(net)
    whole = net.state_dict()
    save_file(whole, tmp_path / "ours.safetensors")
    bare = {name: x for name, x in whole.items() if not name.startswith("guidance_in")}
    save_file(bare, tmp_path / "theirs.safetensors")
    ours, theirs = (
        find_student(tmp_path / f"{name}.safetensors", "flux-dev", guidance=3.5, **SAID)
        for name in ("ours", "theirs")
    )
    assert alike(theirs.load([]), bare) and alike(ours.load([]), whole)
    cfg = net.cfg
    cond = {"context": torch.randn(2, 5, cfg.context_width)}
    cond["pooled"] = torch.randn(2, cfg.pooled_width)
    x, t = torch.randn(2, cfg.channels, 4, 6), torch.tensor([0.9, 0.3])
    assert torch.equal(ours.load([])(x, t, cond), theirs.load([])(x, t, cond))
    assert theirs.guidance is None and theirs.fitted.guided_by == "none" and ours.guidance == 3.5
    assert find("flux-dev").guided_by == "input", "its teacher is as it was"


@pytest.mark.parametrize("end", [".weight", ".default.weight"])
def test_a_lora_of_others_stands_on_the_teachers_file(tmp_path, end):
    """W + B A, told from a whole student by its names, PEFT's own too; no metadata."""
    family, net = find("sd35-medium"), made("sd35-medium")
    base = tmp_path / "base.safetensors"
    save_weights(net, base, torch.float32, {}, family.prefix())
    name = "joint_blocks.1.x_block.mlp.fc1"
    weight = net.get_submodule(name).weight
    down, up = torch.randn(3, weight.shape[1]), torch.randn(len(weight), 3)
    tensors = lora_tensors(family, "diffusers", {name: (down, up)}, net)
    tensors = {key.replace(".weight", end): x for key, x in tensors.items()}
    save_file(tensors, tmp_path / "turbo.safetensors")
    student = find_student(tmp_path / "turbo.safetensors", "sd35-medium", **SAID)
    assert student.is_lora and student.about["rank"] == "3"
    loaded = student.load([base], torch.float32, "cpu").state_dict()
    torch.testing.assert_close(loaded.pop(f"{name}.weight"), weight + up @ down)
    assert all(torch.equal(x, net.state_dict()[n]) for n, x in loaded.items())


# --- what is said --------------------------------------------------------------------------------

SOUND = {
    **{"teacher": "digits", "steps": "2", "taus": "[1.0, 0.5]", "sampler": "x0", "shift": "2.0"},
    "size": "[16, 16]",
}


def saved(path: Path, about: dict) -> Path:
    save_file({"x": torch.zeros(1)}, path, metadata=about)
    return path


@pytest.mark.parametrize(
    "changed, named",
    [
        *(({name: None}, f"does not say its {name}") for name in ("taus", "sampler", "shift")),
        ({"taus": "[NaN, 0.5]"}, "taus is nan 0.5; each must be a finite number"),
        ({"taus": "[1.0, 1.0]"}, "anchors fall"),
        ({"taus": "[1.5, 0.5]"}, "taus is 1.5 0.5"),
        ({"taus": "[true, 0.5]"}, "which is no list of numbers"),
        ({"taus": "1, .5"}, 'taus is "1, .5", which is no list'),
        ({"taus": "[]"}, "which is no list"),
        ({"steps": "3"}, "steps is 3, taus has 2"),
        ({"steps": "two"}, 'steps is "two", which is no number'),
        ({"sampler": "eular"}, "did you mean euler?"),
        ({"shift": "inf"}, "shift is inf"),
        ({"shift": "0"}, "shift is 0.0"),
        ({"size": "[16]"}, "size is [16]"),
        ({"size": "[16.5, 2]"}, "size is"),
        ({"rank": "0", "guidance": "1"}, "rank is 0"),
        ({"rank": "4"}, "does not say its guidance"),
        ({"rank": "4", "guidance": "nan"}, "guidance is nan"),
        ({"teacher": "flux"}, 'a student of "flux", a teacher of your own'),
    ],
)
def test_what_a_file_says_is_checked_as_flags_are(tmp_path, changed, named):
    about = {name: x for name, x in (SOUND | changed).items() if x is not None}
    path = saved(tmp_path / "student.safetensors", about)
    with pytest.raises(Refusal) as error:
        find_student(path)
    assert named in str(error.value) and str(path) in str(error.value)
    assert find_student(saved(path, SOUND)).taus == (1.0, 0.5)


def test_what_flags_say_is_remembered_beside_the_file(tmp_path):
    """Of each file in the folder; later flags stand before it; a run's student is not asked."""
    one, two = (saved(tmp_path / f"{name}.safetensors", {}) for name in ("one", "two"))
    with pytest.raises(Refusal, match="name its teacher, taus, sampler; add --teacher NAME --taus"):
        find_student(one)
    with pytest.raises(Refusal, match="name its sampler; add --sampler x0"):
        find_student(one, "digits", taus=(1.0, 0.5))
    first = find_student(one, "digits", shift=2.5, taus=(1.0, 0.5), sampler="euler")
    assert remember(first) == tmp_path / "student.json"
    remember(find_student(two, "klein", **SAID))
    assert find_student(one).about == first.about
    assert find_student(two).family.name == "klein" and find_student(two).taus == SAID["taus"]
    assert find_student(one, sampler="x0").about == first.about | {"sampler": "x0"}
    own = find_student(saved(tmp_path / "student.safetensors", SOUND))
    assert remember(own) is None
    with pytest.raises(Refusal, match="--taus: .* says itself"):
        own.check_said({"taus": (1.0,), "shift": None})
    for text, named in (
        ('{"one.safetensors": {"tau": [1]}}', "says tau; it may say teacher, taus"),
        ('{"one.safetensors": [1]}', "student.json is damaged"),
        ("{", "student.json is damaged"),
        ('{"one.safetensors": {"teacher": "digits", "taus": [1], "sampler": 3}}', 'sampler is "3"'),
    ):
        (tmp_path / "student.json").write_text(text)
        with pytest.raises(Refusal, match=named):
            find_student(one)


def test_the_commands_draw_with_a_foreign_student_and_remember_it(command, tmp_path):
    """The embedded teacher itself, unguided, as somebody's student."""
    path, out = tmp_path / "theirs.safetensors", tmp_path / "out.png"
    save_weights(embedded(), path, torch.float32, {})
    asked = (sample, "--checkpoint", path, "--prompt", "a one above a two", "--out", out)
    refused(command(*asked), "theirs.safetensors is not a student saved by train.py", "--taus")
    refused(command(*asked, "--taus", ".5", "1"), "--taus is 0.5 1.0; anchors fall")
    flags = ("--teacher", "digits", "--taus", "1", ".5", "--sampler", "euler")
    assert command(*asked, *flags, "--remember")[0] == 0
    first = out.read_bytes()
    assert command(*asked)[0] == 0 and out.read_bytes() == first
    code, said, _ = command(sample, "--explain", path)
    assert code == 0 and "a student of digits, 2 steps at 1, 0.5, sampler euler" in said


def test_a_lora_is_evaluated_on_the_base_it_was_trained_on(tmp_path, monkeypatch, capsys):
    """--base is the teacher's denoiser and what the LoRA stands on; another base is said to be."""
    net, base = embedded(), tmp_path / "mine.safetensors"
    save_weights(net, base, torch.float32, {})
    about = SOUND | {"rank": "2", "guidance": "2.0", "base": digest(base)}
    lora = saved(tmp_path / "student.safetensors", about)
    flags = ["evaluate.py", "--student", str(lora), "--out", str(tmp_path / "out")]

    def asked(*more):
        monkeypatch.setattr(sys, "argv", [*flags, *more])
        return evaluate.resolve_task(evaluate.evaluate_arguments(None))[0]

    task = asked("--base", str(base))
    assert task.denoisers == {"teacher": [base], "student": [lora, base]}
    assert "other weights" not in capsys.readouterr().out
    with torch.no_grad():
        net.final_layer.linear.bias += 1
    save_weights(net, base, torch.float32, {})
    asked("--base", str(base))
    said = capsys.readouterr()
    assert "was trained on other weights" in said.out + said.err


# --- several in one table ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_several_students_have_a_row_each_and_share_their_teachers_images(command, tmp_path):
    """Two runs' and a foreign one; then two of them and a new one: what is there is not drawn
    again."""
    net, paths = embedded(), []
    for k, name in enumerate(("first", "second", "fourth")):
        (tmp_path / name).mkdir()
        with torch.no_grad():
            net.final_layer.linear.bias += 0.1 * k
        paths.append(tmp_path / name / "student.safetensors")
        save_weights(net, paths[-1], torch.float32, SOUND | {"sampler": ("x0", "euler")[k % 2]})
    theirs = tmp_path / "third.safetensors"
    save_weights(net, theirs, torch.float32, {})
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a digit and a one\na red two above a digit\n" * 2)
    few = ("--prompts", prompts, "--n", 16, "--steps", 2, "--teacher-steps", 2, "--resamples", 2)
    asked = (*few, "--out", out, "--taus", 1, 0.7, "--sampler", "x0", "--teacher", "digits")
    code, said, err = command(
        evaluate, "--student", tmp_path / "first", paths[1], theirs, "--remember", *asked
    )
    assert code == 0, err
    names = ["teacher 2", "first 2", "second 2", "third 2"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["name"] for row in metrics["measures"]] == names
    assert all(f"| {name} " in said for name in names)
    assert sorted(p.name for p in (out / "images").iterdir()) == sorted(
        name.replace(" ", "-") for name in names
    )
    before = {p: p.stat().st_mtime_ns for p in out.rglob("0*.png")}
    assert len(before) == 4 * 16
    code, said, err = command(
        evaluate, "--student", theirs, paths[2], tmp_path / "first", *few[:-2], "--out", out,
        "--resamples", 2, "--sampler", "x0",
    )  # fmt: skip
    assert code == 0 and "| fourth 2 " in said and "second" not in said, err
    after = {p: p.stat().st_mtime_ns for p in out.rglob("0*.png")}
    assert after.items() > before.items() and len(after) == 5 * 16
    small = tmp_path / "small"
    small.mkdir()
    save_weights(net, small / "student.safetensors", torch.float32, SOUND | {"size": "[8, 16]"})
    refused(command(evaluate, "--student", small, paths[0], *few), "of several sizes", "--size")
    refused(command(evaluate, "--student", *paths[:2], *few, "--taus", 1), "says itself")


# --- other programs ------------------------------------------------------------------------------


def student_of(teacher: str, sampler: str, taus=None, **about) -> Student:
    family = SMALL[teacher]
    taus = taus or anchors(family.preset, family.build(family.preset.shift).schedule)
    about |= {"teacher": teacher, "taus": json.dumps(taus), "steps": str(len(taus))}
    about |= {"sampler": sampler, "shift": str(family.preset.shift)}
    return Student(Path("student.safetensors"), about, family, False)


TRAINED = [name for name, family in SMALL.items() if not family.only_sampled]
CALL = {"__builtins__": {"dict": dict}}


def called(student: Student) -> tuple[str, dict]:
    """diffusers' scheduler, and the numbers of the call."""
    rows = dict(diffusers(student, (1024, 1024)))
    return rows["pipe.scheduler"], eval(f"dict({rows['pipe(...)'].partition(', ')[2]})", CALL)


def flow_match(net, sigmas, shift: float, x, cond, draw, stochastic: bool):
    """FlowMatchEulerDiscreteScheduler: shifts what it is given, then Euler, or x0 and new noise."""
    sigmas = torch.tensor([*sigmas, 0.0])
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = net(x, sigma.expand(1), cond)
        noise = torch.randn(x.shape, generator=draw) if stochastic and after > 0 else 0.0
        x = (1 - after) * (x - sigma * v) + after * noise if stochastic else x + (after - sigma) * v
    return x


def by_table(net, entries, x, cond, draw, stochastic: bool):
    """LCMScheduler without its boundary terms; DDIMScheduler, whose last step ends at alpha 1."""
    bars = [*DDPM().alpha_bar[list(entries)].tolist(), 1.0]
    for k, entry in enumerate(entries):
        eps = net(x, torch.tensor([entry / 1000]), cond)
        x0 = (x - (1 - bars[k]) ** 0.5 * eps) / bars[k] ** 0.5
        if stochastic and k + 1 < len(entries):
            eps = torch.randn(x.shape, generator=draw)
        x = bars[k + 1] ** 0.5 * x0 + (1 - bars[k + 1]) ** 0.5 * eps
    return x


@pytest.mark.parametrize("sampler", ["x0", "euler"])
@pytest.mark.parametrize("teacher", TRAINED)
def test_what_other_programs_are_told_draws_what_our_samplers_draw(teacher, sampler):
    """diffusers' rules at the rows' numbers, from the same noise. Sigmas have four decimals."""
    student = student_of(teacher, sampler)
    kind, call = called(student)
    flow = "sigmas" in call
    net = Linear(Flow() if flow else DDPM()).requires_grad_(False)
    cond, stochastic = {"c": torch.tensor([[1.0]])}, sampler == "x0"
    draw = torch.Generator().manual_seed(3)
    eps = torch.randn(1, 2, 4, 6, generator=draw)
    ours = draw_samples(net, eps, cond, student.taus, sampler, None, None, [draw])
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 4, 6, generator=draw)
    if flow:
        shift = float(kind.partition(", shift=")[2].split(",")[0].rstrip(")"))
        assert ("stochastic_sampling=True" in kind) == stochastic
        theirs = flow_match(net, call["sigmas"], shift, x, cond, draw, stochastic)
    else:
        entries = call.get("timesteps") or [1000 - 250 * k - 1 for k in range(4)]
        assert kind.startswith("LCM" if stochastic else "DDIM") and entries[0] == 999
        theirs = by_table(net, entries, x, cond, draw, stochastic)
    torch.testing.assert_close(theirs, ours, atol=5e-4, rtol=1e-4)


def test_the_rows_are_those_that_the_notes_give():
    """The official presets', and what is said where other times were trained."""
    assert called(student_of("flux-dev", "x0"))[1]["sigmas"] == [1, 0.904, 0.759, 0.512]
    assert called(student_of("sd35-large", "x0"))[1]["sigmas"] == [1, 0.75, 0.5, 0.25]
    assert called(student_of("z-image", "x0"))[1]["guidance_scale"] == 0
    assert called(student_of("sdxl", "x0"))[1]["timesteps"] == [999, 749, 499, 249]
    sampler = {"x0": "lcm", "euler": "euler"}
    for teacher in TRAINED:
        for kind, theirs in sampler.items():
            rows = dict(comfyui(student_of(teacher, kind), (1024, 1024)))
            if teacher.startswith("klein"):
                assert f"KSamplerSelect {theirs}, " in rows["SamplerCustomAdvanced"]
                assert "Flux2Scheduler steps 4" in rows["SamplerCustomAdvanced"]
                continue
            how = f"steps 4, cfg 1, sampler {theirs}, scheduler simple, denoise 1"
            assert rows["KSampler"] == how
            node = "ModelSamplingAuraFlow, shift 6" if teacher == "z-image" else None
            assert rows.get("before it") == node
    odd = (1.0, 0.8, 0.3)
    by_hand = dict(comfyui(student_of("flux-dev", "x0", odd), (512, 512)))
    assert "ManualSigmas 1, 0.8, 0.3, 0" in by_hand["SamplerCustomAdvanced"]
    entries = (0.999, 0.749)  # a DDPM's, as Karras' sigma
    sigma = ((1 - DDPM().alpha_bar) / DDPM().alpha_bar).sqrt()
    rows = dict(comfyui(student_of("sdxl", "euler", entries), (512, 512)))
    said = rows["SamplerCustomAdvanced"].partition("ManualSigmas ")[2].split(", ")
    wanted = [*sigma[[999, 749]].tolist(), 0.0]
    assert [float(x) for x in said] == pytest.approx(wanted, rel=1e-4)
    assert "DDIM does not call at" in called_text(student_of("sdxl", "euler", entries))
    lora = student_of("flux-dev", "x0", rank="8", guidance="3.5")
    assert "guidance_scale=3.5" in explain(lora) and "load_lora_weights" in explain(lora)


def called_text(student: Student) -> str:
    return dict(diffusers(student, (1024, 1024)))["pipe.scheduler"]


def test_metadata_have_the_standards_keys_and_no_date():
    ids = {
        "flux-dev": "flux-1-dev",
        "sd35-large": "stable-diffusion-3-5-large",
        "sd35-medium": "stable-diffusion-3-5-medium",
        "sdxl": "stable-diffusion-xl-v1-base",
        "sd15": "stable-diffusion-v1",
    }
    for teacher, architecture in ids.items():
        about = modelspec(find(teacher), 4, (768, 1024))
        assert about["modelspec.architecture"] == architecture
        assert about["modelspec.resolution"] == "1024x768", "width comes first"
        keys = ("sai_model_spec", "architecture", "implementation", "title", "resolution")
        assert {*about} == {f"modelspec.{key}" for key in keys}
        lora = modelspec(find(teacher), 4, (768, 1024), lora=True)
        assert lora["modelspec.architecture"] == f"{architecture}/lora"
