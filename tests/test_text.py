"""Text encoders against reference numbers, tokenizers against published ids.

The reference networks are small, with random weights in official names, made with an independent
implementation; their fp32 agreement among themselves is 3e-6, a wrong formula is off by 3e-4.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from digits.words import SceneText
from engine.batch import say_cut
from nets.clip import (
    CLIP,
    CLIP_G,
    CLIP_L,
    CLIPConfig,
    from_open_clip,
    load_open_clip,
    quick_gelu,
    to_open_clip,
)
from nets.text import (
    T5,
    T5_XXL,
    FluxText,
    SD15Text,
    SD35Text,
    SDXLText,
    T5Config,
    clip_tokenizer,
    count_cut,
    relative_buckets,
    size_embedding,
    t5_tokenizer,
    token_ids,
)
from nets.weights import read_metadata
from teachers import find
from teachers.sd35 import T5_TOKENS

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "golden" / "clip_tokens.json").read_text())
START, END = PUBLISHED["bos"], PUBLISHED["eos"]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def read_golden(name):
    """The tensors of a reference file without its weights, the weights, the sizes."""
    path = HERE / "golden" / f"{name}.safetensors"
    tensors, size = load_file(path), json.loads(read_metadata(path)["config"])
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    return tensors, weights, size


def clip_config(size):
    return CLIPConfig(
        size["hidden_size"],
        size["num_hidden_layers"],
        size["num_attention_heads"],
        size["intermediate_size"],
        {"quick_gelu": quick_gelu, "gelu": F.gelu}[size["hidden_act"]],
        size["projection_dim"] is not None,
        size["max_position_embeddings"],
        size["vocab_size"],
    )


def make_clip(name):
    golden, weights, size = read_golden(name)
    net = CLIP(clip_config(size)).requires_grad_(False)
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    return net, golden


@pytest.fixture(scope="module")
def t5():
    golden, weights, size = read_golden("t5_encoder")
    cfg = T5Config(
        width=size["d_model"],
        depth=size["num_layers"],
        heads=size["num_heads"],
        head=size["d_kv"],
        hidden=size["d_ff"],
        vocabulary=size["vocab_size"],
    )
    net = T5(cfg).requires_grad_(False)
    net.load_state_dict(weights)
    return net, golden


# --- encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, pooled_name", [("clip_l", "pooled"), ("clip_g_hf", "text_embeds")], ids=["L", "G"]
)
def test_clip_equals_the_reference(name, pooled_name):
    """Every block, the last state, the one before, the pooled vector (projected in G)."""
    net, golden = make_clip(name)
    ids = golden["inputs/input_ids"]
    states = net.states(ids)
    assert len(states) == net.cfg.depth + 1
    for i, state in enumerate(states):
        close(state, golden[f"outputs/hidden_states.{i}"])
    last, penultimate, pooled = net(ids)
    close(last, golden["outputs/last_hidden_state"])
    close(penultimate, golden["outputs/penultimate"])
    close(pooled, golden[f"outputs/{pooled_name}"])


OPEN_CLIP = "conditioner.embedders.1.model."


def test_clip_with_open_clips_names_equals_the_reference(tmp_path):
    """As SDXL's file has CLIP-G: q, k, v are one tensor, the projection is transposed, the scale of
    the contrastive loss is no weight. The outputs are those of the other names, bit for bit."""
    golden, weights, size = read_golden("clip_g_open_clip")
    path, ignore = tmp_path / "clip_g.safetensors", [OPEN_CLIP + "logit_scale"]
    save_file(weights, path)
    with torch.device("meta"):
        net = CLIP(clip_config(size))
    load_open_clip(net, path, prefix=OPEN_CLIP, ignore=ignore)
    other, _ = make_clip("clip_g_hf")
    ids = golden["inputs/input_ids"]
    for i, state in enumerate(net.states(ids)):
        close(state, golden[f"outputs/hidden_states.{i}"])
    for got, same, name in zip(
        net(ids), other(ids), ["last_hidden_state", "penultimate", "text_embeds"], strict=True
    ):
        close(got, golden[f"outputs/{name}"])
        assert torch.equal(got, same)


def test_open_clips_names_and_back_is_the_identity():
    net, _ = make_clip("clip_g_hf")
    state, depth = net.state_dict(), net.cfg.depth
    there = to_open_clip(state, depth)
    back = from_open_clip(there, depth)
    assert back.keys() == state.keys() and len(there) < len(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_file_with_other_names_than_open_clips_is_refused(tmp_path):
    """Strict: one tensor too few, one too many, and nothing is assigned."""
    _, weights, size = read_golden("clip_g_open_clip")
    path, name = tmp_path / "clip_g.safetensors", OPEN_CLIP + "transformer.resblocks.1.ln_1.bias"
    net = CLIP(clip_config(size))
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    for wrong, words in [
        ({key: tensor for key, tensor in weights.items() if key != name}, "lacks one name"),
        (weights | {OPEN_CLIP + "visual.proj": torch.zeros(1)}, "one name more"),
        (weights | {name: torch.zeros(3)}, r"ln_1.bias has shape \[3\]"),
    ]:
        save_file(wrong, path)
        with pytest.raises(ValueError, match=words):
            load_open_clip(net, path, prefix=OPEN_CLIP, ignore=[OPEN_CLIP + "logit_scale"])
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_t5_equals_the_reference(t5):
    """160 tokens, so that distances beyond 128 occur: position bias, first block, last state."""
    net, golden = t5
    ids = golden["inputs/input_ids"]
    bias = net.position_bias(160)
    close(bias[0, :, 0], golden["outputs/position_bias_row_0"])
    close(bias[0, :, 159], golden["outputs/position_bias_row_159"])
    close(net.encoder.block[0](net.shared(ids), bias), golden["outputs/hidden_states.1"])
    close(net(ids), golden["outputs/last_hidden_state"])


@pytest.mark.parametrize(
    "file, kind, cfg",
    [
        ("flux_text_encoder", CLIP, CLIP_L),
        ("clip_l", CLIP, CLIP_L),
        ("clip_g", CLIP, CLIP_G),
        ("flux_text_encoder_2", T5, T5_XXL),
        ("t5xxl_fp16", T5, T5_XXL),
    ],
)
def test_names_and_shapes_are_those_of_the_official_file(file, kind, cfg):
    """At full size, without memory; SD 3.5's T5 holds its embedding twice, and we want it once."""
    official = json.loads((HERE / "manifests" / f"{file}.json").read_text())
    shapes = {name: shape for name, (_, shape) in official.items()}
    if file == "t5xxl_fp16":
        for name in T5.duplicates:
            assert shapes.pop(name) == shapes["shared.weight"]
    with torch.device("meta"):
        net = kind(cfg)
    assert {name: list(tensor.shape) for name, tensor in net.state_dict().items()} == shapes


