"""Changes that researchers make, each in a few lines: docs/hacking.md as it stands."""

import csv
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Linear, refused
from own import flags_of
from PIL import Image
from small import SMALL, make_official
from test_teachers import learned, settings
from test_train import CPU, batch_of, judged_step, setup
from torch.distributed.tensor import DTensor, distribute_tensor

import evaluate
import isg
import teachers
import train
from config import Config, keys_of
from discriminator import Discriminator
from dmd import dmd_loss, student_input
from engine import checkpoint, ranks
from engine.batch import fill_cache
from engine.build import build_optimizers, open_training_data
from engine.pictures import panels
from engine.run import LogFile
from measure import scorers
from schedule import Flow, anchor_at, draw_t, guided, normal, sample_ode, uniform
from teachers import configure, find

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hacking.md").read_text()
NAMES = {"torch": torch, "draw_t": draw_t, "normal": normal, "uniform": uniform}


def block(containing: str) -> str:
    """The Python block of the page with these words in it."""
    (found,) = [x for x in re.findall(r"```python\n(.*?)```", PAGE, re.S) if containing in x]
    return found


def run_block(containing: str) -> dict:
    names = NAMES | {"anchor_at": anchor_at, "__name__": "mine"}
    exec(block(containing), names)
    return names


def test_a_script_of_ones_own_takes_the_ideas_alone(capsys):
    """Under 40 lines. Heaps are at -1 and 1; where the teacher's two steps end half-way, the
    student's end near them."""
    script = block("import copy")
    assert script.count("\n") < 40
    used = set(re.findall(r"^(?:from|import) (\w+)", script, re.M))
    assert used == {"copy", "torch", "dmd", "ida", "isg", "schedule"}
    left = run_block("import copy")
    eps = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    teachers = sample_ode(left["teacher"], eps, {}, left["taus"])
    off = [
        max(abs(x[x < 0].mean().item() + 1), abs(x[x >= 0].mean().item() - 1))
        for x in (left["made"], teachers)
    ]
    assert off[0] < 0.3 and off[1] > 0.4, off
    assert "heaps at" in capsys.readouterr().out


def test_what_the_pages_diffs_take_out_or_keep_is_there():
    code = "\n".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))
    lines = {line.strip() for line in code.splitlines()}
    diffs = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    assert len(diffs) >= 8
    for line in "".join(diffs).splitlines():
        assert line.startswith("+") or line[1:].strip() in lines, f"nowhere: {line}"


# --- the log -------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_log_grows_by_what_is_noted_and_loses_nothing(tmp_path):
    """Columns in their order: step, losses, norms, then whatever came; one that comes on resuming
    leaves the rows before it empty."""
    path = tmp_path / "log.csv"
    log = LogFile(path, 0)
    log.write(0, {"dmd": 1.0, "norm_student": 2.0, "skipped": 0.0, "fake": 3.0, "norm_fake": 4.0})
    log.write(1, {"mine": 0.5, "fake": 3.5, "norm_fake": 4.5, "disc": 7.0, "skipped": 0.0})
    log = LogFile(path, 1)  # resumed: row 1 is written again
    log.write(1, {"fake": 3.5, "later": 1 / 3})
    header = path.read_text().splitlines()[0]
    assert header == "step,dmd,fake,disc,norm_student,norm_fake,skipped,mine,later"
    first, second = read(path)
    assert first["dmd"] == "1" and first["later"] == first["mine"] == ""
    assert second["fake"] == "3.5" and second["later"] == "0.333333" and second["mine"] == ""
    assert panels(first, []) == [
        *("dmd", "fake", "gan disc", "norm_student norm_fake norm_disc", "skipped", "mine", "later")
    ]


