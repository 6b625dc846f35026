"""Stable Diffusion 3.5 Large and Medium.

Transformer and autoencoder are in one file, two CLIPs and T5 beside it; --no-t5 does without T5.
Guidance is classifier-free, away from the encoded empty caption.
"""

import copy
from dataclasses import replace

from config import Config
from nets.files import COMBINED, Files, Part
from nets.names import Other
from teachers import Networks, Teacher
from teachers.elsewhere import Elsewhere
from teachers.sizes import scaled_heads

LARGE = Config(
    teacher="sd35-large",
    shift=3.0,
    guidance=3.5,
    guidance_dmd=(3.0, 10.0),
    guidance_isg=(5.0, 5.0),
    w_isg=1.0,
    isg_margin=0.05,
    w_gan=0.1,
    steps=10_000,
    save_every=1000,
    save_minutes=60,  # a checkpoint has 200 GB
    batch=1,
    lr=1e-6,
    lr_fake=1e-6,
    lr_disc=1e-6,
)
MEDIUM = Config(
    teacher="sd35-medium",
    shift=3.0,
    ttur=10,
    ida_decay=0.98,
    guidance=4.5,
    guidance_dmd=(2.0, 8.0),
    guidance_isg=(2.0, 4.0),
    w_isg=0.5,
    isg_margin=0.05,
    w_gan=0.1,
    steps=10_000,
    batch=1,
    lr=1e-6,
    lr_fake=1e-6,
    lr_disc=1e-6,
)
ADAPTERS = {"disc_channels": 256, "save_minutes": 0.0}  # rates as in full training
STABILITY = "https://github.com/Stability-AI/generative-models"


def elsewhere_of(kind: str) -> Elsewhere:
    repo = f"stabilityai/stable-diffusion-3.5-{kind}"
    classes = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    times = {"shift": 3.0, "node": "ModelSamplingSD3", "shifted": 3.0}
    return Elsewhere(f"stable-diffusion-3-5-{kind}", STABILITY, *classes, repo, **times)


T5_TOKENS = 256  # diffusers' length; Stability's code, ComfyUI and SenseFlow's released code: 77


def stream(name: str, attn: str, qkv: tuple[str, ...], out: str, norm: str) -> dict:
    """An attention of the blocks, with the norms of its queries and keys."""
    ours, theirs = f"joint_blocks.*.{name}.", "transformer_blocks.*."
    return {
        f"{ours}{attn}.qkv": Other(tuple(f"{theirs}{x}" for x in qkv)),
        f"{ours}{attn}.proj": f"{theirs}{out}",
        f"{ours}{attn}.ln_q": f"{theirs}{norm}q",
        f"{ours}{attn}.ln_k": f"{theirs}{norm}k",
    }


QKV, ADDED = [f"to_{x}" for x in "qkv"], [f"add_{x}_proj" for x in "qkv"]
X, CONTEXT, THEIRS = (
    "joint_blocks.*.x_block.",
    "joint_blocks.*.context_block.",
    "transformer_blocks",
)
DIFFUSERS = {  # names of modules, and of the position table
    "x_embedder.proj": "pos_embed.proj",
    "pos_embed": "pos_embed.pos_embed",
    **{
        f"{ours}_embedder.mlp.{2 * (k - 1)}": f"time_text_embed.{theirs}_embedder.linear_{k}"
        for ours, theirs in (("t", "timestep"), ("y", "text"))
        for k in (1, 2)
    },
    "context_embedder": "context_embedder",
    **stream("x_block", "attn", tuple(f"attn.{x}" for x in QKV), "attn.to_out.0", "attn.norm_"),
    **stream("x_block", "attn2", tuple(f"attn2.{x}" for x in QKV), "attn2.to_out.0", "attn2.norm_"),
    **stream(
        "context_block",
        "attn",
        tuple(f"attn.{x}" for x in ADDED),
        "attn.to_add_out",
        "attn.norm_added_",
    ),
    f"{X}mlp.fc1": f"{THEIRS}.*.ff.net.0.proj",
    f"{X}mlp.fc2": f"{THEIRS}.*.ff.net.2",
    f"{CONTEXT}mlp.fc1": f"{THEIRS}.*.ff_context.net.0.proj",
    f"{CONTEXT}mlp.fc2": f"{THEIRS}.*.ff_context.net.2",
    f"{X}adaLN_modulation.1": f"{THEIRS}.*.norm1.linear",
    f"{CONTEXT}adaLN_modulation.1": f"{THEIRS}.*.norm1_context.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Other(("norm_out.linear",), swapped=True),
}


