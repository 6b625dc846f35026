"""Text: prompts to token ids to the `cond` dict a denoiser takes.

    clip_tokenizer  from the official vocab.json and merges.txt
    t5_tokenizer    from the official tokenizer.json
    count_cut       how many prompts are longer than what is read of them
    T5              the encoder of T5 v1.1, with the Hugging Face tensor names
    FluxText        FLUX.1: T5's state of every token, and CLIP-L's one vector
    SD35Text        SD 3.5: both CLIPs' states and T5's, and both CLIPs' one vector
    SDXLText        SDXL: both CLIPs' states of every token, CLIP-G's one vector, sizes
    SD15Text        SD 1.5: CLIP-L's state of every token

All are called as `text(captions, device, sizes)`; SDXL alone is told the images' sizes.

B batch, T tokens, D width, N heads. No encoder is told which tokens are padding: the denoisers were
trained on text that attends to it.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from config import Refusal
from nets.clip import CLIP, CLIP_LENGTH
from nets.layers import per_head, send, time_embedding

# --- tokenizers ----------------------------------------------------------------------------------

T5_END = 1  # the id of </s>
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def read_text(path: Path) -> str:
    """Raises FileNotFoundError or ValueError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refusal(f"{path} is damaged: it is no UTF-8 text; fetch it again") from None


def read_json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path} is damaged or no JSON; fetch it again ({error})") from None
    if not isinstance(content, dict):
        raise Refusal(f"{path} is no JSON object; fetch it again")
    return content


def clip_tokenizer(vocab: Path, merges: Path, pad: int | None = None) -> Tokenizer:
    """From vocab.json and merges.txt; 77 ids a prompt.

    pad: what fills up; None is the end token (CLIP-L), SDXL's second and SD 3.5's CLIP-G have 0.
    """
    ids, lines = read_json(vocab), read_text(merges).split("\n")
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    if not {START, END} <= ids.keys():
        raise Refusal(f"{vocab} is no vocabulary of CLIP: {START} or {END} is not in it")
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise Refusal(f'{merges} does not fit {vocab.name}: "{" ".join(pair)}"')
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([START, END])  # written in a prompt they are the tokens themselves
    tokenizer.post_processor = processors.RobertaProcessing((END, ids[END]), (START, ids[START]))
    return fixed_length(tokenizer, CLIP_LENGTH, ids[END] if pad is None else pad)


def t5_tokenizer(path: Path, length: int) -> Tokenizer:
    """From tokenizer.json; `length` ids a prompt, </s> the last before the padding."""
    model = read_json(path).get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        raise Refusal(f"{path} is no tokenizer of T5: its model is not Unigram")
    tokenizer = Tokenizer.from_file(str(path))
    ending = [("</s>", T5_END)]
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=ending)
    return fixed_length(tokenizer, length, pad=0)


def fixed_length(tokenizer: Tokenizer, length: int, pad: int) -> Tokenizer:
    """Cuts and fills up to `length` ids; the special tokens stay when text is cut."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad)
    return tokenizer


def token_ids(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """(B, T)."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(captions)])


def count_cut(text: nn.Module, captions: list[str]) -> dict[int, int]:
    """By the number of tokens that a tokenizer of this network reads: how many captions have more,
    whose end nobody reads. What has no tokenizer, or one without end, cuts none.

    text.around, if it has one: tokens that are put around a caption.
    """
    found: dict[int, int] = {}
    for part in vars(text).values():
        if isinstance(part, Tokenizer) and part.truncation:
            length = part.truncation["max_length"]
            room = length - vars(text).get("around", 0)
            read = part.encode_batch(captions)
            cut = sum(bool(one.overflowing) or sum(one.attention_mask) > room for one in read)
            found[length] = max(cut, found.get(length, 0))
    return {length: cut for length, cut in found.items() if cut}


# --- T5 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class T5Config:
    width: int
    depth: int
    heads: int
    head: int  # width of a head
    hidden: int  # of the MLP
    vocabulary: int = 32128
    buckets: int = 32  # of relative positions, half of them for keys after the query
    furthest: int = 128  # tokens; whatever is further away shares the last bucket


T5_XXL = T5Config(width=4096, depth=24, heads=64, head=64, hidden=10240)


def relative_buckets(length: int, buckets: int, furthest: int) -> Tensor:
    """(T, T) long: the bucket of key minus query.

    Of each half of the buckets, the first half is one per distance, the rest grows by a factor.
    """
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]  # (query, key)
    half, exact = buckets // 2, buckets // 4
    distance = offset.abs()
    octaves = torch.log(distance.clamp_min(1).double() / exact) / math.log(furthest / exact)
    # The edges 16, 32 and 64 are whole numbers: rounding must not decide which side they are on.
    far = exact + (octaves * (half - exact) + 1e-9).floor().long().clamp_max(half - exact - 1)
    return half * (offset > 0) + torch.where(distance < exact, distance, far)


