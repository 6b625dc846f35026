"""The floors of the house, and that README and notes name what exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("teachers", "nets", "dataset", "engine", "measure", "digits", "plane")
COMMANDS = {"train", "sample", "evaluate", "toy"}
RUN_AS_MODULES = {"engine.bench", "digits.pretrain", "digits.ablation"}
RUN_AS_MODULES |= {"digits.search", "plane.__main__"}
# What a file may import of ours, by file or folder; a file that is not here may import anything
# below it. Floors from the ground: nets, config, schedule; ideas and model; what stands around a
# network (dataset, measure, ranks, pictures, the embedded task); teachers; what is built of them;
# commands.
GROUND = {"nets", "config", "schedule"}
AROUND = GROUND | {"dataset", "measure", "digits", "engine.ranks", "engine.pictures"}
ALLOWED = {
    "config": {"nets.letters"},
    "schedule": {"nets"},
    "nets": {"nets", "config"},  # of config what refuses
    "ida": set(),
    "dmd": {"schedule"},
    "isg": {"schedule"},
    "adapter": {"schedule"},
    "discriminator": {"nets", "schedule"},
    "model": GROUND,
    "engine.ranks": GROUND,
    "engine.checkpoint": GROUND | {"engine.ranks"},
    "engine.lettering": {"config", "nets.letters"},
    "engine.pictures": {"config", "engine.lettering", "measure", "nets"},
    "dataset": GROUND | {"dataset", "engine.ranks"},
    "measure": GROUND | {"measure"},
    "digits.words": {"config"},
    "digits.scenes": {"config", "digits", "digits.words", "schedule"},
    "digits.judge": {"digits", "nets"},
    "digits.exam": AROUND,
    "teachers": AROUND | {"adapter", "model", "teachers"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path
    for path in [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).glob("*.py"))]
}


def imports(name: str) -> set[str]:
    """Our own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inner or {node.module}
    return found & FILES.keys()


def covers(allowed: set[str], name: str) -> bool:
    return name in allowed or (
        name.split(".")[0] in allowed and name.split(".")[0] not in ("digits",)
    )


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down(name):
    """Supporting files import what is on their floor or below; nothing imports a command, but
    timing.py times train.py's step, and the search runs as the ablation does."""
    allowed = ALLOWED.get(name, ALLOWED.get(name.split(".")[0]))
    for used in imports(name):
        known = (name, used) in {("engine.timing", "train"), ("digits.search", "digits.ablation")}
        assert used not in COMMANDS | RUN_AS_MODULES or known, f"{name} imports the command {used}"
        if allowed is not None:
            within = used.split(".")[0] == "digits" and "digits" in allowed
            assert covers(allowed, used) or within, f"{name} may not import {used}"


def test_imports_make_no_circle():
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"a circle: {' -> '.join((*path, name))}"
        if name not in state:
            state[name] = 1
            for used in imports(name):
                visit(used, (*path, name))
            state[name] = 2

    for name in FILES:
        visit(name, ())


def test_the_root_shows_the_paper():
    """At most 12 files there, none with a name that says nothing."""
    assert len([*ROOT.glob("*.py")]) <= 12
    for name in FILES:
        assert name.split(".")[-1] not in ("utils", "common", "helpers", "misc")


@pytest.mark.parametrize("name", sorted(FILES))
def test_nobody_outside_teachers_asks_which_teacher(name):
    """No branch on a teacher's name, class or configuration."""
    asked = r"teacher *(==|in |\.startswith)|isinstance\(.*(Config|Flux|MMDiT|UNet)\b"
    if not name.startswith("teachers"):
        for number, line in enumerate(FILES[name].read_text().splitlines(), 1):
            assert not re.search(asked, line), f"{name}, line {number}: {line.strip()}"


@pytest.mark.parametrize("name", ["dmd", "ida", "isg", "adapter", "discriminator", "schedule"])
def test_idea_files_know_nothing_of_machines_files_and_flags(name):
    text = (ROOT / f"{name}.py").read_text()
    for word in ("cuda", "distributed", "argparse", "open(", "os.environ", "Path"):
        assert word not in text, f"{name}.py mentions {word}"


LENGTHS = {"train": 350, "toy": 160}  # lines; others 500, the planner aside


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"engine.plan"}))
def test_files_can_be_read_in_one_sitting(name):
    """And no function must be scrolled through."""
    text = FILES[name].read_text()
    lines, most = len(text.splitlines()), LENGTHS.get(name, 500)
    assert lines <= most, f"{name} has {lines} lines, more than {most}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{name}: {node.name} has {size} lines"


def functions(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def test_the_readmes_table_of_ideas_names_what_exists():
    """Every `file.py:name` and every `tests/file.py:name` is there."""
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"`([\w/]+\.py):(\w+)`", readme)
    assert len(named) > 20
    for file, name in named:
        assert name in functions(ROOT / file), f"README names {name}, which is not in {file}"


def test_the_readme_counts_what_must_be_read_to_follow_the_paper():
    """train.py's step and what it calls: files and lines, as the README says."""
    paper = ("dmd", "ida", "isg", "discriminator", "schedule", "train")
    lines = sum(len(FILES[name].read_text().splitlines()) for name in paper)
    said = re.search(r"(\d+) files, ([\d,]+) lines", (ROOT / "README.md").read_text())
    assert said, "README says how much must be read"
    assert (int(said[1]), int(said[2].replace(",", ""))) == (len(paper), lines)


def test_the_readmes_file_list_is_complete():
    readme = (ROOT / "README.md").read_text()
    for path in FILES.values():
        if not path.name.startswith("__"):
            assert path.name in readme, f"README does not list {path.name}"


def test_the_notes_name_tests_that_exist():
    every = set().union(*(functions(path) for path in (ROOT / "tests").glob("test_*.py")))
    for note in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(test_\w+)`", note.read_text()):
            assert name in every, f"{note.name} names {name}, which is no test"
