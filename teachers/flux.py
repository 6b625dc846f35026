"""FLUX.1-dev, and FLUX.1-schnell to sample with.

The guidance scale is an input of dev's network, which has no null caption; a student begins with
that input silenced. dev's times are shifted by the size of the image.
"""

import math
from dataclasses import replace

from config import Config
from nets.files import Files, Part
from nets.names import Other
from teachers import Networks, Teacher
from teachers.elsewhere import Elsewhere
from teachers.sizes import scaled_heads

DEV = Config(
    teacher="flux-dev",
    taus=(1.0, 0.904, 0.759, 0.512),
    guidance=3.5,
    guidance_dmd=(1.0, 8.0),
    guidance_isg=(1.0, 8.0),
    t_dmd="logit-normal",
    t_fake="logit-normal",
    w_isg=1.0,
    isg_margin=0.02,
    w_gan=2.0,
    steps=10_000,
    save_every=1000,
    save_minutes=60,  # a checkpoint has 295 GB
    batch=1,
    lr=1e-5,
    lr_fake=1e-5,
    lr_disc=1e-5,
    lr_warmup=500,
    lr_start=0.5,
)
ADAPTERS = {"disc_channels": 256, "save_minutes": 0.0}  # rates as in full training
SCHNELL = Config(teacher="flux-schnell", guidance=0.0)


QKV = ("to_q", "to_k", "to_v")
ADDED = tuple(f"add_{x}_proj" for x in "qkv")


def double_attention(stream: str) -> dict:
    """Of a stream of the double blocks, "img" or "txt"; in FLUX.2 likewise."""
    ours, theirs = f"double_blocks.*.{stream}_attn.", "transformer_blocks.*.attn."
    qkv, out, norm = (QKV, "to_out.0", "norm_")
    if stream == "txt":
        qkv, out, norm = (ADDED, "to_add_out", "norm_added_")
    return {
        f"{ours}qkv": Other(tuple(f"{theirs}{name}" for name in qkv)),
        f"{ours}proj": f"{theirs}{out}",
        f"{ours}norm.query_norm": f"{theirs}{norm}q",
        f"{ours}norm.key_norm": f"{theirs}{norm}k",
    }


def double(stream: str, mlp: str, mod: str) -> dict:
    """A stream of the double blocks."""
    ours, theirs = f"double_blocks.*.{stream}_", "transformer_blocks.*."
    return double_attention(stream) | {
        f"{ours}mlp.0": f"{theirs}{mlp}.net.0.proj",
        f"{ours}mlp.2": f"{theirs}{mlp}.net.2",
        f"{ours}mod.lin": f"{theirs}{mod}.linear",
    }


SINGLE, THEIRS = "single_blocks.*.", "single_transformer_blocks.*."
DIFFUSERS = {  # names of modules; their norms' `scale` is `weight`
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{ours}_in.{side}_layer": f"time_text_embed.{theirs}_embedder.linear_{k}"
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for k, side in ((1, "in"), (2, "out"))
    },
    **double("img", "ff", "norm1"),
    **double("txt", "ff_context", "norm1_context"),
    f"{SINGLE}linear1": Other(
        tuple(f"{THEIRS}{name}" for name in (*(f"attn.{x}" for x in QKV), "proj_mlp")),
        shares=(1, 1, 1, 4),
    ),
    f"{SINGLE}linear2": f"{THEIRS}proj_out",
    f"{SINGLE}norm.query_norm": f"{THEIRS}attn.norm_q",
    f"{SINGLE}norm.key_norm": f"{THEIRS}attn.norm_k",
    f"{SINGLE}modulation.lin": f"{THEIRS}norm.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Other(("norm_out.linear",), swapped=True),
}


