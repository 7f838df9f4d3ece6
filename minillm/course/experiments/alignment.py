"""Lesson 18: one model that answers sums in two manners, and what teaches it which one is wanted.

All rows begin from the course's tuned model, which has learned from writers of whom one in four answers in a sentence. The rule
prefers the right number alone. PPO and GRPO learn from a reward model, DPO from the comparisons that it was trained on, and
GRPO once more from a program that applies the rule; then PPO from a reward model that saw few comparisons; each with and without a price
for distance. Measured are the rule's score of sampled answers to questions that nothing was trained on, exact matches of greedy
ones, the opinion of the reward model that the row learned from, in standard deviations of what it says of the tuned model's answers,
and KL in nats an answer. A row keeps its curves, a number a round, and some answers. Sources: arXiv:2203.02155 §3.5; rewards that
are optimised too far, arXiv:2210.10760.

What came out, by the rule: 1.40 before, 1.56 with DPO, 1.63 PPO, 1.66 GRPO with a program, 1.47 GRPO with the reward model (which
knows the manner and no sums; without the division by the deviation it was 1.58 with two seeds). Without KL 1.00, although that reward model is
more content (+0.63) than with KL (+0.57); with 24 comparisons 0.65 without KL (+0.40) and 1.56 with it (+0.29).
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor

from minillm.align.dpo import dpo, with_reference
from minillm.align.online import Online, OnlineConfig
from minillm.align.pairs import Groups, pair_batch
from minillm.align.reward import Scorer, preference_accuracy, reward_loss, scores_of
from minillm.align.rollout import Rollouts, sample
from minillm.align.sft import RowLoader
from minillm.config import ModelConfig, TrainConfig
from minillm.course.experiments import drive
from minillm.course.judge import judge, prompts_of, stops, words_of
from minillm.course.pretrained import load_course_chat
from minillm.data.instructions import Instruction, compare, instructions, rule_score
from minillm.data.prepare import DataConfig, Prepared
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import TEMPLATES

TEMPLATE, KINDS, LONGEST = TEMPLATES["minillm"], ("add",), 16
CONTEXT, SEEDS, DATA = 64, (0, 1, 2), DataConfig(size=60_000)
PLAN = TrainConfig(steps=80, batch_size=64, warmup_steps=5, weight_decay=0.0, device="cpu")
JUDGE = replace(PLAN, steps=60, lr=5e-3, optimizer="muon", warmup_steps=10)
"""How reward models are trained; those with few comparisons for a third of the steps."""
ASKING = OnlineConfig(prompts=32, answers=4, epochs=2, max_new_tokens=LONGEST)
"""A round of PPO or GRPO: four optimizer steps."""


@dataclass(frozen=True)
class Way:
    """How a row learns: from how many comparisons (0: a program applies the rule), what a nat of distance costs, at what rate."""

    method: str
    pairs: int = 2048
    beta: float = 0.5
    lr: float = 1e-4


WAYS = {"instruction tuning": Way("nothing", pairs=0), "DPO": Way("dpo", beta=2.0, lr=5e-5), "PPO": Way("ppo"), "GRPO": Way("grpo"),
        "GRPO, a program checks": Way("grpo", pairs=0, beta=0.05), "PPO, no KL": Way("ppo", beta=0.0),
        "PPO, 24 comparisons": Way("ppo", pairs=24, lr=2e-4), "PPO, 24 comparisons, no KL": Way("ppo", pairs=24, beta=0.0, lr=2e-4)}
ROWS = dict.fromkeys(WAYS, load_course_chat()[0].config)
PLANS = {row: {"lr": way.lr} for row, way in WAYS.items()}


def tokenizer() -> BPETokenizer:
    """The tuned model's."""
    return load_course_chat()[1]


def questions(seed: int, split: str, count: int) -> list[Instruction]:
    """What is asked."""
    return list(islice(instructions(seed, split, KINDS), count))


def answered(model: Transformer, asked: Sequence[Instruction], seed: int) -> Rollouts:
    """One sampled answer to each question."""
    words = tokenizer()
    return sample(model.eval(), prompts_of(TEMPLATE, words, asked), LONGEST, stops(TEMPLATE, words), generator=torch.Generator().manual_seed(seed))


@cache
def compared(pairs: int, seed: int, split: str = "train") -> tuple[Groups, float]:
    """The tuned model's own answers, two to a question, of which somebody who follows the rule with noise preferred one; and how
    often one who knows the rule would have said the same."""
    model, words, draw, found = load_course_chat()[0], tokenizer(), random.Random(f"comparisons {seed}").random, []
    asking, at = instructions(1000 + seed, split, KINDS), 0
    while len(found) < pairs:
        asked = list(islice(asking, min(2 * pairs, 512)))
        first, second = (words_of(words, answered(model, asked, 1_000_000 * seed + at + which)) for which in range(2))
        found += [compare(one, a, b, draw) for one, a, b in zip(asked, first, second) if a != b]
        at += 2
    found = found[:pairs]
    return pair_batch(TEMPLATE, words, found), sum(max(pair.probability, 1 - pair.probability) for pair in found) / pairs


