"""The calls of which an iteration is made, one by one: the benchmark times each by itself.

    turns, calls   which networks one train_step calls, and how often
    call_table     each of these calls
    networks       of a configuration, on any device, weights not set
    Tally          FLOPs of what runs, and bytes of what is alive

What an iteration takes as a whole is the plan's: plan.py.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from config import Config
from discriminator import Discriminator, disc_loss, gan_loss
from engine import ranks
from engine.build import anchors
from engine.meter import FORMULAS
from schedule import Cond
from teachers import Teacher, find

PARTS = ("student", "fake", "teacher", "discriminator", "VAE", "text")

# --- Algorithm 1 as a table of calls -------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One kind of iteration."""

    learn: bool  # the student's turn
    judged: bool  # the anchor is not pure noise, so the discriminator has work
    drawn: int  # calls of the student in backward simulation


def turns(cfg: Config) -> list[tuple[float, Turn]]:
    """Every kind of iteration and its probability."""
    with torch.device("meta"):
        schedule = find(cfg.teacher).build(cfg.shift).schedule
    taus, found = anchors(cfg, schedule), []
    for i, tau in enumerate(taus):
        judged = cfg.w_gan > 0 and bool(schedule.alpha(torch.tensor(tau, device="cpu")) > 0)
        for backward, p in ((True, cfg.p_backward), (False, 1 - cfg.p_backward)):
            for learn, share in ((True, 1 / cfg.ttur), (False, 1 - 1 / cfg.ttur)):
                turn = Turn(learn, judged, i if backward else 0)
                found.append((p * share / len(taus), turn))
    return found


def calls(turn: Turn, cfg: Config) -> dict[str, int]:
    """How often train_step makes each call that `measure` measures.

    "learn" is a forward and a backward pass; all others have no gradient. The teacher's call is
    the guided one: where guidance is classifier-free, one call on twice the batch.
    """
    learn, judged, isg = turn.learn, turn.judged, turn.learn and cfg.w_isg > 0
    augmented = len(cfg.disc_augment) > 0
    return {
        "student: forward": turn.drawn + (not learn) + isg,
        "student: learn": learn,
        "teacher: forward": learn + isg,  # DMD, ISG
        "fake: forward": learn,  # DMD
        "fake: learn": True,
        "VAE: decode": judged and not learn,
        "VAE: decode, learn": judged and learn,
        # real images once, as judged and as reference; augmented, they are judged apart
        "discriminator: features": judged * (1 + augmented + (not learn)),
        "discriminator: features, learn": judged and learn,
        "discriminator: for the student": judged and learn,
        "discriminator: learn": judged,
    }


def loading(cached: bool) -> dict[str, int]:
    """Calls that make the batch, before train_step; a cache has made them all ahead."""
    return {"VAE: encode": not cached, "text: forward": not cached}


# --- counting ------------------------------------------------------------------------------------


class Tally(TorchDispatchMode):
    """FLOPs of what runs inside (matrix products, convolutions, attention), and the bytes of the
    tensors that come to be inside and are still alive; of `known` ones none are counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.flops, self.again = 0, 0  # all; those of what a backward pass computes again
        self.now, self.peak = 0, 0
        self.storages = WeakIdKeyDictionary((x.untyped_storage(), 0) for x in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if formula := FORMULAS.get(function._overloadpacket):
            flops = formula(*args, **kwargs, out_val=out)
            # Only what is computed again wants a gradient inside a backward pass.
            backward = torch._C._current_graph_task_id() >= 0
            self.flops += flops
            self.again += flops if backward and torch.is_grad_enabled() else 0
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.storages:
            self.storages[storage] = size = storage.nbytes()
            weakref.finalize(storage, self.release, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def release(self, size: int) -> None:
        self.now -= size


def conditioning(family: Teacher, batch: int, dtype: torch.dtype) -> Cond:
    """Random text, as its encoders would have made it."""
    shapes = family.cond_shapes().items()
    return {name: torch.randn(batch, *shape, dtype=dtype) for name, shape in shapes}


def networks(cfg: Config) -> dict[str, list[nn.Module]]:
    """By part, on the meta device; only what is trained wants a gradient."""
    family = find(cfg.teacher)
    student = family.build(cfg.shift)
    with torch.no_grad():
        family.start(student)
    if cfg.recompute:
        ranks.recompute(student)
    found = {
        "student": [student],
        "teacher": [family.build(cfg.shift)],
        "VAE": [family.build_vae()],
        "text": [net for net, _ in family.text_networks(cfg.t5)],
    }
    if cfg.w_gan:
        backbone, reader = family.build_backbone(), family.build_reader()
        disc = Discriminator(backbone, family.embedding_width(), cfg.disc_channels)
        found |= {
            "backbone": [disc.backbone],
            "heads": [disc.heads],
            "disc": [disc],
            "reader": [reader] if reader else [],
        }
    for part in ("teacher", "VAE", "text"):
        for net in found[part]:
            net.requires_grad_(False)
    return found


@dataclass(frozen=True)
class Call:
    """A network as train_step uses it."""

    run: Callable[[], Iterable[Tensor]]
    nets: list[nn.Module]
    learn: bool  # with a backward pass


def alike(found: dict) -> dict:
    """What was found of the student is true of the fake score."""
    return found | {f"fake{x[7:]}": y for x, y in found.items() if x.startswith("student")}


def call_table(cfg: Config, nets: dict[str, list[nn.Module]]) -> dict[str, Call]:
    """Every call of `calls` and `loading` but the fake score's, on random inputs."""
    table = denoiser_calls(cfg, nets) | vae_calls(cfg, nets)
    return table | (disc_calls(cfg, nets) if cfg.w_gan else {})


