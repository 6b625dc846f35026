"""Several ranks, parts of a batch and interruptions: the run is the same."""

import copy
import csv
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from own import flags_of, settings_of
from PIL import Image
from safetensors.torch import load_file
from small import SMALL, embedded, make_official
from test_hacking import assert_nothing_is_left, follow_sid, step_of_muon, untrained
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import Shard, _sharding_prop
from torch.distributed.tensor.placement_types import _StridedShard

import teachers
from digits.words import SceneText
from dmd import fake_loss
from engine import build, checkpoint, ranks, watch
from engine.build import aim_adapters, count_trained, open_training_data
from engine.run import Run
from engine.watch import Watch
from ida import ida_update
from measure.drift import MEASURES
from schedule import Rng
from teachers import configure, find
from train import (
    LOSSES,
    build_learners,
    build_nets,
    ids_of,
    load_batch,
    train_step,
)

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# --- ranks, copies, shards, parts ----------------------------------------------------------------


def follow(out: Path | None, teacher: str, **flags) -> dict:
    """Some iterations; what came of them, also saved to `out` by rank 0: losses and all weights."""
    cfg = configure(teacher, ttur=2, lr_warmup=0, **flags)
    nets = build_nets(cfg, CPU)
    opts, data = build_learners(nets, cfg), open_training_data(cfg, find(cfg.teacher))
    logs = []
    if cfg.adapter:
        aim_adapters(cfg, nets, data, CPU)
    for step in range(cfg.steps):
        ids = ids_of(cfg, step)
        batch = load_batch(ids, data(ids), nets, cfg, CPU)
        log = train_step(step, batch, nets, opts, cfg)
        logs.append(ranks.mean_over_ranks(log, CPU))
    made = {"student": nets.student, "fake": nets.fake, "heads": nets.disc.heads}
    made |= {"ema": nets.ema} if cfg.ema else {}
    seen = {name: {k: x.detach().clone() for k, x in ranks.gather(n)} for name, n in made.items()}
    if out and ranks.rank() == 0:
        torch.save({"logs": logs, "weights": seen}, out)
    return {"logs": logs, "weights": seen}


def assert_same(one: dict, two: dict, tolerance: float) -> None:
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), name
    for net in one["weights"]:
        for name, tensor in one["weights"][net].items():
            far = (tensor - two["weights"][net][name]).abs().max().item()
            assert far <= tolerance, f"{net}.{name} differs by {far:.1e}"


def pull(out: Path | None, shard: str = "none") -> list[torch.Tensor]:
    """IDA between two networks that differ; the fake score after it."""
    student = embedded()
    fake = copy.deepcopy(student)
    for parameter in student.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        parameter.data.add_(0.1 * noise)
    mesh = ranks.choose_mesh(shard, 0, CPU)
    for net in (student, fake) if mesh else ():
        state = net.state_dict()
        ranks.shard(net, mesh, CPU, bf16=False)
        ranks.deal(net, iter(state.items()), CPU)
    ida_update(fake, student, 0.97)
    tensors = [x.clone() for _, x in ranks.gather(fake)]
    if out and ranks.rank() == 0:
        torch.save(tensors, out)
    return tensors


def looked(out: Path, shard: str = "none") -> dict[str, float]:
    """What the watch sees of three prompts before the first step; two steps of the teacher."""
    watch.STEPS, family = 2, find("digits")
    family = family.resized(family.sizes)
    teachers.FOUND["digits"], family.watched = family, (3, 2)
    cfg, run = configure(batch=4, watch_every=1, shard=shard), Run()
    Watch(cfg, out, build_nets(cfg, CPU), family.data(0), run, CPU)
    if ranks.rank() == 0:
        torch.save(run.watch["start"], out / "watch")
    return run.watch["start"]


def follow_all(own: Path, out: Path, runs: dict) -> None:
    teachers.FOUND |= SMALL  # of this process, which ends with this
    build.COMPILER = "eager"  # likewise
    with processes.ranks_of_torchrun():
        looked(out, "fsdp")
        pull(out / "ida", "fsdp")
        follow_sid(own, out / "sid", shard="fsdp")
        for shard in ("fsdp", "ddp"):
            step_of_muon(out / f"muon, {shard}", shard)
        for name, flags in runs.items():
            follow(out / name, **flags)


