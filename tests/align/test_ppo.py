"""The formulas by hand, and against those of TRL's PPOTrainer, written out here, since they cannot be called there; then the training."""

import math
from dataclasses import replace

import pytest
import torch
from answers import MODEL, PLAN

from minillm.align.ppo import (AdaptiveKL, critic_loss, experience, gae, improve, kl, last_of, policy_loss, ppo, token_rewards,
                               value_loss, whiten)
from minillm.align.reward import Scorer
from minillm.align.rollout import log_probs_of, sample
from minillm.data.loader import IGNORED, Batch
from minillm.engine import Engine
from minillm.model.transformer import Transformer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_estimates_have_the_mean_that_they_should():
    """Over all tokens of a small vocabulary, weighted by the policy, so there is no sampling error."""
    policy, reference = random(7).log_softmax(0), random(7, seed=1).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl(policy, reference, kind)).sum(), exact, rtol=1e-12, atol=0)  # float64
    k1, k2, k3 = (kl(policy, reference, kind) for kind in ("k1", "k2", "k3"))
    assert (k1 < 0).any() and (k2 >= 0).all() and (k3 >= 0).all()
    near = policy + 1e-3 * random(7, seed=2)
    torch.testing.assert_close(kl(near, policy, "k2"), kl(near, policy, "k3"), rtol=2e-3, atol=0)  # they differ by d³/6


def test_rewards_by_hand():
    mask = torch.tensor([[False, True, True, False], [True, True, True, False], [False, False, True, True]])
    assert last_of(mask).tolist() == [[False, False, True, False], [False, False, True, False], [False, False, False, True]]
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.full((3, 4), 0.5), mask, beta=0.1)
    wanted = torch.tensor([[0, -0.05, 0.95, 0], [-0.05, -0.05, 1.95, 0], [0, 0, -0.05, 2.95]])
    torch.testing.assert_close(rewards, wanted)


def test_gae_by_hand():
    """gamma and lambda are 1/2."""
    rewards, values = torch.tensor([[1.0, 0.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    ends = torch.tensor([[False, False, True]])
    # surprise: 1 + 2/2 - 1 = 1;  0 + 4/2 - 2 = 0;  8 - 4 = 4.  advantage: 4; 0 + 4/4 = 1; 1 + 1/4 = 1.25
    advantages, returns = gae(rewards, values, ends, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 1.0, 4.0]] and returns.tolist() == [[2.25, 3.0, 8.0]]


def gae_by_definition(rewards, values, ends, gamma, lam):
    """Each advantage as its own sum over what is left of its episode: independent of the recursion."""
    advantages = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            for k in range(t, rewards.shape[1]):
                last = bool(ends[b, k]) or k == rewards.shape[1] - 1
                surprise = rewards[b, k] + (0 if last else gamma * values[b, k + 1]) - values[b, k]
                advantages[b, t] += (gamma * lam) ** (k - t) * surprise
                if last:
                    break
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_its_definition_and_sees_nothing_beyond_an_end(gamma, lam):
    rewards, values = random(5, 12), random(5, 12, seed=1)
    ends = random(5, 12, seed=2) > 0.8
    advantages, returns = gae(rewards, values, ends, gamma, lam)
    wanted = gae_by_definition(rewards, values, ends, gamma, lam)
    torch.testing.assert_close(advantages, wanted, rtol=1e-12, atol=1e-12)  # float64
    torch.testing.assert_close(returns, advantages + values)
    place = int(ends[0].nonzero()[0])
    changed = rewards.clone()
    changed[0, place + 1:] += 100
    again, _ = gae(changed, values, ends, gamma, lam)
    assert torch.equal(again[0, :place + 1], advantages[0, :place + 1]) and not torch.equal(again, advantages)


def test_with_lambda_1_a_return_is_what_came():
    rewards, values = random(3, 6), random(3, 6, seed=1)
    _, returns = gae(rewards, values, torch.zeros(3, 6, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-12, atol=1e-12)  # float64


def test_whitening():
    mask = random(4, 9, seed=3) > -0.5
    white = whiten(5 + 3 * random(4, 9), mask)
    assert (white[~mask] == 0).all()
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12) and white[mask].std().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.0, 2.0, -2.0, -2.0), (1.1, 1.0, -1.1, -1.1), (1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5),
    (1.5, -1.0, 1.5, 1.5), (0.5, -1.0, 0.8, 0.0)])
def test_the_clipped_objective_by_hand(ratio, advantage, loss, slope):
    """Slope: of the loss in the log-probability, 0 where a gain is clipped, never 0 where a mistake can be undone."""
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found = policy_loss(log_prob, torch.zeros(1, 1), torch.tensor([[advantage]]))
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-6) and log_prob.grad.item() == pytest.approx(slope, rel=1e-6)


def test_losses_are_trls():
    """trl: pg = max(-A · ratio, -A · clamp(ratio)); vf = 0.5 · max((v - R)², (clamp(v, old - c, old + c) - R)²)."""
    new, old, advantages = 0.3 * random(4, 9), 0.3 * random(4, 9, seed=1), random(4, 9, seed=2)
    ratio = torch.exp(new - old)
    torch.testing.assert_close(policy_loss(new, old, advantages, 0.1),
                               torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.9, 1.1)))
    values, before, returns = random(4, 9, seed=3), random(4, 9, seed=4), random(4, 9, seed=5)
    clipped = torch.max(torch.min(values, before + 0.2), before - 0.2)
    torch.testing.assert_close(value_loss(values, before, returns, 0.2),
                               0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2))


