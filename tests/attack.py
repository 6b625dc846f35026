"""Attacks real runs and counts what goes wrong: by hand, in minutes. See docs/robustness.md.

    python -m tests.attack                            # everything
    python -m tests.attack kills --points 60          # kills | disk | damage | files | two

kills   SIGKILL at random points, of runs in five settings that are started again until they end
disk    a disk that is full at each write in its turn (a small tmpfs where it may be mounted, else a
        limit on the length of files), then has room
damage  every kind of damage to the newest checkpoint, and to all
files   damaged, foreign and strange weights and data
two     two processes in one folder, one cache, at random distances

Prints per attack how many were played and how many were lost (less is there than was, or no end is
reached), different (from an undisturbed run), tracebacks, and hung. All are to be 0.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import processes
import torch
from PIL import Image
from small import SMALL, make_official
from test_faults import DAMAGE

import evaluate
import teachers
from nets.weights import digest
from teachers.students import load_student

PATIENCE = 240  # seconds, after which a process hangs
SHORT = ("--no-table", "--exam-every", 0, "--save-every", 1, "--steps", 6, "--batch", 2)
DIGITS = (*SHORT, "--ttur", 2, "--disc-channels", 16)
TEACHER, SIDE = "sd35-medium", (32, 32)
FLAT = ("--teacher", TEACHER, *SHORT, "--size", *SIDE, "--ttur", 1, "--no-bf16", "--no-isg")


class Attack:
    """A folder, what was counted, and runs in it."""

    def __init__(self, folder: Path, points: int):
        self.folder, self.points, self.counts = folder, points, Counter()
        self.draw, self.made = random.Random(0), 0

    def new(self) -> Path:
        self.made += 1
        return self.folder / f"{self.made:03d}"

    def start(self, world: int, printed: Path, function: Callable, *given) -> list:
        return processes.launch(function, world, printed, *given)

    def end(self, run: list, printed: Path) -> set[int]:
        """Exit codes; counts what hung, and tracebacks."""
        codes = {*processes.join(run, PATIENCE)}
        self.counts["hung"] += None in codes
        self.look(printed)
        return codes

    def look(self, printed: Path) -> None:
        text = printed.read_text(errors="replace") if printed.exists() else ""
        if "Traceback" in text:
            self.counts["traceback"] += 1
            print(text[-3000:], flush=True)
        printed.unlink(missing_ok=True)

    def run(self, world: int, function: Callable, *given) -> tuple[set[int], str]:
        printed = self.folder / "printed.txt"
        codes = {*processes.join(self.start(world, printed, function, *given), PATIENCE)}
        text = printed.read_text(errors="replace")
        self.counts["hung"] += None in codes
        self.look(printed)
        return codes, text

    def compare(self, out: Path, wanted: str) -> None:
        """Of a run that came to its end."""
        try:
            self.counts["different"] += result(out) != wanted
        except (OSError, ValueError) as error:
            print(f"lost: {error}", flush=True)
            self.counts["lost"] += 1


def command(flags: list) -> None:
    """train.py, its small teachers known."""
    teachers.FOUND |= SMALL
    processes.command(flags)


def judge(flags: list) -> None:
    """evaluate.py."""
    sys.argv = ["evaluate.py", *map(str, flags)]
    evaluate.main()


def result(out: Path) -> str:
    """Of all that a run leaves."""
    if (out / "evaluation").exists():
        pictures = sorted((out / "evaluation" / "images").rglob("*.png"))
        return repr([np.asarray(Image.open(path)).tobytes()[::97] for path in pictures])
    teachers.FOUND |= SMALL
    log = (out / "log.csv").read_text()
    steps = [line.split(",")[0] for line in log.splitlines()]
    student, how = out / "student.safetensors", (torch.float32, "cpu")
    net, _ = load_student(student, *how, weights=folder_of_weights(out))
    return digest(net) + repr(steps)


def folder_of_weights(out: Path) -> str:
    return json.loads((out / "config.json").read_text())["weights"]


def newest(out: Path) -> str:
    return max((p.name for p in out.glob("checkpoints/step-????????")), default="")


# --- what is attacked ----------------------------------------------------------------------------


def make_data(folder: Path) -> Path:
    folder.mkdir()
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a red fox {k}")
    return folder


def settings(attack: Attack) -> dict[str, tuple[int, Callable, Callable[[Path], list]]]:
    """Ranks, what runs, and its flags for a folder."""
    data, weights = make_data(attack.folder / "data"), attack.folder / "weights"
    make_official(TEACHER, weights)
    flat = [*FLAT, "--weights", weights, "--data", data]
    student = attack.folder / "student.safetensors"
    prompts = attack.folder / "prompts.txt"
    prompts.write_text(
        "a digit and a one\na red two above a digit\na two and a one\na one and a six\n"
    )

    def measured(out: Path) -> list:
        out.mkdir(exist_ok=True)
        if not student.exists():
            codes, _ = attack.run(0, command, [*DIGITS, "--steps", 1, "--out", attack.folder / "s"])
            assert codes == {0}
            shutil.copy(attack.folder / "s" / "student.safetensors", student)
        asked = ["--prompts", prompts, "--images", 32, "--steps", "1", "--teacher-steps", 2]
        return ["--student", student, *asked, "--resamples", 2, "--out", out / "evaluation"]

    return {
        "one process": (0, command, lambda out: [*DIGITS, "--out", out]),
        "two ranks, shards": (2, command, lambda out: [*DIGITS, "--shard", "fsdp", "--out", out]),
        "adapters": (0, command, lambda out: [*flat, "--adapter", 4, "--out", out]),
        "a cache": (0, command, lambda out: [*flat, "--cache", out / "cache", "--out", out]),
        "evaluate.py": (0, judge, measured),
    }


# --- the attacks ---------------------------------------------------------------------------------


def kills(attack: Attack, of: dict) -> None:
    """In each setting a share of the points, on one folder after the other's death."""
    for name, (world, function, flags) in of.items():
        whole, out, printed = attack.new(), attack.new(), attack.folder / "printed.txt"
        began = time.time()
        codes, text = attack.run(world, function, flags(whole))
        seconds, wanted = time.time() - began, ""
        assert codes == {0}, text[-2000:]
        wanted, left = result(whole), -(-attack.points // len(of))
        for _ in range(left):
            before = newest(out)
            run = attack.start(world, printed, function, flags(out))
            time.sleep(attack.draw.uniform(0, seconds))
            for process in run:
                process.kill()
            processes.join(run)
            attack.counts["played"] += 1
            attack.counts["lost"] += newest(out) < before
            attack.look(printed)
            if (out / "student.safetensors").exists() and attack.draw.random() < 0.5:
                attack.compare(out, wanted)  # it may have come to its end
                shutil.rmtree(out)
        codes, text = attack.run(world, function, flags(out))
        if codes != {0}:
            print(f"{name}: {codes} {text[-500:]}", flush=True)
            attack.counts["lost"] += 1
        attack.compare(out, wanted)
        shutil.rmtree(out), shutil.rmtree(whole)


@contextlib.contextmanager
def disk_of(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs of so many bytes; False where none may be mounted."""
    folder.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = subprocess.run(how, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def full_disk(attack: Attack, of: dict) -> None:
    """Room for so much and no more; then for all. Of one process, and of a cache."""
    for name in ("one process", "a cache"):
        world, function, flags = of[name]
        whole = attack.new()
        assert attack.run(world, function, flags(whole))[0] == {0}
        wanted = result(whole)
        most = 3 * sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
        for k in range(max(2, attack.points // 6)):
            folder = attack.new()
            with disk_of(
                folder, max(4096, int(most * (k / max(2, attack.points // 6)) ** 2))
            ) as small:
                out = folder / "run"
                limited = [flags(out)] if small else [flags(out), 20_000 * (1 + k)]
                codes, text = attack.run(world, limits if not small else function, *limited)
                attack.counts["played"] += 1
                lines = [x for x in text.splitlines() if "train.py: " in x]
                if codes == {2} and (
                    len(lines) != 1 or (small and "is the disk full?" not in text)
                ):
                    print(f"not one line of a full disk: {text[-500:]}", flush=True)
                    attack.counts["lost"] += 1
                elif not codes <= {0, 2}:
                    attack.counts["lost"] += 1
                if small:
                    grow = ["mount", "-o", f"remount,size={2 * most}", folder]
                    subprocess.run(grow, check=True)
                codes, text = attack.run(world, function, flags(out))
                if codes != {0}:
                    print(f"{name}, with room again: {text[-500:]}", flush=True)
                attack.compare(out, wanted)
            shutil.rmtree(folder, ignore_errors=True)


def limits(flags: list, limit: int) -> None:
    teachers.FOUND |= SMALL
    processes.command(flags, limit)


def damage(attack: Attack, of: dict) -> None:
    """Of the newest checkpoint of a run that has two; and of both."""
    world, function, flags = of["one process"]
    whole = attack.new()
    assert attack.run(world, function, flags(whole))[0] == {0}
    wanted = result(whole)
    for number, (kind, harm) in enumerate(DAMAGE.items()):
        if number >= attack.points:
            break
        out = attack.new()
        shutil.copytree(whole, out)
        (out / "student.safetensors").unlink()
        every = sorted(out.glob("checkpoints/step-*"))
        harm(every[-1])
        codes, text = attack.run(world, function, flags(out))
        attack.counts["played"] += 1
        if codes != {0} or "is damaged" not in text:
            print(f"{kind}: {text[-500:]}", flush=True)
            attack.counts["lost"] += 1
        attack.compare(out, wanted)
        for path in sorted(out.glob("checkpoints/step-*")):
            harm(path)
        before = sorted(map(str, out.rglob("*")))
        codes, text = attack.run(world, function, flags(out))
        if codes != {2} or "--overwrite" not in text or sorted(map(str, out.rglob("*"))) != before:
            print(f"{kind}, all: {text[-500:]}", flush=True)
            attack.counts["lost"] += 1
        shutil.rmtree(out)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


HARM = {
    "cut": cut,
    "noise": noise,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("gone")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def files(attack: Attack, of: dict) -> None:
    """One weights file, or all images, or all captions. Refused in one line (weights: and nothing
    left), or trained on what is sound."""
    world, function, flags = of["adapters"]
    weights, data = attack.folder / "weights", attack.folder / "data"
    targets = [[path] for path in sorted(weights.rglob("*")) if path.is_file()]
    targets += [[*data.glob("*.png")], [*data.glob("*.txt")], [data / "0.png"], [data / "0.txt"]]
    cases = [(which, kind) for which in targets for kind in HARM]
    attack.draw.shuffle(cases)
    for which, kind in cases[: attack.points]:
        kept = {path: path.read_bytes() for path in which}
        for path in which:
            HARM[kind](path)
        out = attack.new()
        codes, text = attack.run(world, function, [*flags(out), "--steps", 1])
        attack.counts["played"] += 1
        said = [line for line in text.splitlines() if line.startswith("train.py: ")]
        left = out.exists() and weights in which[0].parents
        if not codes <= {0, 2} or (codes == {2} and (len(said) != 1 or left)):
            print(f"{which[0].name}, {kind}: {codes} {text[-500:]}", flush=True)
            attack.counts["lost"] += 1
        shutil.rmtree(out, ignore_errors=True)
        for path, content in kept.items():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(content)


def two(attack: Attack, of: dict) -> None:
    """One ends well, the other is refused by the first's name, or comes after it."""
    for name in ("one process", "a cache", "evaluate.py"):
        world, function, flags = of[name]
        whole = attack.new()
        assert attack.run(world, function, flags(whole))[0] == {0}
        wanted = result(whole)
        for _ in range(max(1, attack.points // 12)):
            out, said = attack.new(), [attack.folder / f"printed-{k}.txt" for k in range(2)]
            first = attack.start(world, said[0], function, flags(out))
            time.sleep(attack.draw.uniform(0, 2))
            second = attack.start(world, said[1], function, flags(out))
            codes = [*processes.join(first, PATIENCE), *processes.join(second, PATIENCE)]
            attack.counts["played"] += 1
            attack.counts["hung"] += None in codes
            text = [path.read_text() for path in said]
            refused = [t for t, code in zip(text, codes, strict=True) if code == 2]
            if sorted(codes) not in ([0, 0], [0, 2]) or any(
                "held by pid" not in t for t in refused
            ):
                print(f"{name}: {codes} {text[0][-300:]} {text[1][-300:]}", flush=True)
                attack.counts["lost"] += 1
            for path in said:
                attack.look(path)
            attack.compare(out, wanted)
            shutil.rmtree(out)


ATTACKS = {"kills": kills, "disk": full_disk, "damage": damage, "files": files, "two": two}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("which", nargs="*", choices=[*ATTACKS, []], help="default: all")
    parser.add_argument("--points", type=int, default=60, help="of each; default: 60")
    given = parser.parse_args()
    total = Counter()
    for name in given.which or ATTACKS:
        began = time.time()
        with tempfile.TemporaryDirectory() as folder:
            attack = Attack(Path(folder), given.points)
            ATTACKS[name](attack, settings(attack))
        kinds = ("played", "lost", "different", "traceback", "hung")
        counts = ", ".join(f"{kind} {attack.counts[kind]}" for kind in kinds)
        print(f"{name}: {counts}; {time.time() - began:.0f} s", flush=True)
        total += attack.counts
    sys.exit(any(total[kind] for kind in ("lost", "different", "traceback", "hung")))


if __name__ == "__main__":
    main()
