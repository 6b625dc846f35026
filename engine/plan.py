"""What one iteration costs, before anything is loaded: bytes on each GPU, and FLOPs.

    turns, calls         which networks one train_step calls, and how often
    call_table           each of these calls by itself
    measure              what each kind of call costs, on tensors that have no memory
    resident, moments    bytes that are always there, and what each stage of a turn adds to them
    flops                of a turn, by network; averaged over all turns
    show_plan            the plan for so many GPUs: does it fit, and what to change

With several GPUs the trained networks, their gradients and Adam state, and the teacher are sharded
(FSDP), one block at a time being whole; the rest is on every GPU. With one, nothing is sharded.
Knows nothing of files; no weight is read and no GPU is needed.
"""

import argparse
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

import model
from config import Config
from discriminator import Discriminator, disc_loss, gan_loss
from engine import ranks
from nets.qwen3 import kept_turns
from nets.text import kept_buckets
from nets.vision import per_channel
from nets.z_image import kept_positions
from schedule import Cond, grid
from teachers import Teacher, find

PARTS = ("student", "fake", "teacher", "discriminator", "VAE", "text")
RESERVE = 4e9  # bytes that torch cannot hand out: CUDA's context, NCCL's buffers, fragmentation

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
    found = []
    for i, tau in enumerate(cfg.taus or grid(schedule, cfg.student_steps)):
        judged = cfg.w_gan > 0 and bool(schedule.alpha(torch.tensor(tau, device="cpu")) > 0)
        for backward, p in ((True, cfg.p_backward), (False, 1 - cfg.p_backward)):
            for learn, share in ((True, 1 / cfg.ttur), (False, 1 - 1 / cfg.ttur)):
                turn = Turn(learn, judged, i if backward else 0)
                found.append((p * share / cfg.student_steps, turn))
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


aten = torch.ops.aten
FORMULAS = flop_registry | {  # torch counts the attention kernels of GPUs; these are the CPU's
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}


class Meter(TorchDispatchMode):
    """FLOPs of what runs inside (matrix products, convolutions, attention), and the bytes of the
    tensors that come to be inside and are still alive.

    Of `known` tensors no bytes are counted; gradients handed to `sharded` are counted apart.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.flops, self.again = 0, 0  # all; those of what a backward pass computes again
        self.now, self.gradients = 0, 0
        self.history = [(0, 0)]  # (now, gradients) whenever one of them grew
        self.storages = WeakIdKeyDictionary()  # storage -> [its bytes, as counted]
        for tensor in known:
            self.storages[tensor.untyped_storage()] = [0]

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
            self.storages[storage] = counted = [storage.nbytes()]
            weakref.finalize(storage, self.release, counted)
            self.now += counted[0]
            self.history.append((self.now, self.gradients))

    def release(self, counted: list[int]) -> None:
        self.now -= counted[0]

    def sharded(self, parameter: Tensor) -> None:
        """A parameter's gradient is ready: in fp32, and shared out over the GPUs."""
        counted = self.storages[parameter.grad.untyped_storage()]
        self.now -= counted[0]
        counted[0] = 0
        self.gradients += 4 * parameter.numel()
        self.history.append((self.now, self.gradients))


def peak(history: list[tuple[int, int]], gpus: int) -> int:
    """Bytes, where gradients are shared out over so many GPUs."""
    return max(now + gradients // gpus for now, gradients in history)


@contextlib.contextmanager
def norms_in_fp32() -> Iterator[None]:
    """As CUDA's autocast computes them; the CPU's takes them as they come."""

    def widened(norm: Callable) -> Callable:
        def in_fp32(*args, **kwargs) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args = [x.float() if isinstance(x, Tensor) else x for x in args]
            return norm(*args, **kwargs)

        return in_fp32

    norms = {name: getattr(F, name) for name in ("layer_norm", "group_norm", "rms_norm")}
    try:
        for name, norm in norms.items():
            setattr(F, name, widened(norm))
        yield
    finally:
        for name, norm in norms.items():
            setattr(F, name, norm)


# --- what a call costs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one call, on one GPU."""

    flops: int  # with what is computed again
    again: int  # of these, what is computed again
    kept: int  # bytes alive after the forward pass: the result, and what a backward pass needs
    forward: list[tuple[int, int]]  # bytes during the forward pass, as Meter's history
    both: list[tuple[int, int]]  # during both passes


def measured(
    call: Callable[[], Iterable[Tensor]],
    nets: Iterable[nn.Module],
    learn: bool,
    backward: bool = True,
) -> Cost:
    """One call on tensors without memory. nets: whose weights are counted elsewhere; learn: with
    gradients, and then a backward pass."""
    weights = [x for net in nets for x in (*net.parameters(), *net.buffers())]
    with Meter(weights) as meter, torch.set_grad_enabled(learn):
        ready = [p.register_post_accumulate_grad_hook(meter.sharded) for p in trained(nets)]
        out = call()
        kept, forward = meter.now, list(meter.history)
        if learn and backward:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])
    for hook in ready:
        hook.remove()
    for weight in weights:
        weight.grad = None
    return Cost(meter.flops, meter.again, kept, forward, meter.history)


