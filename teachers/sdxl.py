"""SDXL and SD 1.5: UNets that predict noise, each in one file with its autoencoder and CLIPs.

Guidance is classifier-free. SDXL is told an image's sizes, and its null caption is zeros but for
those; SD 1.5's is the encoded empty caption.
"""

from dataclasses import replace

from config import Config
from nets.files import COMBINED, Files, Part
from teachers import Networks, Teacher
from teachers.elsewhere import Elsewhere
from teachers.sizes import scaled_groups

SDXL_PRESET = Config(
    teacher="sdxl",
    guidance=5.0,
    guidance_dmd=(8.0, 8.0),
    guidance_isg=(3.0, 15.0),
    t_fake="uniform",
    ida_decay=1.0,
    w_isg=0.2,
    isg_margin=0.02,
    w_gan=0.5,
    steps=10_000,
    batch=1,
    lr=1e-6,
    lr_fake=1e-6,
    lr_disc=1e-6,
)
SD15_PRESET = Config(  # vanilla DMD2: no IDA, no ISG
    teacher="sd15",
    size=(512, 512),
    guidance=7.5,
    guidance_dmd=(1.75, 1.75),
    guidance_isg=(1.75, 1.75),
    t_fake="uniform",
    ida_decay=1.0,
    w_isg=0.0,
    w_gan=0.0,
    steps=10_000,
    watch_every=1000,  # images of many steps beside short turns: 3 % of them, with adapters too
    batch=1,
    lr=1e-6,
    lr_fake=1e-6,
    lr_disc=1e-6,
)


def levels(cfg) -> dict[str, str]:
    """Of what is at one resolution, the makers' names, which count through, -> diffusers'."""
    each, last, found = cfg.blocks + 1, len(cfg.multipliers) - 1, {}
    for down, depth in enumerate(cfg.depths):
        up, first = last - down, down * each  # above, what is at the lowest comes first
        for k in range(cfg.blocks):
            found[f"input_blocks.{first + k + 1}.0"] = f"down_blocks.{down}.resnets.{k}"
            found[f"input_blocks.{first + k + 1}.1"] = f"down_blocks.{down}.attentions.{k}"
        found[f"input_blocks.{first + each}.0.op"] = f"down_blocks.{down}.downsamplers.0.conv"
        for k in range(each):
            found[f"output_blocks.{up * each + k}.0"] = f"up_blocks.{up}.resnets.{k}"
            found[f"output_blocks.{up * each + k}.1"] = f"up_blocks.{up}.attentions.{k}"
        grown = f"output_blocks.{up * each + cfg.blocks}.{2 if depth else 1}.conv"
        found[grown] = f"up_blocks.{up}.upsamplers.0.conv"
    return found