def test_a_noted_value_is_in_the_log_the_board_and_the_curves(monkeypatch, command, own, tmp_path):
    """Noted in a loss, and returned by the step; no list names either."""
    drawn, board = [], []
    loss, step = train.student_loss, train.train_step

    def noting(draw, batch, nets, cfg, rng_for, log):
        train.note(log, "spread", draw.x0.std())
        return loss(draw, batch, nets, cfg, rng_for, log)

    class Board:
        def add_scalar(self, name, value, step):
            board.append(name)

    monkeypatch.setattr(train, "student_loss", noting)
    monkeypatch.setattr(train, "train_step", lambda *given: step(*given) | {"seconds": 1.5})
    monkeypatch.setattr(train, "open_board", lambda *given: Board())
    monkeypatch.setattr("engine.pictures.panels", lambda *given: drawn.extend(panels(*given)) or [])
    flags = ("--steps", 2, "--batch", 2, "--exam-every", 0, "--out", tmp_path)
    assert command(train, *flags_of(own), *flags)[0] == 0
    rows = read(tmp_path / "log.csv")
    assert float(rows[0]["spread"]) > 0 and rows[1]["spread"] == "" and rows[1]["seconds"] == "1.5"
    assert {"spread", "seconds"} <= {*board} and {"spread", "seconds"} <= {*drawn}


# --- losses --------------------------------------------------------------------------------------


def through_both(sid_loss):
    """A student's loss that differentiates through the fake score and the discriminator."""

    def loss(draw, batch, nets, cfg, rng_for, log):
        how = (batch.cond, cfg.t_dmd, rng_for("dmd", batch.ids))
        total = train.note(log, "dmd", sid_loss(draw.x0, nets.teacher, nets.fake, *how))
        if draw.real:
            logits = nets.disc.logits(draw.reference, draw.text)
            total = total + train.note(log, "gan", F.softplus(-logits(draw.made)).mean())
        return total

    return loss


def watched(opt):
    """Whether there were gradients, each time that they are cleared; and what clears them."""
    seen, zero_grad = [], opt.zero_grad

    def clear():
        seen.append(any(p.grad is not None for p in opt.parameters()))
        zero_grad()

    return seen, clear


def follow_sid(own: Path, out: Path | None, **flags) -> dict:
    """Weights of fake score and heads after a turn that moves no student, with that loss and with
    the usual one."""
    patch, kept = pytest.MonkeyPatch(), {}
    for kind in ("sid", "usual"):
        if kind == "sid":
            patch.setattr(
                train, "student_loss", through_both(run_block("def sid_loss")["sid_loss"])
            )
        how = {"lr": 0.0, "ida_decay": 1.0, "ttur": 1, "recompute": True}
        cfg, nets, opts = setup(own, **how, **flags)
        if kind == "sid":  # the loss has a gradient in the fake score, and its turn begins with it
            seen, spy = watched(opts["fake"])
            opts["fake"].zero_grad = spy
        step, batch = judged_step(cfg, nets, learn=True)
        assert "gan" in train.train_step(step, batch, nets, opts, cfg)
        assert seen == [True, True]
        patch.undo()
        parts = {"fake": nets.fake, "heads": nets.disc.heads}
        kept[kind] = {name: [x.clone() for _, x in ranks.gather(n)] for name, n in parts.items()}
    if out and ranks.rank() == 0:
        torch.save(kept, out)
    return kept


def assert_nothing_is_left(kept: dict) -> None:
    """kept: see follow_sid."""
    for name, tensors in kept["sid"].items():
        for x, y in zip(tensors, kept["usual"][name], strict=True):
            assert torch.equal(x, y), name


def test_a_loss_through_the_fake_score_leaves_nothing_in_its_update(own):
    """Score identity distillation and a loss through the heads, recomputed blocks; the student
    stands still, so that fake score and discriminator must learn the same bit for bit."""
    assert_nothing_is_left(follow_sid(own, None))


def test_sid_at_alpha_one_half_points_along_the_squared_gap(x0, cond, rng):
    """gap (x0_fake - x0) + (1 - alpha) gap^2 by hand, and its gradient reaches x0."""
    teacher, fake = Linear(seed=1), Linear(seed=2)
    x0 = x0.requires_grad_()
    got = run_block("def sid_loss")["sid_loss"](x0, teacher, fake, cond, "uniform", rng("s"), 0.5)
    draws = rng("s")
    t = draw_t("uniform", Flow(), x0, draws)
    x_t = Flow().noise(x0, normal(x0, draws.own), t)
    one, two = (Flow().x0(x_t, net(x_t, t, cond), t) for net in (teacher, fake))
    torch.testing.assert_close(got, ((one - two) * (two - x0 + 0.5 * (one - two))).mean())
    got.backward()
    assert x0.grad.abs().sum() > 0


