"""Tensor parallelism: every rank holds a part of every matrix and works on every token; the results are the whole model's.

A region is a module that begins with matrices split by columns and ends with one split by rows: attention, with some of
the heads, or the feed-forward layer, with some of the hidden units. A column-split layer is nn.Linear itself with fewer
outputs. `copy_to` (f) stands once at the region's door, so that q, k and v share one all-reduce backward; `reduce_from` (g)
stands behind the rows, and the bias is added to their sum, once. The embedding and the head are split by token, and
`vocabulary_cross_entropy` never brings the logits together.
A model is built dense, from the same seed on every rank, and cut here by a table (minillm/model/sharding.py); with torch,
parallelize_module does this. Positions need nothing: each head brings its own, and learned ones stay whole.
Cost: a block's forward makes 2 all-reduces of B·T·C elements, its backward 2, Megatron's count; the embedding adds 1 forward,
the head 1 backward, the loss 3 of B·T. By the ring an all-reduce of N bytes sends 2(P-1)/P · N. Norms over one head, and KV
heads that several ranks hold, add a backward all-reduce of their own size each.
Source: arXiv:1909.08053 §3. Differs from Megatron-LM: it cuts weights where they are made, pads the vocabulary, and sums the
gradients of parameters that ranks share once a step, not in each backward.
Left out: dropout, which needs other random numbers on each rank inside a region (the models here have none); caches for
decoding; optimizers that look at a whole matrix (Muon, Adafactor): a rank's part is not one.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.parallel.differentiable import copy_to, reduce_from
from minillm.train.loss import IGNORED

Group = dist.ProcessGroup
Table = Mapping[str, tuple[str, int, bool]]


class Part(NamedTuple):
    """Which entries of a split parameter each rank of the group holds."""

    how: str
    dim: int
    size: int
    """Entries of the whole parameter along dim."""
    spans: tuple[tuple[int, int], ...]
    """First and end entry, for each rank."""


def spans(size: int, pieces: int, ranks: int, even: bool = False) -> tuple[tuple[int, int], ...]:
    """First and end entry of each rank's part of `size` entries, in whole pieces: the first ranks take one more.

    With fewer pieces than ranks, neighbours hold the same one.
    Raises: ValueError if there are no equal pieces, or ranks that would hold unequal numbers of what must be even.
    """
    if size % pieces or (pieces < ranks and ranks % pieces) or (even and pieces > ranks and pieces % ranks):
        raise ValueError(f"{size} entries in {pieces} pieces cannot be shared out to {ranks} ranks: one number must be a "
                         f"multiple of the other.")
    unit = size // pieces
    if pieces < ranks:
        return tuple((piece * unit, (piece + 1) * unit) for piece in (rank * pieces // ranks for rank in range(ranks)))
    least, more = divmod(pieces, ranks)
    ends = [(rank * least + min(rank, more)) * unit for rank in range(ranks + 1)]
    return tuple(zip(ends, ends[1:]))


class RowLinear(nn.Module):
    """A linear layer with some of the inputs: the ranks' products are summed by `leave`, then the bias is added, once.

    Shapes: x (..., in_local) -> (..., out).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, leave: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.bias, self.leave = weight, bias, leave

    def forward(self, x: Float[Tensor, "*batch in_local"]) -> Float[Tensor, "... out"]:
        total = self.leave(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias


class VocabularyEmbedding(nn.Module):
    """A table with some of the tokens' rows: other tokens get zeros, and the sum over ranks finds each row on its owner.

    Raises: IndexError for an id that no rank has.
    """

    def __init__(self, weight: nn.Parameter, first: int, vocab_size: int, leave: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.first, self.vocab_size, self.leave = weight, first, vocab_size, leave

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B _ C"]:
        if ((ids < 0) | (ids >= self.vocab_size)).any():
            raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())}: the vocabulary has {self.vocab_size} tokens.")
        rows = ids - self.first
        mine = (rows >= 0) & (rows < len(self.weight))
        found = F.embedding(rows.where(mine, 0), self.weight)
        return self.leave(found.masked_fill(~mine[..., None], 0.0))


def vocabulary_log_z(logits_local: Float[Tensor, "B T V_local"], group: Group) -> Float[Tensor, "B T"]:
    """ln of the softmax's denominator over the whole vocabulary, on every rank; its square is the z-loss.

    The largest logit of all ranks is taken out before exp, so that nothing overflows. It cancels, and needs no gradient.
    Cost: 2 all-reduces of B·T numbers forward, none backward.
    """
    wide = logits_local.to(torch.promote_types(logits_local.dtype, torch.float32))
    largest = wide.detach().amax(-1)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return reduce_from((wide - largest[..., None]).exp().sum(-1), group).log() + largest


