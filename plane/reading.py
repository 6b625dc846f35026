"""The pictures of docs/reading, each by one function, and what they and its snippets share.

    python -m plane.reading                       # all eight, about a minute
    python -m plane.reading 5-ida --out elsewhere  # one

    moved         points that DMD moves, without a student: their fake score is exact
    learned       a student of the plane, measured as it learns
    told_apart    heads that learn to tell real images from made ones

A picture's numbers are those of `--share 1`; a smaller share takes fewer points, images and
iterations. dmd.py, ida.py, isg.py and discriminator.py are used as they are for the large teachers.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import Parser, Range, place
from digits.words import SceneText
from discriminator import Discriminator, disc_loss, omega
from dmd import dmd_gradient, dmd_loss
from engine.pictures import Graph, draw_graphs, points_and_graphs, pyplot, save_figure
from engine.ranks import refusals
from ida import ida_update
from measure.distances import to_uint8
from nets.disk import try_folder
from plane.denoisers import ANCHORS, Exact
from plane.distill import distill
from plane.settings import EVERY, IDA, ISG, KEEPING_UP, LAGGING, Setting
from plane.targets import TARGETS, Mixture, real_points
from plane.workers import XI_TIMES, keys_of, network, teach
from schedule import DDPM, Flow, Rng, draw_samples, generator, grid, normal, sample_ode
from teachers import find

# --- what pictures and snippets share ------------------------------------------------------------


def moved(turns: int, count: int = 256, fake: bool = True, times: str = "uniform") -> list[Tensor]:
    """Points (count, 2) of a ring, moved by DMD towards the ring that lies elsewhere; after every
    turn, and before the first.

    There is no student: each point is its own x0, and moves a fifth of its gradient. The fake score
    is exact, a round Gaussian about every point. fake: or none, x0 itself in its place.
    """
    teacher, points = Exact(TARGETS["moved ring"], Flow()), real_points("ring", "moved", count)
    seen = [points]
    for turn in range(turns):
        x0 = points[:, :, None, None].requires_grad_()
        mixture = Mixture(points.detach(), torch.full((count,), 1 / count), 0.1)
        ours = Exact(mixture, Flow()) if fake else Itself(x0.detach())
        rng = Rng(0, turn, "dmd", [0])
        loss = dmd_loss(x0, teacher, ours, {}, None, None, times, rng)
        (gradient,) = torch.autograd.grad(loss, x0)  # of a mean over all elements: of each, times
        points = (x0 - 0.2 * x0.numel() * gradient).detach().flatten(1)  # their number
        seen.append(points)
    return seen


class Itself(nn.Module):
    """A fake score that knows nothing but the point: its estimate is x0."""

    def __init__(self, x0: Tensor):
        super().__init__()
        self.x0 = x0

    def forward(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        return (x_t - self.x0) / t[:, None, None, None]


taught = functools.cache(teach)  # a teacher is trained once for all that is asked of it


def learned(setting: Setting, seed: int = 0) -> dict:
    """What distill returns: curves, points, seconds. Teachers are trained once."""
    teacher, start = (network(key, taught(key)["weights"]) for key in keys_of(setting, seed))
    return distill(setting, seed, teacher.requires_grad_(False), start)


@torch.no_grad()
def drawn(captions: list[str], steps: int) -> Tensor:
    """The embedded teacher's images (B, 3, 16, 16) of captions, guided, in so many Euler steps."""
    family = find("digits")
    net, text = family.load(family.preset.shift, family.locate()["denoiser"]), SceneText()
    draws = [generator("reading", i) for i in range(len(captions))]
    eps = normal(torch.empty(len(captions), 3, 16, 16), draws)
    how = ("euler", text([""] * len(captions)), family.preset.guidance, draws)
    return draw_samples(net, eps, text(captions), grid(net.schedule, steps), *how)


def told_apart(turns: int, reference: bool = True, batch: int = 8) -> list[float]:
    """The hinge loss of heads at every turn, which tell real scenes from the teacher's in two
    steps. reference: with a real image of the same caption beside them, or zeros."""
    family = find("digits")
    scenes, reader = family.data(0)(range(8 * batch)), SceneText()
    made, text = drawn(scenes.captions, 2), reader.embedding(scenes.captions)
    torch.manual_seed(0)
    backbone = family.load_backbone(family.locate(), torch.float32, torch.device("cpu"))
    disc = Discriminator(backbone, family.embedding_width())
    with torch.no_grad():
        real, fake = disc.features(scenes.images), disc.features(made)
    shown = real if reference else [torch.zeros_like(x) for x in real]
    opt, losses = torch.optim.Adam(disc.heads.parameters(), lr=family.preset.lr_disc), []
    for turn in range(turns):
        rows = torch.randperm(8 * batch, generator=generator("rows", turn))[:batch]
        pick = [[x[rows] for x in maps] for maps in (real, fake, shown)]
        loss = disc_loss(disc, *pick, text[rows], torch.ones(batch))
        opt.zero_grad()
        loss.backward()
        opt.step()
        disc.power_iteration()
        losses.append(loss.item())
    return losses


