"""Three ways to sum gradients, against the whole batch in one process and torch's DDP. One launch per number of ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from minillm.parallel.collectives import Traffic
from minillm.parallel.data_parallel import (Overlapped, broadcast_from_first, differing, make_buckets, plan_buckets, ring_sum,
                                            share_gradients, sum_buckets, sum_each, torch_sum, trace_backward)
from minillm.parallel.launch import launch
from minillm.parallel.rank_error import RankError

BYTES = 8 * 100  # of a bucket: the net below then has three


class Net(nn.Module):
    """Tied weights, a frozen one and a buffer, in float64; every size a multiple of 4, so that up to 4 ranks share evenly."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.hidden, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("steps", torch.tensor(seed))
        self.double()

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embed(ids))) * self.gain)


PSI = 12 * 8 + 8 * 8 + 8  # its trained parameters


def net(seed=0):
    model = Net(seed)
    return model, dict(model.named_parameters())


def rows(rank, count, step=0):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(12, (count,), generator=generator), torch.randint(12, (count,), generator=generator)


def summed_loss(model, data):
    return F.cross_entropy(model(data[0]), data[1], reduction="sum")


def gradients(parameters):
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours)
    for name in theirs:
        # float64: the only difference left is the order of summation
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-13)


def everyones(size, step=0):
    """Uneven shares: rank r has 3 + 2r rows."""
    return [rows(rank, 3 + 2 * rank, step) for rank in range(size)]


def whole_batch(size):
    model, parameters = net()
    shares = everyones(size)
    data = [torch.cat(part) for part in zip(*shares, strict=True)]
    (summed_loss(model, data) / len(data[0])).backward()
    return gradients(parameters), len(data[0]), shares


def each_way(me, all_reduce):
    """{way: gradients} after one backward of this rank's share, divided by everybody's count."""
    _, count, shares = whole_batch(me.size)
    found = {}
    for way in ("each", "buckets", "overlapped"):
        model, parameters = net()
        overlapped = Overlapped(parameters, me.group, bucket_bytes=BYTES, all_reduce=all_reduce) if way == "overlapped" else None
        (summed_loss(model, shares[me.rank]) / count).backward()
        if way == "each":
            sum_each(parameters, me.group, all_reduce)
        elif way == "buckets":
            sum_buckets(make_buckets(parameters, BYTES), me.group, all_reduce)
        else:
            overlapped.finish()
        found[way] = gradients(parameters)
    return found


def against_the_whole_batch(me):
    wanted, _, shares = whole_batch(me.size)
    assert set(wanted) == {"embed.weight", "hidden.weight", "hidden.bias"}  # the tied weight once, the frozen one not
    for all_reduce in (torch_sum, ring_sum()):
        for found in each_way(me, all_reduce).values():
            same(found, wanted)
    model, parameters = net()
    (summed_loss(model, shares[me.rank]) / len(shares[me.rank][0]) / me.size).backward()
    sum_each(parameters, me.group)
    return float((parameters["hidden.weight"].grad - wanted["hidden.weight"]).norm() / wanted["hidden.weight"].norm())


def against_ddp(me, parts):
    """Ten steps of AdamW beside torch's DDP, with as many microbatches; returns how far the weights came."""
    ours, parameters = net()
    twin = Net()
    theirs = DistributedDataParallel(twin, bucket_cap_mb=BYTES / 2 ** 20)
    summing = Overlapped(parameters, me.group, bucket_bytes=BYTES)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, twin)]
    start = parameters["hidden.weight"].clone()
    for step in range(10):
        batches = [rows(me.rank, 4, 100 * step + part) for part in range(parts)]
        for batch in batches[:-1]:
            with summing.no_sync(), theirs.no_sync():
                (summed_loss(ours, batch) / (4 * parts * me.size)).backward()
                (summed_loss(theirs, batch) / (4 * parts)).backward()
        (summed_loss(ours, batches[-1]) / (4 * parts * me.size)).backward()
        summing.finish()
        (summed_loss(theirs, batches[-1]) / (4 * parts)).backward()
        same(gradients(parameters), gradients(dict(twin.named_parameters())))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)  # the gradient's memory is the bucket's, or the bucket's again
    same({n: p.detach() for n, p in parameters.items()}, {n: p.detach() for n, p in twin.named_parameters()})
    assert not differing(dict(ours.state_dict()), me.group)
    return float((parameters["hidden.weight"] - start).norm())


