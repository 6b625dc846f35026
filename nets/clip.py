"""CLIP's text encoders, and the names of both towers.

    CLIP                     CLIP-L and CLIP-G, with the Hugging Face tensor names
    to_open_clip, and back   a tower's weights under open_clip's names, as SDXL's file has CLIP-G's
    load_open_clip           from a file with those names

B batch, T tokens, D width, N heads. No encoder is told which tokens are padding: the denoisers were
trained on text that attends to it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.layers import attention, per_head
from nets.names import Other
from nets.weights import assign, files_of, load_weights, places, read_weights

CLIP_LENGTH = 77  # tokens, with the two special ones

# --- the encoder ---------------------------------------------------------------------------------


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class CLIPConfig:
    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP
    activation: Callable[[Tensor], Tensor]
    projected: bool  # the pooled output goes through text_projection
    length: int = CLIP_LENGTH
    vocabulary: int = 49408
    embedding: int = 0  # width of the projected output; 0: the tower's


CLIP_L = CLIPConfig(768, 12, 12, 3072, quick_gelu, projected=False)
CLIP_G = CLIPConfig(1280, 32, 20, 5120, F.gelu, projected=True)


class CLIPAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (per_head(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, self.causal))


class CLIPMLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPBlock(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        causal: bool = True,  # for text; not for images
    ):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = CLIPAttention(width, heads, causal)
        self.mlp = CLIPMLP(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIP(nn.Module):
    """CLIP's text encoder: causal, so that the end token has read the whole prompt."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.cfg = cfg
        embeddings = {
            "token_embedding": nn.Embedding(cfg.vocabulary, cfg.width),
            "position_embedding": nn.Embedding(cfg.length, cfg.width),
        }
        block = (cfg.width, cfg.heads, cfg.hidden, cfg.activation)
        layers = nn.ModuleList(CLIPBlock(*block) for _ in range(cfg.depth))
        self.text_model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(embeddings),
                "encoder": nn.ModuleDict({"layers": layers}),
                "final_layer_norm": nn.LayerNorm(cfg.width),
            }
        )
        if cfg.projected:
            self.text_projection = nn.Linear(cfg.width, cfg.embedding or cfg.width, bias=False)

    def states(self, ids: Tensor) -> list[Tensor]:
        """ids (B, T) -> the embeddings, then what each block makes of them, (B, T, D) each."""
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[: ids.shape[1]]
        states = [x]
        for block in self.text_model.encoder.layers:
            states.append(block(states[-1]))
        return states

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, T) -> last (B, T, D), penultimate (B, T, D), pooled (B, D).

        last: the last block's output after the final norm; penultimate: the last block but one's,
        without it; pooled: `last` at the end token (the largest id, its first place), projected in
        CLIP-G.
        """
        *_, penultimate, x = self.states(ids)
        last = self.text_model.final_layer_norm(x)
        pooled = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return last, penultimate, self.text_projection(pooled) if self.cfg.projected else pooled


# --- open_clip's names ---------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenClip:
    """How one of the two towers is called by open_clip, and by Hugging Face."""

    blocks: tuple[str, str]  # what precedes a block's number
    projection: tuple[str, str]  # x @ W of open_clip's, a linear map's weight
    outer: dict[str, str]  # all else that is in no block


def norm(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


TEXT_TOWER = OpenClip(
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("text_projection", "text_projection.weight"),
    {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        **norm("ln_final", "text_model.final_layer_norm"),
    },
)
VISION_TOWER = OpenClip(
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.proj", "visual_projection.weight"),
    {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        **norm("visual.ln_pre", "vision_model.pre_layrnorm"),
        **norm("visual.ln_post", "vision_model.post_layernorm"),
    },
)
INNER = {  # the same within a block
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def blocks_of(depth: int, tower: OpenClip) -> list[tuple[str, str]]:
    """What precedes a block's names: open_clip's, Hugging Face's."""
    theirs, ours = tower.blocks
    return [(f"{theirs}{i}.", f"{ours}{i}.") for i in range(depth)]


def same_tensors(depth: int, tower: OpenClip) -> dict[str, str]:
    """The tensors that only the name tells apart; open_clip's: Hugging Face's."""
    names = dict(tower.outer)
    for theirs, ours in blocks_of(depth, tower):
        for a, b in INNER.items():
            names |= norm(theirs + a, ours + b)
    return names


def to_open_clip(
    tensors: dict[str, Tensor], depth: int, tower: OpenClip = TEXT_TOWER
) -> dict[str, Tensor]:
    """A tower's tensors under open_clip's names: q, k, v are one, the projection is x @ W."""
    renamed = {theirs: tensors[ours] for theirs, ours in same_tensors(depth, tower).items()}
    renamed[tower.projection[0]] = tensors[tower.projection[1]].T
    for theirs, ours in blocks_of(depth, tower):
        for part in ("weight", "bias"):
            qkv = [tensors[f"{ours}self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            renamed[f"{theirs}attn.in_proj_{part}"] = torch.cat(qkv)
    return renamed


def from_open_clip(
    tensors: dict[str, Tensor], depth: int, tower: OpenClip = TEXT_TOWER
) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`."""
    renamed = {ours: tensors[theirs] for theirs, ours in same_tensors(depth, tower).items()}
    renamed[tower.projection[1]] = tensors[tower.projection[0]].T.contiguous()
    for theirs, ours in blocks_of(depth, tower):
        for part in ("weight", "bias"):
            qkv = tensors[f"{theirs}attn.in_proj_{part}"].chunk(3)
            for letter, tensor in zip("qkv", qkv, strict=True):
                renamed[f"{ours}self_attn.{letter}_proj.{part}"] = tensor
    return renamed


def load_clip(
    net: nn.Module,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
    **more,
) -> nn.Module:
    """`load_weights`, also under the names of transformers before 4.0: without `text_model.`."""
    if f"{prefix}embeddings.token_embedding.weight" in places(files_of(path), prefix):
        more["stored"] = lambda name: Other((name.removeprefix("text_model."),))
    return load_weights(net, path, dtype, device, prefix, ignore, **more)


def load_open_clip(
    net: nn.Module,
    path: Path | Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prefix: str = "",
    ignore: Collection[str] = (),
    tower: OpenClip = TEXT_TOWER,
    eight_bits: bool = False,
) -> nn.Module:
    """`load_weights` for a file with open_clip's names, as strict."""
    depth = net.cfg.depth
    wanted = to_open_clip({k: v.to("meta") for k, v in net.state_dict().items()}, depth, tower)
    how = {"eight_bits": eight_bits}
    tensors = read_weights(wanted, path, dtype, device, prefix, ignore, **how)
    for name, tensor in from_open_clip(tensors, depth, tower).items():
        assign(net, name, tensor)
    return net
