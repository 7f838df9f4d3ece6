"""Short stories from a seeded grammar: the corpus that ships with the course, and whose entropy is known.

Nobody can predict these stories better than the grammar that writes them, so the grammar's entropy is the best
validation loss that any model can reach: a floor to draw under every loss curve. The words are in stories.grammar,
the notation in grammar.py, the entropy in entropy.py. Only `random.Random(seed).random()` is drawn from, which is the
same on every Python.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from minillm.data.entropy import expected
from minillm.data.grammar import Grammar


@dataclass(frozen=True)
class Story:
    """text: about 900 bytes in three paragraphs; nats: -ln of its probability; facts: hero, place, friend, ..."""

    text: str
    nats: float
    facts: dict[str, str]


@cache
def grammar() -> Grammar:
    """The stories' grammar, read once."""
    return Grammar(files("minillm.data").joinpath("stories.grammar").read_text(encoding="utf-8"))


def stories(count: int, seed: int = 0) -> Iterator[Story]:
    """`count` stories; the same seed gives the same ones, and fewer are the beginning of more."""
    uniform = random.Random(seed).random
    for _ in range(count):
        yield Story(*grammar().write(uniform))


def entropy() -> float:
    """Nats of a story on average, exactly: no model's mean loss over many stories can be lower.

    Every text has one derivation (a test proves it), so this is the entropy of the text itself.
    """
    return _expected()[0]


def expected_bytes() -> float:
    """UTF-8 bytes of a story on average, exactly."""
    return _expected()[1]


@cache
def _expected() -> tuple[float, float]:
    """(nats, bytes), summed once: it takes a second or two."""
    return expected(grammar())
