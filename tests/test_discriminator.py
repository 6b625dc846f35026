import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discriminator import (
    Block,
    Discriminator,
    GroupStatistics,
    Head,
    SpectralConv,
    augment,
    disc_loss,
    gan_loss,
    omega,
)
from nets.vision import DIGITS_VIT, ViT
from schedule import DDPM, Flow


@pytest.fixture
def disc():
    torch.manual_seed(0)
    backbone = ViT(DIGITS_VIT)
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.2)
    return Discriminator(backbone, DIGITS_VIT.width, 1 + len(DIGITS_VIT.hooks), text_width=10)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


TEXT = torch.eye(3, 10)
WEIGHT = torch.tensor([1.0, 0.5, 0.0])


# --- heads ---------------------------------------------------------------------------------------


def test_spectral_convolution_has_spectral_norm_one():
    """After enough power iterations, to 1e-4; against the singular values themselves."""
    conv = SpectralConv(6, 8, 3)
    with torch.no_grad():
        conv.weight.mul_(7)
    for _ in range(200):
        conv.power_iteration()
    assert torch.linalg.matrix_norm(conv.normalised().flatten(1), 2).item() == pytest.approx(
        1, abs=1e-4
    )


def test_spectral_convolution_pads_in_a_circle():
    """Shifting the input around the edge shifts the output likewise."""
    conv, x = SpectralConv(2, 3, 3), torch.randn(1, 2, 5, 7)
    torch.testing.assert_close(conv(x.roll((2, 3), (2, 3))), conv(x).roll((2, 3), (2, 3)))


def test_group_statistics_normalise_groups_of_eight():
    """Twelve samples: the first eight together, then four, each channel by its own mean and
    variance.
    """
    norm, x = GroupStatistics(2), 3 + 2 * torch.randn(12, 2, 4, 4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 5.0]))
    got = norm(x)
    for rows in (slice(0, 8), slice(8, 12)):
        for c, (gain, bias) in enumerate(((2, 0), (1, 5))):
            part = x[rows, c]
            wanted = gain * (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt() + bias
            torch.testing.assert_close(got[rows, c], wanted, atol=1e-5, rtol=1e-5)


def test_head_is_features_times_text_plus_reference_over_eight():
    """The whole head once more in plain arithmetic: naive convolution by loops over the kernel."""
    head, x, ref, text = Head(6, 10), torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), TEXT[:2]

    def conv(layer, x):
        matrix = layer.weight.flatten(1)
        v = matrix.T @ layer.u
        weight = layer.weight / (layer.u @ matrix @ (v / v.norm()))
        k, s, p = weight.shape[-1], layer.stride, layer.padding
        out = layer.bias[:, None, None].expand(len(x), -1, x.shape[2] // s, x.shape[3] // s).clone()
        for i in range(k):
            for j in range(k):
                seen = x.roll((p - i, p - j), (2, 3))[:, :, ::s, ::s]
                out += torch.einsum("oc,bchw->bohw", weight[:, :, i, j], seen)
        return out

    def block(layer, x):
        y = conv(layer.conv, x)
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (
            y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
        ).sqrt()
        return torch.where(y > 0, y, 0.2 * y)

    def branch(b, x):
        x = conv(b[1], block(b[0], x))
        x = conv(b[3], (x + block(b[2].block, x)) / math.sqrt(2))
        x = conv(b[5], (x + block(b[4].block, x)) / math.sqrt(2))
        return conv(b[6], x)

    condition = (text @ head.text.weight.T + head.text.bias)[:, :, None, None] + branch(
        head.reference, ref
    )
    wanted = (branch(head.image, x) * condition).sum(1) / 8
    torch.testing.assert_close(
        head(x, head.condition(ref, text)), wanted.flatten(1), atol=1e-5, rtol=1e-4
    )


def test_head_sizes_are_those_of_the_paper():
    """At DINOv2 ViT-L's 1024 channels eight heads have 773 M weights, counted on meta."""
    with torch.device("meta"):
        head = Head(1024, 768)
    weights = sum(m.weight.numel() for m in head.modules() if isinstance(m, SpectralConv))
    assert round(8 * (weights + head.text.weight.numel()) / 1e6) == 773
    lighter = Head(64, 10, lighter=16)
    assert lighter.image[1].conv.weight.shape == (16, 16, 1, 1)
    x = torch.randn(2, 64, 8, 8)
    assert lighter(x, lighter.condition(x, TEXT[:2])).shape == (2, 1)


# --- losses --------------------------------------------------------------------------------------


def test_omega_is_the_squared_signal_scale():
    """Numbers for the flow's anchors of SD 3.5 and for DDPM's: (1 - sigma)^2 and alpha-bar."""
    got = omega(Flow(3.0), torch.tensor([1.0, 0.9, 0.75, 0.5]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.01, 0.0625, 0.25]))
    got = omega(DDPM(), torch.tensor([0.999, 0.749, 0.499, 0.249]))
    wanted = torch.tensor([0.0046601, 0.0566235, 0.2776697, 0.6754324])
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_hinge_losses_equal_their_closed_form(disc, images):
    real, made = disc.features(images), disc.features(-images)
    condition = disc.condition(real, TEXT)
    on_real, on_made = disc(real, condition), disc(made, condition)
    places = on_real.shape[1]
    wanted = sum(
        WEIGHT[b] * (max(0, 1 - on_real[b, k]) + max(0, 1 + on_made[b, k])) / (3 * places)
        for b in range(3)
        for k in range(places)
    )
    torch.testing.assert_close(disc_loss(disc, real, made, real, TEXT, WEIGHT), wanted)
    torch.testing.assert_close(
        gan_loss(disc, made, real, TEXT, WEIGHT), -(WEIGHT[:, None] * on_made).sum() / (3 * places)
    )


