"""How the embedded networks were made. Writes judge, backbone, teacher, its samples to assets/.

    python -m digits.pretrain            # all, about half an hour on two cores
    python -m digits.pretrain teacher    # one of them: judge | backbone | teacher | samples

judge      a CNN that reads scenes, the evaluator: first on clean scenes, then on blends with other
           scenes, for an evaluator that never saw ghosts does not see them
backbone   a small DINOv2-shaped ViT for the discriminator, another network on purpose: it names
           what is in the scene (class token) and removes noise (patch tokens)
teacher    an MM-DiT trained by flow matching
samples    the teacher's 50-step samples, which FD-T compares with, and the table's rows of it

The same command continues what was interrupted: what has been learned is kept in runs/pretrain/,
and assets/ changes when a network is done. The settings are here; the log of the shipped weights is
in docs/results.md.
"""

from engine.flags import pretrain_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    pretrain_arguments(__doc__)

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import Refusal
from digits import ASSETS
from digits.exam import ROWS, Exam, draw_rows, read_scene, rows_fingerprint
from digits.judge import Judge
from digits.scenes import DigitScenes, Scenes
from digits.words import SceneText
from engine.ranks import refusals
from ida import ida_update
from measure.distances import to_uint8
from nets.disk import hold, try_folder, whole, write_text
from nets.mmdit import MMDiT
from nets.pickles import UNREADABLE, first_line
from nets.vision import ViT
from nets.weights import save_weights
from schedule import generator
from teachers import find

SEED = 0
TEACHER = find("digits")
PRESET, BACKBONE = TEACHER.preset, TEACHER.backbone()
KEPT, EVERY = Path("runs/pretrain"), 250  # what is not done yet, and how often it is kept


def cosine(i: int, steps: int, warmup: int) -> float:
    return min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def save(net: nn.Module, name: str, about: dict[str, str]) -> None:
    """fp16, into assets/."""
    path = ASSETS / f"{name}.safetensors"
    save_weights(net, path, torch.float16, about)
    count, size = sum(p.numel() for p in net.parameters()), path.stat().st_size / 2**20
    print(f"{path.name}: {count:,} weights, {size:.1f} MiB")


