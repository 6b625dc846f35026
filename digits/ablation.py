"""What each part of the method does on the embedded task: every combination of IDA, ISG and the
discriminator, students trained for fewer steps, and adapters, over several seeds.

    python -m digits.ablation                            # every kind of run, seeds 0, 1 and 2
    python -m digits.ablation --kinds dmd all --seeds 0

A run is train.py with the flags of its kind, in a folder KIND-SEED. It has one thread, and --jobs
run at once: another number of threads adds in another order, and so ends with another student. A
finished run is kept, an interrupted one continues. Every student is then examined at 1, 2, 4 and 8
steps, and the guided teacher at 50, 4, 2 and 1.

Writes table.md (mean and spread, the standard deviation, over seeds), metrics.json (every row of
every run) and ablation.png.
"""

from engine.flags import KINDS, ablation_arguments

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    ablation_arguments(__doc__)

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import torch
from tqdm import tqdm

from digits.exam import COLUMNS, Exam, aligned, exam_row, student_times, teacher_rows
from engine import ranks
from engine.pictures import Graph, graphs_alone
from nets.disk import hold, try_folder, write_text
from teachers import find
from teachers.students import load_student, student_taus

TEACHER = find("digits")
PRESET = TEACHER.preset
FEWER = ("two", "one")
ADAPTERS = ("lora", "lora-4", "lora-64", "lora-random", "lora-both", "lora-no-ida")
WITHOUT = ("--exam-every", "0", "--watch-every", "0")  # what a run here does without
COUNTS = (1, 2, 4, 8)  # steps at which a student is examined
HOW = (torch.float32, torch.device("cpu"))


# --- one run -------------------------------------------------------------------------------------


def flags_of(own: str, seed: int, steps: int | None) -> list[str]:
    """train.py's, all but --out. own: a kind's."""
    flags = ["--seed", str(seed), "--no-table", *WITHOUT, *own.split()]
    return flags if steps is None else [*flags, "--steps", str(steps)]


def rows_of(kind: str, seed: int, given: argparse.Namespace, exam: Exam, stop: Event) -> list[dict]:
    """A run's student, examined. The rows are kept in its folder.

    stop: set when any run has failed, or all are to end.
    """
    folder = given.out / f"{kind}-{seed}"
    flags = flags_of(given.known[kind][1], seed, given.steps)
    kept, student = folder / "exam.json", folder / "student.safetensors"
    if rows := read_rows(kept, flags, student):
        return rows
    if stop.is_set():
        raise CancelledError
    train(flags, folder, stop)
    rows = examine(exam, student)
    write_text(kept, json.dumps({"key": key_of(flags, student), "rows": rows}, indent=1))
    return rows


def key_of(flags: list[str], student: Path) -> str:
    """Of all that a run's rows depend on, but for the code."""
    choices = repr((flags, PRESET, TEACHER.fewer, COUNTS)).encode()
    return hashlib.blake2b(choices + student.read_bytes(), digest_size=8).hexdigest()


def read_rows(kept: Path, flags: list[str], student: Path) -> list[dict]:
    """What was kept of this very student; none if that is absent, damaged or another's."""
    try:
        saved = json.loads(kept.read_text())
        return saved["rows"] if saved["key"] == key_of(flags, student) else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def train(flags: list[str], folder: Path, stop: Event) -> None:
    """ChildProcessError with the last of what train.py said, if it did not come to its end."""
    command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), "--out", str(folder)]
    env, log = os.environ | {"OMP_NUM_THREADS": "1"}, folder.with_suffix(".txt")
    with log.open("w") as said:
        began = os.fstat(said.fileno()).st_mtime_ns
        output = {"stdout": said, "stderr": subprocess.STDOUT}
        # In a group of its own: a Ctrl-C is for this command, which ends its runs by SIGTERM.
        run = subprocess.Popen([*command, *flags], env=env, process_group=0, **output)
        while run.poll() is None:
            if stop.wait(0.2):
                run.terminate()  # it saves, then stops
                run.wait()
    done = folder / "metrics.json"  # the last that train.py writes
    if not done.is_file() or done.stat().st_mtime_ns < began:
        stop.set()
        *_, last = ["nothing", *log.read_text().splitlines()]
        raise ChildProcessError(
            f"train.py {' '.join(flags)} said: {last} (the rest is in {log}; or give another --out)"
        )


def examine(exam: Exam, path: Path) -> list[dict]:
    """The student's rows, at each of COUNTS."""
    student, about = load_student(path, *HOW)
    student.requires_grad_(False).eval()
    taus = student_taus(about)
    times = [student_times(student, taus, steps) for steps in COUNTS]
    return [exam_row(exam, "student", student, given, "x0") for given in times]


