"""FLUX.2 [klein] base: 4B, whose licence is Apache-2.0, and 9B, whose is not.

FLUX-like, yet guided like SD 3.5: classifier-free, away from the empty caption, which is a whole
turn of the chat template. One language model reads captions. The shift of the sampler's times
depends on the number of image tokens and on the number of steps.
"""

import math
from dataclasses import replace

from config import Config
from nets.files import Files, Part
from nets.names import Other
from teachers import Networks, Teacher
from teachers.elsewhere import Elsewhere
from teachers.flux import double_attention
from teachers.sizes import scaled_heads

TAPS = (9, 18, 27)  # layers of Qwen3 after which its states are read

# At 1024 x 1024. The losses' times are shifted as the teacher's own 50 steps are (e^mu = 7.56): it
# teaches where it is sampled. The anchors are the makers' few steps (e^mu about 10), where their
# own student is called. Other sizes have other shifts; see docs/klein.md.
SHIFT = 7.56
ANCHORS = {
    1: (1.0,),
    2: (1.0, 0.9091),
    4: (1.0, 0.9674, 0.9081, 0.7672),
    8: (1.0, 0.9854, 0.9666, 0.9415, 0.9062, 0.8528, 0.763, 0.5798),
}
BASE = Config(
    teacher="klein",
    taus=ANCHORS[4],
    shift=SHIFT,
    guidance=4.0,
    guidance_dmd=(2.0, 6.0),
    guidance_isg=(4.0, 4.0),
    w_isg=1.0,
    isg_margin=0.02,
    w_gan=2.0,
    steps=10_000,
    save_every=1000,
    save_minutes=60,  # a checkpoint has 102 GB
    batch=1,
    lr=1e-6,
    lr_fake=1e-6,
    lr_disc=1e-6,
)
FEWER = {steps: {"taus": taus} for steps, taus in ANCHORS.items() if steps != 4}


def mean_shift(tokens: int, steps: int) -> float:
    """mu, the logarithm of the shift of the official sampler's times.

    tokens: of the image. Linear in them, and up to 4300 in the steps too: between two lines, for 10
    steps and for 200. Beyond, the line for 200, so that it falls at 4300 by 1.1.
    """
    long = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return long
    short = 8.73809524e-5 * tokens + 1.89833333
    return long + (short - long) * (200 - steps) / 190


def stream(name: str, mlp: str) -> dict:
    """A stream of the double blocks."""
    ours, theirs = f"double_blocks.*.{name}_mlp.", f"transformer_blocks.*.{mlp}."
    return double_attention(name) | {
        f"{ours}0": f"{theirs}linear_in",
        f"{ours}2": f"{theirs}linear_out",
    }


TIME, SINGLE = "time_guidance_embed.timestep_embedder", "single_transformer_blocks.*.attn"
MODULATIONS = (
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)
DIFFUSERS = {  # names of modules
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{TIME}.linear_1",
    "time_in.out_layer": f"{TIME}.linear_2",
    **{f"{name}.lin": f"{name}.linear" for name in MODULATIONS},
    **stream("img", "ff"),
    **stream("txt", "ff_context"),
    "single_blocks.*.linear1": f"{SINGLE}.to_qkv_mlp_proj",
    "single_blocks.*.linear2": f"{SINGLE}.to_out",
    "single_blocks.*.norm.query_norm": f"{SINGLE}.norm_q",
    "single_blocks.*.norm.key_norm": f"{SINGLE}.norm_k",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Other(("norm_out.linear",), swapped=True),
}


def elsewhere_of(size: str, repo: str) -> Elsewhere:
    """The times in ComfyUI: of a node of the makers', or by default."""
    makers = "https://github.com/black-forest-labs/flux2"
    classes = "Flux2KleinPipeline", "Flux2Transformer2DModel"
    times = {"shift": math.exp(2.02), "scheduler": "Flux2Scheduler"}
    return Elsewhere(f"Flux.2-klein-{size}", makers, *classes, repo, **times)


