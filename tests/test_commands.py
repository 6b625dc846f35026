"""The commands as a user meets them: bad input gets one line and exit code 2; sample.py draws."""

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from own import flags_of
from PIL import Image
from small import embedded

import evaluate
import sample
import train
from config import Choice, Config, Parser, Range, differences, flag, shown
from digits import ASSETS
from engine import flags
from nets.weights import DTYPES, load_weights, save_weights
from plane import __main__ as plane
from teachers import configure, find, names

FIELDS = dataclasses.fields(Config)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student file with the teacher's weights."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    about = {
        "teacher": "digits",
        "shift": "2.0",
        "steps": "2",
        "sampler": "x0",
        "taus": "[1.0, 0.5]",
    }
    save_weights(embedded(), path, torch.float32, about)
    return path


# --- train.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--stepz", "3"], "--stepz"),
        (["--steps", "many"], "many"),
        (["--teacher", "flux"], 'unknown teacher "flux"; choose from digits'),
        (["--isg-distance", "l1"], '"l1"; choose from l2, charbonnier'),
        (["--t-dmd", "normal"], "logit-normal"),
        (["--disc-augment", "flip"], "choose from colour, translation, cutout"),
        (["--steps", "0"], "--steps is 0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--ida-decay", "1.5"], "--ida-decay is 1.5"),
        (["--guidance-dmd", "5", "1"], "--guidance-dmd"),
        (["--taus", "0.5", "0.7", "--student-steps", "2"], "--taus"),
        (["--taus", "1", "0.5"], "--student-steps is 4"),
    ],
)
def test_train_refuses_what_cannot_be(command, tmp_path, flags, named):
    refused(command(train, *flags, "--out", tmp_path / "run"), "train.py: ", named)
    assert not (tmp_path / "run").exists(), "refused before anything is made"