# --- the pictures: path, share of the full size --------------------------------------------------


def scatter(axis, points, title: str, behind=None, colour: str = "C0") -> None:
    """Points (N, 2) over others in grey."""
    if behind is not None:
        axis.scatter(*behind.T, s=1, color="0.8")
    axis.scatter(*points.T, s=1, color=colour)
    axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=9)


def flow(path: Path, share: float) -> None:
    """Straight pairs, the mean of those that cross, and the paths that the mean velocity makes."""
    net, draw, figure = Exact(TARGETS["ring"], Flow()), generator("flow"), new_figure(4, 1.3)
    pairs, line, steps = figure.subplots(1, 3)
    count = max(4, int(60 * share))
    x0, eps = (real_points("ring", "flow", count), torch.randn(count, 2, generator=draw))
    for axis in (pairs, line, steps):
        scatter(axis, torch.zeros(0, 2), "", real_points("ring", 0))
    pairs.plot(*torch.stack([x0, eps], 1).permute(2, 1, 0), color="C1", linewidth=0.6)
    pairs.set_title("pairs of x0 and eps", fontsize=9)
    t, at = torch.full((int(200_000 * share),), 0.5), torch.tensor([0.5, 0.3])
    many, noise = TARGETS["ring"].sample(len(t), draw), torch.randn(len(t), 2, 1, 1, generator=draw)
    near = (net.schedule.noise(many, noise, t).flatten(1) - at).norm(dim=1) < 0.05
    arrows = (noise - many)[near].flatten(1)[: max(4, int(40 * share))]
    mean = net(at[None, :, None, None], t[:1], {}).flatten()
    line.quiver(*at.expand(len(arrows), 2).T, *-arrows.T, color="C1", **ARROWS)
    line.quiver(*at, *-mean, color="black", **ARROWS)
    line.set_title("pairs through one x_t, t = .5; black: -v", fontsize=9)
    way, times = [eps[:, :, None, None]], grid(net.schedule, max(4, int(100 * share)))
    for tau, tau_next in zip(times, [*times[1:], 0.0], strict=True):
        now, after = (torch.full((count,), x) for x in (tau, tau_next))
        way.append(net.schedule.step(way[-1], net(way[-1], now, {}), now, after))
    steps.plot(*torch.stack(way).flatten(2).permute(2, 0, 1), color="C2", linewidth=0.6)
    steps.set_title(f"paths along v, {len(times)} Euler steps", fontsize=9)
    save_figure(figure, path)


ARROWS = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}


def few_steps(path: Path, share: float) -> None:
    """The ring by its exact velocity, and the embedded teacher's images, in ever fewer steps."""
    net, count = Exact(TARGETS["ring"], Flow()), max(16, int(2048 * share))
    eps = torch.randn(count, 2, 1, 1, generator=generator("few steps"))
    figure, captions = new_figure(5, 2), ["a red three left of a digit"] * 4
    above, below = figure.subplots(2, 5)
    for axis, image, steps in zip(above, below, (1, 2, 4, 8, 50), strict=True):
        made = sample_ode(net, eps, {}, grid(net.schedule, steps)).flatten(1)
        scatter(axis, made, f"{steps} step{'s' * (steps > 1)}", real_points("ring", 0, count))
        four = to_uint8(drawn(captions, steps)).movedim(1, -1).reshape(2, 2, 16, 16, 3)
        image.imshow(four.permute(0, 2, 1, 3, 4).reshape(32, 32, 3))
        image.set(xticks=[], yticks=[])
    below[0].set_xlabel(captions[0], fontsize=8, loc="left")
    save_figure(figure, path)


