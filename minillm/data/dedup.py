"""Duplicates: the same document twice, and nearly the same.

Exact copies are found by a hash of the words. Near copies are found by MinHash: the share of equal numbers in two
signatures estimates how many word n-grams two documents share. Cutting signatures into bands and looking only at
documents with an equal band finds the pairs above a threshold without comparing all with all.
Source: Broder 1997; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, §3.4.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from minillm.data.corpora import Document
from minillm.progress import track

PIECE = 4096
"""n-grams hashed at once: 4 MB at 128 hashes, however long the document."""


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation: what two copies have in common."""
    return re.findall(r"\w+", text.lower())


def jaccard(a: str, b: str, n: int = 5) -> float:
    """Shared word n-grams over all word n-grams of two texts, from 0 to 1."""
    first, second = _ngrams(a, n), _ngrams(b, n)
    return len(first & second) / len(first | second) if first | second else 1.0


def signature(text: str, *, hashes: int = 128, n: int = 5, seed: int = 0) -> np.ndarray:
    """MinHash: for each of `hashes` random functions the smallest value over the text's n-grams. Shape (hashes,)."""
    grams = np.array([_number(gram) for gram in _ngrams(text, n)] or [0], dtype=np.uint64)
    generator = np.random.Generator(np.random.PCG64(seed))
    # x -> a·x + b modulo 2^64 (uint64 wraps around), with a and x as wide as the modulus: a narrower product would
    # hardly wrap, so all functions would keep the order of x and agree on which n-gram is the smallest
    a, b = generator.integers(0, 1 << 64, (2, hashes), dtype=np.uint64)
    smallest = np.full(hashes, np.iinfo(np.uint64).max)
    for start in range(0, len(grams), PIECE):
        smallest = np.minimum(smallest, (grams[start:start + PIECE, None] * (a | np.uint64(1)) + b).min(axis=0))
    return smallest


def found_chance(similarity: float, bands: int = 16, rows: int = 8) -> float:
    """The chance that two documents of this Jaccard similarity share a band: 1 - (1 - s^rows)^bands."""
    return 1 - (1 - similarity ** rows) ** bands


def remove_duplicates(documents: Iterable[Document], *, bands: int = 16, rows: int = 8,
                      threshold: float = 0.7) -> Iterator[Document]:
    """Yield each document unless an earlier one is its copy, or shares `threshold` of their word 5-grams.

    Candidates that share a band are compared exactly, so nothing below the threshold is ever removed.
    """
    seen: set[bytes] = set()
    kept: list[str] = []
    bins: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for document in track(documents, "find duplicates", unit="doc"):
        exact = hashlib.sha256(" ".join(words_of(document.text)).encode("utf-8", "replace")).digest()
        if exact in seen:
            continue
        seen.add(exact)
        parts = signature(document.text, hashes=bands * rows).reshape(bands, rows)
        keys = [(band, part.tobytes()) for band, part in enumerate(parts)]
        candidates = {other for key in keys for other in bins[key]}
        if any(jaccard(document.text, kept[other]) >= threshold for other in candidates):
            continue
        for key in keys:
            bins[key].append(len(kept))
        kept.append(document.text)
        yield document


def _ngrams(text: str, n: int) -> set[str]:
    """The word n-grams of a text; a shorter text is one n-gram."""
    words = words_of(text)
    return {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def _number(gram: str) -> int:
    """A 64-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=8).digest(), "little")
