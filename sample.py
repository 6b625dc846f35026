"""Images from prompts, by a student or its teacher.

    python sample.py --checkpoint FILE --prompt "a red three left of a digit"
    python sample.py --teacher digits --steps 50 --guidance 2 --prompt "a digit above a green two"
    python sample.py --checkpoint FILE --prompts FILE --seed 0 1 2 --out folder/name.png

One prompt and one seed write --out; more write name-000.png, name-001.png, ... The noise of an
image depends on its seed alone, so a prompt gives the same image alone or among others.
Settings are stored in each PNG, as JSON in its text field "settings".
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from config import TEACHERS, Parser, refuse
from nets.text import SceneText
from nets.vae import Pixels
from pictures import save_png
from schedule import draw_samples, generator, grid, normal
from teachers import load_student, load_teacher


def arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, help="a student saved by train.py")
    which.add_argument("--teacher", choices=TEACHERS, help="a teacher itself")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to draw")
    what.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--steps", type=int, help="default: the student's own, 50 for a teacher")
    parser.add_argument(
        "--sampler", choices=("x0", "euler"), help="default: x0, euler for a teacher"
    )
    parser.add_argument(
        "--guidance", type=float, help="default: none, a teacher's own for a teacher"
    )
    parser.add_argument("--negative", default="", help="negative prompt, where guidance is on")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="one image of each prompt per seed"
    )
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument(
        "--scale", type=int, default=8, help="enlargement of the embedded task's 16 x 16 pixels"
    )
    parser.add_argument("--out", type=Path, default=Path("out.png"))
    return parser.parse_args()


def load(given: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    """The network, and the settings that the images are made with and carry."""
    if given.checkpoint:
        net, about = load_student(given.checkpoint)
        settings = {"checkpoint": given.checkpoint.name, "teacher": about["teacher"]}
        steps = given.steps or int(about["steps"])
        own = steps == int(about["steps"])
        taus = json.loads(about["taus"]) if own else grid(net.schedule, steps)
        sampler, guidance = given.sampler or about["sampler"], given.guidance
    else:
        preset = TEACHERS[given.teacher]
        net, settings = load_teacher(given.teacher, preset.shift), {"teacher": given.teacher}
        steps = given.steps or 50
        taus, sampler = grid(net.schedule, steps), given.sampler or "euler"
        guidance = preset.guidance if given.guidance is None else given.guidance
    settings |= {"steps": steps, "taus": taus, "sampler": sampler, "guidance": guidance}
    return net.eval(), settings


def read_prompts(given: argparse.Namespace) -> list[str]:
    if given.prompt is not None:
        return [given.prompt]
    lines = given.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{given.prompts} holds no prompt")
    return prompts


def out_paths(out: Path, count: int) -> list[Path]:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:03d}.png") for i in range(count)]


def main() -> None:
    given = arguments()
    try:
        for name in ("steps", "batch", "scale"):
            if getattr(given, name) is not None and getattr(given, name) < 1:
                raise ValueError(f"--{name} is {getattr(given, name)}; it must be at least 1")
        text, vae = SceneText(), Pixels()
        jobs = [(prompt, seed) for prompt in read_prompts(given) for seed in given.seed]
        paths = out_paths(given.out, len(jobs))
        text.tokens([prompt for prompt, _ in jobs] + [given.negative])  # fail before sampling
        net, settings = load(given)
    except (ValueError, OSError) as error:
        refuse(error)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    bar = tqdm(total=len(jobs), desc="images")
    for start in range(0, len(jobs), given.batch):
        part = jobs[start : start + given.batch]
        draws = [generator("sample", seed) for _, seed in part]
        eps = normal(torch.empty(len(part), 3, 16, 16, device=device), draws)
        cond = text([prompt for prompt, _ in part], device)
        uncond = text([given.negative] * len(part), device)
        how = (settings["taus"], settings["sampler"], uncond, settings["guidance"])
        images = vae.decode(draw_samples(net, eps, cond, *how, draws))
        for (prompt, seed), image, path in zip(part, images, paths[start:], strict=False):
            save_png(image, path, settings | {"prompt": prompt, "seed": seed}, given.scale)
        bar.update(len(part))
    bar.close()
    print(paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}")


if __name__ == "__main__":
    main()