ADAPTER = {"adapter": 4, "adapter_init": "random"}
ARCHITECTURES = ("flux-dev", "sdxl", "z-image")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def mine(own):
    """Flags for two iterations of the small teacher. With seed 0 a leaky ReLU of a head may have an
    input within rounding of its kink."""
    return {**settings_of(own), "disc_channels": 16, "steps": 2, "ema": 0.9, "eps": 1e-4, "seed": 1}


def small(place: Path, teacher: str) -> dict:
    """Flags for a reduced teacher: everything on, two samples at a time."""
    flags = {
        "size": (32, 48),
        "steps": 1,
        "batch": 2,
        "ema": 0.9,
        "w_isg": 1.0,
        "w_gan": 1.0,
        "eps": 1e-4,
    }
    flags |= {"lr": 1e-3, "lr_fake": 1e-3, "lr_disc": 1e-3, "ida_decay": 0.97, "bf16": False}
    data = "long" if teacher == "z-image" else "pictures"  # whose captions differ in length
    where = {"weights": str(place / f"{teacher}-files"), "data": str(place / data)}
    return {"teacher": teacher, **flags, **where}


@pytest.fixture(scope="module")
def two_ranks(place, own, mine):
    """What two ranks make of every run here; they start once."""
    for data in ("pictures", "long"):
        (place / data).mkdir()
        for k in range(4):
            pixels = np.random.default_rng(k).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / data / f"{k}.png")
            caption = f"a red fox {k}" * (1 + 3 * k if data == "long" else 1)
            (place / data / f"{k}.txt").write_text(caption)
    with pytest.MonkeyPatch.context() as patch:
        for teacher, family in SMALL.items():
            patch.setitem(teachers.FOUND, teacher, family)
        for teacher in ARCHITECTURES:
            make_official(teacher, place / f"{teacher}-files")
    runs = {"fsdp": {**mine, "batch": 8, "shard": "fsdp"}}
    runs["bf16"] = runs["fsdp"] | {"bf16": True, "steps": 1}
    runs["compiled"] = runs["fsdp"] | {"compile": True, "recompute": True, "steps": 1}
    runs["ddp"] = {**mine, "batch": 4, "accumulate": 2, "shard": "ddp", "steps": 1}
    runs |= {teacher: small(place, teacher) | {"shard": "fsdp"} for teacher in ARCHITECTURES}
    runs["adapter"] = {**mine, **ADAPTER, "batch": 8, "shard": "fsdp"}
    processes.finish(follow_all, 2, place / "printed.txt", own, place, runs)
    more = ("ida", "watch", "sid", "muon, fsdp", "muon, ddp")
    return {name: torch.load(place / name) for name in (*runs, *more)}


@pytest.fixture(scope="module")
def one_rank(mine):
    """Sixteen samples at once in one process."""
    return follow(None, **mine, batch=16)


def test_two_ranks_equal_one(two_ranks, one_rank):
    """In shards, eight samples on each rank: all networks and losses to 1e-6 after two iterations
    of the whole method. Only sums are taken in another order. Adam divides by the size of the
    gradient, which magnifies rounding where that is near zero; eps of 1e-4 keeps it down."""
    assert len(one_rank["weights"]) == 4
    assert any("gan" in log for log in one_rank["logs"])
    assert_same(one_rank, two_ranks["fsdp"], 1e-6)


def test_two_ranks_see_of_the_student_what_one_sees(two_ranks, tmp_path, monkeypatch):
    """In shards, which both call as often: of three prompts one is drawn by both, and counts
    once."""
    monkeypatch.setattr(watch, "STEPS", 2)
    one = looked(tmp_path)
    assert one.keys() == {*MEASURES}
    for name, value in two_ranks["watch"].items():
        assert value == pytest.approx(one[name], rel=2e-3), name  # a level of 255 here and there


def test_shards_of_compiled_blocks_compute_the_same(two_ranks, mine):
    """Weights come together outside of what is compiled, and once more where it is recomputed."""
    one = follow(None, **mine | {"steps": 1}, batch=16)
    assert_same(one, two_ranks["compiled"], 1e-6)


def test_two_ranks_share_adapters(two_ranks, mine):
    """In shards; the base is whole on both, A is the first rank's."""
    one = follow(None, **mine, **ADAPTER, batch=16)
    assert {name.rpartition(".")[2] for name in one["weights"]["student"]} == {"up", "down"}
    assert_same(one, two_ranks["adapter"], 1e-6)


def test_parts_of_a_batch_equal_the_whole(one_rank, mine):
    """Two parts of eight (the discriminator's groups): the losses are means over the samples, and
    each sample has its own noise."""
    assert_same(one_rank, follow(None, **mine, batch=8, accumulate=2), 1e-6)


