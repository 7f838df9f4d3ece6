"""What the ranks of a group decide together, so that none goes on alone: one acts for all, or all take the same way.

At one rank, and for a group of None, nothing is sent.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Group = dist.ProcessGroup
Result = TypeVar("Result")


class FirstRankError(RuntimeError):
    """The first rank failed at what it did for all; there the error itself was raised."""


def on_first(action: Callable[[], Result], group: Group | None) -> Result:
    """Let the group's first rank act while the others wait; all return what it returned (small, and of plain types).

    Raises: what the action raises, and on the other ranks FirstRankError with its text.
    """
    if group is None or dist.get_world_size(group) == 1:
        return action()
    first = dist.get_rank(group) == 0
    outcome, error = [None, None], None
    if first:
        try:
            outcome[0] = action()
        except Exception as raised:
            error, outcome[1] = raised, f"{type(raised).__name__}: {raised}"
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if error:
        raise error
    if outcome[1]:
        raise FirstRankError(f"the first rank of the group could not go on: {outcome[1]}")
    return outcome[0]


def any_rank(flag: bool, group: Group | None, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is up on at least one rank: the same answer on all. device: where the group's tensors travel."""
    if group is None or dist.get_world_size(group) == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=group)
    return bool(raised)
