import pytest
import torch
import torch.distributed as dist
from split_families import CONFIGS, FEW, assert_like_dense, batch, random_model, train_split

from minillm.model.sharding import sharding_table
from minillm.parallel.collectives import Traffic, ring_all_gather, ring_all_reduce, ring_reduce_scatter
from minillm.parallel.launch import launch
from minillm.parallel.rank_error import RankError
from minillm.parallel.sequence_parallel import apply_sequence_parallel
from minillm.parallel.tensor_parallel import apply_tensor_parallel, whole_parameters


def test_every_family_trains_as_on_one_rank():
    steps = {name: 10 if name in FEW[:2] else 1 for name in CONFIGS}
    assert_like_dense(launch(train_split, 2, apply_sequence_parallel, steps)[0], steps)


def test_four_ranks(backend):
    steps = dict.fromkeys([*FEW, "waves", "t5's distances"], 1)
    assert_like_dense(launch(train_split, 4, apply_sequence_parallel, steps, backend=backend)[0], steps)


def what_is_sent(me, apply, name):
    """Which collectives a model calls, on how many elements of the whole, and the ring's bytes: forward and backward."""
    traffic, calls = Traffic(), []
    model = apply(random_model(CONFIGS[name]), me.group, sharding_table(CONFIGS[name]))

    def all_reduce(x, group):
        calls.append(("all-reduce", x.numel()))
        x.copy_(ring_all_reduce(x, group, traffic))

    def all_gather(parts, x, group):
        calls.append(("all-gather", me.size * x.numel()))
        for part, chunk in zip(parts, ring_all_gather(x[None], group, traffic=traffic), strict=True):
            part.copy_(chunk)

    def reduce_scatter(out, parts, group):
        calls.append(("reduce-scatter", me.size * out.numel()))
        out.copy_(ring_reduce_scatter(torch.stack(parts), group, traffic)[0])

    dist.all_reduce, dist.all_gather, dist.reduce_scatter = all_reduce, all_gather, reduce_scatter
    out, seen = model(batch(0)[0]), []
    for action in (lambda: None, lambda: out.sum().backward()):
        action()
        seen.append((list(calls), traffic.bytes))
        calls.clear()
        traffic.bytes = 0
    return seen, [parameter.numel() for _, parameter in whole_parameters(model, model)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_bytes_as_without(ranks):
    name = "gpt2"
    stream, layers = 2 * 8 * CONFIGS[name].width, CONFIGS[name].layers
    (tensor, _), (sequence, whole) = (launch(what_is_sent, ranks, apply, name)[0] for apply in
                                      (apply_tensor_parallel, apply_sequence_parallel))
    pair = [("all-gather", stream), ("reduce-scatter", stream)]
    (forward, sent), (backward, sent_back) = sequence
    assert forward == [pair[1]] + pair * 2 * layers + [pair[0]] and sent == tensor[0][1]
    assert [call for call in backward if call[0] != "all-reduce"] == [pair[1]] + pair * 2 * layers + [pair[0]]
    shared = [size for kind, size in backward if kind == "all-reduce"]
    assert sorted(shared) == sorted(whole)  # norms, positions, biases behind rows
    assert sent_back == tensor[1][1] + sum(2 * (ranks - 1) / ranks * size * 8 for size in whole)  # widths divide by 4


def saved_bytes(me, apply):
    """Bytes of activations kept for backward."""
    model = apply(random_model(CONFIGS["gpt2"]), me.group, sharding_table(CONFIGS["gpt2"]))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(batch(0)[0])
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_stream_takes_its_share_of_memory(ranks):
    tensor, sequence = (launch(saved_bytes, ranks, apply)[0] for apply in (apply_tensor_parallel, apply_sequence_parallel))
    tokens, norms = 2 * 8, 2 * CONFIGS["gpt2"].layers + 1
    outside = norms * (tokens * CONFIGS["gpt2"].width + 2 * tokens) * 8  # each norm keeps its input, a mean and a deviation
    assert tensor - sequence == outside * (ranks - 1) / ranks


def test_tokens_that_do_not_divide():
    def short(me):
        apply_sequence_parallel(random_model(CONFIGS["gpt2"]), me.group, sharding_table(CONFIGS["gpt2"]))(batch(0)[0][:, :7])
    with pytest.raises(RankError, match=r"dimension 1 of \(2, 7, 32\) has 7 entries, which 2 ranks cannot share"):
        launch(short, 2)
