"""Workers and the two things they ask of one another: the mean of a tensor, and everybody's. On ranks, or in one process.

What is written for `Peers` runs on the ranks of a group (`peers_of`: ring collectives that can be counted) and, for an
experiment with many workers on few cores, as threads of this process (`simulate`). Left out of the simulation: time.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.parallel.collectives import Traffic, ring_all_gather, ring_all_reduce


@dataclass(frozen=True)
class Peers:
    """One worker among several."""

    rank: int
    size: int
    mean: Callable[[Tensor], Tensor]
    """The mean over workers of a tensor that each gives, the same bits for all."""
    gather: Callable[[Tensor], Tensor]
    """What each gives, equal in shape, one after another: (...) -> (P, ...)."""


ALONE = Peers(0, 1, mean=lambda x: x, gather=lambda x: x[None])
"""A worker without others."""


def peers_of(group: dist.ProcessGroup, traffic: Traffic | None = None) -> Peers:
    """This rank of a group: ring all-reduce and ring all-gather, counted in `traffic`."""
    size = dist.get_world_size(group)
    return Peers(dist.get_rank(group), size, lambda x: ring_all_reduce(x, group, traffic) / size,
                 lambda x: ring_all_gather(x[None], group, traffic=traffic))


def simulate(fn: Callable, workers: int, *args) -> list:
    """fn(peers, *args) on so many threads, which meet at each mean and gather; returns what each returned, in order.

    Raises: what a worker raises (the first by number), while the others are told to stop; RuntimeError if one returns while
    another still waits for it; ValueError below 1 worker.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: at least 1 is needed.")
    table: list[Tensor | None] = [None] * workers  # what each brought to the meeting, None once it has returned
    barrier = threading.Barrier(workers)

    def meet(rank: int, x: Tensor | None) -> list[Tensor | None]:
        table[rank] = x
        barrier.wait()
        everything = list(table)
        barrier.wait()  # nobody writes the next before all have read
        if len({brought is None for brought in everything}) > 1:
            returned = [other for other, brought in enumerate(everything) if brought is None]
            raise RuntimeError(f"workers {returned} returned while others still waited for them: all must make the same calls.")
        return everything

    def worker(rank: int):
        try:
            peers = Peers(rank, workers, lambda x: torch.stack(meet(rank, x)).mean(0), lambda x: torch.stack(meet(rank, x)))
            result = fn(peers, *args)
            meet(rank, None)
            return result
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(worker, rank) for rank in range(workers)]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))  # the cause, not its effects
    return [future.result() for future in futures]
