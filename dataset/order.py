"""In which order items come.

Epochs         which item has number i
bucket_sizes   the shapes that batches may have
in_batches     an epoch in batches of one shape
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from schedule import generator


class Epochs:
    """Which of `length` items a sample number stands for: `order(draw)` lists an epoch's items."""

    def __init__(self, length: int, order: Callable[[torch.Generator], Tensor], seed: int):
        self.length, self.order, self.seed = length, order, seed
        self.recent: dict[int, Tensor] = {}

    def item(self, i: int) -> int:
        epoch, place = divmod(i, self.length)
        return int(self._of(epoch)[place])

    def _of(self, epoch: int) -> Tensor:
        known = self.recent.get(epoch)
        if known is None:  # two threads may both get here, and find the same
            known = self.order(generator("epoch", self.seed, epoch))
            self.recent = {n: o for n, o in self.recent.items() if abs(n - epoch) < 2}
            self.recent[epoch] = known
        return known


def bucket_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Heights and widths in multiples of 64, nearly the area of `size` and never above it, no side
    over twice the other; from wide to tall. For 1024 x 1024 they are among SDXL's own.
    """
    area = size[0] * size[1]
    least = math.ceil(math.sqrt(area / 2) / 64) * 64
    pairs = [(short, area // (64 * short) * 64) for short in range(least, math.isqrt(area) + 1, 64)]
    return sorted({*pairs, *(pair[::-1] for pair in pairs), size}, key=lambda s: s[0] / s[1])


def in_batches(order: Tensor, buckets: Tensor, batch: int) -> Tensor:
    """An epoch's order (N,) rearranged so that each `batch` in a row share a bucket: (M,), M >= N.

    buckets: of every item. The items, bucket after bucket but otherwise in their order, are cut
    into batches: one at the border of two buckets has items of both, and is cropped to the size of
    its middle one. So each item comes once an epoch; only the last batch is filled up, with items
    next to its own. Batches come in the order of their earliest items.
    """
    places = buckets[order].argsort(stable=True)
    n = torch.arange(math.ceil(len(order) / batch) * batch)
    n = torch.where(n < len(order), n, (n - batch) % len(order))
    batches = places[n].unflatten(0, (-1, batch))
    return order[batches[batches.amin(dim=1).argsort(stable=True)].flatten()]
