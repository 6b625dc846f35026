"""Qwen3 as a text encoder, against reference numbers and the ids of the official tokenizer.

The reference network is small, with random weights in official names; two independent
implementations agree to 3e-6, a wrong formula is off by 1.8e-3 or more.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small import write_qwen3_tokenizer
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode

from config import Refusal
from nets.qwen3 import (
    NO_THINKING,
    QWEN3_4B,
    QWEN3_8B,
    KleinText,
    Qwen3,
    Qwen3Config,
    chat,
    check_release,
    qwen3_tokenizer,
)
from nets.text import count_cut
from nets.weights import load_weights, read_metadata
from nets.z_image import ZImageText

HERE = Path(__file__).parent
TOKENS = json.loads((HERE / "golden" / "qwen3_tokens.json").read_text(encoding="utf-8"))
PATH = HERE / "golden" / "qwen3.safetensors"
GOLDEN, SIZE = load_file(PATH), json.loads(read_metadata(PATH)["config"])
WEIGHTS = {k.removeprefix("weights/"): v for k, v in GOLDEN.items() if k.startswith("weights/")}
IDS, REAL = GOLDEN["inputs/input_ids"], GOLDEN["inputs/attention_mask"].bool()
CFG = Qwen3Config(
    width=SIZE["hidden_size"],
    depth=SIZE["num_hidden_layers"],
    heads=SIZE["num_attention_heads"],
    groups=SIZE["num_key_value_heads"],
    head=SIZE["head_dim"],
    hidden=SIZE["intermediate_size"],
    taps=tuple(SIZE["taps"]),
    vocabulary=SIZE["vocab_size"],
    theta=SIZE["rope_theta"],
)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def build(*taps, dtype=torch.float32):
    """The reference network; layers that no tap needs are not built, their weights left out."""
    net = Qwen3(replace(CFG, taps=taps)).requires_grad_(False)
    net.load_state_dict({k: v for k, v in WEIGHTS.items() if k not in net.duplicates})
    return net.to(dtype)


# --- the network ---------------------------------------------------------------------------------


def test_every_state_equals_the_reference_at_padding_too():
    """After each layer; the last one here without the final norm, which nobody reads."""
    states = build(1, 2, 3, 4)(IDS, REAL)
    for layer, state in zip((1, 2, 3), states[:3], strict=True):
        close(state, GOLDEN[f"outputs/hidden_states.{layer}"])
    close(states[3], GOLDEN["outputs/last_layer_before_norm"])
    close(build(1).model.embed_tokens(IDS), GOLDEN["outputs/hidden_states.0"])


def test_klein_reads_three_states_of_each_token_one_after_another():
    text = KleinText(build(*CFG.taps), tokenizer=None)
    cond = text.encode(IDS, REAL)
    assert cond.keys() == {"context"}
    close(cond["context"], GOLDEN["outputs/stacked"])


def test_a_caption_alone_needs_no_padding():
    """As Z-Image reads: the states before the last layer, of real tokens, each prompt as long as it
    is. Padding on the right changes nothing in them, with or without the mask."""
    net = build(3)
    for row, real, ids in zip(range(3), REAL, IDS, strict=True):
        wanted = GOLDEN[f"outputs/caption.{row}"]
        close(net(ids[real][None])[0][0], wanted)
        close(net(ids[None], real[None])[0][0][real], wanted)
        close(net(ids[None])[0][0][real], wanted)


def test_a_padding_token_sees_what_is_real_and_not_itself():
    """Another id in its place changes its own state after one layer, which adds to its embedding,
    and no other token's."""
    net, row = build(1, 2), int((~REAL).any(dim=1).nonzero()[0])
    place = int((~REAL[row]).nonzero()[0])
    ids = IDS[row : row + 1].clone()
    before = net(ids, REAL[row : row + 1])
    ids[0, place] = 5
    after = net(ids, REAL[row : row + 1])
    others = torch.arange(ids.shape[1]) != place
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0, others], b[0, others]) and not torch.allclose(a, b, atol=1e-2)
    assert not torch.allclose(net(IDS, REAL)[0][~REAL], net(IDS)[0][~REAL], atol=1e-2)