def test_gradients_are_those_of_finite_differences():
    new, old, third = random(3, 4).requires_grad_(), random(3, 4, seed=1), random(3, 4, seed=2)
    for function in (policy_loss, value_loss):
        assert torch.autograd.gradcheck(lambda x: function(x, old, third), new)
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x: kl(x, old, kind), new)


def test_the_controller_by_hand():
    control = AdaptiveKL(beta=0.2, target=6.0, horizon=1_000)
    assert control.update(6.0, 100) == 0.2
    assert control.update(6.6, 100) == pytest.approx(0.2 * (1 + 0.1 * 0.1))  # 10% too much, for a tenth of the horizon
    control.beta = 0.2
    assert control.update(600.0, 100) == pytest.approx(0.2 * 1.02) and control.beta > 0.2  # at most 20%
    control.beta = 0.2
    assert control.update(0.0, 100) == pytest.approx(0.2 * 0.98)


def test_experience_is_put_together_from_the_four_models():
    """Against a walk over every answer, one token after another."""
    policy, reference, critic_model = Transformer(MODEL, seed=2), Transformer(MODEL, seed=3), Scorer(MODEL, seed=4)
    torch.nn.init.normal_(critic_model.head.weight, generator=torch.Generator().manual_seed(0))
    rollouts = sample(policy, [[5, 6, 7], [8], [9, 10]], 6, range(60), generator=torch.Generator().manual_seed(1))
    found, distance = experience(rollouts, torch.tensor([1.0, -2.0, 3.0]), reference, critic_model, 0.1, gamma=0.9, lam=0.8)
    raw, total = torch.zeros_like(found.advantages), 0.0
    for row, score in enumerate((1.0, -2.0, 3.0)):
        places = (found.targets[row] != IGNORED).nonzero()[:, 0].tolist()
        values = critic_model(found.ids[row:row + 1])[0, :, 0].tolist()
        apart = (rollouts.log_probs - log_probs_of(reference, found))[row].tolist()
        total += sum(apart[t] for t in places)
        coming = value = 0.0
        for t in reversed(places):
            coming = -0.1 * apart[t] + (score if t == places[-1] else 0) + 0.9 * value - values[t] + 0.9 * 0.8 * coming
            raw[row, t], value = coming, values[t]
            assert found.returns[row, t].item() == pytest.approx(coming + value, abs=1e-4)  # float32
    mask = found.targets != IGNORED
    torch.testing.assert_close(found.advantages, whiten(raw, mask), rtol=1e-3, atol=1e-3)  # float32
    assert distance == pytest.approx(total / 3, abs=1e-4) and len({len(answer) for answer in rollouts.answers}) > 1


class Recorder(Engine):
    """An engine that only writes down what is asked of it."""

    def __init__(self):
        self.config, self.asked = replace(PLAN, clip_norm=0.25), []

    def forward_backward(self, batch):
        self.asked.append(batch.ids[:, 0].tolist())
        return torch.tensor(float(len(batch.ids)))

    def clip(self, norm):
        self.asked.append(norm)

    def step(self):
        self.asked.append("step")


def test_every_pass_takes_each_row_once_in_a_drawn_order_and_clips():
    def asked(seed):
        engine = Recorder()
        rows = torch.arange(12)[:, None]
        assert improve(engine, Batch(rows, rows), 2, 5, torch.Generator().manual_seed(seed)) == [5, 5, 2, 5, 5, 2]
        assert engine.asked[1::3] == [0.25] * 6 and engine.asked[2::3] == ["step"] * 6
        order = sum(engine.asked[::3], [])
        return order[:12], order[12:]
    first, second = asked(1)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second and sorted(first) != first
    assert asked(1) == (first, second) != asked(2)


def test_it_learns_what_a_program_rewards_and_its_critic_to_foresee_it():
    """The reward is the share of even tokens, which is 1/2 by chance."""
    reference, draw = Transformer(MODEL, seed=2), torch.Generator().manual_seed(0)
    policy = Engine(Transformer(MODEL, seed=2), replace(PLAN, lr=1e-2), loss=ppo())
    judge = Engine(Scorer.of(reference), replace(PLAN, lr=1e-2), loss=critic_loss())
    means, errors = [], []
    for _ in range(16):
        rollouts = sample(policy.model, [[5, 6, 7], [8, 9]] * 16, 6, (), generator=draw)
        scores = torch.tensor([sum(token % 2 == 0 for token in answer) / 6 for answer in rollouts.answers])
        batch, _ = experience(rollouts, scores, reference, judge.model, beta=0.01)
        improve(policy, batch, 2, 16, draw)
        errors.append(sum(improve(judge, batch, 2, 16, draw)) / 4)
        means.append(scores.mean().item())
    assert means[0] == pytest.approx(0.5, abs=0.1) and sum(means[-3:]) / 3 > 0.8
    assert errors[-1] < errors[0] / 2


def test_kl_holds_the_policy_back():
    """With a high price the policy stays where it was; without one it goes where the reward is."""
    gone = []
    for beta in (0.0, 1.0):
        reference, draw = Transformer(MODEL, seed=2), torch.Generator().manual_seed(0)
        policy, judge = Engine(Transformer(MODEL, seed=2), replace(PLAN, lr=1e-2), loss=ppo()), Scorer.of(reference)
        for _ in range(10):
            rollouts = sample(policy.model, [[5, 6, 7]] * 32, 6, (), generator=draw)
            scores = torch.tensor([sum(token % 2 == 0 for token in answer) / 6 for answer in rollouts.answers])
            batch, distance = experience(rollouts, scores, reference, judge, beta)
            improve(policy, batch, 2, 16, draw)
        gone.append(distance)
    assert gone[0] > 2 * gone[1]
