"""Networks that look at images.

ViT         DINOv2's vision transformer (timm names), the frozen backbone of the discriminator;
            ImageReward's is one too (nets/blip.py)
CLIPVision  CLIP's tower that reads images: OpenAI's ViT-L/14, open_clip's ViT-H/14 and ViT-g/14
CLIPText    the one that reads captions; L/14's is what the discriminator is told of them

B batch, L tokens, D width, N heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nets.clip import (
    CLIP,
    TEXT_TOWER,
    VISION_TOWER,
    CLIPBlock,
    CLIPConfig,
    OpenClip,
    load_open_clip,
    quick_gelu,
)
from nets.layers import attention, send
from nets.names import Other
from nets.text import clip_tokenizer, token_ids
from nets.weights import load_weights, places

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def standardise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """image (B, 3, H, W) in [0, 1] -> mean 0 and deviation 1 over the training set, in fp32."""
    shift, scale = (per_channel(x, image.device) for x in (mean, std))
    return (image.float() - shift) / scale


@lru_cache(maxsize=16)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), sent to each device once."""
    return send(torch.tensor(values), device).reshape(3, 1, 1)


# --- DINOv2 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig:
    patch: int
    width: int
    depth: int
    heads: int
    grid: int  # patches a side that the stored position table is for
    hooks: tuple[int, ...]  # blocks whose output the discriminator reads
    positions: str = "senseflow"  # how that table is stretched: one of POSITIONS
    recompute: bool = False  # a backward pass runs the blocks again; only their inputs are kept
    scaled: bool = True  # with LayerScale: DINOv2's; BLIP has none
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the pixels that it was trained on
    std: tuple[float, ...] = IMAGENET_STD


DINOV2_LARGE = ViTConfig(
    patch=14,
    width=1024,
    depth=24,
    heads=16,
    grid=37,
    hooks=(2, 5, 8, 10, 14, 19, 23),
    recompute=True,
)
POSITIONS = ("senseflow", "hf", "facebook", "timm")  # who does it so; the first is the paper's code


