import math

import pytest
import torch
from PIL import Image
from small import embedded

from digits.exam import (
    ROWS,
    Exam,
    cached_samples,
    draw_rows,
    effective_number,
    exam_table,
    format_table,
    read_scene,
    teacher_rows,
)
from digits.judge import Judge, Verdict
from digits.words import SceneText
from measure.distances import to_uint8
from schedule import grid
from teachers import find

TOKENS = SceneText().tokens


def test_effective_number_counts_equally_likely_choices():
    """Constant: 1. Uniform over 4, many samples: 4. All distinct among 8: infinite."""
    everywhere = torch.tensor([True, True, False])
    assert effective_number(torch.tensor([[3] * 8, [5] * 8, [1] * 8]), everywhere) == 1
    uniform = torch.arange(4).repeat(500)[None].repeat(3, 1)
    assert effective_number(uniform, everywhere) == pytest.approx(4, rel=0.01)
    mixed = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [9, 9, 9, 9]])  # pairs that agree: 4 of 24
    assert effective_number(mixed, everywhere) == pytest.approx(6)
    assert effective_number(torch.arange(8).repeat(3, 1), everywhere) == math.inf


def seen(axis, digits, colours) -> Verdict:
    return Verdict(
        torch.tensor([axis]), torch.tensor([digits]), torch.tensor([colours]), None, None
    )


@pytest.mark.parametrize(
    "caption, right",
    [
        ("a red three left of a blue seven", True),
        ("a digit left of a digit", True),
        ("a blue seven and a red three", True),  # "and": either order
        ("a red seven and a blue three", False),  # attributes belong together
        ("a blue seven left of a red three", False),
        ("a red three above a blue seven", False),
        ("a red three left of a blue eight", False),
        ("a pink digit and a digit", False),
    ],
)
def test_reading_holds_all_named_attributes_against_the_picture(caption, right):
    """The picture: a red three on the left, a blue seven on the right."""
    read = read_scene(seen(0, [3, 7], [0, 4]), TOKENS([caption]))
    assert read.right.item() == right


def test_reading_finds_the_arrangement_of_and():
    """Told apart by what is named; what is open is read from the matched object."""
    read = read_scene(seen(1, [3, 7], [0, 4]), TOKENS(["a seven and a three"]))
    assert read.arrangement.item() == 3 and read.open_arrangement.item()  # the seven is below
    assert read.colours.tolist() == [[4, 0]] and read.open_colours.tolist() == [[True, True]]
    read = read_scene(seen(1, [3, 7], [0, 4]), TOKENS(["a digit and a three"]))
    assert not read.open_arrangement.item(), "one named digit does not tell two objects apart"


@pytest.fixture(scope="module")
def exam():
    exam = Exam(find("digits").preset.guidance)
    exam.ask_teacher(embedded())
    return exam


def test_real_scenes_pass_the_exam(exam):
    """Held-out handwriting: named attributes right, no ghosts, and the diversity that the data
    has.
    """
    row = exam.row(exam.real)
    assert (
        row["accuracy"] > 95 and row["new"] > 95 and 92 < row["clean"] < 98 and row["recall"] > 99
    )
    assert row["digits"] == pytest.approx(9.1, abs=0.4)
    assert row["colours"] == pytest.approx(5.5, abs=0.4)
    assert row["arrangements"] == pytest.approx(4, abs=0.4)  # three standard errors


def test_ghosts_and_wrong_scenes_fail_the_exam(exam):
    """A quarter of another scene shining through is not clean; another caption's scene is not
    right."""
    real, others = (x[:512] for x in (exam.real, exam.real.roll(exam.samples, 0)))
    row = exam.row(0.75 * real + 0.25 * others)
    assert row["clean"] < 20 and row["fd"] > exam.row(real)["fd"]
    assert exam.row(others)["accuracy"] < 25


def test_the_teachers_samples_in_assets_are_its_own(exam):
    """Eight of them sampled again; 8-bit rounding of other sums may differ by one."""
    cfg = find("digits").preset
    teacher = embedded()
    kept = cached_samples(exam.fingerprint(teacher))
    assert kept is not None, "they are of another teacher: python -m digits.pretrain samples"
    for seed in (0, 1):
        made = exam.sample(teacher, grid(teacher.schedule, 50), "euler", True, seed, count=8)
        assert (to_uint8(made).int() - to_uint8(kept[seed][:8]).int()).abs().max() <= 1
    assert (
        cached_samples(Exam(cfg.guidance + 1, captions=1, new=1, placed=1).fingerprint(teacher))
        is None
    )


def test_the_teachers_rows_in_assets_are_its_own(exam, monkeypatch, tmp_path):
    """Those that cost little once more; damaged, of another judge or absent they are drawn."""
    teacher, cheap = embedded(), ("real, held out", "teacher 50, guided", "teacher 1, unguided")
    kept = teacher_rows(exam, teacher)
    monkeypatch.setattr("digits.exam.product", lambda *_: [(False, 1)])
    drawn = {row["name"]: row for row in draw_rows(exam, teacher)}
    for name in cheap:
        (row,), again = [row for row in kept if row["name"] == name], drawn[name]
        assert row.keys() == again.keys() and row["nfe"] == again["nfe"]
        for measure in row.keys() - {"name"}:
            assert row[measure] == pytest.approx(again[measure], rel=1e-3, abs=0.06), measure
    monkeypatch.setattr("digits.exam.draw_rows", lambda *_: "drawn")
    with monkeypatch.context() as patch:
        patch.setattr(exam, "judge", Judge())
        assert teacher_rows(exam, teacher) == "drawn", "of another judge"
    monkeypatch.setattr("digits.exam.ASSETS", tmp_path)
    for text in ("", "[]", '{"rows": []}'):
        (tmp_path / ROWS).write_text(text)
        assert teacher_rows(exam, teacher) == "drawn"
    (tmp_path / ROWS).unlink()
    assert teacher_rows(exam, teacher) == "drawn"


@pytest.mark.filterwarnings("ignore:.*do not span")
def test_the_table_has_every_sampler_with_its_evaluations(tmp_path):
    """A small exam, for which the teacher's samples are drawn on the spot; guidance costs double.
    The student's own number of steps uses its own anchors."""
    small = Exam(2.0, captions=8, new=1, placed=1, samples=4)
    teacher = embedded()
    teacher.joint_blocks = teacher.joint_blocks[-1:]  # how well it draws is no matter
    small.ask_teacher(teacher)
    assert len(small.floor) == 40 and small.reference.shape == (32, 96)
    rows = {row["name"]: row for row in exam_table(small, teacher, (1.0, 0.3), teacher)}
    assert len(rows) == 2 + 4 + 4 + 4 + 1
    wanted = {"teacher 50, guided": 100, "teacher 4, guided": 8, "teacher 4, unguided": 4}
    wanted |= {"student 8, x0": 8, "student 2, euler": 2}
    assert {name: rows[name]["nfe"] for name in wanted} == wanted
    own = small.row(small.sample(teacher, [1.0, 0.3], "x0"))
    assert rows["student 2, x0"]["fd"] == pytest.approx(own["fd"])
    table = format_table(list(rows.values())).splitlines()
    assert len(table) == 17 and len(set(map(len, table))) == 1, "columns must line up"
    small.pictures(tmp_path / "p.png", teacher, teacher, (1.0, 0.3))
    assert Image.open(tmp_path / "p.png").width > 800
