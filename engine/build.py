"""What a run is built of: networks, optimizers, data.

Nets, build_nets           student, fake score, teacher, discriminator and what stands around
Learner, build_learners    a trained network and its optimizers
run_blocks                 compiled, computed again in the backward pass, or neither
check_compiler             whether there is one
optimizer_class            of a name with dots
precision                  bf16 on one device
open_inputs                data and weights: the teacher's own, or what flags name
whole_net                  a denoiser that a rank can call alone
aim_adapters               what adapters read
"""

import copy
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch._dynamo.config as dynamo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from adapter import aim, anywhere, watched
from config import Config, Refusal
from dataset.cache import Cache
from dataset.images import Images
from dataset.sources import Prompts, open_data
from discriminator import Discriminator
from dmd import fake_loss, student_input
from engine import ranks
from engine.batch import load_batch, read_null, say_cut, uncropped
from engine.run import say
from engine.views import Roles, check_views, load_views, one_fixed, view_of, whole_view
from nets.files import Files
from nets.tiles import Tiled
from nets.weights import digest
from schedule import Cond, Rng, anchor_at, generator, grid
from teachers import Teacher, find
from teachers.bases import not_read
from teachers.merging import not_merged, parse_merge
from teachers.students import Student


@dataclass
class Nets:
    family: Teacher  # whose network is distilled
    student: nn.Module
    fake: nn.Module
    teacher: nn.Module
    disc: Discriminator | None
    vae: nn.Module
    ema: nn.Module  # the student's moving average; the student itself without one
    text: nn.Module | None = None  # captions -> cond; None with a cache
    reader: nn.Module | None = None  # captions -> what the discriminator reads of them; likewise
    shown: dict[str, Cond] | None = None  # of the prompts of --show
    null: Cond | None = None  # the null caption, encoded once; None: guidance needs none
    cache: Cache | None = None

    def trained(self) -> dict[str, nn.Module]:
        """By name, the average too."""
        nets = {"student": self.student, "fake": self.fake}
        nets |= {"disc": self.disc.heads} if self.disc else {}
        return nets | ({"ema": self.ema} if self.ema is not self.student else {})


@dataclass
class Learner:
    """A network, its optimizers and the learning rate that the schedule multiplies."""

    net: nn.Module
    optimizers: list[torch.optim.Optimizer]
    lr: float

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def parameters(self) -> list[Tensor]:
        return [p for group in self.groups() for p in group["params"]]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, factor: float) -> None:
        """At `factor` times the learning rate."""
        for group in self.groups():
            group["lr"] = self.lr * factor
        for optimizer in self.optimizers:
            optimizer.step()


def anchors(cfg: Config, schedule) -> tuple[float, ...]:
    """The student's taus, descending from pure noise."""
    return cfg.taus or tuple(grid(schedule, cfg.student_steps))


def open_training_data(cfg: Config, family: Teacher):
    """The data set; ValueError or OSError for what cannot be trained on."""
    family.check_size(cfg.size)
    if cfg.buckets and cfg.make_reals:
        raise Refusal("--buckets: the images of --make-reals have one shape")
    own = family.data(cfg.seed)
    if own is not None:
        if cfg.buckets:
            raise Refusal(f"--buckets: {family.name} has no images of several shapes")
        return own
    batch = cfg.batch * cfg.accumulate
    data = open_data(cfg.data, cfg.size, cfg.seed, cfg.crop, cfg.buckets, batch)
    if cfg.buckets and not isinstance(data, Images):
        raise Refusal(f"--buckets: {cfg.data} has no images of several shapes")
    for size in data.sizes if cfg.buckets else ():
        family.check_size(size)
    if isinstance(data, Prompts) and cfg.w_gan and not cfg.make_reals:
        remedy = "add --make-reals N, for which the teacher draws some, or --no-gan"
        raise Refusal(f"--data {cfg.data} has no images to judge by; {remedy}")
    return data


def open_inputs(cfg: Config, family: Teacher):
    """The data set, with every file of weights looked for too: all that is missing is said at once.

    ValueError or OSError.
    """
    problems, remarks, data = [], [], None
    try:
        data = open_training_data(cfg, family)
    except (Refusal, FileNotFoundError) as error:
        problems.append(error)
    try:
        files = locate_files(cfg, family, cached=bool(cfg.cache))
        if cfg.base or cfg.merge:
            remarks = check_base(family, files, cfg.merge)
    except (Refusal, FileNotFoundError, PermissionError) as error:
        problems.append(error)
    if len(problems) > 1:
        raise Refusal("; and ".join(map(str, problems)))
    if problems:
        raise problems[0]
    # What the data has to say before a sample is read is the same on all ranks.
    for remark in filter(None, (*remarks, data.remark())):
        say(remark)
    return data


