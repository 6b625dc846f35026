"""A batch: images as latents, captions as cond, and what the discriminator reads of them.

    Batch         what train_step takes; `split` cuts it into parts
    ids_of        which samples a rank takes at a step
    load_batch    from the frozen networks, or from a cache of what they made
    frozen_rows   what they make of samples
    encode_all    prompts ahead, so that the encoders can go
    say_cut       how many captions are longer than what is read of them
    fill_cache    --cache: written where it is not there yet, by all ranks; then only read

B batch, C h w latent, E width of the discriminator's text.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, Refusal
from dataset.ahead import batch_ids
from dataset.cache import (
    Cache,
    check_purpose,
    complete,
    send_rows,
    write_cache,
    write_purpose,
)
from dataset.sources import some_captions
from engine import ranks
from engine.run import take_folder
from nets.layers import send
from nets.text import count_cut
from nets.weights import open_weights, write
from schedule import Cond
from teachers import Teacher


@dataclass
class Batch:
    ids: range  # global sample numbers
    images: Tensor | None  # (B, 3, H, W) in [-1, 1]; None: captions alone
    x0_real: Tensor  # (B, C, h, w)
    cond: Cond
    uncond: Cond | None
    text: Tensor | None  # (B, E), what the discriminator reads of the caption

    def split(self, count: int) -> list["Batch"]:
        """`count` equal parts, in order."""

        def cut(x: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * count if x is None else x.chunk(count)

        def cut_all(cond: Cond | None) -> Sequence[Cond | None]:
            if cond is None:
                return [None] * count
            parts = zip(*map(cut, cond.values()), strict=True)
            return [dict(zip(cond, part, strict=True)) for part in parts]

        each = len(self.ids) // count
        ids = [self.ids[k * each : (k + 1) * each] for k in range(count)]
        tensors = (cut(self.images), cut(self.x0_real), cut_all(self.cond), cut_all(self.uncond))
        return [Batch(*part) for part in zip(ids, *tensors, cut(self.text), strict=True)]


def ids_of(cfg: Config, step: int) -> range:
    """This rank's samples of a step, all parts of its batch."""
    return batch_ids(step, cfg.accumulate * cfg.batch, ranks.rank(), ranks.world())


@torch.no_grad()
def load_batch(ids: range, pairs, nets, cfg: Config, device: torch.device) -> Batch:
    """pairs: captions and images of these samples; nets: the frozen networks, see build.py."""
    images = None if pairs.images is None else send(pairs.images, device)
    if nets.cache:
        rows = nets.cache.rows(pairs, device)
    else:
        rows = frozen_rows(pairs, images, nets.text, nets.reader, nets.vae, cfg, device)
    cond = cond_of(rows)
    uncond = nets.family.null_for(nets.null, cond) if nets.null else None
    if images is None:
        x0_real = torch.zeros(len(ids), *nets.family.latent_shape(cfg.size), device=device)
        return Batch(ids, None, x0_real, cond, uncond, None)
    x0_real = rows["latent"].to(device, torch.float32)
    return Batch(ids, images, x0_real, cond, uncond, rows.get("reader"))


def frozen_rows(
    pairs,
    images: Tensor | None,
    text: nn.Module,
    reader: nn.Module | None,
    vae: nn.Module,
    cfg: Config,
    device: torch.device,
) -> dict[str, Tensor]:
    """Text and latents of a batch; what a cache keeps of it. images: those of pairs, on device."""
    sizes = uncropped(cfg.size) if pairs.sizes is None else pairs.sizes
    cond = text(pairs.captions, device, sizes)
    rows = {f"cond.{name}": tensor for name, tensor in cond.items()}
    if reader:
        rows["reader"] = reader.embedding(pairs.captions, device)
    if images is not None:
        rows["latent"] = torch.cat([vae.encode(part) for part in images.split(cfg.batch)])
    return rows


def cond_of(rows: dict[str, Tensor]) -> Cond:
    """What of it is the denoiser's."""
    return {name.removeprefix("cond."): x for name, x in rows.items() if name.startswith("cond.")}


