"""The commands on the large teachers at reduced width: official folders in, students out.

Names, layouts, tokenizers, text encoders, autoencoder, discriminator and losses are the real ones.
"""

import dataclasses
import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from own import flags_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small import OFFICIAL, SMALL, make_official

import sample
import teachers
import train
from config import Refusal
from dataset.sources import open_data
from engine.batch import fill_cache
from engine.build import open_training_data
from engine.results import metadata_of
from schedule import DDPM, Flow, resolution_shift
from teachers import configure, find
from teachers.elsewhere import modelspec
from teachers.students import load_student, reading

CPU = torch.device("cpu")
TRAINED = [name for name in SMALL if not find(name).only_sampled]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(teacher): its files, made once."""
    made = {}

    def get(teacher):
        if teacher not in made:
            made[teacher] = tmp_path_factory.mktemp(teacher)
            make_official(teacher, made[teacher])
        return made[teacher]

    return get


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    for teacher, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, teacher, family)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images of other shapes, with captions."""
    place = tmp_path_factory.mktemp("data")
    for k in range(5):
        pixels = torch.randint(0, 256, (40 + 9 * k, 70 - 5 * k, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{k}.png")
        (place / f"{k}.txt").write_text(f"a red fox {k}")
    return place


def header(path, prefix=""):
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return [(name, file.get_slice(name).get_shape()) for name in names], file.metadata()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image), json.loads(image.text["settings"])


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", SMALL)
def test_a_teacher_draws_from_its_official_files(command, folder, tmp_path, teacher):
    """Rectangular; image k of several equals the same prompt and seed alone (in fp32, to one in
    255)."""
    (tmp_path / "prompts.txt").write_text("a red fox\nthree foxes\n")
    flags = ["--teacher", teacher, "--weights", folder(teacher), "--steps", 2, "--dtype", "fp32"]
    flags += ["--size", 32, 48]
    many = ["--prompts", tmp_path / "prompts.txt", "--seed", 0, 1, "--batch", 3]
    code, out, err = command(sample, *flags, *many, "--out", tmp_path / "many.png")
    assert code == 0, err
    alone = ["--prompt", "three foxes", "--seed", 1, "--out", tmp_path / "one.png"]
    assert command(sample, *flags, *alone)[0] == 0
    one, settings = pixels(tmp_path / "one.png")
    assert one.shape == (32, 48, 3) and settings["prompt"] == "three foxes"
    assert settings["size"] == [32, 48] and settings["seed"] == 1
    fourth, _ = pixels(tmp_path / "many-003.png")
    assert np.abs(one.astype(int) - fourth).max() <= 1
    others = [pixels(tmp_path / f"many-00{k}.png")[0] for k in range(3)]
    assert not any(np.array_equal(one, other) for other in others), "prompt and seed both matter"


def test_flux_devs_times_are_shifted_by_the_size_of_the_image(command, folder, tmp_path):
    """32 x 48 pixels are 6 patches; schnell's times are not shifted; a student keeps its own."""
    for teacher, shift in (("flux-dev", resolution_shift(6)), ("flux-schnell", 1.0)):
        flags = ["--teacher", teacher, "--weights", folder(teacher), "--size", 32, 48]
        out = tmp_path / f"{teacher}.png"
        assert command(sample, *flags, "--steps", 3, "--prompt", "fox", "--out", out)[0] == 0
        u = torch.tensor([1, 2 / 3, 1 / 3], dtype=torch.float64)
        assert pixels(out)[1]["taus"] == pytest.approx(Flow(shift).warp(u).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--size", 40, 48], "40 is no multiple of 16; the nearest: 32 or 48"),
        (["--size", 8, 48], "8 is no multiple of 16; the nearest: 16"),
        (["--weights", "nowhere"], "nowhere is no folder"),
    ],
)
def test_sampling_refuses_what_cannot_be(command, folder, flags, named):
    given = ["--teacher", "flux-dev", "--weights", folder("flux-dev"), "--prompt", "fox", *flags]
    refused(command(sample, *given), "sample.py: ", named)


def test_every_missing_file_is_named_with_the_command_that_fetches_it(command, tmp_path):
    given = ["--teacher", "flux-dev", "--weights", tmp_path, "--prompt", "fox"]
    files = [file for part in OFFICIAL["flux-dev"].values() for file in part.files]
    refused(command(sample, *given), *files, "hf download black-forest-labs/FLUX.1-dev")


# --- training ------------------------------------------------------------------------------------


