"""The networks that score images, and what they say of one sampler's beside the teacher's.

    locate_scorers   their files
    load_inception   the FID's network, which takes a package of its own
    SCORERS          CLIPs that say how well an image fits its caption: their sizes, what they see
                     of an image and what they read of a caption
    JUDGES           networks that read image and caption together
    cleaned          a caption as open_clip reads it; unrepaired: what that lacks here
    check_scorers    their files are those of these networks
    PIXELS, PAIRS    measures of pixels, and of two sets of features: a new one is a line there
    feature_nets     images -> features, by measure
    judges           images and their captions -> scores, by measure
    embed_captions   what the scorers make of the prompts
    measure          features -> every measure with its interval

P prompts, S samples of each, D features.
"""

import html
import math
import pickle
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Refusal
from measure.distances import (
    bootstrap,
    brightness,
    clip_score,
    fit,
    frechet_distance,
    kernel_distance,
    pairwise_distance,
    patch,
    precision,
    recall,
    resize,
    saturation,
    to_uint8,
    vendi_score,
)
from nets.blip import IMAGE_REWARD, load_image_reward
from nets.clip import CLIPConfig
from nets.files import SHARED, Files, Part, find_files
from nets.pickles import first_line, safetensors_of
from nets.vision import (
    CLIP_OPEN_TEXT,
    CLIP_VIT_GIANT,
    CLIP_VIT_HUGE,
    CLIP_VIT_LARGE,
    CLIP_VIT_LARGE_TEXT,
    DINOV2_LARGE,
    CLIPVision,
    CLIPVisionConfig,
    load_clip_text,
    load_clip_vision,
    load_vit,
)
from nets.weights import places, read_tensors

# Its table of positions stretched as in the code that its features are published with.
DINOV2 = replace(DINOV2_LARGE, positions="facebook", hooks=(), recompute=False)
PARTS = {name: SHARED[name] for name in ("dinov2", "clip_vit", "clip_vit_tokenizer")}
BERT = "bert-base-uncased"
WORDS = Part(f"google-bert/{BERT}", ("vocab.txt",), (("vocab.txt",),), folder=BERT)
Features = dict[str, Tensor]  # per measure (P, S, D); of pixels (P, S)
Captions = dict[str, tuple[Tensor, float]]  # per score (P, 1, D), and what the cosine is times


# --- what they see and read ----------------------------------------------------------------------

# What ftfy makes plain, a character at a time: quotes, Latin ligatures, full and half widths.
PLAIN = dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
PLAIN |= {0x02BC: "'", 0x3000: " "}
WIDTHS = (*range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0))
PLAIN |= {code: unicodedata.normalize("NFKC", chr(code)) for code in WIDTHS}


def as_written(caption: str) -> str:
    return caption


def cleaned(caption: str) -> str:
    """A caption as open_clip reads it, but for spaces and case, which CLIP's tokenizer sees to.

    ftfy's repairs, if that package is installed, else PLAIN's; then HTML's entities, twice.
    """
    try:
        from ftfy import fix_text
    except ImportError:
        return html.unescape(html.unescape(caption)).translate(PLAIN)
    return html.unescape(html.unescape(fix_text(caption)))


def unrepaired(titles: Collection[str], prompts: Collection[str]) -> str:
    """What to say of scorers whose authors repair captions with ftfy, where it is missing.

    "": it is there, or nothing in the prompts is for it to repair.
    """
    repaired = [title for title in titles if title in SCORERS and SCORERS[title].read is cleaned]
    if not repaired or find_spec("ftfy") or all(prompt.isascii() for prompt in prompts):
        return ""
    read = f"{' and '.join(repaired)} read captions without ftfy"
    return f"{read}: text in a broken encoding stays broken; pip install ftfy repairs it"


@dataclass(frozen=True)
class Scorer:
    vision: CLIPVisionConfig
    text: CLIPConfig
    view: Callable[[Tensor, int], Tensor] = resize  # the image as it was trained to see it
    read: Callable[[str], str] = as_written  # and the caption
    scaled: bool = False  # the score is the cosine times the file's own scale


