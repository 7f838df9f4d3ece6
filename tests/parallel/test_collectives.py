"""Our collectives against torch's, and what they send against their Cost lines. One launch per world size does it all."""

from math import ceil, log2

import pytest
import torch
import torch.distributed as dist

from minillm.parallel.collectives import (Traffic, all_to_all, broadcast_naive, broadcast_tree, doubling_all_reduce, gather,
                                          reduce, ring_all_gather, ring_all_reduce, ring_reduce_scatter, scatter)
from minillm.parallel.launch import launch
from minillm.parallel.rank_error import RankError

ROWS = (1, 7, 24)  # fewer than the ranks, not a multiple of them, and (mostly) a multiple


def data(rank, rows, device):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(100 * rows + rank), dtype=torch.float64).to(device)


def same(ours, theirs):
    # float64, values of size 1: only the order of summation over at most 8 ranks differs, a few units in the last place
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def counted(collective, *args, **options):
    traffic = Traffic()
    result = collective(*args, **options, traffic=traffic)
    return result, (traffic.messages, traffic.bytes)


def equal_to_torch(me):
    """Asserts values here; returns {(collective, rows): (messages, bytes)}."""
    sent = {}
    for rows in ROWS:
        x, last = data(me.rank, rows, me.device), me.size - 1
        every = [data(rank, rows, me.device) for rank in range(me.size)]
        total = x.clone()
        dist.all_reduce(total)
        from_last = x.clone()
        dist.broadcast(from_last, last)
        for collective in (broadcast_naive, broadcast_tree):
            out, sent[collective.__name__, rows] = counted(collective, x, last, me.group)
            assert torch.equal(out, from_last)
        out, sent["scatter", rows] = counted(scatter, x, last, me.group)
        assert torch.equal(out, every[last].tensor_split(me.size)[me.rank])
        mine = every[0].tensor_split(me.size)[me.rank]
        out, sent["gather", rows] = counted(gather, mine, 0, me.group, rows)
        assert torch.equal(out, every[0]) if me.rank == 0 else out is None
        out, sent["ring_all_gather", rows] = counted(ring_all_gather, mine, me.group, rows)
        assert torch.equal(out, every[0])
        out, sent["reduce", rows] = counted(reduce, x, last, me.group)
        assert (same(out, total) if me.rank == last else out) is None
        out, sent["ring_reduce_scatter", rows] = counted(ring_reduce_scatter, x, me.group)
        same(out, total.tensor_split(me.size)[me.rank])
        for collective in (ring_all_reduce, doubling_all_reduce):
            out, sent[collective.__name__, rows] = counted(collective, x, me.group)
            same(out, total)
            copies = [torch.empty_like(out) for _ in range(me.size)]
            dist.all_gather(copies, out)
            assert all(torch.equal(out, copy) for copy in copies)  # the same bits on every rank
        out, sent["all_to_all", rows] = counted(all_to_all, list(x.tensor_split(me.size)), me.group,
                                                [len(x.tensor_split(me.size)[me.rank])] * me.size)
        assert all(torch.equal(part, every[rank].tensor_split(me.size)[me.rank]) for rank, part in enumerate(out))
        assert torch.equal(x, data(me.rank, rows, me.device))  # nobody writes on the input
    return sent


def costs(rank, size, rows):
    """(messages, bytes) of one rank by the Cost lines, from the sizes alone."""
    row, last = 3 * 8, size - 1
    whole = rows * row
    chunks = [len(chunk) * row for chunk in torch.zeros(rows).tensor_split(size)]
    elements = [8 * len(chunk) for chunk in torch.zeros(3 * rows).tensor_split(size)]  # all-reduce cuts between elements
    right = (rank + 1) % size
    from_source = (rank - last) % size
    children = sum(2 ** k > from_source and from_source + 2 ** k < size for k in range(size))
    power = 2 ** int(log2(size))
    lends, lent = (rank < 2 * (size - power) and rank % 2 == parity for parity in (0, 1))
    swaps = 1 if lends else int(log2(size)) + lent
    return {"broadcast_naive": ((size - 1) * (rank == last), (size - 1) * whole * (rank == last)),
            "broadcast_tree": (children, children * whole),
            "scatter": ((size - 1) * (rank == last), (whole - chunks[last]) * (rank == last)),
            "gather": (int(rank != 0), chunks[rank] * (rank != 0)),
            "reduce": (int(rank != last), whole * (rank != last)),
            "ring_all_gather": (size - 1, whole - chunks[right]),
            "ring_reduce_scatter": (size - 1, whole - chunks[rank]),
            "ring_all_reduce": (2 * (size - 1), 2 * whole - elements[rank] - elements[right]),
            "doubling_all_reduce": (swaps, swaps * whole),
            "all_to_all": (size - 1, whole - chunks[rank])}