def test_copies_exchange_the_gradient_of_all_parts(two_ranks, mine):
    """Two ranks with two parts of four, and one process with four such parts, to 1e-6 as well."""
    one = follow(None, **mine | {"steps": 1}, batch=4, accumulate=4)
    assert_same(one, two_ranks["ddp"], 1e-6)


@pytest.mark.parametrize("teacher", ARCHITECTURES)
def test_every_architecture_can_be_sharded(two_ranks, place, monkeypatch, teacher):
    """Frozen guidance embedder, U-Net, captions of several lengths; blocks recomputed. Two ranks
    with two samples and one process with two parts of two: equal groups in the discriminator. To
    1e-5, since SDXL's estimate of x0 divides by .07 at pure noise."""
    for name, family in SMALL.items():
        monkeypatch.setitem(teachers.FOUND, name, family)
    assert_same(follow(None, **small(place, teacher), accumulate=2), two_ranks[teacher], 1e-5)


def test_counts_pass_what_sends_every_tensor_to_the_device():
    """FSDP2 looks for tensors in whatever a network is given; those it must not send are none."""
    given = (
        torch.ones(2),
        torch.ones(2),
        {"context": torch.ones(2), "length": torch.ones(2).int()},
    )
    covered = ranks.cover_counts(None, given)
    seen = [x for x in (*covered[:2], *covered[2].values()) if isinstance(x, torch.Tensor)]
    assert len(seen) == 3 and all(x.is_floating_point() for x in seen)
    back = ranks.uncover_counts(None, covered)
    assert back[:2] == given[:2] and back[2] == given[2]


def test_shards_compute_in_bf16_and_stay_in_fp32(two_ranks):
    """The same run in bf16 is near the one in fp32 (eight bits of mantissa), and not it."""
    fp32, bf16 = two_ranks["fsdp"], two_ranks["bf16"]
    assert {x.dtype for net in bf16["weights"].values() for x in net.values()} == {torch.float32}
    for name, value in fp32["logs"][0].items():
        if name in ("dmd", "isg", "fake"):
            assert bf16["logs"][0][name] == pytest.approx(value, rel=0.05)
            assert bf16["logs"][0][name] != value


def test_ida_on_shards_is_bitwise_that_on_whole_networks(two_ranks):
    for ours, theirs in zip(two_ranks["ida"], pull(None), strict=True):
        assert torch.equal(ours, theirs)


def test_strided_shards_are_looked_for_once_a_call(monkeypatch):
    """Not again for each of its tensors; where there are some, torch hears of each."""
    heard, looked_at = [], []

    def look(strategy, call):
        heard.append(strategy)

    class Call:
        def __init__(self, *placements):
            self.placements = placements

        @property
        def args_spec(self):
            looked_at.append(self)
            return [SimpleNamespace(placements=self.placements)] * 1000

    monkeypatch.setattr(_sharding_prop, "_propagate_use_strided_shard_flag", look)
    ranks.look_once()
    ranks.look_once()  # every network asks for it
    for call in (Call(Shard(0)), Call(_StridedShard(0, split_factor=2))):
        for strategy in range(3):
            _sharding_prop._propagate_use_strided_shard_flag(strategy, call)
    assert heard == [0, 1, 2] and len(looked_at) == 2


def test_in_shards_a_loss_through_the_fake_score_leaves_nothing_in_its_update(two_ranks):
    """As in test_hacking.py, bit for bit."""
    assert_nothing_is_left(two_ranks["sid"])


@pytest.mark.parametrize("shard, tolerance", [("fsdp", 0.05), ("ddp", 0.0)])
def test_muon_on_two_ranks_equals_muon_on_one(two_ranks, shard, tolerance):
    """From the same gradients, copies bit for bit; shards to 5 % of the way that a matrix went, as
    they sum in another order and Muon orthogonalises in bf16."""
    start = [x for _, x in ranks.gather(untrained())]
    pairs = zip(two_ranks[f"muon, {shard}"], step_of_muon(None), start, strict=True)
    for x, y, first in pairs:
        assert (x - y).norm() <= tolerance * (y - first).norm()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_shares_nothing(kind):
    with pytest.raises(ValueError, match=f"--shard {kind} is for several ranks"):
        ranks.choose_mesh(kind, 0, CPU)
    assert ranks.choose_mesh("auto", 10**12, CPU) is None


