"""Self-instruct: a model writes instructions and answers for itself, filters keep what is new and sound, and the pool grows.

Seed tasks come from people. Each request shows some of them, and some that were made before, as a numbered list; the model goes on
with the list. sft.py then trains on the pool. Alpaca made 52,002 instructions so from 175 seeds with a larger model as the writer.
No filter asks whether an answer is right. ROUGE-L counts words, and is blind to what they ask. Two sums "Add a and b." have 0.5, or 0.75
if they share a number in its place, so the pool takes each number once a place: at most 100 of 10,000, and "Add 4 and 3." after
"Add 3 and 4.", the same fact. "a+b=" has no other words, so nearly all pass; but 5+2= and 5-2= are the same words, 1.0.
Sources: arXiv:2212.10560 §2 (the loop, ROUGE-L below 0.7, the heuristics) and its code; Stanford Alpaca, README and
generate_instruction.py (one request for instruction and answer; three seeds shown, nothing made). Left out: telling classification
tasks apart, which Alpaca dropped too, and an input apart from its instruction.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minillm.progress import bar

ROUGE_LIMIT = 0.7
"""An instruction at least this similar to one of the pool is not new."""
WORDS = (2, 150)
"""Fewest and most words of an instruction. The code of the paper and Alpaca's want 4, which no sum such as "56+21=" has."""
BEYOND_TEXT = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to", "video",
               "audio", "music", "flowchart", "diagram")
"""Words of instructions that a language model cannot follow. Source: Alpaca's list; the paper's code ends with "go to"."""


class Task(NamedTuple):
    """An instruction and its answer."""

    instruction: str
    answer: str


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers; what stands between them does not count, as in ROUGE."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L's F: twice the longest common subsequence of words, over the words of both. 1 for the same words, 0 for none.

    Source: C.-Y. Lin, ROUGE (2004) §3.   Cost: |a| · |b| comparisons.
    """
    first, second = words_of(a), words_of(b)
    if not first or not second:
        return 0.0
    row = [0] * (len(second) + 1)
    for word in first:
        before = row[:]
        for place, other in enumerate(second, 1):
            row[place] = before[place - 1] + 1 if word == other else max(row[place - 1], before[place])
    return 2 * row[-1] / (len(first) + len(second))


# The filters: each says what is wrong with a task, or nothing

def wrong_length(task: Task, least: int = WORDS[0]) -> str | None:
    """An instruction too short to say anything, or one that never ended."""
    return None if least <= len(words_of(task.instruction)) <= WORDS[1] else "too short or too long"


def wrong_start(task: Task) -> str | None:
    """An instruction begins with a letter or digit: anything else is the middle of something."""
    return None if task.instruction[:1].isalnum() and task.instruction[:1].isascii() else "begins with a mark"


def beyond_text(task: Task) -> str | None:
    """What needs eyes, ears or hands."""
    words = f" {' '.join(words_of(task.instruction))} "
    return "asks for more than text" if any(f" {word} " in words for word in BEYOND_TEXT) else None


def wants_program(task: Task) -> str | None:
    """Nobody can tell whether the program is wanted or what it would print; models add this to any task. Source: the paper's code."""
    return "asks for a program" if task.instruction.lower().startswith("write a program") else None


def no_answer(task: Task) -> str | None:
    """Nothing."""
    return None if task.answer.strip() else "no answer"


def echo(task: Task) -> str | None:
    """The instruction over again. The paper compares with the input alone, and would lose every "Say: red lake"."""
    return "repeats the question" if task.answer.strip() == task.instruction.strip() else None


def unfinished(task: Task) -> str | None:
    """A colon announces something, and nothing comes. Source: the paper's code."""
    return "ends with a colon" if ":" in (task.instruction.strip()[-1:], task.answer.strip()[-1:]) else None


FILTERS: tuple[Callable[[Task], str | None], ...] = (no_answer, echo, unfinished, wrong_length, wrong_start, beyond_text, wants_program)


