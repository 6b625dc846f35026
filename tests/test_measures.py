import pytest
import torch
from PIL import Image

from config import TEACHERS
from data import DigitScenes
from measures import (
    Exam,
    cached_samples,
    effective_number,
    exam_table,
    format_table,
    frechet_distance,
    from_uint8,
    read_scene,
    recall,
    to_uint8,
)
from nets.text import SceneText
from nets.vision import Verdict
from pictures import exam_pictures
from schedule import grid
from teachers import load_teacher

TOKENS = SceneText().tokens


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """N(0, diag(1, 4)) against N((3, 0), diag(9, 1)): 9 + (3 - 1)^2 + (1 - 2)^2 = 14; 400,000
    samples in fp64 reach it to 1 %. With itself: zero."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(400_000, 2, generator=draw) * torch.tensor([1.0, 2.0])
    b = torch.randn(400_000, 2, generator=draw) * torch.tensor([3.0, 1.0]) + torch.tensor(
        [3.0, 0.0]
    )
    assert frechet_distance(a, b) == pytest.approx(14, rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    few = torch.randn(5, 20, generator=draw)  # fewer samples than dimensions
    assert frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-4)


def test_recall_falls_by_the_share_of_a_dropped_mode():
    draw = torch.Generator().manual_seed(0)
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    real, made = (modes.repeat(100, 1) + torch.randn(400, 2, generator=draw) for _ in range(2))
    assert recall(real, made) > 0.9
    three = made[torch.arange(400) % 4 != 3]
    assert recall(real, three) == pytest.approx(0.75, abs=0.04)


def test_effective_number_counts_equally_likely_choices():
    """Constant: 1. Uniform over 4, many samples: 4. All distinct among 8: infinite."""
    everywhere = torch.tensor([True, True, False])
    assert effective_number(torch.tensor([[3] * 8, [5] * 8, [1] * 8]), everywhere) == 1
    uniform = torch.arange(4).repeat(500)[None].repeat(3, 1)
    assert effective_number(uniform, everywhere) == pytest.approx(4, rel=0.01)
    mixed = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [9, 9, 9, 9]])  # pairs that agree: 4 of 24
    assert effective_number(mixed, everywhere) == pytest.approx(6)


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
    exam = Exam(TEACHERS["digits"].guidance)
    exam.ask_teacher(load_teacher("digits", TEACHERS["digits"].shift))
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
    others = exam.real.roll(exam.samples, 0)
    row = exam.row(0.75 * exam.real + 0.25 * others)
    assert row["clean"] < 20 and row["fd"] > exam.row(exam.real)["fd"]
    assert exam.row(others)["accuracy"] < 25


def test_the_teachers_samples_in_assets_are_its_own(exam):
    """Eight of them sampled again; 8-bit rounding of other sums may differ by one."""
    cfg = TEACHERS["digits"]
    teacher = load_teacher("digits", cfg.shift)
    kept = cached_samples(exam.fingerprint(teacher))
    assert kept is not None, "they are of another teacher: python pretrain.py samples"
    for seed in (0, 1):
        made = exam.sample(teacher, grid(teacher.schedule, 50), "euler", True, seed, count=8)
        assert (to_uint8(made).int() - to_uint8(kept[seed][:8]).int()).abs().max() <= 1
    assert (
        cached_samples(Exam(cfg.guidance + 1, captions=1, new=1, placed=1).fingerprint(teacher))
        is None
    )


def test_eight_bits_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    images = DigitScenes()(range(4)).images
    assert (from_uint8(to_uint8(images)) - images).abs().max() <= 0.5 / 127.5 + 1e-6


def test_the_table_has_every_sampler_with_its_evaluations(tmp_path):
    """A small exam, for which the teacher's samples are drawn on the spot; guidance costs double.
    The student's own number of steps uses its own anchors."""
    small = Exam(2.0, captions=10, new=2, placed=3, samples=4)
    teacher = load_teacher("digits", 2.0)
    small.ask_teacher(teacher)
    assert len(small.floor) == 60 and small.reference.shape == (40, 96)
    rows = {row["name"]: row for row in exam_table(small, teacher, (1.0, 0.3), teacher)}
    assert len(rows) == 2 + 4 + 5 + 8
    wanted = {"teacher 50, guided": 100, "teacher 4, guided": 8, "teacher 4, unguided": 4}
    wanted |= {"student 8, x0": 8, "student 2, euler": 2}
    assert {name: rows[name]["nfe"] for name in wanted} == wanted
    own = small.row(small.sample(teacher, [1.0, 0.3], "x0"))
    assert rows["student 2, x0"]["fd"] == pytest.approx(own["fd"])
    table = format_table(list(rows.values())).splitlines()
    assert len(table) == 21 and len(set(map(len, table))) == 1, "columns must line up"
    exam_pictures(tmp_path / "p.png", small, teacher, teacher, (1.0, 0.3))
    assert Image.open(tmp_path / "p.png").width > 800