def scores(path: Path, share: float) -> None:
    """Where DMD pushes points, where they are then, and where they end without a fake score."""
    turns, count = max(4, int(120 * share)), max(32, int(256 * share))
    figure = new_figure(4, 1)
    first, *rest = figure.subplots(1, 4)
    ring, wanted = real_points("ring", "moved", 64), real_points("moved ring", 0, count)
    teacher, ours = (Exact(TARGETS[name], Flow()) for name in ("moved ring", "ring"))
    x_t, t = ring[:, :, None, None], torch.full((64,), 0.5)
    two = (net.schedule.x0(x_t, net(x_t, t, {}), t) for net in (ours, teacher))
    gradient = dmd_gradient(x_t, *two).flatten(1)
    scatter(first, ring, "-gradient at t = .5", wanted)
    first.quiver(*ring.T, *-gradient.T, color="C1", **ARROWS)
    with_fake, without = moved(turns, count), moved(turns, count, fake=False)
    some = turns // 6
    scatter(rest[0], with_fake[some], f"after {some} turns", wanted)
    scatter(rest[1], with_fake[-1], f"after {turns}", wanted)
    scatter(rest[2], without[-1], f"after {turns}, no fake score", wanted, "C3")
    for axis in (first, *rest):
        axis.set(xlim=(-2, 3.2), ylim=(-2, 3.2))
    save_figure(figure, path)


def fake_score(path: Path, share: float) -> None:
    """A student that runs past its target, with a fake score that learns ever more."""
    lines, updates = {"position": {}, "gap": {}}, max(25, int(200 * share))
    for name, ttur, lr_fake in LESSONS:
        setting = replace(LAGGING, ttur=ttur, lr_fake=lr_fake, iterations=ttur * updates)
        curves = learned(replace(setting, measures=("position", "gap")))["curves"]
        for measure, curve in curves.items():
            x = [EVERY * (k + 1) / ttur for k in range(len(curve))]
            lines[measure][name] = (x, [curve])
    titles = {"position": "position: start 0, target 1", "gap": "gap: how wrong the fake score is"}
    figure = new_figure(4, 1.2)
    draw_graphs(figure, [Graph(titles[m], "student updates", "linear", lines[m]) for m in lines])
    save_figure(figure, path)


LESSONS = (
    ("TTUR 1, slow", 1, 5e-5),
    ("TTUR 5, slow", 5, 5e-5),
    ("TTUR 10, slow", 10, 5e-5),
    ("TTUR 1, 4 x the rate", 1, 2e-4),
)