def started(teacher, files):
    """What its student begins as."""
    family = find(teacher)
    net = family.load(1.0, files["denoiser"])
    with torch.no_grad():
        family.start(net)
    return net


def flags_for(teacher, folder, data, out):
    flags = ["--teacher", teacher, "--weights", folder(teacher), "--data", data, "--out", out]
    flags += ["--size", 32, 48, "--batch", 2, "--steps", 2, "--ttur", 1, "--lr-warmup", 0]
    flags += ["--exam-every", 0, "--workers", 0]
    return [*flags, "--lr", 1e-2, "--lr-fake", 1e-2, "--lr-disc", 1e-2]


ALL_ON = {"w_isg": 1.0, "w_gan": 1.0, "ida_decay": 0.97}


@pytest.fixture(scope="module")
def ran(folder, pictures, tmp_path_factory):
    """ran(teacher): what a run of two iterations of the whole method left, made once. Backward
    simulation, DMD, fake score, IDA, ISG and the discriminator; batch 2, rectangular."""
    made = {}

    def get(teacher):
        if teacher not in made:
            made[teacher] = tmp_path_factory.mktemp("runs") / teacher
            flags = flags_for(teacher, folder, pictures, made[teacher])
            for name, value in ALL_ON.items():
                flags += [f"--{name.replace('_', '-')}", value]
            flags += ["--no-bf16", "--no-recompute"]
            flags += ["--export", "full"] if find(teacher).prefix() else []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
                train.main()
        return made[teacher]

    return get


def learned(cfg, steps, cache=None):
    """The networks after that many iterations, and what was noted in each."""
    nets = train.build_nets(cfg, CPU, cache)
    opts, data = train.build_learners(nets, cfg), open_training_data(cfg, find(cfg.teacher))
    noted = []
    for step in range(steps):
        ids = train.ids_of(cfg, step)
        batch = train.load_batch(ids, data(ids), nets, cfg, CPU)
        with train.precision(cfg, nets, CPU):
            noted.append(train.train_step(step, batch, nets, opts, cfg))
    return nets, noted


def settings(teacher, folder, pictures, **others):
    given = {"weights": str(folder(teacher)), "data": str(pictures), "size": (32, 48)}
    cfg = configure(teacher=teacher, **given | {"lr_warmup": 0, "ttur": 1})
    return dataclasses.replace(cfg, batch=2, **others)


@pytest.mark.parametrize("teacher", TRAINED)
def test_a_run_moves_every_trained_weight_and_exports_an_official_file(
    command, folder, ran, tmp_path, teacher
):
    """The student's file has the teacher's names, shapes, order; and it draws."""
    out = ran(teacher)
    rows = (out / "log.csv").read_text().splitlines()
    names, values = rows[0].split(","), [row.split(",") for row in rows[1:]]
    columns = {name: [row[k] for row in values] for k, name in enumerate(names)}
    for name in ("dmd", "isg", "fake"):
        assert all(np.isfinite(float(x)) for x in columns[name]), name
    judged = [x for x in columns["gan"] if x]
    assert judged and all(np.isfinite(float(x)) for x in judged)
    assert all(float(x) == 0 for x in columns["skipped"])

    student, files = out / "student.safetensors", find(teacher).locate(str(folder(teacher)))
    prefix = find(teacher).prefix()
    ours, about = header(student)
    theirs = sorted(x for shard in files["denoiser"] for x in header(shard, prefix)[0])
    assert ours == theirs, "names, shapes and order are the teacher's"
    assert about["teacher"] == teacher and len(json.loads(about["taus"])) == 4
    assert (
        about.items() >= modelspec(find(teacher), 4, (32, 48)).items() and about["format"] == "pt"
    )
    start = started(teacher, files).state_dict()
    end = load_student(student)[0].state_dict()
    still = {name for name, tensor in end.items() if torch.equal(tensor, start[name])}
    # FLUX: silenced. SD 3.5: nothing reads the last text block's queries.
    wanted = {name for name in end if name.startswith("guidance_in")}
    wanted |= {name for name in end if name == "joint_blocks.2.context_block.attn.ln_q.weight"}
    assert still == wanted, f"did not move: {sorted(still - wanted)[:5]}"
    with Image.open(out / "samples.png") as drawn:
        assert drawn.height > 4 * 32, "a sheet of four captions"
    drawn = ["--checkpoint", student, "--weights", folder(teacher), "--prompt", "a fox"]
    assert command(sample, *drawn, "--out", tmp_path / "out.png")[0] == 0
    assert pixels(tmp_path / "out.png")[0].shape == (32, 48, 3)


