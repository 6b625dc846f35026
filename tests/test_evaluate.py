"""evaluate.py, end to end: with a FLUX.1 of a few thousand weights, whose official files the tests
write themselves, and with the embedded teacher."""

import copy
import gc
import json
import os
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small import SEER, SMALL, embedded, make_official
from test_blip import SMALL as JUDGE
from test_blip import write_vocabulary
from torch import nn

import evaluate
import teachers
from measure import scorers as measures_by
from measure.distances import fit, resize
from model import Flux
from nets.blip import ImageReward, bert_tokenizer, load_image_reward
from nets.clip import CLIP, TEXT_TOWER, VISION_TOWER, to_open_clip
from nets.text import T5
from nets.vision import CLIPVision, load_clip_text, load_clip_vision
from nets.weights import save_weights
from schedule import Flow

TINY = copy.copy(SMALL["flux-dev"])
TINY.t5_tokens = 12
VIT = replace(TINY.sizes.backbone, hooks=(), positions="facebook", recompute=False)
CLIP_FILE = "clip-vit-large-patch14/model.safetensors"
PROMPTS = ["a red fox", "two men", "rain", "an old ship at sea", "blue", "a house"]


def random(net: nn.Module, seed: int) -> nn.Module:
    """Weights that make something of their input, norms and zeros included."""
    draw = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2, generator=draw)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the files of FLUX.1-dev and of the networks that judge."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teachers.FOUND, "flux-dev", TINY)
        make_official("flux-dev", folder)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(teachers.FOUND, "flux-dev", TINY)
    monkeypatch.setattr(measures_by, "DINOV2", VIT)
    for title, scorer in measures_by.SCORERS.items():
        wide = title == "CLIP-g"  # another network than the others
        vision = replace(SEER, hidden=20) if wide else SEER
        small = replace(scorer, vision=vision, text=TINY.sizes.reader)
        monkeypatch.setitem(measures_by.SCORERS, title, small)
    monkeypatch.setitem(measures_by.JUDGES, "ImageReward", JUDGE)


def make_student(folder, net, teacher="flux-dev", steps=2, taus=(1.0, 0.5), size=(16, 32)):
    about = {"teacher": teacher, "shift": "1.0", "steps": str(steps), "sampler": "x0"}
    about |= {"taus": json.dumps(taus), "size": json.dumps(size)}
    save_weights(net, folder / "student.safetensors", torch.float32, about)
    return folder / "student.safetensors"


@pytest.fixture
def student(tmp_path):
    return make_student(tmp_path, random(Flux(TINY.sizes.denoiser, Flow()), 9))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def run(command):
    """run("--flag", ...) -> exit code, stdout, stderr."""
    return partial(command, evaluate)


@pytest.fixture
def flags(student, weights, prompts):
    few = ["--steps", "1,2", "--teacher-steps", 3, "--per-prompt", 4, "--resamples", 4]
    return [
        *("--student", student, "--weights", weights, "--prompts", prompts),
        *("--n", 26, "--dtype", "fp32", "--batch", 8, *few),
    ]


FEW = ["--n", 16]  # images, where none is measured


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}


