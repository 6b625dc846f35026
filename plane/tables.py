"""What a scenario shows: a table of means over seeds, points and graphs.

    value       one number of a run: late or peak of a measure
    table       a row per variant
    reference   what each teacher itself reaches
    panels      the student's points over the target's
    graphs      measures over iterations, or across variants

Results are those of workers.run_all: variant -> one result per seed.
"""

import torch

from engine.pictures import Graph
from plane.scenarios import Scenario
from plane.settings import EVERY
from plane.targets import real_points
from plane.workers import XI_TIMES, Key, keys_of


def value(result: dict, column: str) -> float:
    """ "late M": the mean of the last 8 measurements of M; "peak M": the largest."""
    how, measure = column.split(" ", 1)
    curve = result["curves"][measure]
    return max(curve) if how == "peak" else sum(curve[-8:]) / len(curve[-8:])


def number(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.3g}"


def table(scenario: Scenario, results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over seeds; wins: seeds whose first column is below the row's
    that it is compared with.
    """
    width = max(len(name) for name in results) + 2
    lines = ["".join(f"{head:>20}" for head in (*scenario.columns, "wins", "seconds"))]
    lines[0] = " " * width + lines[0]
    for name, runs in results.items():
        cells = []
        for column in scenario.columns:
            numbers = torch.tensor([value(result, column) for result in runs])
            spread = numbers.std().item() if len(runs) > 1 else 0.0
            cells.append(f"{number(numbers.mean().item())} ± {number(spread)}")
        against = results.get(scenario.variants[name].against)
        pairs = zip(runs, against or [], strict=False)
        first = scenario.columns[0]
        won = sum(value(ours, first) < value(theirs, first) for ours, theirs in pairs)
        cells.append(f"{won} of {len(runs)}" if against else "-")
        cells.append(f"{sum(result['seconds'] for result in runs) / len(runs):.1f}")
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def reference(scenario: Scenario, taught: dict[Key, dict]) -> str:
    """For every teacher of a scenario (seed 0): its own SWD, and that of data against data."""
    lines = {}
    for setting in scenario.variants.values():
        key = keys_of(setting, 0)[0]
        facts = ", ".join(f"{name} {x:.3f}" for name, x in taught[key]["facts"].items())
        wrong = f", teacher wrong by {key.defect:g}" if key.defect else ""
        lines[key] = f"  {key.target}{wrong}: SWD of {facts}"
    return "\n".join(lines.values())


def panels(scenario: Scenario, results: dict[str, list[dict]]) -> dict[str, tuple]:
    """Title -> points of the target, and of the student of seed 0."""
    shown = {name: scenario.variants[name].target for name in scenario.panels or results}
    return {
        name: (real_points(target, "picture").numpy(), results[name][0]["points"])
        for name, target in shown.items()
    }


def graphs(scenario: Scenario, results: dict[str, list[dict]], taught: dict) -> list[Graph]:
    made = []
    if scenario.across:
        made += [graph_across(column, scenario, results) for column in scenario.columns]
    else:  # one for each group of variants: those whose names begin alike
        groups = dict.fromkeys(name.rpartition(", ")[0] for name in results)
        for group in groups:
            some = {name: results[name] for name in results if name.rpartition(", ")[0] == group}
            made += [graph_over_iterations(measure, group, some) for measure in scenario.curves]
    defects = {s.defect: keys_of(s, 0)[0] for s in scenario.variants.values()}
    if len(defects) > 1:
        lines = {
            f"teacher wrong by {d:g}": (XI_TIMES, [taught[k]["xi"]]) for d, k in defects.items()
        }
        made.append(Graph("xi(t), error of the teacher's x0", "t", "linear", lines))
    return made


def graph_over_iterations(measure: str, group: str, results: dict[str, list[dict]]) -> Graph:
    lines = {}
    for name, runs in results.items():
        curves = [result["curves"][measure] for result in runs]
        part = name.rpartition(", ")[2]
        lines[part] = ([EVERY * (k + 1) for k in range(len(curves[0]))], curves)
    scale = {"swd": "log", "gap": "log", "position": "symlog"}.get(measure, "linear")
    return Graph(f"{group}: {measure}" if group else measure, "iteration", scale, lines)


def graph_across(column: str, scenario: Scenario, results: dict[str, list[dict]]) -> Graph:
    """One line per kind of variant, over the number that its name begins with."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, runs in results.items():
        where, kind = name.split(", ", 1)
        found.setdefault(kind, {})[where] = [value(result, column) for result in runs]
    lines = {
        kind: (list(by_place), list(zip(*by_place.values(), strict=True)))
        for kind, by_place in found.items()
    }
    return Graph(column, scenario.across, "log", lines)
