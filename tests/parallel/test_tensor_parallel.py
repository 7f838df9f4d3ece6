from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from split_families import CONFIGS, FEW, assert_like_dense, batch, random_model, train_split
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F

from minillm.model.sharding import WHOLE, Split, sharding_table
from minillm.nn.attention import Attention
from minillm.nn.feedforward import FeedForward
from minillm.parallel.collectives import Traffic, ring_all_reduce
from minillm.parallel.launch import launch
from minillm.parallel.mesh import build_mesh
from minillm.parallel.rank_error import RankError
from minillm.parallel.tensor_parallel import (RowLinear, apply_tensor_parallel, gather_dense, spans, vocabulary_cross_entropy,
                                              vocabulary_log_z)
from minillm.train.loss import cross_entropy, log_z_squared


def test_spans():
    assert spans(61, 61, 4) == ((0, 16), (16, 31), (31, 46), (46, 61))
    assert [end - first for first, end in spans(61, 61, 4)] == [len(part) for part in torch.arange(61).tensor_split(4)]
    assert spans(24, 4, 2, even=True) == ((0, 12), (12, 24))
    assert spans(12, 2, 4, even=True) == ((0, 6), (0, 6), (6, 12), (6, 12))  # two ranks a KV head
    for numbers in ((24, 4, 3, True), (24, 2, 3), (10, 4, 2)):
        with pytest.raises(ValueError, match=f"{numbers[0]} entries in {numbers[1]} pieces cannot be shared out to {numbers[2]}"):
            spans(*numbers)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_family_trains_as_on_one_rank(ranks):
    steps = dict.fromkeys(CONFIGS if ranks > 1 else FEW, 10)
    assert_like_dense(launch(train_split, ranks, apply_tensor_parallel, steps)[0], steps)


def test_every_family_on_four_ranks(backend):
    steps = {name: 10 if name in FEW else 1 for name in CONFIGS}
    assert_like_dense(launch(train_split, 4, apply_tensor_parallel, steps, backend=backend)[0], steps)


def test_three_ranks():
    steps = {"bloom, 12 heads": 2}
    assert_like_dense(launch(train_split, 3, apply_tensor_parallel, steps)[0], steps)


def train_beside_others(me, steps):
    group = build_mesh(dp=2, tp=4)["tp"].get_group()  # ranks 0 to 3, and 4 to 7
    return train_split(replace(me, rank=dist.get_rank(group), size=4, group=group), apply_tensor_parallel, steps)


def test_two_groups_in_one_world():
    results = launch(train_beside_others, 8, {"llama3": 1})  # with 2 KV heads: each group has pairs of ranks of its own
    assert [result is None for result in results] == [False, True, True, True] * 2
    assert_like_dense(results[0], {"llama3": 1})
    assert_like_dense(results[4], {"llama3": 1})


def there_and_back(me):
    """Every family, cut and gathered: bit for bit; no rank holds more than its share; each holds what it should."""
    for config in CONFIGS.values():
        dense, model = random_model(config), apply_tensor_parallel(random_model(config), me.group, sharding_table(config))
        gathered = gather_dense(model, me.group)
        assert list(gathered) == list(dense.state_dict())
        assert all(torch.equal(gathered[name], tensor) for name, tensor in dense.state_dict().items())
        assert (model.head.weight is model.embed.weight) == config.tied
        for name, part in model.parts.items():
            first, end = part.spans[me.rank]
            mine = model.get_parameter(name)
            assert torch.equal(mine, dense.get_parameter(name).narrow(part.dim, first, end - first))
            assert mine.untyped_storage().nbytes() == mine.nbytes  # the whole one's memory is free
    return True


def test_cut_and_gathered_bit_for_bit():
    assert launch(there_and_back, 2) == [True] * 2 and launch(there_and_back, 4) == [True] * 4


