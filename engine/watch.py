"""The watch: while the student learns, its images beside its teacher's, of the same noise.

    Watch      the teacher's images once, the student's every --watch-every iterations, as a ratio
    news       what has left the band
    look_at    what is measured of images; the plan runs it too
    share      the prompts that a rank draws
    looks      what the watch draws in a run; the plan asks

The student draws at its own steps, as it learns: not its average, which lags behind. Nothing here
touches the random numbers of training. P prompts, S images of each, M measures.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Config, Refusal
from engine import ranks
from engine.build import Nets, anchors, precision
from engine.pictures import shrunk
from engine.results import keep_best
from engine.run import Run, say
from engine.sheets import TEACHERS, is_watched, shown_conds
from measure.distances import round_8bit, to_uint8
from measure.drift import (
    MEASURES,
    PIXELS,
    advice,
    distances,
    far,
    farthest,
    leaves,
    ratio,
)
from nets.weights import open_weights, write
from schedule import draw_samples, generator, normal
from teachers import Teacher
from teachers.students import times_of

STEPS = 50  # the teacher's, as in sample.py and evaluate.py


class Watch:
    """Of one run. All ranks make and ask it alike: each draws its share of the prompts."""

    def __init__(self, cfg: Config, out: Path, nets: Nets, data, run: Run, device: torch.device):
        self.cfg, self.out, self.nets, self.run, self.device = cfg, out, nets, run, device
        if not is_watched(cfg):
            return
        count, self.each = nets.family.watched
        with torch.no_grad(), precision(cfg, nets, device):
            shown, self.size = shown_conds(cfg, nets, data, device, count)
        self.conds = {
            caption: {name: x.cpu() for name, x in cond.items()} for caption, cond in shown.items()
        }  # on the host
        self.names = MEASURES if nets.disc else MEASURES[: len(PIXELS) + 1]
        self.teacher = self.ask_teacher()
        if not run.watch:
            start = self.ratios()
            run.watch = {"start": start, "out": {}, "left": []}

    def look(self, done: int) -> dict[str, float]:
        """After so many iterations: the ratios by name, for the log; none where none is due."""
        if not is_watched(self.cfg) or done % self.cfg.watch_every:
            return {}
        ratios = self.ratios()
        for line in news(self.run.watch, ratios, self.cfg.watch_band, done):
            say(line)
        if self.cfg.keep_best == "watch":
            worst = far(farthest(ratios)[1])
            keep_best(done, worst, self.cfg, self.out, self.nets, self.run, self.device)
        return ratios

    # --- what is drawn ---------------------------------------------------------------------------

    def ratios(self) -> dict[str, float]:
        student = self.nets.student
        found, _ = self.draw(student, anchors(self.cfg, student.schedule), "x0", None)
        pairs = zip(self.names, found, self.teacher, strict=True)
        return {name: ratio(x, y) for name, x, y in pairs}

    def ask_teacher(self) -> list[float]:
        """(M,) of its own images, drawn once for this run."""
        path, key = self.out / TEACHERS, self.key()
        kept = kept_measures(path, key)
        if ranks.agree(bool(kept), self.device):
            return kept
        count, net = len(self.conds) * self.each, self.nets.teacher
        say(f"the teacher draws {count} images to watch the student by; {path} keeps what they are")
        taus = times_of(self.nets.family, net.schedule, STEPS, self.size, student=False)
        found, pictures = self.draw(net, taus, "euler", self.cfg.guidance or None)
        if ranks.rank() == 0:
            about = {"key": key, "captions": json.dumps([*self.conds]), "steps": str(STEPS)}
            kept = {"measures": torch.tensor(found, dtype=torch.float64)}
            write(kept | {"pictures": to_uint8(pictures).cpu()}, path, about)
        return found

    def key(self) -> str:
        """All that the teacher's images depend on."""
        fields = ("teacher", "guidance", "shift", "size", "t5", "t5_length", "bf16", "vae_tile")
        parts = self.run.settings.get("parts", {})
        about = [getattr(self.cfg, name) for name in fields]
        return json.dumps([about, parts, [*self.conds], self.each, self.names, self.size])

    @torch.no_grad()
    def draw(
        self, net: nn.Module, taus, sampler: str, guidance: float | None
    ) -> tuple[list[float], Tensor]:
        """(M,) of all prompts, and the first image of each (P, 3, h, w), small; on all ranks."""
        mine, parts, batch = share(len(self.conds)), [], self.cfg.batch
        rows = [(p, s) for p in mine for s in range(self.each)]
        with precision(self.cfg, self.nets, self.device):
            for k in range(0, len(rows), batch):
                x0 = self.sample(net, rows[k : k + batch], taus, sampler, guidance)
                parts.append((x0.float(), *look_at(x0, self.nets)))
        latents, pixels, features, small = (
            None if x[0] is None else torch.cat(x).unflatten(0, (-1, self.each))
            for x in zip(*parts, strict=True)
        )
        table = [*pixels.double().mean(1).unbind(1), *distances(latents, features)]
        table = self.gathered(torch.stack(table, 1), mine).mean(0)
        return table.tolist(), self.gathered(small[:, 0], mine)

    def sample(self, net, rows, taus, sampler: str, guidance: float | None) -> Tensor:
        """Latents of prompts and noises rows [(p, s)]; the sheet's are those of s = 0."""
        nets, given = self.nets, [*self.conds.values()]
        conds = [given[p] for p, _ in rows]
        cond = {name: torch.cat([x[name] for x in conds]).to(self.device) for name in conds[0]}
        uncond = nets.family.null_for(nets.null, cond) if guidance and nets.null else None
        draws = [generator("sheet", p + len(given) * s) for p, s in rows]
        shape = nets.family.latent_shape(self.size)
        eps = normal(torch.empty(len(rows), *shape, device=self.device), draws)
        return draw_samples(net, eps, cond, taus, sampler, uncond, guidance, draws)

    def gathered(self, values: Tensor, mine: list[int]) -> Tensor:
        """(P, ...) of all ranks, of values (len(mine), ...) on this one."""
        total = values.new_zeros(len(self.conds), 1 + values[0].numel())
        for p, value in zip(mine, values, strict=True):
            total[p] += torch.cat([value.flatten(), value.new_ones(1)])
        ranks.add_up(total)
        return (total[:, :-1] / total[:, -1:]).unflatten(1, values.shape[1:])


