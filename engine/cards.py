"""GPUs: memory and speed, and how long kernels take on them by roofline."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: GB; dense TFLOP/s in bf16, summed in fp32, and in fp32; GB/s of its memory."""

    memory: float
    bf16: float
    fp32: float
    bandwidth: float

    def seconds(self, kernels: Counter) -> float:
        """Each kernel as fast as its arithmetic and its traffic allow: no launch, no collective."""
        found = 0.0
        for (flops, size, half), n in kernels.items():
            speed = (self.bf16 if half else self.fp32) * 1e12
            found += n * max(flops / speed, size / (self.bandwidth * 1e9))
        return found


CARDS = {  # NVIDIA's data sheets and architecture papers, without sparsity
    "h200": Card(141, 989, 67, 4800),
    "h100": Card(80, 989, 67, 3350),
    "a100": Card(80, 312, 19.5, 2039),
    "l40s": Card(48, 362, 91.6, 864),
    "a6000": Card(48, 155, 38.7, 768),
    "a100-40": Card(40, 312, 19.5, 1555),
    "5090": Card(32, 210, 105, 1792),
    "4090": Card(24, 165, 82.6, 1008),
    "3090": Card(24, 71, 35.6, 936),
}
