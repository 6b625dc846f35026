"""Before a run: all that can be refused is, before anything is loaded, cached or deleted.

check_all     flags, data, files and the folder, which is this run's alone from then on
open_exam     the teacher's examiner, and the images that students are held against
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from config import Config
from engine import ranks
from engine.build import (
    Nets,
    check_optimizer,
    check_weights,
    identities,
    open_inputs,
    whole_net,
)
from engine.results import check_export, is_examined
from engine.run import check_run, keep_samples, settings_of, take_folder
from nets import disk
from teachers import find


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
    take_folder(out, held)
    check_weights(cfg, family)
    settings = settings_of(cfg, identities(cfg, family))
    if not overwrite:
        check_run(cfg, out, settings)
    return cfg, data, settings


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
