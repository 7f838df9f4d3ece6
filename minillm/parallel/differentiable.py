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

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Group = dist.ProcessGroup


def copy_to(x: Float[Tensor, "*shape"], group: Group) -> Float[Tensor, "*shape"]:
    """f: x as it is; backward, the sum of the ranks' gradients. Stands before a weight that is split by columns.

    Cost: nothing forward, one all-reduce of x's size backward.
    """
    return x if dist.get_world_size(group) == 1 else _CopyTo.apply(x, group)


def reduce_from(x: Float[Tensor, "*shape"], group: Group) -> Float[Tensor, "*shape"]:
    """g: the sum over ranks; backward, the gradient as it is. Stands behind a weight that is split by rows.

    Cost: one all-reduce of x's size forward, nothing backward.
    """
    return x if dist.get_world_size(group) == 1 else _ReduceFrom.apply(x, group)


def scatter_to(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """This rank's part of x along dim; backward, the parts' gradients together.

    Cost: nothing forward, one all-gather backward.   Raises: ValueError if P does not divide the dimension.
    """
    return x if dist.get_world_size(group) == 1 else _ScatterTo.apply(x, dim, group)


def gather_from(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """The ranks' parts together along dim; backward, this rank's part of the gradient.

    Cost: one all-gather forward, nothing backward.
    """
    return x if dist.get_world_size(group) == 1 else _GatherFrom.apply(x, dim, group)


def gather_to(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """The ranks' parts together along dim; backward, this rank's part of the sum of the ranks' gradients.

    `copy_to` for a stream that is kept in parts.   Cost: one all-gather forward, one reduce-scatter backward.
    """
    return x if dist.get_world_size(group) == 1 else _GatherTo.apply(x, dim, group)


def reduce_scatter_from(x: Float[Tensor, "..."], dim: int, group: Group) -> Float[Tensor, "..."]:
    """This rank's part along dim of the sum over ranks; backward, the parts' gradients together.

    `reduce_from` for a stream that is kept in parts.   Cost: one reduce-scatter forward, one all-gather backward.
    Raises: ValueError if P does not divide the dimension.
    """
    return x if dist.get_world_size(group) == 1 else _ReduceScatterFrom.apply(x, dim, group)


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


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        """Sum the ranks' gradients."""
        return _sum(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        """Pass the gradient on."""
        return grad, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _part(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        """Gather the parts' gradients."""
        return _whole(grad, ctx.dim, ctx.group), None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _whole(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        """Take this rank's part of the gradient."""
        return _part(grad, ctx.dim, ctx.group), None, None


class _GatherTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _whole(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        """Sum the ranks' gradients and take this rank's part."""
        return _part_of_sum(grad, ctx.dim, ctx.group), None, None


class _ReduceScatterFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _part_of_sum(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        """Gather the parts' gradients."""
        return _whole(grad, ctx.dim, ctx.group), None, None
