"""Pipelines against one process, schedule by schedule and family by family; asynchronous ones against their own arithmetic."""

import re
from dataclasses import replace

import pytest
import torch
from split_families import CONFIGS, random_model
from torch import nn
from torch.distributed.pipelining import (PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B,
                                          ScheduleInterleavedZeroBubble)
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.data.loader import IGNORED, Batch
from minillm.model.stages import cut_stages, layer_costs
from minillm.parallel.launch import launch
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.rank_error import RankError
from minillm.parallel.schedules import (Action, balance, gpipe, interleaved, needs, one_f_one_b, parts, peak_live, pipedream,
                                        zero_bubble)
from minillm.parallel.stage_weights import SharedParameters, gather_stages
from minillm.train.live_bytes import LiveBytes
from minillm.train.loss import next_token_loss
from minillm.train.optim import decay_groups

MAKE = {"gpipe": gpipe, "1f1b": one_f_one_b, "zero_bubble": zero_bubble}
LLAMA = CONFIGS["llama2"]  # tied


def microbatches(step, count):
    """Rows with few targets and rows with many, so that a mean of the microbatches' means would be wrong."""
    text = torch.randint(0, 61, (count, 9), generator=torch.Generator().manual_seed(step))
    targets = text[:, 1:].clone()
    targets[0, 2:], targets[-1, step % 8] = IGNORED, IGNORED
    return Batch(text[:, :-1], targets).split(1)


def total_norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm() if tensors else torch.zeros((), dtype=torch.float64)


def training(named, forward_backward, norm, shared=lambda: None, steps=10):
    """What can be seen of some steps of AdamW with clipping: losses, norms, the first gradients."""
    optimizer = torch.optim.AdamW(decay_groups(named.items(), 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, first = [], [], {}
    for step in range(steps):
        losses.append(forward_backward(step))
        first = first or {name: weight.grad.clone() for name, weight in named.items()}
        norms.append(norm())
        torch.nn.utils.clip_grads_with_norm_(named.values(), 0.5, norms[-1])
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, first


def dense(config, count, steps=10):
    """One process: the whole batch at once."""
    model = random_model(config)
    named = dict(model.named_parameters())

    def step(number):
        batch = [torch.cat(parts) for parts in zip(*((part.ids, part.targets) for part in microbatches(number, count)))]
        loss = next_token_loss(model(batch[0]), Batch(*batch)) / (batch[1] != IGNORED).sum()
        loss.backward()
        return loss.detach()
    losses, norms, first = training(named, step, lambda: total_norm([p.grad for p in named.values()]), steps=steps)
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)} | {f"{n}.grad": g for n, g in first.items()} | {
        name: p.detach() for name, p in named.items()}


def split(me, config, make, count, chunks=1, cuts=None, steps=10, **options):
    """The same on a pipeline; everything that the dense one gives, on each rank."""
    cuts = cuts or balance(layer_costs(config), me.size * chunks)
    stages = cut_stages(random_model(config), cuts[me.rank::me.size])
    named = dict(stages[0].model.named_parameters())
    shared, pipe = SharedParameters(named, me.group), Pipeline(stages, me.group, next_token_loss, **options)
    schedule = make(me.size, count, *([chunks] if chunks > 1 else []))

    def step(number):
        parts = microbatches(number, count)
        found = pipe.run(schedule, parts, scale=1 / sum(part.count for part in parts))
        shared.sum(named)
        return torch.stack(found).sum() / sum(part.count for part in parts) if found else torch.zeros((), dtype=torch.float64)
    losses, norms, first = training(named, step, lambda: shared.norm(total_norm([named[n].grad for n in shared.first])), steps=steps)
    whole = gather_stages(named, me.group)
    torch.distributed.all_reduce(losses := torch.stack(losses), group=me.group)
    for name in shared.holders:  # the copies stay the same, to the last bit
        assert torch.equal(whole[name], named[name])
    gathered = {f"{n}.grad": g for n, g in gather_stages(first, me.group).items()} | whole
    return {"losses": losses, "norms": torch.stack(norms)} | gathered


def many(me, jobs):
    return [{key: value.detach() for key, value in split(me, **job).items()} if me.rank == 0 else split(me, **job) and None for job in jobs]


