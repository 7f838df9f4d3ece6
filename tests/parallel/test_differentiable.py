import pytest
import torch
import torch.distributed as dist
from torch.autograd import gradcheck

from minillm.parallel.differentiable import copy_to, gather_from, gather_to, reduce_from, reduce_scatter_from, scatter_to
from minillm.parallel.launch import launch
from minillm.parallel.rank_error import RankError


def weights():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 8), (8, 3), (2, 5)))


def split_mlp(me):
    """Megatron's MLP, columns then rows, beside the whole one: output and gradients, of the input and of this rank's part."""
    first, second, x = (tensor.to(me.device) for tensor in weights())
    whole = [tensor.clone().requires_grad_() for tensor in (x, first, second)]
    dense = torch.tanh(whole[0] @ whole[1]) @ whole[2]
    dense.square().sum().backward()
    mine = [x.clone().requires_grad_(), first.chunk(me.size, 1)[me.rank].clone().requires_grad_(),
            second.chunk(me.size, 0)[me.rank].clone().requires_grad_()]
    out = reduce_from(torch.tanh(copy_to(mine[0], me.group) @ mine[1]) @ mine[2], me.group)
    out.square().sum().backward()
    wanted = [whole[0].grad, whole[1].grad.chunk(me.size, 1)[me.rank], whole[2].grad.chunk(me.size, 0)[me.rank]]
    # float64: only the order of summation over ranks differs
    for ours, theirs in zip([out, *(tensor.grad for tensor in mine)], [dense, *wanted], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    return True


def checked_by_differences(me):
    """Every rank nudges the same entry at the same time, so a function from whole to whole can be checked numerically."""
    first, second, x = (tensor.to(me.device) for tensor in weights())
    columns, rows = first.chunk(me.size, 1)[me.rank], second.chunk(me.size, 0)[me.rank]
    f_then_g = lambda x: reduce_from(torch.tanh(copy_to(x, me.group) @ columns) @ rows, me.group)
    there_and_back = [lambda x, dim=dim: gather_from(scatter_to(x, dim, me.group).sin() * 2, dim, me.group) for dim in (0, -1)]
    in_parts = lambda x: gather_from(reduce_scatter_from(torch.tanh(gather_to(scatter_to(x, 0, me.group), 0, me.group) @ columns)
                                                         @ rows, 0, me.group), 0, me.group)
    x = x[:, :4].repeat(2, 1)  # 4 by 4
    wide = torch.cat([x, x[:, :1]], 1)
    torch.testing.assert_close(in_parts(wide), f_then_g(wide), rtol=1e-12, atol=1e-12)  # the order of summation
    checks = [gradcheck(function, wide.clone().requires_grad_()) for function in (f_then_g, in_parts)]
    return checks + [gradcheck(function, x.clone().requires_grad_()) for function in there_and_back]


def test_gradients_of_a_split_mlp_are_the_whole_ones(backend):
    assert launch(split_mlp, 4, backend=backend) == [True] * 4


def test_gradients_by_differences(backend):
    assert launch(checked_by_differences, 4, backend=backend) == [[True] * 4] * 4
    assert launch(checked_by_differences, 2) == [[True] * 4] * 2


def what_is_called(me):
    """The collectives that each of the six makes, forward and backward."""
    calls = []

    def recording(name, real):
        def record(*args, **options):
            calls.append(name)
            return real(*args, **options)
        return record

    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        setattr(dist, name, recording(name.replace("_", "-"), getattr(dist, name)))
    x = torch.ones(2, 2, requires_grad=True)
    counts = []
    for function, *dim in ((copy_to,), (reduce_from,), (scatter_to, 0), (gather_from, 0), (gather_to, 0), (reduce_scatter_from, 0)):
        out = function(x, *dim, me.group)
        forward, calls[:] = list(calls), []
        out.sum().backward()
        counts.append((forward, list(calls)))
        calls.clear()
    return counts


def test_each_of_a_pair_sends_once():
    assert launch(what_is_called, 2)[0] == [([], ["all-reduce"]), (["all-reduce"], []), ([], ["all-gather"]), (["all-gather"], []),
                                            (["all-gather"], ["reduce-scatter"]), (["reduce-scatter"], ["all-gather"])]


def test_one_rank_returns_its_input():
    def same(me):
        x = torch.ones(3, 3)
        return [function(x, *dim, me.group) is x for function, *dim in
                ((copy_to,), (reduce_from,), (scatter_to, 0), (gather_from, 1), (gather_to, 1), (reduce_scatter_from, 0))]
    assert launch(same, 1) == [[True] * 6]


def test_a_dimension_that_does_not_divide():
    with pytest.raises(RankError, match=r"dimension 1 of \(4, 5\) has 5 entries, which 2 ranks cannot share"):
        launch(lambda me: scatter_to(torch.zeros(4, 5), 1, me.group), 2)
