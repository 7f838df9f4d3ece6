from dataclasses import replace

import pytest
import torch
from answers import MODEL, PLAN

from minillm.align.grpo import answer_loss, group_advantages, grpo, policy_batch
from minillm.align.rollout import sample
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.train.loss import token_log_probs


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]])
    found = group_advantages(rewards)
    root = (1 / 3) ** 0.5  # of 4 · 0.25 / (4 - 1)
    assert found[0].tolist() == pytest.approx([0.5 / root, -0.5 / root, -0.5 / root, 0.5 / root], rel=1e-3)  # σ + 1e-4
    assert found[1].tolist() == [0.0] * 4 and found[2].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3)
    assert group_advantages(rewards, scaled=False)[2].tolist() == [3.0, -1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="1 answer to a prompt"):
        group_advantages(torch.zeros(3, 1))


def numbers():
    draw = torch.Generator().manual_seed(0)
    new, old, reference = -torch.rand(3, 6, 9, generator=draw, dtype=torch.float64)
    advantages = torch.randn(6, generator=draw, dtype=torch.float64)
    return new, old, reference, advantages, torch.arange(9) < torch.randint(1, 10, (6, 1), generator=draw)


def test_the_loss_is_trls():
    """trl's GRPOTrainer, loss_type "grpo" and "dr_grpo", written out token by token; test_trl.py asks TRL itself."""
    new, old, reference, advantages, mask = numbers()
    per_answer, per_token = [], []
    for row in range(6):
        total = 0.0
        for t in range(int(mask[row].sum())):
            ratio = torch.exp(new[row, t] - old[row, t])
            kept = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
            penalty = torch.exp(reference[row, t] - new[row, t]) - (reference[row, t] - new[row, t]) - 1
            total = total - torch.min(ratio * advantages[row], kept * advantages[row]) + 0.04 * penalty
        per_answer.append(total / mask[row].sum())
        per_token.append(total / 9)
    for length, wanted in ((None, per_answer), (9, per_token)):
        found = answer_loss(new, old, reference, advantages, mask, length=length)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)  # float64, another order of summation


def test_gradients_are_those_of_finite_differences_and_at_the_start_those_of_the_policy_gradient():
    new, old, reference, advantages, mask = numbers()
    assert torch.autograd.gradcheck(lambda x: answer_loss(x, old, reference, advantages, mask), new.requires_grad_())
    new.grad = None
    answer_loss(new, new.detach(), new.detach(), advantages, mask).sum().backward()
    wanted = torch.where(mask, -advantages[:, None] / mask.sum(1, keepdim=True), 0.0)
    torch.testing.assert_close(new.grad, wanted, rtol=1e-12, atol=1e-12)  # float64; KL's slope is 0 where they agree


def test_the_engines_loss_has_the_options_of_the_answers():
    batch = policy_batch(sample(Transformer(MODEL, seed=2), [[5, 6, 7]] * 4, 6, range(40), generator=torch.Generator().manual_seed(0)),
                         torch.arange(4.0)[None], Transformer(MODEL, seed=3))
    logits = Transformer(MODEL, seed=4)(batch.ids).detach()
    for options in ({}, {"clip": 0.01}, {"beta": 0.5}, {"length": 6}):
        wanted = answer_loss(token_log_probs(logits, batch.targets), batch.old, batch.reference, batch.advantages, batch.targets != IGNORED,
                             **options)
        assert grpo(**options)(logits, batch).item() == wanted.sum().item() and (not options or wanted.sum() != grpo()(logits, batch))


def test_microbatches_give_the_mean_over_answers():
    model = Transformer(MODEL, seed=2)
    rollouts = sample(model, [[5, 6, 7]] * 4 + [[8, 9]] * 4, 6, range(40), generator=torch.Generator().manual_seed(0))
    batch = policy_batch(rollouts, torch.arange(8.0).view(2, 4) % 3, Transformer(MODEL, seed=3))
    assert batch.count == 8 and len({len(answer) for answer in rollouts.answers}) > 2
    found = []
    for size in (8, 4, 1):
        engine = Engine(Transformer(MODEL, seed=2), replace(PLAN, microbatch_size=size), loss=grpo())
        found.append((engine.forward_backward(batch).item(), engine.weights["embed.weight"].grad))
    for loss, gradient in found[1:]:  # float32, another order of summation
        assert loss == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_it_learns_what_a_program_rewards():
    """The reward is the share of even tokens, which is 1/2 by chance."""
    model, reference = Transformer(MODEL, seed=2), Transformer(MODEL, seed=2)
    engine, draw, means = Engine(model, replace(PLAN, lr=1e-2), loss=grpo()), torch.Generator().manual_seed(0), []
    for _ in range(32):
        rollouts = sample(model, [[5, 6, 7]] * 16 + [[8, 9]] * 16, 6, (), generator=draw)
        rewards = torch.tensor([sum(token % 2 == 0 for token in answer) / 6 for answer in rollouts.answers]).view(2, 16)
        means.append(rewards.mean().item())
        engine.forward_backward(policy_batch(rollouts, rewards, reference))
        engine.clip(1.0)
        engine.step()
    assert means[0] == pytest.approx(0.5, abs=0.1) and sum(means[-5:]) / 5 > 0.8
