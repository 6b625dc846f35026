"""Measures on sets of features for which they are known."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from digits.scenes import DigitScenes
from measure.distances import (
    bootstrap,
    brightness,
    clip_score,
    fit,
    frechet_distance,
    from_uint8,
    kernel_distance,
    pairwise_distance,
    patch,
    precision,
    recall,
    resize,
    saturation,
    to_uint8,
    vendi_score,
)
from nets.clip import CLIP, CLIPConfig, quick_gelu
from nets.vision import CLIPVision, CLIPVisionConfig
from nets.weights import read_metadata

GOLDEN = Path(__file__).parent / "golden" / "clip_vit.safetensors"


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Frechet distance ----------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """N(0, diag(1, 4)) against N((3, 0), diag(9, 1)): 9 + (3 - 1)^2 + (1 - 2)^2 = 14; 400,000
    samples in fp64 reach it to 1 %. With itself: zero."""
    a = draws(400_000, 2) * torch.tensor([1.0, 2.0])
    b = draws(400_000, 2, seed=1) * torch.tensor([3.0, 1.0]) + torch.tensor([3.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(14, rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_its_sum_over_pairs():
    """1000 MMD^2 by loops: no sample with itself within a set, every pair across."""
    a, b = draws(5, 3), draws(4, 3, seed=1) + 1

    def k(x, y):
        return ((x @ y).item() / 3 + 1) ** 3

    def within(x):
        pairs = [k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(k(x, y) for x in a for y in b) / 20
    assert kernel_distance(a, b) == pytest.approx(1000 * (within(a) + within(b) - 2 * across))


def test_kernel_distance_has_no_bias_of_few_samples():
    """One dimension: N(0, 1) against N(m, 1). With k = (xy + 1)^3 = 1 + 3xy + 3x^2y^2 + x^3y^3 and
    moments m, 1 + m^2, m^3 + 3m: MMD^2 = 3 m^2 + 3 m^4 + (m^3 + 3m)^2; at m = 1 that is 22, from
    8,000 samples to a tenth. And the mean over pairs of small sets of one law is zero within
    four standard errors."""
    a, b = draws(8_000, 1).split(800), draws(8_000, 1, seed=1).add(1).split(800)
    got = sum(kernel_distance(x, y) for x, y in zip(a, b, strict=True)) / 10
    assert got == pytest.approx(22_000, rel=0.1)
    few = [kernel_distance(*draws(20, 4, seed=s).split(10)) for s in range(2, 402)]
    assert abs(np.mean(few)) < 4 * np.std(few) / 20 and min(few) < 0


def test_brightness_and_saturation_of_known_colours():
    """Black, white, grey, red, dark red, and pink, which is half white: HSV's saturation."""
    colours = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0.2, 0, 0), (1, 0.5, 0.5)]
    image = torch.tensor(colours)[:, :, None, None].expand(-1, 3, 4, 6)
    torch.testing.assert_close(saturation(image), torch.tensor([0, 0, 0, 1, 1, 0.5]))
    torch.testing.assert_close(brightness(image), torch.tensor(colours).mean(1))
    half = torch.cat([image[3:4], image[1:2]], dim=3)  # half red, half white
    assert saturation(half).item() == pytest.approx(0.5)


