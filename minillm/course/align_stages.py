"""The stages behind `minillm align`, each from files to files: instruction tuning, comparisons, a reward model, a policy.

What they gained is measured by align_gains.py.

    RUN/sft/step-*      the base, tuned on demonstrations          (Trainer)
    RUN/pairs/*.jsonl   its own answers, two to a question, compared by the rule with noise; train and test
    RUN/reward/step-*   a scorer on the tuned model's body, trained on those pairs (Trainer)
    RUN/ppo/step-*      the tuned model, improved: ppo, grpo (Online), or dpo (Trainer, on the pairs)

Every stage goes on from its own newest checkpoint, and returns False when a signal has stopped it early. All run on data ranks too.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch

from minillm.align.dpo import dpo, with_reference
from minillm.align.online import Online
from minillm.align.pairs import Groups, pair_batch
from minillm.align.reward import Scorer, load_scorer, reward_loss, save_scorer, scores_of
from minillm.align.rollout import sample
from minillm.align.sft import ConversationLoader, RowLoader, pack
from minillm.course.judge import prompts_of, stops, words_of
from minillm.data.instructions import (Instruction, asked_in, compare, demonstrations, instructions, preference_row, read_conversations,
                                       read_preferences, rule_score, write_jsonl)
from minillm.engine import choose_device
from minillm.model.huggingface import load_pretrained
from minillm.model.transformer import Transformer
from minillm.progress import bar, say
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import Template, render
from minillm.torch_engine import build_engine
from minillm.train.checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint
from minillm.train.metrics import Metrics
from minillm.trainer import Trainer

TRAIN, PROMPTS, COMPARED, MEASURED = 0, 1, 2, 3
"""Seeds of the questions: of the demonstrations, of the policy's prompts, of the comparisons, and of what align_gains.py measures."""


@dataclass(frozen=True)
class Workshop:
    """What every stage needs: the request of the command line, the base's tokenizer and the template."""

    request: object
    run: Path
    tokenizer: BPETokenizer
    template: Template

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return stops(self.template, self.tokenizer)

    def questions(self, seed: int, split: str) -> Iterator[Instruction]:
        """Instructions of the request's kinds, or those of its file, over and over, in an order that follows from the seed."""
        seed += self.request.seed * 1_000
        if self.request.conversations is None:
            return instructions(seed, split, self.request.kinds)
        asked = asked_in(read_conversations(self.request.conversations), split)
        random.Random(f"order {seed}").shuffle(asked)
        return cycle(asked)

    def talks(self, split: str, count: int) -> list[list[dict[str, str]]]:
        """Conversations to learn from: made, or at most as many from the file."""
        if self.request.conversations is None:
            seed = self.request.seed * 1_000 + TRAIN
            return list(islice(demonstrations(seed, split, self.request.kinds, self.request.wordy, self.request.told, self.request.turns), count))
        return [one.messages for one in asked_in(read_conversations(self.request.conversations), split)[:count]]

    def load(self, folder: Path) -> Transformer:
        """A model, where the training is."""
        return load_pretrained(folder, device=choose_device(self.request.sft.device))

    def load_scorer(self, folder: Path) -> Scorer:
        """A reward model, there too."""
        return load_scorer(folder, device=choose_device(self.request.sft.device)).eval()