# --- all of them ---------------------------------------------------------------------------------


def table(known: dict, teacher: list[dict], students: dict[str, list[list[dict]]]) -> str:
    """Markdown. students: kind -> per seed its rows, one for each of COUNTS; known: the kinds."""
    cells = [["parts", "steps", "NFE", *(title for _, title, _ in COLUMNS)]]
    for row in teacher:
        values = [format(row[key], form) for key, _, form in COLUMNS]
        steps = row["nfe"] // 2  # guidance takes two evaluations a step
        cells.append(["teacher, guided", str(steps), str(row["nfe"]), *values])
    for kind, runs in students.items():
        for rows in zip(*runs, strict=True):
            values = [spread([row[key] for row in rows], form) for key, _, form in COLUMNS]
            nfe = str(rows[0]["nfe"])
            cells.append([known[kind][0], nfe, nfe, *values])
    return aligned(cells)


def spread(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def picture(path: Path, teacher: list[dict], students: dict[str, list[list[dict]]]) -> None:
    """FD-T over the network evaluations; bands are least and most of the seeds."""
    few, graphs = teacher[:0:-1], []  # without its 50 steps
    nfe, fd = [row["nfe"] for row in few], [[row["fd"] for row in few]]
    for title, kinds in (
        ("FD-T, by parts", [kind for kind in KINDS if kind not in FEWER + ADAPTERS]),
        ("FD-T, trained for 4, 2, 1 steps", ("all", *FEWER)),
        ("FD-T, adapters", ADAPTERS),
    ):
        kinds, lines = [kind for kind in kinds if kind in students], {"teacher, guided": (nfe, fd)}
        if graphs and set(kinds) <= {"all"}:
            continue  # nothing that the first does not show
        for kind in kinds:
            y = [[row["fd"] for row in rows] for rows in students[kind]]
            lines[KINDS[kind][0]] = (list(COUNTS), y)
        graphs.append(Graph(title, "network evaluations", "log", lines))
    graphs_alone(path, graphs)


def run_all(given: argparse.Namespace, exam: Exam) -> dict[str, list[list[dict]]]:
    """Kind -> per seed its rows."""
    students: dict[str, dict[int, list[dict]]] = {kind: {} for kind in given.kinds}
    every = [(kind, seed) for seed in given.seeds for kind in given.kinds]
    stop = Event()
    with ThreadPoolExecutor(given.jobs) as pool, tqdm(total=len(every), desc="runs") as bar:
        try:
            asked = {pool.submit(rows_of, *run, given, exam, stop): run for run in every}
            for done in as_completed(asked):
                if isinstance(done.exception(), CancelledError):
                    continue  # because of another's error, which is still to come
                kind, seed = asked[done]
                students[kind][seed] = done.result()
                bar.update()
        finally:
            stop.set()
    return {kind: [rows[seed] for seed in given.seeds] for kind, rows in students.items()}


def main() -> None:
    given = ablation_arguments(__doc__)
    teacher, students = examine_all(given)
    show_table(given, teacher, students)
    picture(given.out / "ablation.png", teacher, students)
    print(f"{given.out}: table.md, metrics.json, ablation.png, and a folder for each run")


def show_table(
    given: argparse.Namespace, teacher: list[dict], students: dict[str, list[list[dict]]]
) -> None:
    """On screen, and in table.md."""
    text = table(given.known, teacher, students)
    print(text)
    write_text(given.out / "table.md", text + "\n")


def examine_all(given: argparse.Namespace) -> tuple[list[dict], dict[str, list[list[dict]]]]:
    """The teacher's rows, and the students' by kind and seed; metrics.json has both."""
    for name in ("kinds", "seeds"):
        setattr(given, name, list(dict.fromkeys(getattr(given, name))))
    torch.set_num_threads(1)  # beside it train others
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ranks.refusals(interrupted="interrupted; the same command continues"):
        try_folder(given.out)
        exam = Exam(PRESET.guidance)
        teacher = TEACHER.load(PRESET.shift, TEACHER.locate()["denoiser"], *HOW)
        teacher.requires_grad_(False).eval()
        exam.ask_teacher(teacher)
        with hold(given.out):
            students = run_all(given, exam)
            rows = [row for row in teacher_rows(exam, teacher) if row["name"].endswith(", guided")]
            metrics = {"seeds": given.seeds, "teacher": rows, "students": students}
            write_text(given.out / "metrics.json", json.dumps(metrics, indent=1))
    return rows, students


if __name__ == "__main__":
    main()