def reference(a, b):
    """The formula as it is written, in NumPy: tr (S_a S_b)^1/2 from the product's eigenvalues."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross


@pytest.mark.parametrize("n, m, d", [(200, 200, 12), (90, 300, 30), (31, 40, 30)])
def test_frechet_distance_equals_the_formula_taken_literally(n, m, d):
    """Correlated features, sets of different sizes; both in fp64, so to 1e-8."""
    mix_a, mix_b = draws(d, d, seed=1), draws(d, d, seed=2)
    a, b = draws(n, d, seed=3) @ mix_a, draws(m, d, seed=4) @ mix_b + 1
    assert frechet_distance(a, b) == pytest.approx(reference(a, b), rel=1e-8)


def test_frechet_distance_without_full_rank_is_that_within_the_subspace_and_warned_of():
    """Three dimensions turned into ten: an isometry, so the distance is that of the three. And
    fewer samples than features: a shift alone costs its square."""
    a, b = draws(100, 3), 2 * draws(80, 3, seed=1) + 1
    turn = torch.linalg.qr(draws(10, 3, seed=2).double()).Q.T  # (3, 10), orthonormal rows
    with pytest.warns(UserWarning, match="samples do not span their 10 features"):
        high = frechet_distance(a.double() @ turn, b.double() @ turn)
    assert high == pytest.approx(frechet_distance(a, b), rel=1e-6)
    few = draws(5, 20)
    with pytest.warns(UserWarning, match="5 samples do not span their 20 features"):
        assert frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-6)
    with pytest.warns(UserWarning, match="5 samples"):  # a far mean, which rounding blurs
        frechet_distance(few.double() + 1e6, few.double() + 1e6)
    constant = torch.ones(30, 4)
    with pytest.warns(UserWarning):
        assert frechet_distance(constant, constant + 1) == pytest.approx(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(a, b)


# --- precision and recall ------------------------------------------------------------------------

MODES = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])


@pytest.mark.parametrize("k", [3, 5])
def test_recall_falls_by_the_share_of_a_dropped_mode_precision_by_that_of_an_invented_one(k):
    """Four modes far apart, 100 samples each: what is true of the other three stays true, to the
    2 % that modes differ by chance; about 7 % of the samples lie beyond the others' reach."""
    real, made = (MODES.repeat(100, 1) + draws(400, 2, seed=seed) for seed in (0, 1))
    kept, whole = torch.arange(400) % 4 != 3, recall(real, made, k)
    assert whole > 0.9 and precision(real, made, k) > 0.9
    assert recall(real, made[kept], k) == pytest.approx(0.75 * whole, abs=0.02)
    assert precision(real, made[kept], k) > 0.9
    invented = precision(real[kept], made, k)
    assert invented == pytest.approx(0.75 * precision(real, made, k), abs=0.02)
    assert recall(real[kept], made, k) > 0.9


def test_reach_is_the_distance_to_the_kth_neighbour_among_the_made():
    """On a line, made at 0, 1, 2, 10. Their nearest neighbours: 1, 1, 1 and 8 away; the second: 2,
    1, 2 and 9."""
    made = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    real = torch.tensor([[-0.9], [-1.9], [-2.1], [18.5], [19.5]])
    assert recall(real, made, k=1) == pytest.approx(1 / 5)
    assert recall(real, made, k=2) == pytest.approx(3 / 5)
    assert precision(made, real, k=2) == recall(real, made, k=2)
    with pytest.raises(AssertionError, match="4-th neighbour among 4"):
        recall(real, made, k=4)


def test_neighbours_far_from_the_origin_are_told_apart():
    """Clouds of deviation 1 a thousand away, which fp32 holds to 6e-5. There squared distances, by
    products of numbers of a million each, would be off by their own size."""
    real, made = draws(60, 4) + 1000, draws(50, 4, seed=1) + 1000.5
    for share in (recall, precision):
        assert share(real, made) == share(real - 1000, made - 1000)
    apart = (real[:, None] - made).double().norm(dim=-1)
    reach = (made[:, None] - made).double().norm(dim=-1).sort(dim=1).values[:, 3]
    assert recall(real, made) == pytest.approx((apart <= reach).any(1).double().mean().item())


# --- variety -------------------------------------------------------------------------------------


def test_vendi_counts_different_features():
    """k alike: 1. k orthogonal: k. Shares p of orthogonal ones: exp of the entropy of p. Lengths of
    features do not matter."""
    one = draws(1, 9).expand(6, 9)
    assert vendi_score(one) == pytest.approx(1)
    assert vendi_score(torch.eye(7, 9)) == pytest.approx(7)
    assert vendi_score(torch.arange(1.0, 8)[:, None] * torch.eye(7)) == pytest.approx(7)
    shares = torch.eye(3).repeat_interleave(torch.tensor([5, 3, 2]), dim=0)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert vendi_score(shares) == pytest.approx(math.exp(entropy))