@pytest.mark.parametrize("teacher", ["sdxl", "sd15", "sd35-medium"])
def test_a_student_merged_back_is_the_official_file_but_for_its_denoiser(
    command, folder, pictures, ran, tmp_path, teacher
):
    """--export full: every name, shape and place; the other networks bit for bit; and what the
    official file says of itself, but for a digest of its weights."""
    out = ran(teacher)
    base = find(teacher).locate(str(folder(teacher)))["denoiser"][0]
    assert header(out / "full.safetensors")[0] == header(base)[0]
    about = header(out / "full.safetensors")[1]
    assert about.pop("modelspec.license") == "theirs" and about["format"] == "pt"
    assert about == header(out / "student.safetensors")[1]
    files = (out / "full.safetensors", base, out / "student.safetensors")
    full, official, student = map(load_file, files)
    prefix = find(teacher).prefix()
    for name, tensor in full.items():
        wanted = student if name.startswith(prefix) else official
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
    flux = flags_for("flux-dev", folder, pictures, tmp_path / "flux")
    refused(command(train, *flux, "--export", "full"), "--export full", "flux-dev")


@pytest.mark.parametrize("teacher", ["flux-dev", "klein", "z-image", "sd35-medium", "sdxl"])
def test_bf16_and_recomputation_run_and_keep_fp32_weights(folder, pictures, teacher):
    """As on a GPU: frozen networks in bf16, trained ones in fp32 under autocast."""
    nets, _ = learned(settings(teacher, folder, pictures, **ALL_ON), 1)
    for net, dtype in (
        (nets.teacher, torch.bfloat16),
        (nets.student, torch.float32),
        (nets.fake, torch.float32),
        (nets.disc.heads, torch.float32),
        (nets.disc.backbone, torch.bfloat16),
    ):
        assert {p.dtype for p in net.parameters()} == {dtype}
        assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("teacher", TRAINED)
def test_the_null_caption_is_encoded_once(folder, pictures, teacher):
    """Kept from the start, for every batch; equal to encoding it again, each with its own sizes.

    FLUX has none: the scale is its teacher's input.
    """
    cfg = settings(teacher, folder, pictures, w_gan=0.0, bf16=False)
    nets = train.build_nets(cfg, CPU)
    read = []
    nets.text.register_forward_pre_hook(lambda _, given: read.extend(given[0]))
    data = open_training_data(cfg, find(cfg.teacher))
    ids = train.ids_of(cfg, 0)
    batch = train.load_batch(ids, data(ids), nets, cfg, CPU)
    assert len(read) == 2 and "" not in read
    assert (batch.uncond is None) == (teacher == "flux-dev")
    if batch.uncond:
        sizes = torch.tensor([[32, 48, 0, 0, 32, 48], [50, 70, 8, 4, 32, 48]])
        cond = nets.text(["a red fox"] * 2, "cpu", sizes)
        again = nets.text(["", ""], "cpu", sizes)
        for name, tensor in find(teacher).null_for(nets.null, cond).items():
            torch.testing.assert_close(tensor, again[name])


@pytest.mark.parametrize("teacher", ["flux-dev", "klein", "sdxl"])
def test_training_from_a_cache_is_training_without_one(folder, pictures, tmp_path, teacher):
    """The same losses, to rounding (captions are encoded in other company), when the text encoders'
    files are gone."""
    place, data = tmp_path / "weights", tmp_path / "data"
    shutil.copytree(folder(teacher), place)
    shutil.copytree(pictures, data)
    cfg = settings(teacher, lambda _: place, data, **ALL_ON, bf16=False)
    _, plain = learned(cfg, 2)
    cfg, family = dataclasses.replace(cfg, cache=str(tmp_path / "cache")), find(teacher)
    fill_cache(cfg, family, open_training_data(cfg, family), CPU)
    text = [part for part in OFFICIAL[teacher] if part[:4] in ("clip", "t5", "t5_t", "llm", "llm_")]
    names = {file for part in text for file in OFFICIAL[teacher][part].files}
    for file in names - {*OFFICIAL[teacher]["denoiser"].files}:
        (place / file).unlink()
    cache = fill_cache(cfg, family, open_training_data(cfg, family), CPU)  # is there
    _, cached = learned(cfg, 2, cache)
    assert cached == [pytest.approx(noted, rel=2e-3) for noted in plain]
    (data / "0.txt").write_text("another caption")
    with pytest.raises(Refusal, match='not hold "another caption".* the data have changed'):
        learned(cfg, 1, cache)
    other = dataclasses.replace(cfg, size=(48, 48))
    with pytest.raises(Refusal, match=r"size: \[32, 48\]"):
        fill_cache(other, family, open_training_data(other, family), CPU)


