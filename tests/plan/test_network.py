import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from minillm.config import ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.model.families import gpt2, llama3
from minillm.model.sharding import sharding_table
from minillm.model.transformer import Transformer
from minillm.parallel import collectives
from minillm.parallel.launch import launch
from minillm.parallel.tensor_parallel import apply_tensor_parallel, vocabulary_cross_entropy
from minillm.plan.network import (
    BUS_FACTORS, COSTS, GB, LINKS, Link, Message, bus_bandwidth, chunk_sizes, crossover, data_parallel_all_reduces, find_link,
    fit_link, predict, rounds_of, seconds_of, tensor_parallel_all_reduces, traffic)

LINK = Link(1e-5, 1e9)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_whole_and_in_its_units(name):
    """A slip of a thousand, or of bits and bytes, falls out of these ranges."""
    link = find_link(name)
    assert 1e-6 <= link.alpha <= 2e-5 and 1e9 <= link.bandwidth <= 900e9 and link.source
    assert link.seconds(link.half_size) == pytest.approx(2 * link.alpha)  # float rounding only


def test_links_in_figures_of_their_makers():
    assert [LINKS[f"nvlink-{n}"].bandwidth / GB for n in (3, 4, 5)] == [300, 450, 900]  # half of both directions together
    assert [round(LINKS[f"pcie-{n}"].bandwidth / GB, 1) for n in (4, 5)] == [31.5, 63.0]
    assert [LINKS[f"ethernet-{n}g"].bandwidth * 8 / GB for n in (10, 25, 100, 400)] == [10, 25, 100, 400]


@pytest.mark.parametrize(("name", "near"), [
    ("nvlink", "nvlink-3"), ("NVLINK-4", None), ("infiniband", "infiniband-hdr"), ("ethernet10g", "ethernet-10g")])
def test_an_unknown_link_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"no link is called '{name}'." + (f" Did you mean '{near}'" if near else "")):
        find_link(name)


@pytest.mark.parametrize(("alpha", "bandwidth"), [(-1e-6, 1e9), (0, 0), (0, -1), (math.nan, 1e9)])
def test_what_is_no_link(alpha, bandwidth):
    with pytest.raises(ValueError, match="alpha = "):
        Link(alpha, bandwidth)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("algorithm", COSTS)
