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

from minillm.parallel.data_parallel import Group, share_gradients


class SharedParameters:
    """Parameters that several stages hold, such as an embedding that is also the head: copies that must stay the same.

    Their gradients are summed over the ranks that hold them. To be made on every rank of the pipeline at once.
    """

    def __init__(self, parameters: Mapping[str, Tensor], group: Group):
        self.group, everyones = group, [[]] * dist.get_world_size(group)
        dist.all_gather_object(everyones, list(parameters), group=group)
        world, holders, self.groups = dist.get_process_group_ranks(group), {}, {}
        for rank, names in enumerate(everyones):
            for name in names:
                holders.setdefault(name, []).append(rank)
        self.first = {name for name in parameters if holders[name][0] == dist.get_rank(group)}
        """Those of this rank that no earlier one holds: over all ranks, each is there once."""
        made = {}
        for name in parameters:
            ranks = tuple(holders[name])
            if len(ranks) > 1:
                if ranks not in made:
                    made[ranks] = dist.new_group([world[rank] for rank in ranks], use_local_synchronization=True)
                self.groups[name] = made[ranks]

    def divide(self, parameters: Mapping[str, Tensor]) -> None:
        """Make gradients that are sums already ready for the next sum."""
        for name, group in self.groups.items():
            share_gradients({name: parameters[name]}, group)

    @torch.no_grad()
    def sum(self, parameters: Mapping[str, Tensor]) -> None:
        """After backward: every holder gets the sum. Cost: one all-reduce of each shared parameter's size."""
        for name, group in self.groups.items():
            if parameters[name].grad is not None:
                dist.all_reduce(parameters[name].grad, group=group)

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
