"""Algorithm 1 on small networks: which weights move on which turn, and exact resume."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import time
from collections import defaultdict
from pathlib import Path

import processes
import pytest
import torch
from own import flags_of, settings_of
from torch import nn

import train
from engine import checkpoint
from engine.build import open_training_data
from engine.run import Run
from nets.weights import digest
from teachers import configure
from train import build_learners, build_nets, load_batch, lr_factor, train_step

CPU = torch.device("cpu")


def setup(own: Path, **flags):
    """Of the small teacher, unless the flags name another."""
    cfg = configure(**settings_of(own) | {"batch": 3, "ema": 0.99, "lr_warmup": 0} | flags)
    nets = build_nets(cfg, CPU)
    return cfg, nets, build_learners(nets, cfg)


def batch_of(step, nets, cfg):
    ids, data = train.ids_of(cfg, step), open_training_data(cfg, nets.family)
    return load_batch(ids, data(ids), nets, cfg, CPU)


def weights(nets):
    parts = {"student": nets.student, "fake": nets.fake, "teacher": nets.teacher, "ema": nets.ema}
    parts |= {"heads": nets.disc.heads, "backbone": nets.disc.backbone}
    return {name: digest(nn.ParameterList(net.parameters())) for name, net in parts.items()}


def moved(nets, before):
    return {name for name, value in weights(nets).items() if value != before[name]}


def judged_step(cfg, nets, learn):
    """A step whose anchor is not pure noise, so that the discriminator has work."""
    for step in range(0 if learn else 1, 200):
        if (step % cfg.ttur == 0) == learn:
            batch = batch_of(step, nets, cfg)
            rng = train.Rng(cfg.seed, step, "input", batch.ids)
            taus = train.anchors(cfg, nets.student.schedule)
            if train.student_input(nets.student, batch.x0_real, batch.cond, taus, rng)[1] > 0:
                return step, batch
    raise AssertionError("no such step")


def test_every_network_learns_on_its_turn_and_only_then(own):
    """Student and average on every ttur-th step; fake score and heads always; the rest never."""
    cfg, nets, opts = setup(own)
    for learn, wanted in ((False, {"fake", "heads"}), (True, {"student", "ema", "fake", "heads"})):
        step, batch = judged_step(cfg, nets, learn)
        before = weights(nets)
        log = train_step(step, batch, nets, opts, cfg)
        assert moved(nets, before) == wanted
        trained = [*nets.student.parameters(), *nets.fake.parameters(), *nets.disc.parameters()]
        assert all(p.grad is None for p in trained), "a gradient is left over for the next step"
        assert all(torch.isfinite(torch.tensor(x)) for x in log.values()) and log["skipped"] == 0
        assert (
            {"dmd", "isg", "gan"} <= log.keys() if learn else {"dmd", "isg", "gan"}.isdisjoint(log)
        )


def test_each_part_can_be_switched_off(own):
    """A part that is off leaves no loss in the log; IDA off leaves the fake score to its own
    update."""
    off = {"gan": {"w_gan": 0.0}, "isg": {"w_isg": 0.0}, "ema": {"ema": 0.0}}
    for name, flags in off.items():
        cfg, nets, opts = setup(own, **flags)
        step, batch = judged_step(cfg, nets, learn=True)
        log = train_step(step, batch, nets, opts, cfg)
        assert name not in log and ("disc" in log) == (name != "gan")
        assert (nets.ema is nets.student) == (name == "ema")
    cfg, nets, opts = setup(own, ida_decay=1.0, lr_fake=0.0)
    step, batch = judged_step(cfg, nets, learn=True)
    before = weights(nets)
    train_step(step, batch, nets, opts, cfg)
    assert "fake" not in moved(nets, before)


def test_ida_pulls_the_fake_score_after_the_students_update(own):
    """With the fake's own learning off: phi = .97 phi + .03 theta_new, theta as it is *after* it
    moved.
    """
    cfg, nets, opts = setup(own, lr=0.1, lr_fake=0.0)  # far enough to tell phi from theta
    phi = {name: p.clone() for name, p in nets.fake.named_parameters()}
    step, batch = judged_step(cfg, nets, learn=True)
    train_step(step, batch, nets, opts, cfg)
    for name, theta in nets.student.named_parameters():
        wanted = 0.97 * phi[name] + 0.03 * theta
        torch.testing.assert_close(dict(nets.fake.named_parameters())[name], wanted)


def test_discriminators_step_does_not_depend_on_the_students_turn(own):
    """The same step twice from the same state, as a student's turn and not: equal heads afterwards.
    Fails with the released code's leak of the student's gradient into the heads. Kernels with and
    without gradient may round differently, so to 1e-6."""
    heads = []
    cfg, nets, opts = setup(own, ttur=10**6)
    step, batch = judged_step(cfg, nets, learn=False)
    for ttur in (10**6, 1):
        cfg, nets, opts = setup(own, ttur=ttur)
        log = train_step(step, batch, nets, opts, cfg)
        assert ("gan" in log) == (ttur == 1)
        heads.append({name: x.clone() for name, x in nets.disc.heads.state_dict().items()})
    for name, x in heads[0].items():
        torch.testing.assert_close(x, heads[1][name], atol=1e-6, rtol=1e-5, msg=name)


def count_calls(monkeypatch, nets):
    """Image passes of the backbone and decodes, counted while the real ones run."""
    calls = {"features": 0, "decode": 0}
    features, decode = nets.disc.features, nets.vae.decode

    def count(name, function):
        def counted(x):
            calls[name] += 1
            return function(x)

        return counted

    monkeypatch.setattr(nets.disc, "features", count("features", features))
    monkeypatch.setattr(nets.vae, "decode", count("decode", decode))
    return calls


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("augment, passes", [((), 2), (("translation",), 3)])
def test_features_are_computed_once(own, monkeypatch, learn, augment, passes):
    """Real and made; with augmentation the reference too. The same on a student's turn and not."""
    cfg, nets, opts = setup(own, disc_augment=augment)
    step, batch = judged_step(cfg, nets, learn)
    calls = count_calls(monkeypatch, nets)
    train_step(step, batch, nets, opts, cfg)
    assert calls == {"features": passes, "decode": 1}


