"""Before a run: all that can be refused is, before anything is loaded, cached or deleted.

check_all     flags, data, files and the folder, which is this run's alone from then on
check_choices  what has no meaning beside the rest
check_weights, check_headers, check_denoiser    each file is that of its network
identities    by part, what tells its files from others
open_exam     the teacher's examiner, and the images that students are held against
"""

from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch

from config import MEASURED, Config, Refusal
from dataset.identity import identity as identity_of_data
from engine import ranks
from engine.build import (
    Nets,
    check_optimizer,
    locate_files,
    merged_of,
    open_inputs,
    prefix_of,
    whole_net,
)
from engine.results import check_export, is_examined
from engine.run import check_run, keep_samples, settings_of, take_folder
from engine.sheets import is_watched
from nets import disk, same
from nets.files import Files
from teachers import Teacher, find
from teachers.bases import part_prefix


def check_all(cfg: Config, overwrite: bool, held: ExitStack) -> tuple[Config, object, dict]:
    """The configuration, the data set and what config.json will say.

    The folder is made, and held until `held` is closed; if that is all that was done, it goes
    again. overwrite: whatever run is there. ValueError or OSError.
    """
    family, out = find(cfg.teacher), Path(cfg.out)
    ranks.on_all_ranks(partial(disk.try_folder, out))
    cfg = cfg if overwrite else keep_samples(cfg, out)
    check_optimizer(cfg.optimizer)
    data = open_inputs(cfg, family)
    check_export(cfg, family)
    check_choices(cfg, family)
    take_folder(out, held)
    check_weights(cfg, family)
    what, *_ = ranks.on_all_ranks(lambda: {} if ranks.rank() > 0 else identity_of_data(data))
    settings = settings_of(cfg, identities(cfg, family), what)
    if not overwrite:
        check_run(cfg, out, settings, data)
    return cfg, data, settings


def check_choices(cfg: Config, family: Teacher) -> None:
    """ValueError for what has no meaning beside the rest."""
    if cfg.keep_best == "watch" and not is_watched(cfg):
        raise Refusal(f"--keep-best watch: --watch-every is {cfg.watch_every}, so there is no look")
    if cfg.keep_best in MEASURED and not (family.examined and cfg.exam_every):
        why = "--exam-every is 0" if family.examined else f"{family.name} has no exam"
        raise Refusal(f"--keep-best {cfg.keep_best}: {why}; --keep-best watch is for any teacher")
    if cfg.guidance_rescale and not family.uses_null:
        raise Refusal(
            f"--guidance-rescale {cfg.guidance_rescale}: {family.name} takes the scale as an "
            "input, so there is no unguided prediction to hold it to"
        )


def check_weights(cfg: Config, family: Teacher) -> None:
    """Every part's header beside its network, before anything is loaded or cached. ValueError."""
    files = locate_files(cfg, family, cached=bool(cfg.cache))
    dtype = None if cfg.base_dtype in ("fp8", "int8") else torch.float32  # None: in 8 bits too
    check_denoiser(family, files["denoiser"], dtype)
    check_headers(family, files, text=not cfg.cache)
    if cfg.w_gan:
        family.load_backbone(files, *HEADERS)
        if not cfg.cache:
            family.load_reader(files, *HEADERS)


HEADERS = (torch.float32, torch.device("meta"))  # how a part is "loaded" whose header is compared


def check_denoiser(
    family: Teacher, paths: list[Path], dtype: torch.dtype | None = torch.float32
) -> None:
    """ValueError or FileNotFoundError."""
    for _ in family.read(family.preset.shift, paths, dtype, HEADERS[1]):
        pass


def check_headers(family: Teacher, files: Files, text: bool = True) -> None:
    """Of VAE and text encoders. ValueError or FileNotFoundError."""
    family.load_vae(files, *HEADERS)
    if text:
        family.load_text(files, *HEADERS)


def identities(cfg: Config, family: Teacher) -> dict[str, dict[str, str]]:
    """By part, what tells its files from others; see nets/same.py. With a cache the files of text
    encoders count where they are there."""
    files = locate_files(cfg, family, cached=bool(cfg.cache))
    if cfg.cache and (cfg.weights or family.preset.weights):
        with suppress(FileNotFoundError):
            files = locate_files(cfg, family)

    def read() -> dict[str, dict[str, str]]:
        if ranks.rank() > 0:
            return {}
        found = {}
        for name, paths in files.items():
            prefix = part_prefix(name, paths, family.prefix(name))
            prefix = prefix_of(family, paths) if name == "denoiser" else prefix
            found[name] = same.identity(paths, prefix)
        if cfg.merge:
            merged, own = "+".join(merged_of(cfg.merge)), found["denoiser"]
            own |= {"digest": f"{own['digest']}+{merged}", "merged": merged}
        return found

    return ranks.on_all_ranks(read)[0]


def open_exam(cfg: Config, nets: Nets):
    """None: none is asked for, or on another rank. All ranks must ask."""
    if not is_examined(cfg, nets.family):
        return None
    teacher = whole_net(nets.teacher, cfg, nets)
    if ranks.rank() > 0:
        return None
    exam = nets.family.exam(cfg.guidance)
    exam.ask_teacher(teacher)
    return exam
