"""Which language is a text in? Naive Bayes over the letters, pairs and triples of letters, and words of a few sentences.

Each language of languages.json gives its nine sentences, and four of them a list of their commonest words; a text
belongs to the language under which its n-grams are the most likely. Too few letters, two languages that are too close,
or too many n-grams that the language has never shown make the answer "unknown". Chinese is one language here, learned
in simplified characters; the script of a text is read from the characters that text/clean.py knows to differ.
Source: the idea of n-gram profiles is Cavnar and Trenkle 1994, who compare ranks; probabilities need less text.
Left out: languages that are not on the page (a close relative of one, as Portuguese of Spanish, is taken for it), and
texts in several languages.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from minillm.data.corpora import languages
from minillm.text.clean import simplify_chinese

UNKNOWN = "unknown"
SPACELESS = ("Chinese", "Chinese (traditional)", "Japanese")
"""Languages that put no spaces between words: a count of words says nothing about them."""

ALPHA = 0.5  # what is added to each count, so that nothing is impossible
SHORTEST = 6  # letters; below, any answer would be a guess
MARGIN = 0.1  # nats for each n-gram between the best language and the second
FAMILIAR = 0.8  # of the least share of known n-grams that a sentence of the language had when the others were known
SAMPLE = 5_000  # characters that are looked at

COMMON_WORDS = {
    "English": "the of and to a in is that it for on with as be by this not are but from or have an which you all there "
               "will if more when no can has other any only may than them its into do then such must these used use",
    "German": "der die und das in den von zu mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er "
              "hat dass sie nach wird bei einer um noch wie oder aber nur wenn wir ich du kein mehr durch über",
    "French": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont mais comme ou "
              "si leur avec elle nous cette ces aux être son sa ses tout je tu vous on sans depuis",
    "Spanish": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le si sin sobre "
               "este ya entre cuando todo esta ser son también hay desde está yo donde"}


@dataclass(frozen=True)
class Guess:
    """The language, or "unknown"; and for every language the mean log probability of an n-gram, in nats."""

    language: str
    scores: dict[str, float]


class Identifier:
    """Knows the languages of `sentences`: a list for each name."""

    def __init__(self, sentences: dict[str, list[str]]):
        """Count the n-grams. Raises: ValueError for fewer than two languages, or one without two sentences."""
        poor = [name for name, lines in sentences.items() if len(lines) < 2]
        if len(sentences) < 2 or poor:
            raise ValueError(f"{len(sentences)} languages, and fewer than 2 sentences of {poor or 'none'}: to tell languages "
                             f"apart takes at least two of them with two sentences each.")
        counts, self._familiar = {}, {}
        for name, lines in sentences.items():
            if name == "Chinese (traditional)" and "Chinese" in sentences:
                continue
            parts = [_counted(line) for line in lines]
            words = _counted(COMMON_WORDS.get(name, ""))
            counts[name] = sum(parts, words)
            self._familiar[name] = FAMILIAR * min(_share(part, counts[name] - part) for part in parts)
        kinds = len(set().union(*counts.values()))
        self._unseen = {name: math.log(ALPHA / (c.total() + ALPHA * kinds)) for name, c in counts.items()}
        self._seen = {name: {gram: math.log((k + ALPHA) / (c.total() + ALPHA * kinds)) for gram, k in c.items()}
                      for name, c in counts.items()}

    def identify(self, text: str) -> Guess:
        """The language of a text, judged by its first 5,000 characters."""
        sample = text[:SAMPLE]
        grams = _counted(simplify_chinese(sample))
        total = max(1, grams.total())
        scores = {name: sum(k * seen.get(gram, self._unseen[name]) for gram, k in grams.items()) / total
                  for name, seen in self._seen.items()}
        best, second = sorted(scores, key=scores.get, reverse=True)[:2]
        if (sum(map(str.isalpha, sample)) < SHORTEST or scores[best] - scores[second] < MARGIN
                or _share(grams, self._seen[best]) < self._familiar[best]):
            best = UNKNOWN
        if best == "Chinese" and simplify_chinese(sample) != sample:
            best = "Chinese (traditional)"
        return Guess(best, scores)


@cache
def identifier() -> Identifier:
    """The one that knows the course's own page of languages."""
    return Identifier(languages())


def identify(text: str) -> str:
    """The language of a text by its English name, or "unknown"."""
    return identifier().identify(text).language


def _counted(text: str) -> Counter[str]:
    """Each letter, pair and triple of letters, and word of a text; a space marks where a word begins and ends."""
    found: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        padded = f" {word} "
        found.update(word)
        for n in (2, 3):
            found.update(padded[i:i + n] for i in range(len(padded) - n + 1))
        found[padded] += 1
    return found


def _share(grams: Counter[str], known) -> float:
    """How many of the n-grams are known, from 0 to 1."""
    return sum(k for gram, k in grams.items() if gram in known) / max(1, grams.total())
