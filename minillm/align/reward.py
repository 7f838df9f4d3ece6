"""The reward model: a language model that gives one number instead of the next token, trained on which answer was preferred.

The head is replaced by one with a single row; the score is read at the answer's last token, which has seen everything.
Only differences of scores are ever trained, so their zero is arbitrary. It is a Transformer, so the Engine trains it as any
other. A critic (ppo.py) is the same model, read at every token. Source: arXiv:2203.02155 §3.5 eq. 1.
Left out: tensor ranks, and files.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.align.pairs import Groups
from minillm.align.ppo import last_of
from minillm.config import ModelConfig
from minillm.data.loader import IGNORED, Batch
from minillm.model.transformer import Transformer


class Scorer(Transformer):
    """A decoder with one score at every token: ids (B, T) in, (B, T, 1) out. It begins with the score 0 for everything."""

    def __init__(self, config: ModelConfig, *, seed: int = 0):
        super().__init__(replace(config, tied=False), seed=seed)
        self.head = nn.Linear(config.width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def of(cls, model: Transformer) -> "Scorer":
        """A scorer on a trained model's body: a copy, which leaves the model as it is."""
        scorer = cls(model.config).to(model.embed.weight)
        body = {name: weight for name, weight in model.state_dict().items() if not name.startswith("head.")}
        scorer.load_state_dict(body, strict=False)
        return scorer


def ranking_loss(rewards: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """For K answers to each prompt, the best first: the mean over all K(K-1)/2 pairs of -ln sigmoid(better - worse).

    A prompt's pairs are one target, since they are anything but independent. Cost: K forward passes for K(K-1)/2 pairs.
    Raises: ValueError for fewer than two answers.
    """
    answers = rewards.shape[1]
    if answers < 2:
        raise ValueError(f"{answers} answer to a prompt: at least two are needed to compare.")
    better, worse = torch.triu_indices(answers, answers, 1, device=rewards.device)
    return -F.logsigmoid(rewards[:, better] - rewards[:, worse]).mean(1)


def final_scores(scores: Float[Tensor, "B T 1"], batch: Batch) -> Float[Tensor, "B"]:
    """Each row's score at the answer's last token, which is the one that was the target one place before."""
    return (scores[..., 0] * last_of(batch.targets != IGNORED).roll(1, 1)).sum(1)


def reward_loss(scores: Tensor, batch: Groups) -> Tensor:
    """The Engine's loss: the sum over prompts."""
    return ranking_loss(final_scores(scores, batch).view(-1, batch.group)).sum()


@torch.no_grad()
def scores_of(scorer: Scorer, batch: Batch) -> Float[Tensor, "B"]:
    """The reward of each row of a batch of `pair_batch`, or of rollouts."""
    batch = batch.to(scorer.embed.weight.device)
    return final_scores(scorer(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids), batch)


def preference_accuracy(scorer: Scorer, batch: Groups) -> float:
    """How often the answer that was preferred has a higher score than all others."""
    best, others = scores_of(scorer, batch).view(-1, batch.group).split((1, batch.group - 1), dim=1)
    return float((best > others).all(1).double().mean())
