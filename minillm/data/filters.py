"""Rules of thumb for the quality of a document: each measures one number and has bounds for it, as published.

Gopher's rules keep English prose, its repetition rules drop text that says the same again, C4's drop pages that are not
prose, Codex's drop code that a machine wrote. A document is described once (`Text`), and `broken` names the rules that
it breaks. The numbers were chosen for English pages of the web: minillm/data/quality.py says which rules are for which
source, and a rule that needs English or spaces between words is not asked of other languages.

Sources: Gopher, arXiv:2112.11446, appendix A with table A1; C4, arXiv:1910.10683 §2.2; Codex, arXiv:2107.03374
§3.1, with the share of letters and digits of The Stack, arXiv:2211.15533.
Differs from Gopher: words are what spaces separate; and the papers leave open whether the first of several equal lines
or n-grams counts as a repetition: here it does not.
Left out: lists of bad words, and filters that are models (perplexity, classifiers).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from minillm.data.language import SPACELESS

STOP_WORDS = frozenset("the be to of and that have with".split())
BULLETS = ("-", "*", "•", "‣", "·")
LINE_ENDS = (".", "!", "?", '"', "”")  # C4: a full stop, exclamation mark, question mark or closing quotation mark
_SENTENCE = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)|[。！？।؟]")


class Text:
    """What the rules look at: lines and paragraphs that are not empty, words, and which n-grams come again."""

    def __init__(self, text: str):
        """Cut the text at line ends, empty lines and spaces."""
        self.text = text
        self.lines = [line.strip() for line in text.split("\n") if line.strip()]
        self.paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        self.words = text.split()
        self._ranks: list[np.ndarray] = []

    @cached_property
    def sizes(self) -> np.ndarray:
        """Characters of each word."""
        return np.array([len(word) for word in self.words], dtype=np.int64)

    def ngrams(self, n: int) -> np.ndarray:
        """A number for each word n-gram, in order: equal n-grams have equal numbers."""
        if not self._ranks:
            known: dict[str, int] = {}
            self._ranks.append(np.array([known.setdefault(word, len(known)) for word in self.words], dtype=np.int64))
        while len(self._ranks) < n:  # an n-gram is an (n-1)-gram and one more word: both are ranks, so a pair is a number
            shorter, words = self._ranks[-1], self._ranks[0]
            pairs = shorter[:-1] * (len(words) + 1) + words[len(self._ranks):]
            self._ranks.append(np.unique(pairs, return_inverse=True)[1])
        return self._ranks[n - 1]

    def covered(self, starts: np.ndarray, n: int) -> float:
        """The share of all words' characters in the n-grams that begin at `starts`, each character counted once."""
        edges = np.zeros(len(self.words) + 1, dtype=np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + n, -1)
        return float(self.sizes[np.cumsum(edges[:-1]) > 0].sum() / self.sizes.sum())


# What the rules measure

def word_count(text: Text) -> float:
    """Words in the document."""
    return len(text.words)


def mean_word_length(text: Text) -> float:
    """Characters of a word on average."""
    return float(text.sizes.mean()) if text.words else 0.0


def symbols_per_word(text: Text, symbols: tuple[str, ...]) -> float:
    """How often a symbol occurs, for each word."""
    return sum(map(text.text.count, symbols)) / max(1, len(text.words))


def bullet_lines(text: Text) -> float:
    """The share of lines that begin with a bullet."""
    return _share(line.startswith(BULLETS) for line in text.lines)


def ellipsis_lines(text: Text) -> float:
    """The share of lines that end in an ellipsis."""
    return _share(line.endswith(("...", "…")) for line in text.lines)


def words_with_letters(text: Text) -> float:
    """The share of words with a letter in them."""
    return _share(any(map(str.isalpha, word)) for word in text.words)


def stop_words(text: Text) -> float:
    """How many of eight common English words occur."""
    return len(STOP_WORDS & {word.strip(".,;:!?\"'()").lower() for word in text.words})


def repeated(parts: list[str]) -> float:
    """The share of lines or paragraphs that have been there before."""
    return (len(parts) - len(set(parts))) / len(parts) if parts else 0.0


def repeated_characters(parts: list[str]) -> float:
    """The share of characters in lines or paragraphs that have been there before."""
    size = sum(map(len, parts))
    return (size - sum(map(len, set(parts)))) / size if parts else 0.0


