import pytest
import torch

from dataset.ahead import batch_ids
from digits.exam import read_scene
from digits.judge import Verdict
from digits.scenes import HELD_OUT, DigitScenes, load_digits
from digits.words import VOCABULARY, WORD_ID, SceneText

TEXT = SceneText()


def test_a_scene_is_a_function_of_its_number():
    one, two = DigitScenes(seed=1)(range(10, 14)), DigitScenes(seed=1)([12])
    assert torch.equal(one.images[2:3], two.images) and one.captions[2] == two.captions[0]
    assert not torch.equal(DigitScenes(seed=2)([12]).images, two.images)


def test_ranks_share_out_the_samples():
    """Two ranks, three steps: every number once, in the order of one rank with the double batch."""
    two = [i for step in range(3) for rank in range(2) for i in batch_ids(step, 4, rank, 2)]
    one = [i for step in range(3) for i in batch_ids(step, 8)]
    assert two == one == list(range(24))


def test_the_1797_digits_are_all_there():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_held_out_pairs_are_never_trained_on():
    scenes = DigitScenes()(range(2000))

    def pairs(scenes):
        return set(
            map(tuple, torch.stack([scenes.colours, scenes.digits], -1).flatten(0, 1).tolist())
        )

    seen = pairs(scenes)
    assert len(seen) == 54 and not seen & HELD_OUT
    new = DigitScenes(pairs="held-out")(range(500))
    assert pairs(new) == HELD_OUT


def test_captions_leave_attributes_open_at_their_rates():
    """2,000 scenes: colours left out .4, digits .5, relation "and" .3, each within .03."""
    ids = TEXT.tokens(DigitScenes()(range(2000)).captions)
    share = [
        (ids[:, [0, 3]] == WORD_ID["[pad]"]).float().mean(),
        (ids[:, [1, 4]] == WORD_ID["digit"]).float().mean(),
        (ids[:, 2] == WORD_ID["and"]).float().mean(),
    ]
    assert [x.item() for x in share] == pytest.approx([0.4, 0.5, 0.3], abs=0.03)


def truth(scenes) -> Verdict:
    """What a judge without error would say."""
    colours, digits = scenes.by_place
    nothing = torch.zeros(len(digits))
    return Verdict(scenes.axis, digits, colours, nothing, nothing)


def test_captions_are_true_of_their_scenes():
    scenes = DigitScenes(seed=3)(range(1000))
    assert read_scene(truth(scenes), TEXT.tokens(scenes.captions)).right.all()


def test_matching_scenes_fit_their_captions():
    """Read by the judge, which errs on 2 to 3 % of held-out writing; training digits it knows."""
    from digits.judge import load_judge

    scenes = DigitScenes(seed=3)
    ids = TEXT.tokens(scenes(range(200)).captions)
    verdict = load_judge()[0].judge(scenes.matching(ids))
    assert read_scene(verdict, ids).right.float().mean() > 0.97


def test_tokens_have_five_slots():
    ids = TEXT.tokens(
        ["a red three left of a blue seven", "A digit above an eight", "a one and a pink two", ""]
    )
    words = [[VOCABULARY[i] for i in row] for row in ids]
    assert words == [
        ["red", "three", "left", "blue", "seven"],
        ["[pad]", "digit", "above", "[pad]", "eight"],
        ["[pad]", "one", "and", "pink", "two"],
        ["[pad]"] * 5,
    ]


@pytest.mark.parametrize(
    "prompt, named",
    [
        ("a purple three above a digit", '"purple"'),
        ("a red three", "not of the form"),
        ("a red red above a digit", "not of the form"),
        ("a digit above a digit above a digit", "not of the form"),
    ],
)
def test_what_a_prompt_cannot_mean_is_named(prompt, named):
    with pytest.raises(ValueError, match=named):
        TEXT.tokens([prompt])


def test_conditioning_tells_slots_and_words_apart():
    cond = TEXT(["a red one and a blue two", "a blue two and a red one"])
    assert cond["context"].shape == (2, 5, TEXT.context_width)
    assert cond["pooled"].shape == (2, TEXT.pooled_width)
    assert not torch.equal(cond["pooled"][0], cond["pooled"][1])
    assert TEXT.embedding(["a red one and a blue two"]).norm().item() == pytest.approx(1)
