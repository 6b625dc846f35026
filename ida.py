"""Implicit distribution alignment: after each student update, pull the fake score to the student.

    IDA update   ida_update   phi <- lambda phi + (1 - lambda) theta

The student has just moved, and the fake score, which knows only the student's past samples, lags
behind. Both are one architecture, started from one teacher, so their weights can be averaged; that
carries the fake score part of the way at once, and few fake updates per student update suffice.

Knows nothing of devices, files, ranks or configuration. On sharded weights it runs shard by shard,
without communication.
"""

import torch
from torch import nn


@torch.no_grad()
def ida_update(fake: nn.Module, student: nn.Module, decay: float) -> None:
    """phi <- decay phi + (1 - decay) theta, over every parameter.

    decay: lambda, in [0, 1]; 1 changes nothing, 0 copies. In fp32: in bf16, steps of 1 - decay
    round away. The same formula, with a copy in place of the fake score, is the usual moving
    average of weights; train.py and digits/pretrain.py use it for that too.
    """
    phi, theta = dict(fake.named_parameters()), dict(student.named_parameters())
    assert phi.keys() == theta.keys(), (
        f"IDA needs one architecture, differing: {sorted(phi.keys() ^ theta.keys())[:5]}"
    )
    assert all(p.dtype == torch.float32 for p in phi.values()), "IDA needs fp32 weights"
    torch._foreach_lerp_(list(phi.values()), [theta[name] for name in phi], 1 - decay)