def test_large_networks_are_sharded_small_ones_copied():
    """On GPUs of 80 GB; SD 1.5 fits with gradients and Adam's state, FLUX and SD 3.5 do not."""
    wanted = {"sd15": False, "sd35-large": True, "flux-dev": True}
    for teacher, sharded in wanted.items():
        assert (
            ranks.wants_shards(count_trained(configure(teacher), find(teacher), None), 80e9)
            == sharded
        )


def test_fp32_weights_move_where_bf16_weights_round_the_step_away():
    """One AdamW step at the official learning rate of SD 3.5, 1e-6: bf16 has eight bits, so only
    weights below about 2.5e-4 can feel it."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        net = embedded().to(dtype)
        before = [p.detach().clone() for p in net.parameters()]
        x0 = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        cond = SceneText()(["a red one left of a blue two"] * 8, CPU)
        fake_loss(net, x0, cond, "uniform", Rng(0, 0, "fake", range(8))).backward()
        torch.optim.AdamW(net.parameters(), lr=1e-6, weight_decay=0.0).step()
        pairs = zip(before, net.parameters(), strict=True)
        changed = torch.cat([(a != b).flatten() for a, b in pairs])
        moved[dtype] = changed.float().mean().item()
    assert moved[torch.float32] > 0.95, moved
    assert moved[torch.bfloat16] < 0.1, moved


# --- interruptions -------------------------------------------------------------------------------

FLAGS = ["--ttur", 2, "--disc-channels", 16, "--eps", 1e-4, "--exam-every", 0]


@pytest.fixture
def long(own):
    return [*flags_of(own), *FLAGS, "--steps", 8, "--batch", 2, "--save-every", 1]


@pytest.fixture
def short(own):
    """For two ranks."""
    return [*flags_of(own), *FLAGS, "--steps", 6, "--batch", 2, "--save-every", 2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(flags): the folder of a run in one process."""
    made = {}

    def get(*flags):
        if flags not in made:
            made[flags] = out = tmp_path_factory.mktemp("undisturbed")
            processes.finish(processes.command, 0, out / "printed.txt", [*flags, "--out", out])
        return made[flags]

    return get


def everything(own: Path, out: Path) -> dict:
    """All tensors of the last checkpoint by name."""
    last = max(out.glob("checkpoints/step-????????"))
    cfg = configure(str(own / "mine.py"), disc_channels=16)
    nets = build_nets(cfg, CPU)
    opts = {name: opt.optimizers for name, opt in build_learners(nets, cfg).items()}
    state = checkpoint.state_of(nets.trained(), opts)
    with checkpoint.quiet():
        dcp.load(state, checkpoint_id=last, no_dist=True)
    tensors = {f"{part}.{name}": x for part in state for name, x in flat(state[part])}
    return {"step": last.name, **tensors}


def flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def losses(out: Path) -> list[dict[str, float]]:
    with open(out / "log.csv", newline="") as file:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]


def assert_near(out: Path, other: Path) -> None:
    """Losses and student to 1e-6; a loss is logged with six digits, so one in the last."""
    for a, b in zip(losses(out), losses(other), strict=True):
        for name in LOSSES:
            assert a[name] == pytest.approx(b[name], abs=1.5e-6, rel=1e-5, nan_ok=True), (
                name,
                a,
                b,
            )
    students = [load_file(run / "student.safetensors") for run in (out, other)]
    for name, tensor in students[0].items():
        torch.testing.assert_close(tensor, students[1][name], atol=1e-6, rtol=0)


def test_killed_six_times_a_run_is_the_same_bit_for_bit(long, own, undisturbed, tmp_path):
    """SIGKILL after a random time, every other time as soon as a checkpoint is being written.
    Weights, Adam's state, every row of the log and the student's file are those of the undisturbed
    run."""
    printed, draw, in_save = tmp_path / "printed.txt", random.Random(0), 0
    for kill in range(6):
        for left_over in tmp_path.glob("checkpoints/*.part"):
            shutil.rmtree(left_over)  # so that the next one is a new one
        run = processes.launch(processes.command, 0, printed, [*long, "--out", tmp_path])
        if kill % 2:
            processes.wait_for("checkpoints/*.part", tmp_path, run)
        time.sleep(draw.uniform(0, 0.1 if kill % 2 else 0.9))
        run[0].kill()
        processes.join(run)
        in_save += any(tmp_path.glob("checkpoints/*.part"))
    assert in_save >= 2, "some must be killed inside a save"
    processes.finish(processes.command, 0, printed, [*long, "--out", tmp_path])
    wanted = undisturbed(*long)
    assert (tmp_path / "log.csv").read_text() == (wanted / "log.csv").read_text()
    ours, theirs = everything(own, tmp_path), everything(own, wanted)
    assert ours.keys() == theirs.keys() and len(ours) > 300
    for name, value in ours.items():
        equal = torch.equal if torch.is_tensor(value) else lambda a, b: a == b
        assert equal(value, theirs[name]), name
    students = [(out / "student.safetensors").read_bytes() for out in (tmp_path, wanted)]
    assert students[0] == students[1]


