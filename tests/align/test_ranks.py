"""Every method's training on 2 and 4 data ranks, and on pipelines, against one process: loss, gradients, and ten steps."""

import math
from dataclasses import replace

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture

from minillm.align.dpo import dpo
from minillm.align.grpo import PolicyBatch, grpo
from minillm.align.pairs import Groups
from minillm.align.ppo import Experience, critic_loss, ppo
from minillm.align.reward import Scorer, reward_loss
from minillm.align.sft import pack
from minillm.config import ParallelConfig
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.text.chat import Rendered
from minillm.train.loss import next_token_loss
from runs import PLAN, TINY

MODEL, PLAN = replace(TINY, layers=2), replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1, microbatch_size=2)


def rows(step):
    """Answers of different lengths, some short, so that the ranks have different numbers of tokens."""
    draw = torch.Generator().manual_seed(step)
    ids, lengths = torch.randint(0, 300, (8, 33), generator=draw), torch.randint(1, 30, (8, 1), generator=draw)
    return ids[:, :-1].clone(), torch.where(torch.arange(32) < lengths, ids[:, 1:], IGNORED), draw


def conversations(step):
    ids, _, draw = rows(step)
    return pack([Rendered(row, [n > 20 - 2 * number for n in range(len(row))]) for number, row in enumerate(ids.tolist())], 32)


def groups(step):
    ids, targets, draw = rows(step)
    return Groups(ids, targets, reference=-100 + 10 * torch.randn(8, generator=draw, dtype=torch.float64))


def sampled(step):
    ids, targets, draw = rows(step)
    old, reference = -6 - torch.rand(2, 8, 32, generator=draw, dtype=torch.float64)
    advantages = torch.randn(8, generator=draw, dtype=torch.float64)
    return PolicyBatch(ids, targets, old=old, reference=reference, advantages=advantages)


# a loss is made on its rank: the shape checker's wrappers do not travel
def walks(step):
    ids, targets, draw = rows(step)
    old, values, advantages, returns = torch.randn(4, 8, 32, generator=draw, dtype=torch.float64)
    return Experience(ids, targets, old=old - 6, values=values, advantages=advantages, returns=returns)


METHODS = {"sft": (Transformer, lambda: next_token_loss, conversations), "reward": (Scorer, lambda: reward_loss, groups),
           "dpo": (Transformer, lambda: dpo(), groups), "grpo": (Transformer, lambda: grpo(), sampled),
           "ppo": (Transformer, lambda: ppo(), walks), "critic": (Scorer, lambda: critic_loss(), walks)}


def trained(name, parallel=ParallelConfig()):
    """Losses of ten steps, the first gradients, and the weights at the end."""
    make, loss, batches = METHODS[name]
    engine, losses, gradients = Engine(make(MODEL, seed=3).double(), PLAN, parallel, loss=loss()), [], None
    for step in range(10):
        batch = batches(step).part(engine.rank, engine.ranks)
        losses.append(float(engine.forward_backward(batch)))
        gradients = gradients or {name: weight.grad.clone() for name, weight in engine.weights.items()}
        engine.clip(PLAN.clip_norm)
        engine.step()
    return losses, gradients, {name: weight.detach().clone() for name, weight in engine.weights.items()}


def everything(me):
    layouts = [ParallelConfig(dp=me.size)] + ([ParallelConfig(dp=2, pp=2)] if me.size == 4 else [])
    return {name: [trained(name, layout) for layout in layouts] for name in METHODS}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return launch(everything, request.param, backend="gloo")


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_are_those_of_one_process(ranks, name):
    losses, *tensors = trained(name)
    assert all(map(math.isfinite, losses)) and len(set(losses)) == 10
    for found, *parts in (run for rank in ranks for run in rank[name]):
        assert found == pytest.approx(losses, rel=1e-5)  # added up in float32
        for ours, wanted in zip(parts, tensors, strict=True):
            assert len(ours) > 5
            for key, value in ours.items():  # float64: only the order of summation differs, and ten steps of Adam
                torch.testing.assert_close(value, wanted[key], rtol=1e-7, atol=1e-10)
    assert {key for run in (rank[name][-1] for rank in ranks) for key in run[2]} == tensors[1].keys()


def test_every_method_begins_with_a_gradient():
    for name in METHODS:
        assert max(float(gradient.abs().max()) for gradient in trained(name)[1].values()) > 1e-4