def locate_files(cfg: Config, family: Teacher, cached: bool = False) -> Files:
    """cached: text and latents come from a cache."""
    asked = {"text": not cached, "t5": cfg.t5, "disc": cfg.w_gan > 0}
    return family.locate(cfg.weights, **asked, base=cfg.base)


def check_base(family: Teacher, files: Files, merge: Sequence[str]) -> list[str]:
    """Remarks on what of a fine-tune and of LoRAs is not read. ValueError for what cannot be.

    Looks at headers, LoRAs and one weight. Where a student draws there is no denoiser, and nothing
    to say.
    """
    path = files.get("denoiser")
    if path is None:
        return []
    net = family.load(1.0, path, None, "meta")
    next(family.tensors_of(net, path, torch.float32, "cpu", merge))
    left = not_read(family.known(), path, family.parts(), family.layout(path, net)["prefix"])
    return [remark for remark in (left, *map(not_merged, merge)) if remark]


def base_of(cfg: Config, family: Teacher) -> str:
    """What the run begins as: a digest of the denoiser's files, and of each LoRA in them."""
    paths = family.locate(cfg.weights, text=False, base=cfg.base)["denoiser"]
    return identity(family, paths, cfg.merge)


def identity(family: Teacher, paths: list[Path], merge: Sequence[str]) -> str:
    """Of a denoiser's files and of what is merged into them: their digests."""
    return "+".join([digest(paths, prefix_of(family, paths)), *merged_of(merge)])


def prefix_of(family: Teacher, paths: list[Path]) -> str:
    """What precedes the denoiser's names in its files."""
    return family.layout(paths, family.load(1.0, paths, None, "meta"))["prefix"]


def merged_of(merge: Sequence[str]) -> list[str]:
    """Of each LoRA its digest and scale."""
    added = sorted((digest(path), scale) for path, scale in map(parse_merge, merge))
    return [f"{name}:{scale:g}" for name, scale in added]


def trained_on(student: Student | None, files: Files, merge: Sequence[str]) -> str:
    """A remark where a student that is a LoRA was trained on other weights; "": on these."""
    was = student.about.get("base") if student and "denoiser" in files else None
    here = identity(student.family, files["denoiser"], merge) if was else None
    if not was or was == here:
        return ""
    was = f"{student.path} was trained on other weights ({was}, here {here})"
    return f"{was}; give them with --base and --merge"


# --- networks ------------------------------------------------------------------------------------


def build_nets(cfg: Config, device: torch.device, cache: Cache | None = None) -> Nets:
    """Student, fake score and average begin as the teacher. ValueError, OSError for a bad file.

    Several ranks share what is trained, as copies or as shards, and in shards the teacher too.
    """
    if cfg.compile:
        check_compiler(device)
    if cfg.adapter or cfg.base_dtype != "bf16":
        check_views(cfg)
    family = find(cfg.teacher)
    files = locate_files(cfg, family, cached=bool(cache))
    frozen = torch.bfloat16 if cfg.bf16 else torch.float32
    disc = build_disc(cfg, family, files, frozen, device) if cfg.w_gan else None
    mesh = ranks.choose_mesh(cfg.shard, count_trained(cfg, family, disc), device)
    if disc:
        ranks.shard_heads(disc.heads, mesh, device)
    roles = load_views if cfg.adapter else load_roles
    student, fake, ema, teacher = roles(cfg, family, files["denoiser"], frozen, device, mesh)
    vae = family.load_vae(files, frozen, device)
    vae = Tiled(vae, cfg.vae_tile) if cfg.vae_tile else vae
    for net in {student: 0, fake: 0, ema: 0, teacher: 0}:
        run_blocks(net, cfg.compile, cfg.recompute and net in (student, fake))
    for net in (student, fake, ema, teacher, vae) if cfg.channels_last else ():
        channels_last(net)
    text = None if cache else family.load_text(files, frozen, device)
    reading = cfg.w_gan and not cache
    reader = family.load_reader(files, frozen, device) if reading else None
    shown = encode_shown(
        cfg,
        text or (cfg.show and family.load_text(locate_files(cfg, family), frozen, device)),
        device,
    )
    null = read_null(cfg, family, text, device)
    return Nets(family, student, fake, teacher, disc, vae, ema, text, reader, shown, null, cache)


