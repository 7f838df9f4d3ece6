"""A small world of instructions whose answers are known: sums, sorting, words backwards, and questions about a story.

Everything follows from a seed. A question belongs to training or to the test by what it asks, not by how it is put: 56+21,
21+56 and 77-21 are one fact, so all of them are on the same side, under every seed and phrasing. Answers are checked by exact
match. Preferences come from a stated rule (`rule_score`) with noise of a known size, so the accuracy of a perfect reward model is
known too. Left out: open questions, which would need a judge. Files: JSON lines in the layouts that TRL and others read, which also become instructions.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.data.corpora import hugging_face_rows
from minillm.data.stories import grammar, stories
from minillm.files import write_atomically

TEST_SHARE = 8
"""One fact of this many is kept for the test."""
Draw = Callable[[], float]


@dataclass(frozen=True)
class Instruction:
    """A question and its only right answer. fact: what is asked, however it is put."""

    kind: str
    question: str
    answer: str
    fact: str

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test: decided by the fact alone."""
        family = {"add": "sum"}.get(self.kind, self.kind)
        return int(hashlib.sha256(f"{family} {self.fact}".encode()).hexdigest(), 16) % TEST_SHARE == 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Dialogue(Instruction):
    """The last question of a conversation from elsewhere. history: what was said before it."""

    history: tuple[dict[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        return [*self.history, *super().messages]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which somebody preferred the first. probability: that the rule prefers it."""

    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    probability: float = 1.0


# The world

def _pick(things: Sequence, draw: Draw):
    return things[int(draw() * len(things))]


def _add(draw: Draw, kind: str = "add") -> Instruction:
    a, b = int(draw() * 100), int(draw() * 100)
    asked = _pick((f"{a}+{b}=", f"What is {a}+{b}?", f"Add {a} and {b}."), draw)
    return Instruction(kind, asked, str(a + b), f"{min(a, b)}+{max(a, b)}")


def _sum(draw: Draw) -> Instruction:
    if draw() < 0.5:
        return _add(draw, "sum")
    a, b = int(draw() * 100), int(draw() * 100)
    fact = f"{min(a, b)}+{max(a, b)}"
    return Instruction("sum", _pick((f"{a + b}-{b}=", f"What is {a + b}-{b}?", f"Take {b} from {a + b}."), draw), str(a), fact)


def _sort(draw: Draw) -> Instruction:
    numbers = [int(draw() * 100) for _ in range(3 + int(draw() * 3))]
    ascending, listed = sorted(numbers), " ".join(map(str, numbers))
    question = _pick((f"Sort: {listed}", f"Put in order: {listed}", f"Sort these numbers: {listed}"), draw)
    return Instruction("sort", question, " ".join(map(str, ascending)), str(ascending))


def _words(draw: Draw) -> list[str]:
    """Two to four different words of the stories, in random order."""
    words = [_pick(grammar().rules[rule].options, draw).fields[""] for rule in ("hue", "size", "landmark", "home_kind")]
    return sorted(words[:2 + int(draw() * 3)], key=lambda _: draw())


def _repeat(draw: Draw) -> Instruction:
    words = _words(draw)[:2]
    return Instruction("repeat", f"Say: {' '.join(words)}", " ".join(words), " ".join(sorted(words)))


def _reverse(draw: Draw) -> Instruction:
    words = _words(draw)
    text = " ".join(words)
    question = _pick((f"Reverse: {text}", f"Write backwards, word by word: {text}"), draw)
    return Instruction("reverse", question, " ".join(reversed(words)), " ".join(sorted(words)))


def _story(draw: Draw) -> Instruction:
    while True:
        story = next(stories(1, int(draw() * 2 ** 31)))
        text, hero = story.text.partition("\n")[0], story.facts["hero"]
        asked, fact = _pick((("Who is the story about?", "hero"), (f"What is {hero}?", "kind"),
                             (f"What did {hero} like?", "pastime"), (f"Where did {hero} go?", "place")), draw)
        if story.facts[fact] in text:
            return Instruction("story", _pick((f"{text}\n{asked}", f"Read: {text}\n{asked}"), draw), story.facts[fact], text)


KINDS: dict[str, Callable[[Draw], Instruction]] = {"sum": _sum, "add": _add, "sort": _sort, "reverse": _reverse, "repeat": _repeat,
                                                       "story": _story}
"""What makes one instruction of each kind from random draws; add is sum without differences, and of the same facts."""

ALL = ("sum", "sort", "reverse", "story")


def instructions(seed: int = 0, split: str = "train", kinds: Sequence[str] = ALL) -> Iterator[Instruction]:
    """Instructions without end, the kinds in turn; the same seed gives the same ones. They may repeat. split: train or test.

    Raises: ValueError for a kind or a split that there is not, or no kind.
    """
    if not kinds:
        raise ValueError(f"kinds is empty: give at least one of {', '.join(KINDS)}.")
    if unknown := set(kinds) - KINDS.keys() or {split} - {"train", "test"}:
        raise ValueError(f"{sorted(unknown)[0]!r} is neither a kind ({', '.join(KINDS)}) nor a split (train, test).")
    draw = random.Random(f"instructions {seed}").random
    while True:
        for kind in kinds:
            made = KINDS[kind](draw)
            while made.held_out != (split == "test"):
                made = KINDS[kind](draw)
            yield made


def exact_match(instruction: Instruction, answer: str) -> bool:
    """Whether the answer is the right one and nothing else; white space at its ends does not count."""
    return answer.strip() == instruction.answer


def in_a_sentence(answer: str) -> str:
    """What a wordy writer makes of an answer."""
    return f"It is {answer}."


def demonstrations(seed: int = 0, split: str = "train", kinds: Sequence[str] = ALL, wordy: float = 0.25,
                   told: float = 0.0, turns: int = 1) -> Iterator[list[dict[str, str]]]:
    """Conversations without end, as two kinds of writers have answered: a share `wordy` of their answers comes in a sentence.

    All are right, and a model that imitates them takes over both habits; which of the two is wanted only preferences say.
    told: the share of questions that ask for a story, whose first paragraph is told: what was learned before stays in use.
    turns: each conversation has 1 to so many questions, which have nothing to do with one another.
    """
    draw, asked = random.Random(f"writers {seed}").random, instructions(seed, split, kinds)
    while True:
        yield [message for _ in range(1 + int(draw() * turns)) for message in _turn(asked, draw, wordy, told)]


def _turn(asked: Iterator[Instruction], draw: Draw, wordy: float, told: float) -> list[dict[str, str]]:
    """A question and what a writer answers."""
    if draw() < told:
        story = next(stories(1, int(draw() * 2 ** 31)))
        return [{"role": "user", "content": f"Tell me a story about a {story.facts['kind']}."},
                {"role": "assistant", "content": story.text.partition("\n")[0]}]
    one = next(asked)
    return [*one.messages[:-1], {"role": "assistant", "content": in_a_sentence(one.answer) if draw() < wordy else one.answer}]


# Preferences

def rule_score(instruction: Instruction, answer: str) -> float:
    """The rule: 2 for the right answer alone, 1 for an answer that says it among other words, 0 for any other."""
    words = f" {answer.strip().rstrip('.')} "
    return 2.0 if exact_match(instruction, answer) else float(f" {instruction.answer} " in words)


def preferences(seed: int = 0, split: str = "train", kinds: Sequence[str] = ("sum", "sort", "reverse"),
                beta: float = 2.0) -> Iterator[Preference]:
    """Pairs of answers without end: the first is preferred with probability sigmoid(beta · (its score - the other's score)).

    That is Bradley and Terry's model, which a reward model assumes; beta = inf is no noise. A perfect reward model is right
    about a fresh pair with the mean of max(p, 1-p): with beta = 2, some 0.91. Source of the model: arXiv:2203.02155 §3.5.
    """
    draw = random.Random(f"preferences {seed}").random
    for right in instructions(seed, split, kinds):
        yield compare(right, *sorted(_answers(right, draw), key=lambda _: draw())[:2], draw, beta)


def compare(asked: Instruction, first: str, second: str, draw: Draw, beta: float = 2.0) -> Preference:
    """Two answers, whoever wrote them, as somebody who follows the rule with noise prefers them; see `preferences`."""
    gap = rule_score(asked, first) - rule_score(asked, second)
    likely = 1 / (1 + math.exp(-min(beta, 300) * gap))  # gaps are at most 2, and exp(710) is no float any more
    if draw() >= likely:
        first, second, likely = second, first, 1 - likely
    return Preference(asked.messages[:-1], first, second, likely)


def _answers(right: Instruction, draw: Draw) -> list[str]:
    """One answer of each score: the right one, the right one in a sentence, and one that is wrong."""
    parts = right.answer.split()
    wrong = " ".join(sorted(parts, reverse=True)) if len(parts) > 1 else ""
    if wrong in ("", right.answer):
        wrong = str(int(right.answer) + 1 + int(draw() * 9)) if right.answer.isdigit() else "I do not know"
    return [right.answer, in_a_sentence(right.answer), wrong]


# Files

def write_jsonl(path: str | Path, rows: Iterable[Mapping]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def conversation_row(messages: Sequence[Mapping], layout: Literal["messages", "prompt"] = "messages") -> dict:
    """{"messages": [...]}, or {"prompt": [...], "completion": [the last answer]}."""
    if layout == "messages":
        return {"messages": list(messages)}
    return {"prompt": list(messages[:-1]), "completion": list(messages[-1:])}


def preference_row(pair: Preference) -> dict:
    """{"prompt": [...], "chosen": [answer], "rejected": [answer]}."""
    return {"prompt": pair.prompt, "chosen": _said(pair.chosen, "assistant"), "rejected": _said(pair.rejected, "assistant")}


def read_conversations(path: str | Path) -> list[list[dict[str, str]]]:
    """A JSONL file's or (hf:owner/name) a Hugging Face dataset's conversations, in any of four layouts: `messages`; `prompt` and
    `completion`, as texts or messages; Alpaca's `instruction`, `input` and `output`; ShareGPT's `conversations`.

    Raises: ValueError with the line.
    """
    def messages(row: dict) -> list:
        if "conversations" in row:
            roles = {"human": "user", "gpt": "assistant"}
            return [{"role": roles.get(said["from"], said["from"]), "content": said["value"]} for said in row["conversations"]]
        if "instruction" in row:
            asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
            return _said(asked, "user") + _said(row["output"], "assistant")
        return row["messages"] if "messages" in row else _said(row["prompt"], "user") + _said(row["completion"], "assistant")
    return _read(path, messages, "messages, conversations, prompt and completion, or instruction and output")


def asked_in(conversations: Iterable[Sequence[Mapping]], split: str) -> list[Dialogue]:
    """What conversations ask last, with the answer that they give; of one split, by a hash of all before the answer.

    Raises: ValueError for a conversation that does not end with a question and its answer, or a split that is left empty.
    """
    found = []
    for number, talk in enumerate(conversations):
        if [message["role"] for message in talk[-2:]] != ["user", "assistant"]:
            raise ValueError(f"conversation {number} ends with {[message['role'] for message in talk[-2:]]}: expected a user's message and "
                             f"the assistant's answer.")
        fact = json.dumps(list(talk[:-1]), ensure_ascii=False)
        one = Dialogue("file", talk[-2]["content"], talk[-1]["content"], fact, tuple(map(dict, talk[:-2])))
        found += [one] if one.held_out == (split == "test") else []
    if not found:
        raise ValueError(f"none of the conversations is in the split {split!r}, which a hash decides: one of {TEST_SHARE} is kept for the "
                         f"test. Use more of them.")
    return found


def read_preferences(path: str | Path) -> list[Preference]:
    """Lines with `prompt`, `chosen` and `rejected`, as texts or messages; without a prompt, the two are whole conversations
    that differ in their last message. Raises: ValueError with the line."""
    def pair(row: dict) -> Preference:
        chosen, rejected = (_said(row[name], "assistant") for name in ("chosen", "rejected"))
        prompt = _said(row["prompt"], "user") if "prompt" in row else chosen[:-1]
        if "prompt" not in row and rejected[:-1] != prompt:
            raise ValueError("chosen and rejected differ before their last message, so they answer different prompts.")
        return Preference(prompt, chosen[-1]["content"], rejected[-1]["content"], float(row.get("probability", 1.0)))
    return _read(path, pair, "prompt, chosen and rejected")


def _said(words: str | list, role: str) -> list[dict[str, str]]:
    """A text as the one message it is; messages as they are."""
    return [{"role": role, "content": words}] if isinstance(words, str) else words


def _read(path: str | Path, read: Callable[[dict], object], expected: str) -> list:
    """Every line that is not empty, read. Raises: ValueError that names the file and the line."""
    found = []
    if str(path).startswith("hf:"):
        lines = map(json.dumps, hugging_face_rows(str(path)[3:]))
    else:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(read(json.loads(line)))
            except (KeyError, TypeError, IndexError):
                raise ValueError(f"{path}, line {number}: expected an object with {expected}, got {line[:60]!r}.") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} is empty: write one JSON object a line, with {expected}.")
    return found