def test_in_clip_a_later_token_does_not_change_earlier_ones():
    net, golden = make_clip("clip_l")
    ids = golden["inputs/input_ids"]
    changed = ids.clone()
    changed[:, 7] = 5
    before, after = net(ids)[0], net(changed)[0]
    close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).gt(1e-3).all()


def test_clips_pooled_vector_is_read_at_the_first_end_token():
    """The padding after it is the end token again; what follows it cannot matter."""
    net, golden = make_clip("clip_l")
    ids = golden["inputs/input_ids"]
    last, _, pooled = net(ids)
    assert ids[0].tolist().index(63) == 6 and (ids[0, 6:] == 63).all()
    assert torch.equal(pooled[0], last[0, 6]) and torch.equal(pooled[2], last[2, 1])
    other = torch.where(torch.arange(12) > 6, 0, ids[:1])
    close(net(other)[2], pooled[:1])


def test_in_t5_every_token_sees_every_other_padding_too(t5):
    """There is no mask: another token in the last place reaches the first."""
    net, golden = t5
    ids = golden["inputs/input_ids"]
    padded, other = ids.clone(), ids.clone()
    padded[:, -1], other[:, -1] = 0, 7
    difference = (net(padded) - net(other)).abs().amax(-1)
    assert difference.gt(1e-4).all()


