"""The commands that made assets/ still run: a few steps of each, into another folder."""

import pytest
import torch

from digits import pretrain
from digits.judge import Judge
from nets.vision import ViT
from nets.weights import load_weights, read_metadata
from teachers import find


@pytest.fixture
def assets(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "ASSETS", tmp_path)
    return tmp_path


def test_judge_trains_and_saves_its_limit(assets):
    pretrain.train_judge(steps=2, ghost_steps=2, batch=8)
    load_weights(Judge(), assets / "judge.safetensors")
    assert float(read_metadata(assets / "judge.safetensors")["ghost_limit"]) == pytest.approx(
        0, abs=9
    )


def test_backbone_trains_and_saves(assets):
    pretrain.train_backbone(steps=2, batch=8)
    load_weights(ViT(find("digits").backbone()), assets / "backbone.safetensors")


def test_teacher_trains_and_saves_its_average(assets):
    pretrain.train_teacher(steps=3, batch=8)
    net = load_weights(find("digits").build(2.0), assets / "teacher.safetensors")
    assert net.final_layer.linear.weight.abs().max() > 0, "it starts at zero and must have moved"


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
