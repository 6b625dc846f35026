"""Whether this GPU computes what the CPU does, and how fast: a new machine's first minutes.

    part 1  networks, kernels, iteration, resume   at a tenth of the width, against the CPU in fp32
    part 2  FLUX.1-dev at its true width, 1024 x 1024, bf16, batch 1 and 2: seconds, bytes, MFU
    part 3  SDXL whole, then with channels last
    part 4  images of FLUX.1-dev at its full depth, random weights, in 4 and 28 steps

`run` does the parts asked for, writes what it has after each piece to one JSON file, and prints it.
What fails, for lack of memory or otherwise, is recorded, and the rest goes on. What is too large
for the GPU's memory is made smaller, step by step as `Sizes` has it, and says so.
No file is read. The text encoders are left out, of the released order too.
"""

import contextlib
import copy
import gc
import json
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from config import Config, Refusal
from engine import build, calls, checkpoint, timing
from nets.disk import write_text
from schedule import draw_samples
from teachers import FOUND, Teacher, configure, find, names
from teachers.students import times_of

OUT = Path("gpu-check.json")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """What the parts run on; tests take small ones."""

    width: float = 0.1  # of all networks in part 1, with so many blocks and pixels a side:
    blocks: int = 4
    few: int = 128
    side: int = 1024  # of images in other parts, pixels
    batches: tuple[int, ...] = (1, 2)
    depths: tuple[int, ...] = (12, 9, 6, 3)  # of FLUX.1-dev's blocks, where more does not fit
    lighter: tuple[dict, ...] = ({}, {"disc_channels": 256}, {"w_gan": 0.0})  # SDXL, likewise
    steps: tuple[int, ...] = (4, 28)  # of sampling
    iterations: int = 3  # timed, of each thing


# --- 1: does it compute the same? ----------------------------------------------------------------

MOST = {"fp32": 2e-5, "bf16": 6e-2, "iteration": 1e-4}  # relative; seen: 5e-6, 3.5e-2, 1.5e-5


@contextlib.contextmanager
def standing_in(name: str, family: Teacher) -> Iterator[None]:
    """Whoever asks for this teacher inside finds `family`."""
    before = find(name)
    FOUND[name] = family
    try:
        yield
    finally:
        FOUND[name] = before


def without_text(family: Teacher) -> Teacher:
    """Its text encoders are not built; what they would give is random anyway."""
    family = copy.copy(family)
    family.text_networks = lambda t5=True: []
    return family


def reduced(name: str, sizes: Sizes) -> tuple[Config, Teacher]:
    """A teacher at a tenth of its width, in fp32, with everything on; one that is small as is."""
    family = find(name)
    size = family.preset.size if family.examined else (sizes.few, sizes.few)
    cfg = configure(name, size=size, batch=2, bf16=False, recompute=False)
    cfg = replace(cfg, p_backward=0.0, ema=0.0, w_gan=cfg.w_gan or 1.0, w_isg=cfg.w_isg or 1.0)
    if not family.examined:
        family = family.scaled(sizes.width, sizes.blocks)
    return cfg, without_text(family)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """fp32 is fp32."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """What is computed twice is the same twice, as far as torch has such kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def moved(x, device: torch.device):
    """A tensor or a dict of them, or None."""
    if isinstance(x, dict):
        return {name: moved(tensor, device) for name, tensor in x.items()}
    return x if x is None else x.to(device)


def apart(a: Tensor, b: Tensor) -> float:
    """Of two results, relative."""
    a, b = a.float().cpu(), b.float()
    return ((a - b).norm() / b.norm()).item()


ATTENTION = {  # kernels as torch names them
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_flash_attention_for_cpu": "flash, CPU",
    "_safe_softmax": "none",  # of scores that are all kept
}