@torch.no_grad()
def fill_cache(
    cfg: Config, family: Teacher, data, device: torch.device, parts: dict | None = None
) -> Cache:
    """ValueError where there is nothing to keep, or the folder was made for something else.

    parts: what tells the files of each from others. A finished cache is only read.
    """
    if family.own_data or cfg.crop == "random":
        why = f"{family.own_data} has" if family.own_data else "--crop random leaves"
        raise Refusal(f"--cache {cfg.cache}: {why} nothing to keep")
    if cfg.buckets:  # at the border of two, an image is cropped otherwise in every epoch
        raise Refusal(f"--cache {cfg.cache}: --buckets crops anew in every epoch; drop either")
    folder, count = Path(cfg.cache), data.epochs.length
    about = {"teacher": family.name, "size": list(cfg.size), "t5": cfg.t5, "bf16": cfg.bf16}
    about |= {"reader": cfg.w_gan > 0, "seed": cfg.seed}  # the seed orders the shards
    about["t5_length"] = cfg.t5_length or None  # none: as of caches made before there was a choice
    about["parts"] = {part: x for part, x in (parts or {}).items() if part not in UNCACHED}
    check_purpose(folder, about)
    if ranks.agree(complete(folder, count, family.uses_null), device):
        return Cache(folder)
    with ExitStack() as held:  # asked before any rank writes
        take_folder(folder, held, "--cache")
        write_missing(cfg, family, data, device, about)
    return Cache(folder)


UNCACHED = ("denoiser", "backbone", "dinov2")  # parts that make nothing of what a cache keeps


def write_missing(cfg: Config, family: Teacher, data, device: torch.device, about: dict) -> None:
    """By all ranks."""
    folder, first = Path(cfg.cache), ranks.rank() == 0
    files = family.locate(cfg.weights, disc=cfg.w_gan > 0, t5=cfg.t5, base=cfg.base)
    how = (torch.bfloat16 if cfg.bf16 else torch.float32, device)
    text, vae = family.load_text(files, *how), family.load_vae(files, *how)
    reader = family.load_reader(files, *how) if cfg.w_gan else None
    if first:
        write_purpose(folder, about)
    if family.uses_null and first:
        null = text([""], device, uncropped(cfg.size))
        write({name: x.cpu() for name, x in null.items()}, folder / "null.safetensors", {})

    say_cut(text, some_captions(data), "captions")

    def compute(pairs) -> dict[str, Tensor]:
        images = None if pairs.images is None else pairs.images.to(device)
        return frozen_rows(pairs, images, text, reader, vae, cfg, device)

    share = (ranks.rank(), ranks.world())
    write_cache(folder, data, data.epochs.length, cfg.batch, compute, *share)
    ranks.barrier()


def read_null(
    cfg: Config, family: Teacher, text: nn.Module | None, device: torch.device
) -> Cond | None:
    """The null caption, from the text encoders or the cache; None: guidance needs none."""
    if not family.uses_null:
        return None
    if text:
        return text([""], device, uncropped(cfg.size))
    with open_weights(Path(cfg.cache) / "null.safetensors") as file:
        return send_rows({name: file.get_tensor(name) for name in file.keys()}, device)  # noqa: SIM118


# --- prompts -------------------------------------------------------------------------------------


def uncropped(size: tuple[int, int]) -> tuple[int, ...]:
    """`sizes` of a whole image of this height and width, as a teacher's text takes them."""
    return (*size, 0, 0, *size)


def stack_conds(conds: list[Cond], device: torch.device) -> Cond:
    """Conds without a batch dimension as one of a batch."""
    return {name: torch.stack([cond[name] for cond in conds]).to(device) for name in conds[0]}


def encode_all(
    text: nn.Module, captions: list[str], batch: int, device: torch.device, size: tuple[int, int]
) -> dict[str, Cond]:
    """The cond of every caption (no batch dimension), on the CPU, so that the encoders can go."""
    captions, conds = list(dict.fromkeys(captions)), {}
    say_cut(text, captions, "prompts")
    for start in tqdm(range(0, len(captions), batch), desc="prompts", leave=False):
        part = captions[start : start + batch]
        cond = text(part, device, uncropped(size))
        for k, caption in enumerate(part):
            conds[caption] = {name: tensor[k].cpu() for name, tensor in cond.items()}
    return conds


def say_cut(text: nn.Module, captions: list[str], what: str) -> None:
    """Once, before they are read; by rank 0, of those that it looked at."""
    found = count_cut(text, captions) if captions else {}
    if found and ranks.rank() == 0:
        told = [
            f"{cut} of {len(captions):,} after {length} tokens" for length, cut in found.items()
        ]
        tqdm.write(f"{what} longer than what is read of them are cut: {', '.join(told)}")
