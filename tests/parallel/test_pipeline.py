"""Pipelines against one process, schedule by schedule and family by family; asynchronous ones against their own arithmetic."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from split_families import CONFIGS, random_model
from torch import nn
from torch.distributed.pipelining import (PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B,
                                          ScheduleInterleavedZeroBubble)
from torch.utils.flop_counter import FlopCounterMode

from minillm.data.loader import IGNORED, Batch
from minillm.model.stages import cut_stages, layer_costs
from minillm.parallel.launch import launch
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.rank_error import RankError
from minillm.parallel.schedules import (Action, balance, gpipe, in_order, interleaved, one_f_one_b, peak_live, pipedream,
                                        zero_bubble)
from minillm.parallel.stage_weights import SharedParameters, gather_stages
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
    for name in shared.groups:  # the copies stay the same, to the last bit
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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_schedule_trains_as_one_process(ranks):
    config = replace(LLAMA, layers=8)
    jobs = [dict(config=config, make=make, count=count, recompute=recompute) for make in MAKE.values()
            for count, recompute in ((1, False), (5, False), (8, True))]
    jobs += [dict(config=config, make=interleaved, count=ranks * rounds, chunks=2) for rounds in (1, 2)]
    jobs += [dict(config=config, make=one_f_one_b, count=3, cuts=[*(range(r, r + 1) for r in range(ranks - 1)), range(ranks - 1, 8)])]
    assert_like_dense(ranks, jobs)