class Kernels(TorchDispatchMode):
    """Counts by what attention was computed inside. Not where blocks are compiled."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kernel := ATTENTION.get(func.__name__.split(".")[0]):
            self.seen[kernel] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def networks(small: timing.Bench, device: torch.device, dtype: torch.dtype) -> dict:
    """Of the denoiser, the autoencoder and the backbone with weights in `dtype`: the largest
    difference to the CPU in fp32, and the kernels of their attention."""
    nets, batch = small.nets, small.batch
    times = torch.tensor([0.3, 0.759])

    def all_of(denoiser: nn.Module, vae: nn.Module, backbone: nn.Module, at: torch.device):
        x, image = moved(batch.x0_real, at), moved(batch.images, at)
        yield denoiser(x, moved(times, at), moved(batch.cond, at))
        yield vae.decode(x)
        yield vae.encode(image)
        yield from backbone.maps((image + 1) / 2)

    parts = (nets.student, nets.vae, nets.disc.backbone)
    there = [copy.deepcopy(net).to(device, dtype) for net in parts]
    with Kernels() as kernels:
        found = list(all_of(*there, device))
    wanted = all_of(*parts, CPU)
    far = [apart(got, want) for got, want in zip(found, wanted, strict=True)]
    return {"difference": max(far), "attention": dict(kernels.seen)}


def on(small: timing.Bench, device: torch.device) -> timing.Bench:
    """The same weights and the same batch there."""
    there, b = timing.prepare(small.cfg, device), small.batch
    for name in ("student", "fake", "teacher", "vae", "disc"):
        getattr(there.nets, name).load_state_dict(getattr(small.nets, name).state_dict())
    tensors = (b.images, b.x0_real, b.cond, b.uncond, b.text)
    there.batch = type(b)(b.ids, *(moved(x, device) for x in tensors))
    return there


def turns_of(cfg: Config) -> list[tuple[int, Config]]:
    """A step of every kind, the student's first, and the configuration in which it is one."""
    kinds = timing.kinds(cfg)
    return [kinds[kind][1:] for kind in sorted(kinds, reverse=True)]


def turn(bench: timing.Bench, step: int, cfg: Config) -> dict[str, float]:
    return timing.train.train_step(step, bench.batch, bench.nets, bench.opts, cfg)


def iteration(small: timing.Bench, device: torch.device) -> float:
    """Every kind of turn: the largest difference of a loss or a norm to the CPU's, relative, or of
    what is below .01 a hundred times the absolute. Weights move in between."""
    there, far = on(small, device), 0.0
    for step, cfg in turns_of(small.cfg):
        here, other = turn(small, step, cfg), turn(there, step, cfg)
        assert here.keys() == other.keys(), f"{here.keys()} here, {other.keys()} there"
        far = max(far, *(abs(other[x] - y) / max(abs(y), 1e-2) for x, y in here.items()))
    return far


def resume(cfg: Config, device: torch.device) -> float:
    """The largest difference of a weight after two turns and after one, a checkpoint, and one."""
    first, *_, second = turns_of(cfg)

    def begin() -> tuple[timing.Bench, tuple]:
        made = timing.prepare(cfg, device)
        optimizers = {name: opt.optimizers for name, opt in made.opts.items()}
        return made, (made.nets.trained(), optimizers)

    with tempfile.TemporaryDirectory() as folder:
        through, saved = begin()
        turn(through, *first)
        checkpoint.save_checkpoint(Path(folder), 1, *saved, {}, keep=1)
        turn(through, *second)
        again, loaded = begin()
        state, _ = checkpoint.load_checkpoint(Path(folder), *loaded)
    assert state, "no checkpoint is left"
    turn(again, *second)
    pairs = zip(saved[0].values(), loaded[0].values(), strict=True)
    weights = (pair for a, b in pairs for pair in zip(a.parameters(), b.parameters(), strict=True))
    return max((a - b).abs().max().item() for a, b in weights)


def judged(difference: float, most: float) -> dict:
    return {"difference": difference, "most": most, "ok": difference <= most}


def correctness(name: str, sizes: Sizes, device: torch.device, found: dict) -> None:
    """Of one teacher, all of the above."""
    cfg, family = reduced(name, sizes)
    with standing_in(name, family), exact():
        small = timing.prepare(cfg, CPU)
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            told = networks(small, device, dtype)
            found[f"networks, {short}"] = judged(told["difference"], MOST[short])
        fused = device.type != "cuda" or "none" not in told["attention"]
        found["attention, bf16"] = {"kernels": told["attention"], "ok": fused}
        found["iteration"] = judged(iteration(small, device), MOST["iteration"])
        with repeatable():
            found["resume"] = judged(resume(cfg, device), 0.0)


# --- 2, 3: how fast, and how large? --------------------------------------------------------------