def test_a_new_isg_distance_is_a_line_of_its_table(tmp_path, x0, cond, rng):
    """The flag's choices are read off the file with the page's line in it; the loss takes it."""
    minus, plus = re.findall(r"^[-+](DISTANCES = .*)$", PAGE, re.M)
    (tmp_path / "isg.py").write_text((ROOT / "isg.py").read_text().replace(minus, plus))
    assert keys_of(str(tmp_path / "isg.py"), "DISTANCES") == ("l2", "charbonnier", "mae")
    assert next(f for f in fields(Config) if f.name == "isg_distance").metadata["may"].words == (
        *isg.DISTANCES,
    )
    names = {}
    exec((tmp_path / "isg.py").read_text(), names)
    net, start, end = Linear(seed=1), torch.full((3,), 0.8), torch.full((3,), 0.4)
    given = (net, Linear(seed=2), x0, net(x0, start, cond), start, end, cond, None, None, 0.02)
    losses = [names["isg_loss"](*given, name, rng("isg")).item() for name in names["DISTANCES"]]
    assert len(set(losses)) == 3 and losses[2] > 0


def test_a_density_ratio_is_made_of_the_logits(own):
    """A softplus loss of logits, beside its closed form; the ratio is one per sample."""
    cfg, nets, opts = setup(own)
    step, batch = judged_step(cfg, nets, learn=True)
    draw = train.draw_student(batch, nets, cfg, lambda *key: train.Rng(cfg.seed, step, *key))
    logits = nets.disc.logits(draw.reference, draw.text)
    loss = F.softplus(-logits(draw.real)).mean() + F.softplus(logits(draw.made)).mean()
    condition = nets.disc.condition(draw.reference, draw.text)
    real, made = nets.disc(draw.real, condition), nets.disc(draw.made, condition)
    wanted = (1 + (-real).exp()).log().mean() + (1 + made.exp()).log().mean()
    torch.testing.assert_close(loss, wanted)
    ratio = run_block("def density_ratio")["density_ratio"](nets.disc, draw)
    torch.testing.assert_close(ratio, made.mean(1).exp())
    assert ratio.shape == (3,)


# --- anchors and guidance ------------------------------------------------------------------------

TAUS = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    "kind", [torch.tensor, lambda taus: torch.tensor(taus)[:, None].expand(4, 3)]
)
def test_anchors_as_numbers_or_tensors_are_the_same_bit_for_bit(kind, schedule, x0, cond, rng):
    student = Linear(schedule)
    for step in range(8):
        one, i = student_input(student, x0, cond, TAUS, rng("input", step=step))
        two, k = student_input(student, x0, cond, kind(TAUS), rng("input", step=step))
        assert i == k and torch.equal(one, two)
        for j in (i, i + 1):
            assert torch.equal(anchor_at(TAUS, j, x0), anchor_at(kind(TAUS), j, x0))


def test_each_sample_may_have_anchors_of_its_own(own, monkeypatch, x0, cond, rng):
    """Jittered ones: each sample is where it would be alone; and train_step takes them."""
    jitter, student = run_block("def jitter")["jitter"], Linear()
    taus = jitter(TAUS, 0.1, x0, rng("jitter"))
    assert taus.shape == (4, 3) and (taus[:-1] > taus[1:]).all() and (taus[0] == 1).all()
    x_t, i = student_input(student, x0, cond, taus, rng("input", step=2))
    for b in range(3):
        alone, words = rng("input", step=2), {"c": cond["c"][b : b + 1]}
        alone.own = alone.own[b : b + 1]
        one, _ = student_input(student, x0[b : b + 1], words, taus[:, b].tolist(), alone)
        torch.testing.assert_close(x_t[b : b + 1], one)
    cfg, nets, opts = setup(own)
    moved = jitter(
        train.anchors(cfg, nets.student.schedule), 0.05, torch.empty(3, 1), rng("jitter")
    )
    monkeypatch.setattr(train, "anchors", lambda *_: moved)
    seen, omega = [], train.omega
    monkeypatch.setattr(
        train, "omega", lambda s, tau: seen.append(tau.reshape(-1)) or omega(s, tau)
    )
    for step in range(5):
        log = train.train_step(step, batch_of(step, nets, cfg), nets, opts, cfg)
        assert log["skipped"] == 0
    assert any(len(set(tau.tolist())) == 3 for tau in seen)


