"""ImageReward: how well people would like an image as one of its caption.

    bert_tokenizer     WordPiece, from BERT's vocab.txt
    BLIPText           BERT whose layers look at an image too: caption and image -> states
    ImageReward        BLIP's two encoders and five linear maps: caption and image -> the score
    load_image_reward  from its authors' file, ImageReward.pt as safetensors (nets/pickles.py)

arXiv:2304.05977 and its official code; BLIP is arXiv:2201.12086. Tensors have the names of that
file. B batch, L tokens of the image, T of the caption, D width, N heads.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from config import Refusal
from nets.layers import per_head, send
from nets.text import fixed_length, read_text
from nets.vision import CLIP_MEAN, CLIP_STD, ViT, ViTConfig
from nets.weights import load_weights

LENGTH = 35  # tokens of a caption, with the two around it; what follows is not read
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, over the authors' data
NOT_READ = tuple(f"blip.{x}_proj.{part}" for x in ("vision", "text") for part in ("weight", "bias"))

# --- the caption's tokens ------------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the vocabulary
ADDED = ("[DEC]", "[ENC]")  # BLIP's own, after its last word


def bert_tokenizer(path: Path) -> Tokenizer:
    """From vocab.txt, a word a line; 35 ids a caption, lower case, without accents. Refusal."""
    words = read_text(path).removesuffix("\n").split("\n")
    ids = {word: i for i, word in enumerate(words)}
    if lacking := [word for word in SPECIAL if word not in ids]:
        raise Refusal(f"{path} is no vocabulary of BERT: {lacking[0]} is not in it")
    model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([*SPECIAL, *ADDED])
    ends = [(word, ids[word]) for word in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return fixed_length(tokenizer, LENGTH, ids["[PAD]"])


# --- BERT that looks at an image -----------------------------------------------------------------


@dataclass(frozen=True)
class BLIPConfig:
    vision: ViTConfig
    width: int  # of the text encoder, as all that follows
    depth: int
    heads: int
    hidden: int  # of the MLP
    vocabulary: int
    positions: int
    head: tuple[int, ...]  # widths after the first state


BLIP_VIT = ViTConfig(
    patch=16,
    width=1024,
    depth=24,
    heads=16,
    grid=14,
    hooks=(),
    scaled=False,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
IMAGE_REWARD = BLIPConfig(BLIP_VIT, 768, 12, 12, 3072, 30524, 512, head=(1024, 128, 64, 16, 1))


def added_and_normed(inner: int, width: int) -> nn.ModuleDict:
    """What closes each part of a layer: LayerNorm(x + dense(inner))."""
    norm = nn.LayerNorm(width, eps=1e-12)
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": norm})


class BLIPAttention(nn.Module):
    """Of a caption's tokens (width) to what they see (seen_width): themselves, or the image's."""

    def __init__(self, width: int, seen_width: int, heads: int):
        super().__init__()
        self.heads = heads
        widths = {"query": width, "key": seen_width, "value": seen_width}
        self.self = nn.ModuleDict({name: nn.Linear(D, width) for name, D in widths.items()})
        self.output = added_and_normed(width, width)

    def forward(self, x: Tensor, seen: Tensor, real: Tensor | None = None) -> Tensor:
        """x (B, T, D), seen (B, L, seen_width); real (B, L): which of these are no padding."""
        maps = ((self.self.query, x), (self.self.key, seen), (self.self.value, seen))
        q, k, v = (per_head(linear(y), self.heads) for linear, y in maps)  # (B, N, ..., D / N)
        mask = None if real is None else real[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.output.LayerNorm(x + self.output.dense(read))


class BLIPLayer(nn.Module):
    def __init__(self, cfg: BLIPConfig):
        super().__init__()
        self.attention = BLIPAttention(cfg.width, cfg.width, cfg.heads)
        self.crossattention = BLIPAttention(cfg.width, cfg.vision.width, cfg.heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(cfg.width, cfg.hidden)})
        self.output = added_and_normed(cfg.hidden, cfg.width)

    def forward(self, x: Tensor, real: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, real)
        x = self.crossattention(x, image)
        inner = F.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(x + self.output.dense(inner))


class BLIPText(nn.Module):
    """Sees both ways, and no padding."""

    def __init__(self, cfg: BLIPConfig):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(cfg.vocabulary, cfg.width),
                "position_embeddings": nn.Embedding(cfg.positions, cfg.width),
                "LayerNorm": nn.LayerNorm(cfg.width, eps=1e-12),
            }
        )
        layers = nn.ModuleList(BLIPLayer(cfg) for _ in range(cfg.depth))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, real: Tensor, image: Tensor) -> Tensor:
        """ids and real (B, T), image (B, L, width of the image's) -> states (B, T, D)."""
        places = self.embeddings.position_embeddings.weight[: ids.shape[1]]
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(ids) + places)
        for layer in self.encoder.layer:
            x = layer(x, real, image)
        return x


# --- the score -----------------------------------------------------------------------------------


class ImageReward(nn.Module):
    """Higher is liked better; mean 0 and deviation 1 over what its authors asked people about."""

    def __init__(self, cfg: BLIPConfig, tokenizer: Tokenizer):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        encoders = {"visual_encoder": ViT(cfg.vision), "text_encoder": BLIPText(cfg)}
        self.blip = nn.ModuleDict(encoders)
        widths = (cfg.width, *cfg.head)
        maps = [nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
        # Nothing bends between them; after the first three is dropout while it is trained.
        spaced = [part for one in maps[:3] for part in (one, nn.Identity())]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*spaced, *maps[3:])})

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return self.cfg.vision.patch * self.cfg.vision.grid

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T), and which of them are no padding (B, T)."""
        read = self.tokenizer.encode_batch(captions)
        ids = torch.tensor([encoding.ids for encoding in read])
        return ids, torch.tensor([encoding.attention_mask for encoding in read]).bool()

    def forward(self, image: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """image (B, 3, side, side) in [0, 1], ids and real (B, T) -> (B,), in fp32."""
        side = self.side
        assert image.shape[2:] == (side, side), f"it reads {side} x {side}, got {image.shape[2:]}"
        states = self.blip.text_encoder(ids, real, self.blip.visual_encoder(image))
        return (self.mlp.layers(states[:, 0])[:, 0].float() - MEAN) / STD

    @torch.no_grad()  # never trained
    def score(self, image: Tensor, captions: list[str]) -> Tensor:
        """image (B, 3, side, side) in [0, 1], each with its caption -> (B,)."""
        return self(image, *(send(x, image.device) for x in self.tokens(captions)))


def load_image_reward(
    path: Path,
    vocab: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cfg: BLIPConfig = IMAGE_REWARD,
) -> ImageReward:
    """Frozen. vocab: BERT's vocab.txt. Refusal or FileNotFoundError."""
    tokenizer = bert_tokenizer(vocab)
    if tokenizer.get_vocab_size() != cfg.vocabulary:
        count, wanted = tokenizer.get_vocab_size() - len(ADDED), cfg.vocabulary - len(ADDED)
        raise Refusal(f"{vocab} has {count} words, ImageReward reads {wanted}; fetch the right one")
    with torch.device("meta"):
        net = ImageReward(cfg, tokenizer)
    return load_weights(net, path, dtype, device, ignore=NOT_READ).requires_grad_(False).eval()
