"""The project at full size on a GPU that is not there: nothing fails, waits, or attends slowly.

Widths, images and files are the official ones; where depth adds nothing, a network has few blocks.
Each report is made by a process forked from one that has the machine (machine.py, full_size.py),
which is imported before torch. Needs g++.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import shallow

import teachers
import train
from engine.flags import train_arguments
from engine.plan import measure
from teachers import find

HERE = Path(__file__).parent
TURNS = ("student", "other")
TEACHERS = {  # which turns of each; noise: the student's from pure noise, unjudged in a flow
    "flux-dev": (*TURNS, "noise"),
    "sd35-large": TURNS,
    "sd35-medium": TURNS,
    "klein": ("student",),  # with two parts to a batch
    "sdxl": TURNS,
    "sd15": TURNS,
    "z-image": TURNS,
}
# Where a turn waits for the GPU, at most how often in a student's turn, in another, and why.
# Counted at batch 1, over all teachers, with whatever load_batch does before the turn.
WAITS = {
    "engine/ranks.py:agree": (3, 2, "whether a network may step, which is asked before it does"),
    "engine/ranks.py:to_host": (1, 1, "the log of a step, in one piece"),
}
# Where no fused kernel takes the attention.
MATH: dict[str, str] = {}
# Where only several ranks wait.
RANKS = {
    "engine/ranks.py:mean_over_ranks": "logged values are read, at once",
}

RANKS_OF_FLUX = ("--shard", "fsdp", "--ema", "0.99", "--batch", "2")

LACKING = "" if shutil.which("g++") else "needs g++ to compile tests/fake_cuda.cpp"
LACKING = "needs a torch without CUDA, which has its own" if torch.version.cuda else LACKING
if LACKING and "SENSEFLOW_NEEDS_GXX" in os.environ:  # .ci/run sets it
    pytest.fail(LACKING, pytrace=False)
elif LACKING:
    pytest.skip(LACKING, allow_module_level=True)


class Workshop:
    """Where reports are made, once each."""

    def __init__(self, folder: Path):
        self.folder, self.printed = folder, folder / "printed.txt"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.machine", "serve"],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
            **{"cwd": folder, "env": environment, "stderr": open(self.printed, "w")},  # noqa: SIM115
        )
        self.report = functools.cache(self.make)

    def make(self, asked: str) -> dict:
        to = self.folder / "report.json"
        told = json.loads(asked) | {"to": str(to), "folder": str(self.folder)}
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        assert code == "0", f"exit code {code}\n{self.printed.read_text()[-3000:]}"
        return json.loads(to.read_text())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    made = Workshop(tmp_path_factory.mktemp("full-size"))
    yield made
    made.process.stdin.close()
    assert made.process.wait() == 0, made.printed.read_text()[-3000:]


@pytest.fixture
def iterate(workshop):
    """iterate(teacher, *flags of train.py, **arguments of full_size.py:iterate) -> its report."""

    def report(teacher: str, *flags, depth: int = 1, **more) -> dict:
        asked = {"do": "iterate", "teacher": teacher, "flags": flags, "depth": depth, **more}
        return workshop.report(json.dumps(asked, sort_keys=True))

    return report


@pytest.fixture
def command(workshop):
    def report(name: str, teacher: str, *flags, data: bool = False) -> dict:
        asked = {"do": "command", "name": name, "teacher": teacher, "flags": flags, "data": data}
        return workshop.report(json.dumps(asked, sort_keys=True))

    return report


def check_kernels(told: dict) -> None:
    for name in told["kernels"]:
        kernel, _, where = name.split(" ")
        assert kernel in ("flash", "efficient") or where in MATH, f"no fused kernel: {name}"


# --- iterations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_turn_of_every_teacher_waits_only_where_it_is_listed(iterate, teacher):
    """Every kind of turn runs; its attention is fused."""
    parts = ("--accumulate", "2") if teacher == "klein" else ()
    for turn, told in iterate(teacher, *parts, turns=TEACHERS[teacher])["turns"].items():
        check_kernels(told)
        for where, count in told["waits"].items():
            assert where in WAITS, f"{turn}: a wait that is not listed: {told['lines']}"
            most = WAITS[where][turn == "other"]
            assert count <= most, f"{turn}: {where} waits {count} times, not {most}"


def test_what_is_listed_is_there(iterate):
    """So the lists shrink with what they list."""
    every = {name: turns for name, turns in TEACHERS.items() if name != "klein"}
    reports = [iterate(name, turns=turns)["turns"] for name, turns in every.items()]
    turns = [told for report in reports for told in report.items()]
    for where, (*most, _) in WAITS.items():
        for k, kinds in enumerate((("student", "noise"), ("other",))):
            counts = [told["waits"].get(where, 0) for turn, told in turns if turn in kinds]
            assert max(counts) == most[k], f"{where} waits {max(counts)} times, not {most[k]}"
    kernels = {name for _, told in turns for name in told["kernels"]}
    assert {name.split(" ")[2] for name in kernels if name.startswith("math")} == set(MATH)


def test_at_pure_noise_nothing_is_decoded(iterate):
    """A flow's anchor there is not judged: VAE and discriminator have no work."""
    turns = iterate("flux-dev", turns=TEACHERS["flux-dev"])["turns"]
    noise, student = turns["noise"], turns["student"]
    assert "disc" not in noise["values"] and "disc" in student["values"]
    assert noise["ops"] < student["ops"] and "gan_loss" not in noise["stages"]