def small_run(own, out, *more):
    """A command of the small teacher's."""
    flags = [*flags_of(own), "--out", out, "--batch", 2, "--steps", 3, "--exam-every", 0]
    return [*flags, *more]


def test_buckets_train_with_batches_of_several_shapes(command, folder, pictures, tmp_path):
    """Not from a cache, whose crops would be others in the next epoch; and not from prompts."""
    flags = flags_for("flux-dev", folder, pictures, tmp_path / "run")
    flags += ["--size", 128, 128, "--buckets", "--no-gan", "--steps", 3]
    code, _, err = command(train, *flags)
    assert code == 0, err
    refused(command(train, *flags, "--batch", 1), "--buckets", "--overwrite")
    refused(command(train, *flags, "--cache", tmp_path / "cache"), "--buckets")
    (tmp_path / "prompts.txt").write_text("a red fox")
    refused(command(train, *flags, "--data", tmp_path / "prompts.txt"), "--buckets")


def test_a_student_at_other_steps_has_evenly_spaced_times(command, folder, ran, tmp_path):
    """SD 3.5's official sampler ends next to clean data, where a few-step student has no use."""
    student = ran("sd35-medium") / "student.safetensors"
    drawn = ["--checkpoint", student, "--weights", folder("sd35-medium")]
    for steps, taus in ((2, [1.0, 0.75]), (4, [1.0, 0.9, 0.75, 0.5])):
        picture = tmp_path / f"{steps}.png"
        given = [*drawn, "--prompt", "fox", "--steps", steps, "--out", picture]
        assert command(sample, *given)[0] == 0
        assert pixels(picture)[1]["taus"] == pytest.approx(taus)


def test_the_fake_score_learns_with_the_weights_that_ida_made(folder, pictures):
    """On a student's turn in bf16: autocast's copies of weights from before are not used again."""
    cfg = settings("sd15", folder, pictures, ida_decay=0.0, lr=0.1, lr_fake=0.0)
    nets = train.build_nets(cfg, CPU)
    opts, ids = train.build_learners(nets, cfg), train.ids_of(cfg, 0)
    data = open_data(cfg.data, cfg.size, 0)
    batch = train.load_batch(ids, data(ids), nets, cfg, CPU)
    with train.precision(cfg, nets, CPU):
        with torch.no_grad():
            draw = train.draw_student(batch, nets, cfg, partial(train.Rng, cfg.seed, 0))
        log = train.train_step(0, batch, nets, opts, cfg)
        torch.clear_autocast_cache()
        rng = train.Rng(cfg.seed, 0, "fake", ids)
        wanted = train.fake_loss(nets.fake, draw.x0, batch.cond, cfg.t_fake, rng)
    assert log["fake"] == pytest.approx(float(wanted.detach()), rel=1e-3)