class Masks(TorchFunctionMode):
    """Notes the shape of the mask of each attention."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, called, types, args=(), kwargs=None):
        if called is F.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask")
            self.shapes.append(None if mask is None else tuple(mask.shape))
        return called(*args, **(kwargs or {}))


def test_no_mask_has_a_place_for_each_pair_of_tokens():
    """What is handed to the attention is (B, 1, 1, T), or nothing."""
    for real, wanted in ((REAL, [None, (3, 1, 1, 14)]), (None, [None])):
        with Masks() as masks:
            build(2)(IDS, real)
        assert masks.shapes == 2 * wanted


def test_bf16_states_are_within_two_percent_of_fp32():
    """Relative to their norm, on weights that are bf16 already, as the official file's are."""
    low = build(1, 3, dtype=torch.bfloat16)
    full = build(1, 3)
    full.load_state_dict(low.state_dict())
    for wanted, got in zip(full(IDS, REAL), low(IDS, REAL), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).norm() / wanted.norm() < 0.02


def test_names_and_shapes_are_those_of_the_official_file():
    """At full size, without memory: 398 tensors; what is left out is named. klein holds 3.1 of the
    4.0 billion weights."""
    official = json.loads((HERE / "manifests" / "qwen3_4b.json").read_text())
    shapes = {name: shape for name, (_, shape) in official.items()}
    assert len(shapes) == 398
    for taps in ((36,), (35,), (9, 18, 27)):
        with torch.device("meta"):
            net = Qwen3(replace(QWEN3_4B, taps=taps))
        ours = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
        assert ours.items() <= shapes.items()
        assert shapes.keys() - ours.keys() == set(net.duplicates) - {"lm_head.weight"}
    assert sum(p.numel() for p in net.parameters()) == 3_114_088_192
    assert QWEN3_8B.width == 4096 and QWEN3_8B.hidden == 12288


def test_the_official_file_loads_without_the_layers_nobody_reads(tmp_path):
    """And a layer too few, or a foreign dtype, is refused in one line."""
    path, taps = tmp_path / "qwen3.safetensors", replace(CFG, taps=(1, 2))
    save_file(WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"].clone()}, path)
    with torch.device("meta"):
        net = Qwen3(taps)
    load_weights(net, path, ignore=net.duplicates)
    close(net(IDS, REAL)[1], GOLDEN["outputs/hidden_states.2"])
    short = {k: v for k, v in WEIGHTS.items() if not k.startswith("model.layers.1.")}
    name = "model.layers.0.mlp.up_proj.weight"
    fp8 = WEIGHTS | {name: WEIGHTS[name].to(torch.float8_e4m3fn)}
    for wrong, words in [(short, "lacks 11 names"), (fp8, "F8_E4M3, a quantised or foreign copy")]:
        save_file(wrong, path)
        with pytest.raises(Refusal, match=words) as error:
            load_weights(net, path, ignore=net.duplicates)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "about", [{"rope_theta": 5e6}, {"rope_parameters": {"rope_theta": 5000000}}]
)
def test_the_release_of_2507_is_told_by_the_config_beside_it(tmp_path, about):
    """Its names and shapes are the same; the file alone cannot tell."""
    weights = [tmp_path / "model.safetensors"]
    check_release(QWEN3_4B, weights)
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 1000000}))
    check_release(QWEN3_4B, weights)
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(Refusal, match="rope_theta is 5e.06, not 1e.06: another release"):
        check_release(QWEN3_4B, weights)


# --- the tokenizer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3") / "tokenizer.json"
    write_qwen3_tokenizer(path)
    return path


