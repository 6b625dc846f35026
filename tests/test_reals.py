"""--make-reals: the teacher's images in place of real ones, drawn once and gone on with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from small import embedded

import train
from config import Refusal
from dataset.images import Images
from engine import reals
from engine.build import open_training_data
from engine.drawing import missing_images
from measure.distances import round_8bit
from schedule import draw_samples, generator, grid, normal
from teachers import configure, find

CPU = torch.device("cpu")


def configured(tmp_path: Path, **flags):
    flags = {"make_reals": 10, "reals": str(tmp_path / "reals")} | flags
    return configure("digits", **flags)


@pytest.fixture
def few(monkeypatch):
    """Three of the teacher's steps, and rounds of four images."""
    monkeypatch.setattr(reals, "STEPS", 3)
    monkeypatch.setattr(reals, "ROUND", 4)


def drawn(cfg) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cfg.reals).rglob("*.png")}


def test_they_are_what_the_teacher_draws_of_the_datas_captions(few, tmp_path):
    """To a level of 255, since others were beside them; and a data set, each image once an
    epoch."""
    cfg, family = configured(tmp_path), find("digits")
    data = reals.make_reals(cfg, family, CPU)
    assert isinstance(data, Images) and len(data.source) == data.epochs.length == 10
    captions = family.data(0)(range(10)).captions
    net, text = embedded(), family.load_text({})
    draws = [generator("exam", reals.SEED, k) for k in range(10)]
    eps = normal(torch.empty(10, 3, 16, 16), draws)
    cond, uncond = text(captions, CPU), text([""] * 10, CPU)
    with torch.no_grad():
        how = (grid(net.schedule, 3), "euler", uncond, cfg.guidance, draws)
        wanted = round_8bit(draw_samples(net, eps, cond, *how))
    seen = data(range(10))
    order = [captions.index(caption) for caption in seen.captions]
    assert sorted(order) == list(range(10)), "every caption once an epoch"
    assert (seen.images - wanted[order]).abs().max() <= 2.01 / 255
    other = reals.make_reals(replace(cfg, seed=5), family, CPU)
    assert other(range(10)).captions != seen.captions, "another order, the same images"
    assert sorted(other(range(10)).captions) == sorted(seen.captions)


def test_whoever_was_interrupted_goes_on(few, tmp_path):
    """Images gone, one damaged, the list not written: what is sound stays as it is. More may be
    asked for later, and nothing is drawn where all is there."""
    cfg, family = configured(tmp_path), find("digits")
    reals.make_reals(cfg, family, CPU)
    whole, folder = drawn(cfg), Path(cfg.reals)
    paths = {path.name: path for path in folder.rglob("*.png")}
    paths["000003.png"].unlink()
    paths["000007.png"].write_bytes(whole["000007.png"][:90])
    (folder / "list.json").unlink()
    times = {name: path.stat().st_mtime_ns for name, path in paths.items() if path.exists()}
    reals.make_reals(cfg, family, CPU)
    assert drawn(cfg) == whole
    changed = {n for n in times if paths[n].stat().st_mtime_ns != times[n]}
    assert changed == {"000007.png"}
    times = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert len(reals.make_reals(replace(cfg, make_reals=12), family, CPU).source) == 12
    assert len(reals.make_reals(cfg, family, CPU).source) == 10
    assert {name: paths[name].stat().st_mtime_ns for name in times} == times
    with pytest.raises(Refusal, match="--reals .* was made for something else .guidance: 2.0 -> 3"):
        reals.make_reals(replace(cfg, guidance=3.0), family, CPU)


def test_ranks_share_them_out(few, tmp_path):
    cfg, family = configured(tmp_path), find("digits")
    task = reals.wanted(cfg, family, Path(cfg.reals))
    shares = [missing_images(task, task.samplings[0], rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 3, 3]
    assert sorted(k for share in shares for k in share) == list(range(10))


def test_captions_alone_are_enough_with_the_discriminator_too(few, command, tmp_path):
    """Each caption as often as any other; and a run that has its images from the teacher."""
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo men\nrain\n")
    cfg = configure("flux-dev", data=str(tmp_path / "prompts.txt"), size=(64, 64))
    with pytest.raises(Refusal, match="no images to judge by; add --make-reals N"):
        open_training_data(cfg, find("flux-dev"))
    data = open_training_data(replace(cfg, make_reals=7), find("flux-dev"))
    assert len(data.captions) == 3
    flags = ["--make-reals", 6, "--out", tmp_path / "run", "--batch", 2, "--ttur", 1]
    flags += ["--no-table", "--exam-every", 0, "--lr-warmup", 0]
    code, _, err = command(train, *flags, "--steps", 1)
    assert code == 0, err
    listed = json.loads((tmp_path / "run" / "reals" / "list.json").read_text())
    assert len(listed["image_paths"]) == 6
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 2
    refused(command(train, *flags, "--buckets"), "--buckets: the images of --make-reals")