def vocabulary_cross_entropy(logits_local: Float[Tensor, "B T V_local"], targets: Int[Tensor, "B T"], vocab_size: int,
                             group: Group) -> Float[Tensor, ""]:
    """`cross_entropy` of logits that are split by token: the sum over the targets of -ln p, -100 left out, on every rank.

    The target's own logit is known to one rank; the others add 0.
    Cost: 3 all-reduces of B·T numbers in float32 or wider, instead of an all-gather of B·T·V.
    Raises: ValueError for a target outside the vocabulary.
    """
    counted = targets != IGNORED
    if (counted & ((targets < 0) | (targets >= vocab_size))).any():
        bad = targets[counted & ((targets < 0) | (targets >= vocab_size))][0]
        raise ValueError(f"target {int(bad)} is outside the vocabulary of {vocab_size} tokens (0 to {vocab_size - 1}).")
    first, end = spans(vocab_size, vocab_size, dist.get_world_size(group))[dist.get_rank(group)]
    mine = (targets >= first) & (targets < end)
    own = logits_local.gather(-1, (targets - first).where(mine, 0)[..., None])[..., 0]
    own = own.to(torch.promote_types(own.dtype, torch.float32)).masked_fill(~mine, 0.0)
    return (vocabulary_log_z(logits_local, group) - reduce_from(own, group))[counted].sum()


def apply_tensor_parallel(model: nn.Module, group: Group, table: Table) -> nn.Module:
    """Cut a dense model, the same on every rank, to this rank's part, in place; afterwards its logits are split by token.

    table: pattern of parameter names -> (columns, rows, vocabulary or whole; pieces; even), the first that matches counts.
    A module that holds column-split layers must hand its input to them, and its output must come from row-split ones.
    Cost: one rank's memory holds the dense model until it is cut.
    Raises: ValueError for a parameter that the table does not cover, or pieces that the ranks cannot share.
    """
    if dist.get_world_size(group) == 1:
        return model
    for region in split_model(model, group, table, partial(copy_to, group=group), partial(reduce_from, group=group)):
        behind = {id(layer.bias) for layer in region.modules() if isinstance(layer, RowLinear)}
        for name, parameter in whole_parameters(region, model):
            if id(parameter) not in behind:  # each rank's heads have their own share in the gradient of a norm over one head
                sum_gradient(parameter, group)
    return model


def split_model(model: nn.Module, group: Group, table: Table, enter: Callable, leave: Callable) -> list[nn.Module]:
    """Cut the weights and put `enter` at each region's door and `leave` behind its rows; returns the regions.

    Afterwards model.parts says where each split parameter lies in the whole one.
    """
    model.parts = _cut(model, table, dist.get_rank(group), dist.get_world_size(group))
    regions = {}
    for name, layer in list(model.named_modules()):
        part = model.parts.get(f"{name}.weight")
        if part is None:
            continue
        parent, _, own = name.rpartition(".")
        if part.how == "rows":
            model.set_submodule(name, RowLinear(layer.weight, layer.bias, leave))
        elif part.how == "vocabulary" and isinstance(layer, nn.Embedding):
            model.set_submodule(name, VocabularyEmbedding(layer.weight, part.spans[dist.get_rank(group)][0], part.size, leave))
        elif isinstance(layer, nn.Linear):
            layer.out_features = len(layer.weight)
            region = layer if part.how == "vocabulary" else model.get_submodule(parent)
            regions[id(region)] = region
    for region in regions.values():
        region.register_forward_pre_hook(lambda module, args: (enter(args[0]), *args[1:]))
    _sum_over_copies(model, group)
    return list(regions.values())


