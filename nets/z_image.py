"""The transformer of Z-Image, with the official tensor names, and its text.

    ZImage      image and caption refined apart, then together, as one sequence
    ZImageText  captions to the states of a language model, each as long as it is
    token_places, kept_positions, attend   captions of several lengths in one batch

Called as `net(x_t, t, cond)`: latents in, prediction out, both (B, C, H, W). The network itself
counts time from noise to image and predicts x0 - eps; both are turned in here, so that outside
t = 1 is noise and the prediction is v = eps - x0. `net.blocks()` lists what to shard or recompute.

A sequence is filled up to a multiple of 32 with a learned token of its own, which attends and is
attended to. What a batch adds beyond that, so that its captions are equally long, is seen by
nobody, and a sample's result does not depend on what else is in its batch.

B batch, C H W latent, P patch, L image tokens, T caption tokens (both filled up), S = L + T,
D width, N heads, M width of the modulation's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from config import Refusal
from nets.layers import (
    attention,
    count_patches,
    norm,
    per_head,
    rms_norm,
    rotate,
    rotations,
    send,
    time_embedding,
)
from nets.qwen3 import Qwen3, chat

FILLED = 32  # image and caption are each filled up to a multiple of it
Rope = tuple[Tensor, Tensor]  # cosines and sines, (S, D / N / 2) or (B, 1, S, D / N / 2), in fp32


@dataclass(frozen=True)
class ZImageConfig:
    patch: int = 2
    channels: int = 16
    width: int = 3840
    heads: int = 30
    depth: int = 30  # blocks on image and caption
    refiners: int = 2  # blocks on each alone
    context_width: int = 2560  # of the caption's tokens (Qwen3-4B)
    time_hidden: int = 1024
    time_width: int = 256  # of what modulates
    axes: tuple[int, ...] = (32, 48, 48)  # a head's channels turned by order, row and column
    theta: float = 256.0
    longest: int = 512  # patches a side; as far as the official positions go

    @property
    def hidden(self) -> int:
        """Of the MLP: eight thirds of the width."""
        return int(self.width / 3 * 8)


# --- captions of several lengths -----------------------------------------------------------------


def filled(count: int) -> int:
    """The next multiple of 32."""
    return -(-count // FILLED) * FILLED


def caption_lengths(cond: dict[str, Tensor]) -> list[int]:
    """How many tokens each caption has; see ZImage. Does not wait if they are on the host."""
    context = cond["context"]
    lengths = cond["length"].tolist() if "length" in cond else [context.shape[1]] * len(context)
    assert all(1 <= n <= context.shape[1] for n in lengths), (
        f"captions of 1 to {context.shape[1]} tokens, got {lengths}"
    )
    return lengths


def token_places(rows: int, columns: int, caption: int, device: torch.device) -> Tensor:
    """(L, 3) where the image's tokens are: behind the caption, of so many tokens when filled up.

    A patch is at (caption + 1, row, column), what fills up at 0.
    """
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    row, column = torch.meshgrid(row, column, indexing="ij")
    order = torch.full_like(row, caption + 1)
    patches = torch.stack([order, row, column], dim=-1).flatten(0, 1)
    return F.pad(patches, (0, 0, 0, filled(len(patches)) - len(patches)))


def caption_places(tokens: int, device: torch.device) -> Tensor:
    """(T, 3): (1, 0, 0), (2, 0, 0) ..., what fills up too."""
    return F.pad(torch.arange(1, tokens + 1, device=device)[:, None], (0, 2))


@lru_cache(maxsize=32)  # an image's size, captions of 32, 64 ... 512 tokens
def kept_positions(
    rows: int, columns: int, caption: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Rope, Rope]:
    """The rotations of image and caption, (L, D / N / 2) and (T, D / N / 2), computed once for each
    length of caption; see model.py."""
    with torch.inference_mode(False):
        places = (
            token_places(rows, columns, caption, device),
            caption_places(caption, device),
        )
        return tuple(rotations(where, axes, theta) for where in places)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """q, k, v (B, N, S, D / N) -> (B, S, D): sample b attends within its first lengths[b] tokens.

    Neighbours of one length attend together, without a mask, so that each kernel fits. What is
    beyond a sample's length gets zeros. lengths: None where there is nothing beyond, so that a
    compiled block depends on no numbers.
    """
    if lengths is None:
        return attention(q, k, v)
    tokens, parts, first = q.shape[2], [], 0
    for length, same in groupby(lengths):
        rows = slice(first, first := first + len(list(same)))
        part = attention(*(x[rows, :, :length] for x in (q, k, v)))
        parts.append(part if length == tokens else F.pad(part, (0, 0, 0, tokens - length)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --- parts ---------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int):
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width, bias=False))
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor, rope: Rope, lengths: Sequence[int] | None) -> Tensor:
        q = rotate(self.norm_q(per_head(self.to_q(x), self.heads)), rope)
        k = rotate(self.norm_k(per_head(self.to_k(x), self.heads)), rope)
        return self.to_out(attend(q, k, per_head(self.to_v(x), self.heads), lengths))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and MLP, each between two RMS norms.

    Where time modulates, it scales what each of the two reads and gates what it adds, the gates
    through tanh; nothing is shifted.
    """

    def __init__(self, cfg: ZImageConfig, modulated: bool = True):
        super().__init__()
        self.attention = Attention(cfg.width, cfg.heads)
        self.feed_forward = FeedForward(cfg.width, cfg.hidden)
        self.attention_norm1, self.attention_norm2 = RMSNorm(cfg.width), RMSNorm(cfg.width)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(cfg.width), RMSNorm(cfg.width)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(cfg.time_width, 4 * cfg.width))

    def modulation(self, c: Tensor | None) -> tuple[Tensor | float, ...]:
        """Scale and gate of the attention, then of the MLP, (B, 1, D) each."""
        if c is None:
            return 1.0, 1.0, 1.0, 1.0
        scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
        return 1 + scale, gate.tanh(), 1 + scale_mlp, gate_mlp.tanh()

    def forward(
        self, x: Tensor, rope: Rope, lengths: Sequence[int] | None, c: Tensor | None = None
    ) -> Tensor:
        """x (B, S, D), c (B, M), None where time does not modulate -> x. lengths: see `attend`."""
        scale, gate, scale_mlp, gate_mlp = self.modulation(c)
        attended = self.attention(self.attention_norm1(x) * scale, rope, lengths)
        x = x + gate * self.attention_norm2(attended)
        return x + gate_mlp * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_mlp))


