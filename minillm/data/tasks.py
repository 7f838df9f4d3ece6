"""Tasks with known answers: what an item is, the JSONL file that holds a task, and prompts with examples.

An item is a text to continue (`context`) and either several continuations of which one is right (`choices`, `answer`),
or the one continuation to write (`target`). Continuations are put behind the context as they are, so a word brings its
space with it: {"context": "Two and two make", "choices": [" four", " five"], "answer": 0}. A task is a list of items.
story_tasks.py makes tasks from the stories' world; infer/evaluate.py asks a model.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from minillm.files import write_atomically

SEPARATOR = "\n\n"
"""Between the examples of a prompt, and before the question: GPT-3's were delimited by 1 or 2 newlines, by task."""


@dataclass(frozen=True)
class Item:
    """One question. domain: a name for the part of a task that it belongs to, if it has parts.

    Raises: ValueError unless it has at least two different choices with an answer among them, or a target.
    """

    context: str
    choices: tuple[str, ...] = ()
    answer: int | None = None
    target: str | None = None
    domain: str = ""

    def __post_init__(self):
        """Refuse what cannot be asked or cannot be right."""
        if self.target is not None:
            if self.choices or self.answer is not None:
                raise ValueError("an item has choices and an answer, or a target, not both.")
            if not self.target.strip():
                raise ValueError(f"target = {self.target!r}: there is nothing to write.")
            return
        if len(self.choices) < 2:
            raise ValueError(f"choices = {list(self.choices)}: at least two are needed to choose from.")
        if "" in self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices = {list(self.choices)}: each must be a text of its own, and none empty.")
        if self.answer is None or not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer = {self.answer}: it is the place of the right choice, counted from 0, so with "
                             f"{len(self.choices)} choices it is 0 to {len(self.choices) - 1}.")

    @property
    def solution(self) -> str:
        """The right continuation."""
        return self.choices[self.answer] if self.target is None else self.target


def write_items(path: str | Path, items: Iterable[Item]) -> None:
    """One JSON object a line, with the keys that say something."""
    empty = ((), None, "")
    lines = [json.dumps({field.name: value for field in fields(Item)
                         if (value := getattr(item, field.name)) not in empty or field.name == "context"}, ensure_ascii=False)
             for item in items]
    write_atomically(path, "\n".join(lines) + "\n")


def read_items(path: str | Path) -> list[Item]:
    """The task in a JSONL file; empty lines do not count.

    Raises: ValueError with the file and the line for what is no item, or for a file without any.
    """
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                items.append(_item(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} holds no items: write one JSON object a line, with context, choices and answer.")
    if len({item.target is None for item in items}) > 1:
        raise ValueError(f"{path} has items with choices and items with a target: put them into two files.")
    return items


def _item(line: str) -> Item:
    """One line's item. Raises: ValueError that says which key is missing, unknown or of the wrong kind."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {line[:60]!r}.")
    kinds = {"context": str, "choices": list, "answer": int, "target": str, "domain": str}
    if unknown := row.keys() - kinds:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}; an item has {', '.join(kinds)}.")
    needed = ("context", "target") if "target" in row else ("context", "choices", "answer")
    for key in needed:
        if key not in row:
            raise ValueError(f"the key {key!r} is missing; an item has context, choices and answer, or context and target.")
    for key, value in row.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{key} = {value!r}: expected {kinds[key].__name__}.")
    if strange := [choice for choice in row.get("choices", []) if not isinstance(choice, str)]:
        raise ValueError(f"choices has {strange[0]!r}, which is no text.")
    return Item(**row | {"choices": tuple(row.get("choices", ()))})


def with_examples(items: Sequence[Item], shots: int, seed: int = 0) -> list[Item]:
    """The same questions, each behind `shots` other items of the task with their answers: a few-shot prompt.

        context of an example + its solution, an empty line, ..., context of the question

    The examples are drawn for each question anew, and are never the question itself nor one with the same text.
    Source: arXiv:2005.14165 §2 and §2.4.   Raises: ValueError when the task has too few other items.
    """
    if shots < 0:
        raise ValueError(f"shots = {shots}: the number of examples cannot be negative.")
    draw = random.Random(seed).random
    asked = []
    for item in items:
        others = [other for other in items if other.context + other.solution != item.context + item.solution]
        if len(others) < shots:
            raise ValueError(f"{shots} examples need as many items besides the question, and this task has {len(others)} with "
                             f"another text. Ask for fewer shots, or give more items.")
        examples = shuffled(others, draw)[:shots] if shots else []
        prompt = "".join(example.context + example.solution + SEPARATOR for example in examples)
        asked.append(Item(prompt + item.context, item.choices, item.answer, item.target, item.domain))
    return asked


def shuffled(things: Iterable, draw) -> list:
    """In random order. `draw` is random.Random(seed).random, which is the same on every Python; shuffle need not be."""
    return sorted(things, key=lambda _: draw())


def chance(items: Sequence[Item]) -> float:
    """The accuracy of guessing: the mean of 1 / choices; 0 for a text to write."""
    return sum(1 / len(item.choices) if item.choices else 0.0 for item in items) / len(items)
