"""DPO: learn from preferences without a reward model and without sampling, because the policy is one already.

What PPO would make of a reward r is the policy with ln(policy / reference) = r / beta + a constant of the prompt. Read
backwards, every policy has a reward, and in a pair of answers the constant cancels: so train that reward by reward.py's
loss, directly.
Source: arXiv:2305.18290 §4; IPO, arXiv:2310.12036 eq. 17. Left out: many variants (label smoothing, hinge, KTO).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from minillm.align.pairs import Groups
from minillm.align.rollout import log_probs_of
from minillm.model.transformer import Transformer
from minillm.train.loss import token_log_probs


def preference_loss(policy: Float[Tensor, "B 2"], reference: Float[Tensor, "B 2"], beta: float = 0.1,
                    kind: Literal["dpo", "ipo"] = "dpo") -> Float[Tensor, "B"]:
    """The loss of each pair, from the log-probabilities of the chosen and the rejected answer under both models.

    dpo: -ln sigmoid(beta · h), with h = how much more than the reference the policy prefers the chosen one.
    ipo: (h - 1 / (2 · beta))², which stops pushing once h is there, so that a certain pair cannot drive h to infinity.
    TRL divides log-probabilities by the answer's length for IPO; here, as in the paper, they are sums.
    """
    chosen, rejected = (policy - reference).unbind(1)
    h = chosen - rejected
    return -F.logsigmoid(beta * h) if kind == "dpo" else (h - 1 / (2 * beta)).square()


def dpo(beta: float = 0.1, kind: Literal["dpo", "ipo"] = "dpo") -> Callable[[Tensor, Groups], Tensor]:
    """The Engine's loss for batches of `pair_batch` that went through `with_reference`: the sum over pairs."""
    def loss(logits: Tensor, batch: Groups) -> Tensor:
        policy = token_log_probs(logits, batch.targets).sum(1)
        return preference_loss(policy.view(-1, 2), batch.reference.view(-1, 2), beta, kind).sum()
    return loss


def with_reference(reference: Transformer, batch: Groups) -> Groups:
    """The batch with the log-probability of each answer under the reference model, which is asked once and never again."""
    return replace(batch, reference=log_probs_of(reference, batch).sum(1))
