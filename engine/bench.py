"""How long an iteration takes, where its time and memory go, and what the released order takes.

    python -m engine.bench                                                 # the embedded teacher
    python -m engine.bench --teacher flux-dev --width-scale 0.1 --depth 6 --size 256 256
    python -m engine.bench --teacher flux-dev --depth 12 --compile --out bench.json  # a GPU
    python -m engine.bench --gpu-check                    # a GPU's first minutes: see check.py

Random weights, random text and images: no file is read. Uses the CUDA GPU when there is one. Inputs
are noised data; times are medians, after a warm-up. FLOPs are those of the model: what is computed
again counts as time and not as work. MFU is their share of what a large matrix product reaches.
"""

from engine.flags import bench_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    bench_arguments(__doc__)

import dataclasses
import json
from dataclasses import replace

import torch

from config import Config, Refusal
from engine import check, ranks, timing
from nets.disk import try_folder, write_text
from teachers import FOUND, find


def measure(bench: timing.Bench, iterations: int, compiling: bool) -> dict:
    cfg, device = bench.cfg, bench.device
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    found = {"machine": timing.machine(device), "reachable": timing.reachable(device, dtype)}
    found["orders"] = timing.two_orders(bench, iterations)
    found["peak"] = timing.peak_memory(bench)
    work = timing.flops_of(bench)
    found["parts"] = timing.by_part(bench, iterations, work)
    found["precision"] = timing.precision(bench, iterations)
    found["attention"] = timing.attention_backends(bench, iterations)
    if compiling:
        found["compile"] = timing.compiled(bench, iterations, work)
    return found


def table(cfg: Config, found: dict, planned: float, device: torch.device) -> str:
    reach, orders = found["reachable"], found["orders"]
    mean = orders["average iteration"]["ours"]
    lines = [*timing.about(cfg, reach, device), "", *timing.orders_table(orders), ""]
    lines += timing.parts_table(found["parts"], mean, reach)
    lines += ["", timing.memory_line(found["peak"], planned), ""]
    lines += [f"{'the student, forward':<34}{'seconds':>10}"]
    for name, spent in found["attention"].items():
        shown = "not here" if spent is None else f"{spent:.4f}"
        lines.append(f"  {name.lower().replace('_', ' '):<32}{shown:>10}")
    if "compile" in found:
        lines += ["", *timing.compiled_table(found["compile"], reach)]
    lines += ["", f"{f'weights at learning rate {timing.LR:g}':<34}{'fp32':>10}{'bf16':>10}"]
    for name in ("Adam moves", "IDA moves"):
        row = [found["precision"][dtype][name] for dtype in ("fp32", "bf16")]
        lines.append(f"  {name:<32}" + "".join(f"{x:>10.1%}" for x in row))
    row = [found["precision"][dtype]["IDA seconds"] for dtype in ("fp32", "bf16")]
    return "\n".join([*lines, f"  {'IDA seconds':<32}" + "".join(f"{x:>10.2g}" for x in row)])


def main() -> None:
    cfg, given = bench_arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ranks.refusals():
        if given.gpu_check:
            check.refuse_cpu(device)
            given.out = given.out or check.OUT
        if given.out:
            try_folder(given.out.parent)
        if given.gpu_check:
            raise SystemExit(check.run(given.parts, given.out, device))
        find(cfg.teacher).check_size(cfg.size)
        cfg = replace(cfg, p_backward=0.0, ema=0.0, w_gan=cfg.w_gan or 1.0)
        FOUND[cfg.teacher] = find(cfg.teacher).scaled(given.width_scale, given.depth)
        planned, free = timing.planned(cfg), timing.free_memory(device)
        if planned > free:
            raise Refusal(
                f"needs {planned / 1e9:.1f} GB and {free / 1e9:.1f} are free; "
                "take a smaller --width-scale, --depth, --size or --batch"
            )
        found = measure(timing.prepare(cfg, device), given.iterations, given.compile)
        print(table(cfg, found, planned, device))
        if given.out:
            settings = {"config": dataclasses.asdict(cfg), "planned": planned}
            write_text(given.out, json.dumps(settings | found, indent=1))


if __name__ == "__main__":
    main()