def ids_of(tokenizer, *texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


@pytest.mark.parametrize("prompt", TOKENS["prompts"], ids=lambda prompt: prompt["text"][:20])
def test_ids_are_those_of_the_official_pipeline(file, prompt):
    """Blanks, line ends, digits, accents, special tokens in the prompt; both templates."""
    tokenizer = qwen3_tokenizer(file, 512, pad=False)
    klein, z_image = ids_of(tokenizer, chat(prompt["text"], NO_THINKING), chat(prompt["text"]))
    assert klein == prompt["klein"]
    assert z_image == klein[:-4] and len(z_image) == prompt["z_image_length"]


def test_the_empty_prompt_is_a_whole_turn():
    """12 tokens with the official vocabulary, and what the golden file writes out."""
    template = TOKENS["template"]
    assert chat("x") == f"{template['before']}x{template['after']}"
    assert chat("", NO_THINKING).endswith(template["after"] + template["klein_tail"])
    assert len(TOKENS["official"]["prompts"][0]["klein"]) == 12


def test_padding_is_on_the_right_and_marked(file):
    example = TOKENS["padded_example"]
    text = KleinText(build(1), qwen3_tokenizer(file, example["length"], pad=True))
    ids, real = text.tokens([example["text"], ""])
    assert ids[0].tolist() == example["ids"]
    assert real[0].tolist() == [bool(k) for k in example["attention_mask"]]


def test_a_long_prompt_loses_the_end_of_its_template(file):
    """The first 512 tokens are kept, as both official pipelines do."""
    about = TOKENS["truncation"]
    word, times = about["example_text_repeated"]
    wanted = [i for i, count in about["example_ids_of_512_as_runs"] for _ in range(count)]
    for pad, tail in ((True, NO_THINKING), (False, "")):
        assert ids_of(qwen3_tokenizer(file, 512, pad), chat(word * times, tail)) == [wanted]


def test_what_is_around_a_prompt_counts_where_it_is_cut(file):
    """By klein, whose tail is longer, and by Z-Image: the longest that fits, and one more."""
    for kind, tail, pad in ((KleinText, NO_THINKING, True), (ZImageText, "", False)):
        text = kind(None, qwen3_tokenizer(file, 40, pad))
        ends = qwen3_tokenizer(file, 400, False)
        prompts = ["a cat" + " a" * n for n in range(40)]
        long = [len(ids) > 40 for ids in ids_of(ends, *(chat(x, tail) for x in prompts))]
        assert 0 < sum(long) < 40 and count_cut(text, prompts) == {40: sum(long)}


def test_lengths_set_in_the_file_are_ignored(file, tmp_path):
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for pad in (True, False):
        kept = [qwen3_tokenizer(path, 40, pad) for path in (file, tmp_path / "tokenizer.json")]
        assert ids_of(kept[0], chat("a cat")) == ids_of(kept[1], chat("a cat"))


@pytest.mark.parametrize("content", ["{", "[1]", '{"model": 1}', None])
def test_another_tokenizer_is_refused_by_name(tmp_path, content):
    """Half a file, no object, no model, T5's."""
    from small import write_tokenizer

    path = tmp_path / "tokenizer.json"
    path.write_text(content) if content else write_tokenizer(path)
    with pytest.raises(Refusal, match="tokenizer.json") as error:
        qwen3_tokenizer(path, 512, pad=True)
    assert "\n" not in str(error.value)


def test_captions_are_read_alike_alone_and_among_others(file):
    torch.manual_seed(0)
    net = Qwen3(replace(CFG, taps=(1, 3), vocabulary=410)).requires_grad_(False)
    text = KleinText(net, qwen3_tokenizer(file, 40, pad=True))
    captions = ["a red fox", "", "a photo of a cat " * 9]
    together = text(captions)["context"]
    assert together.shape == (3, 40, 2 * CFG.width)
    for row, caption in enumerate(captions):
        close(text([caption])["context"][0], together[row])
