"""What the networks share: the layout in which attention is asked for."""

import pytest
import torch
import torch.nn.functional as F
from small import SEER, SMALL

from nets.clip import CLIP
from nets.qwen3 import Qwen3
from nets.text import T5
from nets.vae import VAE
from nets.vision import CLIPVision, ViT

META = torch.device("meta")  # no CPU and no numbers: what a GPU is asked for


@pytest.fixture
def asked(monkeypatch):
    """What scaled_dot_product_attention is called with: q, k, v and the mask."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **settings):
        calls.append((q, k, v, attn_mask))
        return real(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("teacher", SMALL)
def test_fused_kernels_take_what_every_network_asks(asked, teacher):
    """A head's channels lie together in q, k and v, (B, N, L, D) in order: every fused kernel
    refuses other layouts, and scores of all pairs would be kept (16384 x 16384 in an autoencoder
    at 1024 x 1024). T5's scores have a bias, which takes one kernel alone; it reads any strides but
    the last."""
    family, nets = SMALL[teacher], SMALL[teacher].sizes
    ids = torch.zeros(2, 77, dtype=torch.long, device=META)
    cond = {name: torch.zeros(2, *form, device=META) for name, form in family.cond_shapes().items()}
    latent = torch.zeros(2, *family.latent_shape((32, 48)), device=META)
    image = torch.zeros(2, 3, 56, 42, device=META)
    with META:
        denoiser, vae, seer = family.build(1.0), VAE(nets.vae), CLIPVision(SEER)
        backbone = ViT(family.backbone())
        words = [CLIP(cfg) for cfg in (family.reader(), nets.clip_l, nets.clip_g) if cfg]
        words += [Qwen3(nets.llm)] if nets.llm else []
    denoiser(latent, torch.zeros(2, device=META), cond)
    vae.decode(vae.encode(torch.zeros(2, 3, 32, 48, device=META)))
    backbone(image)
    seer(torch.zeros(2, 3, 16, 16, device=META))
    for net in words:
        net(ids)
    assert len(asked) > 10
    for q, k, v, mask in asked:
        assert q.ndim == 4 and mask is None
        assert all(x.is_contiguous() for x in (q, k, v)), (q.shape, q.stride())
    if nets.t5:
        asked.clear()
        with META:
            t5 = T5(nets.t5)
        t5(ids)
        assert asked and all(x.stride(-1) == 1 for call in asked for x in call)
