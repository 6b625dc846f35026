"""A run beside its networks: the folder, the log, what is carried from step to step.

prepare_folder   made if need be; refused if it holds a run of another configuration
keep_samples     a run that continues sees the same samples, on any number of ranks
LogFile          log.csv, one row an iteration, a column for whatever is noted
Run              exams so far, skipped updates, SIGTERM
"""

import csv
import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config, Refusal, differences, legible
from dataset.identity import changes
from engine import ranks


def say(line: str) -> None:
    if ranks.rank() == 0:
        tqdm.write("\n".join(map(legible, line.split("\n"))))


def prepare_folder(
    cfg: Config, overwrite: bool, digests: dict[str, str], data=None, same: dict | None = None
) -> Path:
    """The output folder, made if need be. ValueError if it holds a run of another configuration.

    digests: of the weights that the run begins as, by part; data, same: the data set, its identity.
    """
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"{out} cannot be made ({error.strerror}); choose another --out") from None
    if not os.access(out, os.W_OK):
        raise Refusal(f"{out} cannot be written to; choose another --out")
    if ranks.rank() > 0:
        return out
    saved = out / "config.json"
    if overwrite:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        saved.unlink(missing_ok=True)
    if saved.is_file():
        try:
            old = json.loads(saved.read_text())
            changed = differences(old, cfg) + changes(old, same or {}, cfg.data, data)
            changed += other_weights(old, cfg, digests)
        except (json.JSONDecodeError, AttributeError):
            raise Refusal(f"{saved} is damaged; start anew with --overwrite") from None
        if changed:
            raise Refusal(
                f"{out} holds a run of another configuration ({'; '.join(changed)}); "
                "choose another folder with --out, or start anew with --overwrite"
            )
    return out


def other_weights(old: dict, cfg: Config, digests: dict[str, str]) -> list[str]:
    """Parts whose weights are not those of before, whatever their files are called now."""
    before, changed = old.get("digests", {}), []
    was, now = (x or "the official file" for x in (old.get("base"), cfg.base))
    files = {"denoiser": (f"{was} ", f"{now} ")}
    for part, digest in digests.items():
        if before.get(part, digest) != digest:
            a, b = files.get(part, ("", ""))
            changed.append(f"the weights of the {part}: {a}{before[part]} -> {b}{digest}")
    return changed


def keep_samples(cfg: Config, out: Path) -> Config:
    """A run that continues sees the same samples in an iteration, on any number of ranks.

    --accumulate makes up for ranks that came or went. ValueError where it cannot.
    """
    path = out / "config.json"
    if not path.is_file():
        return cfg
    try:
        saved, world = json.loads(path.read_text()), ranks.world()
        each = saved["batch"] * saved.get("accumulate", 1)  # of a rank
        total = each * saved.get("world", world)
    except (json.JSONDecodeError, TypeError, KeyError):
        return cfg  # prepare_folder says so
    if cfg.buckets and each != cfg.batch * cfg.accumulate:
        raise Refusal(
            f"{out} has batches of {each} a rank, which --buckets are made of; "
            f"keep --batch x --accumulate and {saved.get('world', world)} ranks, or --overwrite"
        )
    if cfg.batch * cfg.accumulate * world == total:
        return cfg
    if total % (cfg.batch * world):
        raise Refusal(
            f"{out} has {total} samples an iteration, which {world} ranks x --batch {cfg.batch} "
            "cannot make; choose --batch so that it divides, or start anew with --overwrite"
        )
    cfg = dataclasses.replace(cfg, accumulate=total // (cfg.batch * world))
    say(f"--accumulate {cfg.accumulate}: {out} has {total} samples an iteration")
    return cfg


LOSSES = ["dmd", "isg", "gan", "fake", "disc"]  # shown first


def order(name: str) -> tuple:
    """Of columns: step, losses, norms of gradients, the rest as it came."""
    rank = LOSSES.index(name) if name in LOSSES else len(LOSSES)
    return name != "step", rank, not name.startswith("norm_")


class LogFile:
    """log.csv, one row an iteration. A value that is new gets a column, empty in earlier rows."""

    def __init__(self, path: Path, step: int):
        """Rows from `step` on, where a run is resumed, are dropped."""
        self.path, self.columns = path, ["step"]
        self.begin(self.rows()[:step] if path.is_file() else [])

    def rows(self) -> list[dict[str, str]]:
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            self.columns = list(reader.fieldnames or self.columns)
        return rows

    def begin(self, rows: list[dict[str, str]]) -> None:
        """The file anew, complete or as it was, then open for more."""
        part = self.path.with_suffix(".part")
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.path)
        self.file = open(self.path, "a", newline="", buffering=1)  # noqa: SIM115 (as long as the run)
        self.writer = csv.DictWriter(self.file, self.columns, restval="")

    def write(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step} | {name: f"{value:.6g}" for name, value in values.items()}
        if not row.keys() <= set(self.columns):
            self.file.close()
            rows = self.rows()
            self.columns = sorted(dict.fromkeys([*self.columns, *row]), key=order)
            self.begin(rows)
        self.writer.writerow(row)


def open_board(out: Path, step: int):
    """A writer for TensorBoard where that is installed, else None; rows from `step` on are new."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step)


class Run:
    """What a run carries from step to step beside weights."""

    def __init__(self):
        self.exams: list[dict] = []  # short exams so far
        self.skipped, self.in_a_row = 0, 0  # iterations with an update that was not finite
        self.stop = False  # SIGTERM came
        self.saved = time.monotonic()  # when this run was
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_) -> None:
        self.stop = True

    def count_skipped(self, skipped: float) -> None:
        """Raises FloatingPointError when ten iterations in a row skipped an update."""
        self.skipped += int(skipped > 0)
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row == 10:
            raise FloatingPointError("ten iterations in a row had a loss or gradient not finite")

    def is_due(self, cfg: Config, done: int, device: torch.device) -> tuple[bool, bool]:
        """Whether to save after so many iterations, and to stop then; alike on all ranks.

        At the end, every save_every-th, after save_minutes on any rank's clock, on SIGTERM.
        """
        late = 0 < cfg.save_minutes < (time.monotonic() - self.saved) / 60
        asked = not ranks.agree(not (self.stop or late), device)
        stop = asked and not ranks.agree(not self.stop, device)
        save = asked or done == cfg.steps or done % cfg.save_every == 0
        self.saved = time.monotonic() if save else self.saved
        return save, stop

    def state(self) -> dict:
        return {"exams": self.exams, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def resume(self, state: dict) -> int:
        """Returns the first step to do."""
        self.exams, self.skipped = state["exams"], state["skipped"]
        self.in_a_row = state["in_a_row"]
        return state["step"]