def test_closed_forms_are_the_sums_of_the_messages(algorithm, ranks):
    size = 1680 * 16  # a multiple of every number of ranks here and of every power of two below it: all chunks are equal
    rounds = rounds_of(algorithm, size, ranks)
    assert len(rounds) == COSTS[algorithm](ranks)[0]
    assert seconds_of(rounds, LINK) == pytest.approx(predict(algorithm, size, ranks, LINK), abs=1e-15)  # float rounding only


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("algorithm", COSTS)
def test_a_rank_sends_and_receives_one_message_a_round(algorithm, ranks):
    for messages in rounds_of(algorithm, 4 * 23, ranks, item=4):
        assert messages and all(m.source != m.target and m.size % 4 == 0 for m in messages)
        for ends in ([m.source for m in messages], [m.target for m in messages]):
            assert len(set(ends)) == len(ends) and set(ends) <= set(range(ranks))


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("algorithm", [name for name in COSTS if name.endswith("all_reduce")])
def test_no_all_reduce_sends_less_than_the_ring(algorithm, ranks):
    """Patarasuk and Yuan 2009: 2(P-1)/P · n bytes on the busiest rank; the ring sends just that."""
    size = 840 * 8
    sent = traffic(rounds_of(algorithm, size, ranks), ranks).bytes
    assert max(sent) >= 2 * (ranks - 1) * size // ranks
    ring = traffic(rounds_of("ring_all_reduce", size, ranks), ranks)
    assert set(ring.bytes) == {2 * (ranks - 1) * size // ranks} and set(ring.messages) == {2 * (ranks - 1)}


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("algorithm", [
    "ring_all_reduce", "doubling_all_reduce", "halving_all_reduce", "tree_all_reduce", "broadcast_tree", "broadcast_naive", "reduce"])
def test_everybody_gets_what_it_needs(algorithm, ranks):
    """Follow who has heard of whom (broadcasts: the root) through the messages: the targets must hear of all."""
    root = 1
    heard = [{rank} for rank in range(ranks)]
    for messages in rounds_of(algorithm, 64, ranks, root=root if "broadcast" in algorithm or algorithm == "reduce" else 0):
        before = [set(names) for names in heard]
        for message in messages:
            heard[message.target] |= before[message.source]
    if algorithm == "reduce":
        assert heard[root] == set(range(ranks))
    else:
        assert all((root in names) if "broadcast" in algorithm else names == set(range(ranks)) for names in heard)


def test_chunks_that_do_not_divide():
    assert chunk_sizes(4 * 11, 4, 4) == [12, 12, 12, 8] and chunk_sizes(3, 5) == [1, 1, 1, 0, 0]
    assert traffic(rounds_of("ring_all_reduce", 44, 4, 4), 4).bytes == (88 - 24, 88 - 24, 88 - 20, 88 - 20)
    # Halving, by hand: rank 0 sends chunks 2 and 3, then 1; then its sums 0, then 0 and 1.
    assert traffic(rounds_of("halving_all_reduce", 44, 4, 4), 4).bytes == (20 + 12 + 12 + 24, 20 + 12 + 12 + 24, 24 + 8 + 12 + 20, 24 + 12 + 8 + 20)
    assert traffic(rounds_of("doubling_all_reduce", 10, 3), 3).messages == (1, 2, 1)
    assert rounds_of("broadcast_tree", 8, 3, root=2) == [[Message(2, 0, 8)], [Message(2, 1, 8)]]


@pytest.mark.parametrize(("arguments", "words"), [
    (("ring_allreduce", 8, 2), "Did you mean 'ring_all_reduce'"), (("reduce", 8, 0), "ranks = 0"),
    (("reduce", 10, 2, 4), "multiple of item"), (("reduce", 8, 2, 1, 2), "with root 2")])
def test_what_cannot_be_laid_out(arguments, words):
    with pytest.raises(ValueError, match=words):
        rounds_of(*arguments)
    if len(arguments) == 3:
        with pytest.raises(ValueError, match=words):
            predict(*arguments, LINK)


def test_where_ring_and_tree_cross():
    for first in ("tree_all_reduce", "doubling_all_reduce"):
        for ranks in (4, 6, 64, 1000):
            size = crossover(first, "ring_all_reduce", ranks, LINK)
            assert predict(first, size, ranks, LINK) == pytest.approx(predict("ring_all_reduce", size, ranks, LINK))  # rounding
            assert predict(first, size / 2, ranks, LINK) < predict("ring_all_reduce", size / 2, ranks, LINK)
            assert predict(first, size * 2, ranks, LINK) > predict("ring_all_reduce", size * 2, ranks, LINK)
    # By hand for 8 ranks: 2·3 against 14 rounds, 6 against 1.75 times the bytes.
    assert crossover("tree_all_reduce", "ring_all_reduce", 8, LINK) == pytest.approx(8 / 4.25 * 1e4)
    assert crossover("doubling_all_reduce", "ring_all_reduce", 2, LINK) == math.inf  # one round, no more bytes
    assert crossover("broadcast_naive", "broadcast_tree", 8, LINK) == 0  # fewer rounds and fewer bytes: always


def test_halving_needs_the_rings_bytes_in_the_trees_rounds():
    for ranks in (4, 16, 64):
        assert COSTS["halving_all_reduce"](ranks) == (COSTS["tree_all_reduce"](ranks)[0], COSTS["ring_all_reduce"](ranks)[1])


def test_bus_bandwidth_of_a_ring_is_its_links():
    """nccl-tests' factor makes the number comparable: without α, whatever P, it is the link's bandwidth."""
    link = Link(0, 25 * GB)
    for collective, algorithm in (("all_reduce", "ring_all_reduce"), ("reduce_scatter", "ring_reduce_scatter"),
                                  ("all_gather", "ring_all_gather"), ("all_to_all", "all_to_all")):
        for ranks in (2, 8, 100):
            time = predict(algorithm, 10 ** 8, ranks, link)
            assert bus_bandwidth(collective, 10 ** 8, time, ranks) == pytest.approx(25 * GB)  # float rounding only
    assert BUS_FACTORS["all_reduce"](8) == 1.75 and bus_bandwidth("broadcast", 100, 2, 8) == 50
    with pytest.raises(ValueError, match="no bus bandwidth is defined for 'ring_all_reduce'"):
        bus_bandwidth("ring_all_reduce", 1, 1, 2)


def test_a_link_from_times():
    sizes = [10 ** e for e in range(2, 9)]
    exact = fit_link(sizes, [LINK.seconds(n) for n in sizes])
    assert exact.link.alpha == pytest.approx(LINK.alpha) and exact.link.beta == pytest.approx(LINK.beta) and exact.residual < 1e-9
    # Every other time ten percent long, as noise that depends on nothing: both constants stay within that.
    noisy = fit_link(sizes, [LINK.seconds(n) * (1.1 if i % 2 else 1) for i, n in enumerate(sizes)])
    assert 1 <= noisy.link.alpha / LINK.alpha <= 1.1 and 1 <= noisy.link.beta / LINK.beta <= 1.1 and 0.03 < noisy.residual < 0.06
    assert fit_link([100, 200], [1, 4]).link.alpha == 0  # a line through these would start below 0


@pytest.mark.parametrize(("sizes", "seconds", "words"), [
    ([8, 8], [1, 2], "1 different sizes"), ([8], [1], "1 different sizes"), ([8, 16], [1, 0], "the shortest 0 s"),
    ([8, 16], [1], "1 times"), ([8, 16], [2, 1], "do not grow with the size"), ([], [], "0 different sizes")])
def test_times_that_are_no_link(sizes, seconds, words):
    with pytest.raises(ValueError, match=words):
        fit_link(sizes, seconds)


@pytest.mark.parametrize(("ranks", "elements"), [(2, 7), (3, 10), (4, 18)])  # that divide and that do not
def test_predictions_are_what_the_collectives_send(ranks, elements):
    """Exactly: messages and bytes of every rank, against the counters of minillm/parallel/collectives.py."""
    def count(me, elements: int) -> dict[str, tuple[int, int]]:
        """What this rank sends in every collective of collectives.py, on float32 and root 1."""
        x, counted = torch.ones(elements), {}
        chunk = x.tensor_split(me.size)[me.rank]
        calls = {
            "broadcast_naive": lambda t: collectives.broadcast_naive(x, 1, me.group, t),
            "broadcast_tree": lambda t: collectives.broadcast_tree(x, 1, me.group, t),
            "reduce": lambda t: collectives.reduce(x, 1, me.group, t),
            "scatter": lambda t: collectives.scatter(x, 1, me.group, t),
            "gather": lambda t: collectives.gather(chunk, 1, me.group, elements, t),
            "ring_reduce_scatter": lambda t: collectives.ring_reduce_scatter(x, me.group, t),
            "ring_all_gather": lambda t: collectives.ring_all_gather(chunk, me.group, elements, t),
            "ring_all_reduce": lambda t: collectives.ring_all_reduce(x, me.group, t),
            "doubling_all_reduce": lambda t: collectives.doubling_all_reduce(x, me.group, t),
            "all_to_all": lambda t: collectives.all_to_all(x.tensor_split(me.size), me.group, [len(chunk)] * me.size, t),
        }
        for name, call in calls.items():
            counter = collectives.Traffic()
            call(counter)
            counted[name] = (counter.messages, counter.bytes)
        return counted

    counted = launch(count, ranks, elements)
    for name in counted[0]:
        sent = traffic(rounds_of(name, 4 * elements, ranks, item=4, root=1), ranks)
        assert [rank[name] for rank in counted] == list(zip(sent.messages, sent.bytes)), name
    assert set(COSTS) - set(counted[0]) == {"halving_all_reduce", "tree_all_reduce"}  # only planned: two of the above make a tree


def recorded(step):
    """Bytes of every all-reduce of torch that a call makes, with the number of ranks that take part, in order."""
    real, sizes = dist.all_reduce, []

    def recording(tensor, *args, group, **options):
        sizes.append((dist.get_world_size(group), tensor.numel() * tensor.element_size()))
        return real(tensor, *args, group=group, **options)
    dist.all_reduce = recording
    try:
        step()
    finally:
        dist.all_reduce = real
    return sizes


def all_reduces_of_a_step(me, config, dtype):
    """Bytes of every all-reduce of one forward and backward, in order."""
    model, ids = apply_tensor_parallel(Transformer(config).to(dtype), me.group, sharding_table(config)), torch.arange(14).view(2, 7)
    found = recorded(lambda: vocabulary_cross_entropy(model(ids), ids, config.vocab_size, me.group).backward())
    return [size for _, size in found]


@pytest.mark.parametrize("family", [gpt2, llama3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_all_reduce_of_a_tensor_parallel_step_is_foreseen(family, dtype):
    config = replace(family, vocab_size=61, layers=3, width=32, heads=4, kv_heads=2, ffn_width=50, context=8)
    planned = tensor_parallel_all_reduces(config, 14, dtype.itemsize)
    assert len(planned) == 4 * 3 + 2 + 3
    for counted in launch(all_reduces_of_a_step, 2, config, dtype):
        assert sorted(counted) == sorted(planned)
    assert len(tensor_parallel_all_reduces(config, 14, recompute=True)) == len(planned) + 2 * 3


SMALL = dict(vocab_size=60, layers=3, width=32, heads=4, ffn_width=48, context=8)


def all_reduces_of_the_engine(me, config, parallel):
    """The same of an engine's step with two microbatches: on tensor ranks, and on data ranks; and what this rank's ring sends."""
    engine = Engine(config, TrainConfig(batch_size=8, microbatch_size=4 // parallel.dp, device="cpu"), parallel)
    share = Batch(torch.arange(64).view(8, 8) % 60, torch.arange(64).view(8, 8) % 60).part(engine.rank, engine.ranks)
    found = recorded(lambda: (engine.forward_backward(share), engine.step()))
    counter = collectives.Traffic()
    for _, size in found if parallel.tp == 1 else ():
        collectives.ring_all_reduce(torch.empty(size // 4), me.group, counter)
    return found, [w.numel() for w in engine.weights.values()], counter.bytes


@pytest.mark.parametrize("degrees", [dict(dp=2), dict(dp=4), dict(dp=4, tp=2)], ids=str)
def test_every_all_reduce_of_the_engines_step_is_foreseen(degrees):
    """On 2, 4 and 8 ranks, in bytes and in messages' bytes on the wire."""
    parallel, config = ParallelConfig(**degrees, bucket_mb=0.02), replace(llama3, **SMALL, kv_heads=2)
    for rank, (counted, sizes, sent) in enumerate(launch(all_reduces_of_the_engine, parallel.world_size, config, parallel,
                                                          backend="gloo")):
        data = data_parallel_all_reduces(sizes, bucket_bytes=int(0.02 * 2 ** 20))
        assert len(data) > 4 and sum(data) == 4 * sum(sizes) + 12
        tensor = tensor_parallel_all_reduces(config, 2 * 4 // parallel.dp * 8, 4) if parallel.tp > 1 else []
        passes = 2 * [size // 2 for size in tensor]  # two microbatches
        assert sorted(counted) == sorted([(parallel.dp, size) for size in data] + [(parallel.tp, size) for size in passes])
        if parallel.tp == 1:
            rounds = sum((rounds_of("ring_all_reduce", size, parallel.dp, 4) for size in data), [])
            assert sent == traffic(rounds, parallel.dp).bytes[rank]
