import pytest
import torch

from data import DigitScenes
from measures import frechet_distance, from_uint8, recall, to_uint8


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


def test_eight_bits_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    images = DigitScenes()(range(4)).images
    assert (from_uint8(to_uint8(images)) - images).abs().max() <= 0.5 / 127.5 + 1e-6
