"""A run beside its networks: the folder, the log, what is carried from step to step.

take_folder      made if need be, and this run's alone; what is there must be of the same run
begin            what was there goes, with --overwrite; config.json
keep_samples     a run that continues sees the same samples, on any number of ranks
LogFile          log.csv, one row an iteration, a column for whatever is noted
Run              exams so far, skipped updates, SIGTERM and Ctrl-C
"""

import csv
import dataclasses
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config, Refusal, differences, legible
from dataset.identity import changes
from engine import ranks
from engine.checkpoint import checkpoints
from nets import disk
from nets.same import same_weights


def say(line: str) -> None:
    if ranks.rank() == 0:
        tqdm.write("\n".join(map(legible, line.split("\n"))))


# --- the folder ----------------------------------------------------------------------------------


def take_folder(folder: Path, held: ExitStack, flag: str = "--out") -> None:
    """Made if need be; no other run writes there until `held` is closed. OSError, on all ranks."""

    def take() -> None:
        if ranks.rank() == 0:
            held.enter_context(disk.hold(folder, flag))

    ranks.on_all_ranks(take)


def settings_of(cfg: Config, parts: dict, same: dict) -> dict:
    """What config.json says. parts: what tells files from others, by part; same: the data."""
    made = dataclasses.asdict(cfg) | {"world": ranks.world(), "parts": parts, "identity": same}
    return json.loads(json.dumps(made))


def saved_settings(out: Path) -> dict | None:
    """Those of the run that is there: config.json, or, where that is damaged, what its newest
    checkpoint says; None if there is no run. Refusal."""
    path, found = out / "config.json", checkpoints(out / "checkpoints")
    for place in (path, *(checkpoint / "extra.json" for checkpoint in found)):
        try:
            said = json.loads(place.read_bytes())
            said = said if place == path else said["config"]
            counts = (said["batch"], said.get("accumulate", 1), said.get("world", 1))
            if all(isinstance(count, int) for count in counts):
                return said
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    if path.exists() or found:
        raise Refusal(
            f"{path} is {'damaged' if path.exists() else 'gone'}, and {len(found)} checkpoints say "
            "nothing in its place; start anew with --overwrite, or choose another --out"
        )
    return None


def check_run(cfg: Config, out: Path, settings: dict, data: object = None) -> None:
    """Refusal if the folder holds a run of another configuration, or of other data."""
    old = saved_settings(out)
    if old is None:
        return
    changed = differences(old, cfg) + changes(old, settings["identity"], cfg.data, data)
    changed += other_weights(old, cfg, settings["parts"])
    if changed:
        raise Refusal(
            f"{out} holds a run of another configuration ({'; '.join(changed)}); "
            "choose another folder with --out, or start anew with --overwrite"
        )


def begin(out: Path, settings: dict, overwrite: bool) -> None:
    """Rank 0, when the networks stand: what was refused until then has changed nothing.

    Checkpoints leave their name before the new configuration comes, so that a run that is killed
    between the two does not continue from another's.
    """
    if ranks.rank() > 0:
        return
    folder, old = out / "checkpoints", out / "checkpoints.old"
    disk.remove(old)
    if overwrite and (folder.exists() or folder.is_symlink()):
        os.rename(folder, old)
    disk.write_text(out / "config.json", json.dumps(settings, indent=1))
    disk.remove(old)


def other_weights(old: dict, cfg: Config, parts: dict) -> list[str]:
    """Parts whose weights are not those of before, whatever their files are called now."""
    before, changed = old.get("parts", {}), []
    was, now = (x or "the official file" for x in (old.get("base"), cfg.base))
    files = {"denoiser": (f"{was} ", f"{now} ")}
    for part, found in parts.items():
        if not same_weights(before.get(part, found), found):
            a, b = files.get(part, ("", ""))
            both = f"{a}{before[part]['digest']} -> {b}{found['digest']}"
            changed.append(f"the weights of the {part}: {both}")
    return changed


def keep_samples(cfg: Config, out: Path) -> Config:
    """A run that continues sees the same samples in an iteration, on any number of ranks.

    --accumulate makes up for ranks that came or went. ValueError where it cannot.
    """
    saved, world = saved_settings(out), ranks.world()
    if saved is None:
        return cfg
    each = saved["batch"] * saved.get("accumulate", 1)  # of a rank
    total = each * saved.get("world", world)
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


# --- the log -------------------------------------------------------------------------------------

LOSSES = ["dmd", "isg", "gan", "fake", "disc"]  # shown first


def order(name: str) -> tuple:
    """Of columns: step, losses, norms of gradients, the rest as it came."""
    rank = LOSSES.index(name) if name in LOSSES else len(LOSSES)
    return name != "step", rank, not name.startswith("norm_")


