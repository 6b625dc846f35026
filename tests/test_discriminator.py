import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from digits import ASSETS
from digits.scenes import DigitScenes
from digits.words import SceneText
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
from engine import checkpoint
from nets.vision import ViT, load_vit
from schedule import DDPM, Flow
from teachers import find

DIGITS_VIT = find("digits").backbone()


@pytest.fixture
def disc():
    torch.manual_seed(0)
    backbone = ViT(DIGITS_VIT)
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.2)
    return Discriminator(backbone, text_width=10)


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
    every = sum(p.numel() for p in head.parameters())
    assert every - weights - head.text.weight.numel() == 64 + 2 * (6 * 1024 + 64 + 6 * 1024)
    lighter = Head(64, 10, lighter=16)
    assert lighter.image[1].conv.weight.shape == (16, 16, 1, 1)
    x = torch.randn(2, 64, 8, 8)
    assert lighter(x, lighter.condition(x, TEXT[:2])).shape == (2, 1)


def test_all_but_the_backbone_is_fp32_under_autocast_and_on_bf16(disc, images):
    """Bit for bit what comes of the same images and features in fp32, outside autocast."""
    twin, pixels = copy.deepcopy(disc), images.bfloat16()
    for x, y in zip(disc.features(pixels), disc.features(pixels.float()), strict=True):
        assert torch.equal(x, y)
    twin.power_iteration()
    with torch.autocast("cpu", torch.bfloat16):
        disc.power_iteration()
    for x, y in zip(disc.buffers(), twin.buffers(), strict=True):
        assert torch.equal(x, y)
    low = [x.bfloat16() for x in disc.features(images)]
    full = [x.float() for x in low]
    logits = disc(full, disc.condition(full, TEXT))
    with torch.autocast("cpu", torch.bfloat16):
        again = disc(low, disc.condition(low, TEXT.bfloat16()))
        loss = gan_loss(disc, low, low, TEXT, WEIGHT), disc_loss(disc, low, low, low, TEXT, WEIGHT)
    assert again.dtype == torch.float32 and torch.equal(again, logits)
    assert torch.equal(loss[0], gan_loss(disc, full, full, TEXT, WEIGHT))
    assert torch.equal(loss[1], disc_loss(disc, full, full, full, TEXT, WEIGHT))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("height, width", [(57, 100), (14, 28), (33, 47)])
def test_images_of_any_size_are_judged(batch, height, width):
    """Patches of 14 in images that are no multiple of it and not square, down to one row."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(DIGITS_VIT, patch=14, recompute=True)
    disc = Discriminator(ViT(cfg), text_width=10, lighter=8)
    image = torch.randn(batch, 3, height, width, requires_grad=True)
    maps, text, weight = disc.features(image), torch.eye(batch, 10), torch.ones(batch)
    reference = [x.detach() for x in maps]
    gan_loss(disc, maps, reference, text, weight).backward()
    seen = image.grad[..., : height // 14 * 14, : width // 14 * 14]
    assert image.grad.isfinite().all() and (seen.abs().sum((1, 2, 3)) > 0).all()
    assert (seen != 0).sum() == (image.grad != 0).sum(), "pixels that are cut have no gradient"
    assert disc_loss(disc, maps, maps, reference, text, weight).isfinite()


def test_running_singular_vectors_are_part_of_every_copy(disc, tmp_path):
    """A deep copy and a checkpoint hold `u`, so a resumed run goes on with the same weights."""
    for _ in range(3):
        disc.power_iteration()
    state = {name: x.clone() for name, x in disc.heads.state_dict().items()}
    assert sum(name.endswith(".u") for name in state) == 3 * 2 * 7
    twin = copy.deepcopy(disc)
    checkpoint.save_checkpoint(tmp_path, 1, {"disc": disc.heads}, {}, {}, keep=1)
    disc.power_iteration()
    assert not torch.equal(disc.heads[0].image[0].conv.u, twin.heads[0].image[0].conv.u)
    checkpoint.load_checkpoint(tmp_path, {"disc": disc.heads}, {})
    for net in (disc, twin):
        for name, x in net.heads.state_dict().items():
            assert torch.equal(x, state[name]), name


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, taus, wanted",
    [
        (Flow(), (1, 0.904, 0.759, 0.512), (0, 0.009216, 0.058081, 0.238144)),
        (Flow(3.0), (1, 0.9, 0.75, 0.5), (0, 0.01, 0.0625, 0.25)),
        (DDPM(), (0.999, 0.749, 0.499, 0.249), (0.0046601, 0.0566235, 0.2776697, 0.6754324)),
    ],
    ids=["FLUX.1", "SD 3.5", "SDXL, SD 1.5"],
)
def test_omega_is_the_squared_signal_scale(schedule, taus, wanted):
    """Numbers for every teacher's anchors: (1 - sigma)^2 for flows, alpha-bar for DDPM."""
    got = omega(schedule, torch.tensor(taus))
    torch.testing.assert_close(got, torch.tensor(wanted).float(), atol=1e-6, rtol=0)


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


