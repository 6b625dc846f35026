"""Denoisers as people have them: a fine-tune in place of the official file, and LoRAs in it.

    from_base    what --base names -> its files, and the parts of a teacher that they hold
    weights_of   the tensors of a denoiser from whichever file, with what --merge adds
    layout_of    whose names a file has and what precedes them
    part_prefix  what precedes the names of the networks around a denoiser in its file
    not_read     a remark on what else is in it
    refuse_other_meaning   a network of the same form that predicts something else

Names come from the families' tables.
"""

import json
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter import Pairs, merged
from config import Refusal
from nets.files import Files
from nets.names import Known, stored_as
from nets.strict import NO_SCALES, NO_WEIGHTS, SCALES, listed
from nets.weights import as_named, each_weight, files_of, places, read_metadata, shards

# What may precede all names of a denoiser: ComfyUI's, diffusers', torch's wrappers.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "unet.")
PREFIXES += ("net.", "module.", "_orig_mod.", "model._orig_mod.")
FOLDERS = ("transformer", "unet")  # of a denoiser in diffusers' layout
DIFFUSERS = "diffusion_pytorch_model.safetensors"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

# --- a base --------------------------------------------------------------------------------------


def from_base(base: str, wanted: Collection[str]) -> Files:
    """Of the wanted parts those that --base has. ValueError, FileNotFoundError."""
    paths = base_files(base)
    return dict.fromkeys([*carried(paths, wanted), *({"denoiser"} & {*wanted})], paths)


def weights_of(
    net: nn.Module,
    path: Path | list[Path],
    dtype: torch.dtype | None,
    device: torch.device | str,
    added: Pairs,
    layout: dict,
) -> Iterator[tuple[str, Tensor]]:
    """As `Teacher.read` gives them; net: the form. W + B A in fp32, rounded once."""
    touched = {f"{name}.weight" for name in added}
    tensors = each_weight(net, path, dtype, device, wide=touched, **layout)
    for name, x in merged(tensors, added):
        yield name, x.to(dtype) if dtype and name in touched else x


# --- which files ---------------------------------------------------------------------------------


def base_files(base: str) -> list[Path]:
    """ValueError, FileNotFoundError."""
    path = Path(base).expanduser()
    if path.is_file():
        return files_of(path)
    if not path.is_dir():
        raise FileNotFoundError(f"--base {base}: there is no such file or folder")
    inner = (path / name for name in FOLDERS)
    return in_folder(next((folder for folder in inner if folder.is_dir()), path))


def in_folder(folder: Path) -> list[Path]:
    """By an index, as shards that count themselves, or one file."""
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    if indexes:
        return shards(one_of(indexes, f"{DIFFUSERS}.index.json"))
    counted = {path: SHARD.fullmatch(path.name) for path in files}
    kinds = {match and (match[1], match[3]) for match in counted.values()}
    if len(kinds) == 1 and None not in kinds:
        (stem, count), *_ = kinds
        if int(count) != len(files):
            raise FileNotFoundError(f"{folder} has {len(files)} of {int(count)} shards of {stem}")
        return files
    if not files:
        raise FileNotFoundError(
            f"{folder} has no safetensors file; --base takes one, shards with their index, or a "
            f"folder with {' or '.join(f'{name}/' for name in FOLDERS)}"
        )
    return [one_of(files, DIFFUSERS)]


def one_of(paths: list[Path], preferred: str) -> Path:
    """Of several the one with diffusers' own name, without a variant's."""
    named = [path for path in paths if path.name == preferred] or paths
    if len(named) > 1:
        found = ", ".join(path.name for path in named[:5])
        raise Refusal(f"{named[0].parent} has several files ({found}); give one: --base FILE")
    return named[0]


# --- whose names ---------------------------------------------------------------------------------


