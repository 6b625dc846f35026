"""Processes for tests: forked from one that has torch and train.py imported, so they start at once.

A rank is given what torchrun gives it. What a process prints goes to a file.
"""

import contextlib
import multiprocessing
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import train
from engine import ranks

PLACES = (Path(__file__).parent, Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, PLACES))  # of the process that forks
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["processes", "matplotlib.pyplot"])


def launch(function: Callable, world: int, printed: Path, *given) -> list[BaseProcess]:
    """`function(*given)` on each of `world` ranks; world 0: in one process that is no rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        FORKS.Process(target=as_rank, args=(rank, world, port, printed, function, given))
        for rank in range(max(world, 1))
    ]
    for process in ranks:
        process.start()
    return ranks


def as_rank(
    rank: int, world: int, port: int, printed: Path, function: Callable, given: Sequence
) -> None:
    torch.set_num_threads(1)
    if world:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        values = (rank, rank, world, world, port)
        os.environ |= dict(zip(names, map(str, values), strict=True))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    with open(printed, "a", buffering=1) as file:
        sys.stdout = sys.stderr = file
        try:
            function(*given)
        except Exception:
            traceback.print_exc()
            raise


def join(ranks: list[BaseProcess], seconds: float = 120) -> list[int]:
    """Their exit codes; none is left over."""
    deadline = time.time() + seconds
    try:
        for process in ranks:
            process.join(max(0, deadline - time.time()))
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def wait_for(pattern: str, out: Path, run: list, seconds: float = 60) -> None:
    """Until something of that pattern is there, or the run has ended."""
    deadline = time.time() + seconds
    while not any(out.glob(pattern)) and run[0].is_alive() and time.time() < deadline:
        time.sleep(0.002)


def finish(function: Callable, world: int, printed: Path, *given) -> None:
    codes = join(launch(function, world, printed, *given))
    assert codes == [0] * len(codes), f"exit codes {codes}\n{printed.read_text()[-3000:]}"


def command(flags: Sequence, limit: int | None = None) -> None:
    """train.py with these flags. limit: no file of rank 1, or of one process, may be longer."""
    if limit and os.environ.get("RANK") != "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *map(str, flags)]
    train.main()


@contextlib.contextmanager
def ranks_of_torchrun():
    """This process among its peers."""
    device = ranks.start()
    try:
        yield device
    finally:
        ranks.stop()