@dataclass
class Pool:
    """Tasks by people, those that were made, and why others were not taken. requests: how often the model was asked; fruitless: how
    many of these gave nothing that could be read."""

    seeds: list[Task]
    made: list[Task] = field(default_factory=list)
    rejected: Counter = field(default_factory=Counter)
    requests: int = 0
    fruitless: int = 0

    @property
    def tasks(self) -> list[Task]:
        """All."""
        return self.seeds + self.made

    @property
    def proposed(self) -> int:
        """How many the model has written."""
        return len(self.made) + self.rejected.total()

    def report(self) -> dict[str, int]:
        """How often it was asked, what it proposed, what was kept, and how many tasks each reason has kept out."""
        asked = {"requests": self.requests, "fruitless": self.fruitless, "proposed": self.proposed, "kept": len(self.made)}
        return asked | dict(sorted(self.rejected.items()))

    def nearest(self, instruction: str) -> tuple[float, str]:
        """The most similar instruction of the pool, and its ROUGE-L; 0 and nothing if the pool is empty."""
        return max(((rouge_l(instruction, task.instruction), task.instruction) for task in self.tasks), default=(0.0, ""))

    def offer(self, task: Task, limit: float = ROUGE_LIMIT, filters: Sequence[Callable[[Task], str | None]] = FILTERS) -> str | None:
        """Take a task in, or say why not: the first filter that objects, "contradicts" for another answer to an instruction that is
        there (which stays; the paper's code drops both), or "not new"."""
        reason = next((said for check in filters if (said := check(task))), None)
        if reason is None and any(task.instruction == other.instruction and task.answer != other.answer for other in self.tasks):
            reason = "contradicts"
        if reason is None and self.nearest(task.instruction)[0] >= limit:
            reason = "not new"
        if reason is None:
            self.made.append(task)
        else:
            self.rejected[reason] += 1
        return reason


def sample_examples(pool: Pool, draw: random.Random, by_people: int = 6, by_model: int = 2) -> list[Task]:
    """What a request shows: as many of each as there are, in random order. Raises: ValueError for a pool without seeds."""
    if not pool.seeds:
        raise ValueError("the pool has no seed tasks: a model cannot guess what kind of list it is to continue.")
    made = draw.sample(pool.made, min(by_model, len(pool.made)))
    seeds = draw.sample(pool.seeds, min(by_people + by_model - len(made), len(pool.seeds)))
    return draw.sample(seeds + made, len(seeds + made))


def request(examples: Sequence[Task]) -> str:
    """A numbered list that breaks off where the next instruction begins."""
    return "".join(f"Task {n}: {task.instruction}\nAnswer {n}: {task.answer}\n" for n, task in enumerate(examples, 1)) + f"Task {len(examples) + 1}:"


def parse(completion: str) -> list[Task]:
    """The tasks of what was written on; the last counts only if its answer's line has ended."""
    whole = completion if completion.endswith("\n") else completion.rpartition("\n")[0] + "\n"
    found = re.findall(r"(?:^|Task \d+:)[ ]?([^\n]*)\nAnswer \d+: ?([^\n]*)\n", whole)
    return [Task(instruction.strip(), answer.strip()) for instruction, answer in found]


def grow(pool: Pool, write: Callable[[str], str], target: int, *, seed: int = 0, limit: float = ROUGE_LIMIT, most: int | None = None,
         filters: Sequence[Callable[[Task], str | None]] = FILTERS, by_people: int = 6, by_model: int = 2) -> Pool:
    """Ask until `target` tasks were made, or `most` requests (10 · target) did not give as many. Returns the pool; see `Pool.report`.

    write: any local model: what it writes after the request.   limit: of ROUGE-L; the file's head says what it means for sums, and 1 only
    keeps out the same words.   by_people, by_model: how many tasks of each a request shows.   Raises: ValueError for no seeds.
    """
    draw = random.Random(f"self-instruct {seed}")
    with bar("self-instruct", total=target, unit="task") as moving:
        for _ in range(10 * target if most is None else most):
            found = parse(write(request(sample_examples(pool, draw, by_people, by_model))))
            pool.requests, pool.fruitless = pool.requests + 1, pool.fruitless + (not found)
            for task in found:
                if len(pool.made) < target and pool.offer(task, limit, filters) is None:
                    moving.update(1)
            if len(pool.made) >= target:
                break
    return pool