def layout_of(known: Known, path: Path | list[Path], net: nn.Module) -> dict:
    """How `each_weight` reads this file, official or not, into a network of the family's form:
    prefix, ignore, stored, eight_bits. ValueError, FileNotFoundError."""
    paths, state = files_of(path), net.state_dict()
    found, best = places(paths, "").keys(), (0, None)
    for table in known.tables.values():
        stored = partial(stored_as, table) if table else as_named
        names = {part for name in state for part in stored(name).names}
        for prefix in dict.fromkeys((known.prefix, *PREFIXES)):
            hits = sum(prefix + name in found for name in names)
            if hits > best[0]:
                best = hits, {"prefix": prefix, "stored": stored}
    if 2 * best[0] < len(state):
        raise Refusal(f"{paths[0]} holds another network, {looks_like(found)}; {accepted(known)}")
    ignore = {best[1]["prefix"] + name for name in known.not_weights} | {*known.not_weights}
    if not best[1]["prefix"]:  # then nothing but names tells the networks of a file apart
        ignore |= {name for name in found if OTHERS.match(name)}
    return best[1] | {"ignore": ignore, "eight_bits": True}


def accepted(known: Known) -> str:
    kinds = " or ".join(known.tables)
    return (
        f"{known.teacher} takes {kinds} names, with or without model.diffusion_model. before them, "
        "in one file, in shards or in a folder, in fp32, bf16, fp16 or fp8"
    )


LOOKS = {  # what a name tells of a file; the first that fits
    r"lora_[AB]\b|lora_(up|down)\b|\.lora\.|\.(hada|lokr)_w|\.dora_scale": "a LoRA (see --merge)",
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet",
    r"(^|\.)double_stream_modulation_img\.lin\.": "FLUX.2 in its makers' names",
    r"(^|\.)double_stream_modulation_img\.linear\.": "FLUX.2 in diffusers' names",
    r"(^|\.)double_blocks\.0\.img_mod\.lin\.": "FLUX.1 in its makers' names",
    r"(^|\.)single_transformer_blocks\.0\.proj_mlp\.": "FLUX.1 in diffusers' names",
    r"(^|\.)joint_blocks\.0\.x_block\.": "SD 3 in its makers' names",
    r"(^|\.)transformer_blocks\.0\.norm1_context\.": "SD 3 in diffusers' names",
    r"(^|\.)cap_embedder\.": "Z-Image or Lumina",
    r"(^|\.)conditioner\.embedders\.0\.model\.": "SDXL's refiner",
    r"(^|\.)label_emb\.0\.0\.": "a UNet of SDXL's kind in its makers' names",
    r"(^|\.)input_blocks\.1\.0\.": "a UNet of SD's kind in its makers' names",
    r"(^|\.)down_blocks\.\d\.resnets\.\d\.time_emb_proj\.": "a UNet in diffusers' names",
    r"(^|\.)decoder\.(conv_in|up)": "an autoencoder",
    r"(^|\.)encoder\.block\.\d": "T5",
    r"(^|\.)text_model\.": "CLIP",
    r"(^|\.)layers\.\d+\.self_attn\.": "a language model",
}


def looks_like(names: Collection[str]) -> str:
    ordered = sorted(names)
    for pattern, words in LOOKS.items():
        name = next((name for name in ordered if re.search(pattern, name)), None)
        if name:
            return f"which looks like {words}: {name}"
    return f"which has {listed(ordered)}" if ordered else "an empty one"


# --- single files --------------------------------------------------------------------------------

# What precedes the names of networks around a denoiser in files that hold them too, and one of
# their names: the makers' own files, ComfyUI's, "incl. clips".
INSIDE = {
    "vae": (
        ("first_stage_model.", "decoder.conv_in.weight"),
        ("vae.", "decoder.conv_in.weight"),
    ),
    "clip_l": (
        ("conditioner.embedders.0.transformer.", "text_model.final_layer_norm.weight"),
        ("cond_stage_model.transformer.", "text_model.final_layer_norm.weight"),
        ("cond_stage_model.transformer.", "final_layer_norm.weight"),  # years ago
        ("text_encoders.clip_l.transformer.", "text_model.final_layer_norm.weight"),
    ),
    "clip_g": (
        ("conditioner.embedders.1.model.", "ln_final.weight"),
        ("text_encoders.clip_g.transformer.", "text_model.final_layer_norm.weight"),
    ),
    "t5": (("text_encoders.t5xxl.transformer.", "shared.weight"),),
    "llm": (("text_encoders.qwen3_4b.transformer.", "model.embed_tokens.weight"),),
}
OTHERS = re.compile(  # what such files hold beside a denoiser without a prefix
    r"(first_stage_model|vae|conditioner|cond_stage_model|text_encoders|model_ema|denoiser)\."
    r"|(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|ema_decay)$"
)