def timed(cfg: Config, sizes: Sizes, device: torch.device, found: dict) -> timing.Bench:
    """Ours first: the released order needs more memory."""
    bench, n = timing.prepare(cfg, device), sizes.iterations
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    found["reachable"] = timing.reachable(device, dtype)
    with Kernels() as kernels:
        timing.run_turn(bench, max(timing.kinds(cfg)))
    found["attention"] = dict(kernels.seen)
    found["peak"] = timing.peak_memory(bench)  # not in the first turn: Adam's state is new there
    found["orders"] = timing.two_orders(bench, n, ["ours"])
    found["work"] = timing.flops_of(bench)
    found["parts"] = timing.by_part(bench, n, found["work"])
    return bench


def largest(
    name: str,
    ways: list[tuple[int, dict]],
    batch: int,
    sizes: Sizes,
    device: torch.device,
    found: dict,
) -> timing.Bench:
    """The first of `ways` (depth, flags) for which there is memory, timed."""
    size, family = (sizes.side, sizes.side), find(name)
    for depth, flags in ways:
        cfg = configure(name, size=size, batch=batch, p_backward=0.0, ema=0.0, **flags)
        found |= {"depth": depth, "flags": flags, "batch": batch, "config": asdict(cfg)}
        FOUND[name] = without_text(family.scaled(1.0, depth) if depth else family)
        try:
            return timed(cfg, sizes, device, found)
        except torch.OutOfMemoryError:
            if (depth, flags) == ways[-1]:
                raise
            found.setdefault("too large", []).append(times_table(found)[0])
        free(device)
    raise AssertionError("there is a way")


def released(bench: timing.Bench, sizes: Sizes, found: dict) -> None:
    rows = timing.two_orders(bench, sizes.iterations, ["released"])
    found["orders"] = {name: row | rows[name] for name, row in found["orders"].items()}


def flux(batch: int, sizes: Sizes, device: torch.device, found: dict) -> None:
    """The first of the batches with compiled blocks, which takes minutes, and in both orders."""
    with standing_in("flux-dev", find("flux-dev")):
        ways = [(depth, {}) for depth in sizes.depths]
        bench = largest("flux-dev", ways, batch, sizes, device, found)
        found["planned"] = timing.planned(bench.cfg)
        if batch == sizes.batches[0]:
            found["compile"] = timing.compiled(bench, sizes.iterations, found["work"])
            released(bench, sizes, found)


def sdxl(sizes: Sizes, device: torch.device, found: dict) -> None:
    with standing_in("sdxl", find("sdxl")):
        bench = largest("sdxl", [(0, way) for way in sizes.lighter], 1, sizes, device, found)
        found["planned"] = timing.planned(bench.cfg)
        released(bench, sizes, found)
        timing.channels_last(bench)
        found["channels last"] = timing.two_orders(bench, sizes.iterations, ["ours"])


# --- 4: images -----------------------------------------------------------------------------------


