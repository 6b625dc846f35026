"""The search for the embedded task's preset: what was tried, and that what it chose is shipped."""

import sys

import pytest
from test_ablation import row

import train
from digits import search
from digits.ablation import COUNTS, flags_of
from engine.flags import SWITCHES


def config_of(kind: str, monkeypatch) -> train.Config:
    _, flags = search.SETTINGS[kind]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags_of(flags, 5, None)])
    return train.train_arguments(None)[0]


def test_a_setting_is_the_start_with_what_its_title_says(monkeypatch):
    """Each another; of those flags that its title names, and no more."""
    seen = {kind: config_of(kind, monkeypatch) for kind in search.SETTINGS}
    for kind, cfg in seen.items():
        words = [word for word in search.CHANGES[kind].split() if "--" in word]
        off = {flag: name for name, (flag, _) in SWITCHES.items()}
        names = {off.get(word, word[2:].replace("-", "_")) for word in words}
        start = vars(seen["start"])
        differing = {name for name, value in vars(cfg).items() if value != start[name]}
        assert differing <= names | {"taus"}, kind
        assert differing or kind == "start", kind
    assert len({repr(cfg) for cfg in seen.values()}) == len(seen)


@pytest.mark.parametrize(
    "kind, steps", [("chosen", 4), ("two-chosen", 2), ("one-chosen", 1)], ids=["4", "2", "1"]
)
def test_the_chosen_setting_is_the_preset(monkeypatch, kind, steps):
    """Of every value, for each number of steps."""
    own = f"--student-steps {steps}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags_of(own, 5, None)])
    assert config_of(kind, monkeypatch) == train.train_arguments(None)[0]


def test_the_table_has_each_setting_at_its_own_steps(command, monkeypatch, tmp_path):
    made = [row(f"student {n}, x0", n, 90.0 + n) for n in COUNTS]
    two = next(kind for kind, flags in search.CHANGES.items() if search.own_steps(flags) == 2)
    kinds, teacher = ("start", two), [row("teacher 50, guided", 100, 95.0)]
    rows = dict.fromkeys(kinds, [made])
    monkeypatch.setattr(search, "examine_all", lambda given: (teacher, rows))
    code, out, err = command(search, "--kinds", *kinds, "--out", tmp_path)
    assert code == 0, err
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in out.splitlines()[3:5]]
    assert [line[1:] for line in cells] == [["4", "4", "94.0"], ["2", "2", "92.0"]]
    assert cells[1][0] == search.CHANGES[kinds[1]]
