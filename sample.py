"""Images from prompts, by a student or its teacher.

    python sample.py --checkpoint FILE --prompt "a red three left of a digit"
    python sample.py --teacher digits --steps 50 --guidance 2 --prompt "a digit above a green two"
    python sample.py --teacher flux-dev --steps 28 --guidance 3.5 --size 768 1360 --prompt "a fox"
    python sample.py --checkpoint FILE --prompts FILE --seed 0 1 2 --out folder/name.png
    python sample.py --teacher sdxl --base mine.safetensors --merge lora.safetensors:0.8 --prompt ..

One prompt and one seed write --out; more write name-000.png, name-001.png, ... The noise of an
image depends on its seed alone, so a prompt gives the same image alone or among others.
Settings are stored in each PNG, as JSON in its text field "settings".

The official files are looked for in --weights, else in the hub's cache, else downloaded. The text
encoders leave memory before the denoiser comes.
"""

from engine.flags import sample_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    sample_arguments(__doc__)

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from config import Refusal
from dataset.images import read_text
from engine import ranks
from engine.batch import encode_all
from engine.build import (
    channels_last,
    check_base,
    check_compiler,
    identity,
    run_blocks,
)
from engine.pictures import save_png
from engine.run import say
from engine.start import check_headers
from nets.disk import try_folder
from nets.files import Files
from nets.weights import DTYPES
from schedule import Cond, draw_samples, generator, normal
from teachers import Teacher, find
from teachers.students import is_lora, load_saved, read_student, student_taus, teacher_of, times_of


def resolve_settings(given: argparse.Namespace) -> tuple[dict, Teacher]:
    """The settings that images are made with and carry, and whose they are. ValueError."""
    about = read_student(given.checkpoint) if given.checkpoint else {}
    family = teacher_of(given.checkpoint, given.teacher) if about else find(given.teacher)
    preset = family.preset
    size = tuple(given.size or json.loads(about.get("size", "null")) or preset.size)
    settings = {"teacher": family.name, "size": size}
    if given.checkpoint:
        steps, sampler, guidance = int(about["steps"]), about["sampler"], given.guidance
        settings["checkpoint"] = given.checkpoint.name
        settings |= {"adapter_scale": given.adapter_scale} if is_lora(about) else {}
    else:
        steps, sampler = (preset.student_steps if family.only_sampled else 50), "euler"
        guidance = preset.guidance if given.guidance is None else given.guidance
    own = student_taus(about) if given.steps in (None, steps) and about else None
    settings |= {"steps": given.steps or steps, "taus": own}
    settings |= {"sampler": given.sampler or sampler, "guidance": guidance}
    given.batch = given.batch or family.sampled_at_once
    given.scale = given.scale or family.enlarged
    settings |= {"base": Path(given.base).name} if given.base else {}
    settings |= {"merge": [Path(file).name for file in given.merge]} if given.merge else {}
    settings["dtype"] = given.dtype or ("bf16" if preset.bf16 else "fp32")
    if family.guided_by == "none" and given.guidance:
        raise Refusal(f"--guidance {given.guidance:g}: {family.name} takes none")
    if given.checkpoint and given.merge and not is_lora(about):
        raise Refusal("--merge: LoRAs are merged into a teacher, or what a LoRA stands on")
    family.check_size(size)
    return settings, family


def stack(conds: list[Cond], device: torch.device) -> Cond:
    return {name: torch.stack([cond[name] for cond in conds]).to(device) for name in conds[0]}


def load(
    given: argparse.Namespace,
    settings: dict,
    family: Teacher,
    files: Files,
    device: torch.device,
) -> nn.Module:
    """The denoiser; its sampling times go into the settings, where they are not a student's own."""
    how = (DTYPES[settings["dtype"]], device)
    if given.checkpoint:
        paths = [given.checkpoint, *files.get("denoiser", [])]
        more = {"scale": given.adapter_scale, "merge": given.merge}
        net = load_saved(family, paths, *how, **more)
    else:
        net = family.load(family.preset.shift, files["denoiser"], *how, given.merge)
    if settings["taus"] is None:
        asked = (settings["steps"], settings["size"], bool(given.checkpoint))
        settings["taus"] = times_of(family, net.schedule, *asked)
    return net.requires_grad_(False).eval()