def news(seen: dict, ratios: dict[str, float], band: tuple[float, float], done: int) -> list[str]:
    """What to say of measures that have left the band since the last look.

    seen: what a run carries of it, brought up to date: "start", where the student began, of those
    that have not been within; "out", those that are out now; "left", each that went.
    """
    (low, high), told = band, []
    start = {name: x for name, x in seen["start"].items() if not low <= ratios[name] <= high}
    out = leaves(ratios, start, band)
    for name, side in out.items():
        if seen["out"].get(name) != side:
            seen["left"].append({"step": done, "measure": name, "ratio": ratios[name]})
            said = f"{name} is {ratios[name]:.2f} of the teacher's, not {low:g} to {high:g}"
            told.append(f"iteration {done}: {said}; {advice(name, side)}")
    seen |= {"start": start, "out": out}
    return told


def kept_measures(path: Path, key: str) -> list[float]:
    """Those of a file that was made so; else none."""
    try:
        with open_weights(path) as file:
            same = (file.metadata() or {}).get("key") == key
            return file.get_tensor("measures").tolist() if same else []
    except (Refusal, OSError):
        return []  # absent or damaged: it is drawn again


def look_at(x0: Tensor, nets: Nets) -> tuple[Tensor, Tensor | None, Tensor]:
    """Latents (B, C, h, w) -> of their images what PIXELS measures (B, M), features (B, D) where
    there is a backbone, and the images themselves, small."""
    image = nets.vae.decode(x0).float()
    seen = (round_8bit(image) + 1) / 2
    pixels = torch.stack([measure(seen) for measure in PIXELS.values()], 1)
    features = nets.disc.features(image)[-1].float().mean((2, 3)) if nets.disc else None
    return pixels, features, shrunk(image)


def share(count: int) -> list[int]:
    """This rank's of so many prompts. All have as many, since shards are called together; so some
    may be drawn twice."""
    each = -(-count // ranks.world())
    return [(ranks.rank() * each + k) % count for k in range(each)]


def looks(cfg: Config, family: Teacher, world: int) -> tuple[int, int, int]:
    """Of a rank of so many: images of a look, calls of the student for one, of the teacher."""
    count, each = family.watched
    calls = STEPS * (2 if cfg.guidance and family.uses_null else 1)
    return -(-count // world) * each, cfg.student_steps, calls