def carried(paths: list[Path], wanted: Collection[str]) -> list[str]:
    """Which of the wanted parts are in these files."""
    found = places(paths, "")
    return [
        name
        for name in wanted
        if any(prefix + one in found for prefix, one in INSIDE.get(name, ()))
    ]


def part_prefix(part: str, paths: list[Path], otherwise: str) -> str:
    """What precedes a part's names in these files; otherwise: in the official ones."""
    kinds = INSIDE.get(part, ())
    found = places(files_of(paths), "") if kinds else {}
    return next((prefix for prefix, one in kinds if prefix + one in found), otherwise)


def not_read(known: Known, paths: list[Path], parts: Collection[str], prefix: str) -> str:
    """A remark on what is in a denoiser's files beside what is read of them, and beside what is in
    the official ones too; "": nothing. parts: of the teacher; prefix: of its names there."""
    own, inside = prefix, carried(paths, parts)
    taken = {part: part_prefix(part, paths, "") for part in inside}
    read = (own, *taken.values())

    def is_left(name: str) -> bool:
        if name.endswith(("text_projection", "text_projection.weight")):
            return not name.startswith(taken.get("clip_g", own))  # its own, and no other's
        alone = OTHERS.match(name) and not name.startswith(read[1:]) if not own else False
        return bool(NO_WEIGHTS.search(name) or alone or not name.startswith(read))

    names = sorted(places(paths, "").keys() - {*known.not_weights})
    left = [x for x in names if not x.endswith(SCALES + NO_SCALES) and is_left(x)]
    return f"{paths[0]}: not read: {listed(left)}" if left else ""


# --- what a network predicts ---------------------------------------------------------------------

# Tensors and metadata that say of a UNet that it does not predict noise on the usual schedule.
MARKERS = re.compile(r"^(v_pred|ztsnr|edm_mean|edm_std|edm_vpred\..*|noise_offset_ztsnr)$")
METADATA = {  # key: the values that mean the usual, in small letters
    "modelspec.prediction_type": ("epsilon", "eps", ""),
    "ss_v_parameterization": ("false", "none", ""),
    "ss_zero_terminal_snr": ("false", "none", ""),
    "prediction_type": ("epsilon", "eps", ""),
}
OTHER_KIND = re.compile(r"refiner|inpaint|v-?_?pred|edm")
SCHEDULER = {  # of scheduler_config.json beside diffusers' unet/
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": ("false",),
}


def refuse_other_meaning(known: Known, paths: list[Path], architecture: str) -> None:
    """Names and shapes do not tell what a UNet predicts; what else a file says does. ValueError.

    architecture: what files of its kind call that, a regular expression.
    """
    seen = [name for path in paths for name in places([path], "") if MARKERS.match(name)]
    for path in paths:
        about = {key: value.strip() for key, value in read_metadata(path).items()}
        for key, usual in METADATA.items():
            if about.get(key, "").lower() not in usual:
                seen.append(f"{key}: {about[key]}")
        kind = about.get("modelspec.architecture", "").lower().split("/")[0]
        if kind and (not re.match(architecture, kind) or OTHER_KIND.search(kind)):
            seen.append(f"modelspec.architecture: {about['modelspec.architecture']}")
    if paths[0].parent.name in FOLDERS:
        seen += scheduler_says(paths[0].parent.parent / "scheduler" / "scheduler_config.json")
    if seen:
        raise Refusal(
            f"{paths[0]} is no model that predicts noise as {known.teacher} does "
            f"({', '.join(dict.fromkeys(seen))}); give one of its own kind"
        )


def scheduler_says(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        about = json.loads(path.read_text())
        found = {key: str(about[key]).lower() for key in SCHEDULER if key in about}
        kind = str(about.get("_class_name", ""))
    except (ValueError, TypeError, AttributeError):
        raise Refusal(f"{path} is damaged; fetch it again, or remove it") from None
    odd = [f"{path.name}: {key} {x}" for key, x in found.items() if x not in SCHEDULER[key]]
    return odd + ([f"{path.name}: {kind}"] if kind.startswith(("EDM", "FlowMatch")) else [])