def test_pairwise_distance_is_within_a_prompt_and_averaged_over_prompts():
    """Alike 0, orthogonal 1, opposite 2; that prompts differ from each other does not count."""
    a, b = torch.eye(4)[0], torch.eye(4)[1]
    alike, across, opposite = [a, 3 * a], [2 * b, a], [b, -b]
    pairs = torch.stack([torch.stack(pair) for pair in (alike, across, opposite)])
    assert pairwise_distance(pairs) == pytest.approx(1)
    assert [pairwise_distance(pair[None]) for pair in pairs] == pytest.approx([0, 1, 2])
    assert pairwise_distance(torch.stack([a, b])[:, None].expand(2, 5, 4)) == pytest.approx(0)
    assert pairwise_distance(torch.eye(4)[None]) == pytest.approx(1)
    assert pairwise_distance(torch.stack([a, a, b])[None]) == pytest.approx(2 / 3)  # pairs of three
    with pytest.raises(AssertionError, match="no pair"):
        pairwise_distance(pairs[:, :1])


# --- CLIP score ----------------------------------------------------------------------------------


def test_clip_score_is_the_references_cosine():
    """Both towers of the reference, with its weights, to the 2e-5 that they agree to; the second
    caption against the first image tells a pair from a mean."""
    golden, size = load_file(GOLDEN), json.loads(read_metadata(GOLDEN)["config"])
    vision, text = size["vision"], size["text"]
    grid = vision["image_size"] // vision["patch_size"]
    block = (vision["num_attention_heads"], vision["intermediate_size"])
    shape = (vision["patch_size"], grid, vision["hidden_size"], vision["num_hidden_layers"])
    images = CLIPVision(CLIPVisionConfig(*shape, *block, embedding=24)).requires_grad_(False)
    shape = (text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"])
    length, words = text["max_position_embeddings"], text["vocab_size"]
    cfg = CLIPConfig(*shape, text["intermediate_size"], quick_gelu, True, length, words, 24)
    captions = CLIP(cfg).requires_grad_(False)
    for net in (images, captions):
        net.load_state_dict({name: golden[f"weights/{name}"] for name in net.state_dict()})
    mean, std = (torch.tensor(size[f"image_{x}"])[:, None, None] for x in ("mean", "std"))
    made = images(golden["inputs/pixel_values"] * std + mean)
    asked = captions(golden["inputs/input_ids"])[2]
    unit = [golden[f"outputs/{x}_embeds_normalised"] for x in ("image", "text")]
    cosines = unit[0] @ unit[1].T  # (2, 3)
    assert clip_score(made, asked[:2]) == pytest.approx(cosines.diagonal().mean().item(), abs=2e-5)
    assert clip_score(made[:1], asked[1:2]) == pytest.approx(cosines[0, 1].item(), abs=2e-5)
    assert clip_score(3 * made, 5 * asked[:2]) == pytest.approx(clip_score(made, asked[:2]))


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 40])
def test_intervals_cover_a_known_mean_as_often_as_they_say(count):
    """400 samples of a normal distribution with mean 2: 95 % of the intervals should hold it; of
    seven numbers 90 %, for 1.96 is the quantile of a known spread (of theirs it would be 2.45). The
    mean squared half width is 1.96^2 / count, to four standard errors."""
    wanted, halves, hits = {7: 0.90, 40: 0.95}[count], [], 0
    for i in range(400):
        x = 2 + draws(count, seed=i)
        value, half = bootstrap(lambda chosen, x=x: x[chosen].mean().item(), count, 60)
        assert value == pytest.approx(x.mean().item())
        hits += abs(value - 2) <= half
        halves.append(half**2)
    assert hits / 400 == pytest.approx(wanted, abs=0.04)
    assert sum(halves) / 400 == pytest.approx(1.96**2 / count, rel=0.13)


