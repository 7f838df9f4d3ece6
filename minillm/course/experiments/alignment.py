"""Lesson 18: one model that answers sums in two manners, and three ways to teach it which one is wanted.

All begin from the course's tuned model, which has learned from people of whom some answer in a sentence. The rule prefers the
right number alone. PPO learns from a reward model, DPO from the same comparisons, GRPO from a program that applies the rule;
and PPO once more from reward models that saw few comparisons, with and without its price for distance.
Measured are the rule's score of sampled answers to questions that nothing was trained on, exact matches of greedy ones, the
reward model's own opinion in standard deviations of the beginning's answers, KL from the beginning in nats an answer, and the
loss on stories. A row also keeps its curves, a number a round, and eight answers. Sources: arXiv:2203.02155; reward models that
are optimised too far, arXiv:2210.10760.
"""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor

from minillm.align.dpo import dpo, with_reference
from minillm.align.grpo import grpo, policy_batch
from minillm.align.pairs import Groups, pair_batch
from minillm.align.ppo import critic_loss, experience, improve, kl, ppo
from minillm.align.reward import Scorer, reward_loss, scores_of
from minillm.align.rollout import Rollouts, log_probs_of, sample
from minillm.config import ModelConfig, TrainConfig
from minillm.course.pretrained import load_course_chat, load_course_model
from minillm.course.pretrained import measure as measure_stories
from minillm.data.instructions import Instruction, Preference, exact_match, instructions, rule_score
from minillm.data.prepare import DataConfig, Prepared
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import TEMPLATES, render

TEMPLATE, KINDS, LONGEST = TEMPLATES["minillm"], ("add",), 16
CONTEXT, SEEDS, DATA = 64, (0, 1, 2), DataConfig(size=60_000)
PLAN = TrainConfig(steps=48, batch_size=64, lr=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0, device="cpu")
ANSWERS, EPOCHS = 128, 2
"""Of a round of PPO and GRPO: answers, and passes over them."""
GROUP = 8
"""Answers to a prompt, for GRPO."""


@dataclass(frozen=True)
class Way:
    """How a row learns: comparisons it has (0: the rule itself, by a program), what a nat of distance costs, its rate."""

    method: str
    pairs: int = 2048
    beta: float = 0.05
    lr: float = 3e-4


WAYS = {"instruction tuning": Way("nothing"), "DPO": Way("dpo", beta=0.1), "PPO": Way("ppo"), "GRPO, a program checks": Way("grpo", pairs=0),
        "PPO, no KL": Way("ppo", beta=0.0), "PPO, 24 comparisons": Way("ppo", pairs=24),
        "PPO, 24 comparisons, no KL": Way("ppo", pairs=24, beta=0.0)}
ROWS = dict.fromkeys(WAYS, load_course_model()[0].config)
PLANS = {row: {"lr": way.lr} for row, way in WAYS.items()}


def tokenizer() -> BPETokenizer:
    """The tuned model's."""
    return load_course_chat()[1]


def questions(seed: int, split: str, count: int) -> list[Instruction]:
    """What is asked."""
    return list(islice(instructions(seed, split, KINDS), count))


def answered(model: Transformer, asked: list[Instruction], seed: int = 0, greedy: bool = False) -> tuple[Rollouts, list[str]]:
    """One answer to each question, as ids and as words."""
    words = tokenizer()
    prompts = [render(TEMPLATE, words, one.messages[:1], prompt=True).ids for one in asked]
    ends = (words.special_tokens[TEMPLATE.end], words.end_of_text)
    rollouts = sample(model.eval(), prompts, LONGEST, ends, generator=torch.Generator().manual_seed(seed), greedy=greedy)
    return rollouts, [words.decode(ids) for ids in rollouts.answers]


@cache
def compared(pairs: int, seed: int) -> Groups:
    """The tuned model's own answers, two to a question, of which somebody who follows the rule with noise preferred one."""
    model, draw, found = load_course_chat()[0], random.Random(f"comparisons {seed}").random, []
    asked = questions(10 + seed, "train", 4 * pairs)
    for at in range(0, len(asked), 256):
        some = asked[at:at + 256]
        first, second = (answered(model, some, 2 * (1000 * seed + at) + which)[1] for which in range(2))
        for one, a, b in zip(some, first, second):
            gap = rule_score(one, a) - rule_score(one, b)
            if a != b:
                a, b = (a, b) if draw() < 1 / (1 + math.exp(-2 * gap)) else (b, a)
                found.append(Preference(one.messages[:1], a, b))
        if len(found) >= pairs:
            break
    return pair_batch(TEMPLATE, tokenizer(), found[:pairs])


