"""The Qwen3 language model as a text encoder, with the official tensor names.

    qwen3_tokenizer  from the official tokenizer.json
    chat             a prompt as the language model's user would say it
    Qwen3            token ids to the states after the layers asked for; later layers are not built
    check_release    a later release with the same names and other positions, refused
    KleinText        FLUX.2 [klein]: three states of every token, padding included

B batch, T tokens, D width, N heads, G heads of keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from config import Refusal
from nets.layers import attention, per_head, send
from nets.text import fixed_length, read_json

# --- tokenizer -----------------------------------------------------------------------------------

START, END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
NO_THINKING = "<think>\n\n</think>\n\n"  # what klein has the assistant begin with


def chat(prompt: str, tail: str = "") -> str:
    """One turn of the user's, and the beginning of the assistant's. The prompt goes in as it is.

    tail: what follows; klein NO_THINKING, Z-Image nothing.
    """
    return f"{START}user\n{prompt}{END}\n{START}assistant\n{tail}"


def qwen3_tokenizer(path: Path, length: int, pad: bool) -> Tokenizer:
    """From tokenizer.json; the first `length` ids of a text, its end is cut off like the rest.

    pad: filled up to `length` on the right; not: as long as the text is. It wants the whole text
    of `chat` at once: a line's end and the blanks after it are one token.
    """
    model = read_json(path).get("model")
    tokenizer = Tokenizer.from_file(str(path)) if isinstance(model, dict) else None
    words = (START, END, PADDING, "<think>")
    if tokenizer is None or None in map(tokenizer.token_to_id, words):
        raise Refusal(f"{path} is no tokenizer of Qwen3: it lacks {' or '.join(words)}")
    if pad:
        return fixed_length(tokenizer, length, tokenizer.token_to_id(PADDING))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


# --- the network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Qwen3Config:
    width: int
    depth: int  # of the official file
    heads: int
    groups: int  # heads of keys and values, each for heads / groups neighbouring heads of queries
    head: int  # width of a head; all heads together need not be as wide as the network
    hidden: int  # of the MLP
    taps: tuple[int, ...]  # after how many layers the states are read
    vocabulary: int = 151936
    theta: float = 1e6


QWEN3_4B = Qwen3Config(2560, 36, heads=32, groups=8, head=128, hidden=9728, taps=(35,))
QWEN3_8B = Qwen3Config(4096, 36, heads=32, groups=8, head=128, hidden=12288, taps=(35,))


@lru_cache(maxsize=8)
def kept_turns(length: int, head: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head / 2) of token times rate, in fp32; made for each length once."""
    with torch.inference_mode(False):
        rates = theta ** (-torch.arange(0, head, 2, dtype=torch.float64, device=device) / head)
        angles = torch.arange(length, device=device)[:, None] * rates
        return angles.cos().float(), angles.sin().float()


