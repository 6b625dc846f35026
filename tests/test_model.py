"""MM-DiT against reference numbers: small random weights in official names, made with an
independent implementation (Medium's kind: dual attention in the first blocks, a last text block
without MLP)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import MMDiT, MMDiTConfig, attention
from nets.text import SceneText
from nets.weights import save_weights
from schedule import Flow
from teachers import build, load_student, load_teacher

SIZE = MMDiTConfig(2, 4, 48, 3, 3, context_width=40, pooled_width=24, table=9, dual_blocks=2)
PREFIX = "weights/model.diffusion_model."


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parent / "golden" / "mmdit_medium.safetensors")


@pytest.fixture(scope="module")
def net(golden):
    net = MMDiT(SIZE, Flow(3.0))
    weights = {k.removeprefix(PREFIX): v for k, v in golden.items() if k.startswith(PREFIX)}
    net.load_state_dict(weights)  # strict: official names, none missing, none left over
    return net


@pytest.fixture(scope="module")
def inputs(golden):
    cond = {"context": golden["inputs/context"], "pooled": golden["inputs/y"]}
    return golden["inputs/latent"], golden["inputs/timesteps"] / 1000, cond


def test_mmdit_equals_the_reference(net, golden, inputs):
    """4 x 6 patches of a 9 x 9 table, so the centre crop matters. References agree to 3e-6."""
    torch.testing.assert_close(net(*inputs), golden["outputs/velocity"], atol=2e-5, rtol=1e-5)


def test_each_sample_has_its_own_time_and_text(net, inputs):
    """A batch of two equals two batches of one."""
    x_t, t, cond = inputs
    for b in range(2):
        alone = net(x_t[b : b + 1], t[b : b + 1], {k: v[b : b + 1] for k, v in cond.items()})
        torch.testing.assert_close(alone, net(*inputs)[b : b + 1], atol=1e-5, rtol=1e-5)


def test_every_weight_gets_a_gradient(net, inputs):
    """But for the last text block's query norm: nothing reads the text's own attention there."""
    net.zero_grad()
    net(*inputs).square().sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"joint_blocks.2.context_block.attn.ln_q.weight"}


def test_latents_larger_than_the_position_table_are_refused(net, inputs):
    _, t, cond = inputs
    with pytest.raises(AssertionError, match="at most 9 patches"):
        net(torch.zeros(2, 4, 20, 12), t, cond)


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind(0)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), (weights @ v).transpose(1, 2).flatten(2))


def test_teacher_loads_and_predicts_velocity():
    """The embedded teacher on its own task: at t = .5 it explains most of the velocity."""
    from data import DigitScenes

    teacher, scenes = (
        load_teacher("digits", 2.0),
        DigitScenes(seed=9, handwriting="held-out")(range(64)),
    )
    eps = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.full((64,), 0.5)
    with torch.no_grad():
        v = teacher(teacher.schedule.noise(scenes.images, eps, t), t, SceneText()(scenes.captions))
    wanted = eps - scenes.images
    assert (v - wanted).var() < 0.15 * wanted.var()


def test_student_file_loads_back_bit_for_bit(tmp_path):
    net, path = build("digits", 2.0), tmp_path / "student.safetensors"
    save_weights(net, path, torch.float32, {"teacher": "digits", "shift": "2.0", "steps": "4"})
    again, about = load_student(path)
    assert about["steps"] == "4" and again.schedule.shift == 2.0
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
