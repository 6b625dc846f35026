"""The discriminator on a frozen vision model: real pixels, for this caption and reference, or made?

    VFM discriminator    Discriminator        frozen backbone -> feature maps -> one head each
    timestep weight      omega                adversarial feedback where little noise is left
    adversarial losses   gan_loss, disc_loss  hinge
    DiffAugment          augment              colour, translation, cutout, of the images judged

Images are (B, 3, H, W) in [-1, 1]. The heads follow the official code. The backbone may run in
bf16; from its feature maps on everything is fp32, under autocast too, but that some machines round
what a convolution multiplies to TF32's ten bits if train.py lets them (--tf32). Knows nothing of
files, ranks or configuration.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schedule import uniform

SLOPE = 0.2  # of the leaky ReLU
EMBEDDING = 64  # width in which features meet the condition


# --- heads ---------------------------------------------------------------------------------------


class SpectralConv(nn.Module):
    """A convolution whose weight, as a matrix, has largest singular value 1; circular padding.

    The forward pass changes nothing: the running singular vector `u` moves only in
    `power_iteration`, once per discriminator step, so judging images for the student leaves no
    trace in the discriminator.
    """

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.padding, self.stride = kernel // 2, stride
        self.weight = nn.Parameter(torch.empty(channels, channels_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("u", F.normalize(torch.randn(channels), dim=0))
        for _ in range(0 if self.weight.is_meta else 15):  # no numbers, nothing to find
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        matrix = self.weight.flatten(1)
        v = F.normalize(matrix.T @ self.u, dim=0)
        self.u.copy_(F.normalize(matrix @ v, dim=0))

    def normalised(self) -> Tensor:
        """weight / sigma, sigma = u' W v; u and v count as constants."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.T @ self.u, dim=0)
        return self.weight / (self.u @ matrix @ v)

    def forward(self, x: Tensor) -> Tensor:
        if p := self.padding:  # in a circle; on a CPU in half the time of F.pad
            x = torch.cat([x[:, :, -p:], x, x[:, :, :p]], dim=2)
            x = torch.cat([x[..., -p:], x, x[..., :p]], dim=3)
        return F.conv2d(x, self.normalised(), self.bias, stride=self.stride)


class GroupStatistics(nn.Module):
    """Batch norm without memory: per channel, over space and over groups of 8 samples."""

    def __init__(self, channels: int, group: int = 8):
        super().__init__()
        self.group = group
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        def norm(part: Tensor) -> Tensor:  # F.batch_norm refuses one value a channel
            how = {"training": True, "momentum": 0.0, "eps": 1e-5, "cudnn_enabled": False}
            return torch.batch_norm(part, self.weight, self.bias, None, None, **how)

        return torch.cat([norm(part) for part in x.split(self.group)])


class Block(nn.Module):
    """Spectral convolution, group statistics, leaky ReLU."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.conv, self.norm = SpectralConv(channels, channels, kernel), GroupStatistics(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class Residual(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.block(x)) / math.sqrt(2)


class Branch(nn.Sequential):
    """A feature map (B, C, h, w) -> (B, 64, ~h / 8, ~w / 8).

    lighter: channels after a first 1x1 projection, 0 for none.
    """

    def __init__(self, width: int, lighter: int = 0):
        channels = lighter or width
        project = [SpectralConv(width, channels, 1)] if lighter else []
        super().__init__(
            *project,
            Block(channels, 1),
            SpectralConv(channels, channels, 3, stride=2),
            Residual(Block(channels, 3)),
            SpectralConv(channels, channels, 3, stride=2),
            Residual(Block(channels, 3)),
            SpectralConv(channels, channels, 3, stride=2),
            SpectralConv(channels, EMBEDDING, 1),
        )


class Head(nn.Module):
    """Logit map = features . (text + reference) / 8."""

    def __init__(self, width: int, text_width: int, lighter: int = 0):
        super().__init__()
        self.image, self.reference = Branch(width, lighter), Branch(width, lighter)
        self.text = nn.Linear(text_width, EMBEDDING)

    def condition(self, reference: Tensor, text: Tensor) -> Tensor:
        """reference (B, C, h, w), text (B, text_width) -> (B, 64, h', w')."""
        return self.text(text)[:, :, None, None] + self.reference(reference)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """image (B, C, h, w), what `condition` gave -> logits (B, places)."""
        return (self.image(image) * condition).sum(1).flatten(1) / math.sqrt(EMBEDDING)


def fp32(net: nn.Module) -> torch.autocast:
    """No autocast where this network is."""
    return torch.autocast(next(net.parameters()).device.type, enabled=False)


class Discriminator(nn.Module):
    """A frozen backbone and a trainable head for each of its feature maps.

    backbone: any module with `maps(image in [0, 1]) -> list of (B, width, h, w)`, `count` of them,
    and these two numbers. Its dtype is its own affair: pixels come in fp32, and the heads cast the
    maps to fp32.
    """

    def __init__(self, backbone: nn.Module, text_width: int, lighter: int = 0):
        super().__init__()
        self.backbone, width = backbone.requires_grad_(False).eval(), backbone.width
        self.heads = nn.ModuleList(Head(width, text_width, lighter) for _ in range(backbone.count))

    def features(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> the backbone's maps."""
        return self.backbone.maps((image.float() + 1) / 2)

    def power_iteration(self) -> None:
        """Once per discriminator step."""
        with fp32(self.heads):
            for module in self.heads.modules():
                if isinstance(module, SpectralConv):
                    module.power_iteration()

    def condition(self, reference: list[Tensor], text: Tensor) -> list[Tensor]:
        """The reference's feature maps, text (B, text_width) -> what `forward` compares with."""
        maps = zip(self.heads, reference, strict=True)
        with fp32(self.heads):
            return [head.condition(x.float(), text.float()) for head, x in maps]

    def forward(self, image: list[Tensor], condition: list[Tensor]) -> Tensor:
        """Feature maps of the image judged, the condition -> logits (B, places)."""
        maps = zip(self.heads, image, condition, strict=True)
        with fp32(self.heads):
            return torch.cat([head(x.float(), c) for head, x, c in maps], dim=1)

    def logits(self, reference: list[Tensor], text: Tensor) -> Callable[[list[Tensor]], Tensor]:
        """For one reference and text: feature maps of an image -> its logits (B, places).

        A loss of any form is made of them; what it leaves in the heads' gradients is not applied.
        """
        return partial(self, condition=self.condition(reference, text))


