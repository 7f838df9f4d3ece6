"""PPO for language models: the reward of each token, advantages, two clipped losses, and the batch that two Engines learn from.

An answer is an episode, a token an action. The reward model's score comes with the last token; every token pays for leaving the
reference model (KL), so the policy cannot wander off to where the reward model was never right. A critic predicts what is
still to come, and its surprise is the advantage. Sources: arXiv:1707.06347; for language models arXiv:1909.08593 §2 and
arXiv:2203.02155 §3.5. Four models take part: policy and critic are trained, reference and reward model are only asked.
grpo.py does without the critic, online.py is the outer loop of both. Left out: InstructGPT's share of pretraining gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.align.rollout import Rollouts, log_probs_of
from minillm.data.loader import IGNORED, Batch
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.train.loss import token_log_probs


def kl(log_probs: Float[Tensor, "*shape"], reference: Float[Tensor, "*shape"],
       kind: Literal["k1", "k2", "k3"] = "k1") -> Float[Tensor, "*shape"]:
    """For tokens drawn from the policy, an estimate of KL(policy ‖ reference), from the two log-probabilities of each.

    With d = ln policy - ln reference: k1 = d (unbiased, may be negative), k2 = d²/2 (biased, small variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative; GRPO's). Source: J. Schulman, Approximating KL Divergence (2020).
    """
    d = log_probs - reference
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[kind]()


def token_rewards(scores: Float[Tensor, "B"], kl_per_token: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"],
                  beta: float) -> Float[Tensor, "B T"]:
    """-beta · KL at every token of an answer, and the score besides at its last; 0 outside. Source: arXiv:1909.08593 eq. 2."""
    rewards = torch.where(mask, -beta * kl_per_token, 0.0)
    return rewards + last_of(mask) * scores[:, None]


def last_of(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at the last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def gae(rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"], ends: Bool[Tensor, "B T"], gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """(advantages, returns). ends: the last token of an episode, from which nothing that comes later is seen.

        surprise[t] = r[t] + gamma · V[t+1] - V[t],   A[t] = surprise[t] + gamma · lam · A[t+1],   return = A + V

    lam = 0 trusts the critic one step ahead, lam = 1 adds up what really came. A row's last place is an end too.
    Source: arXiv:1506.02438 eq. 16.   Cost: T steps of B numbers.
    """
    advantages, coming, value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        goes_on = ~ends[:, t]
        surprise = rewards[:, t] + gamma * torch.where(goes_on, value, 0.0) - values[:, t]
        coming = surprise + gamma * lam * torch.where(goes_on, coming, 0.0)
        advantages[:, t], value = coming, values[:, t]
    return advantages, advantages + values


def whiten(advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"],
           group: dist.ProcessGroup | None = None) -> Float[Tensor, "B T"]:
    """Mean 0 and variance 1 over the mask, 0 outside. group: over those of all its ranks."""
    inside = advantages[mask].double()
    sums = torch.stack((torch.ones_like(inside).sum(), inside.sum(), inside.square().sum()))
    if group is not None:
        dist.all_reduce(sums, group=group)
    count, mean = sums[0], sums[1] / sums[0]
    std = ((sums[2] - count * mean.square()) / (count - 1)).clamp(min=0).sqrt()
    return torch.where(mask, (advantages - mean) / (std + 1e-8), 0.0).to(advantages.dtype)


def policy_loss(log_probs: Float[Tensor, "B T"], old: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"],
                clip: float = 0.2) -> Float[Tensor, "B T"]:
    """-min(ratio · A, clipped ratio · A), ratio = p / p when sampled: no gain from moving further than 1 ± clip.

    Source: arXiv:1707.06347 eq. 7. The gradient is that of the policy gradient as long as the ratio is 1.
    """
    ratio = torch.exp(log_probs - old)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Float[Tensor, "B T"], old: Float[Tensor, "B T"], returns: Float[Tensor, "B T"],
               clip: float = 0.2) -> Float[Tensor, "B T"]:
    """Half the squared error, or that of the value kept within `clip` of the old one, whichever is larger."""
    kept = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (kept - returns).square()) / 2


@dataclass
class AdaptiveKL:
    """beta, steered so that the measured KL comes to `target` (nats an answer). Source: arXiv:1909.08593 §2.2.

    The paper multiplies by 1 + 0.1 · error a batch; with a horizon, as TRL has it, by 1 + error · answers / horizon.
    """

    beta: float
    target: float
    horizon: int = 10_000

    def update(self, measured: float, answers: int) -> float:
        """The next beta, after a batch of `answers` with this mean KL; the relative error counts up to 20%."""
        error = min(max(measured / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * answers / self.horizon
        return self.beta


# The training

@dataclass(frozen=True)
class Experience(Batch):
    """Sampled answers with all that PPO needs of the moment when they were sampled; every tensor (B, T)."""

    old: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    advantages: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None


@torch.no_grad()
def experience(rollouts: Rollouts, scores: Float[Tensor, "B"], reference: Transformer, critic: Transformer, beta: float,
               gamma: float = 1.0, lam: float = 0.95, group: dist.ProcessGroup | None = None) -> tuple[Experience, float]:
    """What policy and critic learn from, and the mean KL of an answer in nats, which AdaptiveKL wants to know.

    group: of ranks that each have answers of their own; advantages are whitened over all of them.
    scores: of each answer, by a reward model or a program.   critic: a Scorer (reward.py); its score at a token is its
    guess, before the next one is written, of the rewards still to come.
    """
    batch, mask = rollouts.batch, rollouts.batch.targets != IGNORED
    values = critic(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids)[..., 0] * mask
    distance = kl(rollouts.log_probs, log_probs_of(reference, batch)) * mask
    rewards = token_rewards(scores.to(distance), distance, mask, beta)
    advantages, returns = gae(rewards, values, last_of(mask), gamma, lam)
    made = Experience(**vars(batch), old=rollouts.log_probs, values=values, advantages=whiten(advantages, mask, group),
                      returns=returns)
    return made, float(distance.sum(1).mean())


def ppo(clip: float = 0.2) -> Callable[[Tensor, Experience], Tensor]:
    """The loss of the policy's Engine: the sum over the answers' tokens."""
    def loss(logits: Tensor, batch: Experience) -> Tensor:
        found = policy_loss(token_log_probs(logits, batch.targets), batch.old, batch.advantages, clip)
        return found[batch.targets != IGNORED].sum()
    return loss


def critic_loss(clip: float = 0.2) -> Callable[[Tensor, Experience], Tensor]:
    """The loss of the critic's Engine, whose model is a Scorer: the sum over the answers' tokens."""
    def loss(scores: Tensor, batch: Experience) -> Tensor:
        return value_loss(scores[..., 0], batch.values, batch.returns, clip)[batch.targets != IGNORED].sum()
    return loss


def improve(engine: Engine, batch: Batch, epochs: int, rows: int, generator: torch.Generator | None = None) -> list[float]:
    """Several passes over what was sampled, in random minibatches of `rows`. Returns their losses. GRPO can use it too."""
    losses = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(batch.ids), generator=generator).split(rows):
            losses.append(float(engine.forward_backward(batch.take(chosen))))
            engine.clip(engine.config.clip_norm)
            engine.step()
    return losses