def assert_like_dense(ranks, jobs):
    for job, found in zip(jobs, launch(many, ranks, jobs)[0], strict=True):
        wanted = dense(job["config"], job["count"], job.get("steps", 10))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            # float64: sums in another order. AdamW divides by eps = 1e-8 what is 0 up to rounding (a key bias without rotation)
            atol = 1e-12 if key.endswith(".grad") or key in ("losses", "norms") else 1e-10
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=atol, msg=lambda text: f"{job}, {key}: {text}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_trains_as_one_process(ranks):
    config, deep = replace(LLAMA, layers=4), replace(LLAMA, layers=2 * ranks)
    jobs = [dict(config=config, make=make, count=5) for make in MAKE.values()]
    jobs += [dict(config=deep, make=interleaved, count=4, chunks=2)]
    jobs += [dict(config=config, make=make, count=count, recompute=recompute, steps=1) for make in MAKE.values()
             for count, recompute in ((1, False), (4, True))]
    uneven = [*(range(r, r + 1) for r in range(ranks - 1)), range(ranks - 1, 6)]
    assert_like_dense(ranks, [*jobs, dict(config=replace(LLAMA, layers=6), make=one_f_one_b, count=3, steps=1, cuts=uneven)])


def test_one_rank_with_all_stages():
    config = replace(LLAMA, layers=2)  # tied: backward_weight has the whole backward
    assert_like_dense(1, [dict(config=config, make=zero_bubble, count=2, steps=2),
                          dict(config=config, make=interleaved, count=2, chunks=2, recompute=True, steps=2)])


@pytest.mark.slow
def test_every_schedule_on_eight_ranks():
    jobs = [dict(config=replace(LLAMA, layers=8), make=make, count=9) for make in MAKE.values()]
    assert_like_dense(8, [*jobs, dict(config=replace(LLAMA, layers=16), make=interleaved, count=8, chunks=2, steps=2)])


def test_every_family():
    families = CONFIGS | {"experts": replace(LLAMA, experts=4, top_k=2), "untied waves": replace(CONFIGS["waves"], tied=False)}
    makes = list(MAKE.values())
    assert_like_dense(4, [dict(config=replace(config, layers=4), make=makes[number % 3], count=2, steps=1)
                          for number, config in enumerate(families.values())])
    assert_like_dense(2, [dict(config=families[name], make=zero_bubble, count=3)
                          for name in ("gpt2", "bloom", "gemma2", "t5's distances", "experts")])


class Part(nn.Module):
    """A small stage: (B, 8) -> (B, 8). On the first, the microbatch is what goes in."""

    def __init__(self, number, width=8):
        super().__init__()
        torch.manual_seed(number)
        self.number, self.up, self.norm, self.down = number, nn.Linear(width, 16), nn.LayerNorm(16), nn.Linear(16, width)

    def forward(self, x, microbatch):
        x = microbatch if x is None else x
        return x + self.down(torch.tanh(self.norm(self.up(x))))


def squares(out, microbatch):
    return (out - microbatch.flip(-1)).square().sum()


def inputs(count, rows=3):
    return list(torch.randn(count, rows, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64))


class TorchPart(nn.Module):
    """A stage of ours as torch's pipelining calls it: with the stream, or the ids on the first."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        if x.is_floating_point():
            return self.stage(x, Batch(*torch.zeros(2, *x.shape[:2], dtype=torch.int64)))  # of the ids only the shape counts here
        return self.stage(None, Batch(x, x))


def beside_torch(me, theirs, make, chunks):
    """The largest difference between two gradients, ours and torch's; of one parameter, relative to its largest entry."""
    config, count = replace(CONFIGS["llama3"], layers=4), 4  # untied
    parts, gradients = microbatches(0, count), []
    ids, targets = torch.cat([part.ids for part in parts]), torch.cat([part.targets for part in parts])
    total = sum(part.count for part in parts)
    for whose in ("ours", "torch's"):
        numbers = range(me.rank, me.size * chunks, me.size)
        cuts = balance([1] * 4, me.size * chunks)
        stages = [cut_stages(random_model(config), [cuts[number]])[0] for number in numbers]
        if whose == "ours":
            Pipeline(stages, me.group, next_token_loss).run(make(me.size, count, *([chunks] if chunks > 1 else [])), parts, scale=1 / total)
        else:
            wrapped = [PipelineStage(TorchPart(stage), number, me.size * chunks, torch.device("cpu"), group=me.group)
                       for stage, number in zip(stages, numbers)]
            schedule = theirs(wrapped if chunks > 1 else wrapped[0], count, scale_grads=False,
                              loss_fn=lambda out, target: next_token_loss(out, Batch(target, target)) / total)
            schedule.step(*([ids] if me.rank == 0 else []), **({"target": targets} if me.rank == me.size - 1 else {}))
        gradients.append([parameter.grad for stage in stages for parameter in stage.parameters()])
    assert len(gradients[0]) > 8
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)) for ours, theirs in zip(*gradients, strict=True))


def all_beside_torch(me):
    return [beside_torch(me, *case) for case in ((ScheduleGPipe, gpipe, 1), (Schedule1F1B, one_f_one_b, 1),
                                                 (ScheduleInterleaved1F1B, interleaved, 2))] + [
        beside_torch(me, ScheduleInterleavedZeroBubble, interleaved, 2)]


