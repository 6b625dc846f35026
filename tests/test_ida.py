import copy

import pytest
import torch
from conftest import Linear
from torch import nn

from ida import ida_update


def distance(a: nn.Module, b: nn.Module) -> float:
    gaps = [(p - q).flatten() for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    return torch.cat(gaps).norm().item()


def test_ida_decay_one_changes_nothing():
    fake, student = Linear(seed=1), Linear(seed=2)
    before = copy.deepcopy(fake)
    ida_update(fake, student, 1.0)
    assert distance(fake, before) == 0


def test_ida_decay_zero_copies():
    fake, student = Linear(seed=1), Linear(seed=2)
    ida_update(fake, student, 0.0)
    assert distance(fake, student) == 0


def test_ida_moves_the_fake_score_to_the_student_and_leaves_the_student():
    """phi <- lambda phi + (1 - lambda) theta, every parameter; theta stays, no gradient is made."""
    fake, student = Linear(seed=1), Linear(seed=2)
    old_fake, old_student = copy.deepcopy(fake), copy.deepcopy(student)
    ida_update(fake, student, 0.97)
    for new, old, theta in zip(
        fake.parameters(), old_fake.parameters(), student.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.97 * old + 0.03 * theta)
        assert new.requires_grad and new.grad is None
    assert distance(student, old_student) == 0


def test_n_updates_contract_the_gap_by_lambda_to_the_n():
    """Within 1e-6 of the start's gap: fp32 rounding of 20 updates."""
    fake, student = Linear(seed=1), Linear(seed=2)
    start = distance(fake, student)
    for _ in range(20):
        ida_update(fake, student, 0.9)
    assert distance(fake, student) / start == pytest.approx(0.9**20, abs=1e-6)


def test_ida_refuses_other_architectures_and_half_precision():
    with pytest.raises(AssertionError, match="one architecture"):
        ida_update(Linear(), nn.Linear(2, 2), 0.9)
    with pytest.raises(AssertionError, match="fp32"):
        ida_update(Linear().bfloat16(), Linear().bfloat16(), 0.9)
