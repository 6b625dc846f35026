"""Z-Image, the undistilled base, whose licence is Apache-2.0.

Guidance is classifier-free, away from the empty caption. One language model reads captions, each as
long as it is. The autoencoder is FLUX.1's. The sampler's times are shifted by 6 whatever the size.

The official scale of guidance, v_c + g (v_c - v_u), is 1 less than this project's, which is the
usual one: v_u + g (v_c - v_u). The makers recommend theirs from 3 to 5, so here it is 4 to 6.
"""

from config import Config
from nets.files import Files, Part
from teachers import Networks, Teacher
from teachers.elsewhere import Elsewhere

BASE = Config(
    teacher="z-image",
    shift=6.0,  # of four anchors 1, .9474, .8571, .6667
    guidance=5.0,
    guidance_dmd=(4.0, 6.0),
    guidance_isg=(5.0, 5.0),
    w_isg=1.0,
    isg_margin=0.02,
    w_gan=2.0,
    steps=10_000,
    save_every=1000,
    save_minutes=60,  # a checkpoint has 157 GB
    batch=1,
    lr=1e-6,
    lr_fake=1e-6,
    lr_disc=1e-6,
)

COMFYUI = {"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer"}
for block in ("layers.*", "noise_refiner.*", "context_refiner.*"):  # query, key, value in one
    COMFYUI |= dict.fromkeys((f"{block}.attention.to_{x}" for x in "qkv"), f"{block}.attention.qkv")
    COMFYUI |= {
        f"{block}.attention.to_out.0": f"{block}.attention.out",
        f"{block}.attention.norm_q": f"{block}.attention.q_norm",
        f"{block}.attention.norm_k": f"{block}.attention.k_norm",
    }


class ZImage(Teacher):
    not_weights = ("norm_final.weight",)  # in some files
    with_adapters = {"disc_channels": 256, "save_minutes": 0.0}  # rates as in full training
    repo, file = "Tongyi-MAI/Z-Image", "z_image_bf16.safetensors"
    elsewhere = Elsewhere(
        "Z-Image",
        "https://github.com/Tongyi-MAI/Z-Image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        repo,
        unguided=0.0,  # its scale is 1 less than the usual
        shift=3.0,
        node="ModelSamplingAuraFlow",
        as_stored=True,
    )
    released = {
        "z_image_turbo_bf16.safetensors": {
            "steps": "8",
            "taus": "[1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]",
            "shift": "3.0",
            "sampler": "euler",
            "size": "[1024, 1024]",
        }
    }

    def parts(self) -> dict[str, Part]:
        """Beside the makers' repository: folders as ComfyUI has them, or all in one."""
        transformer, llm = (
            tuple(f"{name}-{k + 1:05}-of-{count:05}.safetensors" for k in range(count))
            for name, count in (
                ("transformer/diffusion_pytorch_model", 2),
                ("text_encoder/model", 3),
            )
        )
        vae, loose = "ae.safetensors", "qwen_3_4b.safetensors"
        return {
            "denoiser": Part(
                self.repo, transformer, ((f"diffusion_models/{self.file}",), (self.file,))
            ),
            "vae": Part(
                self.repo,
                ("vae/diffusion_pytorch_model.safetensors",),
                ((f"vae/{vae}",), (vae,)),
            ),
            "llm": Part(self.repo, llm, ((f"text_encoders/{loose}",), (loose,))),
            "llm_tokenizer": Part(self.repo, ("tokenizer/tokenizer.json",), (("tokenizer.json",),)),
        }

    def full_size(self) -> Networks:
        from nets.qwen3 import QWEN3_4B
        from nets.vae import VAES
        from nets.z_image import ZImageConfig

        return Networks(ZImageConfig(), VAES["flux"], llm=QWEN3_4B)

    def build(self, shift: float):
        from nets.z_image import ZImage
        from schedule import Flow

        return ZImage(self.sizes.denoiser, Flow(shift))

    def layouts(self) -> dict:
        return {"its makers' names, which are diffusers'": {}, "ComfyUI's": COMFYUI}

    def load_vae(self, files: Files, *how):
        from nets.vae import load_vae

        return self.load_built(self.build_vae, "vae", files, *how, load=load_vae)

    def load_text(self, files: Files, *how):
        from nets.qwen3 import Qwen3, check_release, qwen3_tokenizer
        from nets.z_image import TOKENS, ZImageText

        tokenizer = qwen3_tokenizer(*files["llm_tokenizer"], TOKENS, pad=False)
        check_release(self.sizes.llm, files["llm"])
        return ZImageText(self.load_part(Qwen3, self.sizes.llm, "llm", files, *how), tokenizer)

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the longest caption, which needs no length: all tokens are its own."""
        from nets.z_image import TOKENS

        return {"context": (TOKENS, self.sizes.denoiser.context_width)}

    def text_networks(self, t5: bool = True) -> list:
        from nets.qwen3 import Qwen3
        from nets.z_image import TOKENS

        return [(Qwen3(self.sizes.llm), TOKENS)]

    def longest(self) -> int:
        return self.unit() * self.sizes.denoiser.longest


TEACHERS = {"z-image": ZImage("z-image", BASE)}
