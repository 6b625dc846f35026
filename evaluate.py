"""The measures of a student beside its teacher's, at several numbers of steps.

    python evaluate.py --student runs/digits/student.safetensors
    python evaluate.py --teacher FILE --student FILE --out folder
    python evaluate.py --runs runs/all-0 runs/all-1 runs/all-2 runs/dmd-0 ...

Teacher and student are any two files in the teacher's format (--teacher also takes a name). Prints
the table that train.py ends with; writes metrics.json and samples.png to --out, if given. --runs
reads what finished runs measured: folders NAME-SEED become one row, mean and spread (standard
deviation) over seeds, of the student at its own number of steps.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from config import TEACHERS, Parser, refuse
from exam import COLUMNS, Exam, exam_table, format_table
from pictures import exam_pictures
from teachers import load_denoiser, load_student, load_teacher


def summary(runs: list[Path]) -> str:
    """A Markdown table: one line per run name and sampler, "mean ± spread" over its seeds."""
    seeds: dict[str, list[dict]] = {}
    for run in runs:
        if not (run / "metrics.json").is_file():
            raise ValueError(
                f"{run} holds no metrics.json; --runs takes output folders of train.py"
            )
        metrics = json.loads((run / "metrics.json").read_text())
        steps = metrics["config"]["student_steps"]
        for row in metrics.get("table", ()):
            if row["name"].startswith(f"student {steps},"):
                name = run.name.rpartition("-")[0] + "," + row["name"].partition(",")[2]
                seeds.setdefault(name, []).append(row)
    lines = ["| run, sampler | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + " |"]
    lines.append("|---|" + "--:|" * (1 + len(COLUMNS)))
    for name, rows in seeds.items():
        cells = []
        for key, _, form in COLUMNS:
            values = [row[key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):{form}} ± {spread:{form}}")
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--teacher", default="digits", help=f"a file, or {', '.join(TEACHERS)}")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--student", type=Path, help="a student saved by train.py")
    which.add_argument(
        "--runs", type=Path, nargs="+", help="output folders of train.py to summarise"
    )
    parser.add_argument("--guidance", type=float, help="the teacher's; default: its own")
    parser.add_argument("--out", type=Path, help="folder for metrics.json and samples.png")
    given = parser.parse_args()
    try:
        if given.runs:
            print(summary(given.runs))
            return
        student, about = load_student(given.student)
        preset = TEACHERS[about["teacher"]]
        if given.teacher in TEACHERS:
            teacher = load_teacher(given.teacher, preset.shift)
        else:
            teacher = load_denoiser(about["teacher"], preset.shift, Path(given.teacher))
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher, student = teacher.to(device), student.to(device)
        exam = Exam(preset.guidance if given.guidance is None else given.guidance)
        exam.ask_teacher(teacher)
    except (ValueError, OSError) as error:
        refuse(error)
    taus = json.loads(about["taus"])
    rows = exam_table(exam, student, taus, teacher)
    print(format_table(rows))
    if given.out:
        settings = {"teacher": given.teacher, "student": str(given.student)}
        (given.out / "metrics.json").write_text(json.dumps(settings | {"table": rows}, indent=1))
        exam_pictures(given.out / "samples.png", exam, teacher, student, taus)


if __name__ == "__main__":
    main()
