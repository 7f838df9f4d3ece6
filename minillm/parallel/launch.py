"""Run a function on several ranks of this machine, from a notebook cell, a test or a script; under torchrun, on this rank.

`launch` starts the ranks, runs one function and ends them; `Ranks` (live.py) keeps them between calls. What it leaves
out: several machines. There torchrun starts the ranks, and the same `launch` runs the function on each unchanged.
"""

import atexit
import os
from collections.abc import Callable

import torch.distributed as dist

from minillm.parallel.channel import pack, unpack
from minillm.parallel.live import Ranks
from minillm.parallel.rank import choose_backend, join_world


def launch(fn: Callable, ranks: int, *args, backend: str = "auto", timeout: float = 120.0, checked: bool = False) -> list:
    """fn(me, *args) on each of `ranks` processes; returns what each returned, in rank order. `me` is a `Rank`.

    fn and args travel by cloudpickle, results too: return tensors on the CPU. What a rank prints is shown after it has
    ended, rank by rank. Generators start from seed 0 on every rank; each rank uses one thread.
    backend: "nccl" (one GPU a rank), "gloo" (CPU), or "auto": nccl where there is a GPU for every rank.
    timeout: seconds until the call ends with an error, whatever the ranks do.
    checked: every collective is compared across ranks before it runs (see checked.py), so that different shapes are an
    error at once and not a hang or a wrong number. Ranks that wait for one another are found without it too.
    Where a world exists already (torchrun, or inside a rank), runs fn on this rank of it and gathers all results.
    Raises: RankError if a rank raises, dies, or does not return in time, and if all wait for one another; ValueError
    for a number of ranks that the existing world does not have, or a backend that this machine does not have.
    """
    if dist.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return _in_this_world(fn, ranks, args, backend, timeout, checked)
    with Ranks(ranks, backend=backend, timeout=timeout, checked=checked) as live:
        return live.run(fn, *args)


def _in_this_world(fn: Callable, ranks: int, args: tuple, backend: str, timeout: float, checked: bool) -> list:
    """Run on the rank that this process is, and gather every rank's result."""
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if size != ranks:
        raise ValueError(f"launch was asked for {ranks} ranks inside a world of {size} (WORLD_SIZE, set by torchrun or "
                         f"by whoever started this process): start {ranks} with torchrun --nproc-per-node, or unset RANK "
                         f"and WORLD_SIZE to start ranks on this machine.")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    started = dist.is_initialized()
    rank = dist.get_rank() if started else int(os.environ["RANK"])
    me = join_world(rank, size, choose_backend(backend, here), timeout, checked, int(os.environ.get("LOCAL_RANK", rank)))
    if not started:
        atexit.register(dist.destroy_process_group)
    gathered = [None] * size
    dist.all_gather_object(gathered, pack(fn(me, *args)))
    return [unpack(result) for result in gathered]