def test_train_refuses_an_unusable_folder(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(command(train, "--out", tmp_path / "file"), "file", "--out")
    refused(command(train, "--out", "/proc/run"), "/proc/run", "--out")
    (tmp_path / "config.json").write_text("{")
    refused(command(train, "--out", tmp_path), "config.json", "--overwrite")


def test_train_refuses_a_folder_of_another_configuration(command, own, tmp_path):
    """Names the fields; housekeeping may change; --overwrite starts anew."""
    flags = ["--steps", 2, "--batch", 2, "--no-gan", "--exam-every", 0, "--out", tmp_path]
    flags += flags_of(own)
    assert command(train, *flags)[0] == 0
    refused(command(train, *flags, "--lr", 1e-3), "lr: 0.0001 -> 0.001", "--overwrite")
    assert command(train, *flags, "--keep", 5)[0] == 0
    assert command(train, *flags, "--lr", 1e-3, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 1e-3


@pytest.mark.parametrize("name", ["digits", "teacher", "backbone", "judge", "teacher_samples"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_train_refuses_a_damaged_asset(command, tmp_path, monkeypatch, name, damage):
    """The file is named. (Absent samples of the teacher are not missed: they are drawn.)"""
    copies = tmp_path / "assets"
    shutil.copytree(ASSETS, copies)
    for module in ("digits.scenes", "digits.judge", "digits.exam", "teachers.digits"):
        monkeypatch.setattr(f"{module}.ASSETS", copies)
    (broken,) = copies.glob(f"{name}.[ns]*")
    whole = broken.read_bytes()
    broken.unlink()
    if damage == "cut":
        broken.write_bytes(whole[:1000])
    elif name == "teacher_samples":
        return
    refused(command(train, "--out", tmp_path / "run"), str(broken))


def test_help_has_every_field_in_its_group_with_the_named_teachers_default(command):
    """And the teachers that exist. Without a teacher's name: of digits."""
    titles = [field.metadata["group"] for field in FIELDS if field.metadata["group"]]
    assert titles[0] == "teacher" and titles[-1] == "run" and len(titles) == len(set(titles)) == 10
    for given, preset in (
        ((), configure()),
        (("--teacher", "flux-dev"), configure("flux-dev")),
        (("--teacher", "sdxl", "--lr", 3), configure("sdxl")),
        (("--student-steps", 2), configure(student_steps=2)),
    ):
        code, out, _ = command(train, "--help", *given)
        assert code == 0
        group = ""
        groups = {text.split(":\n")[0]: text for text in out.split("\n\n")}
        for field in FIELDS:
            group = field.metadata["group"] or group
            said = " ".join(groups[group].split(flag(field.name), 1)[1].split())
            value = shown(getattr(preset, field.name))
            assert said.split("(default: ")[1].startswith(f"{value})"), field.name
            assert field.metadata["help"] in said
        for name in names():
            assert name in groups["teacher"]
    refused(command(train, "--help", "--teacher", "flux"), "did you mean flux-dev?")


def test_presets_are_sound_and_flags_win():
    """The two-step student has a preset of its own; a flag beats both."""
    for teacher in names():
        assert configure(teacher).teacher == teacher
    assert (
        configure(student_steps=2).w_isg == 0.3
        and configure(student_steps=2, w_isg=0.7).w_isg == 0.7
    )
    saved = json.loads(json.dumps(vars(configure())))
    assert differences(saved, configure(out="elsewhere", keep=9)) == []
    assert differences(saved, configure(seed=1)) == ["seed: 0 -> 1"]


# --- flags of every command ----------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "sample", "evaluate", "engine.bench", "digits.pretrain", "digits.ablation")


@pytest.fixture(params=COMMANDS)
def actions(request, monkeypatch):
    """What a command's parser has."""
    found = []

    def stop(self, *_):
        found.extend(self._actions)
        raise InterruptedError

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(InterruptedError):
        getattr(flags, f"{request.param.split('.')[-1]}_arguments")("")
    return found


def test_every_number_and_word_says_what_it_may_be(actions):
    """Numbers have bounds, or none on purpose: Range(). So nan and inf are refused."""
    for action in actions:
        if action.type in (int, float):
            assert isinstance(action.may, Range), action.option_strings
    assert actions and not any(action.choices for action in actions), "may, which suggests"


def test_every_field_says_what_it_may_be():
    for field in FIELDS:
        kinds = getattr(field.type, "__args__", (field.type,))
        assert field.metadata["help"]
        if int in kinds or float in kinds:
            assert isinstance(field.metadata["may"], Range), field.name
    words = [field.name for field in FIELDS if isinstance(field.metadata["may"], Choice)]
    adapters = ["adapter_init", "adapter_train", "base_dtype", "lora_format"]
    wanted = [
        *("t_dmd", "t_guidance", "t_fake"),
        "isg_distance",
        "disc_augment",
        *adapters,
        "shard",
        "crop",
        *("export", "keep_best"),
    ]
    assert words == wanted
    assert set(flags.DTYPE.words) == set(DTYPES)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_float_is_nan_or_infinite(command, value):
    """As a flag, and in the preset of a teacher of one's own."""
    floats = [field for field in FIELDS if float in getattr(field.type, "__args__", (field.type,))]
    assert len(floats) > 15
    for field in floats:
        several = field.type is not float
        count = 2 if several else 1
        given = [flag(field.name), *[value] * count]
        refused(command(train, *given), f"{flag(field.name)} is {value}", "must be a finite number")
        wrong = (float(value),) * 2 if several else float(value)
        with pytest.raises(ValueError, match=f"{flag(field.name)} is {value}"):
            configure(**{field.name: wrong})
    asked = (sample, "--teacher", "digits", "--prompt", "a one above a two", "--guidance", value)
    refused(command(*asked), f"--guidance is {value}")
    refused(command(train, "--plan", "--gpu-memory", value), f"--gpu-memory is {value}")


@pytest.mark.parametrize(
    "given, said",
    [
        ((train, "--lr", "-1"), "--lr is -1.0; it must be at least 0"),
        ((train, "--lr-start", "2"), "--lr-start is 2.0; it must be from 0 to 1"),
        ((train, "--betas", "0.9", "1"), "--betas is 0.9 1.0; each must be at least 0, below 1"),
        ((train, "--taus", "1.5", "0.5"), "--taus is 1.5 0.5; each must be above 0, at most 1"),
        ((train, "--shift", "0"), "--shift is 0.0; it must be above 0"),
        ((train, "--seed", "9" * 400, "--batch", "0"), "--batch is 0; it must be from 1 to 65,536"),
        ((train, "--learning-rate", "1"), "--learning-rate 1; did you mean --lr?"),
        ((train, "--learning-rate=1"), "; did you mean --lr?"),
        ((train, "--fake-learning-rate", "1"), "; did you mean --lr-fake? "),
        ((train, "--batch-size", "1"), "; did you mean --batch? "),
        ((train, "--resolution", "1"), "; did you mean --size? "),
        ((train, "--teachr", "digits"), "; did you mean --teacher? "),
        ((train, "--zzz", "1"), "unrecognized arguments: --zzz 1 (train.py --help"),
        ((train, "--teacher", "flux"), "; did you mean flux-dev?"),
        ((train, "--teacher", "sd3.5-large"), "; did you mean sd35-large?"),
        ((train, "--shard", "fdsp"), "; did you mean fsdp? "),
        ((train, "--disc-augment", "color"), "; did you mean colour? "),
        ((sample, "--sampler", "eular", "--prompt", "x"), "; did you mean euler? "),
        ((sample, "--teacher", "flux-shnel", "--prompt", "x"), "; did you mean flux-schnell?"),
        ((sample, "--seeds", "1", "--prompt", "x"), "; did you mean --seed? "),
        ((evaluate, "--teacher", "digit", "--student", "x"), "; did you mean digits?"),
        ((evaluate, "--dtype", "bf6", "--student", "x"), "; did you mean bf16? "),
    ],
)
def test_bounds_are_told_and_near_misses_suggested(command, given, said):
    refused(command(*given), said)


DRIVER = """
import runpy, sys
{before}
sys.argv[1:] = {arguments}
try:
    runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code or 0
slow = {{"torch", "numpy", "PIL", "matplotlib", "tokenizers", "huggingface_hub", "safetensors"}}
print("CODE", code, *sorted(slow & set(sys.modules)))
"""


def answer(name, *arguments, before=""):
    """Exit code and slow modules imported, stdout, stderr of a command in a Python of its own."""
    driver = DRIVER.format(name=name, arguments=list(map(str, arguments)), before=before)
    run = [sys.executable, "-c", driver]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    out, code = done.stdout.rstrip("\n").rsplit("CODE ", 1)
    return code, out, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_slow(name):
    start = time.time()
    code, out, _ = answer(name, "--help")
    assert code == "0" and "usage: " in out
    assert time.time() - start < 10, "a tenth of a second, where nothing else runs"


@pytest.mark.parametrize(
    "given",
    [
        ("train", "--stepz", 3),
        ("train", "--teacher", "flux"),
        ("train", "--lr", "nan"),
        ("train", "--plan", "--gpus", 0),
        ("train", "--help", "--teacher", "nobody"),
        ("sample", "--prompt", "x"),
        ("sample", "--teacher", "digits", "--prompt", "x", "--out", "x.jpg"),
        ("evaluate", "--student", "x", "--resamples", 1),
        ("evaluate", "--student", "x", "--teacher", "nobody"),
        ("engine.bench", "--width-scale", 9),
        ("digits.pretrain", "techer"),
        ("digits.ablation", "--kinds", "idea"),
    ],
)
def test_a_wrong_flag_imports_nothing_slow(given):
    code, out, err = answer(*given)
    assert (code, out) == ("2", "") and err.count("\n") == 1, err


@pytest.mark.parametrize("name", COMMANDS)
def test_an_older_python_is_refused_in_one_line(name):
    """It can read what it reads until then, down to 3.8."""
    for module in (name, "engine.flags", "config"):
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        ast.parse(text, feature_version=(3, 8))
    older = "sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'"
    code, out, err = answer(name, "--help", before=older)
    assert (code, out) == ("2", "") and err == "Python 3.11 or newer is needed; this is 3.10.4\n"


# --- sample.py -----------------------------------------------------------------------------------


def test_sample_draws_and_stores_its_settings(command, student, tmp_path):
    out = tmp_path / "deep" / "out.png"
    prompt = "a red three left of a blue seven"
    assert command(sample, "--checkpoint", student, "--prompt", prompt, "--out", out)[0] == 0
    picture = Image.open(out)
    settings = json.loads(picture.text["settings"])
    assert picture.size == (128, 128)
    assert settings["prompt"] == prompt and settings["taus"] == [1.0, 0.5] and settings["seed"] == 0


def test_an_image_is_the_same_alone_and_among_others(command, student, tmp_path):
    """Its noise depends on its own seed; other batch sizes may round one level differently."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three above a digit\n\na digit and a one\n")
    flags = ["--checkpoint", student, "--steps", 4]
    many = ["--prompts", prompts, "--seed", 5, 6, "--out", tmp_path / "many.png"]
    assert command(sample, *flags, *many)[0] == 0
    one = ["--prompt", "a digit and a one", "--seed", 6, "--out", tmp_path / "one.png"]
    assert command(sample, *flags, *one)[0] == 0
    alone = np.asarray(Image.open(tmp_path / "one.png")).astype(int)
    among = [np.asarray(Image.open(tmp_path / f"many-{i:03d}.png")).astype(int) for i in range(4)]
    assert np.abs(alone - among[3]).max() <= 1
    assert all(np.abs(alone - other).max() > 50 for other in among[:3])


def test_sample_draws_with_a_teacher(command, tmp_path):
    flags = ["--teacher", "digits", "--steps", 3, "--prompt", "a digit above a two"]
    out = tmp_path / "t.png"
    assert command(sample, *flags, "--negative", "a digit and a digit", "--out", out)[0] == 0
    settings = json.loads(Image.open(out).text["settings"])
    assert settings["guidance"] == 2.0 and settings["sampler"] == "euler"


def test_sample_refuses_what_it_cannot_draw(command, student, tmp_path):
    ask = ["--checkpoint", student, "--out", tmp_path / "o.png", "--prompt"]
    refused(command(sample, *ask, "a purple cow"), '"purple", "cow"', "vocabulary", "seven")
    refused(command(sample, *ask, "a red seven"), "not of the form")
    refused(command(sample, *ask, "a digit and a one", "--steps", 0), "--steps is 0")
    refused(
        command(sample, "--checkpoint", tmp_path / "no", "--prompt", "a one and a two"), "missing"
    )
    refused(command(sample, "--teacher", "flux", "--prompt", "a one and a two"), "flux")
    refused(command(sample, "--prompt", "a one and a two"), "--checkpoint", "--teacher")
    refused(
        command(sample, "--checkpoint", student, "--prompts", tmp_path / "none.txt"), "none.txt"
    )
    jpg = ["--prompt", "a one and a two", "--out", "x.jpg"]
    refused(command(sample, "--checkpoint", student, *jpg), ".png")
    other = ASSETS / "judge.safetensors"
    refused(command(sample, "--checkpoint", other, "--prompt", "a one and a two"), "not a student")


def test_sample_draws_no_black_image_of_what_is_no_number(command, tmp_path):
    """The student's weights are sound here, the guidance is not."""
    ask = ["--teacher", "digits", "--steps", 2, "--prompt", "a one and a two"]
    result = command(sample, *ask, "--guidance", 1e38, "--out", tmp_path / "x" / "o.png")
    code, _, err = result
    assert code == 2 and 'the image of "a one and a two", seed 0, holds values' in err
    assert not (tmp_path / "x" / "o.png").exists()


def test_sample_refuses_a_negative_prompt_that_nothing_reads(command, student):
    """FLUX takes none; a student is drawn without guidance unless told."""
    fox = ["--prompt", "a one and a two", "--negative", "a red one and a two"]
    refused(command(sample, "--teacher", "flux-dev", *fox), "--negative", "no negative prompt")
    refused(command(sample, "--checkpoint", student, *fox), "--negative", "without guidance")
    none = (sample, "--teacher", "digits", "--guidance", 0, *fox)
    refused(command(*none), "--negative", "without guidance")


# --- evaluate.py, weights ------------------------------------------------------------------------


def test_evaluate_refuses_missing_files(command, student, tmp_path):
    refused(command(evaluate, "--student", tmp_path / "none.safetensors"), "none.safetensors")
    refused(command(evaluate, "--student", student, "--teacher", "nobody"), "nobody")


def test_weights_must_be_those_of_the_network(tmp_path):
    """Names, shapes and finite values are checked before a tensor is assigned."""
    net, path = find("digits").build(2.0), tmp_path / "w.safetensors"
    before = net.pos_embed.clone()
    save_weights(torch.nn.Linear(2, 2), path, torch.float32, {})
    with pytest.raises(ValueError, match=r"another network: .*context_embedder.*unexpected \(bias"):
        load_weights(net, path)
    other = find("digits").build(2.0)
    other.pos_embed = torch.nn.Parameter(torch.zeros(1, 9, 96))
    save_weights(other, path, torch.float32, {})
    with pytest.raises(ValueError, match="pos_embed has shape"):
        load_weights(net, path)
    other = find("digits").build(2.0)
    torch.nn.init.constant_(other.context_embedder.bias, float("nan"))
    save_weights(other, path, torch.float32, {})
    with pytest.raises(ValueError, match="context_embedder.bias holds values that are not finite"):
        load_weights(net, path)
    assert torch.equal(net.pos_embed, before), "nothing may be assigned from a refused file"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(net, path)


def test_evaluate_refuses_damaged_samples_of_the_teacher(command, student, tmp_path, monkeypatch):
    (tmp_path / "teacher_samples.npz").write_bytes(b"PK not a zip")
    monkeypatch.setattr("digits.exam.ASSETS", tmp_path)
    refused(
        command(evaluate, "--student", student), "teacher_samples.npz", "digits.pretrain samples"
    )


# --- python -m plane -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        (["idea"], 'unknown scenario "idea"; choose from all, ida, isg'),
        (["ida", "--seeds", "0"], "--seeds is 0"),
        (["ida", "--seedz", "1"], "--seedz"),
        (["ida", "--out", "/proc/plane"], "/proc/plane"),
    ],
)
def test_plane_refuses_what_cannot_be(command, flags, named):
    refused(command(plane, *flags), "python -m plane: ", named)
