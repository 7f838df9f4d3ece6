"""Lesson 16: the same methods on a task near to what the course's model knows: does a story with this name go on with she?

The opposite of tuning.py, where all is new. The task is lesson 04's: half of the thirty names have labels, and the model is
asked about the others, which only who has read stories can know. GPT-1's head, two scores of the last token, stands on the model and
is always trained; below it nothing is, or a small part, or all.

What came out: the head's 256 numbers alone are right about every name, as rank 1 is; all others about 98 to 99.9% of the time.
"""

import random
import re
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from minillm.config import ModelConfig, TrainConfig
from minillm.course.experiments import tuning
from minillm.course.pretrained import load_course_model
from minillm.data.prepare import DataConfig, Prepared
from minillm.data.stories import stories
from minillm.model.classifier import Classifier
from minillm.model.transformer import num_params
from minillm.peft.freeze import freeze

CONTEXT, SEEDS = 64, (0, 1, 2)
DATA = DataConfig(size=50_000)  # not read: the sentences are drawn by `sentences`
PLAN = TrainConfig(steps=60, batch_size=16, weight_decay=0.0)
METHODS: dict[str, tuple[Callable, float]] = {
    "the head alone": (lambda model, seed: freeze(model), 1e-2),
    "full fine-tuning": (tuning.METHODS["full fine-tuning"][0], 3e-4)} | {
    row: (tuning.METHODS[row][0], rate) for row, rate in (
        ("prompt, 16", 3e-2), ("prefix, 16", 3e-2), ("LLaMA-Adapter, 16", 3e-2), ("adapters, 16", 3e-3),
        ("LoRA, q and v", 3e-3), ("LoRA, r = 1", 3e-3), ("LoRA, r = 8", 3e-3))}
"""Row -> what it does to the model, and its learning rate."""
ROWS = dict.fromkeys(METHODS, load_course_model()[0].config)
PLANS = {row: {"lr": rate} for row, (_, rate) in METHODS.items()}
tokenizer = tuning.tokenizer


def sentences(seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """First sentences that only name the hero, and whether she comes next: those of labelled names, those of other names."""
    found = []
    for story in stories(1_500, 777):
        first = re.match(r"[^.]*?\b(?:named|called) (\w+)\.", story.text)
        if first and not re.search(r"\b(he|she|his|her|it|its)\b", first[0], re.I):
            pronoun = re.search(r"\b(he|she|his|her)\b", story.text[first.end():], re.I)[0].lower()
            found.append((first[0], first[1], int(pronoun in ("she", "her"))))
    names = sorted({name for _, name, _ in found})
    labelled = set(random.Random(seed).sample(names, len(names) // 2))
    known, others = ([(text, she) for text, name, she in found if (name in labelled) == inside] for inside in (True, False))
    return known, others


def pad_left(some: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids with padding on the left, which of them are text, and the labels.   Shapes: (B, T), (B, T), (B,)."""
    words = tokenizer()
    rows = [[words.end_of_text, *words.encode(text)] for text, _ in some]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return ids, real, torch.tensor([she for _, she in some])


def classified(method: Callable, config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int) -> Classifier:
    """The course's model under a head for two classes, tuned by a method with a rate that falls to 0."""
    model = load_course_model()[0]
    method(model, seed)
    model = Classifier(model, 2, seed=seed)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=plan.weight_decay)
    known, model.others = sentences(seed)
    for step in range(plan.steps):
        ids, real, label = pad_left([known[(plan.batch_size * step + i) % len(known)] for i in range(plan.batch_size)])
        cross_entropy(model(ids, real), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * (1 - (step + 1) / plan.steps)
    return model.eval()


TRAIN = {row: partial(classified, method) for row, (method, _) in METHODS.items()}


@torch.no_grad()
def measure(model: Classifier, data: Prepared) -> dict[str, float]:
    """Accuracy on the names that had no label, and what was trained, the head with it."""
    right = 0.0
    for at in range(0, len(model.others), 50):
        ids, real, label = pad_left(model.others[at:at + 50])
        right += float((model(ids, real).argmax(-1) == label).sum())
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    return {"parameters": num_params(load_course_model()[0]), "trained": trained, "accuracy": right / len(model.others)}
