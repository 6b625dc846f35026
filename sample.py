"""Images from prompts, by a student or its teacher.

    python sample.py --checkpoint FILE --prompt "a red three left of a digit"
    python sample.py --teacher digits --steps 50 --guidance 2 --prompt "a digit above a green two"
    python sample.py --teacher flux-dev --steps 28 --guidance 3.5 --size 768 1360 --prompt "a fox"
    python sample.py --checkpoint FILE --prompts FILE --seed 0 1 2 --out folder/name.png
    python sample.py --checkpoint FILE --teacher flux-dev --taus 1 .904 .759 .512 --sampler x0 ...
    python sample.py --explain FILE       # how ComfyUI and diffusers draw with this student
    python sample.py --teacher sdxl --base mine.safetensors --merge lora.safetensors:0.8 --prompt ..

One prompt and one seed write --out; more write name-000.png, name-001.png, ... The noise of an
image depends on its seed alone, so a prompt gives the same image alone or among others.
A student may be anybody's: a file or a folder, in any layout that --base reads, or a LoRA. What
train.py did not write does not say where it is called; flags do (--teacher, --taus, --sampler,
--shift), and --remember keeps them beside it.
Settings are stored in each PNG, as JSON in its text field "settings".

The official files are looked for in --weights, else in the hub's cache, else downloaded. The text
encoders leave memory before the denoiser comes.
"""

from engine.flags import sample_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    sample_arguments(__doc__)

import argparse
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from config import Refusal, legible
from dataset.captions import read_prompts
from engine import ranks
from engine.batch import encode_all, stack_conds
from engine.build import channels_last, check_base, check_compiler, run_blocks, trained_on
from engine.pictures import check_finite, save_png
from engine.run import say
from engine.start import check_denoiser, check_headers
from nets.disk import try_folder
from nets.files import Files
from nets.weights import DTYPES
from schedule import Cond, draw_samples, generator, normal
from teachers import Teacher, find
from teachers.elsewhere import explain
from teachers.students import Student, find_student, reading, remember, times_of


def resolve_settings(given: argparse.Namespace) -> tuple[dict, Teacher, Student | None]:
    """The settings that images are made with and carry, whose they are, and the student if it is
    not its teacher that draws. ValueError."""
    student = asked_student(given) if given.checkpoint else None
    tokens = given.t5_length or (student.t5_length if student else 0)
    family = reading(student.family if student else find(given.teacher), tokens)
    preset = family.preset
    size = tuple(given.size or (student and student.size) or preset.size)
    settings = {"teacher": family.name, "size": size}
    if student:
        steps, sampler = student.steps, student.about["sampler"]
        guidance = student.guidance if given.guidance is None else given.guidance
        settings["checkpoint"] = student.path.name
        settings |= {"adapter_scale": given.adapter_scale} if student.is_lora else {}
    else:
        steps, sampler = (preset.student_steps if family.only_sampled else 50), "euler"
        guidance = preset.guidance if given.guidance is None else given.guidance
    own = student.taus if student and given.steps in (None, steps) else None
    settings |= {"steps": given.steps or steps, "taus": own}
    settings |= {"sampler": given.sampler or sampler, "guidance": guidance}
    given.batch = given.batch or family.sampled_at_once
    given.scale = given.scale or family.enlarged
    settings |= {"base": Path(given.base).name} if given.base else {}
    settings |= {"merge": [Path(file).name for file in given.merge]} if given.merge else {}
    settings |= {"t5_length": tokens} if tokens else {}
    settings["dtype"] = given.dtype or ("bf16" if preset.bf16 else "fp32")
    if (student.fitted if student else family).guided_by == "none" and given.guidance:
        raise Refusal(f"--guidance {given.guidance:g}: {family.name} takes none")
    if student and given.merge and not student.is_lora:
        raise Refusal("--merge: LoRAs are merged into a teacher, or what a LoRA stands on")
    if given.negative and not (family.uses_null and guidance):
        why = "is drawn without guidance" if family.uses_null else "takes no negative prompt"
        raise Refusal(f'--negative "{given.negative}": {family.name} {why}')
    family.check_size(size)
    return settings, family, student


def asked_student(given: argparse.Namespace) -> Student:
    """Of --checkpoint or --explain, with what flags say of one that train.py did not write."""
    path, said = given.checkpoint or given.explain, {"taus": given.taus, "shift": given.shift}
    student = find_student(
        path, given.teacher, **said, sampler=given.sampler, guidance=given.guidance
    )
    student.check_said(said)
    return student


def load(
    given: argparse.Namespace,
    settings: dict,
    family: Teacher,
    student: Student | None,
    files: Files,
    device: torch.device,
) -> nn.Module:
    """The denoiser; its sampling times go into the settings, where they are not a student's own."""
    how = (DTYPES[settings["dtype"]], device)
    if student:
        more = {"scale": given.adapter_scale, "merge": given.merge}
        net = student.load(files.get("denoiser"), *how, **more)
    else:
        net = family.load(family.preset.shift, files["denoiser"], *how, given.merge)
    if settings["taus"] is None:
        asked = (settings["steps"], settings["size"], bool(student))
        settings["taus"] = times_of(family, net.schedule, *asked)
    return net.requires_grad_(False).eval()


def prompts_of(given: argparse.Namespace) -> list[str]:
    if given.prompt is not None:
        return [given.prompt]
    return read_prompts(given.prompts)


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
        if given.explain:
            print(explain(asked_student(given)))
            return
        settings, family, student = resolve_settings(given)
        jobs = [(prompt, seed) for prompt in prompts_of(given) for seed in given.seed]
        paths = out_paths(given.out, len(jobs))
        size, dtype = settings["size"], DTYPES[settings["dtype"]]
        whole = student and not student.is_lora
        files = family.locate(given.weights, not whole, t5=not given.no_t5, base=given.base)
        check_headers(family, files)
        check_denoiser(*((student.fitted, student.files) if whole else (family, files["denoiser"])))
        for remark in check_base(family, files, given.merge) if given.base or given.merge else ():
            say(remark)
        if remark := trained_on(student, files, given.merge):
            say(remark)
        text = family.load_text(files, dtype, device)
        prompts = [prompt for prompt, _ in jobs] + [given.negative]
        conds = encode_all(text, prompts, given.batch, device, size)
        del text  # tens of gigabytes for the large teachers
        net = load(given, settings, family, student, files, device)
        if given.remember and student:
            remember(student)
        vae = family.load_vae(files, dtype, device)
        if given.compile:
            check_compiler(device)
            run_blocks(net, compiled=True, recompute=False)
        for part in (net, vae) if given.channels_last else ():
            channels_last(part)
        draw(given, settings, family, jobs, paths, conds, net, vae, device)
    print(legible(paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"))


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
            cond = stack_conds([conds[prompt] for prompt, _ in part], device)
            null = [conds[given.negative]] * len(part)
            uncond = stack_conds(null, device) if family.uses_null else None
            guided = (uncond, settings["guidance"] or None)
            images = vae.decode(draw_samples(net, eps, cond, *how, *guided, draws))
            check_finite(images, [f'"{prompt}", seed {seed},' for prompt, seed in part])
            for (prompt, seed), image, path in zip(part, images, paths[start:], strict=False):
                save_png(image, path, settings | {"prompt": prompt, "seed": seed}, given.scale)
            bar.update(len(part))


if __name__ == "__main__":
    main()
