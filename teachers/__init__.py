"""The seam: everything in which one teacher differs from another, as questions with answers.

    Teacher      the questions; a family's file, or one's own, answers what is not so by default
    find         a teacher by its name, or from a file of one's own: --teacher path/to/mine.py
    names        the teachers that come with the project
    configure    a teacher's preset with flags over it

One file per family: digits.py, flux.py, klein.py, sd35.py, sdxl.py (SDXL, SD 1.5), z_image.py,
each with a dict TEACHERS; a file of one's own defines TEACHER, and docs/own_teacher.md has a
complete one. Whose student a file is: students.py. Nobody outside this folder asks for a teacher's
name or kind. Networks are imported where they are built, so that presets, names and --help need no
torch.

B batch, C H W latent, T text tokens.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, Refusal, near, resolve
from nets.files import SHARED, Files, Part, find_files
from nets.names import Known
from teachers.sizes import Networks, scaled_sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nets.names import Other

    Cond = dict[str, Tensor]


class Teacher:
    """A teacher's answers. Each question says who asks it."""

    # How guidance is applied, asked by whoever guides it: "null": classifier-free, away from the
    # null caption; "input": the scale is an input of the network; "none": a few-step model.
    guided_by = "null"
    only_sampled = False  # a few-step model itself: sample.py draws with it, train.py refuses it
    # Few-step models its makers distilled from it, by the name of their file: what a student's
    # metadata would say (see students.py); sample.py and evaluate.py take them for students.
    released: dict[str, dict[str, str]] = {}
    elsewhere: object = None  # what of it other programs call how: see elsewhere.py
    licence = ""  # said by --help, where it is not free
    sampled_at_once = 1  # images at a time, by default; sample.py and evaluate.py ask
    measured_at_once = 8  # images that evaluate.py's networks take at a time
    watched = 4, 2  # prompts, and images of each, that train.py's watch looks at
    enlarged = 1  # how many pixels of a PNG a pixel becomes; sample.py asks
    reads_itself = False  # its own text (`embedding`), not CLIP, reads for the discriminator
    examined = False  # whether `exam` gives one; train.py and evaluate.py ask
    optional: tuple[str, ...] = ()  # parts that --no-t5 does without; whoever locates files asks
    not_weights: tuple[str, ...] = ()  # what is in its files and no network wants
    own_data = ""  # said where --data or --cache is refused: it brings its own data
    with_adapters: dict = {}  # what of the preset changes with --adapter; `configure` asks
    not_adapted: tuple[str, ...] = ()  # layers that get no adapter, by how their names begin
    lora_format = "comfyui"  # what --lora-format "own" is; see lora.py
    own_features = ""  # said where other measures are refused: `features` has its own

    def __init__(self, name: str, preset: Config, fewer: dict[int, dict] | None = None):
        """preset: every setting, trained and sampled; fewer: what else changes for another number
        of student steps. `configure` asks."""
        self.name, self.preset, self.fewer = name, preset, fewer or {}

    # --- files -----------------------------------------------------------------------------------

    def parts(self) -> dict[str, Part]:
        """Its official files by part: "denoiser", "vae", and what `load_text` asks for.

        And "backbone", if the discriminator shall not see with DINOv2.
        """
        return {}

    def locate(
        self,
        weights: str = "",
        denoiser: bool = True,
        text: bool = True,
        t5: bool = True,
        disc: bool = False,
        base: str = "",
    ) -> Files:
        """Every file that will be wanted, found before anything is loaded; every command asks.

        weights: a folder; "": the preset's, else the hub's cache, else downloaded. denoiser: not,
        where a student's file is given; text: not, where a cache is; t5: the optional parts; disc:
        the discriminator's frozen networks too. base: a fine-tune in place of the denoiser, and of
        what else is in its file; see bases.py. FileNotFoundError, PermissionError or ValueError.
        """
        from teachers.bases import from_base

        weights = weights or self.preset.weights
        if not t5 and not self.optional:
            raise Refusal(f"--no-t5: only SD 3.5 does without T5, {self.name} does not")
        wanted = dict(self.parts())
        if disc:
            wanted = self.shared() | wanted
        else:
            wanted.pop("backbone", None)
        if not denoiser:
            wanted.pop("denoiser")
        if not t5:
            wanted = {name: part for name, part in wanted.items() if name not in self.optional}
        if not text:
            kept = ("denoiser", "vae", "backbone", "dinov2")
            wanted = {name: part for name, part in wanted.items() if name in kept}
        given = from_base(base, wanted) if base else {}
        wanted = {name: part for name, part in wanted.items() if name not in given}
        return given | find_files(wanted, Path(weights) if weights else None)

    def shared(self) -> dict[str, Part]:
        """What the discriminator sees and reads with, where the teacher does not bring it."""
        own = {"dinov2"} if "backbone" in self.parts() else set()
        own |= {"clip_vit", "clip_vit_tokenizer"} if self.reads_itself else set()
        return {name: part for name, part in SHARED.items() if name not in own}

    def prefix(self, part: str = "denoiser") -> str:
        """What precedes a network's names in the official file, and in a student's."""
        return self.parts()[part].prefix if part in self.parts() else ""

    # --- the denoiser ----------------------------------------------------------------------------

    @property
    def sizes(self) -> Networks:
        """Sizes of all networks. `resized` replaces them."""
        if "_sizes" not in self.__dict__:
            self._sizes = self.full_size()
        return self._sizes

    def full_size(self) -> Networks:
        """The sizes of the official files."""
        raise NotImplementedError(f"{self.name} does not say its sizes")

    def build(self, shift: float) -> nn.Module:
        """The denoiser, weights not set, with its schedule; shift: of a flow's times."""
        raise NotImplementedError(f"{self.name} does not build its denoiser")

    def start(self, net: nn.Module) -> None:
        """Makes of the teacher's network, in place, what student and fake score begin as.

        Where ranks share it, first of its form on the meta device, then of its shards.
        """

    def own_weights(self, net: nn.Module, guidance: float) -> dict[str, Tensor]:
        """What student and fake score have in place of weights of the teacher's network, by name,
        in fp32, where they are adapters on it: there, what `start` is where they are whole.

        guidance: --guidance, the scale that is theirs where the network takes one.
        """
        return {}

    def other_names(self) -> dict[str, str | Other]:
        """diffusers' names for the layers of the denoiser, a table; see nets/names.py."""
        return {}

    def layouts(self) -> dict[str, dict[str, str | Other]]:
        """The sets of names under which files of the denoiser are read, by whose they are."""
        others = {"diffusers'": self.other_names()} if self.other_names() else {}
        return {"its makers'": {}} | others

    def load(
        self,
        shift: float,
        path: Path | list[Path],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        merge: Sequence[str] = (),
    ) -> nn.Module:
        """The denoiser from the teacher's file or a student's, in fp32 or `dtype`.

        device: "meta" for the form alone; no file is read then. merge: LoRA files that are added to
        the weights, FILE or FILE:SCALE.
        """
        import torch

        from nets.weights import assign

        with torch.device("meta"):
            net = self.build(shift)
        dtype = dtype or torch.float32
        if torch.device(device).type == "meta":
            return net.to(dtype)
        for name, tensor in list(self.tensors_of(net, path, dtype, device, merge)):
            assign(net, name, tensor)
        return net

    def fitting(self, path: Path) -> Teacher:
        """Itself, or without a part that this student's file lacks; students.py asks."""
        return self

    def read(
        self,
        shift: float,
        path: Path | list[Path],
        dtype: torch.dtype | None,
        device: torch.device,
        merge: Sequence[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """What `load` would assign, by name, one tensor at a time in the order of the network's
        `state_dict`: so that no rank holds all of a network that ranks share. dtype None: as it is
        stored, be it in 8 bits.
        """
        net = self.load(shift, path, dtype, "meta")
        return self.tensors_of(net, path, dtype, device, merge)

    def tensors_of(self, net: nn.Module, path, dtype, device, merge) -> Iterator:
        """The same for a network that is there."""
        from teachers.bases import weights_of
        from teachers.merging import read_merged

        added = read_merged(merge, self.known(), net)
        return weights_of(net, path, dtype, device, added, self.layout(path, net))

    def layout(self, path: Path | list[Path], net: nn.Module) -> dict:
        """How this file of the denoiser, whose form `net` is, names its tensors; see bases.py."""
        from teachers.bases import layout_of

        return layout_of(self.known(), path, net)

    def known(self) -> Known:
        """What of this all is for who reads files."""
        return Known(self.name, self.prefix(), self.layouts(), self.not_weights)

    # --- what stands around it -------------------------------------------------------------------

    def build_vae(self) -> nn.Module:
        """Images <-> latents, weights not set; the plan asks."""
        from nets.vae import VAE, Pixels

        return VAE(self.sizes.vae) if self.sizes.vae else Pixels()

    def load_vae(self, files: Files, *how) -> nn.Module:
        """how: dtype and device, as in `load`."""
        if "vae" not in files:
            return self.build_vae()
        return self.load_built(self.build_vae, "vae", files, *how)

    def load_text(self, files: Files, *how) -> nn.Module:
        """What is called as `text(captions, device, sizes)` and gives `cond`, rows by name.

        sizes (6,) or (B, 6): original height and width, crop's top and left, height and width
        made, in pixels; only SDXL listens. how: as in `load`.
        """
        raise NotImplementedError(f"{self.name} does not say how captions become cond")

    def load_part(self, kind: type, cfg: object, part: str, files: Files, *how, load=None):
        """A frozen network of the teacher's. load: in place of `load_weights`."""
        return self.load_built(partial(kind, cfg), part, files, *how, load=load)

    def load_built(self, build: Callable, part: str, files: Files, *how, load=None) -> nn.Module:
        """The same of what `build` makes."""
        import torch

        from nets.weights import load_weights
        from teachers.bases import part_prefix

        with torch.device("meta"):
            net = build()
        dtype, device = how or (torch.float32, "cpu")
        ignore, paths = getattr(net, "duplicates", ()) or self.not_weights, files[part]
        prefix = part_prefix(part, paths, self.prefix(part))
        ignore = {*ignore, *(prefix + name for name in ignore)}
        how = {"eight_bits": True} if paths == files.get("denoiser") else {}
        (load or load_weights)(net, paths, dtype, device, prefix, ignore, **how)
        return net.requires_grad_(False).eval()

    def backbone(self):
        """Sizes of the discriminator's frozen network."""
        from nets.vision import DINOV2_LARGE

        return self.sizes.backbone or DINOV2_LARGE

    def reader(self):
        """Sizes of what reads captions for the discriminator, where the teacher does not."""
        from nets.vision import CLIP_VIT_LARGE_TEXT

        return self.sizes.reader or CLIP_VIT_LARGE_TEXT

    def build_backbone(self) -> nn.Module:
        """The discriminator's frozen network, weights not set; the plan asks. See Discriminator."""
        from nets.vision import ViT

        return ViT(self.backbone())

    def build_reader(self) -> nn.Module | None:
        """What reads captions for the discriminator, beside the teacher's text; the plan asks."""
        from nets.clip import CLIP

        return None if self.reads_itself else CLIP(self.reader())

    def load_backbone(self, files: Files, *how) -> nn.Module:
        """The discriminator's frozen network. how: as in `load`."""
        from nets.vision import load_vit

        if "backbone" in files:
            return self.load_built(self.build_backbone, "backbone", files, *how)
        return load_vit(self.backbone(), files["dinov2"][0], *how)

    def load_reader(self, files: Files, *how) -> nn.Module:
        """What reads captions for the discriminator (its `embedding`). how: as in `load`."""
        from nets.vision import load_clip_text

        if self.reads_itself:
            return self.load_text(files, *how)
        where = (*files["clip_vit"], *files["clip_vit_tokenizer"])
        return load_clip_text(*where, *how, cfg=self.reader())

    def embedding_width(self) -> int:
        """Of what the reader makes of a caption; the discriminator asks."""
        if self.reads_itself:
            raise NotImplementedError(f"{self.name} does not say the width of its embedding")
        cfg = self.reader()
        return cfg.embedding or cfg.width

    # --- text and guidance -----------------------------------------------------------------------

    def cond_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `load_text` gives of one caption, shapes by name; plan and bench ask."""
        raise NotImplementedError(f"{self.name} does not say the shapes of its text")

    def text_networks(self, t5: bool = True) -> list[tuple[nn.Module, int]]:
        """Its text encoders, weights not set, and the tokens each reads; the plan asks.

        Each is called with ids (B, tokens).
        """
        from nets.clip import CLIP, CLIP_LENGTH

        return [(CLIP(cfg), CLIP_LENGTH) for cfg in (self.sizes.clip_l, self.sizes.clip_g) if cfg]

    @property
    def uses_null(self) -> bool:
        """Whether guidance leads away from the null caption."""
        return self.guided_by == "null"

    def null_for(self, null: Cond, cond: Cond) -> Cond:
        """The null caption, encoded once (1, ...), for every row of `cond`; train.py asks."""
        return {name: tensor.expand_as(cond[name]) for name, tensor in null.items()}

    # --- sizes and times -------------------------------------------------------------------------

    def factor(self) -> int:
        """Pixels per latent along a side."""
        return self.sizes.vae.factor if self.sizes.vae else 1

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of an image of `size`, height and width in pixels."""
        factor = self.factor()
        return self.sizes.denoiser.channels, size[0] // factor, size[1] // factor

    def unit(self) -> int:
        """Sides of its images are multiples of so many pixels."""
        return self.sizes.denoiser.patch * self.factor()

    def longest(self) -> int | None:
        """The longest side it can make, in pixels; None: any."""
        return None

    def check_size(self, size: tuple[int, int]) -> None:
        """ValueError for an image, height and width in pixels, that the networks cannot make."""
        unit, longest, asked = self.unit(), self.longest(), f"--size {size[0]} {size[1]}"
        for side in size:
            if side < unit or side % unit:
                near = (unit * n for n in (side // unit, side // unit + 1) if n > 0)
                nearest = " or ".join(map(str, near))
                raise Refusal(f"{asked}: {side} is no multiple of {unit}; the nearest: {nearest}")
            if longest and side > longest:
                raise Refusal(f"{asked}: {self.name} makes at most {longest} pixels a side")

    def check_measured(self, size: tuple[int, int]) -> None:
        """ValueError for a size that `features` cannot measure; evaluate.py asks."""

    def sampling_times(self, schedule, steps: int, size: tuple[int, int]) -> list[float]:
        """The times its official sampler visits; sample.py and evaluate.py ask."""
        from schedule import grid

        return grid(schedule, steps)

    # --- smaller, for tests and the benchmark ----------------------------------------------------

    def resized(self, sizes: Networks) -> Teacher:
        """The same teacher with networks of other sizes."""
        other = copy.copy(self)
        other._sizes = sizes
        return other

    def scaled(self, scale: float, depth: int) -> Teacher:
        """All widths times `scale`, in whole heads and groups; the denoiser's depth, if not 0."""
        sizes = self.sizes
        around = {"backbone": scaled_sizes(self.backbone(), scale)}
        if sizes.vae:
            around["vae"] = scaled_sizes(sizes.vae, scale)
        if sizes.t5:  # as wide as the denoiser reads, with fewer heads and a narrower MLP
            count = max(1, round(scale * sizes.t5.heads))
            hidden = max(64, round(scale * sizes.t5.hidden))
            around["t5"] = replace(sizes.t5, heads=count, hidden=hidden)
        denoiser = self.scaled_denoiser(sizes.denoiser, scale, depth)
        return self.resized(replace(sizes, denoiser=denoiser, **around))

    def scaled_denoiser(self, cfg, scale: float, depth: int):
        """Its denoiser's sizes for `scaled`."""
        return scaled_sizes(cfg, scale, depth)

    # --- what a task brings of its own -----------------------------------------------------------

    def data(self, seed: int):
        """A data set of its own, as in dataset/; None: --data names one. train.py asks."""
        return None

    def exam(self, guidance: float | None):
        """What examines its students: see digits/exam.py; None: evaluate.py's measures alone."""
        return None

    def features(self, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]] | None:
        """By measure: images (B, 3, H, W) in [0, 1] -> features (B, D), in place of DINOv2, CLIP
        and the files they take; None: those. evaluate.py asks."""
        return None


# --- by name -------------------------------------------------------------------------------------

FAMILIES = {  # which file of this folder has a teacher
    "digits": "digits",
    "flux-dev": "flux",
    "flux-schnell": "flux",
    "sd35-large": "sd35",
    "sd35-medium": "sd35",
    "klein": "klein",
    "klein-9b": "klein",
    "sdxl": "sdxl",
    "sd15": "sdxl",
    "z-image": "z_image",
}
FOUND: dict[str, Teacher] = {}  # those asked for; tests put small ones here


def find(name: str) -> Teacher:
    """A teacher that comes with the project, or TEACHER of a Python file. ValueError."""
    if name not in FOUND:
        FOUND[name] = from_file(Path(name)) if name.endswith(".py") else from_family(name)
    return FOUND[name]


def is_named(text: str) -> bool:
    """Whether --teacher is for `find`, and no file of weights."""
    return text in FAMILIES or text.endswith(".py")


def from_family(name: str) -> Teacher:
    if name not in FAMILIES:
        known = f"choose from {', '.join(names())}, or give a file, mine.py{near(name, FAMILIES)}"
        raise Refusal(f'unknown teacher "{name}"; {known}')
    return importlib.import_module(f"teachers.{FAMILIES[name]}").TEACHERS[name]


def from_file(path: Path) -> Teacher:
    if not path.is_file():
        raise Refusal(f"--teacher {path}: there is no such file; docs/own_teacher.md shows one")
    spec = importlib.util.spec_from_file_location(f"own_teacher_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    sys.path.append(str(path.parent.resolve()))  # it may import what lies beside it
    spec.loader.exec_module(module)
    teacher = getattr(module, "TEACHER", None)
    if not isinstance(teacher, Teacher):
        raise Refusal(f"--teacher {path} defines no TEACHER; docs/own_teacher.md shows one")
    if teacher.name in FAMILIES:  # a student's file would be taken for the other's
        raise Refusal(f'--teacher {path}: "{teacher.name}" is taken; give yours another name')
    return teacher


def names(trained: bool = True) -> list[str]:
    """trained: without the few-step models, which are only sampled."""
    return [name for name in FAMILIES if not (trained and find(name).only_sampled)]


def listed() -> str:
    """The names that --help gives, with what is to be known of a licence."""
    licences = {name: find(name).licence for name in names()}
    return ", ".join(f"{name} ({what})" if what else name for name, what in licences.items())


def configure(teacher: str = "digits", **flags) -> Config:
    """The preset, what its number of student steps changes, then the flags. ValueError."""
    found = find(teacher)
    if found.only_sampled:
        raise Refusal(f"{teacher} is a few-step model itself; choose from {', '.join(names())}")
    changed = found.with_adapters if flags.get("adapter") else {}
    preset = replace(found.preset, teacher=teacher, **changed)
    return resolve(preset, found.fewer, found.name, **flags)