@cache
def reward_model(pairs: int, seed: int) -> tuple[Scorer, float, float]:
    """A scorer on the tuned model's body, trained on these; and mean and deviation of its scores of the tuned model's answers."""
    model = load_course_chat()[0]
    plan = replace(JUDGE, steps=JUDGE.steps if pairs > 100 else JUDGE.steps // 3, batch_size=min(JUDGE.batch_size, 2 * pairs))
    loader = RowLoader(compared(pairs, seed)[0], plan.batch_size, group=2, seed=seed)
    scorer = drive(Engine(Scorer.of(model), plan, loss=reward_loss), loader)
    scores = scores_of(scorer, answered(model, questions(2000 + seed, "train", 512), seed).batch)
    return scorer, float(scores.mean()), float(scores.std())


def opinion(pairs: int, seed: int, rollouts: Rollouts) -> Tensor:
    """What a reward model says of answers, in deviations from its mean over the tuned model's."""
    scorer, mean, deviation = reward_model(pairs, seed)
    return (scores_of(scorer, rollouts.batch) - mean) / deviation


def learn_from_pairs(way: Way, model: Transformer, plan: TrainConfig, seed: int, watch: Callable[[int, float], None]) -> None:
    """DPO."""
    loader = RowLoader(with_reference(load_course_chat()[0], compared(way.pairs, seed)[0]), plan.batch_size, group=2, seed=seed)
    drive(Engine(model, plan, loss=dpo(way.beta)), loader, watch)


def learn_from_rewards(way: Way, model: Transformer, plan: TrainConfig, seed: int, watch: Callable[[int, float], None]) -> dict[str, list[float]]:
    """PPO or GRPO. Returns the curves: before each round, of its answers."""
    words, curves = tokenizer(), {"rule": [], "reward": [], "kl": []}

    def reward(asked: Sequence[Instruction], rollouts: Rollouts) -> Tensor:
        rules = torch.tensor([rule_score(one, answer) for one, answer in zip(asked, words_of(words, rollouts))])
        curves["rule"].append(round(float(rules.mean()), 4))
        return opinion(way.pairs, seed, rollouts) if way.pairs else rules

    config = replace(ASKING, rounds=plan.steps // replace(ASKING, rounds=1).steps(plan.batch_size), beta=way.beta, seed=seed)
    critic = copy.deepcopy(reward_model(way.pairs, seed)[0]) if way.method == "ppo" else None
    online = Online(model, load_course_chat()[0], reward, stops(TEMPLATE, words), config, plan, critic=critic, critic_train=replace(plan, lr=1e-3))
    asking = instructions(3000 + seed, "train", KINDS)
    for number in range(1, config.rounds + 1):
        asked = list(islice(asking, config.prompts))
        found = online.round(prompts_of(TEMPLATE, words, asked), asked)
        for name in ("reward", "kl"):
            curves[name].append(round(found[name], 4))
        watch(number, found["reward"])
    return curves


def taught(way: Way, config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int,
           watch: Callable[[int, float], None] = lambda step, loss: None) -> tuple[Transformer, dict]:
    """The tuned model after `plan.steps` steps of a method; and its curves, twelve answers, and what its reward model says of it and is worth."""
    model, noted = load_course_chat()[0], {}
    if way.method == "dpo":
        learn_from_pairs(way, model, plan, seed, watch)
    elif way.method in ("ppo", "grpo"):
        noted["curves"] = learn_from_rewards(way, model, plan, seed, watch)
    asked = questions(0, "test", 512)
    rollouts = answered(model, asked, 0)
    if way.pairs and noted:
        held_out, best = compared(512, seed, "test")
        noted |= {"reward": round(float(opinion(way.pairs, seed, rollouts).mean()), 4), "best accuracy": round(best, 4),
                  "accuracy": round(preference_accuracy(reward_model(way.pairs, seed)[0], held_out), 4)}
    noted["answers"] = {one.question: said for one, said in zip(asked[:12], words_of(tokenizer(), rollouts))}
    return model.eval(), noted


TRAIN = {row: partial(taught, way) for row, way in WAYS.items()}


def measure(model: Transformer, data: Prepared) -> dict[str, float]:
    """On questions that nothing was trained on."""
    found = judge(model, tokenizer(), TEMPLATE, questions(0, "test", 512), LONGEST, reference=load_course_chat()[0])
    alone = sum(" " not in answer for answer in found.answers) / len(found.answers)
    return {"rule": found.rule, "exact": found.exact_match, "alone": alone, "kl": found.kl}
