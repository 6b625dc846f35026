"""Weights in and out: strict loading from one file or several, what is refused, and how the
official files are found."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from small import OFFICIAL
from torch import nn

from model import Flux, FluxConfig
from nets.files import SHARED, find_files
from nets.names import Other
from nets.weights import digest, load_weights, save_weights, stream_weights
from schedule import Flow

ROOT = Path(__file__).parent.parent
FULL_DEPTH = FluxConfig(
    guidance=True,
    channels=2,
    width=12,
    heads=2,
    context_width=8,
    pooled_width=8,
    axes=(2, 2, 2),
)  # all 57 blocks, so all the names of flux1-dev


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net.register_buffer("mean", torch.randn(2))
    return net


def empty() -> nn.Module:
    with torch.device("meta"):
        return small()


def same(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(tensor, again) for (_, tensor), again in pairs)


@pytest.fixture
def path(tmp_path):
    """A whole file of `small`'s weights."""
    save_weights(small(), tmp_path / "small.safetensors", torch.float32, {})
    return tmp_path / "small.safetensors"


@pytest.fixture
def shards(path):
    """The same weights in two files and their index."""
    tensors, parts, places = load_file(path), {}, {}
    for name, tensor in tensors.items():
        places[name] = f"small-0000{1 + name.startswith('1.')}-of-00002.safetensors"
        parts.setdefault(places[name], {})[name] = tensor
    for file, part in parts.items():
        save_file(part, path.parent / file)
    index = path.parent / "small.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


# --- what loads ----------------------------------------------------------------------------------


def test_flux_saved_is_flux_loaded_bit_for_bit(tmp_path):
    """All names of flux1-dev at a small width, onto the meta device."""
    torch.manual_seed(0)
    net, path = Flux(FULL_DEPTH, Flow()).bfloat16(), tmp_path / "flux1-dev.safetensors"
    save_weights(net, path, torch.bfloat16, {"teacher": "flux-dev"})
    with torch.device("meta"):
        again = Flux(FULL_DEPTH, Flow())
    load_weights(again, path, torch.bfloat16)
    assert len(net.state_dict()) == 780 and same(net, again)
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_file_is_the_saved_one(tmp_path, dtype):
    """Tensor by tensor: the same names, shapes, dtypes, bytes and order."""
    net, about = small(), {"teacher": "flux-dev"}
    save_weights(net, tmp_path / "saved.safetensors", dtype, about, "model.")
    tensors = [(f"model.{name}", x) for name, x in sorted(net.state_dict().items())]
    shapes = {name: x.shape for name, x in tensors}
    stream_weights(tensors, shapes, tmp_path / "streamed.safetensors", dtype, about)
    saved, streamed = (tmp_path / f"{name}.safetensors" for name in ("saved", "streamed"))
    assert streamed.read_bytes() == saved.read_bytes()


def test_shards_load_as_one_file_does(shards):
    """By their index, or listed."""
    parts = sorted(shards.parent.glob("small-*"))
    assert len(parts) == 2
    assert same(load_weights(empty(), shards), small())
    assert same(load_weights(empty(), parts), small())