class Flux(Teacher):
    guided_by = "input"
    t5_tokens = 512
    with_adapters, lora_format = ADAPTERS, "kohya"
    repo, file = "black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"
    elsewhere = Elsewhere(
        "flux-1-dev",
        "https://github.com/black-forest-labs/flux",
        "FluxPipeline",
        "FluxTransformer2DModel",
        repo,
        shift=math.exp(1.15),
    )

    def parts(self) -> dict[str, Part]:
        t5 = [f"text_encoder_2/model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        clip = ("vocab.json", "merges.txt")
        folded = tuple(f"tokenizer/{name}" for name in clip)
        return {
            "denoiser": Part(self.repo, (self.file,)),
            "vae": Part(self.repo, ("ae.safetensors",)),
            "clip_l": Part(
                self.repo, ("text_encoder/model.safetensors",), (("clip_l.safetensors",),)
            ),
            "t5": Part(self.repo, tuple(t5), (("t5xxl_fp16.safetensors",),)),
            "clip_l_tokenizer": Part(self.repo, folded, (clip,)),
            "t5_tokenizer": Part(
                self.repo, ("tokenizer_2/tokenizer.json",), (("tokenizer.json",),)
            ),
        }

    def full_size(self) -> Networks:
        from model import FluxConfig
        from nets.clip import CLIP_L
        from nets.text import T5_XXL
        from nets.vae import VAES

        return Networks(
            FluxConfig(guidance=self.guided_by == "input"), VAES["flux"], clip_l=CLIP_L, t5=T5_XXL
        )

    def build(self, shift: float):
        import model
        from schedule import Flow

        return model.Flux(self.sizes.denoiser, Flow(shift))

    def start(self, net) -> None:
        from model import silence_guidance

        silence_guidance(net)

    def own_weights(self, net, guidance: float) -> dict:
        """One scale, as part of a bias; the embedder gives zero for any other, as in a student that
        is whole. What is trained beside the teacher's weights could not silence them."""
        import torch

        from nets.layers import time_embedding

        if not net.cfg.guidance:
            return {}
        last, bias = net.guidance_in.out_layer, net.vector_in.out_layer.bias
        t = torch.full((1,), 1000 * guidance, device=bias.device)
        with torch.no_grad():
            given = net.guidance_in(time_embedding(t))[0].float()
        return {
            "vector_in.out_layer.bias": bias.detach().float() + given,
            "guidance_in.out_layer.weight": torch.zeros_like(last.weight, dtype=torch.float32),
            "guidance_in.out_layer.bias": torch.zeros_like(last.bias, dtype=torch.float32),
        }

    def other_names(self) -> dict:
        return DIFFUSERS

    def fitting(self, path) -> Teacher:
        """Students of others, such as the paper's own, may lack the guidance embedder, which ours
        have silenced."""
        from nets.weights import files_of, places

        if not self.sizes.denoiser.guidance or any(
            "guidance" in name for name in places(files_of(path), "")
        ):
            return self
        denoiser = replace(self.sizes.denoiser, guidance=False)
        other = self.resized(replace(self.sizes, denoiser=denoiser))
        other.guided_by = "none"
        return other

    def load_text(self, files: Files, *how):
        from nets.clip import CLIP
        from nets.text import T5, FluxText, clip_tokenizer, t5_tokenizer

        clip = self.load_part(CLIP, self.sizes.clip_l, "clip_l", files, *how)
        t5 = self.load_part(T5, self.sizes.t5, "t5", files, *how)
        words = clip_tokenizer(*files["clip_l_tokenizer"])
        return FluxText(clip, t5, words, t5_tokenizer(*files["t5_tokenizer"], self.t5_tokens))

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        cfg = self.sizes.denoiser
        return {"context": (self.t5_tokens, cfg.context_width), "pooled": (cfg.pooled_width,)}

    def text_networks(self, t5: bool = True) -> list:
        from nets.text import T5

        return [*super().text_networks(), (T5(self.sizes.t5), self.t5_tokens)]

    def sampling_times(self, schedule, steps: int, size: tuple[int, int]) -> list[float]:
        from schedule import Flow, grid, resolution_shift

        _, height, width = self.latent_shape(size)
        tokens = height * width // self.sizes.denoiser.patch**2
        return grid(Flow(resolution_shift(tokens)), steps)

    def scaled_denoiser(self, cfg, scale: float, depth: int):
        """A third of the depth in double blocks, as at full size."""
        double = max(1, round(depth / 3)) if depth else cfg.double
        single = max(1, depth - double) if depth else cfg.single
        return replace(cfg, **scaled_heads(cfg, scale), double=double, single=single)


class Schnell(Flux):
    guided_by, only_sampled, t5_tokens = "none", True, 256
    repo, file = "black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors"
    elsewhere = replace(Flux.elsewhere, architecture="flux-1-schnell", repo=repo, shift=1.0)

    def sampling_times(self, schedule, steps: int, size: tuple[int, int]) -> list[float]:
        from schedule import grid

        return grid(schedule, steps)


TEACHERS = {"flux-dev": Flux("flux-dev", DEV), "flux-schnell": Schnell("flux-schnell", SCHNELL)}
