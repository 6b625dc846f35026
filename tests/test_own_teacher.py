"""A teacher of one's own, through every command: the blocks of docs/own_teacher.md, as they are."""

import json
import re
import shutil
import sys
import traceback

import numpy as np
import pytest
import torch
from conftest import refused
from own import MINE, PAGE, make_own
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from engine import bench
from teachers import find

OTHER = """
from dataclasses import dataclass

import torch.nn.functional as F
from mine import FILE, PRESET, Mine, Sizes
from torch import nn

from nets.files import Part
from teachers import Networks


@dataclass(frozen=True)
class Fold:
    factor: int = 2


class Folded(nn.Module):  # latents with weights: pixels in twos, times a number
    factor, channels = 2, 12

    def __init__(self, cfg):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 2.0))

    def encode(self, image):
        return F.pixel_unshuffle(image, 2) / self.scale

    def decode(self, latent):
        return F.pixel_shuffle(latent * self.scale, 2)


class Eyes(nn.Module):  # convolutions, in place of a ViT
    width, count = 8, 2

    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 2, stride=2)

    def maps(self, image):
        near = F.gelu(self.near(image.to(self.near.weight.dtype)))
        return [near, self.far(near)]


class Other(Mine):
    def parts(self):
        return super().parts() | {"vae": Part("", (FILE.name,), prefix="vae.")}

    def full_size(self):
        return Networks(Sizes(channels=12, patch=2, width=24, depth=1), vae=Fold())

    def build_vae(self):
        return Folded(self.sizes.vae)

    def build_backbone(self):
        return Eyes()


TEACHER = Other("other", PRESET)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """mine.py, its weights, made as the page says, and pictures."""
    folder = tmp_path_factory.mktemp("own")
    make_own(folder)
    yield folder
    sys.modules.pop("mine", None)


def flags_for(place, out, *more, file="mine.py"):
    flags = ["--teacher", place / file, "--data", place / "pictures", "--out", out]
    flags += ["--steps", 4, "--batch", 2, "--ttur", 1, "--exam-every", 0, "--size", 16, 32]
    return [*flags, *more]


@pytest.fixture(scope="module")
def run(place):
    """Of four iterations: IDA, ISG and the discriminator, as in the preset; rectangular."""
    with pytest.MonkeyPatch.context() as patch:
        flags = flags_for(place, place / "run", "--save-every", 2, "--export", "full")
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
    return place / "run"


def log_of(run):
    return np.genfromtxt(run / "log.csv", delimiter=",", names=True)


def forms(path, prefix=""):
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name: file.get_slice(name).get_shape() for name in names}, file.metadata()


# --- the row of commands -------------------------------------------------------------------------


def test_the_page_is_short_and_its_teacher_complete():
    assert MINE.count("\n") < 120 and "TEACHER = " in MINE
    for command in ("train", "--cache", "--plan", "sample", "evaluate", "engine.bench"):
        assert command in PAGE.read_text().split("## The commands")[1]


def test_a_run_moves_every_weight_and_keeps_the_teachers_name(place, run):
    """Four iterations of the whole method. The student's file is the teacher's in names and shapes,
    and so is the merged one."""
    log = log_of(run)
    for name in ("dmd", "isg", "fake"):
        assert np.isfinite(log[name]).all() and (log[name] > 0).all(), name
    judged = log["disc"][~np.isnan(log["disc"])]
    assert len(judged) and (judged > 0).all() and (log["skipped"] == 0).all()
    ours, about = forms(run / "student.safetensors")
    assert ours == forms(place / "mine.safetensors", "model.")[0]
    assert forms(run / "full.safetensors")[0] == forms(place / "mine.safetensors")[0]
    assert about["teacher"] == "mine" and json.loads(about["size"]) == [16, 32]
    before, after = load_file(place / "mine.safetensors"), load_file(run / "student.safetensors")
    still = [name for name in after if torch.equal(before[name], after[name])]
    assert not still, f"did not move: {still}"
    assert (run / "samples.png").is_file()


def test_the_same_command_continues_a_run(command, place, run, tmp_path):
    """From the checkpoint at half of it, to the same log and the same student, bit for bit."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    (tmp_path / "run" / "student.safetensors").unlink()
    flags = flags_for(place, tmp_path / "run", "--save-every", 2, "--export", "full")
    code, out, err = command(train, *flags)
    assert code == 0 and "steps 2 to 4" in out, err
    for name in ("log.csv", "student.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name


def test_from_a_cache_the_run_is_the_same(command, place, run, tmp_path):
    """To rounding; and it is for the size it was made for."""
    flags = flags_for(place, tmp_path / "run", "--cache", tmp_path / "cache")
    code, _, err = command(train, *flags)
    assert code == 0, err
    for name in ("dmd", "isg", "gan", "fake", "disc"):
        np.testing.assert_allclose(log_of(tmp_path / "run")[name], log_of(run)[name], rtol=1e-3)
    wider = flags_for(place, tmp_path / "wider", "--cache", tmp_path / "cache", "--size", 32, 32)
    refused(command(train, *wider), "size: [16, 32]")


def test_without_a_discriminator_and_with_a_gpus_precision(command, place, tmp_path):
    more = ["--no-gan", "--bf16", "--recompute", "--steps", 2]
    code, _, err = command(train, *flags_for(place, tmp_path / "run", *more))
    assert code == 0, err
    log = log_of(tmp_path / "run")
    assert "disc" not in log.dtype.names and np.isfinite(log["fake"]).all()


def row(text, name):
    """The numbers of a plan's line."""
    line = next(x for x in text.splitlines() if x.strip().startswith(name))
    return [float(x) for x in re.findall(r"\d[\d.e+-]*", line.strip().removeprefix(name))]


def test_the_plan_has_numbers(command, place):
    """Of the whole method, as on GPUs, rectangular."""
    flags = ["--teacher", place / "mine.py", "--plan", "--gpus", 1, "--size", 16, 48]
    code, out, err = command(train, *flags, "--bf16", "--recompute")
    assert code == 0 and out.startswith("mine, 16 x 48") and "fits" in out, err
    assert len(row(out, "sum")) == 3 and min(row(out, "sum")) > 0
    assert min(row(out, "discriminator ")) > 0


def test_teacher_and_student_draw(command, place, run, tmp_path):
    """An image enlarged as the teacher says, of the size asked for, or of its own."""
    flags = [
        "--teacher",
        place / "mine.py",
        "--prompt",
        "a red square",
        "--out",
        tmp_path / "x.png",
    ]
    for more, steps in ((["--steps", 3], 3), (["--checkpoint", run / "student.safetensors"], 4)):
        for size in ([], ["--size", 16, 40]):
            code, _, err = command(sample, *flags, *more, *size)
            assert code == 0, err
            with Image.open(tmp_path / "x.png") as image:
                settings = json.loads(image.text["settings"])
                own = (128, 64) if "--checkpoint" in more else (128, 128)
                assert image.size == ((160, 64) if size else own)
            assert settings["teacher"] == "mine" and settings["steps"] == steps


def test_a_student_is_evaluated_by_the_teachers_own_features(command, place, run, tmp_path):
    """No DINOv2 and no CLIP is looked for."""
    flags = ["--teacher", place / "mine.py", "--student", run / "student.safetensors"]
    flags += ["--data", place / "pictures", "--steps", "2,4", "--teacher-steps", 3, "--n", 18]
    flags += ["--resamples", 3, "--out", tmp_path]
    code, out, err = command(evaluate, *flags)
    assert code == 0, err
    assert "FD small" in out and "student 4" in out and "DINOv2" not in out
    rows = json.loads((tmp_path / "metrics.json").read_text())["measures"]
    assert all(np.isfinite(x["FD small"]).all() for x in rows[1:])
    refused(command(evaluate, *flags, "--clip-h", "x"), "mine is measured by")


def test_bench_times_it(command, place, tmp_path):
    """At a third of its width; the peak is about the planned."""
    flags = ["--teacher", place / "mine.py", "--size", 16, 32, "--batch", 1, "--iterations", 1]
    flags += ["--width-scale", 0.34, "--depth", 1, "--out", tmp_path / "b.json"]
    code, out, err = command(bench, *flags)
    assert code == 0 and out.startswith("mine, 16 x 32"), err
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["peak"] == pytest.approx(found["planned"], rel=0.2)
    assert all(
        found["parts"][part]["flops"] > 0 for part in ("student", "teacher", "discriminator")
    )


# --- the seam, and what is refused ---------------------------------------------------------------


def test_a_vae_and_a_backbone_of_ones_own_need_no_more_than_their_builders(
    command, place, tmp_path
):
    """Trained, planned, made narrow; from a file that imports another beside it."""
    for file in (place / "mine.py", place / "pictures"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "other.py").write_text("import torch\n" + OTHER)
    sys.modules.pop("mine", None)
    family = find(str(tmp_path / "other.py"))
    nets = {"denoiser": family.build(1.0), "vae": family.build_vae()}
    nets |= {"backbone": family.build_backbone(), "text": sys.modules["mine"].Text(48)}
    state = {
        family.prefix(part) + name: tensor
        for part, net in nets.items()
        for name, tensor in net.state_dict().items()
    }
    save_file(state, tmp_path / "mine.safetensors")
    assert family.latent_shape((16, 32)) == (12, 8, 16) and family.unit() == 4
    flags = flags_for(tmp_path, tmp_path / "run", "--steps", 2, file="other.py")
    flags += ["--weights", tmp_path]
    code, _, err = command(train, *flags)
    assert code == 0 and np.isfinite(log_of(tmp_path / "run")["fake"]).all(), err
    code, out, _ = command(train, *flags, "--plan", "--no-gan", "--bf16")
    assert code == 0 and row(out, "sum")[0] > 0
    small = family.scaled(0.5, 0)
    assert small.sizes.vae == family.sizes.vae and small.sizes.denoiser.heads == 2


def test_a_student_asks_for_its_teachers_file(command, place, run, tmp_path):
    student = run / "student.safetensors"
    said = 'is a student of "mine", a teacher of your own; give its file: --teacher FILE'
    refused(command(sample, "--checkpoint", student, "--prompt", "fox"), said)
    refused(command(evaluate, "--student", student), said)
    (tmp_path / "named.py").write_text(MINE.replace('Mine("mine"', 'Mine("another"'))
    given = ["--teacher", tmp_path / "named.py", "--prompt", "fox"]
    refused(command(sample, "--checkpoint", student, *given), "is a student of mine")


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "there is no such file"),
        ("x = 1\n", "defines no TEACHER"),
        ("TEACHER = 'mine'\n", "defines no TEACHER"),
        (MINE.replace('Mine("mine"', 'Mine("digits"'), '"digits" is taken'),
        (MINE, "lacks mine.safetensors\n"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_in_one_line(command, place, tmp_path, text, named):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    out = ["--data", place / "pictures", "--out", tmp_path / "run"]
    refused(command(train, "--teacher", file, *out), named)
    refused(command(sample, "--teacher", file, "--prompt", "fox"), named)


def test_what_fails_inside_the_file_keeps_its_traceback(command, tmp_path):
    """Also an error of a kind that the commands' own refusals have or had."""
    file = tmp_path / "mine.py"
    for line in ("int('x')", "open('/nowhere')", "1 + ''", "import nowhere"):
        file.write_text(f"{line}\n")
        for module, more in ((train, []), (sample, ["--prompt", "fox"])):
            with pytest.raises(Exception, match=r".") as caught:  # a refusal is a SystemExit
                command(module, "--teacher", file, *more)
            told = "".join(traceback.format_exception(caught.value))
            assert f'"{file}", line 1' in told and line in told