def test_no_discriminator_work_at_pure_noise(own, monkeypatch):
    """A one-step student's only anchor is pure noise: omega = 0, nothing is decoded or judged."""
    cfg, nets, opts = setup(own, student_steps=1, w_gan=0.1)
    calls, before = count_calls(monkeypatch, nets), digest(nets.disc.heads)
    log = train_step(0, batch_of(0, nets, cfg), nets, opts, cfg)
    assert calls == {"features": 0, "decode": 0} and "disc" not in log
    assert digest(nets.disc.heads) == before


def test_the_discriminator_comes_to_prefer_real_images(own):
    """Twenty steps with a student that predicts nothing, so that it makes noise: logits of real
    images end above the noise's. Fails if real and made are swapped, or a sign in the hinge is."""
    cfg, nets, opts = setup(own, batch=8, student_steps=2, w_gan=0.1, ttur=10**6, lr_disc=2e-3)
    nn.init.zeros_(nets.student.leave.weight)
    nn.init.zeros_(nets.student.leave.bias)
    for step in range(1, 21):
        train_step(step, batch_of(step, nets, cfg), nets, opts, cfg)
    batch, tau = batch_of(99, nets, cfg), train.anchors(cfg, nets.student.schedule)[1]
    noise = (1 - tau) * batch.x0_real + tau * torch.randn_like(batch.x0_real)
    with torch.no_grad():
        real, made = nets.disc.features(batch.images), nets.disc.features(noise)
        condition = nets.disc.condition(real, batch.text)
        assert nets.disc(real, condition).mean() > nets.disc(made, condition).mean() + 0.5


@pytest.mark.parametrize("batch, steps", [(1, 1), (3, 2), (1, 4)])
def test_any_batch_and_any_number_of_student_steps(own, batch, steps):
    cfg, nets, opts = setup(own, batch=batch, student_steps=steps, w_gan=0.1, ttur=2)
    for step in range(2):  # both kinds of turn
        log = train_step(step, batch_of(step, nets, cfg), nets, opts, cfg)
        assert log["skipped"] == 0