def test_resamples_are_halves_without_repetition_and_the_same_every_time():
    chosen = []

    def measure(i):
        chosen.append(i.tolist())
        return float(i.sum())

    first, again = bootstrap(measure, 9, 20), bootstrap(measure, 9, 20)
    assert first == again and first[0] == sum(range(9)) and first[1] > 0
    assert chosen[0] == list(range(9))
    for half in chosen[1:21]:
        assert len(half) == len(set(half)) == 4
    assert len({tuple(sorted(half)) for half in chosen[1:21]}) > 10
    assert {i for half in chosen[1:21] for i in half} == set(range(9))


# --- images --------------------------------------------------------------------------------------


SIZES = [
    (90, 60, 24),
    (50, 133, 24),
    (24, 24, 24),
    (10, 17, 24),
    (768, 1360, 224),
    (832, 1216, 224),
]


@pytest.mark.parametrize("height, width, side", SIZES)
def test_resize_is_pillows_bicubic_of_the_short_side_then_the_middle(height, width, side):
    """Pillow rounds to 8 bits after each of the two axes, half a level each, which bicubic weights
    enlarge by a little. (It also cuts off there what overshoots between them, so these levels stay
    away from the ends.) The long side loses its fraction: 1360 pixels beside 768 become 396 beside
    224, and not 397; of the 327 that 1216 become beside 832, torchvision's crop begins at the 52nd
    and transformers' at the 51st."""
    levels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = F.interpolate(levels[None], size=(height, width), mode="nearest")
    levels = (80 + 95 * levels).round()
    picture = Image.fromarray(levels[0].movedim(0, -1).byte().numpy())
    size = [int(side * length / min(height, width)) for length in (width, height)]
    scaled = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    for half in (round, math.floor):
        left, top = (half((length - side) / 2) for length in size)
        wanted = torch.tensor(scaled[top : top + side, left : left + side]).movedim(-1, 0)
        got = 255 * resize(levels / 255, side, half)
        assert got.shape == (1, 3, side, side) and (got[0] - wanted).abs().max() <= 1.01
    assert torch.equal(resize(levels / 255, side), resize(levels / 255, side, round))
    edges = resize((levels > 128).float(), side)
    assert edges.min() == 0 and edges.max() == 1, "bicubic overshoots; pixels do not"


@pytest.mark.parametrize("height, width", [(90, 60), (50, 133), (24, 24), (10, 17)])
def test_fit_is_the_whole_image_with_black_beside_it(height, width):
    """White: the scaled rectangle, its side within half a pixel, in the middle. A square image is
    seen as by `resize`, but that what bicubic overshoots stays, as in HPSv2's code."""
    got = fit(torch.ones(2, 3, height, width), 24)
    assert got.shape == (2, 3, 24, 24) and torch.allclose(got, got.round(), atol=1e-6)
    got = got.round()
    rows, columns = got[0, 0].any(1).sum(), got[0, 0].any(0).sum()
    assert abs(rows - 24 * height / max(height, width)) <= 0.5
    assert abs(columns - 24 * width / max(height, width)) <= 0.5
    assert (got - got.flip(2, 3)).abs().sum(dim=(0, 1)).count_nonzero() <= 2 * 24, "in the middle"
    square = torch.ones(1, 3, 70, 70)
    square[..., 35:] = 0
    assert torch.equal(fit(square, 24).clamp(0, 1), resize(square, 24))
    assert fit(square, 24).min() < -0.01 and fit(square, 24).max() > 1.01


def test_a_patch_is_the_middle_at_its_own_scale():
    image = torch.arange(7 * 11.0).reshape(1, 1, 7, 11)
    assert torch.equal(patch(image, 5), image[:, :, 1:6, 3:8])
    assert torch.equal(patch(image, 9), image[:, :, :, 1:10])
    assert torch.equal(patch(image), image), "whole where it is smaller than 299 pixels"
    assert torch.equal(patch(image, 9, unit=4), image[:, :, 1:5, 1:9])


def test_eight_bits_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    images = DigitScenes()(range(4)).images
    assert (from_uint8(to_uint8(images)) - images).abs().max() <= 0.5 / 127.5 + 1e-6
