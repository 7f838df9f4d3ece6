"""Checked mode: before a collective runs, its ranks compare what they call and with which shapes.

Collectives that do not match hang, crash or quietly give wrong numbers; here they raise on every rank. The comparison is
an all-gather in the same group, so two ranks in different collectives of one group meet in it. Sends and receives are
not compared. torch's own mode (TORCH_DISTRIBUTED_DEBUG=DETAIL) is not used: in torch 2.13 it takes unequal numbers of
sends for a mismatch, and crashes in DistributedDataParallel.
"""

import functools
import inspect
import sys
import traceback

import torch.distributed as dist
from torch import Tensor

from minillm.parallel.places import frames_of, place, together

# Each collective of torch.distributed, and which of its arguments has one shape on all ranks.
COMPARED = {"all_reduce": 0, "broadcast": 0, "reduce": 0,
            "all_gather": 1, "all_gather_into_tensor": 1, "all_gather_single": 1,
            "reduce_scatter": 0, "reduce_scatter_tensor": 1, "reduce_scatter_single": 1, "gather": 0, "scatter": 0,
            "all_to_all": None, "all_to_all_single": None, "barrier": None}
_on = False


class Mismatch(ValueError):
    """The ranks of a group called different collectives, or one with different shapes."""


def switch_on() -> None:
    """Make every collective of torch.distributed in this process compare first; and those of collectives.py."""
    global _on
    if not _on:
        _on = True
        for name, index in COMPARED.items():
            if hasattr(dist, name):
                setattr(dist, name, _comparing(getattr(dist, name), index))


def compare(name: str, x: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """In checked mode, compare a call with those of the other ranks; else nothing. x: what has one shape on all ranks.

    Raises: Mismatch, on every rank of the group, if they differ.
    """
    if not _on:
        return
    call = name if x is None else f"{name} on {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    calls = [None] * dist.get_world_size(group)
    here = place(frames_of(traceback.walk_stack(sys._getframe())))
    dist.all_gather_object(calls, (call, here), group=group)
    if len({call for call, _ in calls}) > 1:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        told = together({rank: f"called {call} in {where}" for rank, (call, where) in zip(ranks, calls)})
        raise Mismatch(f"the ranks called collectives that do not match: {told}. Every rank of a group must call the same "
                       f"collectives in the same order with the same shapes.")


def _comparing(collective, index: int | None):
    signature = inspect.signature(collective)
    names = list(signature.parameters)

    @functools.wraps(collective)
    def compared(*args, **options):
        given = signature.bind(*args, **options).arguments
        if given.get("group") != dist.GroupMember.NON_GROUP_MEMBER:
            compare(collective.__name__, None if index is None else given[names[index]], given.get("group"))
        return collective(*args, **options)

    return compared