def top_ngram(text: Text, n: int) -> float:
    """The share of characters in the commonest word n-gram; one that occurs once is no repetition."""
    ranks = text.ngrams(n)
    counts = np.bincount(ranks) if len(ranks) else np.zeros(1)
    return text.covered(np.flatnonzero(ranks == counts.argmax()), n) if counts.max() > 1 else 0.0


def duplicate_ngrams(text: Text, n: int) -> float:
    """The share of characters in word n-grams that have been there before."""
    ranks = text.ngrams(n)
    again = np.ones(len(ranks), dtype=bool)
    again[np.unique(ranks, return_index=True)[1]] = False
    return text.covered(np.flatnonzero(again), n) if again.any() else 0.0


def sentences(text: Text) -> float:
    """Marks at which a sentence ends."""
    return len(_SENTENCE.findall(text.text))


def occurrences(text: Text, phrase: str) -> float:
    """How often a phrase occurs, in small or capital letters."""
    return text.text.lower().count(phrase)


def mean_line_length(text: Text) -> float:
    """Characters of a line on average."""
    return sum(map(len, text.lines)) / max(1, len(text.lines))


def longest_line(text: Text) -> float:
    """Characters of the longest line."""
    return max(map(len, text.lines), default=0)


def letters_and_digits(text: Text) -> float:
    """The share of characters that are letters or digits."""
    return _share(map(str.isalnum, text.text))


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0


# The rules

@dataclass(frozen=True)
class Rule:
    """A document breaks the rule when its measure is below `least` or above `most`."""

    name: str
    measure: Callable[[Text], float]
    least: float = 0.0
    most: float = float("inf")
    needs: str = ""
    """"English", or "spaces" between words; a text in another language is not asked."""

    def broken_by(self, text: Text, language: str = "English") -> bool:
        """Whether this document is out of bounds."""
        if (self.needs == "English" and language != "English") or (self.needs and language in SPACELESS):
            return False
        return not self.least <= self.measure(text) <= self.most


GOPHER = (
    Rule("words", word_count, 50, 100_000, "spaces"),
    Rule("mean word length", mean_word_length, 3, 10, "English"),
    Rule("hashes", partial(symbols_per_word, symbols=("#",)), most=0.1),
    Rule("ellipses", partial(symbols_per_word, symbols=("...", "…")), most=0.1),
    Rule("bullet lines", bullet_lines, most=0.9),
    Rule("ellipsis lines", ellipsis_lines, most=0.3),
    Rule("words with letters", words_with_letters, 0.8),
    Rule("stop words", stop_words, 2, needs="English"))
REPETITION = (
    Rule("repeated lines", lambda text: repeated(text.lines), most=0.3),
    Rule("repeated paragraphs", lambda text: repeated(text.paragraphs), most=0.3),
    Rule("characters of repeated lines", lambda text: repeated_characters(text.lines), most=0.2),
    Rule("characters of repeated paragraphs", lambda text: repeated_characters(text.paragraphs), most=0.2),
    *(Rule(f"commonest {n}-gram", partial(top_ngram, n=n), most=most) for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))),
    *(Rule(f"repeated {n}-grams", partial(duplicate_ngrams, n=n), most=round(0.2 - n / 100, 2)) for n in range(5, 11)))
C4 = (
    Rule("sentences", sentences, 3),
    Rule("lorem ipsum", partial(occurrences, phrase="lorem ipsum"), most=0),
    Rule("curly brackets", partial(occurrences, phrase="{"), most=0))
CODEX = (
    Rule("mean line length", mean_line_length, most=100),
    Rule("longest line", longest_line, most=1_000),
    Rule("letters and digits", letters_and_digits, 0.25))


def broken(text: str, rules: Iterable[Rule], language: str = "English") -> list[str]:
    """The names of the rules that a document in this language breaks, in the order of the rules."""
    described = Text(text)
    return [rule.name for rule in rules if rule.broken_by(described, language)]


def sentence_lines(text: str) -> str:
    """C4's choice of lines: at least 5 words, a sentence's end at the end, and no word of JavaScript in them.

    For pages of the web, where a line is a paragraph: in text that is wrapped, most lines end within a sentence.
    """
    return "\n".join(line for line in text.split("\n") if line.rstrip().endswith(LINE_ENDS)
                     and len(line.split()) >= 5 and "javascript" not in line.lower())
