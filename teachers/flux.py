"""FLUX.1-dev, and FLUX.1-schnell to sample with.

The guidance scale is an input of dev's network, which has no null caption; a student begins with
that input silenced. dev's times are shifted by the size of the image.
"""

from dataclasses import replace

from config import Config
from nets.files import Files, Part
from teachers import Networks, Teacher, scaled_heads

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
SCHNELL = Config(teacher="flux-schnell", guidance=0.0)


class Flux(Teacher):
    guided_by = "input"
    t5_tokens = 512
    repo, file = "black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"

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

    def sampling_times(self, schedule, steps: int, size: tuple[int, int]) -> list[float]:
        from schedule import grid

        return grid(schedule, steps)


TEACHERS = {"flux-dev": Flux("flux-dev", DEV), "flux-schnell": Schnell("flux-schnell", SCHNELL)}
