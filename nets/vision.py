"""Networks that look at images.

ViT     DINOv2's vision transformer (timm names), the frozen backbone of the discriminator
Judge   the embedded task's evaluator: which digits and colours, how placed, how much ghost
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.weights import load_weights, read_metadata

ASSETS = Path(__file__).parent.parent / "assets"

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- DINOv2 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig:
    patch: int
    width: int
    depth: int
    heads: int
    grid: int  # patches a side that the stored position table is for
    hooks: tuple[int, ...]  # blocks whose output the discriminator reads


DINOV2_LARGE = ViTConfig(
    patch=14, width=1024, depth=24, heads=16, grid=37, hooks=(2, 5, 8, 10, 14, 19, 23)
)
DIGITS_VIT = ViTConfig(patch=2, width=64, depth=4, heads=4, grid=8, hooks=(1, 3))


class ViTPatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # (B, D, rows, columns); pixels past the last whole patch are dropped


class ViTAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        )  # (B, N, L, D / N)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = ViTAttention(width, heads), ViTMLP(width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2.

    Any resolution: the position table is interpolated as in the official code of the paper
    (bilinear).
    """

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = ViTPatchEmbed(cfg.patch, cfg.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.grid**2, cfg.width))
        self.blocks = nn.ModuleList(ViTBlock(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(3, 1, 1), persistent=False)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows columns, D)."""
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(-1, (self.cfg.grid, self.cfg.grid))
        if (rows, columns) != (self.cfg.grid, self.cfg.grid):
            grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1] -> class token and patches (B, 1 + rows columns, D)."""
        patches = self.patch_embed((image - self.mean) / self.std)
        rows, columns = patches.shape[-2:]
        tokens = torch.cat(
            [self.cls_token.expand(len(image), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        return tokens + self.positions(rows, columns)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1] -> tokens after the final norm (B, 1 + rows columns, D)."""
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def maps(self, image: Tensor) -> list[Tensor]:
        """What the discriminator reads, as maps (B, D, rows, columns).

        The tokens before block 0 and after each hooked block, without final norm, the class token
        added to every patch token (official code).
        """
        rows, columns = (size // self.cfg.patch for size in image.shape[-2:])
        x = self.embed(image)
        kept = [x]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.cfg.hooks:
                kept.append(x)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2).unflatten(-1, (rows, columns)) for x in kept]


def load_backbone(teacher: str) -> ViT:
    """The frozen backbone of a teacher's discriminator."""
    cfg, path = {"digits": (DIGITS_VIT, ASSETS / "backbone.safetensors")}[teacher]
    return load_weights(ViT(cfg), path).requires_grad_(False).eval()


# --- the embedded task's evaluator ----------------------------------------------------------------


@dataclass
class Verdict:
    """What the judge sees in B scenes, by place: the left or upper object first."""

    axis: Tensor  # (B,) 0 side by side, 1 stacked
    digits: Tensor  # (B, 2)
    colours: Tensor  # (B, 2)
    ghost: Tensor  # (B,) how much of another scene shines through, 0 to .5
    features: Tensor  # (B, 96) for the Frechet distance and recall


class Judge(nn.Module):
    """A small CNN on (B, 3, 16, 16) images in [-1, 1]."""

    def __init__(self, width: int = 96, hidden: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, width // 2, 3, padding=1), nn.GroupNorm(6, width // 2), nn.GELU()),
            *(nn.Conv2d(width // 2, width, 3, 2, padding=1), nn.GroupNorm(8, width), nn.GELU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()),
            *(nn.Conv2d(width, width, 3, 2, padding=1), nn.GroupNorm(8, width), nn.GELU()),
        )
        self.head = nn.Sequential(
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * width, hidden), nn.GELU()),
            nn.Linear(hidden, 2 + 2 * 10 + 2 * 6 + 1),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits of axis (B, 2), digits (B, 2, 10), colours (B, 2, 6); ghost (B,); features.

        The features (B, 96) are ten times the last maps averaged over space, as in the FID.
        """
        maps = self.body(image)
        axis, digits, colours, ghost = self.head(maps).split([2, 20, 12, 1], dim=-1)
        digits, colours = digits.unflatten(-1, (2, 10)), colours.unflatten(-1, (2, 6))
        return axis, digits, colours, ghost[:, 0], 10 * maps.mean((2, 3))

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 512) -> Verdict:
        parts = [self(part) for part in images.split(batch)]
        axis, digits, colours, ghost, features = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        return Verdict(axis.argmax(-1), digits.argmax(-1), colours.argmax(-1), ghost, features)


def load_judge() -> tuple[Judge, float]:
    """The evaluator, and the ghost that 95% of real scenes stay under."""
    path = ASSETS / "judge.safetensors"
    judge = load_weights(Judge(), path).requires_grad_(False).eval()
    return judge, float(read_metadata(path)["ghost_limit"])
