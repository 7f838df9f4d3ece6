"""Cleaning a corpus: one way of writing, no copies, the right language, quality rules, no near copies; and what each took.

    source            languages     rules (filters.py)
    stories           English       Gopher, repetition, C4; copies stay: this only looks, `prepare` never thins stories out
    python-docs       English       Gopher, repetition, C4 but for curly brackets (documentation of Python has dicts)
    python-source     -             Codex
    languages         all           Gopher from 20 words on (the page is short), repetition
    paths and hf:     all           Gopher, repetition, lorem ipsum; for .py files Codex

A document whose language is unknown stays, and is asked the rules of English if only English is wanted. Cheap stages
come first; the same documents in the same order give the same result.
Memory: up to the rules, documents pass one by one, and of each only a hash of 32 bytes and the name are kept; looking
for near copies takes all that are left (dedup.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from minillm.data.corpora import Document
from minillm.data.dedup import exact_hash, near_copies
from minillm.data.filters import C4, CODEX, GOPHER, REPETITION, Rule, broken
from minillm.data.language import UNKNOWN, identify
from minillm.progress import track
from minillm.text.clean import clean

SENTENCES, LOREM_IPSUM, _ = C4
EXAMPLES = 3
"""Documents that a stage names."""


@dataclass(frozen=True)
class Cleaning:
    """What is taken out of a corpus."""

    rules: tuple[Rule, ...] = (*GOPHER, *REPETITION, LOREM_IPSUM)
    """Rules of quality for text."""
    languages: tuple[str, ...] = ()
    """Languages to keep; none named keeps all."""
    min_words: int = 50
    """Least words of a document, if its rules ask for any."""
    code: bool = True
    """Whether documents named *.py are code, and have code's rules."""
    dedup: bool = True
    """Take out copies and near copies."""

    def __post_init__(self):
        """Refuse a length that means nothing."""
        if self.min_words < 0:
            raise ValueError(f"min_words = {self.min_words}: must not be negative.")

    def broken_by(self, document: Document, language: str) -> list[str]:
        """The names of the rules that a document in this language breaks."""
        if self.is_code(document):
            return broken(document.text, CODEX)
        if language == UNKNOWN and self.languages == ("English",):
            language = "English"
        rules = [replace(rule, least=self.min_words) if rule.name == "words" else rule for rule in self.rules]
        return broken(document.text, rules, language)

    def is_code(self, document: Document) -> bool:
        """Whether a document is a program."""
        return self.code and document.name.endswith(".py")


SOURCES = {
    "stories": Cleaning(GOPHER + REPETITION + C4, ("English",), dedup=False),
    "python-docs": Cleaning((*GOPHER, *REPETITION, SENTENCES, LOREM_IPSUM), ("English",), code=False),
    "languages": Cleaning(GOPHER + REPETITION, min_words=20)}


def cleaning_for(source: str, min_words: int | None = None, dedup: bool = True) -> Cleaning:
    """What the table above says for a source; min_words None means the source's own."""
    found = SOURCES.get(source, Cleaning())
    return replace(found, min_words=found.min_words if min_words is None else min_words, dedup=dedup and found.dedup)


@dataclass
class Stage:
    """What came into one step of cleaning and what came out of it, in documents and bytes of UTF-8."""

    name: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """How many documents each reason took; a document may have several."""
    examples: list[str] = field(default_factory=list)
    """Names of the first documents that were taken out, and why."""

    @property
    def removed(self) -> float:
        """The share of bytes that was taken out."""
        return 1 - self.bytes_out / self.bytes_in if self.bytes_in else 0.0

    def take(self, document: Document) -> Document:
        """Count a document that comes in."""
        self.documents_in += 1
        self.bytes_in += _size(document)
        return document

    def keep(self, document: Document) -> Document:
        """Count a document that goes on."""
        self.documents_out += 1
        self.bytes_out += _size(document)
        return document

    def drop(self, document: Document, reasons: list[str], of: str = "") -> None:
        """Note why a document goes no further; `of` is the document that it copies."""
        self.reasons.update(reasons)
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{document.name} ({', '.join(reasons)}{of and ' of '}{of})")