class Klein(Teacher):
    with_adapters = {"disc_channels": 256, "save_minutes": 0.0}  # rates as in full training
    repo, file = "black-forest-labs/FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors"
    elsewhere = elsewhere_of("4b", repo)
    tokens = 512  # of a caption, template and padding included
    shards, loose = 2, "qwen_3_4b.safetensors"  # of the text encoder; in one file elsewhere
    released = {
        "flux-2-klein-4b.safetensors": {
            "steps": "4",
            "taus": str(list(ANCHORS[4])),
            "shift": "9.89",
            "sampler": "euler",
            "size": "[1024, 1024]",
        }
    }

    def parts(self) -> dict[str, Part]:
        """Beside the makers' repository: folders as ComfyUI has them, or all in one."""
        count, vae = self.shards, "flux2-vae.safetensors"
        llm = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
        return {
            "denoiser": Part(self.repo, (self.file,), ((f"diffusion_models/{self.file}",),)),
            "vae": Part(
                self.repo,
                ("vae/diffusion_pytorch_model.safetensors",),
                ((f"vae/{vae}",), (vae,), ("ae.safetensors",)),
            ),
            "llm": Part(
                self.repo,
                tuple(f"text_encoder/{file}" for file in llm),
                ((f"text_encoders/{self.loose}",), (self.loose,)),
            ),
            "llm_tokenizer": Part(self.repo, ("tokenizer/tokenizer.json",), (("tokenizer.json",),)),
        }

    # The count of batches that the autoencoder's statistics are from.
    not_weights = ("bn.num_batches_tracked",)

    def full_size(self) -> Networks:
        from model import Flux2Config
        from nets.qwen3 import QWEN3_4B
        from nets.vae import VAES

        return Networks(Flux2Config(), VAES["flux2"], llm=replace(QWEN3_4B, taps=TAPS))

    def build(self, shift: float):
        from model import Flux2
        from schedule import Flow

        return Flux2(self.sizes.denoiser, Flow(shift))

    def other_names(self) -> dict:
        return DIFFUSERS

    def load_vae(self, files: Files, *how):
        from nets.vae import load_vae

        return self.load_built(self.build_vae, "vae", files, *how, load=load_vae)

    def load_text(self, files: Files, *how):
        from nets.qwen3 import KleinText, Qwen3, check_release, qwen3_tokenizer

        tokenizer = qwen3_tokenizer(*files["llm_tokenizer"], self.tokens, pad=True)
        check_release(self.sizes.llm, files["llm"])
        return KleinText(self.load_part(Qwen3, self.sizes.llm, "llm", files, *how), tokenizer)

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"context": (self.tokens, self.sizes.denoiser.context_width)}

    def text_networks(self, t5: bool = True) -> list:
        from nets.qwen3 import Qwen3

        return [(Qwen3(self.sizes.llm), self.tokens)]

    def sampling_times(self, schedule, steps: int, size: tuple[int, int]) -> list[float]:
        from schedule import Flow, grid

        _, height, width = self.latent_shape(size)
        return grid(Flow(math.exp(mean_shift(height * width, steps))), steps)

    def scaled_denoiser(self, cfg, scale: float, depth: int):
        """A fifth of the depth in double blocks, as at full size."""
        double = max(1, round(depth / 5)) if depth else cfg.double
        single = max(1, depth - double) if depth else cfg.single
        return replace(cfg, **scaled_heads(cfg, scale), double=double, single=single)


class Klein9B(Klein):
    repo, file = "black-forest-labs/FLUX.2-klein-base-9B", "flux-2-klein-base-9b.safetensors"
    elsewhere = elsewhere_of("9b", repo)
    shards, loose = 4, "qwen_3_8b.safetensors"
    released = {"flux-2-klein-9b.safetensors": Klein.released["flux-2-klein-4b.safetensors"]}
    licence = "non-commercial licence"

    def full_size(self) -> Networks:
        from model import Flux2Config
        from nets.qwen3 import QWEN3_8B
        from nets.vae import VAES

        denoiser = Flux2Config(width=4096, heads=32, double=8, single=24, context_width=3 * 4096)
        return Networks(denoiser, VAES["flux2"], llm=replace(QWEN3_8B, taps=TAPS))


TEACHERS = {
    "klein": Klein("klein", BASE, FEWER),
    "klein-9b": Klein9B("klein-9b", replace(BASE, teacher="klein-9b"), FEWER),
}