def test_t5_distances_share_buckets_by_powers_of_the_root_of_two():
    """Up to 7 one each, then edges at 8 sqrt(2)^k, in whole numbers n^2 >= 64 2^k; from 128 on one.

    Keys after the query have the upper half, so the sign is that of key minus query.
    """
    table = relative_buckets(300, buckets=32, furthest=128)
    for n in range(300):
        wanted = n if n < 8 else min(15, 8 + sum(n * n >= 64 * 2**k for k in range(1, 9)))
        assert table[n, 0] == wanted, f"key {n} before the query"
        assert table[0, n] == wanted + 16 * (n > 0), f"key {n} after the query"
    assert torch.equal(table[1:, 1:], table[:-1, :-1])  # only the difference counts


def test_bf16_states_are_within_two_percent_of_fp32(t5):
    """Relative to their norm, on weights that are bf16 already, as FLUX's files are."""
    for net, golden in [t5, make_clip("clip_l"), make_clip("clip_g_hf")]:
        low = type(net)(net.cfg).bfloat16()
        low.load_state_dict(net.state_dict())
        full = type(net)(net.cfg)
        full.load_state_dict(low.state_dict())
        pairs = [(full(golden["inputs/input_ids"]), low(golden["inputs/input_ids"]))]
        if isinstance(net, CLIP):
            pairs = list(zip(*pairs[0], strict=True))
        for wanted, got in pairs:
            assert got.dtype == torch.bfloat16
            error = (got.float() - wanted).norm() / wanted.norm()
            assert error < 0.02, f"{type(net).__name__}: {error:.4f}"


def test_t5_in_fp16_is_refused(t5):
    with pytest.raises(AssertionError, match="overflows in fp16"):
        T5(t5[0].cfg).half()(torch.zeros(1, 4, dtype=torch.long))


# --- tokenizers ----------------------------------------------------------------------------------

# The part of CLIP's vocabulary that the published prompts need: whole words, then parts of words,
# written as byte-level BPE writes them.
WORDS = (
    "'s 568 we 649 'll 1342 'm 880 they 889 've 1200 don 847 't 713 two 1237 spaces 9006 and 537 "
    "photo 1125 of 539 cat 2368 render 13024 off 1007 hello 3306 world 1002 foo 23435 bar 2411 "
    "very 1070 ++ 19056 smart 4115 quotes 5808 word 2653 cinematic 25602 still 1170 raccoon 29516 "
    "wearing 3309 mm 2848 line 1148 suit 3940 clair 14039 keh 36983 cafÃ© 15304 ðŁĺĢ 7334 "
    "Â½ 33613 it 585 ve 563 ne 1422"
)
PARTS = "new 1218 na 1097 Ã¯ 35689 Ã© 3459 æĿ± 48338 äº 21078 âĢ 728 space 7857 bo 647"


def pairs(text):
    words = text.split()
    return [(word, int(i)) for word, i in zip(words[::2], words[1::2], strict=True)]


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """vocab.json and merges.txt.

    Each piece is merged from left to right; what only occurs on the way has ids of no importance.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate(letters)}
    ids |= {letter + "</w>": 256 + i for i, letter in enumerate(letters)}
    ids |= {"<|startoftext|>": START, "<|endoftext|>": END}
    words, parts = pairs(WORDS), pairs(PARTS)
    pieces = [([*word[:-1], word[-1] + "</w>"], i) for word, i in words]
    pieces += [([*part], i) for part, i in parts]
    ids |= {"".join(symbols): i for symbols, i in pieces}
    free = iter(sorted(set(range(512, START)) - set(ids.values())))
    merges = []
    for symbols, _ in pieces:
        for k in range(1, len(symbols)):
            left = "".join(symbols[:k])
            ids.setdefault(left, next(free))
            merges.append(f"{left} {symbols[k]}")
            ids.setdefault(left + symbols[k], next(free))
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *dict.fromkeys(merges), ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory):
    """A small tokenizer.json of T5's kind: pieces with a score, words begin with a low line."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁three", "s", "▁digit"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    path = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("prompt", PUBLISHED["prompts"], ids=lambda prompt: prompt["text"][:20])
