"""The outer loop of learning from rewards: ask, sample, score, improve; with a critic (PPO) or without (GRPO).

dpo.py and reward.py learn from answers that are there, as pretraining does, and the Trainer drives them. Here the policy writes
what it learns from, and every round begins with its newest weights. A reward is any function of what was asked and answered:
a reward model, or a program that checks. On data-parallel ranks each one asks its share of a round's prompts; the Engines
sum the gradients, and advantages are whitened over all. Everything random follows from (seed, round, rank), so a run that
was stopped goes on as if it had not been. Left out: sampling on other machines than those that learn, and answers that are
a round old.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.align.grpo import grpo, policy_batch
from minillm.align.ppo import AdaptiveKL, critic_loss, experience, improve, kl, ppo
from minillm.align.reward import Scorer
from minillm.align.rollout import Rollouts, log_probs_of, sample
from minillm.config import ParallelConfig, TrainConfig
from minillm.data.loader import IGNORED
from minillm.model.transformer import Transformer
from minillm.torch_engine import build_engine

Reward = Callable[[Sequence[Any], Rollouts], Tensor]
"""(what was asked, one for each answer; the answers) -> a score for each answer (B,)."""


@dataclass(frozen=True)
class OnlineConfig:
    """How a policy learns from rewards for its own answers."""

    rounds: int = 12
    """How often it is asked, and improved."""
    prompts: int = 64
    """Prompts of a round, over all ranks."""
    answers: int = 4
    """Answers to each prompt."""
    epochs: int = 2
    """Passes over a round's answers, in minibatches of --policy.batch-size."""
    max_new_tokens: int = 16
    """Where an answer is cut off."""
    beta: float = 0.1
    """What a nat of distance from the reference costs; PPO takes it off the reward, GRPO adds it to the loss."""
    target_kl: float | None = None
    """PPO: steer beta so that an answer's KL comes to this many nats; None leaves it."""
    clip: float = 0.2
    """How far the probability ratio may move and still gain."""
    scaled: bool = True
    """GRPO: advantages in standard deviations of a prompt's rewards; not for rewards that differ by noise (Dr. GRPO)."""
    lam: float = 0.95
    """GAE: how much of what really came is counted, against the critic's guess."""
    seed: int = 0
    """Seed of the answers and of the minibatches."""

    def __post_init__(self):
        """Refuse what cannot work."""
        for name in ("rounds", "prompts", "answers", "epochs", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of all rounds. Raises: ValueError when a round's answers do not divide into minibatches."""
        written = self.prompts * self.answers
        if written % batch_size:
            raise ValueError(f"{self.prompts} prompts with {self.answers} answers each make {written}, which do not divide into "
                             f"minibatches of {batch_size}.")
        return self.rounds * self.epochs * (written // batch_size)


class Online:
    """A policy, and for PPO its critic, each with an Engine; `round` takes them one step of the outer loop further.

    reference: the model that KL is measured from; it stays as it is.   critic: a Scorer to begin with (a copy of the reward model
    is usual), and then the method is PPO; without one it is GRPO.   train, critic_train: how the two are trained; their steps are those of all rounds.
    Raises: ValueError for a layout in which no rank has the whole policy, or prompts and minibatches that do not divide.
    """

    def __init__(self, policy: Transformer, reference: Transformer, reward: Reward, stop_ids: Collection[int],
                 config: OnlineConfig, train: TrainConfig, parallel: ParallelConfig = ParallelConfig(), *,
                 critic: Scorer | None = None, critic_train: TrainConfig | None = None):
        if parallel.tp > 1 or parallel.pp > 1 or parallel.zero == 3 or parallel.engine == "torch":
            raise ValueError(f"tp = {parallel.tp}, pp = {parallel.pp}, zero = {parallel.zero}, engine = {parallel.engine!r}: to sample, every "
                             f"rank needs the whole policy. Use dp alone, with zero = 2 of our engine at most.")
        if config.prompts % parallel.dp or train.batch_size % parallel.dp:
            raise ValueError(f"{config.prompts} prompts and minibatches of {train.batch_size} do not divide over {parallel.dp} ranks.")
        if critic is None and (config.answers < 2 or config.target_kl is not None):
            raise ValueError(f"answers = {config.answers}, target_kl = {config.target_kl} without a critic: GRPO compares two or more "
                             f"answers to a prompt, and its beta is fixed.")
        config.steps(train.batch_size)
        self.config, self.reference, self.reward, self.stop_ids = config, reference, reward, tuple(stop_ids)
        loss = ppo(config.clip) if critic else grpo(config.clip, config.beta)
        self.policy = build_engine(policy, train, parallel, loss=loss)
        self.critic = build_engine(critic, critic_train or train, parallel, loss=critic_loss(config.clip)) if critic else None
        self.beta = AdaptiveKL(config.beta, config.target_kl or 1.0)
        self.rounds_done = 0
        self.reference.to(self.policy.device).eval()

    def round(self, prompts: Sequence[list[int]], asked: Sequence[Any]) -> dict[str, float]:
        """Ask all of a round's prompts (a rank takes its share), and learn. asked: what `reward` is told of each prompt.

        Returns the means over all answers: reward, kl (nats an answer), length, finished; the losses; seconds by part.
        Raises: ValueError for another number of prompts than the configuration says.
        """
        if len(prompts) != self.config.prompts or len(asked) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(asked)} askers, and a round has {self.config.prompts}.")
        config, engine, clock = self.config, self.policy, _Clock()
        mine = range(engine.rank, len(prompts), engine.ranks)
        repeated = [number for number in mine for _ in range(config.answers)]
        engine.model.eval()
        rollouts = sample(engine.model, [prompts[number] for number in repeated], config.max_new_tokens, self.stop_ids,
                          generator=self._generator(engine.device, 0))
        clock.lap("generate")
        scores = self.reward([asked[number] for number in repeated], rollouts).to(engine.device)
        batch, distance = self._learned_from(rollouts, scores)
        clock.lap("score")
        losses = improve(engine, batch, config.epochs, engine.config.batch_size // engine.ranks, self._generator("cpu", 1))
        found = {"loss": sum(losses) / len(losses)}
        if self.critic:
            losses = improve(self.critic, batch, config.epochs, engine.config.batch_size // engine.ranks, self._generator("cpu", 1))
            found["critic_loss"] = sum(losses) / len(losses)
        clock.lap("update")
        lengths = sum(map(len, rollouts.answers))
        found |= self._means({"reward": float(scores.mean()), "kl": distance, "length": lengths / len(repeated),
                              "finished": sum(rollouts.finished) / len(repeated)})
        found["beta"] = self.beta.beta
        if config.target_kl is not None:
            self.beta.update(found["kl"], config.prompts * config.answers)
        self.rounds_done += 1
        return found | {"tokens": round(found["length"] * config.prompts * config.answers), **clock.laps}

    def state_dict(self) -> dict[str, Tensor]:
        """All that going on needs beside the policy's weights; every rank with a part in it (`policy.saves`) must ask."""
        tensors = self.policy.state_dict() | {"rounds_done": torch.tensor(self.rounds_done), "beta": torch.tensor(self.beta.beta, dtype=torch.float64)}
        if self.critic:
            tensors |= {f"critic.{name}": value for name, value in self.critic.state_dict().items()}
            tensors |= {f"critic:{name}": value.detach().cpu().clone() for name, value in self.critic.whole_model().state_dict().items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave; the policy's weights are loaded by `policy.load_weights`."""
        self.rounds_done, self.beta.beta = int(tensors["rounds_done"]), float(tensors["beta"])
        if self.critic:
            self.critic.load_weights({name[7:]: value for name, value in tensors.items() if name.startswith("critic:")})
            self.critic.load_state_dict({name[7:]: value for name, value in tensors.items() if name.startswith("critic.")})
        own = ("critic.", "critic:", "rounds_done", "beta")
        self.policy.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(own)})

    def _learned_from(self, rollouts: Rollouts, scores: Tensor):
        """The method's batch, and the mean KL of an answer."""
        if self.critic:
            self.critic.model.eval()
            return experience(rollouts, scores, self.reference, self.critic.model, self.beta.beta, lam=self.config.lam,
                              group=self.policy.group)
        return (policy_batch(rollouts, scores.view(-1, self.config.answers), self.reference, self.config.scaled),
                distance_from(self.reference, rollouts))

    def _generator(self, device, use: int) -> torch.Generator:
        """Random numbers of this round and rank, for the answers (0) or the minibatches (1)."""
        seed = ((self.config.seed * 100_003 + self.rounds_done) * 1_009 + self.policy.rank) * 2 + use
        return torch.Generator(device).manual_seed(seed)

    def _means(self, mine: dict[str, float]) -> dict[str, float]:
        """Means over the ranks, all of which have as many answers."""
        if self.policy.group is None:
            return mine
        values = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.policy.device)
        dist.all_reduce(values, group=self.policy.group)
        return dict(zip(mine, (values / self.policy.ranks).tolist()))


class _Clock:
    """Seconds of each part of a round."""

    def __init__(self):
        self.last, self.laps = time.perf_counter(), {}

    def lap(self, part: str) -> None:
        """The part that ends now."""
        now = time.perf_counter()
        self.laps[f"seconds_{part}"], self.last = round(now - self.last, 4), now


def distance_from(reference: Transformer, rollouts: Rollouts) -> float:
    """KL(policy ‖ reference) of an answer in nats, estimated on answers that the policy sampled: their mean k1."""
    apart = kl(rollouts.log_probs, log_probs_of(reference, rollouts.batch)) * (rollouts.batch.targets != IGNORED)
    return float(apart.sum(1).mean())
