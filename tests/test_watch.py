"""The watch: what it draws, that it disturbs nothing, what is kept; sheets side by side."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import SMALL, make_official

import teachers
import train
from config import Refusal
from engine import ranks, results, sheets, watch
from engine.build import build_nets, open_training_data
from engine.run import Run
from engine.start import check_choices
from engine.watch import Watch, news, share
from measure.distances import round_8bit
from measure.drift import MEASURES, PIXELS, far, farthest
from nets.weights import read_metadata
from schedule import draw_samples, generator, grid, normal
from teachers import configure, find

CPU = torch.device("cpu")
PROMPTS, EACH = 3, 2


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two of the teacher's steps; three prompts, two images of each."""
    monkeypatch.setattr(watch, "STEPS", 2)
    family = replace_watched(find("digits"))
    monkeypatch.setitem(teachers.FOUND, "digits", family)


def replace_watched(family, prompts=PROMPTS):
    other = family.resized(family.sizes)
    other.watched = prompts, EACH
    return other


def made(out, **flags):
    """A watch of a run that has not begun; its networks are the teacher."""
    cfg = configure(**{"batch": 4, "watch_every": 2, "out": str(out), **flags})
    nets, run = build_nets(cfg, CPU), Run()
    return Watch(cfg, out, nets, find("digits").data(cfg.seed), run, CPU), nets, run


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """Such a watch, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "STEPS", 2)
        patch.setitem(teachers.FOUND, "digits", replace_watched(find("digits")))
        return made(tmp_path_factory.mktemp("watch"))


def test_it_measures_the_students_images_beside_the_teachers_of_the_same_noise(began):
    """Once more here, image by image, batches aside: student by the x0 sampler at its own anchors,
    teacher guided."""
    eyes, nets, run = began
    text, captions = find("digits").load_text({}), find("digits").data(0)(range(PROMPTS)).captions
    assert [*eyes.conds] == captions and eyes.each == EACH

    def pixels(taus, sampler, guidance):
        found = []
        for s in range(EACH):
            draws = [generator("sheet", p + PROMPTS * s) for p in range(PROMPTS)]
            eps = normal(torch.empty(PROMPTS, 3, 16, 16), draws)
            cond, uncond = text(captions, CPU), text([""] * PROMPTS, CPU)
            how = (taus, sampler, uncond if guidance else None, guidance, draws)
            image = (round_8bit(draw_samples(nets.student, eps, cond, *how)) + 1) / 2
            found.append([measure(image).mean().item() for measure in PIXELS.values()])
        return torch.tensor(found).mean(0)

    student = pixels(grid(nets.student.schedule, 4), "x0", None)
    wanted = student / pixels(grid(nets.student.schedule, 2), "euler", eyes.cfg.guidance)
    start = eyes.ratios()
    assert [*start] == [*MEASURES] and run.watch["start"] == start
    got = [start[name] for name in PIXELS]
    assert got == pytest.approx(wanted.tolist(), rel=2e-3)  # a level of 255 here and there


def test_the_teacher_is_asked_once(began, monkeypatch):
    """What it drew is kept in the run's folder, and drawn again only if it would be another or the
    file is damaged."""
    eyes, nets, run = began
    asked = []
    draw = Watch.draw

    def counted(self, net, *how):
        asked.append(net is nets.teacher)
        return draw(self, net, *how)

    monkeypatch.setattr(Watch, "draw", counted)
    data, given = find("digits").data(0), (eyes.out, nets)
    again = Watch(eyes.cfg, *given, data, run, CPU)
    assert asked == [] and again.teacher == eyes.teacher
    Watch(replace(eyes.cfg, guidance=3.0), *given, data, run, CPU)
    assert asked == [True]
    path = eyes.out / sheets.TEACHERS
    path.write_bytes(path.read_bytes()[:100])
    assert Watch(eyes.cfg, *given, data, run, CPU).teacher == eyes.teacher and asked == [True] * 2


def test_what_leaves_the_band_is_said_once():
    """Not while it is on its way; again when it has been within."""
    seen, said = {"start": {"contrast": 0.5, "saturation": 1.0}, "out": {}, "left": []}, []
    for done, contrast in enumerate((0.6, 0.9, 0.65, 0.65, 0.9, 1.5, 0.5)):
        lines = news(seen, {"contrast": contrast, "saturation": 1.1}, (0.7, 1.4), done)
        said += [(done, line.split(";")[0].split(": ")[1]) for line in lines]
        seen = json.loads(json.dumps(seen))  # as a checkpoint keeps it
    wanted = "contrast is {} of the teacher's, not 0.7 to 1.4"
    assert said == [(k, wanted.format(x)) for k, x in ((2, "0.65"), (5, "1.50"), (6, "0.50"))]
    assert [left["step"] for left in seen["left"]] == [2, 5, 6]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(name, steps, ..., flag=value): a short run of a large teacher, made small, which is
    interrupted where it has several lengths. Captions alone: no discriminator."""
    family = replace_watched(SMALL["sd35-medium"], 2)
    monkeypatch.setitem(teachers.FOUND, "sd35-medium", family)
    make_official("sd35-medium", tmp_path / "files")
    (tmp_path / "prompts.txt").write_text("".join(f"a red fox {k}\n" for k in range(5)))
    where = {"weights": str(tmp_path / "files"), "data": str(tmp_path / "prompts.txt")}
    rates = {"lr": 1.0, "lr_final": 1.0, "lr_warmup": 0, "ttur": 1, "w_gan": 0.0, "bf16": False}
    rates |= {"optimizer": "torch.optim.SGD", "recompute": False}
    rest = {"size": (32, 48), "batch": 4, "exam_every": 0, "workers": 0, "watch_band": (0.99, 1.01)}

    def run_all(name, *lengths, **flags):
        (tmp_path / name).mkdir()
        for steps in lengths:
            cfg = configure("sd35-medium", steps=steps, **where, **rates, **rest, **flags)
            nets, run = build_nets(cfg, CPU), Run()
            data = open_training_data(cfg, find(cfg.teacher))
            train.train(cfg, tmp_path / name, nets, data, None, run, CPU)
        return nets.student.state_dict(), run

    return run_all