def test_a_run_continues_on_another_number_of_ranks(short, undisturbed, tmp_path):
    """Two ranks in shards, SIGTERM, one process, SIGTERM, two ranks as copies: the losses and the
    student of one process with two parts to a batch, to 1e-6. SIGTERM ends a run within an
    iteration, saved."""
    printed, flags = tmp_path / "printed.txt", [*short, "--out", tmp_path]
    for world, kind, pattern in ((2, "fsdp", "step-00000002"), (0, "auto", "step-00000004")):
        run = processes.launch(processes.command, world, printed, [*flags, "--shard", kind])
        processes.wait_for(f"checkpoints/{pattern}", tmp_path, run)
        done = len(losses(tmp_path))
        for process in run:
            os.kill(process.pid, signal.SIGTERM)
        assert set(processes.join(run)) == {0}, printed.read_text()
        assert len(losses(tmp_path)) <= done + 2
        last = max(tmp_path.glob("checkpoints/step-????????"))
        assert last.name == f"step-{len(losses(tmp_path)):08d}", "saved where it stopped"
    assert "--accumulate 2" in printed.read_text()
    processes.finish(processes.command, 2, printed, flags)
    assert_near(tmp_path, undisturbed(*short, "--accumulate", 2))


def test_a_batch_that_ranks_cannot_make_is_refused(short, undisturbed, tmp_path):
    """Three samples at a time do not make four."""
    shutil.copytree(undisturbed(*short, "--accumulate", 2), tmp_path / "run")
    printed, flags = tmp_path / "printed.txt", [*short, "--batch", 3, "--out", tmp_path / "run"]
    assert processes.join(processes.launch(processes.command, 0, printed, flags)) == [2]
    said = printed.read_text()
    assert said.count("\n") == 1 and "4 samples an iteration" in said and "--batch 3" in said


@pytest.mark.parametrize("world", [0, 2])
def test_a_full_disk_leaves_the_checkpoint_before(short, own, undisturbed, tmp_path, world):
    """Files end at 100 kB, of two ranks those of the second: all stop alike on one line that names
    what is left, and nothing half written is."""
    shutil.copytree(undisturbed(*short, "--accumulate", 2), tmp_path / "run")
    out, printed = tmp_path / "run", tmp_path / "printed.txt"
    for path in out.glob("checkpoints/step-????????"):
        if path.name == "step-00000006":
            shutil.rmtree(path)
    left = everything(own, out)
    run = processes.launch(processes.command, world, printed, [*short, "--out", out], 100_000)
    assert set(processes.join(run)) == {2}, printed.read_text()
    said = printed.read_text()
    assert "step-00000006 cannot be written (File too large)" in said, said
    assert "is the disk full?" not in said
    assert "the last good checkpoint is" in said and "step-00000004" in said
    assert "Traceback" not in said
    assert [path.name for path in out.glob("checkpoints/*")] == ["step-00000004"]
    now = everything(own, out)
    assert all(torch.equal(x, now[k]) for k, x in left.items() if torch.is_tensor(x))


def killed_once(out: Path, flags: list) -> None:
    """train.py on a rank of torchrun's; the second one dies when there is a checkpoint."""

    def die() -> None:
        while not any(out.glob("checkpoints/step-????????")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        threading.Thread(target=die, daemon=True).start()
    processes.command(flags)


def test_torchrun_restarts_ranks_when_one_is_killed(short, undisturbed, tmp_path):
    """By torchrun's own agent: the run goes on from its checkpoint, to the student of an
    undisturbed one."""
    out, printed = tmp_path / "run", tmp_path / "printed.txt"
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "forkserver"}
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, **how)
    flags = [*short, "--out", out]
    elastic_launch(config, processes.as_rank)(0, 0, 0, printed, killed_once, (out, flags))
    assert "continuing" in printed.read_text(), printed.read_text()
    assert_near(out, undisturbed(*short, "--accumulate", 2))
