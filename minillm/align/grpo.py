"""GRPO: PPO without a critic. Ask the same question several times, and compare the answers with one another.

The mean reward of a prompt's answers stands in for the critic, which saves a model the size of the policy; every token of an
answer has its advantage. The KL is part of the loss, not of the reward. With rewards that a program checks, no reward
model is needed either. Source: arXiv:2402.03300 §4.1; without 1/σ and lengths (Dr. GRPO) arXiv:2503.20783 §3.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from minillm.align.ppo import kl, policy_loss
from minillm.align.rollout import Rollouts, log_probs_of
from minillm.data.loader import IGNORED, Batch
from minillm.model.transformer import Transformer
from minillm.train.loss import token_log_probs


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Sampled answers: log-probabilities (B, T) when sampled and under the reference model, and each answer's advantage (B,).

    The Engine counts answers, not tokens: the loss is a mean over answers.
    """

    old: Float[Tensor, "B T"] | None = None
    reference: Float[Tensor, "B T"] | None = None
    advantages: Float[Tensor, "B"] | None = None

    @property
    def count(self) -> int:
        """Answers."""
        return len(self.ids)


def group_advantages(rewards: Float[Tensor, "B K"], scaled: bool = True) -> Float[Tensor, "B K"]:
    """How much better each of K answers is than the mean of its prompt's; scaled: in standard deviations (with K - 1, as TRL).

    A prompt whose answers are all right, or all wrong, teaches nothing: 0.   Raises: ValueError for fewer than two answers.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"{rewards.shape[1]} answer to a prompt: at least two are needed to compare.")
    above = rewards - rewards.mean(1, keepdim=True)
    return above / (rewards.std(1, keepdim=True) + 1e-4) if scaled else above


def answer_loss(log_probs: Float[Tensor, "B T"], old: Float[Tensor, "B T"], reference: Float[Tensor, "B T"],
                advantages: Float[Tensor, "B"], mask: Bool[Tensor, "B T"], clip: float = 0.2, beta: float = 0.04,
                length: int | None = None) -> Float[Tensor, "B"]:
    """The loss of each answer: its tokens' clipped policy loss and beta · KL (k3), summed and divided by its length.

    length: divide by this instead, the same for all, so that long wrong answers are not let off lightly (Dr. GRPO).
    """
    per_token = policy_loss(log_probs, old, advantages[:, None].expand_as(log_probs), clip)
    per_token = per_token + beta * kl(log_probs, reference, "k3")
    return (per_token * mask).sum(1) / (length or mask.sum(1).clamp(min=1))


def grpo(clip: float = 0.2, beta: float = 0.04, length: int | None = None) -> Callable[[Tensor, PolicyBatch], Tensor]:
    """The Engine's loss for batches of `policy_batch`: the sum over answers."""
    def loss(logits: Tensor, batch: PolicyBatch) -> Tensor:
        log_probs, mask = token_log_probs(logits, batch.targets), batch.targets != IGNORED
        return answer_loss(log_probs, batch.old, batch.reference, batch.advantages, mask, clip, beta, length).sum()
    return loss


def policy_batch(rollouts: Rollouts, rewards: Float[Tensor, "B K"], reference: Transformer, scaled: bool = True) -> PolicyBatch:
    """What `grpo` learns from: K answers to each of B prompts, one after another, with their rewards."""
    return PolicyBatch(**vars(rollouts.batch), old=rollouts.log_probs, reference=log_probs_of(reference, rollouts.batch),
                       advantages=group_advantages(rewards, scaled).flatten().to(rollouts.log_probs))