class Unfinished:
    """A training's state, from which it continues as if it had never stopped.

    parts: modules and optimizers; with the generator all of the state is in them.
    """

    def __init__(self, name: str, settings: tuple, draw: torch.Generator, *parts):
        self.path, self.settings = KEPT / f"{name}.pt", repr(settings)
        self.draw, self.parts = draw, parts

    def first(self) -> int:
        """The iteration that comes next: 0 where nothing is kept, or of other settings."""
        if not self.path.is_file():
            return 0
        try:
            saved = torch.load(self.path, weights_only=True)
        except UNREADABLE as error:
            why = first_line(error)
            raise Refusal(f"{self.path} is damaged ({why}); remove it to begin anew") from None
        if saved["settings"] != self.settings:
            return 0
        self.draw.set_state(saved["draw"])
        torch.set_rng_state(saved["torch"])
        for part, state in zip(self.parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        print(f"{self.path}: continuing after {saved['done']} iterations", flush=True)
        return saved["done"]

    def keep(self, done: int) -> None:
        """Every so many iterations."""
        if done % EVERY:
            return
        state = {"done": done, "settings": self.settings, "draw": self.draw.get_state()}
        state["torch"] = torch.get_rng_state()  # the judge's dropout draws from it
        state["parts"] = [part.state_dict() for part in self.parts]
        with whole(self.path) as part:
            torch.save(state, part)

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


# --- judge ---------------------------------------------------------------------------------------


def reading_loss(scenes: Scenes, axis: Tensor, digits: Tensor, colours: Tensor) -> Tensor:
    """Cross entropy of axis, digits and colours, by place."""
    true_colours, true_digits = scenes.by_place
    return (
        F.cross_entropy(axis, scenes.axis)
        + F.cross_entropy(digits.flatten(0, 1), true_digits.flatten())
        + F.cross_entropy(colours.flatten(0, 1), true_colours.flatten())
    )


def shake(images: Tensor, draw: torch.Generator, share: float = 0.7) -> Tensor:
    """A share of the images slightly turned, sheared, scaled, moved: 1,437 digits are few."""

    def about_zero(size: float) -> Tensor:
        return size * (2 * torch.rand(len(images), generator=draw) - 1)

    angle, scale, shear = about_zero(0.2), 1 + about_zero(0.12), about_zero(0.2)
    row_1 = torch.stack([scale * angle.cos(), shear - angle.sin(), about_zero(1 / 8)], dim=-1)
    row_2 = torch.stack([angle.sin(), scale * angle.cos(), about_zero(1 / 8)], dim=-1)
    places = F.affine_grid(torch.stack([row_1, row_2], dim=1), images.shape, align_corners=False)
    moved = F.grid_sample(images + 1, places, align_corners=False) - 1  # black outside
    return torch.where(
        (torch.rand(len(images), generator=draw) < share)[:, None, None, None], moved, images
    )


def blend(images: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the images with one or two others shining through, and how much, 0 to .5."""
    B = len(images)
    amount = 0.5 * torch.rand(B, generator=draw) * (torch.rand(B, generator=draw) < 0.5)
    second = images.roll(1, 0)
    one = (torch.rand(B, generator=draw) < 0.5)[:, None, None, None]
    mixed = torch.where(one, second, (second + images.roll(2, 0)) / 2)
    weight = amount[:, None, None, None]
    return (1 - weight) * images + weight * mixed, amount


def train_judge(
    steps: int = 2000, ghost_steps: int = 3000, batch: int = 128, lr: float = 2e-3
) -> None:
    torch.manual_seed(SEED)
    draw, scenes = generator(SEED, "judge"), DigitScenes(seed=1, pairs="all")
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.1)
    unfinished = Unfinished("judge", (steps, ghost_steps, batch, lr), draw, judge, optimizer)
    done, before = unfinished.first(), 0
    for stage, count, share in (("clean", steps, 1.0), ("ghosts", ghost_steps, 0.5)):
        start = min(max(0, done - before), count)
        bar = tqdm(range(start, count), desc=f"judge, {stage}", initial=start, total=count)
        for i in bar:
            first = (i if stage == "clean" else steps + i) * batch
            sample = scenes(range(first, first + batch))
            images = shake(sample.images, draw)
            if stage == "clean":
                level = 0.1 * torch.rand(batch, 1, 1, 1, generator=draw)
                images, amount = images + level * torch.randn(images.shape, generator=draw), None
            else:
                images, amount = blend(images, draw)
            axis, digits, colours, ghost, _ = judge(images)
            loss = reading_loss(sample, axis, digits, colours)
            if amount is not None:
                loss = loss + 20 * F.l1_loss(ghost, amount)
            set_lr(optimizer, share * lr * cosine(i, count, 50))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss:.3f}")
            unfinished.keep(before + i + 1)
        before += count
    judge.eval()
    real = DigitScenes(seed=2, handwriting="held-out", pairs="all")(range(4096))
    verdict = judge.judge(real.images)
    limit = torch.quantile(verdict.ghost, 0.95).item()
    right = read_scene(verdict, SceneText().tokens(real.captions)).right.float().mean()
    mixed, amount = blend(real.images, draw)
    caught = (judge.judge(mixed).ghost > limit)[amount > 0.1].float().mean()
    print(f"judge, held-out writing: accuracy {100 * right:.1f}, ghosts caught {100 * caught:.1f}")
    save(judge, "judge", {"ghost_limit": f"{limit:.6f}"})
    unfinished.end()


# --- backbone ------------------------------------------------------------------------------------


def train_backbone(steps: int = 2500, batch: int = 64, lr: float = 1e-3) -> None:
    torch.manual_seed(SEED)
    draw, scenes = generator(SEED, "backbone"), DigitScenes(seed=3)
    vit = ViT(BACKBONE)
    nn.init.normal_(vit.cls_token, std=0.02)
    nn.init.normal_(vit.pos_embed, std=0.2)
    read = nn.Linear(BACKBONE.width, 2 + 20 + 12)
    paint = nn.Linear(BACKBONE.width, 3 * BACKBONE.patch**2)
    optimizer = torch.optim.AdamW(
        [*vit.parameters(), *read.parameters(), *paint.parameters()], lr=lr, weight_decay=0.05
    )
    unfinished = Unfinished("backbone", (steps, batch, lr), draw, vit, read, paint, optimizer)
    first = unfinished.first()
    bar = tqdm(range(first, steps), desc="backbone", initial=first, total=steps)
    for i in bar:
        sample = scenes(range(i * batch, (i + 1) * batch))
        clean = (sample.images + 1) / 2
        level = 0.4 * torch.rand(batch, 1, 1, 1, generator=draw)
        level *= torch.rand(batch, 1, 1, 1, generator=draw) < 0.7
        tokens = vit(clean + level * torch.randn(clean.shape, generator=draw))
        axis, digits, colours = read(tokens[:, 0]).split([2, 20, 12], dim=-1)
        loss_read = reading_loss(
            sample, axis, digits.unflatten(-1, (2, 10)), colours.unflatten(-1, (2, 6))
        )
        patches = F.pixel_unshuffle(clean, BACKBONE.patch).flatten(2).transpose(1, 2)
        loss_paint = F.mse_loss(paint(tokens[:, 1:]), patches)
        set_lr(optimizer, lr * cosine(i, steps, 100))
        optimizer.zero_grad()
        (loss_read + 20 * loss_paint).backward()
        nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(read=f"{loss_read:.3f}", paint=f"{loss_paint:.4f}")
        unfinished.keep(i + 1)
    seen, real = vit.eval(), DigitScenes(seed=2, handwriting="held-out")(range(1024))
    with torch.no_grad():
        digits = read(seen((real.images + 1) / 2)[:, 0])[:, 2:22].unflatten(-1, (2, 10)).argmax(-1)
    right = (digits == real.by_place[1]).float().mean()
    print(f"backbone, held-out writing: digits {100 * right:.1f} right")
    save(vit, "backbone", {})
    unfinished.end()


# --- teacher -------------------------------------------------------------------------------------


def init_teacher(net: MMDiT) -> None:
    """Blocks start as the identity (zero modulation); positions are told apart from the start."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in net.joint_blocks:
        for stream in (block.context_block, block.x_block):
            nn.init.zeros_(stream.adaLN_modulation[1].weight)
    nn.init.zeros_(net.final_layer.adaLN_modulation[1].weight)
    nn.init.zeros_(net.final_layer.linear.weight)
    nn.init.normal_(net.context_embedder.weight, std=0.5)
    nn.init.normal_(net.pos_embed, std=0.5)


def train_teacher(
    steps: int = 8000,
    batch: int = 64,
    lr: float = 2e-3,
    drop: float = 0.12,
    ema_decay: float = 0.999,
) -> None:
    """Flow matching with logit-normal times; Muon on the blocks' matrices, AdamW on the rest."""
    torch.manual_seed(SEED)
    draw, scenes, text = generator(SEED, "teacher"), DigitScenes(seed=0), SceneText()
    net = TEACHER.build(PRESET.shift)
    init_teacher(net)
    ema = TEACHER.build(PRESET.shift)
    ema.load_state_dict(net.state_dict())
    matrices = [p for p in net.joint_blocks.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if not any(p is q for q in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0),
    )
    settings = (steps, batch, lr, drop, ema_decay)
    unfinished = Unfinished("teacher", settings, draw, net, ema, *optimizers)
    first = unfinished.first()
    bar = tqdm(range(first, steps), desc="teacher", initial=first, total=steps)
    start, mean_loss = time.time(), 1.0
    for i in bar:
        sample = scenes(range(i * batch, (i + 1) * batch))
        keep = torch.rand(batch, generator=draw) >= drop
        cond = text(
            [caption if k else "" for caption, k in zip(sample.captions, keep, strict=True)]
        )
        eps = torch.randn(sample.images.shape, generator=draw)
        t = torch.randn(batch, generator=draw).sigmoid()
        x_t = net.schedule.noise(sample.images, eps, t)
        loss = F.mse_loss(net(x_t, t, cond), net.schedule.target(sample.images, eps))
        for optimizer in optimizers:
            set_lr(optimizer, lr * cosine(i, steps, 100))
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ida_update(
            ema, net, min(ema_decay, (1 + i) / (10 + i))
        )  # the same average, here the usual EMA
        mean_loss += 0.01 * (loss.item() - mean_loss)
        bar.set_postfix(loss=f"{mean_loss:.4f}")
        unfinished.keep(i + 1)
        if (i + 1) % 1000 == 0 or i + 1 == steps:
            print(f"teacher {i + 1}: loss {mean_loss:.4f}, {time.time() - start:.0f} s", flush=True)
    save(ema, "teacher", {"teacher": "digits", "iterations": str(steps)})
    unfinished.end()


# --- the teacher's samples, the reference of FD-T ----------------------------------------------


def save_samples() -> None:
    """The teacher's guided 50-step samples, two seeds, and the table's rows of it: every exam would
    spend minutes on them.
    """
    teacher = TEACHER.load(PRESET.shift, TEACHER.locate()["denoiser"])
    exam = Exam(PRESET.guidance)
    images, path = exam.draw_teacher(teacher), ASSETS / "teacher_samples.npz"
    arrays = {f"seed{s}": to_uint8(x).numpy() for s, x in enumerate(images)}
    with whole(path) as part:
        np.savez_compressed(part, fingerprint=exam.fingerprint(teacher), **arrays)
    print(f"{path.name}: {len(images[0])} images twice, {path.stat().st_size / 2**20:.1f} MiB")
    exam.compare_with(images)
    rows = {"fingerprint": rows_fingerprint(exam, teacher), "rows": draw_rows(exam, teacher)}
    write_text(ASSETS / ROWS, json.dumps(rows, indent=1) + "\n")


def main() -> None:
    which = pretrain_arguments(__doc__).which
    jobs = {"judge": train_judge, "backbone": train_backbone, "teacher": train_teacher}
    with refusals(interrupted="interrupted; the same command continues"), hold(KEPT, "the folder"):
        try_folder(ASSETS)
        for name, job in jobs.items():
            if which in ("all", name):
                job()
        if which != "backbone":
            save_samples()


if __name__ == "__main__":
    main()