def test_clip_ids_are_the_published_ones(clip_files, prompt):
    """Case, spaces, accents, contractions, digits one by one; filled up with the end token in L
    and with 0 in G; a prompt that is too long still ends."""
    wanted = prompt["ids_to_eos"]
    missing = PUBLISHED["length"] - len(wanted)
    for pad, filler in [(None, END), (0, 0)]:
        ids = token_ids(clip_tokenizer(*clip_files, pad), [prompt["text"]])
        assert ids.tolist() == [wanted + [filler] * missing]


def test_clips_special_tokens_written_out_are_the_tokens(clip_files):
    ids = token_ids(clip_tokenizer(*clip_files), ["a cat<|endoftext|> a"])[0, :7]
    assert ids.tolist() == [START, 320, 2368, END, 320, END, END]


def test_t5_ids_end_with_the_end_token_and_are_filled_with_zeros(t5_file):
    ids = token_ids(t5_tokenizer(t5_file, 6), ["a red digit", "", "three threes"])
    assert ids.tolist() == [[4, 5, 8, 1, 0, 0], [1, 0, 0, 0, 0, 0], [6, 6, 7, 1, 0, 0]]


def test_t5_keeps_the_end_token_when_it_cuts(t5_file):
    ids = token_ids(t5_tokenizer(t5_file, 4), ["a red digit a red digit", "a red digit"])
    assert ids.tolist() == [[4, 5, 8, 1], [4, 5, 8, 1]]


def test_t5_ignores_lengths_set_in_the_file(t5_file, tmp_path):
    """A tokenizer.json may bring its own truncation and padding."""
    tokenizer = Tokenizer.from_file(str(t5_file))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_id=7, direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = token_ids(t5_tokenizer(tmp_path / "tokenizer.json", 5), ["a red digit"])
    assert ids.tolist() == [[4, 5, 8, 1, 0]]


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_missing_tokenizer_files_are_named(clip_files, t5_file, tmp_path):
    vocab, merges = clip_files
    for path, read in [
        (tmp_path / "vocab.json", lambda path: clip_tokenizer(path, merges)),
        (tmp_path / "merges.txt", lambda path: clip_tokenizer(vocab, path)),
        (tmp_path / "tokenizer.json", lambda path: t5_tokenizer(path, 8)),
    ]:
        with pytest.raises(FileNotFoundError) as error:
            read(path)
        assert str(path) in one_line(error)


@pytest.mark.parametrize("content", [b'{"model": {"type"', b"[1, 2]", b'{"a": 1}', b"\xff\xfe\x00"])
def test_damaged_tokenizer_files_are_named(clip_files, tmp_path, content):
    """Half a file, another kind of JSON, another object, no text at all."""
    vocab, merges = clip_files
    path = tmp_path / "damaged"
    path.write_bytes(content)
    for read in [
        lambda: clip_tokenizer(path, merges),
        lambda: clip_tokenizer(vocab, path),
        lambda: t5_tokenizer(path, 8),
    ]:
        with pytest.raises(ValueError) as error:
            read()
        assert str(path) in one_line(error)


# --- FLUX.1 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(clip_files, t5_file):
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(12, 2, 2, 24, quick_gelu, projected=False))
    t5 = T5(T5Config(width=16, depth=2, heads=2, head=4, hidden=24, vocabulary=9))
    return FluxText(clip, t5, clip_tokenizer(*clip_files), t5_tokenizer(t5_file, 10))


def test_flux_reads_t5_token_by_token_and_clip_as_one_vector(text):
    prompts = ["a red digit", "", "a digit a digit a digit a digit a digit"]
    cond = text(prompts)
    clip_ids, t5_ids = text.tokens(prompts)
    assert clip_ids.shape == (3, 77) and t5_ids.shape == (3, 10)
    assert cond.keys() == {"context", "pooled"}
    assert cond["context"].shape == (3, 10, 16) and cond["pooled"].shape == (3, 12)
    close(cond["context"], text.t5(t5_ids))
    last = text.clip(clip_ids)[0]
    ends = [row.index(END) for row in clip_ids.tolist()]
    close(cond["pooled"], last[torch.arange(3), ends])
    assert not cond["context"].requires_grad and not cond["pooled"].requires_grad