@cache
def reward_model(pairs: int, seed: int) -> tuple[Scorer, float, float]:
    """Trained on them, on the tuned model's body; and mean and deviation of its scores of the tuned model's answers."""
    model, batch = load_course_chat()[0], compared(pairs, seed)
    steps = 96 if pairs > 100 else 24
    engine = Engine(Scorer.of(model), replace(PLAN, steps=steps, lr=1e-3, schedule="cosine"), loss=reward_loss)
    order, generator = [], torch.Generator().manual_seed(seed)
    for _ in range(steps):
        order = order or list(torch.randperm(pairs, generator=generator).split(min(32, pairs)))
        chosen = order.pop()
        engine.forward_backward(batch.take(torch.stack((2 * chosen, 2 * chosen + 1), 1).flatten()))
        engine.clip(1.0)
        engine.step()
    scores = scores_of(engine.model.eval(), answered(model, questions(20 + seed, "train", 256))[0].batch)
    return engine.model, float(scores.mean()), float(scores.std())


def opinion(pairs: int, seed: int, rollouts: Rollouts) -> Tensor:
    """What the reward model says of answers, in deviations from what it says of the tuned model's."""
    scorer, mean, deviation = reward_model(pairs, seed)
    return (scores_of(scorer, rollouts.batch) - mean) / deviation


def distance(reference: Transformer, rollouts: Rollouts) -> float:
    """KL from the reference, nats an answer."""
    return float(kl(rollouts.log_probs, log_probs_of(reference, rollouts.batch)).sum(1).mean())


def one_round(way: Way, policy: Engine, critic: Engine | None, reference: Transformer, asked: list[Instruction], seed: int) -> dict[str, float]:
    """Ask, sample, score, improve."""
    rollouts, said = answered(policy.model, asked, seed)
    rules = torch.tensor([rule_score(one, words) for one, words in zip(asked, said)])
    rewards = opinion(way.pairs, seed // 1000, rollouts) if way.pairs else rules
    generator = torch.Generator().manual_seed(seed)
    if critic:
        batch, apart = experience(rollouts, rewards, reference, critic.model.eval(), way.beta)
        improve(critic, batch, EPOCHS, PLAN.batch_size, copy.deepcopy(generator))
    else:
        batch, apart = policy_batch(rollouts, rewards.view(-1, GROUP), reference), distance(reference, rollouts)
    improve(policy, batch, EPOCHS, PLAN.batch_size, generator)
    return {"rule": float(rules.mean()), "reward": float(rewards.mean()), "kl": apart}


def taught(way: Way, config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int,
           watch: Callable[[int, float], None] | None = None) -> tuple[Transformer, dict]:
    """The tuned model after `plan.steps` steps of a method, with its curves."""
    reference, model, curves = load_course_chat()[0].eval(), load_course_chat()[0], {}
    if way.method == "dpo":
        engine = Engine(model, plan, loss=dpo(way.beta))
        batch = with_reference(reference, compared(way.pairs, seed))
        order = torch.randperm(way.pairs, generator=torch.Generator().manual_seed(seed))
        for step in range(plan.steps):
            chosen = order[torch.arange(32 * step, 32 * step + 32) % way.pairs]
            loss = engine.forward_backward(batch.take(torch.stack((2 * chosen, 2 * chosen + 1), 1).flatten()))
            engine.clip(plan.clip_norm)
            engine.step()
            if watch:
                watch(step + 1, float(loss))
    elif way.method in ("ppo", "grpo"):
        policy = Engine(model, plan, loss=ppo() if way.method == "ppo" else grpo(beta=way.beta))
        critic = Engine(copy.deepcopy(reward_model(way.pairs, seed)[0]), replace(plan, lr=1e-3), loss=critic_loss()) if way.method == "ppo" else None
        each = 1 if critic else GROUP
        asking = instructions(30 + seed, "train", KINDS)
        for number in range(plan.steps * PLAN.batch_size // (ANSWERS * EPOCHS)):
            asked = [one for one in islice(asking, ANSWERS // each) for _ in range(each)]
            found = one_round(way, policy, critic, reference, asked, 1000 * seed + number)
            for key, value in found.items():
                curves.setdefault(key, []).append(round(value, 4))
            if watch:
                watch(number + 1, found["reward"])
    return model.eval(), {"curves": curves} if curves else {}


TRAIN = {row: partial(taught, way) for row, way in WAYS.items()}


def measure(model: Transformer, data: Prepared) -> dict[str, float]:
    """On questions that nothing was trained on."""
    asked, reference = questions(0, "test", 512), load_course_chat()[0].eval()
    (rollouts, said), (_, best) = answered(model, asked), answered(model, asked, greedy=True)
    return {"rule": sum(map(rule_score, asked, said)) / len(asked), "exact": sum(map(exact_match, asked, best)) / len(asked),
            "kl": distance(reference, rollouts), "stories": measure_stories(model, tokenizer(), 10)["loss"]}
