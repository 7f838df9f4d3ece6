"""How good answers are, on instructions that no stage has seen: exact match, the rule's score, a reward model's, KL, win rate.

Greedy answers say what a model knows; sampled ones say what it does, and they are what rewards have changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minillm.align.online import distance_from
from minillm.align.reward import Scorer, scores_of
from minillm.align.rollout import Rollouts, sample
from minillm.data.instructions import Instruction, exact_match, rule_score
from minillm.model.transformer import Transformer
from minillm.text.chat import Template, render

SEED = 777
"""Of the sampled answers."""


@dataclass(frozen=True)
class Judged:
    """Means over the instructions; rules has the rule's score of each sampled answer, for `win_rate`."""

    exact_match: float
    rule: float
    finished: float
    kl: float | None
    reward: float | None
    rules: list[float]
    answers: list[str]

    def numbers(self) -> dict[str, float]:
        """The means, rounded, without those that were not asked for."""
        values = {name: getattr(self, name) for name in ("exact_match", "rule", "reward", "kl", "finished")}
        return {name: round(value, 4) for name, value in values.items() if value is not None}


def prompts_of(template: Template, tokenizer, asked: Sequence[Instruction]) -> list[list[int]]:
    """Each instruction as ids that end where the answer begins."""
    return [render(template, tokenizer, one.messages[:-1], prompt=True).ids for one in asked]


def stops(template: Template, tokenizer) -> tuple[int, ...]:
    """Where an answer ends: the template's end of a turn, or the end of the text."""
    return tokenizer.special_tokens[template.end], tokenizer.end_of_text


def words_of(tokenizer, rollouts: Rollouts) -> list[str]:
    """The answers as text."""
    return [tokenizer.decode(ids) for ids in rollouts.answers]


def judge(model: Transformer, tokenizer, template: Template, asked: Sequence[Instruction], max_new_tokens: int, *,
          reference: Transformer | None = None, scorer: Scorer | None = None) -> Judged:
    """Ask everything twice, greedily and by sampling. reference: for the KL.   scorer: for its reward."""
    model.eval()
    prompts, ends = prompts_of(template, tokenizer, asked), stops(template, tokenizer)
    greedy = words_of(tokenizer, sample(model, prompts, max_new_tokens, ends, greedy=True))
    generator = torch.Generator(model.embed.weight.device).manual_seed(SEED)
    drawn = sample(model, prompts, max_new_tokens, ends, generator=generator)
    answers = words_of(tokenizer, drawn)
    rules = [rule_score(one, answer) for one, answer in zip(asked, answers)]
    return Judged(exact_match=_mean(exact_match(one, answer) for one, answer in zip(asked, greedy)), rule=_mean(rules),
                  finished=_mean(drawn.finished), kl=None if reference is None else distance_from(reference, drawn),
                  reward=None if scorer is None else float(scores_of(scorer.eval(), drawn.batch).mean()),
                  rules=rules, answers=answers)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How often our answer to a question has the higher score; equal ones count half."""
    return _mean((a > b) + (a == b) / 2 for a, b in zip(ours, theirs, strict=True))


def _mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)