def traffic_of(me, way, backwards=1):
    """What one step sends: (messages, bytes)."""
    traffic = Traffic()
    model, parameters = net()
    summing = Overlapped(parameters, me.group, bucket_bytes=BYTES, all_reduce=ring_sum(traffic)) if way == "overlapped" else None
    for number in range(backwards):
        if summing and number < backwards - 1:
            with summing.no_sync():
                summed_loss(model, rows(me.rank, 4, number)).backward()
        else:
            summed_loss(model, rows(me.rank, 4, number)).backward()
    if way == "each":
        sum_each(parameters, me.group, ring_sum(traffic))
    elif way == "buckets":
        sum_buckets(make_buckets(parameters, BYTES), me.group, ring_sum(traffic))
    else:
        summing.finish()
    return traffic.messages, traffic.bytes


def gradients_that_stay(me):
    """Backward on top of gradients that are sums already."""
    wanted, count, shares = whole_batch(me.size)
    model, parameters = net()
    summing = Overlapped(parameters, me.group, bucket_bytes=BYTES)
    for _ in range(3):
        share_gradients(parameters, me.group)
        (summed_loss(model, shares[me.rank]) / count).backward()
        summing.finish()
    same(gradients(parameters), {name: 3 * gradient for name, gradient in wanted.items()})


def timeline(me):
    """A trace of one backward, with both ways to send."""
    found = []
    for all_reduce in (torch_sum, ring_sum()):
        model, parameters = net()
        trace = []
        handles = trace_backward({"embed": model.embed, "hidden": model.hidden}, trace)
        summing = Overlapped(parameters, me.group, bucket_bytes=BYTES, all_reduce=all_reduce, trace=trace)
        summed_loss(model, rows(me.rank, 4)).backward()
        summing.finish()
        for handle in handles:
            handle.remove()
        found.append([(event.kind, event.name, event.start, event.end) for event in trace])
    return found


def said(function):
    """The error's text."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)


def mistakes(me):
    model, parameters = net()
    unused = dict(parameters, spare=nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    summing = Overlapped(unused, me.group, bucket_bytes=BYTES)
    summed_loss(model, rows(0, 4)).backward()
    texts = [said(lambda: sum_each(unused, me.group)), said(lambda: sum_buckets(make_buckets(unused), me.group)), said(summing.finish)]
    summing.close()
    summing = Overlapped(parameters, me.group, bucket_bytes=BYTES)
    summed_loss(model, rows(0, 4)).backward()
    texts.append(said(lambda: summed_loss(model, rows(0, 4)).backward()))
    summing.finish()
    summing.close()
    summed_loss(model, rows(0, 4)).backward()  # without hooks, nothing is said
    odd = dict(parameters) if me.rank == 0 else dict(parameters, gain=torch.zeros(9))
    texts.append(said(lambda: differing(odd, me.group)))
    texts.append(said(lambda: differing(dict(reversed(parameters.items())) if me.rank else parameters, me.group)))
    return texts


def start_together(me):
    """Every rank begins with another seed, only the biases are the same, not-a-number; then all are like rank 0."""
    model, parameters = net(seed=me.rank)
    with torch.no_grad():
        parameters["hidden.bias"].fill_(float("nan"))
    everything = dict(model.state_dict(), half=torch.full((3,), me.rank, dtype=torch.bfloat16), flags=torch.tensor([me.rank > 0]))
    unlike = broadcast_from_first(everything, me.group)
    assert not differing(everything, me.group)
    first = Net(0)
    assert torch.equal(model.embed.weight, first.embed.weight) and int(model.steps) == 0
    assert everything["half"].eq(0).all() and not everything["flags"].any()
    return unlike


def everything(me):
    gradients_that_stay(me)
    return {"means": against_the_whole_batch(me), "ddp": [against_ddp(me, parts) for parts in (1, 3)],
            "traffic": {way: traffic_of(me, way) for way in ("each", "buckets", "overlapped")},
            "accumulated": traffic_of(me, "overlapped", 3), "timeline": timeline(me), "mistakes": mistakes(me),
            "start": start_together(me)}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return launch(everything, request.param, backend="gloo")


def test_gradients_are_those_of_the_whole_batch(ranks):
    """Asserted on the ranks, with uneven shares; there a mean of the ranks' means is another gradient."""
    assert all(rank["means"] > 0.01 for rank in ranks)


def test_ten_steps_are_those_of_ddp(ranks):
    """Asserted on the ranks, with and without accumulation; and the weights moved: ten steps of 0.01 in 64 numbers."""
    assert all(0.1 < moved < 0.8 * 1.1 for rank in ranks for moved in rank["ddp"])


def test_each_way_sends_what_its_cost_line_says(ranks):
    size = len(ranks)
    number_of = 8 * 2 * PSI * (size - 1) // size
    for rank in ranks:
        assert rank["traffic"] == {"each": (3 * 2 * (size - 1), number_of), "buckets": (2 * 2 * (size - 1), number_of),
                                   "overlapped": (2 * 2 * (size - 1), number_of)}
        assert rank["accumulated"] == rank["traffic"]["overlapped"]  # three backwards, one sum