def whole_parameters(module: nn.Module, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those of a module's trainable parameters that every rank of the split model holds whole."""
    split = {id(model.get_parameter(name)) for name in model.parts}
    return [(name, p) for name, p in module.named_parameters() if id(p) not in split and p.requires_grad]


def sum_gradient(parameter: nn.Parameter, group: Group) -> None:
    """In every backward, sum this parameter's gradient over the ranks, before it is added to .grad.

    Cost: one all-reduce of the parameter's size in each backward.
    """
    def total(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return grad
    parameter.register_hook(total)


@torch.no_grad()
def gather_dense(model: nn.Module, group: Group, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The dense model's state_dict, on every rank, bit for bit.

    tensors: others of the parameters' names and shapes to bring together: gradients, or an optimizer's averages.
    Cost: one all-gather of each split tensor.
    """
    parts, dense = getattr(model, "parts", {}), {}
    for name, mine in (model.state_dict() if tensors is None else tensors).items():
        part = parts.get(name)
        if part is None:
            dense[name] = mine.clone()
            continue
        shapes = [list(mine.shape), list(mine.shape)]  # of the padded parts (gloo wants equal ones), and of the whole
        shapes[0][part.dim], shapes[1][part.dim] = max(end - first for first, end in part.spans), part.size
        padded, dense[name] = mine.new_zeros(shapes[0]), mine.new_empty(shapes[1])
        padded.narrow(part.dim, 0, mine.shape[part.dim]).copy_(mine)
        pieces = [torch.empty_like(padded) for _ in part.spans]
        dist.all_gather(pieces, padded, group=group)
        for piece, (first, end) in zip(pieces, part.spans, strict=True):
            dense[name].narrow(part.dim, first, end - first).copy_(piece.narrow(part.dim, 0, end - first))
    return dense


def part_of(model: nn.Module, group: Group, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each tensor that has the name and the dense shape of a parameter: `gather_dense` backwards."""
    parts, mine = getattr(model, "parts", {}), {}
    for name, whole in dense.items():
        first, end = parts[name].spans[dist.get_rank(group)] if name in parts else (0, 0)
        mine[name] = whole.narrow(parts[name].dim, first, end - first) if name in parts else whole
    return mine


@torch.no_grad()
def global_norm(model: nn.Module, group: Group | None, parameters: Mapping[str, Tensor] | None = None) -> Float[Tensor, ""]:
    """The norm of all gradients as in the dense model: split ones of all ranks, each copy once, and whole ones once.

    parameters: others of the same names that hold the gradients (master weights), or some of them.   group: None if none is split.
    Cost: one all-reduce of one number.
    """
    parts, split, whole = getattr(model, "parts", {}), [], []
    for name, parameter in (parameters or dict(model.named_parameters())).items():
        if parameter.grad is None:
            continue
        square = parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32)).square().sum()
        if name in parts:
            held = parts[name].spans
            split.append(square / held.count(held[dist.get_rank(group)]))
        else:
            whole.append(square)
    total = sum(split, torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device))
    if split:
        dist.all_reduce(total, group=group)
    return sum(whole, total).sqrt()


def _cut(model: nn.Module, table: Table, rank: int, ranks: int) -> dict[str, Part]:
    """Replace every parameter that the table splits by this rank's part; tied ones stay tied."""
    parts, cut = {}, {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, whole in named.items():
        how, pieces, even = split_of(name, table)
        if how == "whole":
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        dim = 1 if how == "rows" or (how == "columns" and isinstance(module, nn.Embedding)) else 0
        parts[name] = Part(how, dim, whole.shape[dim], spans(whole.shape[dim], pieces, ranks, even))
        first, end = parts[name].spans[rank]
        if id(whole) not in cut:  # a copy, so that the whole one's memory is given back
            mine = whole.detach().narrow(dim, first, end - first).clone(memory_format=torch.contiguous_format)
            cut[id(whole)] = nn.Parameter(mine, requires_grad=whole.requires_grad)
        setattr(module, leaf, cut[id(whole)])
    for name, (_, pieces, even) in table.items():  # no parameter, but a range of heads that the model keeps
        if isinstance(getattr(model, name, None), slice):
            setattr(model, name, slice(*spans(pieces, pieces, ranks, even)[rank]))
    return parts


def split_of(name: str, table: Table) -> tuple[str, int, bool]:
    """A parameter's entry: of the first pattern that matches. Raises: ValueError if none does."""
    for pattern, split in table.items():
        if fnmatchcase(name, pattern):
            return split
    raise ValueError(f"the sharding table has no entry for {name}: add one, such as {name!r}: Split(\"whole\").")


def _sum_over_copies(model: nn.Module, group: Group) -> None:
    """Where several ranks hold the same piece (KV heads, when there are fewer than ranks), sum its gradient over them."""
    ranks, rank, groups = dist.get_process_group_ranks(group), dist.get_rank(group), {}
    for name, part in model.parts.items():
        members = tuple(ranks[other] for other, span in enumerate(part.spans) if span == part.spans[rank])
        parameter = model.get_parameter(name)
        if len(members) > 1 and parameter.requires_grad:
            if members not in groups:
                everybody = len(members) == len(ranks)
                groups[members] = group if everybody else dist.new_group(members, use_local_synchronization=True)
            sum_gradient(parameter, groups[members])
