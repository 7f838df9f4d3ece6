"""Sequence parallelism: tensor_parallel, and between its regions each rank keeps only its share of the tokens too.

In tensor_parallel the stream, the norms and what they save for backward are the same on every rank. Here a rank holds T/P of
the tokens there: at a region's door the tokens are gathered (backward: reduce-scattered), behind its rows they are
reduce-scattered (backward: gathered). An all-reduce is a reduce-scatter and an all-gather, so the bytes are the same and
the stream takes 1/P of the memory. What is whole on every rank (norms, learned positions, biases behind rows) now sees
some of the tokens, and its gradient is summed over the ranks.
Cost: a block's forward makes 2 all-gathers and 2 reduce-scatters of B·T·C elements, each (P-1)/P · N bytes, its backward as
many; one all-reduce for the gradient of each whole parameter.
Source: arXiv:2205.05198 §4.2. Left out: gathering a region's input again for backward instead of keeping it, which
saves a whole B·T·C per region for one more all-gather.
"""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import nn

from minillm.parallel.differentiable import gather_to, reduce_scatter_from
from minillm.parallel.tensor_parallel import Group, Table, split_model, sum_gradient, whole_parameters


def apply_sequence_parallel(model: nn.Module, group: Group, table: Table, places: Sequence[str] = ("positions",)) -> nn.Module:
    """`apply_tensor_parallel`, with the stream (B, T, C) split along T; ids, masks and logits are as there.

    places: modules that turn positions (rows, T) to what is added to the stream; they get those of this rank's tokens.
    Raises: as apply_tensor_parallel; the model's call raises ValueError if P does not divide T.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return model
    split_model(model, group, table, partial(gather_to, dim=1, group=group), partial(reduce_scatter_from, dim=1, group=group))
    for name in places:
        if isinstance(getattr(model, name, None), nn.Module):
            getattr(model, name).register_forward_pre_hook(lambda module, args: (args[0].chunk(size, 1)[rank],))
    for _, parameter in whole_parameters(model, model):
        sum_gradient(parameter, group)
    return model