def test_bad_samples_are_named_and_too_many_stop_the_run(command, own, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(own / "pictures", data)
    (data / "2.png").write_bytes(b"no image")
    code, out, err = command(train, *small_run(own, tmp_path / "run", "--data", data, "--no-gan"))
    assert code == 0 and "2.png" in out, err
    for k in (0, 3, 4, 5):
        (data / f"{k}.png").write_bytes(b"no image")
    code, _, err = command(train, *small_run(own, tmp_path / "other", "--data", data, "--no-gan"))
    assert code == 2 and "samples are bad" in err


def test_the_flux_student_ignores_guidance_bit_for_bit(ran):
    """Its file still loads as flux1-dev, with a guidance input that changes nothing."""
    out = ran("flux-dev")
    net, _ = load_student(out / "student.safetensors")
    x_t, t = torch.randn(2, 4, 4, 6), torch.tensor([0.9, 0.5])
    cond = {"context": torch.randn(2, 7, 16), "pooled": torch.randn(2, 12)}
    with torch.no_grad():
        without = net(x_t, t, cond)
        for g in (0.0, 3.5, 100.0):
            assert torch.equal(net(x_t, t, cond | {"guidance": torch.full((2,), g)}), without)


def test_prompts_alone_train_without_a_discriminator(command, own, tmp_path):
    """Then every input is backward simulation; with a discriminator it is refused."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n\nthree foxes\n")
    flags = small_run(own, tmp_path / "run", "--data", prompts)
    refused(command(train, *flags), "no images to judge by", "--no-gan")
    assert command(train, *flags, "--no-gan")[0] == 0


def test_training_refuses_data_that_are_not_there(command, folder, tmp_path):
    flags = flags_for("flux-dev", folder, tmp_path / "nowhere", tmp_path / "run")
    refused(command(train, *flags), "nowhere", "folder of images", "--no-gan")
    (tmp_path / "empty").mkdir()
    flags = flags_for("flux-dev", folder, tmp_path / "empty", tmp_path / "run")
    refused(command(train, *flags), "no image with a caption")
    few = "flux-schnell is a few-step model itself; choose from digits"
    refused(command(train, "--teacher", "flux-schnell"), few)


def test_sd35_reads_prompts_with_or_without_t5(command, folder, tmp_path):
    """Without: its files need not be there, and the image is another. FLUX needs it."""
    drawn = []
    place = folder("sd35-medium")
    flags = ["--teacher", "sd35-medium", "--prompt", "red fox", "--steps", 1, "--size", 32, 48]
    for k, extra in enumerate(([], ["--no-t5"])):
        out = tmp_path / f"{k}.png"
        assert command(sample, *flags, "--weights", place, *extra, "--out", out)[0] == 0
        drawn.append(pixels(out)[0])
    assert not np.array_equal(*drawn)
    bare = tmp_path / "bare"
    shutil.copytree(place, bare)
    for path in [*bare.rglob("t5xxl*"), *bare.rglob("tokenizer_3/*")]:
        path.unlink()
    refused(command(sample, *flags, "--weights", bare), "t5xxl_fp16.safetensors")
    out = tmp_path / "again.png"
    assert command(sample, *flags, "--weights", bare, "--no-t5", "--out", out)[0] == 0
    assert np.array_equal(pixels(out)[0], drawn[1])
    given = ["--teacher", "flux-dev", "--weights", folder("flux-dev"), "--prompt", "fox", "--no-t5"]
    refused(command(sample, *given), "--no-t5", "flux-dev")


def test_t5_reads_as_many_tokens_as_asked(command, folder, tmp_path, monkeypatch):
    """In training, which tells the student's file; in sampling, which asks it; SD 3.5's alone."""
    place = folder("sd35-medium")
    family = reading(SMALL["sd35-medium"], 20)
    text = family.load_text(family.locate(str(place)))
    cond = text(["red fox"])
    assert {name: tuple(x.shape[1:]) for name, x in cond.items()} == family.cond_shapes()
    assert cond["context"].shape[1] == 77 + 20 and reading(family, 0) is family
    given = ["--teacher", "sd35-medium", "--t5-length", "20", "--weights", str(place)]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    cfg, _ = train.train_arguments("")
    assert find("sd35-medium").cond_shapes() == family.cond_shapes()
    nets = SimpleNamespace(family=family, student=family.build(3.0))
    assert metadata_of(cfg, nets)["t5_length"] == "20"
    draw = ["--teacher", "sd35-medium", "--weights", place, "--prompt", "fox", "--steps", 1]
    out = tmp_path / "x.png"
    assert command(sample, *draw, "--size", 32, 48, "--t5-length", 30, "--out", out)[0] == 0
    assert pixels(out)[1]["t5_length"] == 30
    refused(command(sample, "--teacher", "sdxl", "--prompt", "x", "--t5-length", 77), "--t5-length")
    refused(command(train, "--teacher", "flux-dev", "--t5-length", 77), "only of SD 3.5's T5")


def test_sd35_refuses_sizes_above_its_position_table(command, folder):
    """The small one has 6 x 6 patches of 16 pixels."""
    flags = ["--teacher", "sd35-large", "--weights", folder("sd35-large"), "--prompt", "fox"]
    refused(command(sample, *flags, "--size", 112, 96), "at most 96 pixels a side")


def test_the_presets_anchors_are_the_papers():
    """FLUX's by number, SD 3.5's by the shift, SDXL's entries 999, 749, 499, 249 of the table."""
    for teacher in ("sd35-large", "sd35-medium"):
        cfg = find(teacher).preset
        assert tuple(train.anchors(cfg, Flow(cfg.shift))) == (1.0, 0.9, 0.75, 0.5)
    assert train.anchors(find("flux-dev").preset, Flow()) == (1.0, 0.904, 0.759, 0.512)
    for teacher in ("sdxl", "sd15"):
        assert train.anchors(find(teacher).preset, DDPM()) == pytest.approx(
            (0.999, 0.749, 0.499, 0.249)
        )