def turn(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i of a head together with channel i + head / 2. x (B, N, T, head)."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)  # bf16 times fp32 was fp32


class Qwen3Attention(nn.Module):
    def __init__(self, cfg: Qwen3Config):
        super().__init__()
        self.heads, self.groups = cfg.heads, cfg.groups
        queries, keys = cfg.heads * cfg.head, cfg.groups * cfg.head
        self.q_proj = nn.Linear(cfg.width, queries, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(cfg.width, keys, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(queries, cfg.width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(cfg.head, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], real: Tensor | None) -> Tensor:
        q = turn(self.q_norm(per_head(self.q_proj(x), self.heads)), turns)
        k = turn(self.k_norm(per_head(self.k_proj(x), self.groups)), turns)
        v = per_head(self.v_proj(x), self.groups)
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=1) for y in (k, v))
        seen = attention(q, k, v, causal=True)
        if real is not None:
            # A padding token sees all real tokens, which are before it, and not itself.
            # Two attentions in place of one whose mask has a place for each pair of tokens.
            padding = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
            seen = torch.where(real[..., None], seen, padding.transpose(1, 2).flatten(2))
        return self.o_proj(seen)


class Qwen3MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen3Block(nn.Module):
    def __init__(self, cfg: Qwen3Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.width, eps=1e-6)
        self.self_attn = Qwen3Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, eps=1e-6)
        self.mlp = Qwen3MLP(cfg.width, cfg.hidden)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], real: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turns, real)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The language model as far as its states are read: neither later layers nor a final norm."""

    def __init__(self, cfg: Qwen3Config):
        super().__init__()
        assert min(cfg.taps) >= 1 and max(cfg.taps) <= cfg.depth, (
            f"states are read after 1 .. {cfg.depth} layers, got {cfg.taps}"
        )
        self.cfg = cfg
        embedding = nn.Embedding(cfg.vocabulary, cfg.width)
        layers = nn.ModuleList(Qwen3Block(cfg) for _ in range(max(cfg.taps)))
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers})

    @property
    def duplicates(self) -> tuple[str, ...]:
        """What of the official file is not read: later layers, the final norm, and the output,
        which is the embedding again (in Qwen3-8B a tensor of its own)."""
        layer = self.model.layers[0].state_dict()
        later = range(len(self.model.layers), self.cfg.depth)
        names = (f"model.layers.{i}.{name}" for i in later for name in layer)
        return ("model.norm.weight", "lm_head.weight", *names)

    def forward(self, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, ...]:
        """ids (B, T) -> the states (B, T, D) after each of cfg.taps.

        real: (B, T) bool, false for padding, which is on the right; None: no padding, or nobody
        reads its states (those of real tokens are the same).
        """
        x, states = self.model.embed_tokens(ids), {}
        turns = kept_turns(ids.shape[1], self.cfg.head, self.cfg.theta, ids.device)
        for i, layer in enumerate(self.model.layers):
            states[i + 1] = x = layer(x, turns, real)
        return tuple(states[tap] for tap in self.cfg.taps)


def check_release(cfg: Qwen3Config, weights: Sequence[Path]) -> None:
    """Refuses, by the config.json beside the weights if there is one, what names cannot tell.

    Qwen3-4B-Instruct-2507 and -Thinking-2507 have the same tensors and turn by other rates.
    """
    path = weights[0].parent / "config.json"
    if not path.is_file():
        return
    about = read_json(path)
    # Where a file's config.json puts it depends on the version of what wrote it.
    theta = about.get("rope_theta") or (about.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and theta != cfg.theta:
        raise Refusal(
            f"{path}: rope_theta is {theta:g}, not {cfg.theta:g}: another release of Qwen3 "
            "(2507?); give the text_encoder of the teacher's own repository"
        )


# --- FLUX.2 [klein] ------------------------------------------------------------------------------


class KleinText(nn.Module):
    """Prompts as FLUX.2 [klein] reads them.

    context (B, T, 3 D): of each of T tokens (512) the states at three depths one after another;
    those of padding too, since the transformer attends to it. In the dtype of the weights.
    """

    def __init__(self, qwen3: Qwen3, tokenizer: Tokenizer):
        """tokenizer: one that fills up."""
        super().__init__()
        self.qwen3, self.tokenizer = qwen3, tokenizer
        empty = tokenizer.encode(chat("", NO_THINKING)) if tokenizer else None
        self.around = sum(empty.attention_mask) if empty else 0  # tokens around a caption

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T), and which of them are no padding (B, T)."""
        read = self.tokenizer.encode_batch([chat(caption, NO_THINKING) for caption in captions])
        ids = torch.tensor([encoding.ids for encoding in read])
        return ids, torch.tensor([encoding.attention_mask for encoding in read]).bool()

    def encode(self, ids: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Token ids -> cond."""
        return {"context": torch.cat(self.qwen3(ids, real), dim=-1)}

    @torch.no_grad()  # the encoder is never trained
    def forward(
        self, captions: list[str], device: torch.device | str = "cpu", sizes=None
    ) -> dict[str, Tensor]:
        return self.encode(*(send(x, device) for x in self.tokens(captions)))
