"""PPO for language models, as pure functions: the reward of each token, advantages, and the two clipped losses.

An answer is an episode, a token an action. The reward model's score comes with the last token; every token pays for leaving the
reference model (KL), so the policy cannot wander off to where the reward model was never right. A critic predicts what is
still to come, and its surprise is the advantage. Sources: arXiv:1707.06347; for language models arXiv:1909.08593 §2 and
arXiv:2203.02155 §3.5. All losses are per token; the caller adds up and divides, as the Engine does. Left out: the loop
over rollouts (rollout.py samples them), and InstructGPT's share of pretraining gradients.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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


def whiten(advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Mean 0 and variance 1 over the mask, 0 outside."""
    inside = advantages[mask]
    return torch.where(mask, (advantages - inside.mean()) / (inside.std() + 1e-8), 0.0)


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
