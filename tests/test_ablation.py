"""ablation.py: its table, and runs of a few iterations with a small exam."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

import train
from digits import ablation, exam
from digits.exam import COLUMNS, Exam

KEYS = [key for key, _, _ in COLUMNS]


def row(name: str, nfe: int, value: float) -> dict:
    return {"name": name, "nfe": nfe} | dict.fromkeys(KEYS, value)


def test_the_table_is_mean_and_spread_over_seeds():
    """Two seeds of one kind, 90 and 94 percent: 92.0 ± 2.8 (the standard deviation of a sample);
    one seed: the value alone."""
    teacher = [row("teacher 50, guided", 100, 95.0), row("teacher 4, guided", 8, 60.0)]
    seeds = [[row(f"student {n}, x0", n, value + n) for n in (1, 2)] for value in (89.0, 93.0)]
    lines = ablation.table(ablation.KINDS, teacher, {"all": seeds, "dmd": seeds[:1]}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["parts", "steps", "NFE", "accuracy"]
    assert cells[2][:4] == ["teacher, guided", "50", "100", "95.0"]
    assert cells[3][:4] == ["teacher, guided", "4", "8", "60.0"]
    assert cells[4][:4] == ["all three", "1", "1", "92.0 ± 2.8"]
    assert cells[5][:4] == ["all three", "2", "2", "93.0 ± 2.8"]
    assert cells[6][:4] == ["DMD", "1", "1", "90.0"] and len(cells) == 8


def test_every_combination_of_the_three_parts_is_a_kind(monkeypatch):
    """Read from what train.py makes of the flags; titles say the same."""
    parts = {}
    for kind, (title, own) in ablation.KINDS.items():
        monkeypatch.setattr(sys, "argv", ["train.py", *ablation.flags_of(own, 5, None)])
        cfg, _ = train.train_arguments("")
        assert cfg.seed == 5 and not cfg.table
        on = (cfg.ida_decay < 1, cfg.w_isg > 0, cfg.w_gan > 0)
        assert (cfg.student_steps < 4) == (kind in ablation.FEWER)
        assert (cfg.adapter > 0) == (kind in ablation.ADAPTERS)
        if kind not in ablation.FEWER + ablation.ADAPTERS:
            parts[on] = kind
            named = [word in title or title == "all three" for word in ("IDA", "ISG", "disc")]
            assert tuple(named) == on, f"{title}: {on}"
    assert len(parts) == 8


def ended(result: tuple[int, str, str], *named: str) -> None:
    """Refused in its last line, below the progress."""
    code, _, err = result
    refused((code, "", err.splitlines()[-1] + "\n"), *named)
    assert "Traceback" not in err


@pytest.fixture
def small(monkeypatch):
    """Six captions of four images; noise for the teacher's samples."""
    monkeypatch.setattr(ablation, "Exam", partial(Exam, captions=4, new=1, placed=1, samples=4))
    noise = torch.rand(2, 24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(exam, "cached_samples", lambda fingerprint: list(2 * noise - 1))


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_runs_are_trained_examined_and_kept(command, small, tmp_path, monkeypatch):
    """A seed of two iterations; the same again trains nothing and says the same. What was kept of
    another student, or damaged, is not used."""
    flags = ("--kinds", "dmd", "--seeds", 1, "--steps", 2, "--out", tmp_path)
    code, out, err = command(ablation, *flags)
    assert code == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [r["nfe"] for r in metrics["teacher"]] == [100, 16, 8, 4, 2]
    assert list(metrics["students"]) == ["dmd"] and metrics["seeds"] == [1]
    (rows,) = metrics["students"]["dmd"]
    assert [r["name"] for r in rows] == [f"student {n}, x0" for n in (1, 2, 4, 8)]
    cells = [line.split("|") for line in out.splitlines() if line.startswith("| DMD")]
    assert [f"{r['fd']:.2f}" for r in rows] == [line[6].strip() for line in cells]
    assert (tmp_path / "table.md").read_text() in out
    assert (tmp_path / "ablation.png").stat().st_size > 1000
    config = json.loads((tmp_path / "dmd-1" / "config.json").read_text())
    assert (config["seed"], config["ida_decay"], config["w_isg"], config["w_gan"]) == (1, 1, 0, 0)

    def never(*args):
        raise ValueError("trained again")

    monkeypatch.setattr(ablation, "train", never)
    code, again, err = command(ablation, *flags)
    assert code == 0 and again == out, err
    student, kept = (tmp_path / "dmd-1" / name for name in ("student.safetensors", "exam.json"))
    whole, rows = student.read_bytes(), kept.read_text()
    for path, bad in ((student, whole[:-1] + b"x"), (kept, b""), (kept, b"[]")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="trained again"):
            given = SimpleNamespace(out=tmp_path, steps=2, known=ablation.KINDS)
            ablation.rows_of("dmd", 1, given, None, Event())
        student.write_bytes(whole)
        kept.write_text(rows)


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_a_run_that_ends_badly_ends_the_command(command, small, tmp_path):
    """train.py refuses a folder of which it cannot tell whose it is; its words are passed on, and
    no other run begins."""
    (tmp_path / "dmd-0").mkdir()
    (tmp_path / "dmd-0" / "config.json").write_text("{")
    flags = ("--kinds", "dmd", "all", "--seeds", 0, "--jobs", 1, "--steps", 2, "--out", tmp_path)
    ended(command(ablation, *flags), "--no-ida", "config.json", "dmd-0.txt", "another --out")
    assert not (tmp_path / "all-0.txt").exists()


WITH_LITTLE_EXAM = """
from functools import partial
import torch
from digits import ablation, exam
ablation.Exam = partial(exam.Exam, captions=4, new=1, placed=1, samples=2)
exam.cached_samples = lambda fingerprint: list(torch.rand(2, 12, 3, 16, 16))
ablation.main()
"""


def test_an_interrupted_ablation_stops_its_runs_which_continue(tmp_path):
    """Ctrl-C, which reaches the whole group: train.py saves and stops, within seconds; no student
    is examined before its end."""
    flags = ["--kinds", "dmd", "--seeds", "0", "--steps", "100000", "--out", str(tmp_path)]
    root = Path(ablation.__file__).parents[1]
    how = {"stderr": subprocess.PIPE, "text": True, "process_group": 0}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # "&" has it ignored
    call = [sys.executable, "-c", WITH_LITTLE_EXAM, *flags]
    run = subprocess.Popen(call, cwd=root, **how)
    log = tmp_path / "dmd-0" / "log.csv"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    try:
        _, err = run.communicate(timeout=60)
    finally:
        run.terminate()  # were it still there, it would end its runs
    assert run.returncode == 130 and "the same command continues" in err
    assert "stopped by SIGTERM" in (tmp_path / "dmd-0.txt").read_text()
    assert not (tmp_path / "dmd-0" / "exam.json").exists()
    assert any((tmp_path / "dmd-0" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--kinds", "ida", "idea"], "idea"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--seed", "1"], "--seed"),
        ([], "torchrun is not needed"),
    ],
)
def test_ablation_refuses_what_cannot_be(command, tmp_path, monkeypatch, wrong, named):
    monkeypatch.setenv("RANK", "0") if not wrong else None
    refused(command(ablation, *wrong, "--out", tmp_path / "none"), named)
    assert not (tmp_path / "none").exists()