def rows_of(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_is_watched_is_the_same_bit_for_bit_also_interrupted(trained, tmp_path, capsys):
    """The student and its losses are those of a run without; the looks, what left the band and the
    best student those of a run that was not interrupted."""
    kept = {"watch_every": 1, "keep_best": "watch"}
    without, whole, parts = (tmp_path / name for name in ("without", "whole", "parts"))
    alone, _ = trained("without", 2, watch_every=0)
    student, run = trained("whole", 2, **kept)
    other, run_of_parts = trained("parts", 1, 2, **kept)
    said = capsys.readouterr().out
    for name, tensor in alone.items():
        assert torch.equal(tensor, student[name]) and torch.equal(tensor, other[name])
    assert (whole / "log.csv").read_text() == (parts / "log.csv").read_text()
    seen = (*PIXELS, "distance_latents")
    for one, watched in zip(rows_of(without), rows_of(whole), strict=True):
        assert one.items() <= watched.items()
        assert all(float(watched[name]) > 0 for name in seen)
    assert "a look at drift every 1 (band 0.99 to 1.01)" in said
    assert "of the teacher's, not 0.99 to 1.01" in said
    assert run.watch == run_of_parts.watch and run.watch["left"]
    assert run.best == run_of_parts.best
    drift = [far(farthest({k: float(row[k]) for k in seen})[1]) for row in rows_of(whole)]
    assert int(run.best["step"]) == 1 + drift.index(min(drift)), drift
    best = [out / "student-best.safetensors" for out in (whole, parts)]
    assert {read_metadata(path)["step"] for path in best} == {run.best["step"]}
    tensors, again = map(load_file, best)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_none_is_due_between(began):
    eyes, _, run = began
    assert eyes.look(2).keys() == {*MEASURES} and eyes.look(3) == {}
    assert run.watch["left"] == []


def test_every_rank_draws_as_many_prompts(monkeypatch):
    for count, world in ((4, 1), (4, 3), (3, 2), (4, 64)):
        monkeypatch.setattr(ranks, "world", lambda world=world: world)
        every = []
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            every.append(share(count))
        assert {len(mine) for mine in every} == {-(-count // world)}
        assert {p for mine in every for p in mine} == {*range(count)}


# --- the best student ----------------------------------------------------------------------------


def test_the_best_student_is_kept(began, tmp_path, monkeypatch):
    """By FD-T the least. A run that goes back behind the file keeps the next that comes."""
    eyes, nets, run = began
    cfg, kept = replace(eyes.cfg, keep_best="fd"), []
    nets = replace(nets, ema=torch.nn.Linear(2, 2), family=find("digits"))
    for done, value in ((1, 3.0), (2, 4.0), (3, 2.0)):
        results.keep_best(done, value, cfg, tmp_path, replace(nets), run, CPU)
        kept.append(read_metadata(tmp_path / "student-best.safetensors")["step"])
    assert kept == ["1", "1", "3"] and run.best == {"value": 2.0, "step": "3", "measure": "fd"}
    run.best = {"value": 1.0, "step": "2", "measure": "fd"}  # of a checkpoint before the file
    results.keep_best(3, 2.0, cfg, tmp_path, nets, run, CPU)
    assert run.best["step"] == "3"
    results.keep_best(4, 99.0, replace(cfg, keep_best="accuracy"), tmp_path, nets, Run(), CPU)
    results.keep_best(5, 98.0, replace(cfg, keep_best="accuracy"), tmp_path, nets, run, CPU)
    assert read_metadata(tmp_path / "student-best.safetensors")["best"] == "accuracy 98.0"
    monkeypatch.setattr(ranks, "rank", lambda: 1)  # takes part, knows no value, writes nothing
    results.keep_best(6, None, cfg, tmp_path, nets, run, CPU)
    assert read_metadata(tmp_path / "student-best.safetensors")["step"] == "5"


@pytest.mark.parametrize(
    "teacher, flags, named",
    [
        ("digits", {"keep_best": "fd", "exam_every": 0}, "--exam-every is 0"),
        ("sdxl", {"keep_best": "fd"}, "sdxl has no exam"),
        ("sdxl", {"keep_best": "watch", "watch_every": 0}, "--watch-every is 0"),
        ("flux-dev", {"guidance_rescale": 0.7}, "takes the scale as an input"),
    ],
)
def test_choices_that_have_no_meaning_are_refused(teacher, flags, named):
    with pytest.raises(Refusal, match=named):
        check_choices(configure(teacher, **flags), find(teacher))
    check_choices(configure(teacher), find(teacher))


def test_weights_of_anchors_are_as_many_as_anchors():
    with pytest.raises(Refusal, match="--anchor-weights has 2 numbers, --student-steps is 4"):
        configure(anchor_weights=(1.0, 2.0))


# --- sheets side by side -------------------------------------------------------------------------


def test_the_picture_of_a_run_has_a_column_for_each_sheet_and_the_teachers(began, tmp_path):
    """A run that was set back has none of later sheets; of many, ten, with the first and last."""
    eyes, nets, _ = began
    captions = [*eyes.conds][:2]
    images = torch.zeros(2, 1, 3, 16, 16)
    path = tmp_path / "samples" / "progress.safetensors"
    path.parent.mkdir()
    for done in (0, 125, 250, 125):
        sheets.keep_column(path, captions, done, images + done / 250)
    assert [*sheets.read_columns(path)] == ["0", "125"]
    assert sheets.read_columns(path, ["another"]) == {}
    width = {}
    for watched in (False, True):
        (tmp_path / sheets.TEACHERS).write_bytes((eyes.out / sheets.TEACHERS).read_bytes())
        sheets.draw_progress(tmp_path, 1, watched)
        with Image.open(tmp_path / "progress.png") as drawn:
            width[watched] = drawn.width
    assert width[True] - 300 == pytest.approx((width[False] - 300) * 3 / 2)
    for done in range(200, 2200, 100):
        sheets.keep_column(path, captions, done, images)
    sheets.draw_progress(tmp_path, 1, False)
    with Image.open(tmp_path / "progress.png") as drawn:
        assert drawn.width - 300 == (width[False] - 300) / 2 * 10
