"""On a GPU: every network and every kind of turn of every teacher equal what the CPU computes.

The checks are those of `python -m engine.bench --gpu-check --parts 1`. Where there is no GPU these
tests are skipped; there tests/test_full_size.py runs every line of the project on a GPU that is not
there, and tests/test_bench.py these checks on the CPU.
"""

import pytest
import torch

from engine import check
from teachers import names

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("teacher", names())
def test_a_gpu_computes_what_the_cpu_does(teacher):
    """fp32 to rounding, bf16 to the rounding of its weights, attention fused, losses and norms of
    every kind of turn to 1e-4, and a run that was interrupted bit for bit."""
    found = {}
    check.correctness(teacher, check.Sizes(), torch.device("cuda"), found)
    assert len(found) == 5 and check.sound(found), found
