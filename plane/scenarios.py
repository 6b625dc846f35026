"""The questions put to the two ideas: each a set of settings, and what is shown of them.

    ida       the fake score lags behind: the student overshoots, IDA damps that
    isg       four coarse steps: ISG against nothing, and against plain regression on the teacher
    pair      a long run: IDA alone, ISG alone, both
    ttur      1, 2, 5, 10 fake updates per student update, with and without IDA
    steps     1 to 16 student steps, both samplers, both ISG distances
    modes     an unequal mixture: what is kept when the fake score keeps up, and when it lags
    segments  a teacher that is wrong near the student's anchors only: ISG against regression
    ddpm      the diffusion schedule and noise prediction, through the same functions

A variant is named "GROUP, PART" or "NUMBER, PART" where there are several groups.
"""

from dataclasses import dataclass, replace

from plane.settings import IDA, ISG, KEEPING_UP, LAGGING, Setting
from schedule import Flow, grid


@dataclass(frozen=True)
class Scenario:
    variants: dict[str, Setting]
    columns: tuple[str, ...] = ("late swd",)  # of the table: "late" or "peak" of a measure
    curves: tuple[str, ...] = ("swd",)  # measures drawn against iterations
    across: str = ""  # the columns are drawn against this, the first word of a variant's name
    panels: tuple[str, ...] = ()  # variants whose points are drawn; (): all


def four_parts(base: Setting, name: str = "") -> dict[str, Setting]:
    """A setting, and with IDA, ISG or both."""
    changes = {"vanilla": {}, "IDA": IDA, "ISG": ISG, "IDA + ISG": IDA | ISG}
    return compare({name + part: (base, change) for part, change in changes.items()})


def compare(variants: dict[str, tuple[Setting, dict]]) -> dict[str, Setting]:
    """Each setting with its changes; the later ones are compared with the first."""
    first = next(iter(variants))
    made = {
        name: replace(base, against=first, **change) for name, (base, change) in variants.items()
    }
    return made | {first: replace(made[first], against="")}


def ida_scenario() -> Scenario:
    base = replace(LAGGING, measures=("swd", "position", "gap"))
    variants = {
        "vanilla": (base, {}),
        "IDA": (base, IDA),
        "pulled to the start": (base, IDA | {"pull": "start"}),
        "fake 4 x faster": (base, {"lr_fake": 2e-4}),
    }
    columns = ("late swd", "peak position", "peak gap", "late gap")
    return Scenario(compare(variants), columns, ("swd", "position", "gap"))


def isg_scenario() -> Scenario:
    variants = {}
    for target in ("checkerboard", "moons", "ring"):
        base = replace(KEEPING_UP, target=target)
        three = {"vanilla": {}, "ISG": ISG, "regression": {"w_anchor": 1.0}}
        variants |= compare({f"{target}, {part}": (base, three[part]) for part in three})
    return Scenario(variants)


def pair_scenario() -> Scenario:
    base = replace(LAGGING, iterations=2000, measures=("swd", "position", "gap"))
    columns = ("late swd", "peak position", "peak gap", "late gap")
    return Scenario(four_parts(base), columns, ("swd", "position", "gap"))


def ttur_scenario() -> Scenario:
    variants = {}
    for ttur in (1, 2, 5, 10):  # as many student updates for each
        for name, lr_fake in (("slow fake", LAGGING.lr_fake), ("fast fake", LAGGING.lr)):
            base = replace(LAGGING, ttur=ttur, iterations=200 * ttur, lr_fake=lr_fake)
            base = replace(base, measures=("swd", "position"))
            variants |= compare(
                {f"{ttur}, {name}": (base, {}), f"{ttur}, {name}, IDA": (base, IDA)}
            )
    columns = ("late swd", "peak position")
    panels = tuple(name for name in variants if name.startswith(("1,", "10,")))
    return Scenario(variants, columns, (), "fake updates per student update", panels)


def steps_scenario() -> Scenario:
    variants, charbonnier = {}, ISG | {"distance": "charbonnier"}
    for K in (1, 2, 4, 8, 16):
        base = replace(KEEPING_UP, target="checkerboard", taus=tuple(grid(Flow(), K)))
        base = replace(base, measures=("swd", "swd euler"))
        three = {"vanilla": {}, "ISG, L2": ISG, "ISG, Charbonnier": charbonnier}
        variants |= compare({f"{K}, {part}": (base, three[part]) for part in three})
    panels = tuple(f"{K}, {part}" for part in three for K in (1, 2, 4, 8, 16))
    return Scenario(variants, ("late swd", "late swd euler"), (), "student steps", panels)


def modes_scenario() -> Scenario:
    measures = ("swd", "modes", "weights")
    calm = replace(KEEPING_UP, target="unequal ring", exact=True, measures=measures)
    stressed = replace(LAGGING, target="moved unequal ring", exact=True, measures=measures)
    variants = four_parts(calm, "calm, ") | four_parts(stressed, "stressed, ")
    return Scenario(variants, ("late swd", "late modes", "late weights"), ("modes", "weights"))


def segments_scenario() -> Scenario:
    variants = {}
    for defect in (0.0, 0.5, 1.0):
        base, name = replace(KEEPING_UP, defect=defect), f"teacher wrong by {defect:g}"
        runs = {f"0, {name}": (base, {})}
        for w in (0.25, 1.0, 4.0):
            runs[f"{w:g}, {name}, ISG"] = (base, {"w_isg": w})
            runs[f"{w:g}, {name}, regression"] = (base, {"w_anchor": w})
        variants |= compare(runs)
    panels = tuple(name for name in variants if name.startswith(("0,", "1,")))
    return Scenario(variants, curves=(), across="weight", panels=panels)


def ddpm_scenario() -> Scenario:
    taus, measures = (0.999, 0.749, 0.499, 0.249), ("swd", "position")
    lagging = replace(LAGGING, diffusion=True, taus=taus, measures=measures)
    calm = replace(KEEPING_UP, diffusion=True, taus=taus, measures=measures)
    variants = four_parts(lagging, "lagging, ") | four_parts(calm, "calm, ")
    return Scenario(variants, ("late swd", "peak swd", "peak position"), ("swd", "position"))


SCENARIOS = {
    "ida": ida_scenario,
    "isg": isg_scenario,
    "pair": pair_scenario,
    "ttur": ttur_scenario,
    "steps": steps_scenario,
    "modes": modes_scenario,
    "segments": segments_scenario,
    "ddpm": ddpm_scenario,
}
