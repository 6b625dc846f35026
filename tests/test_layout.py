"""The arrows between files, and that the README's tables name what exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"train", "sample", "evaluate", "ablation", "pretrain", "toy", "bench", "plane.__main__"}
MODULES = {p.stem for p in ROOT.glob("*.py")} | {
    f"{folder}.{p.stem}" for folder in ("nets", "plane") for p in (ROOT / folder).glob("*.py")
}
ALLOWED = {
    "config": set(),
    "schedule": set(),
    "parallel": set(),
    "ida": set(),
    "dmd": {"schedule"},
    "isg": {"schedule"},
    "discriminator": {"nets"},
    "images": {"schedule"},
    "cache": {"config", "schedule", "parallel", "nets", "images", "teachers"},
    "run": {"config", "parallel"},
    "data": {"config", "schedule", "parallel", "nets", "images"},
    "model": {"config", "schedule", "parallel", "nets"},
}


def imports(name: str) -> set[str]:
    """Our own modules that a file imports."""
    tree = ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    """Supporting files import nothing of ours, the ideas at most the schedule; nothing imports a
    command, but bench.py times train.py's."""
    allowed = {"nets"} if name.startswith("nets.") else ALLOWED.get(name)
    for used in imports(name):
        timed = (name, used) == ("bench", "train")
        assert used not in COMMANDS or timed, f"{name} imports the command {used}"
        if allowed is not None:
            assert used.split(".")[0] in allowed, f"{name} may not import {used}"


@pytest.mark.parametrize("name", ["dmd", "ida", "isg", "discriminator", "schedule"])
def test_idea_files_know_nothing_of_machines_files_and_flags(name):
    text = (ROOT / f"{name}.py").read_text()
    for word in ("cuda", "distributed", "argparse", "open(", "os.environ", "Path"):
        assert word not in text, f"{name}.py mentions {word}"


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


def test_the_readmes_file_list_is_complete():
    readme = (ROOT / "README.md").read_text()
    for path in [p for folder in (".", "nets", "plane") for p in (ROOT / folder).glob("[!_]*.py")]:
        assert path.name in readme, f"README does not list {path.name}"


def test_the_notes_name_tests_that_exist():
    every = set().union(*(functions(path) for path in (ROOT / "tests").glob("test_*.py")))
    for note in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(test_\w+)`", note.read_text()):
            assert name in every, f"{note.name} names {name}, which is no test"