def load_roles(
    cfg: Config,
    family: Teacher,
    path: list[Path],
    frozen: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> Roles:
    """Student, fake score, average (the student itself without one) and teacher, each whole."""
    load = partial(load_denoiser, cfg, family, path, device)
    student = load(torch.float32, family.start, mesh)
    twin = partial(load, torch.float32, family.start, mesh, student)
    fake, ema = twin(), twin().requires_grad_(False) if cfg.ema else student
    sharded = mesh if mesh and mesh.size(-1) > 1 else None  # a frozen network has no need of copies
    return student, fake, ema, load(frozen, freeze, sharded)


@torch.no_grad()
def load_denoiser(
    cfg: Config,
    family: Teacher,
    path: list[Path],
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], object],
    mesh: DeviceMesh | None,
    twin: nn.Module | None = None,
) -> nn.Module:
    """From the teacher's file, then prepared; or from a twin that is so already.

    On a mesh it is cut as a form without memory, so `prepare` first says what of it is frozen; then
    dealt out while it is read, or copied shard from shard.
    """
    if mesh is None:
        if twin is not None:
            return copy.deepcopy(twin)
        net = family.load(cfg.shift, path, dtype, device, cfg.merge)
    else:
        net = family.load(cfg.shift, path, dtype, torch.device("meta"))
        prepare(net)
        ranks.shard(net, mesh, device, cfg.bf16)
        if twin is not None:
            ranks.copy_shards(net, twin)
            return net
        ranks.deal(net, family.read(cfg.shift, path, dtype, device, cfg.merge), device)
    prepare(net)
    return net


# --- how they run --------------------------------------------------------------------------------

COMPILER = "inductor"  # of those that torch.compile knows


def run_blocks(net: nn.Module, compiled: bool, recompute: bool) -> None:
    """How a denoiser's blocks run, whatever was said before. recompute: see `ranks.recompute`.

    A block's `forward` is compiled, so that its graph is inside of what is computed again, and
    inside of the hooks by which FSDP brings weights together. Blocks alike share their graphs, of
    any network; there is one for each shape of input, for weights that learn, and for those calls
    that do not.
    """
    units = [unit for block in net.blocks() for unit in in_a_row(block)]
    for unit in (*net.blocks(), *units):
        unit.__dict__.pop("forward", None)
    if compiled:
        # Each counts all graphs of a function: a UNet's parts have a dozen shapes.
        dynamo.recompile_limit, dynamo.accumulated_recompile_limit = 256, 4096
        for unit in units:
            unit.forward = torch.compile(
                unit.forward, fullgraph=True, dynamic=False, backend=COMPILER
            )
    if recompute:
        ranks.recompute(net)


def in_a_row(block: nn.Module) -> list[nn.Module]:
    """A block, or the parts of one that only runs them in a row, such as a UNet's: of these more
    are alike, and sooner compiled."""
    if not isinstance(block, nn.Sequential):
        return [block]
    return [unit for part in block for unit in in_a_row(part)]


def check_compiler(device: torch.device) -> None:
    """ValueError where torch.compile has none that works: it is first asked in an iteration."""
    try:
        torch.compile(torch.neg, backend=COMPILER)(torch.zeros(1, device=device))
    except Exception as error:  # of a compiler's, anything
        raise Refusal(f"--compile: torch.compile fails here ({ranks.reason(error)})") from None


def channels_last(net: nn.Module) -> None:
    """Convolutions' weights in the order that a GPU's kernels want; theirs is then their output's.

    Shards stay in order: FSDP takes no other.
    """
    if not ranks.is_shared(net):
        net.to(memory_format=torch.channels_last)


def freeze(net: nn.Module) -> None:
    net.requires_grad_(False)


def encode_shown(cfg: Config, text, device: torch.device) -> dict[str, Cond] | None:
    """The prompts of --show, (1, ...) each."""
    sizes = uncropped(cfg.size)
    if cfg.show:
        say_cut(text, list(cfg.show), "prompts of --show")
    return {prompt: text([prompt], device, sizes) for prompt in cfg.show} or None


def count_trained(cfg: Config, family: Teacher, disc: Discriminator | None) -> int:
    """Weights of student, fake score and the discriminator's heads."""
    with torch.device("meta"):
        net = family.build(cfg.shift)
        net = view_of(net, cfg, family) if cfg.adapter else net
    heads = [disc.heads] if disc else []
    return sum(p.numel() for part in (net, net, *heads) for p in part.parameters())


def build_disc(
    cfg: Config, family: Teacher, files: Files, dtype: torch.dtype, device: torch.device
) -> Discriminator:
    backbone = family.load_backbone(files, dtype, device)
    torch.manual_seed(generator(cfg.seed, "heads").initial_seed())
    with torch.device("meta" if ranks.rank() else "cpu"):  # rank 0 draws, alike on every machine
        return Discriminator(backbone, family.embedding_width(), cfg.disc_channels)