# The last two are CLIP ViT-H/14, tuned on what people preferred: PickScore with transformers' ways
# with images and text, HPSv2 with open_clip's.
FLOORED = partial(resize, half=math.floor)
SCORERS = {
    "CLIP": Scorer(CLIP_VIT_LARGE, CLIP_VIT_LARGE_TEXT),
    "CLIP-g": Scorer(CLIP_VIT_GIANT, CLIP_OPEN_TEXT, read=cleaned),
    "CLIP-H": Scorer(CLIP_VIT_HUGE, CLIP_OPEN_TEXT, read=cleaned),
    "PickScore": Scorer(CLIP_VIT_HUGE, CLIP_OPEN_TEXT, FLOORED, scaled=True),
    "HPSv2": Scorer(CLIP_VIT_HUGE, CLIP_OPEN_TEXT, fit, cleaned),
}
JUDGES = {"ImageReward": IMAGE_REWARD}
# By title: images (B, 3, H, W) in [0, 1] -> (B,), of which the mean is shown.
PIXELS = {"brightness": brightness, "saturation": saturation}
# By title: features of the teacher's images (N, D) and of those made (M, D) -> a number.
PAIRS = {"precision": precision, "recall": recall, "KD": kernel_distance}
GIVEN = (*tuple(SCORERS)[1:], *JUDGES)  # by the user: the first's file is found like DINOv2's


# --- their files ---------------------------------------------------------------------------------


def locate_scorers(weights: str = "", judged: bool = False) -> Files:
    """Their files. weights: a folder; "": the hub's cache, else downloaded.

    judged: also what JUDGES read captions with.
    """
    wanted = PARTS | ({"bert_words": WORDS} if judged else {})
    return find_files(wanted, Path(weights) if weights else None)


def load_inception(path: Path | None) -> nn.Module | None:
    """The FID's network, as a package keeps it. ValueError or FileNotFoundError."""
    if path is None:
        return None
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # absent, or made for another torch
        reason = first_line(error)
        raise Refusal(
            f"--inception takes a package: pip install torch-fidelity ({reason})"
        ) from None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the package would run its code
        return FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = first_line(error)
        raise Refusal(f"--inception {path} is no file of its weights ({reason})") from None


def check_scorers(files: Files, given: dict[str, Path]) -> dict[str, Path]:
    """Per score its network's file, CLIP's own among them. ValueError or FileNotFoundError.

    Their headers are compared: what is wrong shows before images are drawn.
    """
    paths = {title: safetensors_of(path) for title, path in given.items()}
    paths, words = {"CLIP": files["clip_vit"][0]} | paths, files["clip_vit_tokenizer"]
    load_vit(DINOV2, *files["dinov2"], device="meta")
    for title, path in paths.items():
        if title in JUDGES:
            load_image_reward(path, *files["bert_words"], device="meta", cfg=JUDGES[title])
            continue
        load_clip_vision(path, device="meta", cfg=SCORERS[title].vision)
        load_clip_text(path, *words, device="meta", cfg=SCORERS[title].text)
        if SCORERS[title].scaled and "logit_scale" not in places([path], ""):
            raise Refusal(f"{path} lacks logit_scale, by which {title} multiplies")
    return paths


# --- images and captions -> numbers --------------------------------------------------------------