class LogFile:
    """log.csv, one row an iteration. A value that is new gets a column, empty in earlier rows."""

    def __init__(self, path: Path, step: int):
        """Rows from `step` on, where a run is resumed, are dropped; so is what is no row of it."""
        self.path, self.columns = path, ["step"]
        self.begin([row for row in self.rows() if int(row["step"]) < step])

    def rows(self) -> list[dict[str, str]]:
        """By step, each once, the first that names it: what a crash or another process left between
        them is no row of this log."""
        if not self.path.is_file():
            return []
        with open(self.path, newline="", errors="replace") as file:
            lines = [line for line in file if "\0" not in line]
        reader = csv.DictReader(lines)
        if "step" not in (reader.fieldnames or ()):
            return []
        self.columns, found = list(reader.fieldnames), {}
        for row in reader:
            if None not in row and None not in row.values() and (row["step"] or "").isdecimal():
                found.setdefault(int(row["step"]), row)
        return [row for _, row in sorted(found.items())]

    def begin(self, rows: list[dict[str, str]]) -> None:
        """The file anew, complete or as it was, then open for more."""
        with disk.whole(self.path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        self.file = open(self.path, "a", newline="", buffering=1)  # noqa: SIM115 (as long as the run)
        self.writer = csv.DictWriter(self.file, self.columns, restval="")

    def write(self, step: int, values: dict[str, float]) -> None:
        """OSError."""
        row = {"step": step} | {name: f"{value:.6g}" for name, value in values.items()}
        if not row.keys() <= set(self.columns):
            self.file.close()
            rows = self.rows()
            self.columns = sorted(dict.fromkeys([*self.columns, *row]), key=order)
            self.begin(rows)
        try:
            self.writer.writerow(row)
        except OSError as error:
            raise disk.failed(self.path, error) from None


def open_board(out: Path, step: int):
    """A writer for TensorBoard where that is installed, else None; rows from `step` on are new."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step)


# --- from step to step ---------------------------------------------------------------------------

IN_A_ROW = 10  # updates of one network that were skipped end a run
COUNTS = ("turns", "skipped", "in_a_row")  # by network; what `Run` carries of them


class Run:
    """What a run carries from step to step beside weights."""

    def __init__(self):
        """From here on SIGTERM and Ctrl-C are heard: see `hear`."""
        self.exams: list[dict] = []  # short exams so far
        self.best: dict = {}  # of --keep-best: measure, value, step
        self.watch: dict = {}  # where the student began, what is out of the band, and was
        self.turns: Counter[str] = Counter()  # by network: its updates so far
        self.skipped: Counter[str] = Counter()  # those that were not finite
        self.in_a_row: Counter[str] = Counter()  # the last of them
        self.settings: dict = {}  # what config.json says
        self.stop = ""  # the signal that asked for an end
        self.patient = False
        self.saved = time.monotonic()  # when this run was
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as behind "&" in a script
                signal.signal(number, self.hear)

    def hear(self, number: int, _=None) -> None:
        """In an iteration a signal is heeded when that ends, elsewhere at once. A second Ctrl-C is
        the system's, which ends a process wherever it is, with 130."""
        self.stop = self.stop or signal.Signals(number).name
        if not self.patient:
            raise ranks.Stopped(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if ranks.rank() == 0:  # not by print, which may be what was interrupted
                os.write(2, b"\nCtrl-C: saves when this iteration ends; once more stops at once\n")

    @contextmanager
    def iterating(self) -> Iterator[None]:
        """Inside, signals wait."""
        self.heed()
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
        self.heed()

    def heed(self) -> None:
        """Of a signal that came when nothing could be done about it."""
        if self.stop:
            raise ranks.Stopped(signal.Signals[self.stop])

    def count(self, values: dict[str, float]) -> str:
        """Of what train_step returned. What there is to say of an update that was skipped, now and
        then; FloatingPointError when IN_A_ROW of a network's were."""
        news = []
        for name in [key.removeprefix("norm_") for key in values if key.startswith("norm_")]:
            self.turns[name] += 1
            if not values.get(f"skipped_{name}"):
                self.in_a_row[name] = 0
                continue
            self.in_a_row[name] += 1
            self.skipped[name] += 1
            count = self.skipped[name]
            if self.in_a_row[name] == IN_A_ROW:
                raise FloatingPointError(
                    f"{IN_A_ROW} updates of the {name} in a row had a loss or a gradient that is "
                    "not finite"
                )
            if count & (count - 1) == 0:  # 1, 2, 4, 8 ...
                news.append(f"{name}: {count} of {self.turns[name]}")
        return f"updates skipped, not finite: {', '.join(news)}" if news else ""

    def check_learned(self) -> None:
        """FloatingPointError where a network's every update was skipped: it is as it began."""
        for name, count in self.skipped.items():
            if count == self.turns[name]:
                raise FloatingPointError(
                    f"all {count} updates of the {name} had a loss or a gradient that is not finite"
                )

    def is_due(self, cfg: Config, done: int, device: torch.device) -> tuple[bool, bool]:
        """Whether to save after so many iterations, and to stop then; alike on all ranks.

        At the end, every save_every-th, after save_minutes on any rank's clock, on a signal.
        """
        late = 0 < cfg.save_minutes < (time.monotonic() - self.saved) / 60
        asked = not ranks.agree(not (self.stop or late), device)
        stop = asked and not ranks.agree(not self.stop, device)
        save = asked or done == cfg.steps or done % cfg.save_every == 0
        self.saved = time.monotonic() if save else self.saved
        return save, stop

    def state(self) -> dict:
        kept = {"exams": self.exams, "best": self.best, "watch": self.watch}
        return kept | {name: dict(getattr(self, name)) for name in COUNTS}

    def resume(self, state: dict) -> int:
        """Returns the first step to do."""
        self.exams = state["exams"]
        self.best, self.watch = state.get("best", {}), state.get("watch", {})
        for name in COUNTS:
            found = state.get(name)  # a number, or absent, in checkpoints of earlier versions
            setattr(self, name, Counter(found if isinstance(found, dict) else {}))
        return state["step"]