@lru_cache(maxsize=8)
def kept_buckets(length: int, buckets: int, furthest: int, device: torch.device) -> Tensor:
    """`relative_buckets`, made for each length and device once."""
    return send(relative_buckets(length, buckets, furthest), device)


class T5Attention(nn.Module):
    def __init__(self, cfg: T5Config, first: bool):
        super().__init__()
        self.heads, inner = cfg.heads, cfg.heads * cfg.head
        self.q, self.k, self.v = (nn.Linear(cfg.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.width, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(cfg.buckets, cfg.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (per_head(p(x), self.heads) for p in (self.q, self.k, self.v))
        # T5 does not divide by sqrt(d): its initialisation has done so.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class T5MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(nn.Module):
    def __init__(self, cfg: T5Config, first: bool):
        super().__init__()
        attention, mlp = T5Attention(cfg, first), T5MLP(cfg.width, cfg.hidden)
        norm_1, norm_2 = nn.RMSNorm(cfg.width, eps=1e-6), nn.RMSNorm(cfg.width, eps=1e-6)
        self.layer = nn.ModuleList(
            [
                nn.ModuleDict({"SelfAttention": attention, "layer_norm": norm_1}),
                nn.ModuleDict({"DenseReluDense": mlp, "layer_norm": norm_2}),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, mix = self.layer
        x = x + attend.SelfAttention(attend.layer_norm(x), bias)
        return x + mix.DenseReluDense(mix.layer_norm(x))


class T5(nn.Module):
    """The encoder of T5 v1.1, bf16 or fp32: its residual stream overflows in fp16."""

    # SD 3.5's t5xxl_fp16 stores shared.weight a second time, under this name.
    duplicates = ("encoder.embed_tokens.weight",)

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.cfg = cfg
        self.shared = nn.Embedding(cfg.vocabulary, cfg.width)
        blocks = nn.ModuleList(T5Block(cfg, first=i == 0) for i in range(cfg.depth))
        final = nn.RMSNorm(cfg.width, eps=1e-6)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": final})

    def position_bias(self, length: int) -> Tensor:
        """(1, N, T, T), added to the attention scores of every block; the table is block 0's."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        where = (length, self.cfg.buckets, self.cfg.furthest, table.weight.device)
        return table(kept_buckets(*where)).movedim(-1, 0)[None].contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> the last block's output after the final norm (B, T, D)."""
        dtype = self.shared.weight.dtype
        assert dtype != torch.float16, "T5 overflows in fp16; load it in bfloat16 or float32"
        x, bias = self.shared(ids), self.position_bias(ids.shape[1])
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


# --- FLUX.1 --------------------------------------------------------------------------------------


class FluxText(nn.Module):
    """Prompts as FLUX.1 reads them.

    context (B, T, 4096): T5's last hidden state, 512 tokens (schnell 256); pooled (B, 768): CLIP-L
    at its end token. Both in the dtype of the encoders' weights.
    """

    def __init__(self, clip: CLIP, t5: T5, clip_tokenizer: Tokenizer, t5_tokenizer: Tokenizer):
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP's ids (B, 77) and T5's (B, T)."""
        return token_ids(self.clip_tokenizer, captions), token_ids(self.t5_tokenizer, captions)

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> dict[str, Tensor]:
        """Token ids -> cond."""
        return {"context": self.t5(t5_ids), "pooled": self.clip(clip_ids)[2]}

    @torch.no_grad()  # the encoders are never trained
    def forward(
        self, captions: list[str], device: torch.device | str = "cpu", sizes=None
    ) -> dict[str, Tensor]:
        return self.encode(*(send(ids, device) for ids in self.tokens(captions)))


# --- SD 3.5 --------------------------------------------------------------------------------------


class SD35Text(nn.Module):
    """Prompts as SD 3.5 reads them.

    context (B, 77 + 256, 4096): the penultimate states of CLIP-L (768) and CLIP-G (1280), filled up
    with zeros to T5's width, then T5's last hidden state; zeros in its place where there is no T5.
    pooled (B, 2048): CLIP-L's vector (768) and CLIP-G's projected one (1280), at their end tokens.
    Both in the dtype of the encoders' weights. The empty prompt is encoded like any other.
    """

    def __init__(
        self,
        clip_l: CLIP,
        clip_g: CLIP,
        tokenizer_l: Tokenizer,
        tokenizer_g: Tokenizer,
        t5: T5 | None = None,
        t5_tokenizer: Tokenizer | None = None,
        blank: tuple[int, int] = (256, T5_XXL.width),
    ):
        """tokenizer_g fills up with 0; blank: tokens and width of a T5 that is not there."""
        super().__init__()
        assert (t5 is None) == (t5_tokenizer is None), "T5 comes with its tokenizer, or neither"
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizer_l, self.tokenizer_g = tokenizer_l, tokenizer_g
        self.t5_tokenizer, self.blank = t5_tokenizer, blank

    def tokens(self, captions: list[str]) -> tuple[Tensor, ...]:
        """CLIP-L's ids and CLIP-G's, (B, 77) each; T5's (B, T) where there is one."""
        tokenizers = self.tokenizer_l, self.tokenizer_g, self.t5_tokenizer
        return tuple(token_ids(each, captions) for each in tokenizers if each is not None)

    def encode(
        self, ids_l: Tensor, ids_g: Tensor, t5_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Token ids -> cond."""
        _, states_l, pooled_l = self.clip_l(ids_l)
        _, states_g, pooled_g = self.clip_g(ids_g)
        words = torch.cat([states_l, states_g], dim=-1)
        pieces = words.new_zeros(len(words), *self.blank) if self.t5 is None else self.t5(t5_ids)
        room = pieces.shape[-1] - words.shape[-1]
        assert room >= 0, f"T5's states are the wider ones, got {pieces.shape} after {words.shape}"
        words = F.pad(words, (0, room))
        pooled = torch.cat([pooled_l, pooled_g], dim=-1)
        return {"context": torch.cat([words, pieces], dim=1), "pooled": pooled}

    @torch.no_grad()  # the encoders are never trained
    def forward(
        self, captions: list[str], device: torch.device | str = "cpu", sizes=None
    ) -> dict[str, Tensor]:
        return self.encode(*(send(ids, device) for ids in self.tokens(captions)))


# --- SDXL ----------------------------------------------------------------------------------------

SDXL_SIZES = (1024, 1024, 0, 0, 1024, 1024)  # an image of the trained size, whole
SIZE_WIDTH = 6 * 256  # of the embedded sizes, the last part of `pooled`


def size_embedding(sizes: Tensor, dim: int = 256) -> Tensor:
    """SDXL's micro-conditioning, sizes (B, 6) in pixels -> (B, 6 dim), in fp32.

    Of the image: original height and width, the crop's top and left; of what is drawn: height and
    width.
    """
    return time_embedding(sizes.flatten().float(), dim).unflatten(0, sizes.shape).flatten(1)


class SDXLText(nn.Module):
    """Prompts as SDXL reads them.

    context (B, 77, 2048): the penultimate states of CLIP-L (768) and CLIP-G (1280); pooled
    (B, 2816): CLIP-G's projected vector (1280), then the embedded sizes. The empty prompt is zeros,
    but for its sizes. Both in the dtype of the encoders' weights.
    """

    def __init__(self, clip_l: CLIP, clip_g: CLIP, tokenizer_l: Tokenizer, tokenizer_g: Tokenizer):
        """tokenizer_g fills up with 0."""
        super().__init__()
        self.clip_l, self.clip_g = clip_l, clip_g
        self.tokenizer_l, self.tokenizer_g = tokenizer_l, tokenizer_g

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP-L's ids and CLIP-G's, (B, 77) each."""
        return token_ids(self.tokenizer_l, captions), token_ids(self.tokenizer_g, captions)

    def encode(self, ids_l: Tensor, ids_g: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Token ids, and sizes (B, 6) as in `size_embedding` -> cond."""
        _, states_l, _ = self.clip_l(ids_l)
        _, states_g, pooled = self.clip_g(ids_g)
        context = torch.cat([states_l, states_g], dim=-1)
        empty = (ids_l.argmax(dim=1) == 1)[:, None]  # the end token follows the start
        context, pooled = context.masked_fill(empty[:, None], 0), pooled.masked_fill(empty, 0)
        embedded = size_embedding(sizes).to(pooled.dtype)
        return {"context": context, "pooled": torch.cat([pooled, embedded], dim=-1)}

    @torch.no_grad()  # the encoders are never trained
    def forward(
        self,
        captions: list[str],
        device: torch.device | str = "cpu",
        sizes: Tensor | tuple[int, ...] = SDXL_SIZES,
    ) -> dict[str, Tensor]:
        """sizes: (B, 6), or (6,) for all."""
        sizes = send(torch.as_tensor(sizes).expand(len(captions), 6), device)
        return self.encode(*(send(ids, device) for ids in self.tokens(captions)), sizes)


# --- SD 1.5 --------------------------------------------------------------------------------------


class SD15Text(nn.Module):
    """Prompts as SD 1.5 reads them.

    context (B, 77, 768): CLIP-L's last state, after the final norm, in the dtype of its weights.
    The empty prompt is encoded like any other.
    """

    def __init__(self, clip: CLIP, tokenizer: Tokenizer):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer

    def tokens(self, captions: list[str]) -> Tensor:
        """CLIP's ids (B, 77)."""
        return token_ids(self.tokenizer, captions)

    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids -> cond."""
        return {"context": self.clip(ids)[0]}

    @torch.no_grad()  # the encoder is never trained
    def forward(
        self, captions: list[str], device: torch.device | str = "cpu", sizes=None
    ) -> dict[str, Tensor]:
        return self.encode(send(self.tokens(captions), device))