def feature_nets(
    files: Files,
    scorers: dict[str, Path],
    inception: nn.Module | None,
    device: torch.device,
    own: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """By measure: images (B, 3, H, W) in [0, 1] -> features (B, D).

    The features of the first are also those of PAIRS and of variety. A measure of PIXELS is its own
    feature. own: the teacher's, in place of DINOv2's.
    """
    nets = own or {}
    if not own:
        vit = load_vit(DINOV2, *files["dinov2"], device=device)
        unit = vit.cfg.patch
        nets = {
            "FD-DINOv2": lambda x: vit(resize(x, 16 * unit))[:, 0],  # 224 pixels
            "patch FD-DINOv2": lambda x: vit(patch(x, unit=unit))[:, 0],
        }
    if inception:
        inception.to(device)
        nets["FID-T"] = lambda x: inception(to_uint8(2 * x - 1))[0]
        nets["patch FID-T"] = lambda x: inception(to_uint8(2 * patch(x) - 1))[0]
    for title, path in clips(scorers):
        clip = load_clip_vision(path, device=device, cfg=SCORERS[title].vision)
        nets[title] = partial(seen_by, clip, SCORERS[title].view)
    return nets | PIXELS


def clips(scorers: dict[str, Path]) -> list[tuple[str, Path]]:
    """Those of SCORERS among them, and their files."""
    return [(title, path) for title, path in scorers.items() if title in SCORERS]


def seen_by(clip: CLIPVision, view: Callable[[Tensor, int], Tensor], images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, D)."""
    return clip(view(images, clip.cfg.patch * clip.cfg.grid))


def judges(
    files: Files, scorers: dict[str, Path], device: torch.device
) -> dict[str, Callable[[Tensor, list[str]], Tensor]]:
    """By measure: images (B, 3, H, W) in [0, 1] and the caption of each -> (B,)."""
    found = {}
    for title, path in scorers.items():
        if title in JUDGES:
            how = {"device": device, "cfg": JUDGES[title]}
            net = load_image_reward(path, *files["bert_words"], **how)
            found[title] = lambda x, captions, net=net: net.score(resize(x, net.side), captions)
    return found


def embed_captions(
    files: Files, scorers: dict[str, Path], prompts: list[str], device: torch.device
) -> Captions:
    """One text tower after the other."""
    captions = {}
    for title, path in clips(scorers):
        words, scorer = files["clip_vit_tokenizer"], SCORERS[title]
        text = load_clip_text(path, *words, device=device, cfg=scorer.text)
        asked = [scorer.read(prompt) for prompt in prompts]
        parts = [asked[start : start + 64] for start in range(0, len(asked), 64)]
        read = torch.cat([text.embedding(part, device) for part in parts])[:, None]
        captions[title] = (read, scale_of(path) if scorer.scaled else 1.0)
    return captions


def scale_of(path: Path) -> float:
    """What a CLIP's cosines were multiplied by in training."""
    return read_tensors(["logit_scale"], path, torch.float32, "cpu")["logit_scale"].exp().item()


def measure(
    made: Features, reference: Features | None, captions: Captions, resamples: int
) -> dict[str, tuple[float, float] | None]:
    """By measure: its value and half of its interval, or None where there is none.

    reference: of the teacher's images; None: these are the teacher's own.
    """
    main = next(iter(made))
    P, S = made[main].shape[:2]

    def against(of: Callable[[Tensor, Tensor], float], title: str) -> tuple[float, float] | None:
        if reference is None:
            return None

        def chosen(i: Tensor) -> float:
            return of(reference[title][i].flatten(0, 1), made[title][i].flatten(0, 1))

        return bootstrap(chosen, P, resamples)

    def fits(title: str) -> Callable[[Tensor], float]:
        asked, scale = captions[title]
        return lambda i: scale * clip_score(made[title][i], asked[i])

    def mean(title: str) -> Callable[[Tensor], float]:
        return lambda i: made[title][i].mean().item()

    nets = [title for title in made if title not in (*captions, *JUDGES, *PIXELS)]
    values = {title: against(frechet_distance, title) for title in nets}
    values |= {title: against(of, main) for title, of in PAIRS.items()}
    of_all = made[main]
    values["Vendi"] = bootstrap(lambda i: vendi_score(of_all[i].flatten(0, 1)), P, resamples)
    apart = bootstrap(lambda i: pairwise_distance(of_all[i]), P, resamples) if S > 1 else None
    values["distance"] = apart
    values |= {title: bootstrap(fits(title), P, resamples) for title in captions}
    means = (*(title for title in JUDGES if title in made), *PIXELS)
    return values | {title: bootstrap(mean(title), P, resamples) for title in means}
