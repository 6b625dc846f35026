"""A student in other programs: what its file says there, and how they draw with it as we do.

    Elsewhere   what of a family other programs call how
    modelspec   metadata of the ModelSpec standard
    explain     ComfyUI's and diffusers' settings for a student: sample.py --explain
    sigmas_of, entries_of   its times as those programs know them: of a flow, of DDPM's table

Both programs know a flow's noise level t as sigma, and DDPM's as an entry of the table of 1000;
both have samplers that are ours: x0 (estimate, noise again) is `lcm` or stochastic sampling, euler
is Euler or DDIM. Their own times are others, and draw another image without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teachers import Teacher
    from teachers.students import Student

SPEC = "1.0.1"  # of ModelSpec, which sd-scripts writes
NEAR = 1e-3  # times that draw alike: files give anchors in three decimals


@dataclass(frozen=True)
class Elsewhere:
    architecture: str  # ModelSpec's id, as sd-scripts and musubi-tuner write it
    implementation: str
    pipeline: str  # diffusers' class
    network: str  # diffusers' class of the denoiser
    repo: str
    keyword: str = "transformer"  # what the pipeline calls it
    unguided: float = 1.0  # the pipeline's guidance_scale that is none
    shift: float = 1.0  # of ComfyUI's times, where nothing else is said
    node: str = ""  # that sets another, in ComfyUI
    scheduler: str = ""  # a node of ComfyUI's with the makers' own times
    shifted: float = 1.0  # what diffusers' scheduler does to the sigmas it is given, as it comes
    as_stored: bool = False  # the official names are diffusers' own


def modelspec(family: Teacher, steps: int, size: tuple[int, int], lora: bool = False) -> dict:
    """sd-scripts' keys, without a date: the same run writes the same file."""
    about = family.elsewhere
    architecture = about.architecture if about else family.name
    found = {
        "sai_model_spec": SPEC,
        "architecture": architecture + "/lora" * lora,
        "implementation": about.implementation if about else "",
        "title": f"SenseFlow {steps}-step student of {family.name}",
        "resolution": f"{size[1]}x{size[0]}",  # width first
    }
    return {f"modelspec.{name}": value for name, value in found.items() if value}


# --- times ---------------------------------------------------------------------------------------


def schedule_of(student: Student):
    import torch

    with torch.device("meta"):
        return student.family.build(float(student.about["shift"])).schedule


def entries_of(schedule, taus: tuple[float, ...]) -> list[int]:
    """Of DDPM's table: 999, 749, 499, 249."""
    import torch

    return schedule.index(torch.tensor(taus, dtype=torch.float64)).long().tolist()


def sigmas_of(taus: tuple[float, ...], shifted: float) -> list[float]:
    """What a scheduler that shifts by `shifted` must be given to call a flow at `taus`."""
    return [round(t / (shifted - (shifted - 1) * t), 4) for t in taus]


def fits(taus, times) -> bool:
    return max(abs(a - b) for a, b in zip(taus, times, strict=True)) < NEAR


def even_shift(taus: tuple[float, ...]) -> float | None:
    """The shift of evenly spaced times that these are; None: of none."""
    from schedule import Flow, grid

    if len(taus) == 1:
        return 1.0 if taus[0] == 1 else None
    u, t = 1 - 1 / len(taus), taus[1]
    shift = round(t * (1 - u) / (u * (1 - t)), 2) if t < 1 else 1.0
    return shift if fits(taus, grid(Flow(shift), len(taus))) else None


# --- ComfyUI -------------------------------------------------------------------------------------


def comfyui(student: Student, size: tuple[int, int]) -> list[tuple[str, str]]:
    """What is set, and to what."""
    kind = "lcm" if student.about["sampler"] == "x0" else "euler"
    where = "models/loras, node LoraLoaderModelOnly (strength 1) on the teacher's model"
    if not student.is_lora:
        where = "models/diffusion_models, node Load Diffusion Model"
    rows, by_hand = [("file", where)], f"KSamplerSelect {kind}, CFGGuider cfg 1"
    node, sigmas = comfyui_times(student, size)
    if sigmas:
        rows.append(("SamplerCustomAdvanced", f"{by_hand}, {sigmas}"))
    else:
        rows += [("before it", node)] if node else []
        how = f"steps {student.steps}, cfg 1, sampler {kind}, scheduler simple, denoise 1"
        rows.append(("KSampler", how))
    if student.family.guided_by == "input":
        rows.append(("FluxGuidance", scale_of(student)))
    return rows


def scale_of(student: Student) -> str:
    """Of a guidance that is an input of the network."""
    if student.is_lora:
        return f"{float(student.about['guidance']):g}, that of training"
    return "any: it is not heard" if student.guidance is None else f"{student.guidance:g}"