def test_gradient_of_the_students_loss_is_that_of_its_closed_form(disc, images):
    """Taken by autograd through the whole expression, and scaled as the total loss scales it."""
    with torch.no_grad():
        reference = disc.features(images.flip(0))
    gradients = []
    for closed_form in (False, True):
        pixels = images.clone().requires_grad_()
        made = disc.features(pixels)
        if closed_form:
            loss = -(WEIGHT[:, None] * disc(made, disc.condition(reference, TEXT))).mean()
        else:
            loss = gan_loss(disc, made, reference, TEXT, WEIGHT)
        (0.3 * loss).backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-5)


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


@pytest.fixture
def alone():
    """A process group of one, for FSDP2."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_heads_learn_as_whole_ones(disc, images, alone):
    """FSDP2 on each head: after a student's turn no gradient is in them, after the discriminator's
    the same as without sharding, bit for bit. (FSDP2 decides once which parameters want a gradient,
    so heads frozen for a moment would be frozen for good.)"""
    whole = copy.deepcopy(disc)
    for head in disc.heads:
        fully_shard(head)
        register_fsdp_forward_method(head, "condition")
        head.unshard()
    disc.power_iteration()
    for head in disc.heads:
        head.reshard()
    whole.power_iteration()
    for net in (disc, whole):
        pixels = images.clone().requires_grad_()
        real, made = net.features(images), net.features(pixels)
        gan_loss(net, made, real, TEXT, WEIGHT).backward()
        assert pixels.grad.norm() > 0 and all(p.grad is None for p in net.heads.parameters())
        disc_loss(net, real, made, real, TEXT, WEIGHT).backward()
    for p, q in zip(disc.heads.parameters(), whole.heads.parameters(), strict=True):
        assert torch.equal(p.grad.full_tensor(), q.grad)


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


def test_sixty_steps_tell_real_digits_from_noisy_ones_and_lead_back():
    """Real scenes against the same with noise, on the embedded backbone. Held-out ones are told by
    the sign of their mean logit, over 95% right; then ten steps down the student's loss bring the
    features of noisy images nearer to those of the real ones: .974 to .991 of the distance is left,
    over six seeds. A sign wrong anywhere fails this."""
    torch.manual_seed(0)
    cfg, speaker, B = dataclasses.replace(DIGITS_VIT, hooks=(1,)), SceneText(), 8
    backbone = load_vit(cfg, ASSETS / "backbone.safetensors")
    disc = Discriminator(backbone, SceneText.pooled_width, lighter=16)
    optimizer = torch.optim.AdamW(disc.heads.parameters(), lr=3e-3)
    weight = torch.ones(B)

    @torch.no_grad()
    def batch(scenes, i):
        sample = scenes(range(i * B, (i + 1) * B))
        noisy = sample.images + 0.3 * torch.randn(sample.images.shape)
        text = speaker.embedding(sample.captions)
        return noisy, disc.features(sample.images), disc.features(noisy), text

    training, held_out = DigitScenes(seed=0), DigitScenes(seed=5, handwriting="held-out")
    for step in range(60):
        _, real, made, text = batch(training, step)
        disc.power_iteration()
        optimizer.zero_grad()
        disc_loss(disc, real, made, real, text, weight).backward()
        optimizer.step()

    right = []
    for i in range(10):
        image, real, made, text = batch(held_out, i)
        with torch.no_grad():
            condition = disc.condition(real, text)
            right += [disc(real, condition).mean(1) > 0, disc(made, condition).mean(1) < 0]
    accuracy = torch.cat(right).float().mean()
    assert accuracy > 0.95, f"{accuracy:.3f}"

    for _ in range(10):
        image.requires_grad_()
        gan_loss(disc, disc.features(image), real, text, weight).backward()
        image = image.detach() - 0.2 * F.normalize(image.grad, dim=(1, 2, 3))
    for x, before, after in zip(real, made, disc.features(image), strict=True):
        ratio = (after - x).norm() / (before - x).norm()
        assert ratio < 0.995, f"distance to the real features, after over before: {ratio:.3f}"


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
