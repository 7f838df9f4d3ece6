"""ZeRO 1, 2 and 3 against one process, torch's FSDP2 and ZeroRedundancyOptimizer. One launch per number of ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from minillm.config import TrainConfig
from minillm.parallel.collectives import Traffic
from minillm.parallel.launch import launch
from minillm.parallel.zero1 import TORCH, Wire, Zero1, ring
from minillm.parallel.zero2 import Zero2
from minillm.parallel.zero3 import fully_shard
from minillm.plan.memory import zero_bytes, zero_traffic
from minillm.train.build import build_optimizer
from minillm.train.live_bytes import LiveBytes
from minillm.train.master_weights import MasterWeights

PLAN = TrainConfig(lr=1e-2, weight_decay=0.1)
STAGES = (1, 2, 3)
ROWS = 8  # of a batch


class Layer(nn.Module):
    """A residual block of uneven sizes."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied weights, norms and biases; no size but the batch is a multiple of 4."""

    def __init__(self, vocab=13, width=6, hidden=11, layers=3, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.blocks = nn.ModuleList(Layer(width, hidden) for _ in range(layers))
        self.head.weight, self.recompute = self.embed.weight, recompute

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            with set_checkpoint_early_stop(False):  # so that a block is run again to its end
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def build(stage, model, group, **options):
    if stage == 3:
        return fully_shard(model, group, **options)
    return {1: Zero1, 2: Zero2}[stage](model, group, bucket_bytes=2400, **options)


def loss_of(model, ids, rows=ROWS):
    """This share's part of the mean over all rows."""
    return F.cross_entropy(wide(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (rows * 4)


def wide(logits):
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def batch(step, vocab=13):
    return torch.randint(vocab, (ROWS, 5), generator=torch.Generator().manual_seed(step))


def share(me, step, vocab=13):
    return batch(step, vocab).chunk(me.size)[me.rank].to(me.device)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def dense(plan=PLAN, steps=10):
    """Losses, norms, the first gradients and the last weights of one process."""
    model = Net().double()
    optimizer, found = build_optimizer(model, plan), []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((float(loss.detach()), float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)), gradients))
        optimizer.step()
        optimizer.zero_grad()
    return found, weights(model)


def ours(me, stage, plan=PLAN, parts=1, wire=TORCH, steps=10, poison=False):
    """The same on ranks."""
    model = Net().double().to(me.device)
    zero = build(stage, model, me.group, wire=wire)
    optimizer, found = zero.build_optimizer(plan), []
    if poison:
        for flat in zero.flats:
            end = max(flat.span(name)[1] for name in flat.spans)
            flat.part.data[end:] = float("nan")
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64, device=me.device)
        for number, ids in enumerate(share(me, step).chunk(parts)):
            loss = loss_of(model, ids)
            if number < parts - 1:
                with zero.no_sync():
                    loss.backward()
            else:
                loss.backward()
            total += loss.detach()
        dist.all_reduce(total, group=me.group)
        zero.finish()
        gradients = zero.gather({name: piece.grad for name, piece in zero.named_parameters()})
        found.append((float(total), float(zero.clip(0.5)), gradients))
        zero.step(optimizer)
    return found, zero.gather(dict(zero.named_parameters()))


def same(ours, theirs):
    (ours, end), (theirs, wanted) = ours, theirs
    for (loss, norm, gradients), (right, right_norm, right_gradients) in zip(ours, theirs, strict=True):
        # float64: the only difference left is the order of summation, which ten steps of Adam carry on
        assert loss == pytest.approx(right, rel=1e-12) and norm == pytest.approx(right_norm, rel=1e-10)
        close(gradients, right_gradients)
    close(end, wanted)


def close(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) == 19
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].cpu(), expected, rtol=1e-9, atol=1e-12)