def test_an_anchors_weight_multiplies_the_students_loss(own):
    """That of the anchor which the batch was drawn at, and all of the loss."""
    weights, seen = (1.0, 2.0, 3.0, 4.0), set()
    cfg, nets, _ = setup(own, batch=1, w_gan=0.0, w_isg=0.0, anchor_weights=weights)
    taus = train.anchors(cfg, nets.student.schedule)
    for step in range(5):
        batch, rng = batch_of(step, nets, cfg), functools.partial(train.Rng, cfg.seed, step)
        with torch.no_grad():
            draw = train.draw_student(batch, nets, cfg, rng)
            assert draw.share == weights[taus.index(pytest.approx(draw.tau_start[0].item()))]
            one, other = (
                train.student_loss(dataclasses.replace(draw, share=s), batch, nets, cfg, rng, log)
                for s, log in ((1.0, defaultdict(list)), (draw.share, defaultdict(list)))
            )
        torch.testing.assert_close(other, draw.share * one)
        seen.add(draw.share)
    assert len(seen) > 1


def test_all_discriminator_options_run(own):
    cfg, nets, opts = setup(
        own,
        disc_augment=("colour", "translation", "cutout"),
        disc_text=False,
        disc_reference=False,
        disc_channels=16,
        isg_distance="charbonnier",
        t_dmd="logit-normal",
        p_backward=1.0,
    )
    step, batch = judged_step(cfg, nets, learn=True)
    log = train_step(step, batch, nets, opts, cfg)
    assert "disc" in log and log["skipped"] == 0


def test_an_update_that_is_not_finite_moves_nothing_and_is_counted(own):
    cfg, nets, opts = setup(own)
    step, batch = judged_step(cfg, nets, learn=True)
    batch.images = batch.images.clone()  # reaches the adversarial terms, not the fake score
    batch.images[0, 0, 0, 0] = float("nan")
    before = weights(nets)
    log = train_step(step, batch, nets, opts, cfg)
    assert log["skipped"] == 2 and moved(nets, before) == {"fake"}
    assert log["skipped_student"] == log["skipped_disc"] == 1 and "skipped_fake" not in log


def test_ten_skipped_updates_of_one_network_in_a_row_end_a_run():
    """A student that moves on every fifth turn has ten of its own in fifty iterations, while the
    fake score learns. What is skipped is said, less and less often."""
    run, said = Run(), []
    for turn in range(50):
        values = {"norm_fake": 1.0}
        if turn % 5 == 0:
            values |= {"norm_student": 1.0} | ({} if turn == 20 else {"skipped_student": 1.0})
        said.append(run.count(values))
    assert run.skipped == {"student": 9} and run.turns == {"fake": 50, "student": 10}
    assert said[0].endswith("student: 1 of 1") and said[10] == "" and run.in_a_row["student"] == 5
    run.check_learned()
    bad = {"norm_fake": 1.0, "norm_student": 1.0, "skipped_student": 1.0}
    for _ in range(4):
        run.count(bad)
    kept = Run()
    kept.resume({"step": 54, **json.loads(json.dumps(run.state()))})
    with pytest.raises(FloatingPointError, match="10 updates of the student in a row"):
        kept.count(bad)


def test_a_student_that_never_moved_is_not_exported():
    """It would be its teacher, with exit code 0."""
    run = Run()
    run.count({"norm_student": 1.0, "skipped_student": 1.0, "norm_fake": 1.0})
    with pytest.raises(FloatingPointError, match="all 1 updates of the student"):
        run.check_learned()


def test_learning_rate_warms_up_and_falls():
    cfg = configure(steps=100, lr_warmup=9, lr_start=0.5, lr_final=0.1)
    assert lr_factor(0, cfg) == pytest.approx(0.55)
    assert lr_factor(9, cfg) > lr_factor(8, cfg)
    assert lr_factor(99, cfg) == pytest.approx(0.1, abs=0.001)
    flat = dataclasses.replace(cfg, lr_warmup=0, lr_final=1.0)
    assert {lr_factor(step, flat) for step in range(100)} == {1.0}


# --- whole runs ----------------------------------------------------------------------------------

