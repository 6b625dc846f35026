"""What the watch measures, in closed form, and when it speaks."""

import math

import pytest
import torch

from measure.drift import (
    MEASURES,
    PIXELS,
    advice,
    chroma,
    contrast,
    distances,
    farthest,
    high_frequency,
    leaves,
    ratio,
)

BAND = (0.7, 1.4)


def test_contrast_is_the_deviation_of_grey():
    """Half black, half white: .5; of two colours as bright as each other none."""
    halves = torch.zeros(1, 3, 4, 4)
    halves[..., :2] = 1
    colours = torch.zeros(1, 3, 4, 4)
    colours[:, 0, :, :2] = colours[:, 1, :, 2:] = 1
    seen = contrast(torch.cat([halves, colours]))
    assert seen.tolist() == pytest.approx([0.5, 0], abs=1e-7)


def test_chroma_is_of_colour_and_not_of_what_is_nearly_black():
    """Pure red 1, grey none, red at a tenth a tenth."""
    images = torch.zeros(3, 3, 2, 2)
    images[0, 0], images[1], images[2, 0] = 1, 0.5, 0.1
    assert chroma(images).tolist() == pytest.approx([1, 0, 0.1])


def test_high_frequencies_are_what_a_blur_takes_away():
    """A chequerboard leaves 4/9 at every pixel, a ramp nothing; twice the contrast four times as
    much."""
    rows = torch.arange(6)
    board = ((rows[:, None] + rows) % 2).float().expand(1, 3, 6, 6)
    ramp = (rows / 5).expand(1, 3, 6, 6)
    seen = high_frequency(torch.cat([board, board / 2, ramp]))
    assert seen.tolist() == pytest.approx([(4 / 9) ** 2, (4 / 9) ** 2 / 4, 0], abs=1e-7)


def test_distances_are_of_each_prompt_and_of_shapes_not_of_brightness():
    """Three prompts of two images: one brighter and stronger than the other, unlike, opposite."""
    a = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])  # (C, h, w)
    pairs = [(a, 3 * a + 5), (a, a.mT), (a, 2 - a)]
    latents = torch.stack([torch.stack(pair) for pair in pairs])
    (of_latents,) = distances(latents, None)
    assert of_latents.tolist() == pytest.approx([0, 1, 2], abs=1e-6)
    again, of_features = distances(latents, torch.eye(2).expand(3, 2, 2))
    assert torch.equal(again, of_latents) and of_features.tolist() == [1, 1, 1]


def test_every_measure_has_a_name_and_none_is_zero_over_zero():
    image = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert all(measure(image).shape == (5,) for measure in PIXELS.values())
    assert len(set(MEASURES)) == len(PIXELS) + 2
    assert ratio(0.0, 0.0) == 1 and ratio(0.6, 0.3) == pytest.approx(2, rel=1e-5)


def test_what_is_out_of_the_band_is_said_with_its_side_and_a_remedy_for_that():
    ratios = {"brightness": 1.0, "contrast": 1.5, "distance_features": 0.6}
    out = leaves(ratios, {}, BAND)
    assert out == {"contrast": "high", "distance_features": "low"}
    said = {advice(name, side) for name in MEASURES for side in ("low", "high")}
    assert len(said) == 4 and all("--" in line for line in said)


def test_a_student_on_its_way_to_the_band_is_not_out():
    """It begins at .5. There and nearer it is on its way; farther, or beyond the other end, out."""
    start = {"contrast": 0.5}
    for value, wanted in ((0.5, {}), (0.6, {}), (0.45, "low"), (1.5, "high")):
        out = leaves({"contrast": value}, start, BAND)
        assert out == (wanted and {"contrast": wanted})


def test_half_is_as_far_as_twice():
    assert farthest({"a": 0.5, "b": 1.9}) == ("a", 0.5)
    assert farthest({"a": 0.5, "b": 2.1}) == ("b", 2.1)
    assert farthest({"a": 0.1, "b": math.nan})[0] == "b", "what is no number is farthest"
