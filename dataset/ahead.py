"""Batches in order, read by threads while the networks learn.

    batch_ids   which samples a rank takes at a step
    Ahead       the batches of these steps

A data set is called with sample numbers and returns something with `captions`, `images`, (B, 3, H,
W) in [-1, 1] or None, and `sizes`, (B, 6) or None. Sample i is a function of (seed, i) alone, so
nothing needs saving to resume, and any number of ranks and threads sees the same samples.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from dataset.images import Pairs


def batch_ids(step: int, batch: int, rank: int = 0, world: int = 1) -> range:
    """The global sample numbers of this rank's batch.

    Disjoint over ranks and steps, without gaps.
    """
    start = (step * world + rank) * batch
    return range(start, start + batch)


class Ahead:
    """The batches of these steps, in order; `workers` threads read two batches each in advance.

        with Ahead(data, ids_of_step, workers, range(first, last)) as batches:
            for batch in batches:

    Threads suffice: pillow decodes and scales outside of the interpreter's lock. Without workers
    each batch is read when asked for. An error comes with the batch it belongs to.
    """

    def __init__(
        self,
        data: Callable[[range], Pairs],
        ids_of_step: Callable[[int], range],
        workers: int,
        steps: Iterable[int],
    ):
        self.data, self.ids_of_step, self.steps = data, ids_of_step, iter(steps)
        self.pool = ThreadPoolExecutor(workers, "data") if workers else None
        self.waiting: deque[Future] = deque()
        for _ in range(2 * workers):
            self._ask()

    def __iter__(self) -> Iterator[Pairs]:
        return self

    def __next__(self) -> Pairs:
        if self.pool is None:
            return self.data(self.ids_of_step(next(self.steps)))
        if not self.waiting:
            raise StopIteration
        batch = self.waiting.popleft().result()
        self._ask()
        return batch

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        """Returns when no thread is left: what is being read is finished, what waits is dropped."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
            self.waiting.clear()

    def _ask(self) -> None:
        step = next(self.steps, None)
        if step is not None:
            self.waiting.append(self.pool.submit(self.data, self.ids_of_step(step)))