def test_without_guidance_the_teacher_is_called_plainly(x0, cond, uncond, rng):
    """No scale is drawn, the null caption is not read: as with no uncond at all."""
    teacher, fake = Linear(seed=1), Linear(seed=2)
    one = dmd_loss(x0, teacher, fake, cond, uncond, None, "uniform", rng("dmd"))
    two = dmd_loss(x0, teacher, fake, cond, None, None, "uniform", rng("dmd"))
    assert torch.equal(one, two) and one > 0
    start, end = torch.full((3,), 0.8), torch.full((3,), 0.4)
    given = (fake, teacher, x0, fake(x0, start, cond), start, end, cond, uncond)
    got = isg.isg_loss(*given, None, 0.02, "l2", rng("isg"))
    mid = isg.draw_mid(start, end, 0.02, rng("isg"))
    x_mid = Flow().step(x0, guided(teacher, x0, start, cond, None, None), start, mid)
    x_tar = Flow().step(x_mid, fake(x_mid, mid, cond), mid, end)
    wanted = (Flow().step(x0, given[3], start, end) - x_tar).square().mean()
    torch.testing.assert_close(got, wanted)


# --- another backbone ----------------------------------------------------------------------------


def test_the_discriminator_reads_any_backbone(command, tmp_path):
    """The page's two convolutions, as a teacher of one's own."""
    disc = Discriminator(run_block("class Edges")["Edges"](), text_width=10)
    maps = disc.features(torch.rand(2, 3, 16, 16))
    assert len(disc.heads) == 2 and [x.shape[1] for x in maps] == [8, 8]
    assert disc.logits(maps, torch.eye(2, 10))(maps).isfinite().all()
    (tmp_path / "mine.py").write_text(block("class Edges"))
    flags = ("--steps", 6, "--batch", 2, "--exam-every", 0, "--no-table", "--out", tmp_path / "out")
    code, _, err = command(train, "--teacher", tmp_path / "mine.py", *flags)
    assert code == 0, err
    assert any(row["disc"] for row in read(tmp_path / "out" / "log.csv"))


@pytest.mark.parametrize("cached", [False, True])
def test_with_a_cache_and_without_the_backbone_may_be_another(cached, monkeypatch, tmp_path):
    """SDXL at a width of a dozen channels, from files, in bf16."""
    edges, family = run_block("class Edges")["Edges"], SMALL["sdxl"]
    monkeypatch.setitem(teachers.FOUND, "sdxl", family)
    own = lambda self, files, dtype, device: edges().to(device, dtype)  # noqa: E731
    monkeypatch.setattr(type(family), "load_backbone", own)
    make_official("sdxl", tmp_path / "files")
    (tmp_path / "data").mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{k}.png")
        (tmp_path / "data" / f"{k}.txt").write_text(f"a red fox {k}")
    cfg = settings("sdxl", lambda _: tmp_path / "files", tmp_path / "data", w_gan=1.0)
    cache = None
    if cached:
        cfg = replace(cfg, cache=str(tmp_path / "cache"))
        cache = fill_cache(cfg, family, open_training_data(cfg, family), CPU)
    _, noted = learned(cfg, 2, cache)
    assert all(values["disc"] > 0 for values in noted)


