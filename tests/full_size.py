"""What is run on the GPU that is not there: train.py's iterations, and whole commands.

    official     the official files at full size, holding nothing: sparse files
    pictures     a folder of training data
    turn_steps   which step is a student's turn, another, one at pure noise
    iterate      build_nets, build_learners, then train_step for each of some turns -> a report
    command      sample.py or train.py as a user starts it -> a report
    serve        reports on request, each from a process forked from one that has imported all

    python -m tests.machine flux-dev --world 8 --rank 1 --each 8 --batch 2 --size 512 512
    python -m tests.machine sd15 --depth 1 --turns student other noise

prints one teacher's run: what is resident, the peak and where, bytes by stage, waits, collectives,
attention kernels, host memory and seconds; further flags are train.py's. Two things are replaced,
since they write tensors that are not there to a file: `save_checkpoint` and `stream_weights`.
"""

import argparse
import copyreg
import functools
import gc
import importlib
import json
import os
import pickle
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path

from machine import Machine, pretend, pretend_ranks  # isort: skip (before torch)

import torch
from PIL import Image
from small import in_hf_names, shallow, write_qwen3_tokenizer, write_tokenizer

import teachers
import train
from config import Config
from engine import build, checkpoint, plan, ranks, results
from engine.meter import Kernels
from nets.clip import CLIP, to_open_clip
from nets.files import SHARED
from nets.qwen3 import Qwen3
from nets.text import T5
from nets.vae import VAE
from nets.vision import CLIP_VIT_LARGE, CLIPVision, ViT
from nets.weights import NAMES
from teachers import Teacher, find

# --- files ---------------------------------------------------------------------------------------