def random_network(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """In bf16, without ever being there in fp32."""
    with torch.device("meta"):
        net = make()
    net = net.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    return net


@torch.no_grad()
def images(sizes: Sizes, device: torch.device, found: dict) -> None:
    """Seconds of an image, by number of steps, as sample.py draws it; then with compiled blocks."""
    family, side = find("flux-dev"), (sizes.side, sizes.side)
    net = random_network(lambda: family.build(family.preset.shift), device)
    vae = random_network(family.build_vae, device)
    with device:
        cond = calls.conditioning(family, 1, torch.bfloat16)
        eps = torch.randn(1, *family.latent_shape(side))

    def draw(steps: int) -> Tensor:
        taus = times_of(family, net.schedule, steps, side, student=False)
        guidance = family.preset.guidance
        return vae.decode(draw_samples(net, eps, cond, taus, "euler", None, guidance, []))

    def seconds() -> dict[str, float]:
        return {f"{n} steps": timing.seconds(partial(draw, n), 1, device) for n in sizes.steps}

    found["images"] = {"eager": seconds()}
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated()
    build.check_compiler(device)
    build.run_blocks(net, compiled=True, recompute=False)
    found["images"]["compiled"] = seconds()


# --- the command ---------------------------------------------------------------------------------


def pieces(part: int, sizes: Sizes, device: torch.device) -> dict[str, Callable[[dict], None]]:
    """Of a part, by name: what is saved at a time. Each writes into a dict what it finds."""
    if part == 1:
        return {
            f"{name}, beside the CPU": partial(correctness, name, sizes, device) for name in names()
        }
    if part == 2:
        return {f"flux-dev, batch {n}": partial(flux, n, sizes, device) for n in sizes.batches}
    if part == 3:
        return {"sdxl": partial(sdxl, sizes, device)}
    return {"images by flux-dev": partial(images, sizes, device)}


def refuse_cpu(device: torch.device) -> None:
    """ValueError."""
    if device.type != "cuda":
        raise Refusal("--gpu-check: torch finds no CUDA GPU here")


def run(parts: Iterable[int], out: Path, device: torch.device, sizes: Sizes | None = None) -> int:
    """Returns the exit code: 1 where something is not right or failed."""
    sizes, wrong, began = sizes or Sizes(), False, time.perf_counter()
    found = {"machine": timing.machine(device), "torch": torch.__version__, "parts": {}}
    print(f"torch {torch.__version__}, {found['machine']}; saved to {out} as it comes", flush=True)
    for part in sorted(set(parts)):
        for name, piece in pieces(part, sizes, device).items():
            result = found["parts"][f"{part}: {name}"] = attempt(piece, device)
            wrong |= not sound(result)
            found["seconds"] = time.perf_counter() - began
            write_text(out, json.dumps(found, indent=1))
            text = "\n  ".join(lines(result))
            print(f"\n{part}: {name} ({result['seconds']:.0f} s)\n  {text}", flush=True)
    return int(wrong)


def attempt(piece: Callable[[dict], None], device: torch.device) -> dict:
    """What it found, and why no more; then its memory is free."""
    found, begin = {}, time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        piece(found)
    except torch.OutOfMemoryError as error:
        found["out of memory"] = str(error).split("\n")[0]
    except Refusal as error:
        found["refused"] = str(error)
    except Exception:  # a GPU's time is short: the rest is worth having
        found["failed"] = traceback.format_exc()
    found["seconds"] = time.perf_counter() - begin
    free(device)
    return found


def free(device: torch.device) -> None:
    """Memory of what nobody has any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sound(found: dict) -> bool:
    """Lack of memory, or of a compiler, is no error of ours."""
    checks = [value["ok"] for value in found.values() if isinstance(value, dict) and "ok" in value]
    return "failed" not in found and all(checks)


# --- as text -------------------------------------------------------------------------------------


def lines(found: dict) -> list[str]:
    """A piece's result."""
    told = times_table(found) if "depth" in found else []
    for name, check in found.items():
        if isinstance(check, dict) and "ok" in check:
            told.append(f"{name:<20}{shown(check)}{'' if check['ok'] else '  <- wrong'}")
    for how, row in found.get("images", {}).items():
        told += [f"{f'an image in {steps}, {how}':<34}{s:>10.3f} s" for steps, s in row.items()]
    for word in ("out of memory", "refused", "failed"):
        if word in found:
            told += f"{word}: {found[word]}".strip().split("\n")
    return told


def shown(check: dict) -> str:
    if "most" in check:
        return f"{check['difference']:.1e} of at most {check['most']:g}"
    return ", ".join(f"{n} x {kernel}" for kernel, n in check["kernels"].items())


def times_table(found: dict) -> list[str]:
    """Of `timed`, as far as it came."""
    flags = " ".join(f"--{name.replace('_', '-')} {x:g}" for name, x in found["flags"].items())
    told = [f"{found['depth'] or 'all'} blocks {flags}".strip()]
    told += [f"too large: {way}" for way in found.get("too large", [])]
    if "planned" in found:
        told += [timing.memory_line(found["peak"], found["planned"])]
    if "reachable" in found:
        told += [f"{found['reachable'] / 1e12:.3g} TFLOP/s in a large matrix product"]
    if "attention" in found:
        told += [f"attention: {shown({'kernels': found['attention']})}"]
    if "orders" in found:
        told += timing.orders_table(found["orders"])
    if "parts" in found:
        mean = found["orders"]["average iteration"]["ours"]
        told += timing.parts_table(found["parts"], mean, found["reachable"])
    if "compile" in found:
        told += timing.compiled_table(found["compile"], found["reachable"])
    if "channels last" in found:
        told += ["channels last", *timing.orders_table(found["channels last"])]
    return told