def against_one_process(me):
    by_hand = replace(PLAN, optimizer="by_hand")
    wanted, wanted_by_hand = dense(), dense(by_hand, 3)
    for stage in STAGES:
        same(ours(me, stage), wanted)
        if ROWS // me.size > 1:
            same(ours(me, stage, by_hand, parts=2, wire=ring(), steps=3, poison=True), wanted_by_hand)


def against_torch(me):
    """Three steps beside torch's own, whose gradients are means over ranks."""
    twin, mesh = Net().double(), init_device_mesh("cpu", (me.size,))
    sharded = Net().double()
    for block in sharded.blocks:
        torch_fully_shard(block, mesh=mesh)
    torch_fully_shard(sharded, mesh=mesh)
    replicated = DistributedDataParallel(twin)
    groups = build_optimizer(twin, PLAN).param_groups
    options = dict(lr=PLAN.lr, betas=(PLAN.beta1, PLAN.beta2), eps=PLAN.adam_eps)
    optimizers = [build_optimizer(sharded, PLAN), ZeroRedundancyOptimizer(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], torch.optim.AdamW, me.group, **options)]
    mine = [ours(me, stage, steps=3)[1] for stage in STAGES]
    for step in range(3):
        for model, optimizer in zip((sharded, replicated), optimizers, strict=True):
            (loss_of(model, share(me, step)) * me.size).backward()
            clip = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert float(clip.full_tensor() if hasattr(clip, "full_tensor") else clip) > 0.5  # so that clipping matters
            optimizer.step()
            optimizer.zero_grad()
    for found in mine:
        close(found, weights(twin))
        close(found, {name: p.full_tensor().detach() for name, p in sharded.named_parameters()})


def traffic(me, stage, parts):
    """Elements that one step sends, and those that the parts have."""
    counted, model = Traffic(), Net().double()
    zero = build(stage, model, me.group, wire=ring(counted))
    optimizer = zero.build_optimizer(PLAN)
    for number in range(parts):
        loss_of(model, share(me, number)).backward()
    zero.finish()
    zero.clip(1.0)
    zero.step(optimizer)
    return counted.bytes // 8, sum(flat.length for flat in zero.flats)


def live(me, stage, gradients):
    """Bytes alive when backward is done, those of the formula, and how much more there were at the peak."""
    convention = "half" if gradients is None else "float"
    with LiveBytes() as live:
        model = Net(vocab=17, width=33, hidden=70, layers=4)
        size = sum(p.numel() for p in model.parameters())
        zero = build(stage, model, me.group, dtype=torch.bfloat16, gradients=gradients)
        optimizer = zero.build_optimizer(PLAN)
        for step in range(2):
            live.peak = 0
            loss = loss_of(model, share(me, step)[:1])
            loss.backward()
            del loss
            now = live.now
            zero.finish()
            now = now if stage == 1 else live.now  # zero2 and zero3 have a bucket on its way until then
            if step == 0:
                zero.step(optimizer)
    formula = zero_bytes(size, me.size, stage, convention).total
    block = sum(p.numel() for p in Layer(33, 70).parameters())
    return now / formula, (live.peak - formula) / (2 * block)


def narrow(me):
    """Losses in bf16 with float32 masters: zero's with each way to keep gradients, and one process's."""
    model = Net()
    masters = MasterWeights(model, torch.bfloat16, "half")
    optimizer, found = build_optimizer(masters.named_parameters(), PLAN), {"one": []}
    for step in range(6):
        loss = loss_of(model, batch(step))
        loss.backward()
        masters.step(optimizer)
        model.zero_grad()
        found["one"].append(float(loss.detach()))
    for stage in STAGES:
        for gradients in (None, torch.float32)[:3 - stage or 1]:
            model, losses = Net(), []
            zero = build(stage, model, me.group, dtype=torch.bfloat16, gradients=gradients)
            optimizer = zero.build_optimizer(PLAN)
            for step in range(6):
                loss = loss_of(model, share(me, step))
                loss.backward()
                zero.finish()
                zero.step(optimizer)
                total = loss.detach().float()
                dist.all_reduce(total)
                losses.append(float(total))
            pieces = dict(zero.named_parameters())
            assert {p.dtype for p in pieces.values()} == {torch.float32}
            if stage < 3:  # the model has the masters, rounded
                assert all(torch.equal(p, zero.gather(pieces)[n].bfloat16()) for n, p in model.named_parameters())
            found[stage, str(gradients)] = losses
    return found