def trained_on(given: argparse.Namespace, family: Teacher, files: Files) -> str:
    """A remark where a student that is a LoRA was trained on other weights; "": on these."""
    about = read_student(given.checkpoint) if given.checkpoint and "denoiser" in files else {}
    here = identity(family, files["denoiser"], given.merge) if about.get("base") else ""
    if about.get("base") in (None, "", here):
        return ""
    was = f"{given.checkpoint} was trained on other weights ({about['base']}, here {here})"
    return f"{was}; give them with --base and --merge"


def read_prompts(given: argparse.Namespace) -> list[str]:
    if given.prompt is not None:
        return [given.prompt]
    lines = read_text(given.prompts).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise Refusal(f"{given.prompts} holds no prompt")
    return prompts


def out_paths(out: Path, count: int) -> list[Path]:
    """Refusal where they cannot be written; nothing is made yet."""
    try_folder(out.parent)
    paths = [out.with_name(f"{out.stem}-{i:03d}.png") for i in range(count)]
    paths = [out] if count == 1 else paths
    for path in paths:
        if path.is_dir():
            raise Refusal(f"--out {path} is a folder; give the name of an image")
    return paths


def main() -> None:
    given = sample_arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ranks.refusals():
        settings, family = resolve_settings(given)
        jobs = [(prompt, seed) for prompt in read_prompts(given) for seed in given.seed]
        paths = out_paths(given.out, len(jobs))
        size, dtype = settings["size"], DTYPES[settings["dtype"]]
        whole = given.checkpoint and not is_lora(read_student(given.checkpoint))
        files = family.locate(given.weights, not whole, t5=not given.no_t5, base=given.base)
        check_headers(family, files, {"": [given.checkpoint] if whole else files["denoiser"]})
        for remark in check_base(family, files, given.merge) if given.base or given.merge else ():
            say(remark)
        if remark := trained_on(given, family, files):
            say(remark)
        text = family.load_text(files, dtype, device)
        prompts = [prompt for prompt, _ in jobs] + [given.negative]
        conds = encode_all(text, prompts, given.batch, device, size)
        del text  # tens of gigabytes for the large teachers
        net = load(given, settings, family, files, device)
        vae = family.load_vae(files, dtype, device)
        if given.compile:
            check_compiler(device)
            run_blocks(net, compiled=True, recompute=False)
        for part in (net, vae) if given.channels_last else ():
            channels_last(part)
        draw(given, settings, family, jobs, paths, conds, net, vae, device)
    print(paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}")


def draw(
    given: argparse.Namespace,
    settings: dict,
    family: Teacher,
    jobs: list[tuple[str, int]],
    paths: list[Path],
    conds: dict[str, Cond],
    net: nn.Module,
    vae: nn.Module,
    device: torch.device,
) -> None:
    """jobs: prompt and seed of each image."""
    size, how = settings["size"], (settings["taus"], settings["sampler"])
    with tqdm(total=len(jobs), desc="images") as bar, torch.no_grad():
        for start in range(0, len(jobs), given.batch):
            part = jobs[start : start + given.batch]
            draws = [generator("sample", seed) for _, seed in part]
            eps = normal(torch.empty(len(part), *family.latent_shape(size), device=device), draws)
            cond = stack([conds[prompt] for prompt, _ in part], device)
            null = [conds[given.negative]] * len(part)
            uncond = stack(null, device) if family.uses_null else None
            guided = (uncond, settings["guidance"] or None)
            images = vae.decode(draw_samples(net, eps, cond, *how, *guided, draws))
            for (prompt, seed), image, path in zip(part, images, paths[start:], strict=False):
                save_png(image, path, settings | {"prompt": prompt, "seed": seed}, given.scale)
            bar.update(len(part))


if __name__ == "__main__":
    main()