class TimeEmbedder(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, M)."""
        return self.mlp(time_embedding(1000 * t).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """A layer norm that time scales and does not shift, then from tokens to patches."""

    def __init__(self, cfg: ZImageConfig):
        super().__init__()
        self.linear = nn.Linear(cfg.width, cfg.channels * cfg.patch**2)
        modulation = nn.Linear(cfg.time_width, cfg.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(norm(x) * (1 + self.adaLN_modulation(c)[:, None]))


# --- the transformer -----------------------------------------------------------------------------


class ZImage(nn.Module):
    """cond: context (B, any, context_width), the captions' tokens, and length (B,), how many of
    them each caption has, whole numbers that are best left on the host; without it all are its.

    The prediction has the dtype of x_t. Raises Refusal in fp16.
    """

    def __init__(self, cfg: ZImageConfig, schedule):
        super().__init__()
        assert sum(cfg.axes) * cfg.heads == cfg.width, (
            f"positions turn every channel of a head: {cfg.axes} for {cfg.width} / {cfg.heads}"
        )
        self.cfg, self.schedule = cfg, schedule
        # A network has such layers for each size of patch; there is one, of 2 x 2 in 1 picture.
        self.all_x_embedder = nn.ModuleDict(
            {"2-1": nn.Linear(cfg.channels * cfg.patch**2, cfg.width)}
        )
        self.all_final_layer = nn.ModuleDict({"2-1": FinalLayer(cfg)})
        self.t_embedder = TimeEmbedder(cfg.time_hidden, cfg.time_width)
        self.cap_embedder = nn.Sequential(
            RMSNorm(cfg.context_width), nn.Linear(cfg.context_width, cfg.width)
        )
        self.x_pad_token, self.cap_pad_token = (
            nn.Parameter(torch.zeros(1, cfg.width)) for _ in range(2)
        )
        self.noise_refiner = nn.ModuleList(Block(cfg) for _ in range(cfg.refiners))
        self.context_refiner = nn.ModuleList(
            Block(cfg, modulated=False) for _ in range(cfg.refiners)
        )
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))

    def blocks(self) -> list[nn.Module]:
        return [*self.noise_refiner, *self.context_refiner, *self.layers]

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        rows, columns = count_patches(x_t, self.cfg.patch)
        assert max(rows, columns) <= self.cfg.longest, (
            f"at most {self.cfg.longest} patches a side, got {rows} x {columns}"
        )
        lengths = caption_lengths(cond)
        captions = [filled(n) for n in lengths]
        image, text = self.positions(rows, columns, captions, x_t.device)
        x, context = self.embed_image(x_t, rows, columns), self.embed_caption(cond, max(captions))
        c = self.t_embedder(1 - t)  # (B, M)
        uneven = len(set(captions)) > 1
        for block in self.noise_refiner:
            x = block(x, image, None, c)  # (B, L, D)
        for block in self.context_refiner:
            context = block(context, text, captions if uneven else None)  # (B, T, D)
        joined = torch.cat([x, context], dim=1)  # (B, S, D)
        joint = [x.shape[1] + n for n in captions] if uneven else None
        rope = tuple(joined_table(*pair) for pair in zip(image, text, strict=True))
        for block in self.layers:
            joined = block(joined, rope, joint, c)
        out = self.all_final_layer["2-1"](joined[:, : rows * columns], c)
        return -self.unpack(out, rows, columns).to(x_t.dtype)

    def positions(
        self, rows: int, columns: int, captions: Sequence[int], device: torch.device
    ) -> tuple[Rope, Rope]:
        """Of the image, for each sample unless their captions are equally long; and of the longest
        caption, which begins like every other."""
        how = (self.cfg.axes, self.cfg.theta, device)
        image, text = kept_positions(rows, columns, max(captions), *how)
        if len(set(captions)) > 1:
            tables = [kept_positions(rows, columns, n, *how)[0] for n in captions]
            image = tuple(torch.stack(table)[:, None] for table in zip(*tables, strict=True))
        return image, text

    def embed_image(self, x_t: Tensor, rows: int, columns: int) -> Tensor:
        """(B, C, H, W) -> (B, L, D)."""
        embed = self.all_x_embedder["2-1"]
        dtype = embed.weight.dtype
        if dtype == torch.float16:
            raise Refusal("Z-Image overflows in fp16 (inside, values reach 9e5); bf16 or fp32")
        x = embed(self.pack(x_t, rows, columns).to(dtype))
        # Even where nothing is to be filled up: else ranks would differ in what has a gradient.
        filling = self.x_pad_token.to(x.dtype).expand(len(x), filled(x.shape[1]) - x.shape[1], -1)
        return torch.cat([x, filling], dim=1)

    def embed_caption(self, cond: dict[str, Tensor], tokens: int) -> Tensor:
        """The first `tokens` of each, or so many: (B, T, D)."""
        context = cond["context"][:, :tokens].to(self.cap_embedder[0].weight.dtype)
        context = F.pad(context, (0, 0, 0, tokens - context.shape[1]))
        context = self.cap_embedder(context)
        own = torch.arange(tokens, device=context.device)
        length = cond.get("length", torch.full((len(context),), cond["context"].shape[1]))
        own = own < send(length, context.device)[:, None]  # (B, T)
        return torch.where(own[..., None], context, self.cap_pad_token.to(context.dtype))

    def pack(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.cfg.patch
        x = x.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (B, C, rows, P, cols, P)
        return x.movedim((2, 4, 1), (1, 2, 5)).flatten(3).flatten(1, 2)  # -> (B, L, P P C)

    def unpack(self, x: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.cfg.patch
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        x = x.movedim((1, 2, 5), (2, 4, 1))  # (B, rows, cols, P, P, C) -> (B, C, rows, P, cols, P)
        return x.flatten(4).flatten(2, 3)  # -> (B, C, rows P, columns P)


def joined_table(image: Tensor, text: Tensor) -> Tensor:
    """Cosines or sines of the image, then of the caption; for each sample if the image's are."""
    return torch.cat([image, text.expand(*image.shape[:-2], -1, -1)], dim=-2)


