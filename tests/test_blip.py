"""ImageReward against its equations, worked out another way: in fp64, patch by patch, head by head,
word by word, with padding cut away where the network hides it behind a mask.

Random weights under the names of the authors' file; that file itself has never been read.
"""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from config import Refusal
from nets.blip import (
    ADDED,
    BLIP_VIT,
    IMAGE_REWARD,
    LENGTH,
    NOT_READ,
    SPECIAL,
    ImageReward,
    bert_tokenizer,
    load_image_reward,
)

WORDS = [*SPECIAL, "a", "red", "fox", "##es", "##e", "##s", "f", "caf", "##x", ",", "'", "l", "漢"]
VIT = replace(BLIP_VIT, patch=4, grid=3, width=12, depth=2, heads=3)
SMALL = replace(
    IMAGE_REWARD,
    vision=VIT,
    width=8,
    depth=2,
    heads=2,
    hidden=20,
    positions=40,
    head=(9, 7, 6, 5, 1),
)
SMALL = replace(SMALL, vocabulary=len(WORDS) + len(ADDED))
CAPTIONS = ["a red fox", "foxes", "red fox, " * 30]


def write_vocabulary(path, words=WORDS):
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("words") / "vocab.txt")


@pytest.fixture(scope="module")
def weights(vocabulary):
    """By name, so large that every part tells."""
    draw = torch.Generator().manual_seed(0)
    state = ImageReward(SMALL, bert_tokenizer(vocabulary)).state_dict()
    return {name: 0.6 * torch.randn(x.shape, generator=draw) for name, x in state.items()}


