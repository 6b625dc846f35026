"""The pages as their readers use them: chapters are run, every command is taken by its own parser,
every link leads somewhere, every picture is drawn again at small size."""

import functools
import importlib.metadata
import os
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pages
import pytest
from own import make_own
from pages import CHAPTERS, PAGES, ROOT
from PIL import Image
from torch.distributed.run import get_args_parser

import evaluate
import sample
import train
from digits import search
from digits.words import DIGITS
from engine import flags, results
from plane import __main__ as plane
from plane import poster, reading, workers
from plane.scenarios import SCENARIOS

OWN = ROOT / "docs" / "own_teacher.md"
EXACT = ("1-flow", "2-few-steps", "3-scores", "8-flux")  # chapters that are run as they are
NUMBER = re.compile(r"[-+]?\.?\d[\d.,]*(e[-+]\d+)?")


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def small(monkeypatch):
    """Students and teachers of the plane, and heads, that learn for a few iterations."""
    learned, teach = reading.learned, workers.train_teacher
    told_apart = reading.told_apart

    def shorter(setting, seed=0):
        return learned(replace(setting, iterations=min(25, setting.iterations)), seed)

    monkeypatch.setattr(reading, "learned", shorter)
    monkeypatch.setattr(reading, "taught", functools.cache(workers.teach))
    monkeypatch.setattr(workers, "train_teacher", functools.partial(teach, steps=20))
    monkeypatch.setattr(workers, "sample_ode", lambda net, eps, *_: eps)  # how good they are: no
    fewer = functools.partial(told_apart, batch=2)
    monkeypatch.setattr(
        reading, "told_apart", lambda turns, reference, *_: fewer(min(4, turns), reference)
    )


def words_of(text: str) -> list[str]:
    """What was printed, numbers and space aside."""
    return NUMBER.sub("#", text).split()


def numbers_of(text: str) -> list[float]:
    return [float(x[0].replace(",", "").rstrip(".")) for x in NUMBER.finditer(text)]


# --- chapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_chapters_snippets_print_what_it_says(page, request):
    """Where it takes a second, to 2 % and .02 of each number: other processors add in another
    order. Else at small size, where the words are the same. A snippet leaves all as it was."""
    exact, names = page.stem in EXACT, {}
    if not exact:
        request.getfixturevalue("small")
    before = dict(vars(reading))
    found = pages.blocks(page, "python")
    assert found and all(block.printed for block in found)
    for block in found:
        printed = pages.run_block(block.text, names)
        assert words_of(printed) == words_of(block.printed)
        if exact:
            got, said = numbers_of(printed), numbers_of(block.printed)
            assert got == pytest.approx(said, rel=0.02, abs=0.02)
    assert dict(vars(reading)) == before


