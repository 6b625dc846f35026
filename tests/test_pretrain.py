"""The commands that made assets/ still run: a few steps of each, into another folder."""

import pytest
import torch
from safetensors.torch import load

from digits import pretrain
from digits.judge import Judge
from digits.scenes import DigitScenes
from nets.vision import ViT
from nets.weights import load_weights, read_metadata
from teachers import find


class Few(DigitScenes):
    """What a network is judged by in the end are 64 scenes."""

    def __call__(self, ids):
        return super().__call__(ids[:64])


@pytest.fixture
def assets(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "DigitScenes", Few)
    monkeypatch.setattr(pretrain, "ASSETS", tmp_path)
    monkeypatch.setattr(pretrain, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(pretrain, "TEACHER", SMALL)
    return tmp_path


SMALL = find("digits").scaled(0.5, 2)
FORMS = {
    "judge": Judge,
    "backbone": lambda: ViT(find("digits").backbone()),
    "teacher": lambda: SMALL.build(2.0),
}


@pytest.mark.parametrize("name, calls", [("judge", 4), ("backbone", 3), ("teacher", 6)])
def test_pretraining_continues_and_leaves_the_shipped_networks_alone(
    assets, monkeypatch, name, calls
):
    """Interrupted after two iterations or more, it ends in the same file bit for bit; until then
    that is as it was shipped."""
    monkeypatch.setattr(pretrain, "EVERY", 2)
    train, path = getattr(pretrain, f"train_{name}"), assets / f"{name}.safetensors"
    steps = {"steps": 2, "ghost_steps": 2} if name == "judge" else {"steps": 4}
    train(**steps, batch=4)
    whole, about = load(path.read_bytes()), read_metadata(path)
    assert not any((assets / "kept").iterdir()), "what is done is not kept"
    net = load_weights(FORMS[name](), path)
    if name == "judge":
        assert float(about["ghost_limit"]) == pytest.approx(0, abs=9)
    if name == "teacher":
        assert net.final_layer.linear.weight.abs().max() > 0, "it starts at zero"
    path.write_bytes(b"shipped")
    set_lr, asked = pretrain.set_lr, []

    def stopped(*given):
        asked.append(1)
        if len(asked) == calls:
            raise KeyboardInterrupt
        set_lr(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "set_lr", stopped)
        train(**steps, batch=4)
    assert path.read_bytes() == b"shipped"
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "set_lr", lambda *given: asked.append(1) or set_lr(*given))
        train(**steps, batch=4)
    assert len(asked) == (4 if name == "teacher" else 2), "it began anew"
    again = load(path.read_bytes())
    assert again.keys() == whole.keys() and read_metadata(path) == about
    assert all(torch.equal(x, whole[name]) for name, x in again.items())


def test_blends_are_what_they_say():
    """(1 - amount) of the image, amount of others; half of them untouched."""
    images = torch.eye(64)[:, None, :, None].expand(-1, 3, -1, 4).contiguous()
    draw = torch.Generator().manual_seed(0)
    mixed, amount = pretrain.blend(images, draw)
    rows = torch.arange(64)
    torch.testing.assert_close(mixed[rows, 0, rows, 0], 1 - amount)
    assert 20 <= (amount == 0).sum() <= 44 and amount.max() <= 0.5
    shaken = pretrain.shake(-torch.ones(8, 3, 16, 16), draw)
    torch.testing.assert_close(shaken, -torch.ones(8, 3, 16, 16))
