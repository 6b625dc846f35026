"""The embedded teacher: digit scenes of 16 x 16 pixels, with data, judge and exam of their own.

An MM-DiT of 1.6 M weights whose latents are the pixels; digits/ has the task, and how the networks
were made. Its files come with the code.
"""

from config import Config, Refusal
from digits import ASSETS
from nets.files import Files
from teachers import Networks, Teacher

PRESET = Config(
    teacher="digits",
    size=(16, 16),
    data="",
    workers=0,
    bf16=False,
    recompute=False,
    shift=2.0,
    ema=0.98,
    guidance=2.0,
    guidance_dmd=(1.0, 2.2),
    guidance_isg=(2.0, 2.0),
    p_backward=0.8,
    t_fake="uniform",
    w_isg=8.0,
    w_gan=0.3,
    steps=750,
    batch=32,
    betas=(0.0, 0.999),
    lr=1.5e-4,
    lr_fake=3e-4,
    lr_disc=5e-4,
    lr_warmup=50,
    lr_start=0.0,
    lr_final=0.1,
    watch_every=50,
)
FEWER = {
    "guidance_dmd": (1.5, 3.5),
    "p_backward": 0.5,
    "w_isg": 0.3,
    "w_gan": 0.0,
    "steps": 1200,
    "ttur": 2,
    "betas": (0.9, 0.999),
    "lr": 3e-4,
    "lr_fake": 1e-3,
}


class Digits(Teacher):
    sampled_at_once, measured_at_once, enlarged, watched = 64, 256, 8, (8, 5)
    examined = reads_itself = True
    own_data, own_features = "the embedded task", "the digits have 16 x 16"

    def locate(
        self,
        weights: str = "",
        denoiser: bool = True,
        text: bool = True,
        t5: bool = True,
        disc: bool = False,
        base: str = "",
    ) -> Files:
        from teachers.bases import base_files

        denoiser = base_files(base) if base else [ASSETS / "teacher.safetensors"]
        return {"denoiser": denoiser, "backbone": [ASSETS / "backbone.safetensors"]}

    def full_size(self) -> Networks:
        from digits.words import SceneText
        from nets.mmdit import MMDiTConfig
        from nets.vision import ViTConfig

        return Networks(
            MMDiTConfig(
                patch=4,
                channels=3,
                width=96,
                depth=5,
                heads=3,
                context_width=SceneText.context_width,
                pooled_width=SceneText.pooled_width,
                table=4,
            ),
            backbone=ViTConfig(patch=2, width=64, depth=4, heads=4, grid=8, hooks=(1, 3)),
        )

    def build(self, shift: float):
        from nets.mmdit import MMDiT
        from schedule import Flow

        return MMDiT(self.sizes.denoiser, Flow(shift))

    def load_text(self, files: Files, *how):
        from digits.words import SceneText

        return SceneText()

    def embedding_width(self) -> int:
        return self.sizes.denoiser.pooled_width

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        from digits.words import SLOTS

        cfg = self.sizes.denoiser
        return {"context": (len(SLOTS), cfg.context_width), "pooled": (cfg.pooled_width,)}

    def text_networks(self, t5: bool = True) -> list:
        return []

    def longest(self) -> int:
        return self.unit() * self.sizes.denoiser.table

    def check_measured(self, size: tuple[int, int]) -> None:
        if size != self.preset.size:
            raise Refusal(f"--size {size[0]} {size[1]}: the embedded judge reads 16 x 16 alone")

    def data(self, seed: int):
        from digits.scenes import DigitScenes

        return DigitScenes(seed)

    def exam(self, guidance: float | None):
        from digits.exam import Exam

        return Exam(guidance)

    def features(self, device) -> dict:
        import torch

        from digits.judge import load_judge

        judge = load_judge()[0].to(device)
        vit = self.load_backbone(self.locate(), torch.float32, device)
        return {
            "FD judge": lambda x: judge.judge(2 * x - 1).features,
            "FD ViT": lambda x: vit(x)[:, 0],
        }


TEACHERS = {"digits": Digits("digits", PRESET, {2: FEWER, 1: FEWER})}