def test_a_prompt_is_read_alike_alone_and_among_others(text):
    prompts = ["a red digit", "three", "a digit a digit a digit"]
    together, again = text(prompts), text(prompts)
    for name, tensor in together.items():
        assert torch.equal(tensor, again[name]), "the same prompts must give the same numbers"
        assert not torch.allclose(tensor[0], tensor[1], atol=1e-3)
        for b, prompt in enumerate(prompts):
            close(text([prompt])[name], tensor[b : b + 1])


def test_prompts_that_are_cut_are_counted_by_what_reads_them(text, capsys):
    """75 words fill CLIP's 77 tokens; T5 has 10 here, of which one is the end."""
    assert count_cut(text, ["a red digit", ""]) == {}
    long = [" ".join(["a"] * n) for n in (75, 76, 9)]
    assert count_cut(text, long) == {77: 1, 10: 2}
    say_cut(text, long, "prompts")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 of 3 after 77 tokens, 2 of 3 after 10 tokens" in said
    say_cut(text, ["a red digit"], "prompts")
    say_cut(SceneText(), ["a one and a two"], "prompts")  # which cuts none
    assert capsys.readouterr().out == ""


# --- SD 3.5 --------------------------------------------------------------------------------------

PROMPTS = ["a photo of a cat", "", "hello world"]


@pytest.fixture(scope="module")
def encoders(clip_files, t5_file):
    """Two CLIPs of 12 and 20 channels and a T5 of 40, with their tokenizers: CLIP's, T5's."""
    torch.manual_seed(0)
    clip_l = CLIP(CLIPConfig(12, 2, 2, 24, quick_gelu, projected=False))
    clip_g = CLIP(CLIPConfig(20, 3, 2, 24, F.gelu, projected=True))
    t5 = T5(T5Config(width=40, depth=2, heads=2, head=4, hidden=24, vocabulary=9))
    clips = clip_l, clip_g, clip_tokenizer(*clip_files), clip_tokenizer(*clip_files, 0)
    return clips, (t5, t5_tokenizer(t5_file, 10))


@pytest.fixture(scope="module")
def sd35(encoders):
    clips, t5 = encoders
    return SD35Text(*clips, *t5)


@pytest.fixture(scope="module")
def sd35_without_t5(encoders):
    return SD35Text(*encoders[0], blank=(10, 40))


def test_sd35_reads_both_clips_then_t5(sd35):
    """Side by side on channels, zeros up to T5's width, then T5's tokens after CLIP's."""
    cond = sd35(PROMPTS)
    ids_l, ids_g, t5_ids = sd35.tokens(PROMPTS)
    assert ids_l.shape == ids_g.shape == (3, 77) and t5_ids.shape == (3, 10)
    assert cond.keys() == {"context", "pooled"} and cond["context"].shape == (3, 77 + 10, 40)
    words, pieces = cond["context"].split([77, 10], dim=1)
    close(words[..., :12], sd35.clip_l.states(ids_l)[-2])
    close(words[..., 12:32], sd35.clip_g.states(ids_g)[-2])
    assert not words[..., 32:].any()
    close(pieces, sd35.t5(t5_ids))
    assert not cond["context"].requires_grad and not cond["pooled"].requires_grad


def test_sd35s_pooled_vector_is_both_clips_at_their_end_only_clip_gs_projected(sd35):
    pooled = sd35(PROMPTS)["pooled"]
    ids_l, ids_g, _ = sd35.tokens(PROMPTS)
    ends = [row.index(END) for row in ids_l.tolist()]
    assert ends == [row.index(END) for row in ids_g.tolist()] and pooled.shape == (3, 12 + 20)
    last_l, last_g = (
        clip.text_model.final_layer_norm(clip.states(ids)[-1])[torch.arange(3), ends]
        for clip, ids in [(sd35.clip_l, ids_l), (sd35.clip_g, ids_g)]
    )
    close(pooled[:, :12], last_l)
    close(pooled[:, 12:], last_g @ sd35.clip_g.text_projection.weight.T)