# --- losses --------------------------------------------------------------------------------------


def omega(schedule, tau: Tensor) -> Tensor:
    """The adversarial weight (B,): alpha(tau)^2. For flows (1 - tau)^2, zero at pure noise; at
    DDPM's first anchor .005.
    """
    return schedule.alpha(tau).square()


def gan_loss(
    disc: Discriminator, made: list[Tensor], reference: list[Tensor], text: Tensor, weight: Tensor
) -> Tensor:
    """The student's adversarial loss, -mean(weight logits), as a function of the features `made`.

    Its gradient is taken here, in the features alone, so that it reaches the pixels behind them and
    never the heads, sharded or not (official code: it stays in the heads and is applied with their
    next step).
    """
    with torch.no_grad():
        logits = disc.logits(reference, text)
    leaves = [x.detach().requires_grad_() for x in made]
    loss = -(weight[:, None] * logits(leaves)).mean()
    grads = torch.autograd.grad(loss, leaves)
    # The loss as a number, plus a surrogate of value zero: its gradient in `made` is `grads`, and a
    # backward pass never meets the heads, whose own gradients would be exchanged between shards.
    surrogate = sum((x * g).sum() for x, g in zip(made, grads, strict=True))
    return loss.detach() + (surrogate - surrogate.detach())


def disc_loss(
    disc: Discriminator,
    real: list[Tensor],
    made: list[Tensor],
    reference: list[Tensor],
    text: Tensor,
    weight: Tensor,
) -> Tensor:
    """Hinge, mean of weight (relu(1 - real logits) + relu(1 + made logits)).

    Features carry no gradient here: the heads learn, nothing else.
    """
    real, made, reference = ([x.detach() for x in maps] for maps in (real, made, reference))
    logits = disc.logits(reference, text)
    loss_real, loss_made = F.relu(1 - logits(real)), F.relu(1 + logits(made))
    return (weight[:, None] * (loss_real + loss_made)).mean()


# --- DiffAugment ---------------------------------------------------------------------------------


def draw(rng, low: float, high: float, like: Tensor) -> Tensor:
    """(B, 1, 1, 1), uniform, each sample from its own generator in rng.own."""
    return uniform(like, rng.own, low, high).to(like.dtype)[:, None, None, None]


def augment_colour(image: Tensor, rng) -> Tensor:
    """Brightness by up to .5, saturation by 0 to 2, contrast by .5 to 1.5."""
    image = image + draw(rng, -0.5, 0.5, image)
    grey = image.mean(1, keepdim=True)
    image = (image - grey) * draw(rng, 0, 2, image) + grey
    mean = image.mean((1, 2, 3), keepdim=True)
    return (image - mean) * draw(rng, 0.5, 1.5, image) + mean


def augment_translation(image: Tensor, rng, ratio: float = 0.125) -> Tensor:
    """By up to an eighth of the side, black (-1) behind: a random window of the padded image."""
    H, W = image.shape[-2:]
    far_h, far_w = round(ratio * H), round(ratio * W)
    padded, host = F.pad(image, (far_w, far_w, far_h, far_h), value=-1.0), torch.empty(len(image))
    ends = (uniform(host, rng.own, 0, 2 * far + 1) for far in (far_h, far_w))  # places it knows
    windows = zip(padded, *(end.long().tolist() for end in ends), strict=True)
    return torch.stack([x[:, top : top + H, left : left + W] for x, top, left in windows])


def augment_cutout(image: Tensor, rng, ratio: float = 0.5) -> Tensor:
    """A square of half the side, anywhere, becomes grey (0)."""
    H, W = image.shape[-2:]
    rows, columns = (torch.arange(size, device=image.device) for size in (H, W))
    centre_h, centre_w = draw(rng, 0, H, image), draw(rng, 0, W, image)  # (B, 1, 1, 1)
    hole = (rows[:, None] - centre_h).abs() < ratio * H / 2
    hole = hole & ((columns - centre_w).abs() < ratio * W / 2)
    return torch.where(hole, 0.0, image)


AUGMENTATIONS = {
    "colour": augment_colour,
    "translation": augment_translation,
    "cutout": augment_cutout,
}


def augment(image: Tensor, policy: tuple[str, ...], rng) -> Tensor:
    """DiffAugment, drawn per sample. policy: names from AUGMENTATIONS; () changes nothing."""
    for name in policy:
        image = AUGMENTATIONS[name](image, rng)
    return image
