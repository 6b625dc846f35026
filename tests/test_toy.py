"""The story in one file: its parts do what the picture shows, by the functions of the paper."""

import functools

import pytest
from conftest import refused
from PIL import Image

import toy

SEED = 10  # one on which nothing was chosen
teacher = functools.cache(toy.train_teacher)


def curve(row: str, column: str, steps: int) -> list[float]:
    """The SWD of a student, seen every 25 steps."""
    target, start, how = toy.ROWS[row]
    nets = teacher(target, SEED), teacher(start, SEED)
    return toy.distill(target, *nets, *toy.COLUMNS[column], SEED, **how, steps=steps)[1]


def test_ida_keeps_the_student_from_running_past_the_ring():
    """It begins .6 away. Furthest in 250 steps, seen over five seeds: 3.8 to 7.9 without IDA; with
    it, never further than where it began."""
    without, with_ida = (max(curve("ring", column, steps=250)) for column in ("DMD", "IDA"))
    assert without > 2, f"without IDA the student should run past the ring, went {without} away"
    assert with_ida < 1, f"with IDA it should not, went {with_ida} away"


def test_isg_lowers_the_distance_to_the_checkerboard():
    """The mean of the last four measurements, seen over five seeds: .63 to .77 of that without."""
    without, with_isg = (curve("checkerboard", column, steps=350) for column in ("DMD", "ISG"))
    late, late_isg = (sum(swds[-4:]) / 4 for swds in (without, with_isg))
    assert late_isg < 0.85 * late, f"SWD {late} without ISG, {late_isg} with"


def test_every_step_calls_the_functions_of_the_paper(monkeypatch):
    """Ten steps, the student's turn at every fifth: the functions are those of dmd.py, ida.py and
    isg.py, each called as often as Algorithm 1 says."""
    calls = []

    def counted(real):
        def call(**arguments):
            calls.append(f"{real.__module__}.{real.__name__}")
            return real(**arguments)

        return call

    for name in ("student_input", "dmd_loss", "isg_loss", "ida_update", "fake_loss"):
        monkeypatch.setattr(toy, name, counted(getattr(toy, name)))
    net = toy.train_teacher(toy.checkerboard, SEED, steps=1)
    toy.distill(toy.checkerboard, net, net, 0.97, 1.0, SEED, 5, 5e-4, 5e-4, steps=10)
    first = ["dmd.student_input", "dmd.dmd_loss", "isg.isg_loss", "ida.ida_update", "dmd.fake_loss"]
    assert calls[:5] == first
    assert [calls.count(name) for name in first] == [10, 2, 2, 2, 10]


def test_the_story_prints_distances_and_draws_a_picture(command, tmp_path, monkeypatch):
    for name, steps in (("train_teacher", 20), ("distill", 25)):
        monkeypatch.setattr(toy, name, functools.partial(getattr(toy, name), steps=steps))
    code, out, err = command(toy, "--out", tmp_path / "new", "--seed", 1)
    assert code == 0, err
    rows = [line.split()[0] for line in out.splitlines()[:-1]]
    assert rows == ["ring:", *toy.COLUMNS, "checkerboard:", *toy.COLUMNS]
    with Image.open(tmp_path / "new" / "story.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--seedz", "1"], "--seedz"),
        (["--seed", "one"], "one"),
        (["--out", "/proc/toy"], "/proc/toy"),
    ],
)
def test_the_story_refuses_what_cannot_be(command, flags, named):
    refused(command(toy, *flags), "toy.py: ", named)