def times_of(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.png")}


def clip_score_of(folder, weights, file=CLIP_FILE, view=resize):
    """Each image with its own prompt, one by one."""
    images = load_clip_vision(weights / file, cfg=SEER)
    words = [(weights / CLIP_FILE).with_name(name) for name in ("vocab.json", "merges.txt")]
    captions = load_clip_text(weights / file, *words, cfg=TINY.sizes.reader)
    scores = []
    for k in range(24):
        picture = torch.tensor(np.array(Image.open(folder / f"{k:06d}.png"))).movedim(-1, 0)
        seen, asked = images(view(picture[None] / 255, 16)), captions.embedding([PROMPTS[k // 4]])
        scores.append((seen * asked).sum().item())
    return sum(scores) / 24


def reward_of(folder, weights):
    words = weights / "bert-base-uncased" / "vocab.txt"
    net = load_image_reward(weights / "ir.pt.safetensors", words, cfg=JUDGE)
    pictures = [Image.open(folder / f"{k:06d}.png") for k in range(24)]
    pictures = [torch.tensor(np.array(picture)).movedim(-1, 0)[None] / 255 for picture in pictures]
    scores = [net.score(resize(x, 12), [PROMPTS[k // 4]]) for k, x in enumerate(pictures)]
    return torch.cat(scores).mean().item()


# --- any teacher ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_any_teacher_is_measured_against_its_student(run, flags, student, weights):
    """26 images asked for, 4 of each of 6 prompts: 24. Rows: the teacher's many steps and as few as
    the student's, then the student's; the first has no distance to itself."""
    code, out, err = run(*flags)
    assert code == 0, err
    metrics = json.loads((student.parent / "evaluation" / "metrics.json").read_text())
    assert (metrics["images"], metrics["prompts"], metrics["size"]) == (24, 6, [16, 32])
    rows = metrics["measures"]
    assert [(row["name"], row["nfe"]) for row in rows] == [
        *(("teacher 3", 3), ("teacher 2", 2), ("student 1", 1), ("student 2", 2))
    ]
    against = ("FD-DINOv2", "patch FD-DINOv2", "precision", "recall", "KD")
    for row in rows:
        for title in (*against, "Vendi", "distance", "CLIP", "brightness", "saturation"):
            known = title not in against or row is not rows[0]
            assert (row[title] is not None) == known, f"{row['name']}: {title}"
            assert not known or np.isfinite(row[title]).all()
    assert all(title in out for title in against) and "teacher 3 |   3 |" in out and "±" in out
    made = student.parent / "evaluation" / "images" / "student-2"
    assert rows[3]["CLIP"][0] == pytest.approx(clip_score_of(made, weights), abs=1e-6)
    assert (student.parent / "evaluation" / "samples.png").stat().st_size > 1000
    assert len(files_of(student.parent / "evaluation" / "images")) == 4 * 24


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_a_student_that_is_the_teacher_is_at_no_distance(run, flags, weights, tmp_path):
    """The teacher's own weights without guidance, by the same sampler: the same noise for the same
    prompt gives the same images. With guidance it does not."""
    folder = tmp_path / "same"
    folder.mkdir()
    teacher = TINY.load(1.0, [weights / "flux1-dev.safetensors"])
    taus = TINY.sampling_times(Flow(), 3, (16, 32))
    same = make_student(folder, teacher, steps=3, taus=taus)
    flags = [*flags, "--student", same, "--sampler", "euler", "--steps", 3]
    for guidance in (0, 9):
        code, _, err = run(*flags, "--guidance", guidance, "--out", tmp_path / str(guidance))
        assert code == 0, err
        made = files_of(tmp_path / str(guidance) / "images")
        assert len(made) == 48
        pictures = [
            np.stack([np.asarray(Image.open(p)) for p in sorted(each.iterdir())])
            for each in sorted((tmp_path / str(guidance) / "images").iterdir())
        ]
        assert (np.array_equal(*pictures)) == (guidance == 0)
        assert len(np.unique(pictures[0].reshape(24, -1), axis=0)) == 24, "each its own noise"
    row = json.loads((tmp_path / "0" / "metrics.json").read_text())["measures"][1]
    assert row["FD-DINOv2"] == pytest.approx([0, 0], abs=1e-6)
    assert row["precision"] == row["recall"] == [1, 0]


def test_an_interrupted_evaluation_draws_only_what_is_missing(flags, student):
    """Images gone, one cut short while it was written, one of other settings: these are drawn anew
    and are what they were; the others' files are not touched."""
    flags = [*flags, *FEW]
    draw(flags)
    images = student.parent / "evaluation" / "images"
    whole, before = files_of(images), times_of(images)
    (images / "teacher-3" / "000004.png").unlink()
    (images / "student-2" / "000015.png").rename(images / "student-2" / "000015.part.png")
    (images / "student-1" / "000007.png").write_bytes(whole["student-1/000006.png"])
    draw(flags)
    (images / "student-2" / "000015.part.png").unlink(missing_ok=True)
    assert files_of(images) == whole
    after = times_of(images)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"teacher-3/000004.png", "student-2/000015.png", "student-1/000007.png"}
    before = times_of(images)
    draw([*flags, "--guidance", 7])
    after = times_of(images)
    assert {name.split("/")[0] for name in before if before[name] != after[name]} == {
        *("teacher-2", "teacher-3")
    }, "only the teacher is guided"


def draw(flags):
    """All that evaluate.py does before it measures."""
    evaluate.draw_missing(planned(flags), torch.device("cpu"))


def test_images_are_of_this_student_and_this_teacher(flags, student, tmp_path):
    """Another file in the same place is noticed; another teacher may be given as a file."""
    flags = [*flags, *FEW]
    task = planned(flags)
    evaluate.draw_missing(task, torch.device("cpu"))
    assert not any(evaluate.missing_images(task, s) for s in task.samplings)
    make_student(student.parent, random(Flux(TINY.sizes.denoiser, Flow()), 10))
    assert [len(evaluate.missing_images(task, s)) for s in task.samplings] == [0, 0, 16, 16]
    other = tmp_path / "other.safetensors"
    save_weights(random(Flux(TINY.sizes.denoiser, Flow()), 11), other, torch.float32, {})
    task = planned([*flags, "--teacher", other])
    assert [len(evaluate.missing_images(task, s)) for s in task.samplings] == [16, 16, 16, 16]
    evaluate.draw_missing(task, torch.device("cpu"))
    assert not any(evaluate.missing_images(task, s) for s in task.samplings)


def planned(flags):
    """What main decides on."""
    argv = sys.argv
    try:
        sys.argv = ["evaluate.py", *map(str, flags)]
        return evaluate.resolve_task(evaluate.evaluate_arguments(None))[0]
    finally:
        sys.argv = argv


def test_ranks_share_the_images_and_draw_what_one_would(flags, tmp_path):
    """Image by image, bit for bit; five at a time, so that batches are cut elsewhere: within one
    level of 255."""
    for world, batch in ((1, 1), (2, 1), (3, 5)):
        out = tmp_path / f"{world}"
        task = planned([*flags, *FEW, "--steps", 2, "--out", out, "--batch", batch])
        shares = [evaluate.missing_images(task, task.samplings[0], r, world) for r in range(world)]
        assert sorted(k for share in shares for k in share) == list(range(16))
        for rank in range(world):
            evaluate.draw_missing(task, torch.device("cpu"), rank, world)
    one, two, three = (files_of(tmp_path / f"{world}" / "images") for world in (1, 2, 3))
    assert len(one) == 3 * 16 and one == two and one.keys() == three.keys()
    for name in one:
        few, many = (np.asarray(Image.open(tmp_path / w / "images" / name)) for w in "13")
        assert np.abs(few.astype(int) - many.astype(int)).max() <= 1


def test_encoders_are_gone_before_a_denoiser_comes_and_that_before_the_next(flags, monkeypatch):
    loaded, load_net = [], evaluate.load_net

    def watched(task, who, *how):
        alive = [o for o in gc.get_objects() if type(o) in (T5, CLIP, Flux)]
        loaded.append((who, alive))
        return load_net(task, who, *how)

    monkeypatch.setattr("engine.drawing.load_net", watched)
    gc.collect()  # what other tests left
    draw([*flags, *FEW])
    assert loaded == [("teacher", []), ("student", [])]
    draw([*flags, *FEW])
    assert len(loaded) == 2, "where nothing is missing nothing is loaded"


# --- other networks that score -------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers(weights):
    """Two more CLIPs beside the first: with a scale, and as torch.save writes open_clip's names."""
    vision, text = random(CLIPVision(SEER), 20), random(CLIP(TINY.sizes.reader), 21)
    both = vision.state_dict() | text.state_dict()
    save_file(both, weights / "h.safetensors")
    save_file(both | {"logit_scale": torch.tensor(50.0).log()}, weights / "pick.safetensors")
    random(vision, 22)
    theirs = to_open_clip(vision.state_dict(), 1, VISION_TOWER)
    theirs |= to_open_clip(text.state_dict(), 2, TEXT_TOWER)
    torch.save({"epoch": 3, "state_dict": theirs}, weights / "hps.pt")
    (weights / "bert-base-uncased").mkdir()
    words = write_vocabulary(weights / "bert-base-uncased" / "vocab.txt")
    torch.save(
        random(ImageReward(JUDGE, bert_tokenizer(words)), 23).state_dict(), weights / "ir.pt"
    )
    return ("--pickscore", weights / "pick.safetensors", "--hpsv2", weights / "hps.pt")


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_preferences_are_scored_where_their_files_are_given(run, flags, scorers, student, weights):
    """PickScore is the cosine times the file's scale; HPSv2 sees the whole image, black beside it;
    ImageReward reads each image with its own prompt; a file of torch.save's is copied into
    safetensors, once."""
    flags = [*flags, *scorers, "--clip-h", weights / "h.safetensors"]
    code, out, err = run(*flags, "--imagereward", weights / "ir.pt")
    assert code == 0, err
    folder = student.parent / "evaluation"
    rows = json.loads((folder / "metrics.json").read_text())["measures"]
    made = folder / "images" / "student-2"
    scores = {
        "PickScore": 50 * clip_score_of(made, weights, "pick.safetensors"),
        "HPSv2": clip_score_of(made, weights, "hps.pt.safetensors", fit),
        "CLIP-H": clip_score_of(made, weights, "pick.safetensors"),  # the same towers
        "ImageReward": reward_of(made, weights),
    }
    for title, wanted in scores.items():
        assert rows[3][title][0] == pytest.approx(wanted, abs=2e-5) and rows[3][title][1] > 0
        assert title in out and rows[0][title][0] != rows[3][title][0]
    assert abs(clip_score_of(made, weights, "hps.pt.safetensors") - scores["HPSv2"]) > 1e-3
    before = (weights / "hps.pt.safetensors").stat().st_mtime_ns
    planned(flags)
    assert (weights / "hps.pt.safetensors").stat().st_mtime_ns == before


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_scorers_files_are_looked_into_before_images_are_drawn(run, flags, scorers, student):
    """Of another network, absent, or with code in it."""
    wrong = scorers[3].with_name("code.pt")
    torch.save({"state_dict": Harm(wrong.with_name("harm"))}, wrong)
    listed, empty = (scorers[3].with_name(name) for name in ("list.pt", "empty.bin"))
    torch.save([torch.zeros(2)], listed)
    empty.write_bytes(b"")
    for option, path, named in (
        ("--clip-g", scorers[1], "has shape [24, 16], the network wants [20, 16]"),
        ("--clip-h", scorers[1].with_name("none.pt"), "none.pt is missing"),
        ("--hpsv2", wrong, "code.pt is damaged, or no dict of tensors"),
        ("--hpsv2", listed, "list.pt is damaged, or no dict of tensors"),
        ("--clip-h", empty, "empty.bin is damaged, or no dict of tensors"),
        ("--pickscore", scorers[3], "hps.pt.safetensors lacks logit_scale"),
        ("--imagereward", scorers[1], "pick.safetensors holds another network"),
    ):
        code, _, err = run(*flags, option, path)
        assert code == 2 and err.count("\n") == 1 and named in err, err
        assert not (student.parent / "evaluation").exists()
    assert not wrong.with_name("harm").exists(), "its code was run"
    same = make_student(student.parent, embedded(), "digits", size=(16, 16))
    code, _, err = run("--student", same, "--pickscore", scorers[1])
    assert code == 2 and "PickScore reads 224 x 224 pixels" in err and err.count("\n") == 1


# --- Inception -----------------------------------------------------------------------------------


class Extractor(nn.Module):
    """In the place of torch-fidelity's: 8 means over the picture."""

    sizes: list = []

    def __init__(self, name, features, path):
        super().__init__()
        assert features == ["2048"] and path.endswith(".pth")

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.sizes.append(tuple(images.shape[2:]))
        return (nn.functional.adaptive_avg_pool2d(images.float(), (2, 2))[:, :2].flatten(1),)


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_fid_comes_with_a_weights_file_and_its_package(run, flags, tmp_path, monkeypatch, student):
    path = tmp_path / "inception.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if not installed
    code, _, err = run(*flags, "--inception", path)
    assert code == 2 and "pip install torch-fidelity" in err and err.count("\n") == 1
    package = ModuleType("torch_fidelity")
    package.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    code, _, err = run(*flags, "--inception", path)
    assert code == 2 and "inception.pth" in err and err.count("\n") == 1
    torch.save({"weight": os.getcwd}, path)  # code, which the package would run
    code, _, err = run(*flags, "--inception", path)
    assert code == 2 and "no file of its weights" in err and err.count("\n") == 1
    torch.save({"weight": torch.zeros(1)}, path)
    code, out, err = run(*flags, "--inception", path)
    assert code == 0, err
    rows = json.loads((student.parent / "evaluation" / "metrics.json").read_text())["measures"]
    assert rows[0]["FID-T"] is None and rows[2]["FID-T"][0] > 0 and rows[2]["patch FID-T"][0] > 0
    assert "| patch FID-T |" in " ".join(out.split())


# --- the embedded teacher ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_the_embedded_teachers_evaluation_adds_the_exam(run, tmp_path):
    """The first 64 of the exam's images. The teacher's 50 steps are the exam's own, from assets/,
    so its row there is the floor of FD-T; a student with its weights is as accurate."""
    same = make_student(tmp_path, embedded(), "digits", size=(16, 16))
    code, out, err = run("--student", same, "--n", 64, "--steps", 2, "--resamples", 3)
    assert code == 0, err
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    names = ["teacher 50", "teacher 2", "student 2"]
    assert [row["name"] for row in metrics["measures"]] == names
    assert [row["name"] for row in metrics["table"]] == ["real, held out", *names]
    assert metrics["measures"][1]["nfe"] == 4 and metrics["measures"][1]["FD ViT"][0] > 0
    assert "CLIP" not in out
    assert metrics["table"][1]["accuracy"] > 85 and metrics["table"][1]["new"] is None
    assert "new pairs" in out and "FD judge" in out
    digits = tmp_path / "digits.txt"
    digits.write_text("a digit and a one\na red two above a digit\n" * 3)
    more = ("--prompts", digits, "--n", 24, "--teacher-steps", 2, "--out", tmp_path / "other")
    code, out, err = run("--student", same, "--steps", 1, "--resamples", 3, *more)
    assert code == 0 and "FD judge" in out and "new pairs" not in out, err


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--steps", "1,two"], '--steps: "1,two" is no list of step numbers such as 1,2,4,8'),
        (["--steps", "0"], '--steps: "0" is no list'),
        (["--stepz", "1"], "--stepz"),
        (["--n", "0"], "--n is 0"),
        (["--n", "12"], "3 prompts with 4 images each say too little"),
        (["--resamples", "1"], "--resamples is 1"),
        (["--teacher", "flux"], 'unknown teacher "flux": no file; choose from digits, flux-dev'),
        (["--teacher", "digits"], "is a student of flux-dev"),
        (["--size", "15", "24"], "15 is no multiple of 16"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--data", "DIR"], "not allowed with argument --prompts"),
        (["--weights", "nowhere"], "nowhere is no folder"),
        (["--student", "none.safetensors"], "none.safetensors is missing"),
        (["--sampler", "heun"], "heun"),
        (["--inception", "none.pth"], "none.pth"),
        (["--out", evaluate.__file__], "evaluate.py"),
    ],
)
def test_evaluate_refuses_what_cannot_be(run, flags, monkeypatch, student, wrong, named):
    package = ModuleType("torch_fidelity")
    package.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    code, _, err = run(*flags, *wrong)
    assert code == 2 and err.count("\n") == 1 and named in err, err
    assert not (student.parent / "evaluation").exists(), "refused before anything is made"


def test_evaluate_refuses_a_file_without_prompts_and_weights_that_lack_a_judge(
    run, flags, weights, prompts, tmp_path
):
    prompts.write_text("\n \n")
    code, _, err = run(*flags)
    assert code == 2 and "prompts.txt holds no prompt" in err and err.count("\n") == 1
    for path in weights.iterdir():
        if "dinov2" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    code, _, err = run(*flags, "--weights", tmp_path)
    assert code == 2 and "dinov2-large" in err and "hf download" in err and err.count("\n") == 1


def test_captions_come_from_a_folder_of_images_too(flags, tmp_path):
    """Without looking at the images, which need not even be sound."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        (folder / f"{i}.jpg").touch()
        (folder / f"{i}.txt").write_text(prompt)
    at = flags.index("--prompts")
    given = [*flags[:at], "--data", folder, *flags[at + 2 :]]
    assert planned(given).prompts == PROMPTS


def main_of(flags):
    sys.argv = ["evaluate.py", *map(str, flags)]
    evaluate.main()


def test_two_ranks_share_the_work(tmp_path):
    """On the embedded teacher: one of them prints, every image is there."""
    same = make_student(tmp_path, embedded(), "digits", size=(16, 16))
    (tmp_path / "digits.txt").write_text("a digit and a one\na red two above a digit\n" * 4)
    flags = ["--prompts", tmp_path / "digits.txt", "--images", 32, "--teacher-steps", 2]
    flags += ["--student", same, "--steps", 1, "--resamples", 2]
    processes.finish(main_of, 2, tmp_path / "printed.txt", flags)
    assert (tmp_path / "printed.txt").read_text().count("| teacher 2 ") == 1, "one process prints"
    assert len(files_of(tmp_path / "evaluation" / "images")) == 2 * 32