def comfyui_times(student: Student, size: tuple[int, int]) -> tuple[str, str]:
    """A node before the sampler, or sigmas by hand; neither: scheduler simple calls it there."""
    from schedule import Flow, grid

    taus, about, K = student.taus, student.family.elsewhere, student.steps
    schedule = schedule_of(student)
    if not isinstance(schedule, Flow):
        entries = entries_of(schedule, taus)
        if entries == [999 - int(k * 1000 / K) for k in range(K)]:
            return "", ""
        bars = schedule.alpha_bar[entries]
        return "", by_hand([round(x, 4) for x in ((1 - bars) / bars).sqrt().tolist()])
    if fits(taus, grid(Flow(about.shift), K)):
        return "", ""
    if about.node and (shift := even_shift(taus)):
        return f"{about.node}, shift {shift:g}", ""
    own = student.family.sampling_times(schedule, K, size)
    if about.scheduler and fits(taus, own):
        return "", f"{about.scheduler} steps {K}, width {size[1]}, height {size[0]}"
    return "", by_hand([round(t, 4) for t in taus])


def by_hand(sigmas: list[float]) -> str:
    return f"ManualSigmas {', '.join(f'{x:g}' for x in (*sigmas, 0))}"


# --- diffusers -----------------------------------------------------------------------------------


def diffusers(student: Student, size: tuple[int, int]) -> list[tuple[str, str]]:
    """What is set, and to what."""
    from schedule import Flow

    about, keyword = student.family.elsewhere, student.family.elsewhere.keyword
    pipe = f'{about.pipeline}.from_pretrained("{about.repo}", torch_dtype=torch.bfloat16'
    if student.is_lora:
        rows = [("pipe", f"{pipe})"), ("", f'pipe.load_lora_weights("{student.path.name}")')]
    else:
        rows = [*diffusers_network(student), ("pipe", f"{pipe}, {keyword}={keyword})")]
    schedule = schedule_of(student)
    times = flow_times if isinstance(schedule, Flow) else table_times
    kind, when = times(student, schedule)
    scale = f"{about.unguided:g}"
    if student.family.guided_by == "input" and student.is_lora:
        scale = f"{float(student.about['guidance']):g}"
    call = f"prompt, {when}, guidance_scale={scale}, height={size[0]}, width={size[1]}"
    return [*rows, ("pipe.scheduler", kind), ("pipe(...)", call)]


def diffusers_network(student: Student) -> list[tuple[str, str]]:
    """With the configuration named: from_single_file takes the UNet of SDXL alone for SD 1.5's, and
    klein for FLUX.2-dev."""
    about, file = student.family.elsewhere, student.path.name
    where = f'"{about.repo}", subfolder="{about.keyword}"'
    if not about.as_stored:
        how = f"config={where}, torch_dtype=torch.bfloat16"
        return [(about.keyword, f'{about.network}.from_single_file("{file}", {how})')]
    bare = f"{about.network}.from_config({about.network}.load_config({where}))"
    read = f'{about.keyword}.load_state_dict(safetensors.torch.load_file("{file}"))'
    return [(about.keyword, f"{bare}.to(torch.bfloat16)"), ("", read)]


CONFIG = "from_config(pipe.scheduler.config"


def flow_times(student: Student, schedule) -> tuple[str, str]:
    """Scheduler, and the argument of the call that says when."""
    shifted = student.family.elsewhere.shifted
    again = ", stochastic_sampling=True" * (student.about["sampler"] == "x0")
    settings = f"use_dynamic_shifting=False, shift={shifted}{again}"
    when = f"sigmas={sigmas_of(student.taus, shifted)}"
    return f"FlowMatchEulerDiscreteScheduler.{CONFIG}, {settings})", when


def table_times(student: Student, schedule) -> tuple[str, str]:
    """Likewise; DDIM calls at evenly spaced entries alone."""
    entries, K = entries_of(schedule, student.taus), student.steps
    if student.about["sampler"] == "x0":
        return f"LCMScheduler.{CONFIG})", f"timesteps={entries}"
    if entries != [1000 - k * 1000 // K - 1 for k in range(K)] or 1000 % K:
        return f"none: DDIM does not call at {entries}", "timesteps not to be had"
    settings = 'timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False'
    return f"DDIMScheduler.{CONFIG}, {settings})", f"num_inference_steps={K}"


# --- both ----------------------------------------------------------------------------------------


def explain(student: Student) -> str:
    """The rows of both programs for this student."""
    family, size = student.family, student.size or student.family.preset.size
    taus = ", ".join(f"{t:g}" for t in student.taus)
    head = f"{student.path}: a student of {family.name}, {student.steps} steps at {taus}"
    head += f", sampler {student.about['sampler']}"
    if family.elsewhere is None:
        return f"{head}\nno other program is known to have this network"
    lines = [head]
    for program, rows in (("ComfyUI", comfyui), ("diffusers", diffusers)):
        lines += ["", program]
        lines += [f"  {name:<22} {value}".rstrip() for name, value in rows(student, size)]
    return "\n".join(lines)