def masked_logits(me):
    """Padding, packed documents and a prefix go through a split model as through a dense one."""
    ids, calls = batch(0)[0], []
    padded = torch.arange(8) >= torch.tensor([[3], [0]])
    for name, options in (("bloom", {"padding_mask": padded}), ("t5's distances", {"padding_mask": padded}),
                          ("chatglm", {"prefix_len": 3}), ("llama3", {"segment_ids": torch.arange(8).repeat(2, 1) // 4})):
        dense, config = random_model(CONFIGS[name]), CONFIGS[name]
        model = apply_tensor_parallel(random_model(config), me.group, sharding_table(config))
        first, end = model.parts["head.weight"].spans[me.rank]
        # float64 rounding
        torch.testing.assert_close(model(ids, **options), dense(ids, **options)[..., first:end], rtol=1e-10, atol=1e-10)
        seen = model(ids, return_attention=True, **options).attention[0]
        whole = dense(ids, return_attention=True, **options).attention[0]
        torch.testing.assert_close(seen, whole.chunk(me.size, 1)[me.rank], rtol=1e-10, atol=1e-10)
        calls.append(name)
    return len(calls)


def test_masks_and_each_ranks_heads():
    assert launch(masked_logits, 2) == [4, 4]


def what_is_sent(me, names):
    """All-reduces and bytes of each family, forward and backward: the ring's bytes, as they are really sent."""
    traffic, calls, counts, real = Traffic(), [], {}, dist.all_reduce

    def counted(x, op=dist.ReduceOp.SUM, group=None):
        calls.append(x.numel())
        x.copy_(ring_all_reduce(x, group, traffic))

    ids, _ = batch(0)
    for name in names:
        model = apply_tensor_parallel(random_model(CONFIGS[name]), me.group, sharding_table(CONFIGS[name]))
        seen = []
        dist.all_reduce = counted
        out = model(ids)
        for action in (lambda: None, lambda: out.sum().backward()):
            action()
            seen.append((list(calls), traffic.bytes))
            calls.clear()
            traffic.bytes = 0
        dist.all_reduce = real
        counts[name] = seen
    return counts


@pytest.mark.parametrize("ranks", [2, 4])
def test_megatrons_count_and_bytes(ranks):
    # no norm inside a region, no KV head on several ranks: the next test has what those add
    plain = [name for name, config in CONFIGS.items() if config.qk_norm == "none" and config.kv_size >= ranks]
    names = list({CONFIGS[name].block: name for name in plain}.values())  # one for each place of the norms
    assert len(names) >= 3
    counts = launch(what_is_sent, ranks, names)
    for name in names:
        stream = 2 * 8 * CONFIGS[name].width  # B·T·C
        for rank in range(ranks):
            for calls, sent in counts[rank][name]:
                # two a layer forward and two backward; one for the embedding forward, one for the head backward
                assert calls == [stream] * (2 * CONFIGS[name].layers + 1)
                assert sent == len(calls) * 2 * (ranks - 1) / ranks * stream * 8


def test_what_copies_and_norms_inside_a_region_add():
    (forward, _), (backward, _) = launch(what_is_sent, 2, ["biases everywhere"])[0]["biases everywhere"]
    config = CONFIGS["biases everywhere"]
    inside = 2 * [config.head_size, config.head_size] + 2 * 2 * [config.head_size * config.width, config.head_size]
    stream = 2 * 8 * config.width
    assert forward == [stream] * 5 and sorted(backward) == sorted([stream] * 5 + inside)  # q_norm, k_norm; k and v with biases


def the_loss(me):
    """Loss and gradient of split logits beside the whole ones, and beside torch's loss_parallel; how often ranks talk."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 6, 60, generator=generator, dtype=torch.float64) * 400  # exp would overflow
    targets = torch.randint(0, 60, (2, 6), generator=generator)
    targets[0, 0], targets[1, 3:] = -100, -100
    targets[0, 1], targets[0, 2] = 0, 59
    dense, mine = whole.clone().requires_grad_(), whole.chunk(me.size, -1)[me.rank].clone().requires_grad_()
    calls, real = [], dist.all_reduce

    def counted(x, *args, **options):
        calls.append(x.numel())
        return real(x, *args, **options)

    dist.all_reduce = counted
    loss = vocabulary_cross_entropy(mine, targets, 60, me.group)
    loss.backward()
    dist.all_reduce = real
    wanted = cross_entropy(dense, targets)
    wanted.backward()
    # float64 rounding of sums of logits of a thousand
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(mine.grad, dense.grad.chunk(me.size, -1)[me.rank], rtol=1e-10, atol=1e-12)
    theirs = whole.chunk(me.size, -1)[me.rank].clone().requires_grad_()
    split = DTensor.from_local(theirs, build_mesh(tp=me.size)["tp"], [Shard(2)])
    with loss_parallel():
        F.cross_entropy(split.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    small = mine.detach() / 400
    torch.testing.assert_close(vocabulary_log_z(small, me.group).square()[targets != -100].sum(),
                               log_z_squared(whole / 400, targets), rtol=1e-12, atol=1e-12)
    nothing = vocabulary_cross_entropy(mine, torch.full_like(targets, -100), 60, me.group)
    assert nothing == 0 and vocabulary_cross_entropy(mine.bfloat16(), targets, 60, me.group).dtype == torch.float32
    return calls


def test_vocabulary_parallel_cross_entropy():
    assert launch(the_loss, 4) == [[12] * 3] * 4  # the largest, the sum and the target's own, each B·T numbers; none backward


def beside_torch(me):
    """minillm's attention and feed-forward layer, cut by our table and by torch's parallelize_module."""
    config = replace(CONFIGS["llama3"], bias=("qkv", "out", "mlp"), ffn_width=52)
    column, row = Split("columns", config.kv_size), Split("rows", config.heads)
    mesh = build_mesh(tp=me.size)["tp"]
    plans = ((Attention(config, 0), {"[qkv].*": column, "out.weight": row, "out.bias": WHOLE},
              {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}),
             (FeedForward(config), {"gate.*": Split("columns", 52), "up.*": Split("columns", 52), "down.weight": Split("rows", 52),
                                    "down.bias": WHOLE},
              {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}))
    for layer, table, plan in plans:
        def build(layer=layer):
            generator = torch.Generator().manual_seed(3)
            copy = type(layer)(config, 0) if isinstance(layer, Attention) else type(layer)(config)
            with torch.no_grad():
                for parameter in copy.parameters():
                    parameter.normal_(generator=generator)
            return copy.double()
        ours, theirs = apply_tensor_parallel(build(), me.group, table), parallelize_module(build(), mesh, plan)
        x = torch.randn(2, 5, config.width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outs = [model(x) for model, x in zip((ours, theirs), inputs)]
        outs = [out[0] if isinstance(out, tuple) else out for out in outs]
        for out in outs:
            out.square().sum().backward()
        # float64: the order of summation
        torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-10)
        grads = gather_dense(ours, me.group, {name: p.grad for name, p in ours.named_parameters()})
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad.full_tensor(), rtol=1e-11, atol=1e-10)
            mine = ours.get_parameter(name)
            assert torch.equal(mine, parameter.to_local() if name in ours.parts else parameter.full_tensor())
    return isinstance(ours.down, RowLinear)


def test_torch_cuts_and_computes_the_same():
    assert launch(beside_torch, 2) == [True] * 2


def mistakes(me, name):
    config = CONFIGS["llama3"]
    if name == "table":
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 2)), me.group, {"1.weight": WHOLE})
    if name == "heads":
        odd = replace(config, heads=3, kv_heads=3, head_dim=8)
        apply_tensor_parallel(random_model(odd), me.group, sharding_table(odd))
    model = apply_tensor_parallel(random_model(config), me.group, sharding_table(config))
    if name == "ids":
        model(torch.tensor([[0, 61]]))
    vocabulary_cross_entropy(model(torch.tensor([[0, 1]])), torch.tensor([[-100, 61]]), 61, me.group)


@pytest.mark.parametrize("name, text", [("table", r"no entry for 0\.weight"), ("heads", "24 entries in 3 pieces cannot be shared out to 2"),
                                        ("ids", "token id 61 is outside the vocabulary of 61"),
                                        ("targets", "target 61 is outside the vocabulary of 61")])
def test_mistakes_are_named(name, text):
    with pytest.raises(RankError, match=text):
        launch(mistakes, 2, name)