def ida(path: Path, share: float) -> None:
    """The same student at several lambda, and with the fake score pulled to its start instead."""
    base = replace(LAGGING, iterations=max(EVERY, int(600 * share)), measures=("position", "swd"))
    changes = {f"lambda {x:g}": {"ida": x} for x in (1, 0.99, 0.97, 0.9)}
    changes["pulled to its start"] = IDA | {"pull": "start"}
    results = {name: learned(replace(base, **change)) for name, change in changes.items()}
    x = [EVERY * (k + 1) for k in range(base.iterations // EVERY)]
    graphs = [
        Graph(title, "iteration", scale, {n: (x, [r["curves"][m]]) for n, r in results.items()})
        for m, title, scale in (
            ("position", "position: start 0, target 1", "symlog"),
            ("swd", "SWD, distance to the target", "log"),
        )
    ]
    wanted = real_points(base.target, "picture").numpy()
    shown = {name: (wanted, results[name]["points"]) for name in list(results)[:4]}
    points_and_graphs(path, shown, graphs)


def isg(path: Path, share: float) -> None:
    """Four coarse steps alone, with ISG, and with the control; and a teacher's xi(t)."""
    base = replace(KEEPING_UP, target="checkerboard", iterations=max(EVERY, int(600 * share)))
    changes = {"DMD": {}, "DMD + ISG": ISG, "DMD + regression": {"w_anchor": 1.0}}
    results = {name: learned(replace(base, **change)) for name, change in changes.items()}
    x = [EVERY * (k + 1) for k in range(base.iterations // EVERY)]
    swds = {name: (x, [result["curves"]["swd"]]) for name, result in results.items()}
    xis = {}
    for defect in (0.0, 1.0):
        key = keys_of(replace(KEEPING_UP, defect=defect), 0)[0]
        xis[f"wrong by {defect:g} at the anchors"] = (XI_TIMES, [taught(key)["xi"]])
    graphs = [
        Graph("SWD, distance to the target", "iteration", "log", swds),
        Graph("xi(t), error of a teacher's x0 (ring)", "t", "linear", xis),
    ]
    wanted = real_points(base.target, "picture").numpy()
    shown = {name: (wanted, result["points"]) for name, result in results.items()}
    points_and_graphs(path, shown, graphs)


def discriminator(path: Path, share: float) -> None:
    """omega at every time, and heads that learn with and without the reference image."""
    figure = new_figure(4, 1.2)
    t = torch.linspace(0, 1, 201)
    weights = {"flow": (t.tolist(), [omega(Flow(), t).tolist()])}
    weights["DDPM"] = (t.tolist(), [omega(DDPM(), t).tolist()])
    turns, batch = max(4, int(60 * share)), max(4, int(8 * share))
    losses = {
        name: ([k + 1 for k in range(turns)], [told_apart(turns, shown, batch)])
        for name, shown in (("with the reference", True), ("without", False))
    }
    draw_graphs(
        figure,
        [
            Graph("omega(t) = alpha(t)^2", "t", "linear", weights),
            Graph("hinge loss of the heads", "turn", "linear", losses),
        ],
    )
    for axis, schedule in ((figure.axes[0], Flow()),):
        anchors = torch.tensor(ANCHORS)
        axis.scatter(anchors, omega(schedule, anchors), color="C0", zorder=3)
    save_figure(figure, path)


def sizes(path: Path, share: float) -> None:
    """How many weights a step of Adam, and IDA after it, change in fp32 and in bf16."""
    rates, count = np.logspace(-7, -3, 17).tolist(), max(1000, int(100_000 * share))
    lines = {"a step of Adam": {}, "IDA after it, lambda .97": {}}
    for dtype in (torch.float32, torch.bfloat16):
        found = [changed(lr, dtype, count) for lr in rates]
        for title, shares in zip(lines, zip(*found, strict=True), strict=True):
            lines[title][str(dtype).removeprefix("torch.")] = (rates, [shares])
    figure = new_figure(4, 1.2)
    draw_graphs(figure, [Graph(f"changed by {t}, %", "lr", "linear", lines[t]) for t in lines])
    for axis in figure.axes:
        axis.set_xscale("log")
    save_figure(figure, path)


def changed(lr: float, dtype: torch.dtype, count: int = 100_000) -> tuple[float, float]:
    """Percent of weights N(0, .02^2) that Adam's first step changes, and of those of the fake score
    that IDA then changes. Its own function takes fp32 alone: in bf16 the same average by hand.
    """
    draw = generator("weights")
    student = nn.Linear(count, 1, bias=False)
    weights = 0.02 * torch.randn(1, count, generator=draw)
    student.weight.data = weights.to(dtype)
    fake = nn.Linear(count, 1, bias=False)
    fake.weight.data = student.weight.data.clone()
    opt = torch.optim.Adam(student.parameters(), lr=lr)
    student.weight.grad = torch.randn(1, count, generator=draw).to(dtype)
    before = fake.weight.detach().clone()
    opt.step()
    if dtype == torch.float32:
        ida_update(fake, student, 0.97)
    else:
        fake.weight.data.lerp_(student.weight.data, 0.03)
    moves = ((net.weight != before).float().mean().item() for net in (student, fake))
    return tuple(100 * x for x in moves)


def new_figure(columns: int, rows: float):
    return pyplot().figure(figsize=(2.6 * columns, 2.6 * rows), constrained_layout=True)


PICTURES: dict[str, Callable[[Path, float], None]] = {
    "1-flow": flow,
    "2-few-steps": few_steps,
    "3-scores": scores,
    "4-fake-score": fake_score,
    "5-ida": ida,
    "6-isg": isg,
    "7-discriminator": discriminator,
    "8-sizes": sizes,
}


def main() -> None:
    parser = Parser(
        prog="python -m plane.reading",
        description=__doc__,
    )
    known = f"any of {', '.join(PICTURES)}; default: all"
    parser.add_argument("picture", nargs="*", default=[*PICTURES], help=known)
    folder = Path("docs/reading")
    parser.add_argument("--out", type=place, default=folder, help=f"folder; default: {folder}")
    share = "of points, images and iterations; default: 1"
    parser.add_argument("--share", type=float, may=Range(above=0, high=1), default=1, help=share)
    given = parser.parse_args()
    wrong = [name for name in given.picture if name not in PICTURES]
    if wrong:
        parser.error(f'unknown picture "{wrong[0]}"; choose from {", ".join(PICTURES)}')
    with refusals():
        try_folder(given.out)
    torch.set_num_threads(1)  # the networks are tiny: threads only wait for each other
    for name in given.picture:
        PICTURES[name](given.out / f"{name}.png", given.share)
        print(given.out / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