def zero3_in_use(me):
    """What hooks must bear: recomputed blocks, evaluation, frozen blocks, two forwards for one backward."""
    whole = Net().double()
    for frozen in (whole.blocks[1], whole.blocks[2].norm):
        frozen.requires_grad_(False)
    (loss_of(whole, batch(0)) + loss_of(whole, batch(1))).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    for recompute in (False, True):
        for reshard in (True, False):
            model = Net(recompute=recompute).double()
            for frozen in (model.blocks[1], model.blocks[2].norm):
                frozen.requires_grad_(False)
            alive, wire = [], Wire(lambda *given: alive.append(whole_units(zero)) or TORCH.reduce_scatter(*given), TORCH.all_gather)
            zero = fully_shard(model, me.group, reshard=reshard, wire=wire)
            with torch.no_grad():
                model(batch(5))
            assert freed(zero, model)
            (loss_of(model, share(me, 0)) + loss_of(model, share(me, 1))).backward()
            zero.finish()
            assert freed(zero, model)
            found = zero.gather({name: p.grad for name, p in zero.named_parameters() if p.grad is not None})
            assert found.keys() == wanted.keys() and len(found) == 11
            for name, expected in wanted.items():
                # float64: only the order of summation differs
                torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-13)
            alive.clear()
            loss_of(model, share(me, 0)).backward()
            zero.finish()
            assert not reshard or max(alive) == 3  # the rest, a block, and the one that is on its way; the frozen one has gone
            model(batch(6))  # for no backward, with weights that the step makes old
            zero.step(zero.build_optimizer(PLAN))
            new = zero.gather(dict(zero.named_parameters()))
            torch.testing.assert_close(model(batch(7)), functional_call(Net().double(), new, batch(7)), rtol=1e-11, atol=1e-13)


def whole_units(zero):
    return sum(flat.whole.untyped_storage().nbytes() > 0 for flat in zero.flats)


def order(me):
    """What happens in one step of zero3: collectives when they start, blocks when their forward has ended."""
    seen, model = [], Net().double()
    wire = Wire(lambda *given: seen.append("reduce") or TORCH.reduce_scatter(*given),
                lambda *given: seen.append("gather") or TORCH.all_gather(*given))
    fully_shard(model, me.group, wire=wire)
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    model.register_forward_hook(lambda _model, _given, out: out.register_hook(lambda _: seen.append("back")) and None)
    loss_of(model, share(me, 0)).backward()
    return seen


def freed(zero, model):
    """Whether the model has nothing but pieces."""
    shown = dict(model.named_parameters())
    return (not whole_units(zero)
            and all(shown[name] is piece for name, piece in zero.named_parameters()) and model.head.weight is model.embed.weight)


def loaded(me):
    """Weights and averages go through the dense form into another stage."""
    model = Net().double()
    zero = build(1, model, me.group)
    optimizer = zero.build_optimizer(PLAN)
    loss_of(model, share(me, 0)).backward()
    zero.finish()
    zero.step(optimizer)
    names = dict(zero.named_parameters())
    averages = zero.gather({name: optimizer.state[piece]["exp_avg"] for name, piece in names.items()})
    for stage in STAGES:
        other = build(stage, Net().double(), me.group)
        other.load(weights(model))
        close(other.gather(dict(other.named_parameters())), weights(model))
        close(other.gather(other.part_of(averages)), averages)
        out = other.model(batch(3))
        torch.testing.assert_close(out, model(batch(3)), rtol=0, atol=0)