@dataclass
class Report:
    """The stages in their order: what goes out of one comes into the next."""

    stages: list[Stage]

    def table(self) -> str:
        """A line for each stage, then for each the commonest reasons and some of the documents."""
        lines = [f"{'':<14}{'documents':>10}{'bytes':>14}{'removed':>10}{'bytes':>14}{'share':>8}"]
        lines += [f"{s.name:<14}{s.documents_in:>10,}{s.bytes_in:>14,}{s.documents_in - s.documents_out:>10,}"
                  f"{s.bytes_in - s.bytes_out:>14,}{s.removed:>8.1%}" for s in self.stages]
        first, last = self.stages[0], self.stages[-1]
        lines.append(f"{'left':<14}{last.documents_out:>10,}{last.bytes_out:>14,}"
                     f"{first.documents_in - last.documents_out:>10,}{first.bytes_in - last.bytes_out:>14,}"
                     f"{1 - last.bytes_out / max(1, first.bytes_in):>8.1%}")
        for stage in self.stages:
            if stage.reasons:
                lines.append(f"{stage.name}: " + ", ".join(f"{why} {n:,}" for why, n in stage.reasons.most_common(8)))
                lines.append("    for example " + "; ".join(stage.examples))
        return "\n".join(lines)


def clean_documents(documents: Iterable[Document], cleaning: Cleaning) -> tuple[list[Document], Report]:
    """The documents that are left, in their order, and the report of what each stage took.

    Raises: ValueError when nothing is left of something, naming the stage and the rule that took the most.
    """
    tidied, copies, languages, rules, near = stages = [Stage(name) for name in (
        "one spelling", "exact copies", "language", "quality rules", "near copies")]
    passing = _tidy(track(documents, "clean", unit="doc"), tidied)
    passing = _without_copies(passing, copies, cleaning)
    passing = _in_languages(passing, languages, cleaning)
    passing = _by_rules(passing, rules, cleaning)
    kept = _without_near_copies(list(passing), near, cleaning)
    if tidied.documents_in and not kept:
        worst = max(stages, key=lambda stage: stage.documents_in - stage.documents_out)
        reason, count = worst.reasons.most_common(1)[0]
        raise ValueError(f"cleaning left none of {tidied.documents_in:,} documents: \"{worst.name}\" took "
                         f"{worst.documents_in - worst.documents_out:,}, {count:,} of them for \"{reason}\". Such text is not "
                         f"what these rules are for: change min_words (now {cleaning.min_words}), or do not clean.")
    return kept, Report(stages)


def _tidy(documents: Iterable[Document], stage: Stage) -> Iterator[Document]:
    """Each text in one way of writing; indentation stays, for code and examples."""
    for document in documents:
        text = clean(stage.take(document).text, form="NFC", layout="code")
        if text.strip():
            yield stage.keep(replace(document, text=text))
        else:
            stage.drop(document, ["empty"])


def _without_copies(documents: Iterable[Document], stage: Stage, cleaning: Cleaning) -> Iterator[Document]:
    """The first of each group of equal documents."""
    seen: dict[bytes, str] = {}
    for document in map(stage.take, documents):
        key = exact_hash(document.text)
        if cleaning.dedup and key in seen:
            stage.drop(document, ["copy"], seen[key])
        else:
            seen[key] = document.name
            yield stage.keep(document)


def _in_languages(documents: Iterable[Document], stage: Stage, cleaning: Cleaning) -> Iterator[tuple[Document, str]]:
    """Documents that are not known to be in another language, each with its language."""
    for document in map(stage.take, documents):
        language = UNKNOWN if cleaning.is_code(document) else identify(document.text)
        if language == UNKNOWN or language in cleaning.languages or not cleaning.languages:
            yield stage.keep(document), language
        else:
            stage.drop(document, [language])


def _by_rules(documents: Iterable[tuple[Document, str]], stage: Stage, cleaning: Cleaning) -> Iterator[Document]:
    """Documents that break no rule."""
    for document, language in documents:
        reasons = cleaning.broken_by(stage.take(document), language)
        if reasons:
            stage.drop(document, reasons)
        else:
            yield stage.keep(document)


def _without_near_copies(documents: list[Document], stage: Stage, cleaning: Cleaning) -> list[Document]:
    """The first of each cluster of near copies."""
    places = range(len(documents))
    first = near_copies(document.text for document in documents) if cleaning.dedup else places
    kept = []
    for place, document in zip(first, map(stage.take, documents), strict=True):
        if documents[place] is document:
            kept.append(stage.keep(document))
        else:
            stage.drop(document, ["near copy"], documents[place].name)
    return kept


def _size(document: Document) -> int:
    return len(document.text.encode("utf-8", "replace"))
