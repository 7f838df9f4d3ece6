"""Lesson 17: the course's model writes tasks for itself, and the world's own rules say what the filters let through.

A model of 1M parameters that has read stories cannot go on with a list that it is shown, so it is tuned on such lists first, every
token learned: on 175 tasks, as many as the paper's people wrote, or on sixteen times as many. Then it writes, 40 requests with each
of two limits of ROUGE-L, always against a pool of the same 175. No filter knows what is right; here the world does, so the share of
kept tasks that ask something at all, and are answered rightly, is known, and so are the shares copied from what was learned and
kept for the test (one fact in eight). Four tasks are shown, three by people: eight do not fit into 256 tokens.

What came out, three seeds together, limit 0.7. Not tuned: 120 requests and nothing to read. 175 tasks: 313 proposed, 123 kept, none of
them right; the 91 that were right had been learned by heart, and the filters threw out every one of them, as they should. 2,800
tasks: 333 proposed, 265 kept, 264 of these ask something, and 9 are answered rightly, 6 of which are copies. No heuristic objected,
but for one task too short: ROUGE-L kept out 65 (63 of them asked for another fact, so it threw out what was new) and "contradicts" 3.
Of the kept, 31 are facts of the test: who measures on it must look. So a pool that looks well is nearly all wrong: form is learned
long before answers. The rows differ in steps, too, and more of them help: in single trials (seed 0, 20 requests) 2,800 tasks gave 0 right
of 41 kept after 100 steps, and 9 of 46 after 300. What is stored says what filters do, and not how well this model can learn to answer.

Source: arXiv:2212.10560 §2, whose writer is not tuned first. Left out: training on the pool; questions about stories, of two lines.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count

import torch

from minillm.align.rollout import log_probs_of
from minillm.align.self_instruct import ROUGE_LIMIT, Pool, Task, grow, parse, request
from minillm.align.sft import ConversationLoader, pad_rows
from minillm.config import ModelConfig, TrainConfig
from minillm.course.experiments import drive
from minillm.course.pretrained import load_course_model
from minillm.data.instructions import Instruction, exact_match, instructions
from minillm.data.prepare import DataConfig, Prepared
from minillm.engine import Engine
from minillm.infer.generate import stream_pieces
from minillm.model.transformer import Transformer
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import Rendered

KINDS, SEED_TASKS, REQUESTS, LONGEST = ("sum", "sort", "reverse", "repeat"), 175, 40, 100
"""What is asked; how many tasks people wrote; how often the model is asked with each limit; tokens that it writes each time."""
CONTEXT, SEEDS, DATA = 256, (0, 1, 2), DataConfig(size=60_000)  # not read: the lists are drawn by `lists`
PLAN = TrainConfig(steps=250, batch_size=8, lr=1e-2, optimizer="muon", weight_decay=0.0, device="cpu")
LIMITS = (ROUGE_LIMIT, 1.0)
LEARNED = {"not tuned": 0, "175 tasks": SEED_TASKS, "2,800 tasks": 16 * SEED_TASKS}
"""Row -> how many tasks the writer's lists are made of; the first 175 are the pool's seeds."""
PLANS = {"175 tasks": {"steps": 100}}
ROWS = dict.fromkeys(LEARNED, load_course_model()[0].config)


def tokenizer() -> BPETokenizer:
    """The base's."""
    return load_course_model()[1]


def tasks(seed: int, split: str, number: int) -> list[Task]:
    """The world's, all different."""
    drawn = (Task(one.question, one.answer) for one in instructions(seed, split, KINDS))
    found: dict[Task, None] = {}
    while len(found) < number:
        found[next(drawn)] = None
    return list(found)


def lists(from_tasks: list[Task], number: int, seed: int) -> list[Rendered]:
    """Numbered lists of tasks as ids, cut off where the context ends; everything in them is learned."""
    words, draw = tokenizer(), random.Random(f"lists {seed}")
    rows = [[words.end_of_text, *words.encode(request(draw.sample(from_tasks, 10)))][:CONTEXT + 1] for _ in range(number)]
    return [Rendered(ids, [True] * len(ids)) for ids in rows]


# What the world says

ADDED = r"\d+\+\d+=|What is \d+\+\d+\?|Add \d+ and \d+\."
TAKEN = r"\d+-\d+=|What is \d+-\d+\?|Take \d+ from \d+\."
LISTS = {"sort": r"(?:Sort|Put in order|Sort these numbers): (\d+(?: \d+)*)", "reverse": r"(?:Reverse|Write backwards, word by word): (\S+(?: \S+)*)",
         "repeat": r"Say: (\S+(?: \S+)*)"}