# --- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS = {  # other than AdamW, which the runs of test_parallel.py have
    "muon": ["Muon", "AdamW", "Muon", "AdamW", "AdamW"],
    "torch.optim.NAdam": ["NAdam"] * 3,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_run_equals_an_uninterrupted_one_with_any_optimizer(name, own, tmp_path):
    """A step, saved, and another; against a fresh start that loads them. Every weight is in one
    optimizer, and all follow the learning rate."""
    flags = {"optimizer": name, "ttur": 1, "lr_warmup": 3, "disc_channels": 16, "w_gan": 0.1}
    ends = []
    for part in ("first", "resumed"):
        cfg, nets, opts = setup(own, **flags)
        saved = nets.trained(), {name: opt.optimizers for name, opt in opts.items()}
        kinds = [type(o).__name__ for opt in opts.values() for o in opt.optimizers]
        assert kinds == OPTIMIZERS[name]
        for opt in opts.values():
            held = opt.parameters()
            assert len(held) == len({*held}) == sum(p.requires_grad for p in opt.net.parameters())
        if part == "resumed":
            assert checkpoint.load_checkpoint(tmp_path, *saved)[0]["step"] == 1
        for step in range(0 if part == "first" else 1, 2):
            if (part, step) == ("first", 1):
                checkpoint.save_checkpoint(tmp_path, 1, *saved, {}, keep=1)
            log = train.train_step(step, batch_of(step, nets, cfg), nets, opts, cfg)
            for opt in (opts["student"], opts["fake"]):
                rates = {group["lr"] for group in opt.groups()}
                assert rates == {train.lr_factor(step, cfg) * opt.lr}
            assert log["skipped"] == 0
        ends.append(
            [x.clone() for net in nets.trained().values() for x in net.state_dict().values()]
        )
    for x, y in zip(*ends, strict=True):
        assert torch.equal(x, y)


def untrained() -> torch.nn.Module:
    """Of the embedded teacher's kind, half as wide and less deep."""
    torch.manual_seed(0)
    return find("digits").scaled(0.5, 2).build(1.0)


def step_of_muon(out: Path | None, shard: str = "auto") -> list[torch.Tensor]:
    """A network's weights after a step from random gradients."""
    net, draw = untrained(), torch.Generator().manual_seed(0)
    if mesh := ranks.choose_mesh(shard, 0, CPU):
        state = net.state_dict()
        ranks.shard(net, mesh, CPU, bf16=False)
        ranks.deal(net, iter(state.items()), CPU)
    for p in net.parameters():
        grad = torch.randn(p.shape, generator=draw)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements)
        p.grad = grad
    for optimizer in build_optimizers(net, net.blocks(), 0.01, configure(optimizer="muon")):
        optimizer.step()
    made = [x for _, x in ranks.gather(net)]
    if out and ranks.rank() == 0:
        torch.save(made, out)
    return made


def test_an_optimizer_that_is_not_there_is_refused(command, tmp_path):
    for name in ("sgd", "torch.optim.Nothing", "nowhere.Optimizer"):
        result = command(train, "--optimizer", name, "--out", tmp_path / "out")
        refused(result, f'--optimizer is "{name}"', "adamw, muon or package.module.Name")
    assert not (tmp_path / "out").exists()


# --- measures ------------------------------------------------------------------------------------


def test_a_new_measure_is_a_line_of_a_table(monkeypatch):
    """The page's contrast of pixels and gap of means, with their intervals."""
    contrast, mean_gap = (run_block(f"def {x}")[x] for x in ("contrast", "mean_gap"))
    monkeypatch.setitem(scorers.PIXELS, "contrast", contrast)
    monkeypatch.setitem(scorers.PAIRS, "mean", mean_gap)
    nets = scorers.feature_nets({}, {}, None, torch.device("cpu"), {"FD": lambda x: x.mean((2, 3))})
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = {title: net(images).unflatten(0, (6, 2)) for title, net in nets.items()}
    values = scorers.measure(made, {title: x + 1 for title, x in made.items()}, {}, 5)
    assert values["contrast"][0] == pytest.approx(contrast(images).mean().item())
    assert values["mean"][0] == pytest.approx(3**0.5, rel=1e-5)
    table = evaluate.measures_table([{"name": "student", "nfe": 2} | values])
    assert "contrast" in table and "KD" in table and "brightness" in table