@pytest.fixture(scope="module")
def official(weights, tmp_path_factory):
    """As the authors' file is, with what the score does not read."""
    more = {name: torch.ones(2, 2) for name in NOT_READ}
    more["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    path = tmp_path_factory.mktemp("weights") / "ImageReward.safetensors"
    save_file(weights | more, path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


# --- the equations -------------------------------------------------------------------------------


class Written:
    """One image and one caption at a time. Numbers of a network by name, in fp64."""

    def __init__(self, weights):
        self.of = {name: x.double() for name, x in weights.items()}

    def linear(self, x, name):
        return x @ self.of[name + ".weight"].T + self.of[name + ".bias"]

    def norm(self, x, name, eps):
        centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
        spread = ((centred**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
        return self.of[name + ".weight"] * centred / spread + self.of[name + ".bias"]

    def attend(self, q, k, v, heads):
        """Each token's mean of the values, by softmax of q k / sqrt of a head's channels."""
        size, rows = q.shape[1] // heads, []
        for one in q:
            parts = []
            for head in range(heads):
                its = slice(head * size, (head + 1) * size)
                shares = torch.exp(k[:, its] @ one[its] / math.sqrt(size))
                parts.append((shares[:, None] * v[:, its]).sum(0) / shares.sum())
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def gelu(self, x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def image(self, picture):
        """Pre-norm, the position table as it is, no scale of the layers."""
        name, patch = "blip.visual_encoder.", VIT.patch
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        colours = zip(picture.double(), mean, std, strict=True)
        picture = torch.stack([(colour - m) / s for colour, m, s in colours])
        kernel, tokens = (
            self.of[name + "patch_embed.proj.weight"],
            [self.of[name + "cls_token"][0, 0]],
        )
        for top in range(0, picture.shape[1], patch):
            for left in range(0, picture.shape[2], patch):
                seen = picture[:, top : top + patch, left : left + patch]
                tokens.append(
                    (kernel * seen).sum((1, 2, 3)) + self.of[name + "patch_embed.proj.bias"]
                )
        x = torch.stack(tokens) + self.of[name + "pos_embed"][0]
        for i in range(VIT.depth):
            block = f"{name}blocks.{i}."
            inner = self.linear(self.norm(x, block + "norm1", 1e-6), block + "attn.qkv")
            q, k, v = (inner[:, j * VIT.width : (j + 1) * VIT.width] for j in range(3))
            x = x + self.linear(self.attend(q, k, v, VIT.heads), block + "attn.proj")
            inner = self.linear(self.norm(x, block + "norm2", 1e-6), block + "mlp.fc1")
            x = x + self.linear(self.gelu(inner), block + "mlp.fc2")
        return self.norm(x, name + "norm", 1e-6)

    def part(self, x, seen, name):
        """Attention and what closes it, post-norm."""
        q = self.linear(x, name + ".self.query")
        k, v = (self.linear(seen, f"{name}.self.{which}") for which in ("key", "value"))
        read = self.linear(self.attend(q, k, v, SMALL.heads), name + ".output.dense")
        return self.norm(x + read, name + ".output.LayerNorm", 1e-12)

    def text(self, ids, image):
        name = "blip.text_encoder."
        words, places = (
            self.of[f"{name}embeddings.{x}_embeddings.weight"] for x in ("word", "position")
        )
        x = torch.stack([words[k] + places[i] for i, k in enumerate(ids)])
        x = self.norm(x, name + "embeddings.LayerNorm", 1e-12)
        for i in range(SMALL.depth):
            layer = f"{name}encoder.layer.{i}."
            x = self.part(x, x, layer + "attention")
            x = self.part(x, image, layer + "crossattention")
            inner = self.gelu(self.linear(x, layer + "intermediate.dense"))
            x = self.norm(
                x + self.linear(inner, layer + "output.dense"), layer + "output.LayerNorm", 1e-12
            )
        return x

    def score(self, picture, ids):
        """ids: without padding. The mean and the deviation that the authors publish."""
        x = self.text(ids, self.image(picture))[:1]
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return (x.item() - 0.16717362830052426) / 1.0333394966054072


def test_image_rewards_score_equals_its_equations(official, vocabulary, weights, images):
    """Three pairs at once, two of them padded, one cut at 35 tokens: each as if it were alone and
    had no padding. It agrees to 2e-6; without the mask it is off by 7e-3, with the quick GELU by
    3e-2, with one head of two by 1."""
    net, written = load_image_reward(official, vocabulary, cfg=SMALL), Written(weights)
    ids, real = net.tokens(CAPTIONS)
    assert real.sum(1).tolist() == [5, 4, 35]
    wanted = [written.score(*pair) for pair in zip(images, map(list_of, ids, real), strict=True)]
    got = net.score(images, CAPTIONS)
    assert got.dtype == torch.float32 and got.shape == (3,)
    torch.testing.assert_close(got.double(), torch.tensor(wanted).double(), atol=2e-5, rtol=1e-5)
    masked = net(images, ids, torch.ones_like(real))
    assert (masked - got)[:2].abs().min() > 5e-3 and torch.equal(masked[2], got[2])
    swapped = net.score(images.flip(0), CAPTIONS)
    assert (swapped - got)[[0, 2]].abs().min() > 1, "the image is looked at"


def list_of(ids, real):
    return ids[real].tolist()


# --- names ---------------------------------------------------------------------------------------


def names_of(layers, blocks):
    """Of the authors' modules, as their code spells them, and shapes at full size."""
    shapes = {"cls_token": [1, 1, 1024], "pos_embed": [1, 197, 1024]}
    pairs = {"patch_embed.proj": [1024, 3, 16, 16], "norm": [1024]}
    for i in range(blocks):
        inner = {
            "attn.qkv": [3072, 1024],
            "attn.proj": [1024, 1024],
            "norm1": [1024],
            "norm2": [1024],
        }
        inner |= {"mlp.fc1": [4096, 1024], "mlp.fc2": [1024, 4096]}
        pairs |= {f"blocks.{i}.{name}": shape for name, shape in inner.items()}
    named = {f"visual_encoder.{name}": shape for name, shape in pairs.items()}
    for i in range(layers):
        inner = {
            "intermediate.dense": [3072, 768],
            "output.dense": [768, 3072],
            "output.LayerNorm": [768],
        }
        for part, width in (("attention", 768), ("crossattention", 1024)):
            inner |= {f"{part}.self.{x}": [768, width] for x in ("key", "value")}
            inner |= {f"{part}.{x}": [768, 768] for x in ("self.query", "output.dense")}
            inner[f"{part}.output.LayerNorm"] = [768]
        named |= {f"text_encoder.encoder.layer.{i}.{name}": x for name, x in inner.items()}
    named["text_encoder.embeddings.LayerNorm"] = [768]
    named = {f"blip.{name}": shape for name, shape in named.items()}
    head = {0: [1024, 768], 2: [128, 1024], 4: [64, 128], 6: [16, 64], 7: [1, 16]}
    named |= {f"mlp.layers.{i}": shape for i, shape in head.items()}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    embeddings = "blip.text_encoder.embeddings."
    shapes[embeddings + "word_embeddings.weight"] = [30524, 768]
    shapes[embeddings + "position_embeddings.weight"] = [512, 768]
    shapes |= {f"{name}.weight": shape for name, shape in named.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in named.items()}


def test_image_rewards_names_and_shapes_are_those_of_its_authors_code(vocabulary):
    """At full size, without memory: 620 tensors, 446 million numbers, which in fp32 are the 1.79 GB
    of the published file."""
    with torch.device("meta"):
        state = ImageReward(IMAGE_REWARD, bert_tokenizer(vocabulary)).state_dict()
    assert {name: [*x.shape] for name, x in state.items()} == names_of(12, 24)
    assert len(state) == 620
    assert sum(4 * x.numel() for x in state.values()) == pytest.approx(1.785e9, rel=1e-3)


def test_image_rewards_file_is_loaded_strictly(official, weights, vocabulary, tmp_path):
    """What is left out is what the score does not read; what lacks is named."""
    net = load_image_reward(official, vocabulary, cfg=SMALL)
    assert all(torch.equal(x, weights[name]) for name, x in net.state_dict().items())
    assert not any(x.requires_grad for x in net.parameters()) and not net.training
    name = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    save_file({k: x for k, x in weights.items() if k != name}, tmp_path / "less.safetensors")
    with pytest.raises(Refusal, match=f"lacks one name: {name}"):
        load_image_reward(tmp_path / "less.safetensors", vocabulary, cfg=SMALL)
    with pytest.raises(Refusal, match="has 18 words, ImageReward reads 30522"):
        load_image_reward(official, vocabulary)


# --- words ---------------------------------------------------------------------------------------


def test_captions_become_berts_word_pieces(vocabulary):
    """The longest piece first, lower case, no accents; punctuation and Chinese characters are words
    of their own, a word that cannot be put together is unknown as a whole; BLIP's two tokens follow
    the last word."""
    tokenizer = bert_tokenizer(vocabulary)

    def pieces(caption):
        read = tokenizer.encode(caption)
        assert len(read.ids) == LENGTH == 35
        return [word for word, real in zip(read.tokens, read.attention_mask, strict=True) if real]

    for caption, words in (
        ("A red FOX", ["a", "red", "fox"]),
        ("foxes,l'café", ["fox", "##es", ",", "l", "'", "caf", "##e"]),
        ("red漢fox  \t\n a", ["red", "漢", "fox", "a"]),
        ("foxy fox", ["[UNK]", "fox"]),
        ("[ENC] a [DEC]", ["[ENC]", "a", "[DEC]"]),
        ("", []),
    ):
        assert pieces(caption) == ["[CLS]", *words, "[SEP]"], caption
    assert pieces("a " * 50) == ["[CLS]", *["a"] * 33, "[SEP]"]
    assert [tokenizer.token_to_id(word) for word in ADDED] == [len(WORDS), len(WORDS) + 1]
    assert tokenizer.encode("a").ids[3:] == [WORDS.index("[PAD]")] * 32


def test_what_is_no_vocabulary_of_bert_is_refused(tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt", WORDS[3:])
    with pytest.raises(Refusal, match=r"no vocabulary of BERT: \[PAD\] is not in it"):
        bert_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="none.txt is missing"):
        bert_tokenizer(tmp_path / "none.txt")