def sparse(path: Path, state: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> None:
    """A safetensors file in bf16 whose data are a hole."""
    header, end, dtype = {"__metadata__": about or {}}, 0, torch.bfloat16
    for name, x in state.items():
        begin, end = end, end + x.numel() * dtype.itemsize
        form = {"dtype": NAMES[dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        header[name] = form
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def official(family: Teacher, folder: Path) -> None:
    """As tests/small.py:make_official, of any size."""
    nets, parts = family.sizes, family.parts() | SHARED
    with torch.device("meta"):
        made = {"denoiser": family.build(1.0), "vae": VAE(nets.vae)}
        made |= {"clip_l": CLIP(nets.clip_l)} if nets.clip_l else {}
        made |= {"clip_g": CLIP(nets.clip_g)} if nets.clip_g else {}
        made |= {"t5": T5(nets.t5)} if nets.t5 else {}
        made |= {"llm": Qwen3(nets.llm)} if nets.llm else {}
        tensors = {name: net.state_dict() for name, net in made.items()}
        if family.name == "sdxl":
            tensors["clip_g"] = to_open_clip(tensors["clip_g"], nets.clip_g.depth)
        tensors["dinov2"] = in_hf_names(ViT(family.backbone()))
        seer = CLIPVision(CLIP_VIT_LARGE).state_dict()
        tensors["clip_vit"] = CLIP(family.reader()).state_dict() | seer
    files: dict[Path, dict] = {}
    for name, state in tensors.items():
        part = parts[name]
        for k, (key, tensor) in enumerate(sorted(state.items())):  # shards: dealt out
            path = folder / part.folder / part.files[k % len(part.files)]
            files.setdefault(path, {})[part.prefix + key] = tensor
    for path, state in files.items():
        sparse(path, state)
    for name, part in parts.items():
        for file in part.files if name.endswith("tokenizer") else ():
            write = write_qwen3_tokenizer if name == "llm_tokenizer" else write_tokenizer
            write(folder / part.folder / file)


def pictures(folder: Path, size: tuple[int, int]) -> None:
    """Of two shapes, so that --buckets has a choice."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(8):
        height, width = size if k < 4 else (size[0] // 2, size[1])
        Image.new("RGB", (width, height), (30 * k, 90, 120)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a red three {k}")


def prepare(name: str, depth: int, folder: Path, size: tuple[int, int]) -> dict[str, str]:
    """What --weights and --data are, made if need be. depth: of the denoiser, the rest being
    `shallow` too; 0: all as it is."""
    family = find(name)
    if depth:
        teachers.FOUND[name] = family = shallow(family, depth)
    weights, data = folder / f"{name}-{depth}", folder / "pictures-{}-{}".format(*size)
    if not weights.is_dir():
        official(family, weights)
    if not data.is_dir():
        pictures(data, size)
    return {"weights": str(weights), "data": str(data)}


# --- iterations ----------------------------------------------------------------------------------


def turn_steps(cfg: Config, nets: build.Nets, turns: Sequence[str]) -> list[tuple[int, bool]]:
    """The first step that is each of them, and whether the discriminator has work there.

    student: its turn, at the second anchor after backward simulation; other: another turn,
    likewise; noise: the student's turn from pure noise, of which a flow's judges nothing.
    """
    schedule, found = nets.student.schedule, []
    taus = train.anchors(cfg, schedule)
    for turn in turns:
        i = int(turn != "noise")
        step = plan.find_step(cfg, taus, turn != "other", i)
        alpha = schedule.alpha(torch.tensor(taus[i], device="cpu"))
        found.append((step, cfg.w_gan > 0 and float(alpha) > 0))
    return found


STAGES = ("load_batch", "draw_student", "dmd_loss", "isg_loss", "gan_loss", "fake_loss")
STAGES += ("disc_loss", "minimise", "ida_update")  # functions of train.py


def staged(gpu: Machine, name: str) -> None:
    """Bytes while train.py is in this function of its, and in none that it calls of these."""
    function = getattr(train, name)

    @functools.wraps(function)
    def inside(*args, **kwargs):
        before, gpu.stage = gpu.stage, name
        try:
            return function(*args, **kwargs)
        finally:
            gpu.stage = before

    setattr(train, name, inside)


def iterate(
    teacher: str,
    flags: Sequence[str] = (),
    turns: Sequence[str] = ("student", "other"),
    depth: int = 0,
    rank: int = 0,
    world: int = 0,
    each: int = 8,
    folder: str = "",
) -> dict:
    """world: 0 for one process; each: ranks of a node; folder: for files."""
    sys.argv = ["train.py", "--teacher", teacher, *map(str, flags)]
    cfg, _ = train.train_arguments(None)
    cfg = replace(cfg, workers=0, **prepare(teacher, depth, Path(folder), cfg.size))
    gpu, began = Machine(), time.process_time()
    for name in STAGES:
        staged(gpu, name)
    if world:
        pretend_ranks(rank, world, each, gpu.collectives)
    with gpu:
        device, family = ranks.start(), find(teacher)
        data = build.open_training_data(cfg, family)
        cache = train.fill_cache(cfg, family, data, device) if cfg.cache else None
        gpu.stage = "build"
        nets = train.build_nets(cfg, device, cache)
        opts = train.build_learners(nets, cfg)
        report = {"teacher": teacher, "build": told(gpu, began), "turns": {}}
        for opt in opts.values():  # Adam's state, as after an earlier iteration
            for p in opt.parameters():
                p.grad = torch.zeros_like(p)
            opt.step(1.0)
            opt.zero_grad()
        gc.collect()  # tensors without memory come in circles
        report["resident"], gpu.stage = gpu.now, "train_step"
        for turn, (step, judged) in zip(turns, turn_steps(cfg, nets, turns), strict=True):
            gpu.answers["any"] = judged
            gpu.reset()
            began, ids = time.process_time(), train.ids_of(cfg, step)
            batch = train.load_batch(ids, data(ids), nets, cfg, device)
            with train.precision(cfg, nets, device):
                values = train.train_step(step, batch, nets, opts, cfg)
            values = ranks.mean_over_ranks(values, device)
            del batch
            report["turns"][turn] = {"step": step, "values": values} | told(gpu, began)
    return report


def told(gpu: Machine, began: float) -> dict:
    """What a machine has to report since its last reset."""
    waits = [event for event in gpu.events if event.waits]
    return {
        "seconds": time.process_time() - began,
        "ops": gpu.ops,
        "now": gpu.now,
        "peak": gpu.peak,
        "peak_at": gpu.peak_at,
        "stages": gpu.stages,
        "host_peak": gpu.host_peak,
        "waits": dict(Counter(event.where for event in waits)),
        "lines": dict(Counter(f"{event.kind} {event.lines}" for event in waits)),
        "kernels": dict(gpu.kernels),
        "collectives": list(gpu.collectives),
    }


# --- commands ------------------------------------------------------------------------------------


def command(name: str, teacher: str, flags: Sequence[str], folder: str, data: bool = False) -> dict:
    """The command of a file at the root, with --teacher, --weights and, if asked, --data."""
    made = prepare(teacher, 0, Path(folder), find(teacher).preset.size)
    flags = ["--teacher", teacher, "--weights", made["weights"], *flags]
    sys.argv = [f"{name}.py", *flags, *(["--data", made["data"]] if data else [])]
    checkpoint.save_checkpoint = lambda *_: None
    results.stream_weights = lambda tensors, *_: [None for _ in tensors]
    gpu, began = Machine(), time.process_time()
    with gpu:
        importlib.import_module(name).main()
    return told(gpu, began)


# --- on request ----------------------------------------------------------------------------------


def kernel(name: str) -> torch._ops.OpOverload:
    return attrgetter(name)(torch.ops)


def serve() -> None:
    """For each line {"do": function, "to": file, ...} of the input its report in that file, then
    an exit code in the output. What one report learns of kernels' forms, later ones know."""
    copyreg.pickle(torch._ops.OpOverload, lambda func: (kernel, (str(func),)))
    for line in sys.stdin:
        asked = json.loads(line)
        learned = Path(asked["to"]).with_suffix(".forms")
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                Kernels.known |= pickle.loads(learned.read_bytes())
            print(code, flush=True)
            continue
        os.dup2(2, 1)  # the output is for exit codes
        code, knew = 1, len(Kernels.known)
        try:
            to, do = asked.pop("to"), {"iterate": iterate, "command": command}[asked.pop("do")]
            Path(to).write_text(json.dumps(do(**asked)))
            learned.write_bytes(pickle.dumps(dict(islice(Kernels.known.items(), knew, None))))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def show(report: dict) -> None:
    print(f"{report['teacher']}: resident {report['resident'] / 1e9:.2f} GB, Adam's state included")
    for name, told in {"build": report["build"], **report["turns"]}.items():
        stages = ", ".join(f"{stage} {size / 1e9:.2f}" for stage, size in told["stages"].items())
        print(f"\n{name}: peak {told['peak'] / 1e9:.2f} GB, at {told['peak_at']}")
        print(f"  {told['seconds']:.1f} s, host peak {told['host_peak'] / 1e9:.2f} GB")
        print(f"  peak by stage, GB: {stages}")
        print(f"  {len(told['collectives'])} collectives, {sum(told['waits'].values())} waits")
        for what in ("lines", "kernels"):
            for line, count in sorted(told[what].items(), key=lambda pair: -pair[1]):
                print(f"  {count:6} {line}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("teacher", help='a name, or "serve"')
    parser.add_argument("--world", type=int, default=0, help="ranks; 0: one process")
    parser.add_argument("--rank", type=int, default=0, help="which of them")
    parser.add_argument("--each", type=int, default=8, help="ranks of a node")
    parser.add_argument("--depth", type=int, default=0, help="of the denoiser; 0: as it is")
    turns = ("student", "other", "noise")
    parser.add_argument("--turns", nargs="+", choices=turns, default=["student", "other"])
    given, flags = parser.parse_known_args()
    pretend()
    if given.teacher == "serve":
        serve()
        return
    with tempfile.TemporaryDirectory() as folder:
        show(iterate(**vars(given), flags=flags, folder=folder))