def test_sd35s_second_encoder_is_filled_up_with_zeros(sd35):
    """The first with the end token, T5 with zeros after its own end."""
    ids_l, ids_g, t5_ids = sd35.tokens([""])
    assert ids_l.tolist() == [[START] + 76 * [END]]
    assert ids_g.tolist() == [[START, END] + 75 * [0]]
    assert t5_ids.tolist() == [[1] + 9 * [0]]


def test_without_t5_its_tokens_are_zeros(sd35, sd35_without_t5):
    """The rest stays as it is, bit for bit; there are no ids for T5, and no weights."""
    full, less = sd35(PROMPTS), sd35_without_t5(PROMPTS)
    assert less["context"].shape == full["context"].shape
    assert not less["context"][:, 77:].any() and full["context"][:, 77:].any(dim=2).all()
    assert torch.equal(less["context"][:, :77], full["context"][:, :77])
    assert torch.equal(less["pooled"], full["pooled"])
    assert len(sd35_without_t5.tokens(PROMPTS)) == 2
    assert not [name for name in sd35_without_t5.state_dict() if name.startswith("t5")]


def test_sd35s_context_has_the_official_size_without_t5(encoders):
    """77 tokens of CLIP's and 256 of T5's, as wide as T5-XXL, which is what both networks take."""
    assert SD35Text(*encoders[0])(["a cat"])["context"].shape == (1, 77 + 256, 4096)
    assert T5_TOKENS == 256
    for name in ("large", "medium"):
        cfg = find(f"sd35-{name}").sizes.denoiser
        assert cfg.context_width == T5_XXL.width == 4096
        assert cfg.pooled_width == CLIP_L.width + CLIP_G.width == 2048


def test_sd35_refuses_half_a_t5_and_one_that_is_too_narrow(encoders):
    """Nothing may be cut off in silence."""
    clips, (t5, tokenizer) = encoders
    for half in [(t5, None), (None, tokenizer)]:
        with pytest.raises(AssertionError, match="T5 comes with its tokenizer"):
            SD35Text(*clips, *half)
    with pytest.raises(AssertionError, match="T5's states are the wider ones"):
        SD35Text(*clips, blank=(10, 31))(["a cat"])


# --- SDXL, SD 1.5 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(clip_files):
    torch.manual_seed(0)
    clip_l = CLIP(CLIPConfig(12, 2, 2, 24, quick_gelu, projected=False))
    clip_g = CLIP(CLIPConfig(20, 3, 2, 24, F.gelu, projected=True))
    return SDXLText(clip_l, clip_g, clip_tokenizer(*clip_files), clip_tokenizer(*clip_files, 0))


@pytest.fixture(scope="module")
def sd15(clip_files):
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(12, 2, 2, 24, quick_gelu, projected=False))
    return SD15Text(clip, clip_tokenizer(*clip_files))


def test_sizes_are_embedded_as_in_the_reference():
    """After the pooled text: six embeddings, there of 8 channels each."""
    path = HERE / "golden" / "unet_sdxl.safetensors"
    golden, size = load_file(path), json.loads(read_metadata(path)["config"])
    embedded = size_embedding(golden["inputs/time_ids"], size["time_id_embedding_dim"])
    close(torch.cat([golden["inputs/pooled"], embedded], dim=1), golden["outputs/adm_vector"])


def test_sizes_are_six_times_cosines_then_sines():
    """Number by number, in fp64: cos and sin of size / 10000^(i / 128). In fp32 an angle of 1024 is
    good to 6e-5."""
    sizes = torch.tensor([[1024, 768, 0, 32, 1024, 1024], [512, 640, 7, 0, 768, 1344]])
    got = size_embedding(sizes)
    assert got.shape == (2, 1536) and got.dtype == torch.float32
    for row, numbers in zip(got.tolist(), sizes.tolist(), strict=True):
        angles = [[size / 10000 ** (i / 128) for i in range(128)] for size in numbers]
        wanted = [wave(a) for six in angles for wave in (math.cos, math.sin) for a in six]
        assert row == pytest.approx(wanted, abs=2e-4)


