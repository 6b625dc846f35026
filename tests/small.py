"""The large teachers at a width of a dozen channels: official names, files and layouts."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from model import Flux2Config, FluxConfig
from nets.clip import CLIP, CLIP_G, CLIP_L, to_open_clip
from nets.files import SHARED
from nets.mmdit import MMDiTConfig
from nets.qwen3 import Qwen3, Qwen3Config
from nets.text import T5, T5Config
from nets.unet import UNETS
from nets.vae import VAE, VAES, to_diffusers
from nets.vision import (
    CLIP_VIT_LARGE,
    CLIP_VIT_LARGE_TEXT,
    DINOV2_LARGE,
    HF_MASK,
    CLIPVision,
    ViT,
    hf_names,
)
from nets.z_image import ZImageConfig
from teachers import Networks, Teacher, find

WORDS = 514  # single bytes, single bytes that end a word, two special tokens
SMALL_L = replace(CLIP_L, width=12, depth=2, heads=2, hidden=24, vocabulary=WORDS)
SMALL_G = replace(CLIP_G, width=20, depth=2, heads=2, hidden=24, vocabulary=WORDS)
SMALL_T5 = T5Config(width=16, depth=2, heads=2, head=8, hidden=24, vocabulary=16)
AROUND = {
    "backbone": replace(DINOV2_LARGE, width=16, depth=3, heads=2, grid=3, hooks=(0, 2)),
    "reader": replace(CLIP_VIT_LARGE_TEXT, width=12, depth=2, heads=2, hidden=24, vocabulary=WORDS),
}
SEER = replace(CLIP_VIT_LARGE, patch=8, grid=2, width=16, depth=1, heads=2, hidden=24, embedding=12)


def vae(name: str):
    return replace(VAES[name], channels=4, width=6, multipliers=(1, 1, 1, 1), blocks=1, groups=3)


def flux(guidance: bool) -> Networks:
    sizes = {"channels": 4, "width": 12, "heads": 2, "double": 2, "single": 2, "axes": (2, 2, 2)}
    denoiser = FluxConfig(guidance, **sizes, context_width=16, pooled_width=12)
    return Networks(denoiser, vae("flux"), SMALL_L, None, SMALL_T5, **AROUND)


def sd35(dual_blocks: int) -> Networks:
    sizes = {"patch": 2, "channels": 4, "width": 12, "depth": 3, "heads": 2, "table": 6}
    text = {"context_width": 40, "pooled_width": 12 + 20}  # 40: at least both CLIPs side by side
    denoiser = MMDiTConfig(**sizes, **text, dual_blocks=dual_blocks)
    return Networks(denoiser, vae("sd35"), SMALL_L, SMALL_G, replace(SMALL_T5, width=40), **AROUND)


def klein() -> Networks:
    """Latents of 4 channels, folded to 16; three states of 8 channels each."""
    cfg = Flux2Config(
        **{"channels": 16, "width": 16, "heads": 2, "double": 1, "single": 2},
        **{"context_width": 3 * 8, "axes": (2, 2, 2, 2)},
    )
    how = {"head": 8, "hidden": 16, "taps": (1, 2, 3), "vocabulary": 410}
    llm = Qwen3Config(width=8, depth=4, heads=2, groups=1, **how)
    return Networks(cfg, vae("flux2"), llm=llm, **AROUND)


def z_image() -> Networks:
    how = {"head": 8, "hidden": 16, "taps": (3,), "vocabulary": 410}
    llm = Qwen3Config(width=8, depth=4, heads=2, groups=1, **how)
    denoiser = ZImageConfig(
        **{"channels": 4, "width": 12, "heads": 2, "depth": 2, "refiners": 1, "context_width": 8},
        **{"time_hidden": 10, "time_width": 6, "axes": (2, 2, 2)},
    )
    return Networks(denoiser, vae("flux"), llm=llm, **AROUND)


UNET = {"multipliers": (1, 2), "width": 6, "blocks": 1, "groups": 3, "middle": 1}
SIZES = {
    "flux-dev": flux(guidance=True),
    "flux-schnell": flux(guidance=False),
    "sd35-large": sd35(dual_blocks=0),
    "sd35-medium": sd35(dual_blocks=2),
    "klein": klein(),
    "z-image": z_image(),
    "sdxl": Networks(
        replace(
            UNETS["sdxl"],
            **UNET,
            depths=(0, 1),
            context_width=12 + 20,
            pooled_width=20 + 6 * 256,
            head=3,
        ),
        *(vae("sdxl"), SMALL_L, SMALL_G),
        **AROUND,
    ),
    "sd15": Networks(
        replace(UNETS["sd15"], **UNET, depths=(1, 0), context_width=12, heads=2),
        *(vae("sd15"), SMALL_L),
        **AROUND,
    ),
}


SMALL = {name: find(name).resized(sizes) for name, sizes in SIZES.items()}
OFFICIAL = {name: find(name).parts() for name in SIZES}  # files by part


def shallow(family: Teacher, depth: int) -> Teacher:
    """As wide as it is, but few blocks of everything, and two heads of the discriminator's."""
    family = family.scaled(1.0, depth)
    sizes = family.sizes
    few = {name: getattr(sizes, name) for name in ("clip_l", "clip_g", "t5")}
    few = {name: replace(cfg, depth=2) for name, cfg in few.items() if cfg}
    if sizes.llm:  # as many states
        count = len(sizes.llm.taps)
        few["llm"] = replace(sizes.llm, depth=count, taps=tuple(range(1, count + 1)))
    for name in ("denoiser", "vae"):  # of convolutions: per level
        cfg = getattr(sizes, name)
        few |= {name: replace(cfg, blocks=1)} if "blocks" in vars(cfg) else {}
    few["backbone"] = replace(family.backbone(), depth=2, hooks=(1,))
    few["reader"] = replace(family.reader(), depth=2)
    return family.resized(replace(sizes, **few))