def said(function):
    try:
        function()
    except ValueError as error:
        return str(error)


def mistakes(me):
    texts = []
    for stage in STAGES:
        model = Net().double()
        model.blocks[1].spare = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        zero = build(stage, model, me.group)
        texts.append(said(zero.finish))
        loss_of(model, share(me, 0)).backward()
        texts.append(said(zero.finish))
        texts.append(said(lambda: zero.build_optimizer(replace(PLAN, optimizer="muon"))))
    mixed = Net()
    mixed.blocks[0].up.double()
    texts.append(said(lambda: fully_shard(mixed, me.group)))
    return texts


def everything(me):
    against_one_process(me)
    against_torch(me)
    zero3_in_use(me)
    loaded(me)
    return {"traffic": {(stage, parts): traffic(me, stage, parts) for stage in STAGES for parts in (1, 2)},
            "live": {(stage, kept): live(me, stage, kept) for stage in STAGES for kept in (None, torch.float32)[:stage - 1 or 1]},
            "narrow": narrow(me), "mistakes": mistakes(me), "order": order(me)}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return launch(everything, request.param, backend="gloo")


def test_ten_steps_are_those_of_one_process_and_of_torch(ranks):
    """Asserted on the ranks: losses, gradients, norms and weights, also with microbatches and with padding that is no number."""
    assert all(len(rank["traffic"]) == 6 for rank in ranks)


def test_traffic_is_two_two_and_three_times_the_weights(ranks):
    size, psi = len(ranks), sum(p.numel() for p in Net().parameters())
    for rank in ranks:
        for (stage, parts), (sent, elements) in rank["traffic"].items():
            assert sent == zero_traffic(elements * size, size, stage, parts)  # exactly, of the padded weights
            assert sent == pytest.approx(zero_traffic(psi, size, stage, parts), rel=0.02)  # at most 3 of about 150 are padding


def test_live_bytes_are_the_formula(ranks):
    for rank in ranks:
        for (stage, kept), (ratio, more) in rank["live"].items():
            assert ratio == pytest.approx(1, abs=0.02)
            # at the peak, in blocks of 16 bits: a weight's gradient on its way to a bucket; with two buckets of half a block or less;
            # with two whole blocks, the rest, and two blocks' buckets, which may be of 32 bits
            assert more < {1: 1, 2: 2, 3: 5 if kept is None else 7}[stage]


def test_sixteen_bits_with_master_weights(ranks):
    for rank in ranks:
        one, *others = rank["narrow"].values()
        for losses in others:
            # activations of 8 bits round the same here and there; gradients round once more in each sum of two ranks' numbers
            assert losses == pytest.approx(one, rel=2e-3) and losses[-1] < losses[0] - 1


def test_the_next_block_is_on_its_way_while_one_runs(ranks):
    forward = ["gather", "gather", "gather", 0, "gather", 1, 2]  # the rest and block 0; then 1 before 0 has run
    backward = ["gather", "gather", "back", "gather", "reduce", "gather", "reduce", "reduce", "reduce"]  # the rest and block 2; 1 before 2 has run
    assert all(rank["order"] == forward + backward for rank in ranks)


def test_mistakes_are_named(ranks):
    for rank in ranks:
        *texts, mixed = rank["mistakes"]
        for nothing, spare, muon in (texts[:3], texts[3:6], texts[6:]):
            assert "20 of 20 parameters got no gradient" in nothing
            assert "1 of 20 parameters got no gradient in this backward: blocks.1.spare." in spare
            assert "optimizer = 'muon' with ZeRO: it orthogonalises whole matrices" in muon
        assert "a block has parameters in 2 formats (torch.float" in mixed


def on_devices(me):
    for stage in STAGES:
        same(ours(me, stage, steps=2), dense(steps=2))


def test_on_every_backend(backend):
    launch(on_devices, 4, backend=backend)
