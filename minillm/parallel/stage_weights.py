"""Weights of a model whose layers lie on several ranks: those that more than one stage holds, and all of them together.

An embedding that is also the head is on the first and the last stage, a table of relative positions on all. Their copies start
equal and must stay so: gradients are summed over the holders, and every holder makes the same update.
Source: arXiv:1909.08053 §3, Megatron-LM's embedding group.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from minillm.parallel.data_parallel import Group


class SharedParameters:
    """Parameters that several stages hold, such as an embedding that is also the head: copies that must stay the same.

    Their gradients are summed over the ranks that hold them. To be made on every rank of the pipeline at once.
    """

    def __init__(self, parameters: Mapping[str, Tensor], group: Group):
        self.group, self.rank, everyones = group, dist.get_rank(group), [[]] * dist.get_world_size(group)
        dist.all_gather_object(everyones, list(parameters), group=group)
        holders = {name: [rank for rank, names in enumerate(everyones) if name in names] for name in parameters}
        self.first = {name for name, ranks in holders.items() if ranks[0] == self.rank}
        """Those of this rank that no earlier one holds: over all ranks, each is there once."""
        self.holders = {name: ranks for name, ranks in holders.items() if len(ranks) > 1}

    @torch.no_grad()
    def divide(self, parameters: Mapping[str, Tensor]) -> None:
        """Make gradients that are sums already ready for the next sum."""
        for name, ranks in self.holders.items():
            if parameters[name].grad is not None:
                parameters[name].grad.div_(len(ranks))

    @torch.no_grad()
    def sum(self, parameters: Mapping[str, Tensor]) -> None:
        """After backward: every holder gets the sum, the same bits. Cost: an all-reduce of what all hold; else each holder sends its
        gradient to the others (two of them: as much as an all-reduce), and no group of their own is needed."""
        for name, ranks in self.holders.items():
            if (mine := parameters[name].grad) is None:
                continue
            if len(ranks) == dist.get_world_size(self.group):
                dist.all_reduce(mine, group=self.group)
                continue
            theirs = {rank: torch.empty_like(mine) for rank in ranks if rank != self.rank}
            messages = [dist.P2POp(act, tensor, group=self.group, group_peer=rank) for rank, got in theirs.items()
                        for act, tensor in ((dist.isend, mine), (dist.irecv, got))]
            for work in dist.batch_isend_irecv(messages):
                work.wait()
            mine.copy_(sum((theirs.get(rank, mine) for rank in ranks[1:]), theirs.get(ranks[0], mine)))

    def norm(self, mine: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The norm over all stages, from each rank's of its gradients in `first`."""
        square = mine.double().square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()


@torch.no_grad()
def gather_stages(tensors: Mapping[str, Tensor], group: Group, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of all stages by name, on every rank. device: where the group's tensors travel. Cost: a broadcast of each."""
    everyones: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyones, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, group=group)
    found: dict[str, Tensor] = {}
    for rank, theirs in enumerate(everyones):
        for name, (dtype, shape) in theirs.items():
            if name not in found:
                mine = rank == dist.get_rank(group)
                found[name] = tensors[name].to(device, copy=True).contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(found[name], group_src=rank, group=group)
    return found