def diffusers_names(cfg) -> dict[str, str]:
    """Modules of the UNet, for its sizes; transformers are called alike inside."""
    places = levels(cfg) | {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    blocks = {
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in places.items()
        for part, name in RES_BLOCK.items()
        if ".resnets." in theirs
    }
    return AROUND | places | blocks


RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
AROUND = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
STABILITY = "https://github.com/Stability-AI/generative-models"
NETWORK = "UNet2DConditionModel"


class UNetTeacher(Teacher):
    """What the two share."""

    repo, file = "", ""
    with_adapters, lora_format = {"disc_channels": 256}, "kohya"
    not_adapted = (
        "input_blocks.0.",
    )  # reads the latents; diffusers' conversion has no place for it
    encoders: dict[str, str] = {}  # prefix of each text encoder's names
    architecture = ""  # what files of its kind call that, in small letters

    def parts(self) -> dict[str, Part]:
        """UNet, autoencoder and text encoders in one file, tokenizers beside it."""
        prefixes = {**COMBINED, **self.encoders}
        parts = {
            name: Part(self.repo, (self.file,), prefix=prefix) for name, prefix in prefixes.items()
        }
        loose = (("vocab.json", "merges.txt"),)  # CLIP's encoders share one vocabulary
        for name, folder in zip(self.encoders, ("tokenizer", "tokenizer_2"), strict=False):
            files = (f"{folder}/vocab.json", f"{folder}/merges.txt")
            parts[f"{name}_tokenizer"] = Part(self.repo, files, loose)
        return parts

    def layouts(self) -> dict:
        return {"its makers'": {}, "diffusers'": diffusers_names(self.sizes.denoiser)}

    def layout(self, path, net) -> dict:
        from nets.weights import files_of
        from teachers.bases import layout_of, refuse_other_meaning

        refuse_other_meaning(self.known(), files_of(path), self.architecture)
        return layout_of(self.known(), path, net)

    def build(self, shift: float):
        """DDPM has no shift."""
        from nets.unet import UNet
        from schedule import DDPM

        return UNet(self.sizes.denoiser, DDPM())

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        from nets.clip import CLIP_LENGTH

        cfg = self.sizes.denoiser
        pooled = {"pooled": (cfg.pooled_width,)} if cfg.pooled_width else {}
        return {"context": (CLIP_LENGTH, cfg.context_width)} | pooled

    def unit(self) -> int:
        """The UNet halves its maps between levels."""
        return 2 ** (len(self.sizes.denoiser.multipliers) - 1) * self.factor()

    def scaled_denoiser(self, cfg, scale: float, depth: int):
        deep = depth or max(cfg.depths)
        levels = tuple(min(deep, each) for each in cfg.depths)
        middle = min(deep, cfg.middle)
        small = replace(cfg, **scaled_groups(cfg, scale), depths=levels, middle=middle)
        return replace(small, head=min(cfg.head, small.width))


class SDXL(UNetTeacher):
    architecture = r"stable[-_ ]diffusion[-_ ]xl|sd[-_ ]?xl"
    repo, file = "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"
    elsewhere = Elsewhere(
        "stable-diffusion-xl-v1-base",
        *(STABILITY, "StableDiffusionXLPipeline", NETWORK, repo),
        keyword="unet",
    )
    encoders = {
        "clip_l": "conditioner.embedders.0.transformer.",
        "clip_g": "conditioner.embedders.1.model.",
    }
    not_weights = (
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    )

    def full_size(self) -> Networks:
        from nets.clip import CLIP_G, CLIP_L
        from nets.unet import UNETS
        from nets.vae import VAES

        return Networks(UNETS["sdxl"], VAES["sdxl"], CLIP_L, CLIP_G)

    def load_text(self, files: Files, *how):
        from nets.clip import CLIP, load_open_clip
        from nets.text import SDXLText, clip_tokenizer

        clip_l = self.load_part(CLIP, self.sizes.clip_l, "clip_l", files, *how)
        clip_g = self.load_part(CLIP, self.sizes.clip_g, "clip_g", files, *how, load=load_open_clip)
        words = clip_tokenizer(*files["clip_l_tokenizer"])
        return SDXLText(clip_l, clip_g, words, clip_tokenizer(*files["clip_g_tokenizer"], 0))

    def null_for(self, null, cond):
        """Of the same sizes as `cond`."""
        import torch

        from nets.text import SIZE_WIDTH

        rows = super().null_for(null, cond)
        words, sizes = rows["pooled"], cond["pooled"][:, -SIZE_WIDTH:]
        return rows | {"pooled": torch.cat([words[:, :-SIZE_WIDTH], sizes], dim=1)}


class SD15(UNetTeacher):
    architecture = r"stable[-_ ]diffusion[-_ ](v1|1)|sd[-_ ]?v?1"
    repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    file = "v1-5-pruned-emaonly.safetensors"
    elsewhere = Elsewhere(
        "stable-diffusion-v1",
        *(STABILITY, "StableDiffusionPipeline", NETWORK, repo),
        keyword="unet",
    )
    encoders = {"clip_l": "cond_stage_model.transformer."}
    not_weights = (
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "model_ema.decay",
        "model_ema.num_updates",
        # the schedule, which is a formula
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "log_one_minus_alphas_cumprod",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
    )

    def full_size(self) -> Networks:
        from nets.clip import CLIP_L
        from nets.unet import UNETS
        from nets.vae import VAES

        return Networks(UNETS["sd15"], VAES["sd15"], CLIP_L)

    def load_text(self, files: Files, *how):
        from nets.clip import CLIP, load_clip
        from nets.text import SD15Text, clip_tokenizer

        clip = self.load_part(CLIP, self.sizes.clip_l, "clip_l", files, *how, load=load_clip)
        return SD15Text(clip, clip_tokenizer(*files["clip_l_tokenizer"]))


TEACHERS = {"sdxl": SDXL("sdxl", SDXL_PRESET), "sd15": SD15("sd15", SD15_PRESET)}