# --- text ----------------------------------------------------------------------------------------

TOKENS = 512  # of a caption at most


class ZImageText(nn.Module):
    """Captions as Z-Image reads them.

    context (B, 512, D): the states of each caption's own tokens, then zeros, in the dtype of the
    weights; length (B,) on the host, how many they are. One form whatever the captions, so that
    rows of several batches fit together; the network reads no more than it needs.
    """

    def __init__(self, qwen3: Qwen3, tokenizer: Tokenizer):
        """tokenizer: one that does not fill up."""
        super().__init__()
        self.qwen3, self.tokenizer = qwen3, tokenizer
        empty = tokenizer.encode(chat("")) if tokenizer else None
        self.around = sum(empty.attention_mask) if empty else 0  # tokens around a caption

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T), zeros behind those of the shorter captions, and lengths (B,)."""
        read = self.tokenizer.encode_batch([chat(caption) for caption in captions])
        ids = [torch.tensor(encoding.ids) for encoding in read]
        return pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids])

    def encode(self, ids: Tensor, length: Tensor) -> dict[str, Tensor]:
        """Token ids on the device, lengths on the host -> cond. No token sees what is behind it, so
        the language model needs no mask."""
        (states,) = self.qwen3(ids)  # (B, T, D)
        own = torch.arange(ids.shape[1], device=ids.device) < send(length, ids.device)[:, None]
        context = states.masked_fill(~own[..., None], 0)
        return {"context": F.pad(context, (0, 0, 0, TOKENS - ids.shape[1])), "length": length}

    @torch.no_grad()  # the encoder is never trained
    def forward(
        self, captions: list[str], device: torch.device | str = "cpu", sizes=None
    ) -> dict[str, Tensor]:
        ids, length = self.tokens(captions)
        return self.encode(send(ids, device), length)
