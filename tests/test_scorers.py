"""What the scorers read of a caption and see of an image is what their authors' code does."""

import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from small import SEER, write_tokenizer

from measure import scorers
from measure.scorers import SCORERS, Scorer, cleaned, embed_captions, unrepaired
from nets.clip import CLIP, CLIPConfig, quick_gelu
from nets.text import clip_tokenizer, token_ids

# As it comes, and as open_clip reads it: entities once and twice escaped, curly quotes, ligatures,
# full and half widths. ftfy 6.3.1 gives the same.
READ = {
    "a fox &amp; a dog": "a fox & a dog",
    "a fox &amp;amp; a dog": "a fox & a dog",
    "caf&eacute;": "café",
    "the dog’s “bone”": 'the dog\'s "bone"',
    "‘a’ ‚b‛ „c‟": "'a' 'b' \"c\"",
    "ﬂuﬃest": "fluffiest",
    "ＬＯＵＤ　ﾀ": "LOUD タ",
    "a < b, 1 > 0": "a < b, 1 > 0",
    "naïve façade, 漢字, an ellipsis…": "naïve façade, 漢字, an ellipsis…",
}


@pytest.fixture
def without_ftfy(monkeypatch):
    """Whether or not it is installed."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)


def test_captions_are_cleaned_as_open_clips(without_ftfy):
    assert {caption: cleaned(caption) for caption in READ} == READ


def test_ftfy_repairs_captions_where_it_is_installed(monkeypatch):
    """Before HTML's entities, which it leaves where a text has tags; and nothing is said then."""
    package = ModuleType("ftfy")
    package.fix_text = lambda text: text.replace("schÃ¶n", "sch&amp;ouml;n")
    monkeypatch.setitem(sys.modules, "ftfy", package)
    assert cleaned("<i>schÃ¶n") == "<i>schön"
    monkeypatch.setattr(scorers, "find_spec", lambda name: package if name == "ftfy" else None)
    assert unrepaired(SCORERS, ["schÃ¶n"]) == ""


def test_what_is_not_repaired_is_said_where_it_can_matter(without_ftfy):
    said = unrepaired(["CLIP", "CLIP-H", "PickScore", "HPSv2", "ImageReward"], ["rain", "schön"])
    assert said.startswith("CLIP-H and HPSv2 read captions without ftfy")
    assert unrepaired(["HPSv2"], ["rain"]) == unrepaired(["CLIP", "PickScore"], ["schön"]) == ""


def test_the_scorers_of_open_clip_read_cleaned_captions_and_nobody_else(
    without_ftfy, tmp_path, monkeypatch
):
    """CLIP-g, CLIP-H and HPSv2; CLIP and PickScore follow transformers, which does not clean; what
    CLIP's tokenizer makes of a caption, for teachers too, is untouched."""
    text = CLIPConfig(12, 1, 2, 24, quick_gelu, projected=True, vocabulary=514)
    torch.manual_seed(0)
    both = CLIP(text).requires_grad_(False)
    save_file(both.state_dict() | {"logit_scale": torch.zeros(())}, tmp_path / "clip.safetensors")
    words = [tmp_path / name for name in ("vocab.json", "merges.txt")]
    for path in words:
        write_tokenizer(path)
    for title, scorer in SCORERS.items():
        small = Scorer(SEER, text, scorer.view, scorer.read, scorer.scaled)
        monkeypatch.setitem(SCORERS, title, small)
    paths = dict.fromkeys(SCORERS, tmp_path / "clip.safetensors")
    prompts, files = ["caf&eacute; ’", "café '"], {"clip_vit_tokenizer": words}
    read = embed_captions(files, paths, prompts, torch.device("cpu"))
    same = {title for title, (x, _) in read.items() if torch.equal(x[0], x[1])}
    assert same == {"CLIP-g", "CLIP-H", "HPSv2"}
    ids = token_ids(clip_tokenizer(*words), prompts)
    assert not torch.equal(ids[0], ids[1])


def test_each_scorer_crops_as_its_authors_do():
    """A column of 0..40 beside 24 rows: (41 - 24) / 2 is 8.5. torchvision, behind open_clip's and
    OpenAI's, rounds to the even 8; of 0..42 9.5 to 10, and transformers, behind PickScore, to 9.
    HPSv2 sees it all."""
    for width, firsts in ((41, {"PickScore": 8}), (43, {"PickScore": 9, "CLIP": 10})):
        image = torch.arange(width).expand(1, 3, 24, -1) / width
        for title, scorer in SCORERS.items():
            seen = scorer.view(image, 24)
            assert seen.shape == (1, 3, 24, 24)
            if title == "HPSv2":
                assert (seen == 0).any(), "black above and below"
            else:
                first = firsts.get(title, firsts.get("CLIP", 8))
                assert round(width * seen[0, 0, 12, 0].item()) == first, title