def build_learners(nets: Nets, cfg: Config) -> dict[str, Learner]:
    def learner(net: nn.Module, blocks: Iterable[nn.Module], lr: float) -> Learner:
        return Learner(net, build_optimizers(net, blocks, lr, cfg), lr)

    learners = {
        name: learner(net, net.blocks(), lr)
        for name, net, lr in (("student", nets.student, cfg.lr), ("fake", nets.fake, cfg.lr_fake))
    }
    return learners | ({"disc": learner(nets.disc.heads, [], cfg.lr_disc)} if nets.disc else {})


def build_optimizers(
    net: nn.Module, blocks: Iterable[nn.Module], lr: float, cfg: Config
) -> list[torch.optim.Optimizer]:
    """Together they hold what of `net` is trained. Muon takes the matrices of the blocks, no decay,
    steps as long as AdamW's (digits/pretrain.py does so too); AdamW the rest.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    adam = {"lr": lr, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": 0.0}
    adam["fused"] = True  # else an update's temporary is as large as a network
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW(trained, **adam)]
    if cfg.optimizer != "muon":
        return [optimizer_class(cfg.optimizer)(trained, lr=lr)]
    # A single row is no matrix, and nothing that shards could multiply.
    inside = {p for block in blocks for p in block.parameters() if p.ndim == 2 and len(p) > 1}
    matrices = [p for p in trained if p in inside]
    rest = [p for p in trained if p not in inside]
    how = {"lr": lr, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    muon = [torch.optim.Muon(matrices, **how)] if matrices else []
    return muon + ([torch.optim.AdamW(rest, **adam)] if rest else [])


def optimizer_class(name: str) -> type:
    """package.module.Name. ValueError for what is not there."""
    module, _, kind = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refusal(
            f'--optimizer is "{name}"; choose adamw, muon or package.module.Name ({error})'
        ) from None


def check_optimizer(name: str) -> None:
    """ValueError, before anything is loaded."""
    if name not in ("adamw", "muon"):
        optimizer_class(name)


def precision(cfg: Config, nets: Nets, device: torch.device) -> torch.autocast:
    """bf16 on one device; networks shared by several ranks cast by themselves."""
    enabled = cfg.bf16 and not ranks.is_shared(nets.student)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def whole_net(net: nn.Module, cfg: Config, nets: Nets) -> nn.Module:
    """A denoiser that a rank can call alone. All ranks must ask for it."""
    family = nets.family
    if not ranks.is_shared(net):
        return net
    if cfg.adapter:
        return whole_view(net, nets.teacher, cfg, family)
    alone = family.build(cfg.shift)
    alone.load_state_dict(dict(ranks.gather(net)), assign=True)
    return alone.requires_grad_(False)


# --- what adapters read --------------------------------------------------------------------------

WATCHED = 64  # samples at least, and 16 batches


@torch.no_grad()
def aim_adapters(cfg: Config, nets: Nets, data, device: torch.device) -> None:
    """Before the first step: A reads what student and fake score see most of in their first
    iterations, alike on every rank; with --adapter-init random, whatever it comes to."""
    views = {net: 0 for net in (nets.student, nets.fake, nets.ema)}
    if cfg.adapter_init == "random":
        found = anywhere(nets.student, cfg.seed)
    else:
        with watched([nets.student, nets.fake], rows=4 * cfg.adapter + 64) as found:
            each = cfg.batch * cfg.accumulate
            for k in range(max(16, WATCHED // each)):
                ids = range(k * each, (k + 1) * each)
                batch = load_batch(ids, data(ids), nets, cfg, device).split(cfg.accumulate)[0]
                with precision(cfg, nets, device):
                    draw_unlearned(batch, nets, cfg, k)
    aim([*views], found)
    one_fixed(*views)


def draw_unlearned(batch, nets: Nets, cfg: Config, k: int) -> None:
    """The calls of an iteration's beginning, for what comes into the layers."""
    student, rng = nets.student, partial(Rng, cfg.seed, k)
    taus = anchors(cfg, student.schedule)
    p = 1.0 if batch.images is None else cfg.p_backward
    given = (batch.x0_real, batch.cond, taus, rng("input", batch.ids), p)
    x_t, i = student_input(student, *given)
    tau = anchor_at(taus, i, x_t)
    x0 = student.schedule.x0(x_t, student(x_t, tau, batch.cond), tau)
    fake_loss(nets.fake, x0, batch.cond, cfg.t_fake, rng("fake", batch.ids))
