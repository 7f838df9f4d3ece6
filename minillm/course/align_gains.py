"""What the stages of `minillm align` have gained, measured on what none of them has seen; align_stages.py has the stages.

Every number is in alignment.json, in the run's metrics.jsonl and in the report.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from minillm.align.reward import Scorer, preference_accuracy, scores_of
from minillm.align.rollout import log_probs_of, sample
from minillm.align.sft import pad_rows
from minillm.course.align_stages import MEASURED, Workshop, batch_of_pairs
from minillm.course.judge import judge, prompts_of, win_rate, words_of
from minillm.data.instructions import demonstrations, read_preferences
from minillm.data.loader import evaluation_batches
from minillm.data.prepare import open_prepared
from minillm.model.transformer import Transformer
from minillm.progress import say
from minillm.text.chat import render
from minillm.train.checkpoint import latest_checkpoint
from minillm.train.loss import cross_entropy
from minillm.train.metrics import read_metrics

QUESTIONS, SHOWN = 256, 6
"""Held-out questions that a model is measured on, and those whose answers are kept to be read."""


def gain(shop: Workshop, name: str, base: Path, newest: dict[str, Callable[[], Path]]) -> dict:
    """What a stage that has ended gained, measured on what it has not seen."""
    if name == "pairs":
        train, test = (read_preferences(shop.run / "pairs" / f"{split}.jsonl") for split in ("train", "test"))
        found = {"comparisons": len(train), "held_out": len(test)}
        if shop.request.preferences is None:  # else nobody knows how sure those were who preferred
            found["best_accuracy"] = round(sum(max(pair.probability, 1 - pair.probability) for pair in test) / len(test), 4)
        return found
    if name == "reward":
        return judge_reward_model(shop, shop.load_scorer(newest["reward"]())) | pace(shop.run / name)
    asked = list(islice(shop.questions(MEASURED, "test"), QUESTIONS))
    look = partial(judge, tokenizer=shop.tokenizer, template=shop.template, asked=asked, max_new_tokens=shop.request.online.max_new_tokens)
    if name == "sft":
        before, after, more = look(shop.load(base)), look(shop.load(newest["sft"]())), {}
    else:
        tuned, scorer = shop.load(newest["sft"]()), latest_checkpoint(shop.run / "reward")
        scorer = scorer and shop.load_scorer(scorer)
        before, after = (look(model, reference=tuned, scorer=scorer) for model in (tuned, shop.load(newest[name]())))
        more = {"win_rate": round(win_rate(after.rules, before.rules), 4)}
    kept = {"before": kept_losses(shop, base if name == "sft" else newest["sft"]()), "after": kept_losses(shop, newest[name]())}
    return more | pace(shop.run / name) | {when: judged.numbers() | kept[when] for when, judged in (("before", before), ("after", after))} | {
        "answers": {"question": [one.question for one in asked[:SHOWN]], "right": [one.answer for one in asked[:SHOWN]],
                    "before": before.answers[:SHOWN], "after": after.answers[:SHOWN]}}


def pace(folder: Path) -> dict[str, float]:
    """Medians of a stage's own metrics: tokens a second of its rows, or what the parts of a round take."""
    records, found = read_metrics(folder / "metrics.jsonl"), {}
    for key in ("tokens_per_second", "seconds_generate", "seconds_score", "seconds_update"):
        if values := [record[key] for record in records if key in record]:
            found[key] = median(values)
    return found


@torch.no_grad()
def kept_losses(shop: Workshop, folder: Path, rows: int = 64) -> dict[str, float]:
    """What is left of the fluency that the model had, in nats a token: on held-out stories that it is asked to tell (told_loss), and
    on the text of its pretraining as it stands there (text_loss), where the run has it."""
    model, found = shop.load(folder).eval(), {}
    if shop.request.told and shop.request.conversations is None:
        told = islice(demonstrations(shop.request.seed * 1_000 + MEASURED, "test", shop.request.kinds, told=1.0), rows)
        batch = pad_rows([render(shop.template, shop.tokenizer, talk) for talk in told])
        found["told_loss"] = -float(log_probs_of(model, batch).sum()) / batch.count
    if (shop.run / "data" / "data.json").exists():
        batch = next(evaluation_batches(open_prepared(shop.run / "data").val, rows, model.config.context)).to(model.embed.weight.device)
        found["text_loss"] = float(cross_entropy(model(batch.ids), batch.targets)) / batch.count
    return {name: round(value, 4) for name, value in found.items()}


def talker(shop: Workshop, count: int = 3) -> Callable[[Transformer], dict]:
    """For the Trainer's `at`: lets the model answer a few held-out questions, and shows them."""
    asked = list(islice(shop.questions(MEASURED, "test"), count))

    def talk(model: Transformer) -> dict:
        prompts = prompts_of(shop.template, shop.tokenizer, asked)
        words = words_of(shop.tokenizer, sample(model.eval(), prompts, shop.request.online.max_new_tokens, shop.ends, greedy=True))
        say("\n" + "\n".join(f"  {one.question}  ->  {answer!r}" for one, answer in zip(asked, words)) + "\n")
        return {"answers": words}
    return talk


def calibration_error(probabilities: torch.Tensor, bins: int = 5) -> float:
    """Expected calibration error of pairwise predictions. probabilities (N,): given to what was really preferred.

    A prediction of 0.2 for it was a certainty of 0.8 in the other, and wrong. Within bins of certainty from 0.5 to 1, the
    distance between the mean certainty and the share of right ones, weighted by their number. Source: arXiv:1706.04599 §2.
    """
    certainty, right = torch.maximum(probabilities, 1 - probabilities), (probabilities > 0.5).double()
    which = ((certainty - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(certainty[which == b].mean() - right[which == b].mean()).abs() * (which == b).sum() for b in range(bins) if (which == b).any()]
    return float(sum(gaps) / len(probabilities))


def judge_reward_model(shop: Workshop, scorer: Scorer) -> dict[str, float]:
    """On held-out pairs: accuracy, the best that the noise allows, and how far its certainty is from how often it is right."""
    batch = batch_of_pairs(shop, "test")
    better, worse = scores_of(scorer.eval(), batch).view(-1, 2).unbind(1)
    sure = (better - worse).double().sigmoid()  # of the one that was preferred
    return {"accuracy": round(preference_accuracy(scorer, batch), 4), "calibration_error": round(calibration_error(sure), 4)}