def test_sdxl_reads_both_clips_before_their_last_block(sdxl):
    sizes = torch.tensor([[600, 800, 4, 0, 512, 512], [1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
    cond = sdxl(PROMPTS, sizes=sizes)
    assert cond.keys() == {"context", "pooled"}
    ids_l, ids_g = sdxl.tokens(PROMPTS)
    assert cond["context"].shape == (3, 77, 32) and cond["pooled"].shape == (3, 20 + 1536)
    for b in (0, 2):
        close(cond["context"][b, :, :12], sdxl.clip_l.states(ids_l)[-2][b])
        close(cond["context"][b, :, 12:], sdxl.clip_g.states(ids_g)[-2][b])
        close(cond["pooled"][b, :20], sdxl.clip_g(ids_g)[2][b])
    close(cond["pooled"][:, 20:], size_embedding(sizes))
    assert not cond["context"].requires_grad and not cond["pooled"].requires_grad


def test_sdxls_second_encoder_is_filled_up_with_zeros(sdxl):
    """The first with the end token; both as long, and alike up to the end."""
    ids_l, ids_g = sdxl.tokens(PROMPTS)
    ends = ids_l.argmax(dim=1)
    assert torch.equal(ends, ids_g.argmax(dim=1)) and ids_l.shape == ids_g.shape == (3, 77)
    for row_l, row_g, end in zip(ids_l, ids_g, ends.tolist(), strict=True):
        assert torch.equal(row_l[: end + 1], row_g[: end + 1])
        assert (row_l[end:] == END).all() and not row_g[end + 1 :].any()


def test_sdxls_empty_prompt_is_zeros_but_for_its_sizes(sdxl):
    """Blanks are no prompt either; a prompt that is there is never zeros, nor is its neighbour."""
    sizes = (700, 900, 10, 20, 512, 768)
    for cond in (sdxl(["", "  "], sizes=sizes), sdxl([""], sizes=sizes)):
        assert not cond["context"].any() and not cond["pooled"][:, :20].any()
        close(cond["pooled"][:1, 20:], size_embedding(torch.tensor([sizes])))
    cond = sdxl(PROMPTS)
    assert cond["context"][[0, 2]].any(dim=2).all() and cond["pooled"][[0, 2], :20].any()
    whole = size_embedding(torch.tensor([[1024, 1024, 0, 0, 1024, 1024]]))
    close(cond["pooled"][:, 20:], whole.expand(3, -1))


def test_sd15_reads_clips_last_state(sd15):
    """After the final norm, for the empty prompt too."""
    cond, ids = sd15(PROMPTS), sd15.tokens(PROMPTS)
    assert cond.keys() == {"context"} and cond["context"].shape == (3, 77, 12)
    final = sd15.clip.text_model.final_layer_norm
    close(cond["context"], final(sd15.clip.states(ids)[-1]))
    assert cond["context"].any(dim=2).all() and not cond["context"].requires_grad
    assert ids[1].tolist() == [START] + 76 * [END]


@pytest.mark.parametrize("which", ["sdxl", "sd15", "sd35", "sd35_without_t5"])
def test_clips_prompts_are_read_alike_alone_and_among_others(which, request):
    text = request.getfixturevalue(which)
    together = text(PROMPTS)
    for name, tensor in together.items():
        for b, prompt in enumerate(PROMPTS):
            close(text([prompt])[name], tensor[b : b + 1])


def test_conditioning_has_the_encoders_dtype(clip_files):
    """Sizes are embedded in fp32 and only then rounded."""
    torch.manual_seed(0)
    clip_l = CLIP(CLIPConfig(12, 2, 2, 24, quick_gelu, projected=False))
    clip_g = CLIP(CLIPConfig(20, 3, 2, 24, F.gelu, projected=True))
    tokenizers = clip_tokenizer(*clip_files), clip_tokenizer(*clip_files, 0)
    cond = SDXLText(clip_l, clip_g, *tokenizers).bfloat16()(["a cat"], sizes=(1023,) * 6)
    assert {tensor.dtype for tensor in cond.values()} == {torch.bfloat16}
    assert torch.equal(cond["pooled"][:, 20:], size_embedding(torch.full((1, 6), 1023)).bfloat16())
    cond = SD35Text(clip_l, clip_g, *tokenizers).bfloat16()(["a cat"])
    assert {tensor.dtype for tensor in cond.values()} == {torch.bfloat16}