def test_gradients_are_those_of_torchs_pipelining():
    for differences in launch(all_beside_torch, 2, backend="gloo"):
        assert len(differences) == 4 and max(differences) < 1e-12, differences  # float64: sums in another order


def observed(me, make, count, chunks):
    """One run: the trace, how much is kept at each forward, and the bytes sent."""
    pipe = Pipeline([Part(n).double() for n in range(me.rank, me.size * chunks, me.size)], me.group, squares, trace=[])
    kept, sent, send = [], [], torch.distributed.isend
    for stage in pipe.chunks:
        stage.register_forward_hook(lambda *_: kept.append(len(pipe.kept) + 1))
    torch.distributed.isend = lambda tensor, **to: sent.append(tensor.nbytes) or send(tensor, **to)
    schedule = make(me.size, count, *([chunks] if chunks > 1 else []))
    pipe.run(schedule, inputs(count), update=(lambda stage, m: None) if make is pipedream else None)
    torch.distributed.isend = send
    return schedule, pipe.trace, max(kept), sent


@pytest.mark.parametrize(("make", "chunks"), [(gpipe, 1), (one_f_one_b, 1), (zero_bubble, 1), (pipedream, 1), (interleaved, 2)])
def test_what_is_done_kept_and_sent_is_what_the_schedule_says(make, chunks):
    found = launch(observed, 4, make, 8, chunks, backend="gloo")
    schedule, stages = found[0][0], 4 * chunks
    ended = {}
    for rank, (_, trace, kept, sent) in enumerate(found):
        assert [timed.action for timed in trace] == schedule[rank]
        assert all(a.start <= a.end <= b.start for a, b in zip(trace, trace[1:]))
        assert kept == peak_live(schedule)[rank]
        # (3, 8) float64 forward from every stage but the last, back from every one but the first; 64 bytes before the first
        out, back = (sum(number % 4 == rank for number in numbers) for numbers in (range(stages - 1), range(1, stages)))
        assert sum(sent) == (out + back) * 8 * 3 * 8 * 8 + out * 64 and len(sent) == (out + back) * 8 + out
        ended |= {part: timed.end for timed in trace for part in parts(timed.action)}
    for timed in (timed for _, trace, _, _ in found for timed in trace):  # one clock for all processes of a machine
        assert all(ended[need] <= timed.start for need in needs(timed.action, stages))


class Layers(nn.Module):
    """Four layers, each of which keeps what it returns: 4 · 16 · 8 numbers of a microbatch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, microbatch):
        x = microbatch if x is None else x
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peaks(me):
    """Bytes alive at most, for 8 and for 12 microbatches."""
    found = {}
    for name, make, recompute in (("gpipe", gpipe, False), ("recomputed", gpipe, True), ("1f1b", one_f_one_b, False)):
        for count in (8, 12):
            pipe = Pipeline([Layers()], me.group, lambda out, _: out.square().sum(), recompute=recompute)
            batch = [torch.ones(16, 8) for _ in range(count)]
            with LiveBytes() as live:
                pipe.run(make(me.size, count), batch)
            found[name, count] = live.peak
    return found


def test_bytes_at_the_peak():
    tensor = 16 * 8 * 4
    for rank, found in enumerate(launch(peaks, 4, backend="gloo")):
        more = {name: found[name, 12] - found[name, 8] for name in ("gpipe", "recomputed", "1f1b")}
        given = tensor if rank else 0  # what came from the stage before; the first stage's microbatch was there already
        small = 200  # scalars, such as losses
        assert 0 <= more["gpipe"] - 4 * (4 * tensor + given) <= small and 0 <= more["1f1b"] <= small
        assert 0 <= more["recomputed"] - 4 * given <= small


class Products(TorchDispatchMode):
    """Multiplications in matrix products. (FlopCounterMode's module tracker cannot be used with gradients of inner nodes.)"""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if str(function.overloadpacket) in ("aten.mm", "aten.bmm", "aten.addmm"):
            self.numbers += out.numel() * args[-1].shape[-2]
        return out


def operations(me):
    """Multiplications of 1F1B and of zero bubble, on stages of a model."""
    counts = []
    for make in (one_f_one_b, zero_bubble):
        stages = cut_stages(random_model(replace(CONFIGS["llama3"], layers=4)), balance([1] * 4, me.size)[me.rank::me.size])
        with Products() as counter:
            Pipeline(stages, me.group, next_token_loss).run(make(me.size, 4), microbatches(0, 4))
        counts.append(counter.numbers)
    return counts


def test_backward_in_two_parts_multiplies_no_more():
    for whole, split_up in launch(operations, 2, backend="gloo"):
        assert whole == split_up > 0


def asynchronous(me, count, stash):
    """PipeDream with plain SGD: the weights at the end, and the most versions of them at once."""
    stage, versions = Part(me.rank).double(), []
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.05)

    def update(number, microbatch):
        versions.append(len({id(kept.weights) for kept in pipe.kept.values()}) + 1)
        optimizer.step()
        optimizer.zero_grad()
    pipe = Pipeline([stage], me.group, squares, stash=stash, trace=[])
    pipe.run(pipedream(me.size, count), inputs(count), update=update)
    actions = [timed.action for timed in pipe.trace]
    stale = [sum(a.kind == "update" for a in actions[actions.index(Action("forward", me.rank, m)):actions.index(Action("update", me.rank, m))])
             for m in range(count)]
    return dict(stage.state_dict()), stale, max(versions)