def tune(shop: Workshop, base: Path, talk: Callable[[Transformer], dict]) -> bool:
    """Instruction tuning. talk: asked at three points of the training, so that one sees it learn."""
    request, context = shop.request, shop.request.context
    rows = {split: [row for row in (render(shop.template, shop.tokenizer, messages) for messages in shop.talks(split, count))
                    if len(row.ids) - 1 <= context] for split, count in (("train", request.demonstrations), ("test", 256))}
    if not all(rows.values()):
        raise ValueError(f"no conversation fits a context of {context} tokens. Use a longer --context.")
    engine = build_engine(load_pretrained(base), request.sft, request.parallel)
    loader = ConversationLoader(rows["train"], request.sft.batch_size, context, seed=request.sft.seed, rank=engine.rank, ranks=engine.ranks)
    steps = request.sft.steps
    trainer = Trainer(engine, loader, pack(rows["test"], context).split(request.sft.batch_size), shop.run / "sft", tokenizer=shop.tokenizer,
                      at={step: talk for step in {0, max(1, steps // 2), steps}})
    say(f"{shop.run / 'sft'}: {len(rows['train']):,} demonstrations, {loader.rows.count:,} tokens of answers in them, {steps:,} steps of "
        f"{request.sft.batch_size * context:,} tokens")
    return trainer.train(resume=latest_checkpoint(shop.run / "sft"))


def compare_answers(shop: Workshop, tuned: Path) -> bool:
    """Let the tuned model answer questions twice, and prefer one of each two by the rule, with noise."""
    if shop.request.preferences is not None:
        return _given_pairs(shop)
    model = shop.load(tuned).eval()
    with bar("compare", total=shop.request.pairs + shop.request.held_out_pairs, unit="pair") as moving:
        for split, count in (("train", shop.request.pairs), ("test", shop.request.held_out_pairs)):
            found = []
            for pair in islice(_pairs(shop, model, split), count):
                found.append(preference_row(pair) | {"probability": round(pair.probability, 4)})
                moving.update(1)
            write_jsonl(shop.run / "pairs" / f"{split}.jsonl", found)
    return True


def _given_pairs(shop: Workshop) -> bool:
    """The comparisons of the request's file: those whose prompt a hash keeps for the test, and the others."""
    found = {"train": [], "test": []}
    for pair in read_preferences(shop.request.preferences):
        asked = Instruction("file", "", "", json.dumps(pair.prompt, ensure_ascii=False))
        found["test" if asked.held_out else "train"].append(preference_row(pair))
    for split, rows in found.items():
        if not rows:
            raise ValueError(f"{shop.request.preferences} has no comparison for the split {split!r}, which a hash of the prompt decides: use more.")
        write_jsonl(shop.run / "pairs" / f"{split}.jsonl", rows)
    return True


def _pairs(shop: Workshop, model: Transformer, split: str, at_once: int = 128):
    """Comparisons of two answers that are not the same. Raises: ValueError when the model hardly ever gives two."""
    questions, draw = shop.questions(COMPARED, split), random.Random(f"comparisons {shop.request.seed} {split}").random
    generator = torch.Generator(model.embed.weight.device).manual_seed(shop.request.seed)
    asked = found = 0
    while True:
        chosen = list(islice(questions, at_once))
        twice = [prompt for prompt in prompts_of(shop.template, shop.tokenizer, chosen) for _ in range(2)]
        words = words_of(shop.tokenizer, sample(model, twice, shop.request.online.max_new_tokens, shop.ends, generator=generator))
        different = [(one, *pair) for one, pair in zip(chosen, zip(words[::2], words[1::2])) if pair[0] != pair[1]]
        asked, found = asked + at_once, found + len(different)
        if asked >= 20 * at_once and found < asked / 100:
            raise ValueError(f"of {asked:,} questions only {found} had two different answers, so there is nothing to compare: the tuned "
                             f"model is sure of everything. Tune it for fewer steps, or on harder kinds.")
        for one, first, second in different:
            yield compare(one, first, second, draw)


def batch_of_pairs(shop: Workshop, split: str) -> Groups:
    """The comparisons as one batch."""
    return pair_batch(shop.template, shop.tokenizer, read_preferences(shop.run / "pairs" / f"{split}.jsonl"))


def train_reward_model(shop: Workshop, tuned: Path) -> bool:
    """The reward model, on the tuned model's body."""
    return _on_pairs(shop, "reward", shop.request.reward, Scorer.of(shop.load(tuned)), reward_loss, lambda batch: batch,
                     save_model=save_scorer, load_model=load_scorer)


def train_dpo(shop: Workshop, tuned: Path) -> bool:
    """DPO from the same pairs; the reference's log-probabilities are worked out once, before."""
    reference = shop.load(tuned).eval()
    return _on_pairs(shop, "dpo", shop.request.dpo, shop.load(tuned), dpo(shop.request.online.beta), partial(with_reference, reference))


def _on_pairs(shop: Workshop, name: str, train, model: Transformer, loss, change: Callable[[Groups], Groups], **files) -> bool:
    """Training on comparisons with the Trainer."""
    engine = build_engine(model, train, shop.request.parallel, loss=loss)
    pairs, held_out = (change(batch_of_pairs(shop, which)) for which in ("train", "test"))
    loader = RowLoader(pairs, train.batch_size, group=2, seed=train.seed, rank=engine.rank, ranks=engine.ranks)
    say(f"{shop.run / name}: {pairs.count:,} comparisons, {train.steps:,} steps of {train.batch_size // 2}")
    return Trainer(engine, loader, held_out.split(train.batch_size), shop.run / name, tokenizer=shop.tokenizer,
                   **files).train(resume=latest_checkpoint(shop.run / name))


def improve_policy(shop: Workshop, tuned: Path, judge_of: Path | None, stop: Callable[[], bool]) -> bool:
    """PPO or GRPO: rounds of asking and learning. judge_of: the reward model's files; without one the reward is the rule itself,
    which a program checks."""
    request, scorer = shop.request, judge_of and shop.load_scorer(judge_of)
    config, folder = request.online, shop.run / request.method
    critic = copy.deepcopy(scorer) if request.method == "ppo" else None

    def reward(asked, rollouts):
        if scorer is not None:
            return scores_of(scorer, rollouts.batch)
        return torch.tensor([rule_score(one, words) for one, words in zip(asked, words_of(shop.tokenizer, rollouts))])

    online = Online(shop.load(tuned), shop.load(tuned), reward, shop.ends, config, request.policy, request.parallel,
                    critic=critic, critic_train=replace(request.policy, lr=request.critic_lr))
    if newest := latest_checkpoint(folder):
        online.policy.load_weights(shop.load(newest).state_dict())
        online.load_state_dict(load_checkpoint(newest).tensors)
    engine = online.policy
    metrics = Metrics(folder / "metrics.jsonl", resume_at=online.rounds_done) if engine.first else None
    say(f"{folder}: {config.rounds:,} rounds of {config.prompts} prompts with {config.answers} answers each")
    questions = islice(shop.questions(PROMPTS, "train"), online.rounds_done * config.prompts, None)
    with bar(request.method, total=config.rounds, unit="round", start=online.rounds_done) as moving, closing(metrics) if metrics else nullcontext():
        while online.rounds_done < config.rounds and not (stopped := engine.any_rank(stop())):
            asked = list(islice(questions, config.prompts))
            found = online.round(prompts_of(shop.template, shop.tokenizer, asked), asked)
            if metrics:
                metrics.write(online.rounds_done, **found)
            moving.set_postfix_str(f"reward {found['reward']:.3f}, KL {found['kl']:.2f} nats")
            moving.update(1)
            if online.rounds_done % request.policy.checkpoint_every == 0 or online.rounds_done == config.rounds:
                _save(shop, online, folder)
    if online.rounds_done < config.rounds and stopped:
        _save(shop, online, folder)
    return online.rounds_done >= config.rounds


def _save(shop: Workshop, online: Online, folder: Path) -> None:
    """A checkpoint of this round."""
    engine = online.policy
    whole = (engine.whole_model(), online.state_dict()) if engine.saves else ()

    def write():
        notes = {"step": online.rounds_done, "online": asdict(online.config), "train": asdict(engine.config), "model": asdict(engine.model.config)}
        save_checkpoint(folder / f"step-{online.rounds_done:06d}", whole[0], whole[1], notes, shop.tokenizer.save)
        prune(folder, engine.config.keep)
    engine.on_first(write)