def test_a_prefix_picks_one_network_of_several(path):
    """Combined files hold transformer and VAE; what is not under the prefix is not looked at, what
    is under it must fit."""
    prefix = "model.diffusion_model."
    both = {prefix + name: tensor for name, tensor in load_file(path).items()}
    save_file(both | {"first_stage_model.bias": torch.zeros(1, dtype=torch.int64)}, path)
    assert same(load_weights(empty(), path, prefix=prefix), small())
    with pytest.raises(ValueError, match="5 names missing .* 6 unexpected"):
        load_weights(empty(), path)
    save_file(both | {prefix + "momenta": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="one name more: model.diffusion_model.momenta; give"):
        load_weights(empty(), path, prefix=prefix, ignore=["momenta"])
    known = [prefix + "momenta", "betas"]  # of the whole file, also what others ignore
    assert same(load_weights(empty(), path, prefix=prefix, ignore=known), small())


def test_names_known_to_be_no_weights_are_ignored_exactly(path):
    """Those of this file, and those that trainers and mergers leave in any."""
    left = {"a.position_ids": torch.arange(3), "loss.logvar": torch.zeros(())}
    save_file(load_file(path) | {"momenta": torch.arange(3)} | left, path)
    assert same(load_weights(empty(), path, ignore=["momenta"]), small())
    with pytest.raises(ValueError, match="this is the network and one name more: momenta; give"):
        load_weights(empty(), path, ignore=["moment"])
    save_file({name: t for name, t in load_file(path).items() if name != "mean"}, path)
    with pytest.raises(ValueError, match="the network lacks one name: mean; give"):
        load_weights(empty(), path, ignore=["momenta", "mean"])


def test_a_tensor_stored_in_parts_is_joined_row_by_row(path):
    """Some layouts have query, key and value apart; names, shapes and numbers are as strict."""

    def stored(name):
        both = ("upper", "lower")
        return Other(both if name == "0.weight" else (name.replace("1.", "last."),))

    upper, lower = small()[0].weight.detach().clone().chunk(2)
    tensors = {"upper": upper, "lower": lower}
    for name, tensor in load_file(path).items():
        if name != "0.weight":
            tensors[name.replace("1.", "last.")] = tensor
    save_file(tensors, path)
    assert same(load_weights(empty(), path, stored=stored), small())
    for change, named in [
        ({"upper": torch.zeros(4, 3)}, r"upper has shape \[4, 3\], the network wants \[2, 3\]"),
        ({"lower": torch.full((2, 3), float("nan"))}, "lower holds values that are not finite"),
    ]:
        save_file(tensors | change, path)
        net = small(seed=1)
        with pytest.raises(ValueError, match=named):
            load_weights(net, path, stored=stored)
        assert same(net, small(seed=1))


def test_tensors_stored_as_one_are_parted_row_by_row(path):
    """Other layouts have them together; each part has memory of its own, so it can be saved."""

    def build(seed=0):
        torch.manual_seed(seed)
        return nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in ("q", "k", "v", "out")})

    def stored(name):
        return Other(("qkv" if name[0] in "qkv" else "last",))

    net = build()
    whole = torch.cat([net[name].weight.detach() for name in "qkv"])
    save_file({"qkv": whole, "last": net["out"].weight.detach()}, path)
    loaded = load_weights(build(1), path, stored=stored)
    assert same(loaded, net)
    assert all(p.untyped_storage().nbytes() == 2 * 3 * 4 for p in loaded.parameters())
    save_file({"qkv": whole[:4].clone(), "last": net["out"].weight.detach()}, path)
    with pytest.raises(ValueError, match=r"qkv has shape \[4, 3\], the network wants \[6, 3\]"):
        load_weights(build(1), path, stored=stored)


