"""Duplicates: the same document twice, and nearly the same.

Exact copies are found by a hash of the words. Near copies are found by MinHash: the share of equal numbers in two
signatures estimates how many word n-grams two documents share. Cutting signatures into bands and looking only at
documents with an equal band finds the pairs above a threshold without comparing all with all. Similar pairs are joined
into clusters, and the first document of each cluster stays.

Source: Broder 1997; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, §3.4; for pretraining,
arXiv:2107.06499. FineWeb (arXiv:2406.17557 §3.4) takes word 5-grams in 14 bands of 8 rows; RefinedWeb
(arXiv:2306.01116) 450 bands of 20, a steeper curve for 80 times the hashes. Both trust an equal band; here candidates
are also compared exactly. Left out: repeated passages inside different documents (suffix arrays).
Memory: all texts, and for each 1 kB of signature in `bands` keys.
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


def exact_hash(text: str) -> bytes:
    """The same for two texts with the same words in the same order, whatever their case, spaces and punctuation."""
    return hashlib.sha256(" ".join(words_of(text)).encode("utf-8", "replace")).digest()


def near_copies(texts: Iterable[str], *, bands: int = 16, rows: int = 8, threshold: float = 0.7) -> list[int]:
    """For each text the place of the first text of its cluster: its own place if it is no near copy of an earlier one.

    A pair belongs together when it shares a band of its signatures, and `threshold` of its word 5-grams. Clusters are
    chains of such pairs, so that their ends may have less in common.
    """
    texts = list(texts)
    parents = list(range(len(texts)))
    bins: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for place, text in enumerate(track(texts, "find near copies", unit="doc")):
        parts = signature(text, hashes=bands * rows).reshape(bands, rows)
        keys = [(band, part.tobytes()) for band, part in enumerate(parts)]
        for other in sorted({other for key in keys for other in bins[key]}):
            ends = _root(parents, place), _root(parents, other)
            if ends[0] != ends[1] and jaccard(text, texts[other]) >= threshold:
                parents[max(ends)] = min(ends)
        for key in keys:
            bins[key].append(place)
    return [_root(parents, place) for place in range(len(texts))]


def remove_duplicates(documents: Iterable[Document], *, bands: int = 16, rows: int = 8,
                      threshold: float = 0.7) -> Iterator[Document]:
    """Without the copies of an earlier document, then with only the first of each cluster of near copies, in order."""
    different: dict[bytes, Document] = {}
    for document in documents:
        different.setdefault(exact_hash(document.text), document)
    first = near_copies((document.text for document in different.values()), bands=bands, rows=rows, threshold=threshold)
    yield from (document for place, document in enumerate(different.values()) if first[place] == place)


def _root(parents: list[int], place: int) -> int:
    """The first of a cluster; the way there is shortened for the next who asks."""
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


def _ngrams(text: str, n: int) -> set[str]:
    """The word n-grams of a text; a shorter text is one n-gram."""
    words = words_of(text)
    return {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def _number(gram: str) -> int:
    """A 64-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=8).digest(), "little")