def stretch(grid: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """(1, D, n, n) -> (1, D, rows, columns), in one of the ways in use; they differ visibly."""
    assert how in POSITIONS, f'positions is "{how}"; choose from {", ".join(POSITIONS)}'
    if how == "facebook":  # by a factor a little too large, so that rounding down gives `size`
        scale = [(new + 0.1) / old for new, old in zip(size, grid.shape[2:], strict=True)]
        return F.interpolate(grid, scale_factor=scale, mode="bicubic")
    mode = "bilinear" if how == "senseflow" else "bicubic"
    return F.interpolate(grid, size=size, mode=mode, antialias=how == "timm")


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
        return self.proj(attention(q, k, v))


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
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = ViTAttention(cfg.width, cfg.heads), ViTMLP(cfg.width)
        scale = LayerScale if cfg.scaled else nn.Identity
        self.ls1, self.ls2 = scale(cfg.width), scale(cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2, or BLIP's. Any resolution; pixels past the last whole patch are not seen."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = ViTPatchEmbed(cfg.patch, cfg.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.grid**2, cfg.width))
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)

    @property
    def width(self) -> int:
        """Channels of each map."""
        return self.cfg.width

    @property
    def count(self) -> int:
        """How many maps there are."""
        return 1 + len(self.cfg.hooks)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows columns, D), interpolated in fp32."""
        table, n = self.pos_embed.float(), self.cfg.grid
        grid = table[:, 1:].transpose(1, 2).unflatten(-1, (n, n))  # (1, D, n, n)
        if (rows, columns) != (n, n):
            grid = stretch(grid, (rows, columns), self.cfg.positions)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1] -> class token and patches (B, 1 + rows columns, D)."""
        # Pixels in the dtype of the weights, which may be bf16.
        pixels = standardise(image, self.cfg.mean, self.cfg.std).to(self.cls_token.dtype)
        patches = self.patch_embed(pixels)
        positions = self.positions(*patches.shape[-2:]).to(patches.dtype)
        tokens = torch.cat(
            [self.cls_token.expand(len(image), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        return tokens + positions

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.cfg.recompute and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return block(x)

    def tokens(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """image (B, 3, H, W) in [0, 1] -> tokens (B, 1 + rows columns, D), all without final norm:
        before block 0 and after each hooked block; and after the last block.
        """
        x = self.embed(image)
        kept = [x]
        for i, block in enumerate(self.blocks):
            x = self.run(block, x)
            if i in self.cfg.hooks:
                kept.append(x)
        return kept, x

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1] -> tokens after the final norm (B, 1 + rows columns, D)."""
        return self.norm(self.tokens(image)[1])

    def maps(self, image: Tensor) -> list[Tensor]:
        """What the discriminator reads, as maps (B, D, rows, columns).

        The class token is added to every patch token (official code).
        """
        rows, columns = (size // self.cfg.patch for size in image.shape[-2:])
        kept, _ = self.tokens(image)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2).unflatten(-1, (rows, columns)) for x in kept]


HF_NAMES = (  # ours (timm's), and those of facebook/dinov2-large
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."),
    ("attn.proj", "attention.output.dense"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
)
HF_MASK = "embeddings.mask_token"  # of pretraining alone


def hf_names(name: str) -> tuple[str, ...]:
    """The tensors of facebook/dinov2-large that make ours of this name, one below the other."""
    if name.startswith("norm."):
        return (name.replace("norm", "layernorm"),)
    for ours, theirs in HF_NAMES:
        name = name.replace(ours, theirs)
    if "attn.qkv" not in name:
        return (name,)
    parts = ("query", "key", "value")
    return tuple(name.replace("attn.qkv", f"attention.attention.{part}") for part in parts)


def load_vit(
    cfg: ViTConfig,
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ViT:
    """Frozen, from a file with timm's or with Hugging Face's names."""
    with torch.device("meta"):
        vit = ViT(cfg)
    layout = {}
    if "embeddings.cls_token" in places([path], ""):
        layout = {"stored": lambda name: Other(hf_names(name)), "ignore": (HF_MASK,)}
    return load_weights(vit, path, dtype, device, **layout).requires_grad_(False).eval()


# --- CLIP ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CLIPVisionConfig:
    patch: int
    grid: int  # patches a side; no other size of image is taken
    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP
    embedding: int  # width that images and captions share
    activation: Callable[[Tensor], Tensor] = quick_gelu


CLIP_VIT_LARGE = CLIPVisionConfig(14, 16, 1024, 24, 16, 4096, embedding=768)
CLIP_VIT_LARGE_TEXT = CLIPConfig(768, 12, 12, 3072, quick_gelu, projected=True)
# open_clip's, trained on LAION; both read text with the same network.
CLIP_VIT_HUGE = CLIPVisionConfig(14, 16, 1280, 32, 16, 5120, 1024, F.gelu)
CLIP_VIT_GIANT = CLIPVisionConfig(14, 16, 1408, 40, 16, 6144, 1024, F.gelu)
CLIP_OPEN_TEXT = CLIPConfig(1024, 24, 16, 4096, F.gelu, projected=True, embedding=1024)
VISION_NAMES = ("vision_model.", "visual_projection.", "visual.")
TEXT_NAMES = ("text_model.", "text_proj", "transformer.", "token_embedding.", "ln_final.")
TEXT_NAMES += ("positional_embedding",)
CLIP_OTHERS = ("logit_scale", "text_model.embeddings.position_ids")
CLIP_OTHERS += ("vision_model.embeddings.position_ids",)


class CLIPVisionEmbeddings(nn.Module):
    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(cfg.width))
        self.patch_embedding = nn.Conv2d(3, cfg.width, cfg.patch, stride=cfg.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + cfg.grid**2, cfg.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, 1 + grid^2, D)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPVision(nn.Module):
    """CLIP's image encoder; `pre_layrnorm` is how the files spell it."""

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.cfg = cfg
        block = (cfg.width, cfg.heads, cfg.hidden, cfg.activation)
        layers = nn.ModuleList(CLIPBlock(*block, causal=False) for _ in range(cfg.depth))
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": CLIPVisionEmbeddings(cfg),
                "pre_layrnorm": nn.LayerNorm(cfg.width),
                "encoder": nn.ModuleDict({"layers": layers}),
                "post_layernorm": nn.LayerNorm(cfg.width),
            }
        )
        self.visual_projection = nn.Linear(cfg.width, cfg.embedding, bias=False)

    def states(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, side, side) in [0, 1] -> the embeddings, then what each block makes of them.

        (B, 1 + grid^2, D) each; the last has no final norm.
        """
        side = self.cfg.patch * self.cfg.grid
        assert image.shape[2:] == (side, side), f"CLIP reads {side} x {side}, got {image.shape[2:]}"
        embeddings = self.vision_model.embeddings
        # Pixels in the dtype of the weights, which may be bf16.
        pixels = standardise(image, CLIP_MEAN, CLIP_STD).to(embeddings.class_embedding.dtype)
        states = [self.vision_model.pre_layrnorm(embeddings(pixels))]
        for block in self.vision_model.encoder.layers:
            states.append(block(states[-1]))
        return states

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, side, side) in [0, 1] -> L2-normalised (B, embedding), in fp32."""
        pooled = self.vision_model.post_layernorm(self.states(image)[-1][:, 0])
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)


class CLIPText(nn.Module):
    """CLIP's text embedding of a caption, its end token's state projected."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer

    def encode(self, ids: Tensor) -> Tensor:
        """ids (B, 77) -> L2-normalised (B, embedding), in fp32."""
        return F.normalize(self.clip(ids)[2].float(), dim=-1)

    @torch.no_grad()  # never trained
    def embedding(self, captions: list[str], device: torch.device | str = "cpu") -> Tensor:
        return self.encode(send(token_ids(self.tokenizer, captions), device))


def load_tower(
    net: nn.Module,
    path: Path,
    tower: OpenClip,
    other: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    """One of the two towers in CLIP's file, frozen; under Hugging Face's names or open_clip's.

    other: how the other tower's names begin.
    """
    names = places([path], "")
    ignore = (*(name for name in names if name.startswith(other)), *CLIP_OTHERS)
    if tower.projection[0] in names:
        load_open_clip(net, path, dtype, device, ignore=ignore, tower=tower)
    else:
        load_weights(net, path, dtype, device, ignore=ignore)
    return net.requires_grad_(False).eval()


def load_clip_vision(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cfg: CLIPVisionConfig = CLIP_VIT_LARGE,
) -> CLIPVision:
    with torch.device("meta"):
        net = CLIPVision(cfg)
    return load_tower(net, path, VISION_TOWER, TEXT_NAMES, dtype, device)


def load_clip_text(
    path: Path,
    vocab: Path,
    merges: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cfg: CLIPConfig = CLIP_VIT_LARGE_TEXT,
) -> CLIPText:
    """In the order in which find_files gives them."""
    tokenizer = clip_tokenizer(vocab, merges)
    with torch.device("meta"):
        clip = CLIP(cfg)
    text = load_tower(clip, path, TEXT_TOWER, VISION_NAMES, dtype, device)
    return CLIPText(text, tokenizer)