def test_a_reader_sees_ida_act_within_three_minutes(tmp_path, monkeypatch, capsys):
    """The README's first commands in their order, packages taken to be there. Of the last, the two
    rows that it is about, half as long: their time counts four times, in seconds of one core."""
    (block,) = [x for x in pages.blocks(ROOT / "README.md", "bash") if "git clone" in x.text]
    clone, enter, make, install, see = pages.commands(block.text)
    assert clone[:2] == ["git", "clone"] and enter == ["cd", clone[-1]]
    began = sum(os.times()[:4])  # of this process and of those it waited for
    aside = shutil.ignore_patterns(".*", "runs", "data", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, tmp_path / clone[-1], ignore=aside)
    monkeypatch.chdir(tmp_path / clone[-1])
    assert make == ["python3", "-m", "venv", ".venv"]
    assert install[:3] == [".venv/bin/pip", "install", "-r"]
    for line in Path(install[3]).read_text().split():
        importlib.metadata.version(re.split("[=>]", line)[0])  # or PackageNotFoundError

    assert see[:3] == [".venv/bin/python", "-m", "plane"]
    scenario = SCENARIOS["ida"]()
    two = {name: scenario.variants[name] for name in ("vanilla", "IDA")}
    two = {name: replace(setting, iterations=300) for name, setting in two.items()}
    monkeypatch.setitem(SCENARIOS, "ida", lambda: replace(scenario, variants=two))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one worker: each takes seconds to start
    monkeypatch.setattr(sys, "argv", see[2:])
    plane.main()
    assert 4 * (sum(os.times()[:4]) - began) < 180
    printed = capsys.readouterr().out
    rows = {line.split()[0]: numbers_of(line) for line in printed.splitlines() if "±" in line}
    assert rows["vanilla"][2] > 3.5 and rows["IDA"][2] < 2.2, printed  # peak position
    assert "1 of 1" in printed and "data against data" in printed
    with Image.open("runs/plane/ida.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    (chapter,) = (page for page in CHAPTERS if page.stem == "5-ida")
    (said,) = pages.blocks(chapter, "bash")
    assert pages.commands(said.text)[0][1:] == see[1:]
    assert {*words_of(printed)} <= {*words_of(said.printed)}


def test_the_chapters_have_the_form_that_the_index_promises():
    index = (ROOT / "docs" / "reading" / "index.md").read_text()
    assert len(CHAPTERS) == 8
    for page in CHAPTERS:
        text = page.read_text()
        assert text.count("\n") < 120 and f"]({page.name})" in index, page.name
        assert text.count("<details>") == text.count("</details>") == 2, page.name
        assert "\\operatorname" not in text, "GitHub takes no such macro"
        (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert picture == f"{Path(picture).stem}.png" and Path(picture).stem in reading.PICTURES
        assert pages.LINE.search(text) and "$" in text, page.name


def test_the_readme_has_what_three_readers_look_for():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 230
    assert any(line.startswith("![") for line in lines[:5])
    first = [k for k, line in enumerate(lines[:20]) if line.startswith("python3 -m venv")]
    assert len(first) == 2
    pictures = [line for line in lines if line.startswith("![")]
    assert "assets/algorithm.png" in pictures[1]
    places = [
        lines.index(f"## {x}") for x in ("See it work", "With the paper", "A model and a GPU")
    ]
    assert places == sorted(places)


# --- pictures ------------------------------------------------------------------------------------


def test_every_picture_of_the_chapters_is_drawn_by_its_script(command, small, tmp_path):
    """At a fiftieth of the points and iterations; as large as the one in the chapter, which is
    below 60 kB. (What stands above a picture of points may take another line: 16 pixels.)"""
    code, out, err = command(reading, "--share", 0.02, "--out", tmp_path)
    assert code == 0, err
    assert out.split() == [str(tmp_path / f"{name}.png") for name in reading.PICTURES]
    for name in reading.PICTURES:
        kept = ROOT / "docs" / "reading" / f"{name}.png"
        with Image.open(tmp_path / f"{name}.png") as drawn, Image.open(kept) as shown:
            assert drawn.size == shown.size, name
            assert len(drawn.convert("RGB").getcolors(1 << 20)) > 10, f"{name} is empty"
        assert kept.stat().st_size < 60_000, name


def test_the_poster_names_what_is_there_and_is_drawn_as_it_stands(command, tmp_path):
    for name, (_, *_, function, lines) in poster.BOXES.items():
        if function:
            file, _, what = function.partition(":")
            assert pages.line_of(ROOT / file, what), f"{name}: {function}"
            assert what in (ROOT / "train.py").read_text(), f"train.py does not call {what}"
        ideas = ("train", "dmd", "isg", "ida", "discriminator")
        code = "\n".join((ROOT / f"{idea}.py").read_text() for idea in ideas)
        for word in re.findall(r"\w+_\w+", lines):
            assert word in code, f"{name}: {word}"
    code, _, err = command(poster, "--out", tmp_path / "p.png")
    kept = ROOT / "assets" / "algorithm.png"
    assert code == 0 and kept.stat().st_size < 60_000, err
    with Image.open(tmp_path / "p.png") as drawn, Image.open(kept) as shown:
        difference = np.asarray(drawn.convert("L"), int) - np.asarray(shown.convert("L"), int)
    assert (np.abs(difference) > 64).mean() < 0.01, "python -m plane.poster draws another one"


@pytest.mark.parametrize("module, given", [(reading, "1-flows"), (poster, "--outs")])
def test_the_scripts_of_pictures_refuse_what_is_not_there(command, module, given):
    code, _, err = command(module, given)
    assert code == 2 and given in err and err.count("\n") == 1


# --- links and names -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_to_what_it_names(page):
    """Files, headings, and lines: there the function or class of that name is defined."""
    for link in pages.links(page):
        if link.startswith("http"):
            continue
        file, _, place = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{link}: no such file"
        if place and target.suffix == ".md":
            assert place in pages.headings(target), f"{link}: no such heading"
        assert target.suffix == ".md" or not place or pages.LINE.search(page.read_text()), link
    for name, file, line in pages.LINE.findall(page.read_text()):
        found = pages.line_of(page.parent / file, name)
        assert found == int(line), f"{file}#L{line}: {name} is at {found}; tests/pages.py --links"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_page_names_files_functions_and_tests_that_exist(page):
    """`file.py:name`, `test_name`; its tests are in tests/."""
    text = page.read_text()
    for file, name in re.findall(r"`([\w/]+\.py):(\w+)`", text):
        assert pages.line_of(ROOT / file, name), f"{file}:{name}"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_the_symbols_of_the_index_are_those_of_the_code():
    text = (ROOT / "docs" / "reading" / "index.md").read_text().split("## Symbols")[1]
    ideas = ("dmd", "isg", "ida", "schedule", "train", "config", "engine/flags")
    code = "\n".join((ROOT / f"{idea}.py").read_text() for idea in ideas)
    names = re.findall(r"`([\w-]+)`", text)
    assert len(names) > 20
    for name in names:
        word = name.removeprefix("--").replace("-", "_")
        assert re.search(rf"\b{word}\b", code), name


# --- commands ------------------------------------------------------------------------------------

PARSERS = {
    "train.py": lambda: flags.train_arguments(""),
    "sample.py": lambda: flags.sample_arguments(""),
    "evaluate.py": lambda: flags.evaluate_arguments(""),
    "engine.bench": lambda: flags.bench_arguments(""),
    "digits.ablation": lambda: flags.ablation_arguments(""),
    "digits.search": lambda: flags.ablation_arguments("", **search.HOW),
    "digits.pretrain": lambda: flags.pretrain_arguments(""),
    "plane": plane.arguments,
}
OTHERS = {"toy.py", "plane.reading", "plane.poster", "pytest", "venv", "make.py", "tests/pages.py"}


def python_of(words: list[str]) -> list[str] | None:
    """What Python is asked to run, and its flags; None: another program."""
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        return [given.training_script, *given.training_script_args]
    if words[0] in ("python", "python3", ".venv/bin/python"):
        return words[2:] if words[1] == "-m" else words[1:]
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the pages have it: a teacher of one's own, pictures with captions, prompts."""
    folder = tmp_path_factory.mktemp("pages")
    make_own(folder)
    (folder / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())
    yield folder
    sys.modules.pop("mine", None)


def all_commands(page: Path) -> list[list[str]]:
    return [words for block in pages.blocks(page, "bash") for words in pages.commands(block.text)]


@pytest.mark.parametrize("page", [page for page in PAGES if all_commands(page)], ids=relative)
def test_every_command_is_taken_by_its_own_parser(page, place, monkeypatch, capsys):
    """Flags, their values and names of teachers, nothing loaded. Of other programs what they name
    is looked up."""
    monkeypatch.chdir(place)
    for words in all_commands(page):
        asked = python_of(words)
        if asked is None:
            known = ("git", "cd", "cp", ".venv/bin/pip")
            assert words[0] in known, f"who is {words[0]}?"
            if words[0] == ".venv/bin/pip":
                assert words[1:3] == ["install", "-r"] and Path(words[3]).is_file()
            continue
        if asked[0] in PARSERS:
            monkeypatch.setattr(sys, "argv", asked)
            try:
                PARSERS[asked[0]]()
            except SystemExit as stop:
                pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err or stop}")
        else:
            assert asked[0] in OTHERS, f"what is {asked[0]}?"


def test_a_flag_that_is_renamed_fails(place, monkeypatch):
    """The test above can fail: each command of the README, its first flag misspelt, is refused."""
    monkeypatch.chdir(place)
    tried = 0
    for words in all_commands(ROOT / "README.md"):
        asked = python_of(words) or [""]
        named = [k for k, word in enumerate(asked) if word.startswith("--")]
        if asked[0] in PARSERS and named:
            asked[named[0]] += "x"
            monkeypatch.setattr(sys, "argv", asked)
            with pytest.raises(SystemExit):
                PARSERS[asked[0]]()
            tried += 1
    assert tried > 20


FEWER = {  # flags that make a command short; the last one of a kind counts
    "train.py": "--steps 2 --batch 2 --exam-every 0 --no-table --adapter-init random",
    "sample.py": "--steps 2",
    "evaluate.py": "--n 32 --steps 1 --teacher-steps 2 --resamples 2",
}
MODULES = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}
LARGE = ("flux-dev", "sd35-medium", "sdxl", "klein", "--gpu-check", "z-image")