def test_students_adversarial_gradient_reaches_pixels_and_never_the_heads(disc, images):
    """Each sample by its weight: the third has weight zero, the first twice the second's."""
    images = images.requires_grad_()
    with torch.no_grad():
        reference = disc.features(images)
    gan_loss(disc, disc.features(images), reference, TEXT, WEIGHT).backward()
    assert images.grad[0].norm() > 0
    assert all(p.grad is None for p in disc.parameters())
    assert all(p.requires_grad for p in disc.heads.parameters()), "the heads must learn again later"


def test_disc_loss_trains_heads_alone(disc, images):
    images = images.requires_grad_()
    real, made = disc.features(images), disc.features(-images)
    disc_loss(disc, real, made, real, TEXT, WEIGHT).backward()
    assert images.grad is None
    assert all(p.grad is None for p in disc.backbone.parameters())
    assert all(p.grad is not None for p in disc.heads.parameters())


def test_judging_leaves_no_trace(disc, images):
    """The forward pass has no side effect: D's next step cannot depend on the student's turn."""
    before = {name: x.clone() for name, x in disc.state_dict().items()}
    disc.train()
    disc(disc.features(images), disc.condition(disc.features(images), TEXT))
    assert all(torch.equal(x, before[name]) for name, x in disc.state_dict().items())
    disc.power_iteration()
    assert not all(torch.equal(x, before[name]) for name, x in disc.state_dict().items())


def test_text_and_reference_both_condition_the_logits(disc, images):
    made, reference = disc.features(images), disc.features(images.flip(0))
    logits = disc(made, disc.condition(reference, TEXT))
    assert not torch.allclose(logits, disc(made, disc.condition(reference, TEXT.flip(0))))
    assert not torch.allclose(logits, disc(made, disc.condition(made, TEXT)))


def test_a_discriminator_learns_and_its_gradient_points_to_the_real_images(disc):
    """Real: bright left half; made: bright right half, plus noise. After 60 steps of hinge loss it
    separates fresh images, and a step of the student's loss moves a made image towards the real."""
    draw = torch.Generator().manual_seed(0)

    def images(side):
        x = -torch.ones(8, 3, 16, 16)
        x[..., slice(0, 8) if side == "real" else slice(8, 16)] = 0.5
        return x + 0.2 * torch.randn(x.shape, generator=draw)

    text, weight = torch.zeros(8, 10), torch.ones(8)
    optimizer = torch.optim.AdamW(disc.heads.parameters(), lr=1e-3)
    for _ in range(60):
        with torch.no_grad():
            real, made = disc.features(images("real")), disc.features(images("made"))
        disc.power_iteration()
        optimizer.zero_grad()
        disc_loss(disc, real, made, [torch.zeros_like(x) for x in real], text, weight).backward()
        optimizer.step()
    made = images("made").requires_grad_()
    features, nothing = disc.features(made), [torch.zeros_like(x) for x in disc.features(made)]
    loss = gan_loss(disc, features, nothing, text, weight)
    loss.backward()
    # Groups of samples share their statistics, so both kinds are judged in one batch.
    both = torch.cat([images("real")[:4], images("made")[:4]])
    logits = disc(disc.features(both), disc.condition(nothing, text)).mean(1)
    assert logits[:4].min() > logits[4:].max()
    towards_real = images("real") - made.detach()
    assert (made.grad * towards_real).sum() < 0, "descent must move made images towards real ones"


# --- augmentation, block --------------------------------------------------------------------------


def test_augmentation_is_per_sample_differentiable_and_off_by_default(images, rng):
    assert augment(images, (), rng()) is images
    everything = ("colour", "translation", "cutout")
    images = images.requires_grad_()
    got = augment(images, everything, rng())
    assert got.shape == images.shape and not torch.equal(got, images)
    got.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    alone = augment(images[:1], everything, rng(batch=1))
    torch.testing.assert_close(got[:1], alone)


def test_translation_moves_and_fills_with_black(rng):
    image = torch.full((3, 3, 16, 16), 0.5)
    moved = augment(image, ("translation",), rng())
    assert set(moved.unique().tolist()) <= {0.5, -1.0}
    assert ((moved == 0.5).float().mean((1, 2, 3)) >= (14 / 16) ** 2).all()


def test_block_slope_is_a_fifth():
    block, x = Block(4, 1), torch.randn(8, 4, 5, 5)
    y = block.norm(block.conv(x))
    torch.testing.assert_close(block(x), F.leaky_relu(y, 0.2))