class SD35(Teacher):
    """Large."""

    optional, elsewhere = ("t5", "t5_tokenizer"), elsewhere_of("large")
    with_adapters, lora_format = ADAPTERS, "diffusers"
    t5_tokens = T5_TOKENS
    dimensions = {"width": 2432, "depth": 38, "heads": 38, "table": 192}

    def parts(self) -> dict[str, Part]:
        repo = f"stabilityai/stable-diffusion-3.5-{self.name.removeprefix('sd35-')}"
        file = f"{self.name.replace('sd35-', 'sd3.5_')}.safetensors"
        parts = {name: Part(repo, (file,), prefix=prefix) for name, prefix in COMBINED.items()}
        clip, t5 = ("vocab.json", "merges.txt"), ("tokenizer.json",)  # the CLIPs' are the same
        for name, encoder, folder, words in (
            ("clip_l", "clip_l.safetensors", "tokenizer", clip),
            ("clip_g", "clip_g.safetensors", "tokenizer_2", clip),
            ("t5", "t5xxl_fp16.safetensors", "tokenizer_3", t5),
        ):
            files = tuple(f"{folder}/{file}" for file in words)
            parts[name] = Part(repo, (f"text_encoders/{encoder}",), ((encoder,),))
            parts[f"{name}_tokenizer"] = Part(repo, files, (words,))
        return parts

    def full_size(self) -> Networks:
        from nets.clip import CLIP_G, CLIP_L
        from nets.mmdit import MMDiTConfig
        from nets.text import T5_XXL
        from nets.vae import VAES

        text = {"context_width": 4096, "pooled_width": 2048}
        denoiser = MMDiTConfig(patch=2, channels=16, **self.dimensions, **text)
        return Networks(denoiser, VAES["sd35"], CLIP_L, CLIP_G, T5_XXL)

    def reading(self, tokens: int) -> "SD35":
        """The same, its T5 reading so many tokens of a caption."""
        other = copy.copy(self)
        other.t5_tokens = tokens
        return other

    def build(self, shift: float):
        from nets.mmdit import MMDiT
        from schedule import Flow

        return MMDiT(self.sizes.denoiser, Flow(shift))

    def other_names(self) -> dict:
        last = f"joint_blocks.{self.sizes.denoiser.depth - 1}.context_block.adaLN_modulation.1"
        swapped = f"transformer_blocks.{self.sizes.denoiser.depth - 1}.norm1_context.linear"
        return DIFFUSERS | {last: Other((swapped,), swapped=True)}

    def load_text(self, files: Files, *how):
        from nets.clip import CLIP
        from nets.text import T5, SD35Text, clip_tokenizer, t5_tokenizer

        sizes, t5 = self.sizes, ()
        clip_l = self.load_part(CLIP, sizes.clip_l, "clip_l", files, *how)
        clip_g = self.load_part(CLIP, sizes.clip_g, "clip_g", files, *how)
        words = clip_tokenizer(*files["clip_l_tokenizer"])
        words_g = clip_tokenizer(*files["clip_g_tokenizer"], 0)
        if "t5" in files:
            pieces = t5_tokenizer(*files["t5_tokenizer"], self.t5_tokens)
            t5 = self.load_part(T5, sizes.t5, "t5", files, *how), pieces
        blank = self.t5_tokens, sizes.denoiser.context_width  # what stands there without T5
        return SD35Text(clip_l, clip_g, words, words_g, *t5, blank=blank)

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        from nets.clip import CLIP_LENGTH

        cfg = self.sizes.denoiser
        context = (CLIP_LENGTH + self.t5_tokens, cfg.context_width)
        return {"context": context, "pooled": (cfg.pooled_width,)}

    def text_networks(self, t5: bool = True) -> list:
        from nets.text import T5

        return [*super().text_networks(), *([(T5(self.sizes.t5), self.t5_tokens)] if t5 else [])]

    def longest(self) -> int:
        return self.unit() * self.sizes.denoiser.table

    def sampling_times(self, schedule, steps: int, size: tuple[int, int]) -> list[float]:
        """Down to the shifted 1/1000."""
        import torch

        from schedule import grid

        last = float(schedule.warp(torch.tensor(0.001, dtype=torch.float64)))
        return grid(schedule, steps, last)

    def scaled_denoiser(self, cfg, scale: float, depth: int):
        deep = depth or cfg.depth
        dual = min(deep, cfg.dual_blocks)
        return replace(cfg, **scaled_heads(cfg, scale), depth=deep, dual_blocks=dual)


class SD35Medium(SD35):
    """Its first blocks have a second attention."""

    elsewhere = elsewhere_of("medium")
    dimensions = {"width": 1536, "depth": 24, "heads": 24, "table": 384, "dual_blocks": 13}


TEACHERS = {
    "sd35-large": SD35("sd35-large", LARGE),
    "sd35-medium": SD35Medium("sd35-medium", MEDIUM),
}