def understood(question: str) -> Instruction | None:
    """The instruction that a question is, with the right answer, if it has one of the world's forms; of any numbers and words."""
    if re.fullmatch(f"{ADDED}|{TAKEN}", question):
        a, b = map(int, re.findall(r"\d+", question))
        if re.fullmatch(TAKEN, question):
            a, b = (b - a, a) if question.startswith("Take") else (a - b, b)
            return Instruction("sum", question, str(a), f"{min(a, b)}+{max(a, b)}")
        return Instruction("sum", question, str(a + b), f"{min(a, b)}+{max(a, b)}")
    for kind, form in LISTS.items():
        if found := re.fullmatch(form, question):
            parts = found[1].split()
            ascending = sorted(map(int, parts)) if kind == "sort" else sorted(parts)
            answer = {"sort": ascending, "reverse": parts[::-1], "repeat": parts}[kind]
            return Instruction(kind, question, " ".join(map(str, answer)), str(ascending) if kind == "sort" else " ".join(ascending))
    return None


COUNTED = [f"{which}, {what}" for which in ("proposed", "kept") for what in ("understood", "right", "right and its own", "copied")]
COUNTED += ["kept, a fact again", "kept, of the test", "not new, another fact"]


def judged(proposed: list[Task], seeds: list[Task], learned: set[str], limit: float) -> dict:
    """Offer tasks to a pool once more, and look at each and its fate with the world's eyes. learned: instructions the writer has seen."""
    pool, counts, kinds = Pool(list(seeds)), Counter(dict.fromkeys(COUNTED, 0)), {kind: [0, 0] for kind in KINDS}
    known = {(one.kind, one.fact) for one in map(understood, (task.instruction for task in seeds))}
    for task in proposed:
        one, reason, copied = understood(task.instruction), pool.offer(task, limit), task.instruction in learned
        right = one is not None and exact_match(one, task.answer)
        for which in ["proposed"] + ["kept"] * (reason is None):
            counts.update({f"{which}, understood": one is not None, f"{which}, right": right, f"{which}, copied": copied,
                           f"{which}, right and its own": right and not copied})
        if one and reason == "not new":
            counts["not new, another fact"] += (one.kind, one.fact) not in known
        if one and reason is None:
            counts.update({"kept, a fact again": (one.kind, one.fact) in known, "kept, of the test": one.held_out})
            kinds[one.kind][0] += right
            kinds[one.kind][1] += 1
            known.add((one.kind, one.fact))
    return dict(counts) | {"right of a kind": kinds}


def wrote(model: Transformer, seeds: list[Task], learned: list[Task], limit: float, seed: int) -> dict:
    """What self-instruct comes to with this writer: the pool's report, what the world says, and eight of the tasks."""
    words, draws, proposed = tokenizer(), count(100_000 * seed), []

    def write(prompt: str) -> str:
        ids = [words.end_of_text, *words.encode(prompt)]
        text = "".join(stream_pieces(model, words, ids, LONGEST, (words.end_of_text,), seed=next(draws)))
        proposed.extend(parse(text))
        return text
    pool = grow(Pool(list(seeds)), write, 10 * REQUESTS, seed=seed, limit=limit, most=REQUESTS, by_people=3, by_model=1)
    said = judged(proposed, seeds, {task.instruction for task in learned}, limit)
    return pool.report() | said | {"tasks": dict(pool.made[:8])}


def writer(number: int, config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int,
           watch: Callable[[int, float], None] | None = None) -> tuple[Transformer, dict]:
    """The course's model, tuned on lists of so many tasks, and what it wrote under each limit."""
    learned = tasks(seed, "train", max(number, SEED_TASKS))
    model = load_course_model()[0]
    if number:
        loader = ConversationLoader(lists(learned, plan.steps * plan.batch_size, seed), plan.batch_size, context, seed=seed)
        model = drive(Engine(model, replace(plan, seed=seed)), loader, watch)
    found = {f"limit {limit:g}": wrote(model.eval(), learned[:SEED_TASKS], learned[:number], limit, seed) for limit in LIMITS}
    strict = found[f"limit {ROUGE_LIMIT:g}"]
    return model, found | {"kept": _share(strict["kept"], strict["proposed"]), "right": _share(strict["kept, right"], strict["kept"])}


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


TRAIN = {row: partial(writer, number) for row, number in LEARNED.items()}


@torch.no_grad()
def measure(model: Transformer, data: Prepared) -> dict[str, float]:
    """Nats a token on lists of the test's tasks."""
    batch = pad_rows(lists(tasks(9, "test", 640), 64, 9))
    return {"loss": -float(log_probs_of(model, batch).sum()) / batch.count}