def delayed_sgd(stages, count):
    """The same in one process: the gradient of microbatch m on stage s is that of the weights after max(0, m - (P-s-1)) updates."""
    history = [[{name: p.detach().clone() for name, p in Part(s).double().named_parameters()}] for s in range(stages)]
    for m, microbatch in enumerate(inputs(count)):
        used = [{name: p.clone().requires_grad_() for name, p in history[s][max(0, m - (stages - s - 1))].items()} for s in range(stages)]
        x = None
        for s in range(stages):
            x = torch.func.functional_call(Part(s).double(), used[s], (x, microbatch))
        squares(x, microbatch).backward()
        for s in range(stages):
            history[s].append({name: (p - 0.05 * used[s][name].grad).detach() for name, p in history[s][-1].items()})
    return [versions[-1] for versions in history]


def test_pipedream_is_sgd_with_a_delay_that_differs_from_stage_to_stage():
    wanted, count = delayed_sgd(4, 12), 12
    for rank, (weights, stale, versions) in enumerate(launch(asynchronous, 4, count, True, backend="gloo")):
        for name, value in wanted[rank].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12)  # float64
        assert stale == [min(m, 4 - rank - 1) for m in range(count)] and versions == 4 - rank
    broken = launch(asynchronous, 4, count, False, backend="gloo")
    gaps = [max(float((broken[rank][0][name] - value).abs().max()) for name, value in wanted[rank].items()) for rank in range(4)]
    assert min(gaps) > 1e-4, gaps  # without stash, backward mixes two versions, and every stage gets another result


def wrong(me, what):
    stage, schedule, count = Part(me.rank).double(), one_f_one_b(me.size, 4), 4
    microbatch = inputs(4)
    if what == "raises" and me.rank == 1:
        stage.norm.forward = lambda x: x / 0 if isinstance(x, int) else (_ for _ in ()).throw(ZeroDivisionError("by hand"))
    elif what == "shapes" and me.rank == 1:
        stage = Part(1, width=6).double()
    elif what == "ranks":
        schedule = one_f_one_b(3, 4)
    elif what == "count":
        microbatch = microbatch[:3]
    elif what == "uneven":
        microbatch[2] = microbatch[2][:1]
    elif what == "update":
        schedule = pipedream(me.size, 4)
    elif what == "deadlock":
        schedule[1] = schedule[1][::-1]
    elif what == "ignored" and me.rank == 1:
        stage.forward = lambda x, m: stage.up.weight.sum()
    elif what == "dies" and me.rank == 1:
        stage.forward = lambda x, m: __import__("os")._exit(3)
    Pipeline([stage], me.group, squares).run(schedule, microbatch)


@pytest.mark.parametrize(("what", "words"), [
    ("raises", r"ZeroDivisionError(.|\n)*In the forward of microbatch 0 on stage 1 \(rank 1 of the pipeline\), which was given float64 "
               r"\[3, 8\] by stage 0"),
    ("shapes", r"3x8 and 6x16(.|\n)*given float64 \[3, 8\] by stage 0"),
    ("ranks", "the schedule is for 3 ranks, and the pipeline has 2"),
    ("count", "the schedule is for 4 microbatches, and the pipeline was given 3"),
    ("uneven", r"stage 0 made \[3, 8\] of another microbatch and \[1, 8\] of microbatch 2: all must have one shape"),
    ("update", "the schedule has updates, and no update function was given"),
    ("deadlock", "deadlock after .*: rank 0 waits for backward_input of microbatch 0 on stage 1"),
    ("ignored", "gave no gradient for stage 0: stage 1 made nothing of its stream"),
    ("dies", "rank 1 of 2 .*(died|ended|exit)")])
def test_what_goes_wrong_is_named(what, words):
    with pytest.raises(RankError) as error:
        launch(wrong, 2, what, backend="gloo", timeout=30)
    assert re.search(words, str(error.value)), str(error.value)