def test_the_trace_has_every_bucket_and_layer(ranks):
    for traced in (trace for rank in ranks for trace in rank["timeline"]):
        assert sorted(event[:2] for event in traced) == [("backward", "embed"), ("backward", "hidden"), ("bucket", "0"), ("bucket", "1")]
        span = {name: (start, end) for _, name, start, end in traced}
        assert all(start <= end for start, end in span.values())
        assert span["hidden"][0] < span["embed"][0]  # backward comes from the end
        assert span["hidden"][1] <= span["0"][0] < span["embed"][1] <= span["1"][0]  # the first leaves before backward is done


def test_mistakes_are_named(ranks):
    for rank in ranks:
        *missing, twice, shape, order = rank["mistakes"]
        assert len(missing) == 3 and all("1 of 4 parameters got no gradient in this backward: spare." in text for text in missing)
        assert "came twice: call finish() after every backward" in twice
        assert "rank 1 of the group has float32[9] as gain, and rank 0 float64[8]" in shape
        assert "rank 1 of the group has the tensors of rank 0 in another order" in order


def test_all_begin_like_the_first_rank(ranks):
    unlike = {"embed.weight", "hidden.weight", "head.weight", "steps", "half", "flags"}
    assert all(set(rank["start"]) == unlike for rank in ranks)


def only_one_lacks(me):
    model, parameters = net()
    spare = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    summing = Overlapped(dict(parameters, spare=spare), me.group, bucket_bytes=BYTES)
    (summed_loss(model, rows(0, 4)) + (spare.sum() if me.rank == 0 else 0)).backward()
    summing.finish()


def test_a_gradient_that_one_rank_lacks_is_an_error_and_no_hang():
    with pytest.raises(RankError, match="rank 1 of 2 raised ValueError(.|\n)*1 of 4 parameters got no gradient in this backward: spare"):
        launch(only_one_lacks, 2, backend="gloo")


def test_checked_mode_compares_buckets():
    assert len(launch(against_the_whole_batch, 2, backend="gloo", checked=True)) == 2


def alone(me):
    model, parameters = net()
    summing = Overlapped(parameters, me.group)
    summed_loss(model, rows(0, 4)).backward()
    before = gradients(parameters)
    summing.finish()
    sum_each(parameters, me.group)
    sum_buckets(make_buckets(parameters), me.group)
    assert not broadcast_from_first(parameters, me.group)
    return summing.buckets, all(torch.equal(before[name], gradient) for name, gradient in gradients(parameters).items())


def test_one_rank_has_nothing_to_do():
    assert launch(alone, 1, backend="gloo") == [([], True)]


def test_on_every_backend(backend):
    def on_devices(me):
        model, parameters = net()
        model.to(me.device)
        summing = Overlapped(parameters, me.group, bucket_bytes=BYTES)
        _, count, shares = whole_batch(me.size)
        (summed_loss(model, [part.to(me.device) for part in shares[me.rank]]) / count).backward()
        summing.finish()
        same({n: g.cpu() for n, g in gradients(parameters).items()}, whole_batch(me.size)[0])
        return dist.get_world_size(me.group)
    assert launch(on_devices, 4, backend=backend) == [4] * 4


def sizes(**elements):
    return {name: torch.zeros(count, dtype=torch.float64 if name.startswith("d") else torch.float32)
            for name, count in elements.items()}


def test_buckets_are_planned_from_the_last_parameter():
    parameters = sizes(a=10, b=10, c=30, e=5, f=5)
    assert plan_buckets(parameters, 4 * 10) == [["f", "e"], ["c"], ["b"], ["a"]]  # c is too large for any
    assert plan_buckets(parameters, 4 * 20) == [["f", "e"], ["c"], ["b", "a"]]
    assert plan_buckets(parameters, 1) == [["f"], ["e"], ["c"], ["b"], ["a"]]
    assert plan_buckets(parameters, 4 * 60) == [["f", "e", "c", "b", "a"]]
    with pytest.raises(ValueError, match="bucket_bytes = 0"):
        plan_buckets(parameters, 0)


def test_dtypes_do_not_mix_and_buckets_come_in_the_order_of_their_last_gradient():
    parameters = sizes(a=4, d1=4, b=4, d2=4)
    assert plan_buckets(parameters, 1000) == [["d2", "d1"], ["b", "a"]]
    assert plan_buckets(parameters, 16) == [["d2"], ["b"], ["d1"], ["a"]]
    buckets = make_buckets({name: nn.Parameter(tensor) for name, tensor in parameters.items()}, 1000)
    assert [(bucket.flat.dtype, bucket.flat.numel()) for bucket in buckets] == [(torch.float64, 8), (torch.float32, 8)]
