"""The story in one file: students of four steps in the plane, without and with IDA and ISG.

    target   ring, checkerboard    teacher   MLP, train_teacher    picture   main: OUT/story.png
    student  distill, sample       measure   swd, distance to the target

Ring: the fake score learns slowly and the student has far to go; it overshoots, and IDA damps that.
Checkerboard: the fake score keeps up, but four steps are coarse; ISG helps there.
"""

import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Parser, place
from dmd import dmd_loss, fake_loss, student_input
from engine.pictures import Graph, points_and_graphs
from engine.ranks import refusals
from ida import ida_update
from isg import isg_loss
from nets.disk import try_folder
from schedule import Flow, Rng, generator, sample_x0

TAUS = (1.0, 0.75, 0.5, 0.25)  # the student's four times
BATCH, COUNT, EVERY = 128, 2048, 25  # points of a step, of a measurement; steps between those


def ring(count: int, draw: torch.Generator, move: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """(count, 2, 1, 1): eight Gaussians on a circle."""
    angle = 2 * math.pi * torch.randint(0, 8, (count,), generator=draw) / 8
    centre = 1.5 * torch.stack([angle.cos(), angle.sin()], 1) + torch.tensor(move)
    return (centre + 0.15 * torch.randn(count, 2, generator=draw))[:, :, None, None]


def checkerboard(count: int, draw: torch.Generator) -> Tensor:
    """(count, 2, 1, 1): every other square of a 4 x 4 board."""
    x = 4 * torch.rand(count, generator=draw) - 2
    row = 2 * torch.randint(0, 2, (count,), generator=draw) + x.floor() % 2
    return torch.stack([x, row - 2 + torch.rand(count, generator=draw)], 1)[:, :, None, None]


# What the teacher knows, what student and fake score know at first, and how those two learn.
ROWS = {
    "ring": (partial(ring, move=(1.0, 0.5)), ring, {"ttur": 1, "lr": 2e-4, "lr_fake": 5e-5}),
    "checkerboard": (checkerboard, checkerboard, {"ttur": 5, "lr": 5e-4, "lr_fake": 5e-4}),
}
COLUMNS = {"DMD": (1, 0), "IDA": (0.97, 0), "ISG": (1, 1), "both": (0.97, 1)}  # lambda, w_isg


class MLP(nn.Module):
    """A denoiser: the velocity at x_t (B, 2, 1, 1) and t (B,), shaped as x_t; cond is empty."""

    def __init__(self):
        super().__init__()
        self.schedule = Flow()
        layers = [nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        angles = math.pi * t[:, None] * t.new_tensor([1.0, 2.0, 4.0])
        features = torch.cat([x_t.flatten(1), t[:, None], angles.sin(), angles.cos()], 1)
        return self.layers(features)[:, :, None, None]


def update(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
    opt.step()


def train_teacher(target, seed: int, steps: int = 1000) -> MLP:
    """Flow matching on the points that target(count, draw) makes."""
    torch.manual_seed(seed)  # of the first weights
    net, draw = MLP(), generator(seed, "teacher")
    opt = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x0, t = target(2 * BATCH, draw), torch.rand(2 * BATCH, generator=draw)
        eps = torch.randn(x0.shape, generator=draw)
        v = net(net.schedule.noise(x0, eps, t), t, {})
        update(opt, (v - (eps - x0)).square().mean())
    return net.requires_grad_(False)


# fmt: off
def distill(target, teacher, start, decay, w_isg, seed, ttur, lr, lr_fake, steps=350):
    """Algorithm 1 without a discriminator: the student, and its SWD at every EVERY-th step."""
    student, fake = (copy.deepcopy(start).requires_grad_(True) for _ in range(2))
    opt = torch.optim.Adam(student.parameters(), lr=lr, fused=True)
    opt_fake = torch.optim.Adam(fake.parameters(), lr=lr_fake, fused=True)
    draw, curve = generator(seed, "data"), []
    for step in range(steps):
        rng = {name: Rng(seed, step, name, [0]) for name in ("input", "dmd", "isg", "fake")}
        # 1. The student draws: from noised data, or from what it drew at the times before.
        x_t, i = student_input(student=student, x0_real=target(BATCH, draw), cond={}, taus=TAUS,
                               rng=rng["input"])
        tau_start, tau_end = (x_t.new_full((BATCH,), tau) for tau in (*TAUS, 0.0)[i : i + 2])
        prediction = student(x_t, tau_start, {})
        x0 = student.schedule.x0(x_t, prediction, tau_start)
        # 2. At every ttur-th step it learns, and the fake score is pulled after it.
        if step % ttur == 0:
            loss_dmd = dmd_loss(x0=x0, teacher=teacher, fake=fake, cond={}, uncond=None,
                                guidance=(1.0, 1.0), times="uniform", rng=rng["dmd"])
            loss_isg = isg_loss(student=student, teacher=teacher, x_t=x_t, prediction=prediction,
                                tau_start=tau_start, tau_end=tau_end, cond={}, uncond=None,
                                guidance=(1.0, 1.0), margin=0.02, distance="l2", rng=rng["isg"])
            update(opt, loss_dmd + w_isg * loss_isg)
            ida_update(fake=fake, student=student, decay=decay)
        # 3. At every step the fake score learns what the student draws.
        update(opt_fake, fake_loss(fake=fake, x0=x0, cond={}, times="uniform", rng=rng["fake"]))
        if (step + 1) % EVERY == 0:
            curve.append(swd(sample(student, seed), target))
    return student, curve
# fmt: on


def sample(student: MLP, seed: int) -> Tensor:
    """(COUNT, 2, 1, 1) in four steps: at each time an estimate of x0, noised again to the next."""
    draw = generator(seed, "sample")
    eps = torch.randn(COUNT, 2, 1, 1, generator=draw)
    return sample_x0(net=student, eps=eps, cond={}, taus=TAUS, generators=[draw])


def swd(points: Tensor, target) -> float:
    """Sliced Wasserstein-1 to fresh points: sorted projections compared, in 32 directions."""
    directions = nn.functional.normalize(torch.randn(2, 32, generator=generator("swd")), dim=0)
    both = torch.stack([points, target(len(points), generator("real"))]).flatten(2)  # (2, B, 2)
    return (both @ directions).sort(1).values.diff(dim=0).abs().mean().item()


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=place, default=Path("runs/toy"), help="default: runs/toy")
    parser.add_argument("--seed", type=int, default=0, help="of every random number; default: 0")
    given = parser.parse_args()
    with refusals():
        try_folder(given.out)
    torch.set_num_threads(1)  # the networks are tiny: threads only wait for each other
    panels, graphs = {}, []
    for row, (target, start, how) in ROWS.items():
        nets = {known: train_teacher(known, given.seed) for known in {target, start}}
        wanted, curves = target(4 * COUNT, generator("wanted")), {}
        print(f"{row}: sliced Wasserstein distance; of data {swd(wanted[:COUNT], target):.3f}")
        for part, weights in COLUMNS.items():
            student, curve = distill(target, nets[target], nets[start], *weights, given.seed, **how)
            print(f"  {part:<6} {curve[-1]:.3f}, at its worst {max(curve):.3f}", flush=True)
            points = wanted, sample(student, given.seed)[: COUNT // 2]
            panels[f"{row}, {part}: SWD {curve[-1]:.2f}"] = [x.flatten(1).numpy() for x in points]
            curves[part] = ([EVERY * (k + 1) for k in range(len(curve))], [curve])
        graphs.append(Graph(f"{row}: SWD, distance to the target", "iteration", "linear", curves))
    points_and_graphs(given.out / "story.png", panels, graphs)
    print(given.out / "story.png")


if __name__ == "__main__":
    main()