@pytest.mark.parametrize("size", range(2, 9))
def test_values_and_costs(size):
    sent = launch(equal_to_torch, size, backend="gloo")
    for rows in ROWS:
        for rank in range(size):
            wanted = costs(rank, size, rows)
            assert {name: sent[rank][name, rows] for name in wanted} == wanted
        messages = [sent[rank]["broadcast_tree", rows][0] for rank in range(size)]
        assert sum(messages) == size - 1 and max(messages) == messages[size - 1] == ceil(log2(size))


def test_the_ring_meets_the_known_bound():
    """2(P-1)/P · N a rank where P divides."""
    sent = launch(equal_to_torch, 4, backend="gloo")
    assert {rank["ring_all_reduce", 24] for rank in sent} == {(6, 2 * 3 * 24 * 3 * 8 // 4)}


def test_on_every_backend(backend):
    assert len(launch(equal_to_torch, 4, backend=backend)) == 4


def on_a_part_of_the_world(me):
    odd = dist.new_group([1, 3])
    whole = torch.arange(4.0) + me.rank
    uneven = all_to_all([torch.full((1 + me.rank,), float(me.rank))] * me.size, me.group, rows=range(1, me.size + 1))
    numbers = ring_all_reduce(torch.tensor(me.rank), me.group)  # integers, without dimensions
    return ring_all_reduce(whole, odd) if me.rank % 2 else None, torch.cat(uneven), numbers


def test_groups_are_passed_in_and_parts_may_differ():
    results = launch(on_a_part_of_the_world, 4)
    assert [None if ours is None else ours.tolist() for ours, _, _ in results] == [None, [4, 6, 8, 10], None, [4, 6, 8, 10]]
    assert all(uneven.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3] for _, uneven, _ in results)
    assert [int(number) for _, _, number in results] == [6] * 4


def test_one_rank_sends_nothing():
    (sent,) = launch(equal_to_torch, 1, backend="gloo")
    assert len(sent) == 10 * len(ROWS) and set(sent.values()) == {(0, 0)}


def test_a_part_of_the_wrong_size():
    with pytest.raises(RankError, match="gives 2 rows; of 7 rows for 2 ranks its chunk has [43]"):
        launch(lambda me: ring_all_gather(torch.zeros(2), me.group, rows=7), 2)
    with pytest.raises(RankError, match="1 parts and 2 numbers of rows for 2 ranks"):
        launch(lambda me: all_to_all([torch.zeros(1)], me.group, rows=[1, 1]), 2)


CALLS = (r"rank 0 called broadcast_tree on float32\[3\] in differs \(test_collectives.py:\d+\); "
         r"rank 1 called ring_all_reduce on float32\[4\] in differs")


def differs(me):
    return ring_all_reduce(torch.ones(3 + me.rank), me.group) if me.rank else broadcast_tree(torch.ones(3), 0, me.group)


def test_checked_mode_names_the_calls_that_do_not_match():
    with pytest.raises(RankError, match=CALLS):
        launch(differs, 2, checked=True)
    assert len(launch(equal_to_torch, 3, checked=True)) == 3


def test_shapes_are_checked_inside_ranks():
    """The suite's import hook must reach the ranks, or their annotations would go unchecked."""
    with pytest.raises(RankError, match="Type-check error"):
        launch(lambda me: ring_all_reduce("three", me.group), 1)
