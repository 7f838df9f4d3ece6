"""What the tests of this folder share: a text to train on, and Hugging Face's trainer."""

import json
from collections.abc import Callable

import pytest
from hard_texts import HARD_TEXTS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from minillm.text.patterns import PATTERNS

@pytest.fixture(scope="session")
def mixed_texts() -> list[str]:
    """Some 40 kB in several languages, with code and numbers: the hard texts again and again, and sums."""
    sums = [f"{a} + {b} = {a + b}; def add_{a}(x): return x + {a}\n"
            for a in range(40) for b in range(0, 400, 17)]
    return ["".join(sums), *(text.encode("utf-8", "replace").decode() * 5 for text in HARD_TEXTS)]


@pytest.fixture(scope="session")
def train_hugging_face() -> Callable[[list[str], int, str], list[tuple[str, str]]]:
    """A function (texts, merges, pattern) -> the merges that Hugging Face's trainer learns."""
    def train(texts: list[str], merges: int, pattern: str = PATTERNS["gpt2"]) -> list[tuple[str, str]]:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = trainers.BpeTrainer(vocab_size=256 + merges, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(texts, trainer)
        return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return train
