"""What one sees of a run: three lines at its beginning, then one line that moves.

header     whose student, on what, where
Progress   iterations, time to go, and the losses; a student's stay in sight between its turns, and
           what drifts most
"""

import os
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from engine import ranks
from engine.build import Nets, anchors
from engine.sheets import is_watched
from measure.drift import MEASURES, farthest

SMOOTH = 0.9  # of the losses shown, the share that stays from turn to turn


def header(
    cfg: Config, nets: Nets, out: Path, first: int, data: str, device: torch.device
) -> list[str]:
    """first: the step that comes next; data: of what is learned."""
    taus = ", ".join(f"{tau:.3g}" for tau in anchors(cfg, nets.student.schedule))
    trained = {name: sum(p.numel() for p in net.parameters() if p.requires_grad)
               for name, net in nets.trained().items()}  # fmt: skip
    counts = ", ".join(f"{name} {n:,}" for name, n in trained.items() if n)
    parts = {"IDA": cfg.ida_decay < 1, "ISG": cfg.w_isg > 0, "discriminator": cfg.w_gan > 0}
    used = " + ".join(["DMD", *(name for name, on in parts.items() if on)])
    where = f"steps {first} to {cfg.steps}" if first else f"{cfg.steps} steps"
    state = "continuing" if first else "new"
    minutes = f" or {cfg.save_minutes:g} minutes" if cfg.save_minutes else ""
    low, high = cfg.watch_band
    drift = f", a look at drift every {cfg.watch_every} (band {low:g} to {high:g})"
    drift = drift if is_watched(cfg) else ""
    return [
        f"{nets.family.name} -> a student of {cfg.student_steps} steps (at {taus}) by {used}; "
        f"trained weights: {counts}",
        f"{machines(device)}, {cfg.batch} x {cfg.accumulate} x {ranks.world()} samples an "
        f"iteration of {data}, {numbers(cfg, device)}, {shared(nets)}"
        f"{allocator(device)}",
        f"{out}: {state}, {where}; log.csv grows there, with pictures every {cfg.exam_every} and "
        f"checkpoints every {cfg.save_every} iterations{minutes}{drift}",
    ]


def machines(device: torch.device) -> str:
    """The device of this rank, and GPUs of this machine that no rank uses."""
    world = ranks.world()
    if device.type != "cuda":
        many = f"{world} ranks" if world > 1 else "one process"
        return f"CPU, {many}, {torch.get_num_threads()} threads each"
    idle = torch.cuda.device_count() - ranks.local_world()
    note = f" ({idle} more stand idle: torchrun --nproc_per_node N uses them)" if idle > 0 else ""
    return f"{world} x {torch.cuda.get_device_name(device)}{note}"


def numbers(cfg: Config, device: torch.device) -> str:
    """What they are computed in, and how fast."""
    words = ["bf16" if cfg.bf16 else "fp32"]
    words += ["TF32 convolutions of the heads"] if cfg.tf32 and device.type == "cuda" else []
    words += ["compiled blocks"] if cfg.compile else []
    return " with ".join(filter(None, (words[0], " and ".join(words[1:]))))


def allocator(device: torch.device) -> str:
    """Advice where torch hands out a GPU's memory in pieces of a fixed size."""
    named = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if device.type != "cuda" or named:
        return ""
    return "; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True would leave fewer gaps in memory"


def shared(nets: Nets) -> str:
    if not ranks.is_shared(nets.student):
        return "networks whole"
    return f"networks in {ranks.shards_of(nets.student)} shards"


class Progress(tqdm):
    """tqdm's line; `show` takes what train_step returned."""

    def __init__(self, cfg: Config, first: int, names: list[str]):
        hidden = ranks.rank() > 0
        super().__init__(total=cfg.steps, initial=first, desc="train", disable=hidden)
        self.names, self.seen, self.drift = names, {}, {}

    def show(self, values: dict[str, float]) -> None:
        """Losses that this turn has not keep their last, smoothed value, so the line keeps its
        width."""
        for name in self.names:
            if name in values:
                before = self.seen.get(name, values[name])
                self.seen[name] = SMOOTH * before + (1 - SMOOTH) * values[name]
        shown = {name: f"{self.seen[name]:.3f}" for name in self.names if name in self.seen}
        if watched := {name: values[name] for name in MEASURES if name in values}:
            name, ratio = farthest(watched)
            self.drift = {name: f"x{ratio:.2f}"}  # of the teacher's
        self.set_postfix(shown | self.drift, False)
        self.update()