@pytest.fixture
def no_curves(monkeypatch):
    """Seconds of each run; others test them."""
    monkeypatch.setattr(results, "curves", lambda *given: None)


def run_shortened(command, asked: list[str], *more: str) -> None:
    code, _, err = command(MODULES[asked[0]], *asked[1:], *FEWER[asked[0]].split(), *more)
    assert code == 0, f"{' '.join(asked)}: {err}"


def test_the_embedded_teachers_commands_run(command, no_curves, monkeypatch, tmp_path):
    """Those of the README and the chapters in their order, two iterations each; but those that only
    switch parts off, or name another seed."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("".join(f"a {x} left of a digit\n" for x in DIGITS[:4]))
    ran = []
    for page in (ROOT / "README.md", *CHAPTERS):
        for words in all_commands(page):
            asked = python_of(words) if words[0] == "python" else None
            if not asked or asked[0] not in MODULES:
                continue
            if any(word in " ".join(asked) for word in (*LARGE, "--plan", "--no-ida", "--seed 1 ")):
                continue
            without_exam = ("--prompts", "captions.txt") if asked[0] == "evaluate.py" else ()
            run_shortened(command, asked, *without_exam)
            ran.append(asked[0])
    assert ran.count("train.py") >= 3 and ran.count("sample.py") >= 3 and "evaluate.py" in ran


def test_the_commands_for_a_teacher_of_ones_own_run(command, no_curves, place, monkeypatch):
    """The page's row, in its order: weights are made, a student trained, drawn with, measured.
    (Plan and benchmark take half a minute; test_own_teacher.py has them.)"""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    done = []
    for words in all_commands(OWN):
        asked = python_of(words)
        if asked[0] == "make.py":
            monkeypatch.setattr(sys, "argv", [*asked[:-1], "2"])
            runpy.run_path("make.py", run_name="__main__")
        elif "--plan" not in asked and asked[0] in MODULES:
            run_shortened(command, asked)
        done.append(asked[0])
    assert {*done} == {"make.py", "engine.bench", *MODULES}
    assert Path("runs/mine/student.safetensors").is_file() and Path("out.png").is_file()