def trained(nets: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for net in nets for p in net.parameters() if p.requires_grad]


def hollow(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network of the meta device as one whose tensors have a device, and still no memory."""
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            empty = torch.empty(p.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(empty, p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return net


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


def measure(cfg: Config, nets: dict[str, list[nn.Module]], cuda: bool) -> dict[str, Cost]:
    """Every call in `calls` and `loading`. cuda: with the dtypes of its autocast."""
    forget_tables()
    norms = norms_in_fp32() if cuda and cfg.bf16 else contextlib.nullcontext()
    try:
        # What autocast would cast is bf16 from the start, as sharding hands it out; `moments`
        # counts the copies that autocast keeps where nothing is sharded.
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16), norms:
            for part in nets:
                for net in nets[part] if part != "disc" else ():
                    trains = torch.bfloat16 if cfg.bf16 and part != "heads" else torch.float32
                    hollow(net, trains)
            table = call_table(cfg, nets)
            every = tqdm(table.items(), desc="plan", leave=False, disable=None)
            costs = {name: measured(x.run, x.nets, x.learn) for name, x in every}
            student, draw = nets["student"], table["student: learn"].run
            for block in student[0].blocks():  # without recomputation
                block.__dict__.pop("forward", None)
            costs["student: all kept"] = measured(draw, student, True, backward=False)
            return alike(costs)
    finally:
        forget_tables()


def forget_tables() -> None:
    """What networks keep for each device: tables with memory and without do not mix."""
    for kept in (model.kept_rotations, per_channel, kept_buckets, kept_turns, kept_positions):
        kept.cache_clear()


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


# --- bytes on one GPU ----------------------------------------------------------------------------


def count(nets: Iterable[nn.Module]) -> int:
    """Weights."""
    return sum(p.numel() for net in nets for p in net.parameters())


def count_trained(nets: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in trained(nets))


def resident(
    cfg: Config, nets: dict[str, list[nn.Module]], gpus: int, cached: bool
) -> dict[str, int]:
    """Bytes that are there throughout, by part. cached: no text encoder, no reader of captions."""
    frozen = 2 if cfg.bf16 else 4
    heads, copies = nets.get("heads", []), 2 + (cfg.ema > 0)
    learning = 2 * count_trained(nets["student"]) + count_trained(heads)
    family = find(cfg.teacher)
    pixels, latents = 3 * cfg.size[0] * cfg.size[1], family.latent_shape(cfg.size)
    cond = conditioning(family, cfg.batch, torch.bfloat16 if cfg.bf16 else torch.float32)
    words = sum(x.nbytes for x in cond.values()) * (1 + family.uses_null)
    return {
        "student and fake score, fp32": 4 * copies * count(nets["student"]) // gpus,
        "heads of the discriminator, fp32": 4 * count(heads) // gpus,
        "Adam's two moments, fp32": 8 * learning // gpus,
        "teacher": frozen * count(nets["teacher"]) // gpus,
        "VAE": frozen * count(nets["VAE"]),
        "backbone of the discriminator": frozen * count(nets.get("backbone", [])),
        "text encoders": 0 if cached else frozen * count([*nets["text"], *nets.get("reader", [])]),
        "batch": 4 * cfg.batch * (pixels + 3 * latents[0] * latents[1] * latents[2]) + words,
        "blocks made whole": gathered(cfg, nets) if gpus > 1 else 0,
    }


def gathered(cfg: Config, nets: dict[str, list[nn.Module]]) -> int:
    """Of sharded networks: a block and the next one, what is in no block, a block's gradient as it
    came and in fp32; a head of the discriminator likewise, in fp32."""
    (student,), heads, wide = nets["student"], nets.get("heads", []), 2 if cfg.bf16 else 4
    blocks = [count([block]) for block in student.blocks()]
    outside = count([student]) - sum(blocks)
    largest_head = max((count([head]) for each in heads for head in each), default=0)
    denoiser = wide * (2 * max(blocks) + outside) + (wide + 4) * max(blocks)
    return max(denoiser, (2 * 4 + 4) * largest_head)


def moments(
    cfg: Config,
    nets: dict[str, list[nn.Module]],
    costs: dict[str, Cost],
    turn: Turn,
    gpus: int,
    cached: bool,
    cuda: bool = True,
) -> dict[str, int]:
    """Bytes beyond `resident` at the worst of each stage of an iteration, in its order."""

    def kept(name: str, when: bool) -> int:
        return costs[name].kept if when else 0

    def forward(*names: str) -> int:
        return max(peak(costs[name].forward, gpus) for name in names)

    def both(name: str) -> int:
        return peak(costs[name].both, gpus)

    def update(nets: list[nn.Module]) -> int:
        """Gradients, and what Adam needs beside them: for all weights at once, or one by one."""
        size, largest = count_trained(nets), max(p.numel() for p in trained(nets))
        return 4 * size // gpus + 4 * (size // gpus if cuda else 2 * largest)

    learn, judged = turn.learn, turn.judged
    grad = ", learn" if learn else ""
    decode, features = f"VAE: decode{grad}", f"discriminator: features{grad}"
    # Unsharded, autocast keeps the bf16 copies of trained weights to the iteration's end.
    copies = 2 * count_trained(nets["student"]) * (cfg.bf16 and gpus == 1)
    mine = copies * learn  # the student's; then what a backward pass needs of it
    drawn = mine + kept("student: learn", learn)
    real = kept("discriminator: features", judged) * (1 + (len(cfg.disc_augment) > 0))
    made = kept("discriminator: features", judged)
    image = drawn + real + kept(decode, judged)

    found = {} if cached else {"batch": forward("VAE: encode", "text: forward")}
    if turn.drawn or not learn:
        found["student draws"] = forward("student: forward")
    if learn:
        found["student draws, to learn"] = mine + forward("student: learn")
    if judged:
        found["features of real images"] = drawn + forward("discriminator: features")
        found["image decoded"] = drawn + real + forward(decode)
        found["features of it"] = image + forward(features)
    if learn:
        before = image + kept(features, judged)
        found["DMD and ISG"] = before + forward("teacher: forward", "fake: forward")
    if learn and judged:
        found["judged for the student"] = before + both("discriminator: for the student")
        found["backward through the backbone"] = image + both(features)
        found["backward through the VAE"] = drawn + real + made + both(decode)
    left = real + made  # features, for the discriminator's own loss
    if learn:
        found["backward through the student"] = mine + left + both("student: learn")
        found["student's update"] = mine + left + update(nets["student"])
    found["fake score learns"] = mine + copies + left + both("fake: learn")
    found["its update"] = mine + copies + left + update(nets["student"])
    if judged:
        found["discriminator learns"] = mine + copies + left + both("discriminator: learn")
        found["update of its heads"] = mine + copies + left + update(nets["heads"])
    return found


# --- FLOPs ---------------------------------------------------------------------------------------


def flops(costs: dict[str, Cost], times: dict[str, int]) -> dict[str, float]:
    """Of so many calls, by part."""
    found = dict.fromkeys(PARTS, 0.0)
    for name, n in times.items():
        if n:
            found[name.split(":")[0]] += n * costs[name].flops
    return found


def mean_flops(costs: dict[str, Cost], cfg: Config, learn: bool | None = None) -> dict[str, float]:
    """Of train_step, over all turns, or over the student's (learn) or the others."""
    found, total = dict.fromkeys(PARTS, 0.0), 0.0
    for p, turn in turns(cfg):
        if learn is None or turn.learn == learn:
            total += p
            for part, n in flops(costs, calls(turn, cfg)).items():
                found[part] += p * n
    return {part: n / total for part, n in found.items()}


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    cfg: Config
    gpus: int
    cached: bool
    parts: dict[str, int]  # `resident`
    stages: dict[str, int]  # `moments` of the turn with the highest
    activations: tuple[int, int]  # of the student between its passes: as planned, nothing again
    flops: dict[str, dict[str, float]]  # per kind of turn, by part

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + max(self.stages.values())


class Measured:
    """A configuration's networks and what their calls cost, for any number of GPUs."""

    def __init__(self, cfg: Config, cuda: bool = True):
        self.cfg, self.cuda = cfg, cuda
        with torch.device("meta"):
            self.nets = networks(cfg)
        self.costs = measure(cfg, self.nets, cuda)

    def plan(self, gpus: int, cached: bool = False) -> Plan:
        """cached: texts and latents come from a cache, so their encoders are not there."""
        cfg, costs = self.cfg, self.costs
        kinds = {turn for p, turn in turns(cfg) if p}
        stages = [self.moments(turn, gpus, cached) for turn in kinds]
        loaded = flops(costs, loading(cached))
        spent = {
            "every turn": mean_flops(costs, cfg),
            "student's turn": mean_flops(costs, cfg, True),
        }
        if cfg.ttur > 1:
            spent["another turn"] = mean_flops(costs, cfg, False)
        return Plan(
            cfg,
            gpus,
            cached,
            resident(cfg, self.nets, gpus, cached),
            max(stages, key=lambda stage: max(stage.values())),
            (costs["student: learn"].kept, costs["student: all kept"].kept),
            {turn: {part: x[part] + loaded[part] for part in PARTS} for turn, x in spent.items()},
        )

    def moments(self, turn: Turn, gpus: int, cached: bool) -> dict[str, int]:
        return moments(self.cfg, self.nets, self.costs, turn, gpus, cached, self.cuda)


def fits(plan: Plan, memory: float) -> bool:
    return plan.total + RESERVE <= memory


def report(plan: Plan, memory: float) -> str:
    """The plan as text, in GB (10^9 bytes) of each GPU and TFLOP."""
    cfg, gigabytes = plan.cfg, 1e9
    sizes = f"{cfg.size[0]} x {cfg.size[1]}, {cfg.batch} a GPU"
    lines = [f"{find(cfg.teacher).name}, {sizes}, {plan.gpus} x {memory / gigabytes:g} GB", ""]
    lines += ["always there"]
    lines += [f"  {name:<36}{n / gigabytes:>8.2f}" for name, n in plan.parts.items()]
    lines += ["and in the stages of an iteration"]
    highest = max(plan.stages, key=plan.stages.get)
    for name, n in plan.stages.items():
        lines += [f"  {name:<36}{n / gigabytes:>8.2f}{'  <- most' if name == highest else ''}"]
    planned, all_kept = (n / gigabytes for n in plan.activations)
    again = "recomputed per block" if cfg.recompute else "kept"
    lines += [f"  (activations of the student, {again}: {planned:.2f}; all kept: {all_kept:.2f})"]
    verdict = "fits" if fits(plan, memory) else "does not fit"
    total, room = plan.total / gigabytes, RESERVE / gigabytes
    lines += [f"{'in all, GB per GPU':<38}{total:>8.2f}  {verdict}, with {room:g} GB to spare", ""]
    lines += [f"{'TFLOP per iteration and GPU':<38}" + "".join(f"{x:>16}" for x in plan.flops)]
    for part in PARTS:
        row = [x[part] / 1e12 for x in plan.flops.values()]
        lines += [f"  {part:<36}" + "".join(f"{n:>16.4g}" for n in row)]
    sums = [sum(x.values()) / 1e12 for x in plan.flops.values()]
    return "\n".join([*lines, f"  {'sum':<36}" + "".join(f"{n:>16.4g}" for n in sums)])


def changes(measured: Measured, gpus: int, memory: float, cached: bool) -> list[str]:
    """What makes it smaller, each alone, and what that would need."""
    cfg, found = measured.cfg, []
    if not cached:
        found.append(("--cache DIR", measured.plan(gpus, True)))
    more = (measured.plan(gpus * 2**k, cached) for k in range(1, 7))
    enough = next((plan for plan in more if fits(plan, memory)), None)
    if enough:
        found.append((f"{enough.gpus} GPUs", enough))
    flags = {
        "--recompute": {"recompute": True},
        "--disc-channels 256": {"disc_channels": 256} if cfg.w_gan else {},
        "--batch 1": {"batch": 1},
        f"--size {cfg.size[0] // 2} {cfg.size[1] // 2}": {"size": tuple(n // 2 for n in cfg.size)},
    }
    for flag, fields in flags.items():
        changed = dataclasses.replace(cfg, **fields)
        if changed != cfg:
            found.append((flag, Measured(changed, measured.cuda).plan(gpus, cached)))
    return [
        f"  {name:<36}{plan.total / 1e9:>8.2f}{'  fits' if fits(plan, memory) else ''}"
        for name, plan in found
    ]


# --- train.py --plan -----------------------------------------------------------------------------


def show_plan(cfg: Config, given: argparse.Namespace) -> int:
    """Prints the plan, and what to change if it does not fit. Returns the exit code.

    Raises ValueError on what cannot be.
    """
    find(cfg.teacher).check_size(cfg.size)
    measured, memory = Measured(cfg), 1e9 * given.gpu_memory
    plan = measured.plan(given.gpus, bool(cfg.cache))
    print(report(plan, memory))
    if fits(plan, memory):
        return 0
    print("\nwhat to change, each alone, and what it then needs (GB per GPU)")
    print("\n".join(changes(measured, given.gpus, memory, bool(cfg.cache))))
    return 1
