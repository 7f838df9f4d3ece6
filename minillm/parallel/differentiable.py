"""Collectives with gradients: those that tensor and sequence parallelism are built of, as conjugate pairs.

What one does forward, its partner does backward: `copy_to` (Megatron's f: nothing, then a sum) and `reduce_from` (its g:
a sum, then nothing), `scatter_to` (take a part, then gather) and `gather_from` (gather, then take a part), `gather_to`
(gather, then sum and take a part) and `reduce_scatter_from` (sum and take a part, then gather).
All assume that what is whole outside the split weights is the same on every rank of the group, values and gradients; between
`copy_to` or `gather_to` and `reduce_from` or `reduce_scatter_from`, gradients are each rank's own share of a sum.
torch's own collectives do the sending. Costs are with N the bytes of the whole tensor: an all-reduce sends 2(P-1)/P · N
bytes per rank by the ring, an all-gather or a reduce-scatter half of that.
Sources: arXiv:1909.08053 §3 (the first two), arXiv:2205.05198 §4.2 (the last two). Differs from collectives.py: those are
for reading, without gradients.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Group = dist.ProcessGroup


def copy_to(x: Float[Tensor, "*shape"], group: Group) -> Float[Tensor, "*shape"]:
    """f: x as it is; backward, the sum of the ranks' gradients. Stands before a weight that is split by columns.

    Cost: nothing forward, one all-reduce of x's size backward.
    """
    return _conjugate(x, group, _same, _sum)


def reduce_from(x: Float[Tensor, "*shape"], group: Group) -> Float[Tensor, "*shape"]:
    """g: the sum over ranks; backward, the gradient as it is. Stands behind a weight that is split by rows.

    Cost: one all-reduce of x's size forward, nothing backward.
    """
    return _conjugate(x, group, _sum, _same)


def scatter_to(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """This rank's part of x along dim; backward, the parts' gradients together.

    Cost: nothing forward, one all-gather backward.   Raises: ValueError if P does not divide the dimension.
    """
    return _conjugate(x, group, partial(_part, dim=dim), partial(_whole, dim=dim))


def gather_from(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """The ranks' parts together along dim; backward, this rank's part of the gradient.

    Cost: one all-gather forward, nothing backward.
    """
    return _conjugate(x, group, partial(_whole, dim=dim), partial(_part, dim=dim))


def gather_to(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """The ranks' parts together along dim; backward, this rank's part of the sum of the ranks' gradients.

    `copy_to` for a stream that is kept in parts.   Cost: one all-gather forward, one reduce-scatter backward.
    """
    return _conjugate(x, group, partial(_whole, dim=dim), partial(_part_of_sum, dim=dim))


def reduce_scatter_from(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """This rank's part along dim of the sum over ranks; backward, the parts' gradients together.

    `reduce_from` for a stream that is kept in parts.   Cost: one reduce-scatter forward, one all-gather backward.
    Raises: ValueError if P does not divide the dimension.
    """
    return _conjugate(x, group, partial(_part_of_sum, dim=dim), partial(_whole, dim=dim))


def _conjugate(x: Tensor, group: Group, there: Callable, back: Callable) -> Tensor:
    """`there` forward, `back` for the gradient; at one rank x itself."""
    if dist.get_world_size(group) == 1:
        return x
    return _Conjugate.apply(x, partial(there, group=group), partial(back, group=group))


class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        """Go the partner's way."""
        return ctx.back(grad), None, None


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _parts(x: Tensor, dim: int, group: Group) -> tuple[Tensor, ...]:
    size = dist.get_world_size(group)
    if x.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} has {x.shape[dim]} entries, which {size} ranks cannot share: "
                         f"it must be a multiple of {size}.")
    return x.chunk(size, dim)


def _part(x: Tensor, dim: int, group: Group) -> Tensor:
    return _parts(x, dim, group)[dist.get_rank(group)].contiguous()


def _part_of_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = [part.contiguous() for part in _parts(x, dim, group)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out


def _whole(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)