def denoiser_calls(cfg: Config, nets: dict[str, list[nn.Module]]) -> dict[str, Call]:
    """And the text encoders'."""
    (student,), (teacher,), encoders = nets["student"], nets["teacher"], nets["text"]
    family = find(cfg.teacher)
    batch, shape = cfg.batch, family.latent_shape(cfg.size)
    many = batch * (1 + family.uses_null)  # with and without text, in one call
    x_t, t = torch.randn(many, *shape), torch.rand(many)
    cond = conditioning(family, many, torch.bfloat16 if cfg.bf16 else torch.float32)
    scale = {"guidance": t} if family.guided_by == "input" else {}
    own = {name: value[:batch] for name, value in cond.items()}
    with torch.device("meta"):
        lengths = [tokens for _, tokens in family.text_networks(cfg.t5)]

    def draw() -> list[Tensor]:
        return [student(x_t[:batch], t[:batch], own)]

    def guide() -> list[Tensor]:
        return [teacher(x_t, t, cond | scale)]

    def read() -> list[Tensor]:
        ids = [torch.zeros(batch, n, dtype=torch.long, device=x_t.device) for n in lengths]
        return tree_leaves([net(i) for net, i in zip(encoders, ids, strict=True)])

    return {
        "student: forward": Call(draw, [student], False),
        "student: learn": Call(draw, [student], True),
        "teacher: forward": Call(guide, [teacher], False),
        "text: forward": Call(read, encoders, False),
    }


def vae_calls(cfg: Config, nets: dict[str, list[nn.Module]]) -> dict[str, Call]:
    (vae,), shape = nets["VAE"], find(cfg.teacher).latent_shape(cfg.size)
    image = torch.rand(cfg.batch, 3, *cfg.size)
    latent = torch.randn(cfg.batch, *shape, requires_grad=True)

    def decode() -> list[Tensor]:
        return [vae.decode(latent)]

    return {
        "VAE: encode": Call(lambda: [vae.encode(image)], [vae], False),
        "VAE: decode": Call(decode, [vae], False),
        "VAE: decode, learn": Call(decode, [vae], True),
    }


def disc_calls(cfg: Config, nets: dict[str, list[nn.Module]]) -> dict[str, Call]:
    (disc,), batch = nets["disc"], cfg.batch
    image = torch.rand(batch, 3, *cfg.size, requires_grad=True)
    text, weight = torch.randn(batch, find(cfg.teacher).embedding_width()), torch.rand(batch)
    maps = [x.detach() for x in disc.features(image.detach())]
    made = [x.clone().requires_grad_() for x in maps]

    def features() -> list[Tensor]:
        return disc.features(image)

    def judge() -> list[Tensor]:
        return [gan_loss(disc, made, maps, text, weight)]

    def learn() -> list[Tensor]:
        return [disc_loss(disc, maps, made, maps, text, weight)]

    return {
        "discriminator: features": Call(features, [disc], False),
        "discriminator: features, learn": Call(features, [disc], True),
        "discriminator: for the student": Call(judge, [disc], True),
        "discriminator: learn": Call(learn, [disc], True),
    }