FLAGS = ("--ttur", 2, "--disc-channels", 16, "--exam-every", 0)
SHORT = (*FLAGS, "--steps", 6, "--batch", 2, "--save-every", 2)


def student_of(out: Path) -> bytes:
    return (out / "student.safetensors").read_bytes()


def printed_by(own: Path, out: Path) -> str:
    """A run from its start, or from where it was, to its end."""
    printed = out.with_suffix(".txt")
    processes.finish(processes.command, 0, printed, [*flags_of(own), *SHORT, "--out", out])
    return printed.read_text()


@pytest.fixture(scope="module")
def undisturbed(own, tmp_path_factory):
    """A short run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    printed_by(own, out)
    return out


def test_a_damaged_checkpoint_is_passed_over(own, undisturbed, tmp_path):
    """The one before it is used, and said so; the student is the same bit for bit."""
    out = tmp_path / "damaged"
    shutil.copytree(undisturbed, out)
    newest = sorted(out.glob("checkpoints/step-????????/*.distcp"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    said = printed_by(own, out)
    assert "step-00000006 is damaged (not as it was written: __0_0.distcp); using" in said
    assert "step-00000004, a checkpoint before it" in said
    assert student_of(out) == student_of(undisturbed)
    assert (out / "log.csv").read_text() == (undisturbed / "log.csv").read_text()


def test_digests_are_of_what_was_written_and_nothing_is_read_again(tmp_path, monkeypatch):
    """A checkpoint of FLUX has 295 GB. Each file's digest is that of its bytes on the disk, and it
    is known from the writing: no file is opened to read."""
    net = nn.Linear(40, 40)
    adam = torch.optim.AdamW(net.parameters())
    net(torch.ones(40)).sum().backward()
    adam.step()
    state = {"student": net}, {"student": [adam]}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "digest", None)
        checkpoint.save_checkpoint(tmp_path, 7, *state, {"exams": []}, keep=2)
    listed = json.loads((tmp_path / "step-00000007" / "digests.json").read_text())
    files = {p.name: p for p in tmp_path.glob("step-00000007/*") if p.name != "digests.json"}
    assert listed.keys() == files.keys() and len(files) == 3
    assert all(checkpoint.digest(path) == listed[name] for name, path in files.items())
    assert checkpoint.load_checkpoint(tmp_path, *state) == ({"step": 7, "exams": []}, [])


def test_checkpoints_come_by_iterations_by_minutes_and_at_the_end(monkeypatch):
    """Of an iteration a minute. A save of either kind starts the minutes anew."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cfg, run, saved = configure(steps=12, save_every=5, save_minutes=2.5), Run(), []
    for done in range(1, 13):
        now[0] += 60
        save, stop = run.is_due(cfg, done, torch.device("cpu"))
        assert not stop
        saved += [done] if save else []
    assert saved == [3, 5, 8, 10, 12]
    run.stop = True
    assert run.is_due(cfg, 1, torch.device("cpu")) == (True, True)


@pytest.mark.parametrize("flag", ["--tf32", "--no-tf32"])
def test_convolutions_in_fp32_may_be_rounded_or_not(own, tmp_path, command, monkeypatch, flag):
    """On a GPU; the numbers of the CPU, which has no TF32, are the same."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag == "--no-tf32")
    short = ("--steps", 1, "--batch", 2, *FLAGS, flag, "--out", tmp_path)
    assert command(train, *flags_of(own), *short)[0] == 0
    assert torch.backends.cudnn.allow_tf32 == (flag == "--tf32")


def test_sigterm_saves_and_stops(own, undisturbed, tmp_path):
    out, printed = tmp_path / "stopped", tmp_path / "printed.txt"
    run = processes.launch(processes.command, 0, printed, [*flags_of(own), *SHORT, "--out", out])
    processes.wait_for("checkpoints/step-????????", out, run)
    os.kill(run[0].pid, signal.SIGTERM)
    assert processes.join(run) == [0] and "stopped by SIGTERM" in printed.read_text()
    assert not (out / "student.safetensors").exists(), "it was to be interrupted"
    assert "continuing" in printed_by(own, out)
    assert student_of(out) == student_of(undisturbed)