def make_official(teacher: str, folder: Path) -> None:
    """A folder as --weights takes it, random weights."""
    family = SMALL[teacher]
    nets, parts = family.sizes, family.parts() | SHARED
    torch.manual_seed(1)
    made = {"denoiser": family.build(1.0), "vae": VAE(nets.vae)}
    made |= {"clip_l": CLIP(nets.clip_l)} if nets.clip_l else {}
    made |= {"clip_g": CLIP(nets.clip_g)} if nets.clip_g else {}
    made |= {"t5": T5(nets.t5)} if nets.t5 else {}
    if nets.llm:  # with the layers that nobody reads
        made["llm"] = Qwen3(replace(nets.llm, taps=(nets.llm.depth,)))
    tensors = {name: net.state_dict() for name, net in made.items()}
    if teacher == "sdxl":
        tensors["clip_g"] = to_open_clip(tensors["clip_g"], nets.clip_g.depth)
    if nets.llm:
        tensors["vae"] = in_diffusers_names(tensors["vae"], len(nets.vae.multipliers))
    tensors["dinov2"] = in_hf_names(ViT(nets.backbone))
    tensors["clip_vit"] = CLIP(nets.reader).state_dict() | CLIPVision(SEER).state_dict()
    files: dict[Path, dict] = {}
    for name, state in tensors.items():
        part = parts[name]
        for k, (key, tensor) in enumerate(sorted(state.items())):  # shards: dealt out
            path = folder / part.folder / part.files[k % len(part.files)]
            files.setdefault(path, {})[part.prefix + key] = tensor.bfloat16().contiguous()
    for path, state in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"modelspec.license": "theirs", "modelspec.hash_sha256": "0x1"}
        save_file(state, path, metadata=about)
    for name, part in parts.items():
        for file in part.files if name.endswith("tokenizer") else ():
            write = write_qwen3_tokenizer if name == "llm_tokenizer" else write_tokenizer
            write(folder / part.folder / file)


def embedded(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The embedded teacher."""
    family = find("digits")
    return family.load(family.preset.shift, family.locate()["denoiser"], dtype)


def in_diffusers_names(vae: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """An autoencoder's; the attention's weights are matrices there."""
    named = {to_diffusers(name, levels): tensor for name, tensor in vae.items()}
    return {k: v.squeeze() if ".attentions." in k and v.ndim > 1 else v for k, v in named.items()}


def in_hf_names(vit: ViT) -> dict[str, torch.Tensor]:
    named = {HF_MASK: torch.zeros(1, vit.cfg.width)}
    for name, tensor in vit.state_dict().items():
        names = hf_names(name)
        named |= dict(zip(names, tensor.chunk(len(names)), strict=True)) if names[1:] else {}
        named |= {names[0]: tensor} if not names[1:] else {}
    return named


def write_tokenizer(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "tokenizer.json":
        pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁three", "s", "▁fox"]
        model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.save(str(path))
    elif path.name == "vocab.json":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
        path.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    else:
        path.write_text("#version: 0.2\n")


def write_qwen3_tokenizer(path: Path) -> None:
    """A small tokenizer.json of Qwen3's kind: the rules of the official one, 384 words."""
    golden = Path(__file__).parent / "golden" / "qwen3_tokens.json"
    about = json.loads(golden.read_text(encoding="utf-8"))
    ids = {word: i for i, word in enumerate(about["vocab_in_order"])}
    tokenizer = Tokenizer(models.BPE(ids, [tuple(pair) for pair in about["merges"]]))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(about["rules"]["split_regex"]), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytewise])
    tokenizer.add_special_tokens(about["special_tokens"])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