@pytest.mark.parametrize(
    "each, world, flags, turns",
    [
        (8, 8, RANKS_OF_FLUX[2:], ("student", "other")),
        (8, 64, ("--buckets",), ("student",)),
    ],
    ids=["8 ranks, an average, a batch of two", "8 nodes of 8, in buckets"],
)
def test_all_ranks_say_the_same_in_the_same_order(iterate, each, world, flags, turns):
    """Else NCCL hangs. FLUX's shards, by rank 0, which reads the files, and rank 1."""
    where = {"world": world, "each": each, "turns": turns}
    first, second = (
        iterate("flux-dev", "--shard", "fsdp", *flags, rank=rank, **where) for rank in (0, 1)
    )
    assert first["build"]["collectives"] == second["build"]["collectives"] != []
    for turn in turns:
        told, other = first["turns"][turn], second["turns"][turn]
        assert told["collectives"] == other["collectives"] != []
        for report in (told, other):
            check_kernels(report)
            assert set(report["waits"]) <= WAITS.keys() | RANKS.keys()


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher, world", [("flux-dev", 0), ("flux-dev", 8), ("sdxl", 0)])
def test_the_plan_is_what_is_seen_here(iterate, teacher, world, monkeypatch):
    """Read off tensors of the CPU, without a compiler: resident within 1 %, waits in train_step as
    here, and the peak within .1 %."""
    flags = RANKS_OF_FLUX if world else ()
    where = {"world": world, "each": 8, "rank": 0} if world else {}
    report = iterate(teacher, *flags, turns=TURNS if world else TEACHERS[teacher], **where)
    monkeypatch.setitem(teachers.FOUND, teacher, shallow(find(teacher), 1))
    monkeypatch.setattr(sys, "argv", ["train.py", "--teacher", teacher, *flags])
    cfg, _ = train_arguments(None)
    plan = measure(cfg, train.train_step, world or 1)
    assert sum(plan.parts.values()) == pytest.approx(report["resident"], rel=0.01)
    for learn, name in ((True, "student"), (False, "other")):
        seen = report["turns"][name]
        assert plan.turns[learn].peak == pytest.approx(seen["peak"], rel=1e-3)
        listed = {where: n for where, n in seen["waits"].items() if where in WAITS}
        assert plan.turns[learn].waits == sum(listed.values())


# --- commands ------------------------------------------------------------------------------------


def test_sample_draws_with_flux_at_full_size(command, tmp_path):
    """All 57 blocks; the text encoders are gone before the transformer comes."""
    flags = ("--prompt", "a red three", "--steps", "1", "--out", str(tmp_path / "x.png"))
    told = command("sample", "flux-dev", *flags)
    check_kernels(told)
    assert (tmp_path / "x.png").is_file()
    assert 24e9 < told["peak"] < 30e9, "12 billion weights in bf16, and one image"


def test_train_runs_sd15_from_a_cache_to_its_sheet(command, tmp_path):
    """train.py as a user starts it; what it would write of weights is left out."""
    flags = ("--steps", "1", "--exam-every", "0", "--cache", str(tmp_path / "cache"))
    flags += ("--student-steps", "2", "--show", "a red three")  # of the sheet
    told = command("train", "sd15", *flags, "--out", str(tmp_path / "run"), data=True)
    check_kernels(told)
    assert (tmp_path / "run" / "samples.png").is_file()