def test_loaded_weights_outlive_their_file(path):
    """Even where nothing is cast, they are copies: the file may be overwritten under them."""
    net = load_weights(empty(), path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(net, small())


# --- what is refused -----------------------------------------------------------------------------


def cut_header(path):
    path.write_bytes(path.read_bytes()[:100])


def cut_data(path):
    path.write_bytes(path.read_bytes()[:-1])


def pickled(path):
    torch.save(small().state_dict(), path)


def git_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def nothing(path):
    path.write_bytes(b"")


def another_network(path):
    save_file({f"blocks.{i}.weight": torch.zeros(1) for i in range(7)}, path)


def another_shape(path):
    save_file(load_file(path) | {"1.bias": torch.zeros(3)}, path)


def quantised(path):
    save_file(load_file(path) | {"1.bias": torch.zeros(2).to(torch.float8_e4m3fn)}, path)


def integers(path):
    save_file(load_file(path) | {"1.bias": torch.zeros(2, dtype=torch.int8)}, path)


def not_a_number(path):
    save_file(load_file(path) | {"1.bias": torch.tensor([0, float("nan")])}, path)


def infinite(path):
    save_file(load_file(path) | {"1.bias": torch.tensor([0, float("-inf")])}, path)


@pytest.mark.parametrize(
    "damage, named",
    [
        (Path.unlink, "is missing; fetch it"),
        (cut_header, "damaged or no safetensors file; fetch it again"),
        (cut_data, "damaged or no safetensors file; fetch it again"),
        (pickled, "damaged or no safetensors file; fetch it again"),
        (git_pointer, "damaged or no safetensors file; fetch it again"),
        (nothing, "damaged or no safetensors file; fetch it again"),
        (
            another_network,
            "5 names missing (0.bias, 0.weight, 1.bias, 1.weight, mean), 7 unexpected ("
            + ", ".join(f"blocks.{i}.weight" for i in range(5))
            + "); give the file",
        ),
        (another_shape, "1.bias has shape [3], the network wants [2]; give the file"),
        (quantised, "1.bias is stored as F8_E4M3, a quantised or foreign copy; fetch the original"),
        (integers, "1.bias is stored as I8, a quantised or foreign copy; fetch the original"),
        (not_a_number, "1.bias holds values that are not finite in torch.float32; fetch the file"),
        (infinite, "1.bias holds values that are not finite in torch.float32; fetch the file"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_wrong_file_is_refused_in_one_line_and_nothing_is_assigned(path, damage, named):
    """The line names the file, the tensor where it is one, and what to do."""
    damage(path)
    net = small(seed=1)
    refused(net, path, str(path), named)


@pytest.mark.parametrize("which", ["index", "first", "second"])
@pytest.mark.parametrize("damage", [Path.unlink, cut_data], ids=["missing", "cut"])
def test_a_wrong_shard_is_refused_by_its_name(shards, which, damage):
    parts = {"index": shards} | dict(
        zip(("first", "second"), sorted(shards.parent.glob("small-*")), strict=True)
    )
    damage(parts[which])
    refused(small(seed=1), shards, str(parts[which]), "fetch it")


def test_a_tensor_in_two_files_is_refused(path, shards):
    first = min(shards.parent.glob("small-*"))
    refused(small(seed=1), [path, first], "0.bias is in", str(first), "give one of them")


def refused(net, path, *named):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_weights(net, path)
    message = str(caught.value)
    assert "\n" not in message, message
    for words in named:
        assert words in message, f"not in the message: {words}\n{message}"
    assert same(net, small(seed=1)), "a failed load may not touch the network"


def test_a_failed_save_leaves_the_file_before_it(path):
    """Metadata must be strings; whatever stops a save, no half file is left."""
    before = path.read_bytes()
    with pytest.raises(TypeError, match="metadata"):
        save_weights(small(seed=1), path, torch.float32, {"steps": 4})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_save_replaces_the_file_at_once(path):
    """Whoever has the old file open goes on reading the old one, whole."""
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_weights(small(seed=1), path, torch.float32, {})
        assert reader.read() == before
    assert path.read_bytes() != before


# --- memory --------------------------------------------------------------------------------------

LOAD = """
import re, sys, torch
from pathlib import Path
from torch import nn
from nets.weights import load_weights

def memory(which):  # VmRSS now, VmHWM at its highest, in bytes
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(which + r":\\s+(\\d+)", status).group(1))

with torch.device("meta"):
    net = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(32)))
before = memory("VmRSS")
load_weights(net, Path(sys.argv[1]))
size = sum(p.numel() * p.element_size() for p in net.parameters())
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory in Linux's way")
def test_loading_takes_the_memory_of_the_network_and_one_tensor(tmp_path):
    """512 MiB in fp32 from a bf16 file of 32 tensors: one more is 3%, half the file would be 25%.

    Measured as the peak of a process of its own, so a few percent are Python's. (getrusage's peak
    would begin at that of the process that started it.)
    """
    path = tmp_path / "half-a-gigabyte.safetensors"
    weight = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    save_file({f"{k}.weight": weight.clone() for k in range(32)}, path)
    run = [sys.executable, "-c", LOAD, str(path)]
    out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert float(out) < 1.1, f"{float(out):.2f} times the network's own size"


# --- finding the official files ------------------------------------------------------------------

PARTS = list(OFFICIAL["flux-dev"])


def find_parts(teacher: str, parts, folder: Path | None = None):
    """The files of these parts of a teacher."""
    every = SHARED | OFFICIAL[teacher]
    return find_files({name: every[name] for name in parts}, folder)


LOOSE = ("flux1-dev.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors")
LOOSE += ("vocab.json", "merges.txt", "tokenizer.json")


def fill(folder: Path, names) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def official(teacher: str = "flux-dev") -> list[str]:
    return [file for part in OFFICIAL[teacher].values() for file in part.files]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(names): a cache that holds these files of FLUX.1-dev, and no connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", raising(LocalEntryNotFoundError("no network"))
    )
    repo = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev"

    def cache(names):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text("0" * 40)
        return fill(repo / "snapshots" / ("0" * 40), names)

    return cache


def raising(error: Exception):
    def download(repo: str, file: str):
        raise error

    return download


@pytest.mark.parametrize("teacher", ["flux-dev", "flux-schnell"])
def test_files_are_found_as_the_hub_lays_them_out(tmp_path, teacher):
    found = find_parts(teacher, PARTS, fill(tmp_path, official(teacher)))
    assert found["denoiser"] == [tmp_path / f"{teacher.replace('flux', 'flux1')}.safetensors"]
    assert [path.name for path in found["t5"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [path for part in found.values() for path in part] == [
        tmp_path / name for name in official(teacher)
    ]


@pytest.mark.parametrize("teacher", ["sdxl", "sd15"])
def test_networks_of_a_single_file_are_found_in_it(tmp_path, teacher):
    """Each under its own prefix; the tokenizers are beside it, in folders or loose."""
    parts = OFFICIAL[teacher]
    networks = {name: part for name, part in parts.items() if part.prefix}
    tokenizers = [name for name in parts if name not in networks]
    found = find_parts(teacher, parts, fill(tmp_path / "w", official(teacher)))
    (single,) = {path for name in networks for path in found[name]}
    assert single.suffix == ".safetensors" and len({p.prefix for p in networks.values()}) > 2
    assert [name.removesuffix("_tokenizer") for name in tokenizers] == list(networks)[2:]
    for name in tokenizers:
        assert [path.name for path in found[name]] == ["vocab.json", "merges.txt"]
    loose = fill(tmp_path / "loose", [single.name, "vocab.json", "merges.txt"])
    found = find_parts(teacher, parts, loose)
    assert {path for paths in found.values() for path in paths} == set(loose.iterdir())


SD35 = ("text_encoders/clip_l", "text_encoders/clip_g", "text_encoders/t5xxl_fp16")
WORDS = ("vocab.json", "merges.txt")


@pytest.mark.parametrize("size", ["large", "medium"])
def test_sd35s_encoders_are_found_beside_the_file_of_both_networks(tmp_path, size):
    """As the hub lays them out, or all loose in one folder."""
    teacher, own = f"sd35-{size}", f"sd3.5_{size}.safetensors"
    parts = OFFICIAL[teacher]
    assert {part.repo for part in parts.values()} == {f"stabilityai/stable-diffusion-3.5-{size}"}
    folder = fill(tmp_path / "w", official(teacher))
    found = find_parts(teacher, parts, folder)
    assert found["denoiser"] == found["vae"] == [folder / own]
    assert (parts["denoiser"].prefix, parts["vae"].prefix) == (
        "model.diffusion_model.",
        "first_stage_model.",
    )
    for name, file in zip(("clip_l", "clip_g", "t5"), SD35, strict=True):
        assert found[name] == [folder / f"{file}.safetensors"] and not parts[name].prefix
    assert found["clip_l_tokenizer"] == [folder / "tokenizer" / name for name in WORDS]
    assert found["clip_g_tokenizer"] == [folder / "tokenizer_2" / name for name in WORDS]
    assert found["t5_tokenizer"] == [folder / "tokenizer_3" / "tokenizer.json"]
    names = [own, *WORDS, "tokenizer.json", *(f"{Path(file).name}.safetensors" for file in SD35)]
    loose = fill(tmp_path / "loose", names)
    found = find_parts(teacher, parts, loose)
    assert {path for paths in found.values() for path in paths} == set(loose.iterdir())


def test_sd35_is_found_without_t5_only_if_it_is_not_asked_for(tmp_path):
    """To run without it is a choice, never what a missing file leads to."""
    names = [file for file in official("sd35-large") if "t5" not in file and "_3" not in file]
    folder = fill(tmp_path, names)
    less = [name for name in OFFICIAL["sd35-large"] if not name.startswith("t5")]
    found = find_parts("sd35-large", less, folder)
    assert {path for paths in found.values() for path in paths} == {folder / n for n in names}
    with pytest.raises(FileNotFoundError, match="lacks text_encoders/t5xxl_fp16.* tokenizer_3/"):
        find_parts("sd35-large", OFFICIAL["sd35-large"], folder)


def test_a_file_of_several_networks_is_asked_for_once(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        find_parts("sdxl", OFFICIAL["sdxl"], fill(tmp_path, []))
    listed, command = str(caught.value).split("; fetch with: ")
    for text in (listed, command):
        assert text.count("sd_xl_base_1.0.safetensors") == 1
    assert command.count("tokenizer_2/vocab.json") == 1


def test_files_are_found_loose(tmp_path):
    found = find_parts("flux-dev", PARTS, fill(tmp_path, LOOSE))
    assert [path for part in found.values() for path in part] == [tmp_path / n for n in LOOSE]


VISION = {
    "dinov2": ["dinov2-large/model.safetensors"],
    "clip_vit": ["clip-vit-large-patch14/model.safetensors"],
    "clip_vit_tokenizer": [
        "clip-vit-large-patch14/vocab.json",
        "clip-vit-large-patch14/merges.txt",
    ],
}


def test_the_discriminators_networks_have_folders_of_their_own(tmp_path):
    """Two repositories call their file model.safetensors; the command fetches each to its place."""
    with pytest.raises(FileNotFoundError) as caught:
        find_parts("flux-schnell", VISION, tmp_path)
    openai = "openai/clip-vit-large-patch14"
    for words in (
        "lacks dinov2-large/model.safetensors (or dinov2-large.safetensors)",
        f"hf download facebook/dinov2-large model.safetensors --local-dir {tmp_path}/dinov2-large",
        f"hf download {openai} model.safetensors vocab.json merges.txt --local-dir "
        f"{tmp_path}/clip-vit-large-patch14",
    ):
        assert words in str(caught.value), str(caught.value)
    fill(tmp_path, [name for names in VISION.values() for name in names])
    found = find_parts("flux-schnell", VISION, tmp_path)
    assert found == {part: [tmp_path / name for name in names] for part, names in VISION.items()}


@pytest.mark.parametrize(
    "part, names",
    [
        ("dinov2", ["dinov2-large.safetensors"]),
        ("dinov2", ["vit_large_patch14_dinov2.lvd142m/model.safetensors"]),
        ("dinov2", ["vit_large_patch14_dinov2.lvd142m.safetensors"]),
        ("clip_vit", ["clip-vit-large-patch14.safetensors"]),
        ("clip_vit_tokenizer", ["tokenizer/vocab.json", "tokenizer/merges.txt"]),
        ("clip_vit_tokenizer", ["vocab.json", "merges.txt"]),
    ],
)
def test_the_discriminators_networks_have_other_names_too(tmp_path, part, names):
    """timm's copy of DINOv2; loose files; the same tokenizer as it lies beside FLUX.1."""
    found = find_parts("flux-dev", [part], fill(tmp_path, names))
    assert found[part] == [tmp_path / name for name in names]


def test_a_folder_that_lacks_files_is_told_which_and_how_to_fetch_them(tmp_path, hub):
    """Every one, with the names accepted; nothing is taken from elsewhere, though the cache has
    it."""
    hub(official())
    fill(tmp_path / "w", ["ae.safetensors", "text_encoder_2/model-00001-of-00002.safetensors"])
    with pytest.raises(FileNotFoundError) as caught:
        find_parts("flux-dev", ["denoiser", "vae", "clip_l", "t5"], tmp_path / "w")
    message = str(caught.value)
    missing = ["flux1-dev.safetensors", "text_encoder/model.safetensors"]
    missing += ["text_encoder_2/model-00002-of-00002.safetensors"]
    assert "clip_l.safetensors" in message and "t5xxl_fp16.safetensors" in message
    assert "00001" not in message and "ae.safetensors" not in message, "what is there is not named"
    command = " ".join(missing)
    assert f"hf download black-forest-labs/FLUX.1-dev {command} --local-dir {tmp_path}" in message


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--weights .*nowhere is no folder"):
        find_parts("flux-dev", PARTS, tmp_path / "nowhere")


def test_the_hubs_cache_is_used_without_a_connection(hub):
    snapshot = hub(official())
    found = find_parts("flux-dev", PARTS)
    assert [path for part in found.values() for path in part] == [snapshot / n for n in official()]


def test_what_the_cache_lacks_is_downloaded_and_nothing_else(hub, monkeypatch):
    snapshot, asked = hub(official()[1:]), []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, file: asked.append((repo, file)) or hub([file]),
    )
    find_parts("flux-dev", PARTS)
    assert asked == [("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors")]
    assert (snapshot / "flux1-dev.safetensors").is_file()


def test_without_a_connection_all_that_is_missing_is_listed(hub):
    hub(["ae.safetensors"])
    with pytest.raises(FileNotFoundError) as caught:
        find_parts("flux-dev", PARTS)
    message = str(caught.value)
    missing = [name for name in official() if name != "ae.safetensors"]
    assert ", ".join(missing) in message and "\n" not in message
    command = " ".join(missing)
    assert f"hf download black-forest-labs/FLUX.1-dev {command} --local-dir DIR" in message


def test_offline_mode_says_the_same(tmp_path):
    """huggingface_hub's own switch, in a process of its own, with an empty cache."""
    code = "from nets.files import find_files; from teachers import find; "
    code += "parts = find('flux-schnell').parts(); "
    code += "find_files({name: parts[name] for name in ('vae', 't5_tokenizer')})"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=env)
    last = run.stderr.decode().strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: ") and "FLUX.1-schnell ae.safetensors" in last, last


def answer(status: int):
    """The hub's response with this status, of whichever HTTP library the hub's client uses."""
    response = type("Response", (), {"status_code": status, "headers": {}, "request": None})
    return response()


@pytest.mark.parametrize("how", ["named", "as a cause"])
def test_a_gated_repository_says_how_to_get_in(hub, monkeypatch, how):
    """The licence's page and the command for a token; the hub's client has two ways to say it."""
    error = GatedRepoError("403 Client Error", response=answer(403))
    if how == "as a cause":
        outer = LocalEntryNotFoundError("cannot find the requested files")
        outer.__cause__ = error
        error = outer
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    with pytest.raises(PermissionError) as caught:
        find_parts("flux-dev", PARTS)
    for words in ("https://huggingface.co/black-forest-labs/FLUX.1-dev", "`hf auth login`"):
        assert words in str(caught.value)


# --- the same weights? ---------------------------------------------------------------------------


def test_a_digest_tells_files_apart_and_not_how_they_are_packed(path, shards):
    """One file, its shards or their index; other metadata, another order on disk, another network
    beside it: the same. A changed value, name, shape or dtype: another."""
    one, tensors = digest(path), load_file(path)
    assert len(one) == 16
    assert digest(shards) == digest(sorted(path.parent.glob("small-*"))) == one
    save_file(tensors, path, metadata={"licence": "free"})
    assert digest(path) == one
    other = path.with_name("other.safetensors")
    save_file({"net." + name: x for name, x in tensors.items()} | {"x": torch.ones(9)}, other)
    assert digest(other, prefix="net.") == one != digest(other)
    for change in (
        {"0.weight": tensors["0.weight"].index_fill(0, torch.tensor(3), 7.0)},
        {"0.weight": tensors["0.weight"].reshape(3, 4)},
        {"mean": tensors["mean"].half()},
        {"more": torch.zeros(0)},
    ):
        save_file(tensors | change, other)
        assert digest(other) != one, change
    cut_data(other)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        digest(other)


def test_a_digest_samples_large_tensors_and_reads_tokenizers_whole(tmp_path):
    large = torch.zeros(100, 1000)
    seen = []
    for place in (0, 50_000, 99_999, None):
        large.zero_()
        if place is not None:
            large.view(-1)[place] = 1
        save_file({"w": large}, tmp_path / "w.safetensors")
        seen.append(digest(tmp_path / "w.safetensors"))
    assert len(set(seen)) == 4
    words = [tmp_path / "vocab.json", tmp_path / "merges.txt"]
    for text in ("{}", "[]"):
        words[0].write_text(text), words[1].write_text("#version")
        seen.append(digest(words))
    assert len(set(seen)) == 6
