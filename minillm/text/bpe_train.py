"""Learning BPE merges: again and again, join the pair of neighbouring symbols that occurs most often.

`count_pairs` and `merge_pair` are the whole idea, and `train_naive` is the loop around them: it reads every word for
every merge. `train_merges` gives the same merges in time that follows the number of different words: it counts each
word once, remembers which words hold each pair, and after a merge looks only at those. Ties go to the lower pair of
ids, the bytes being numbered in GPT-2's order, as in Hugging Face's tokenizers: the same text gives the same merges.
Source: arXiv:1508.07909.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise
from multiprocessing import get_context

import regex

from minillm.progress import track

Pair = tuple[int, int]

# GPT-2 numbers the 256 bytes by printability: first those that show as a character, then the others.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_ORDER = (*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE))
BYTE_ID = {byte: number for number, byte in enumerate(BYTE_ORDER)}


def count_pairs(ids: Sequence[int]) -> Counter[Pair]:
    """How often each two neighbours occur: [1, 2, 3, 1, 2] -> {(1, 2): 2, (2, 3): 1, (3, 1): 1}."""
    return Counter(pairwise(ids))


def merge_pair(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of `pair`, from left to right, by `new`: [1, 1, 1], (1, 1) -> [new, 1]."""
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train_naive(words: Counter[bytes], merges: int) -> list[tuple[bytes, bytes]]:
    """The idea in ten lines, for reading and for testing the fast one. Cost: every word, for every merge."""
    symbols, ids = [bytes([b]) for b in BYTE_ORDER], {word: [BYTE_ID[b] for b in word] for word in words}
    learned = []
    for _ in range(merges):
        counts = Counter()
        for word, count in words.items():
            for pair, times in count_pairs(ids[word]).items():
                counts[pair] += times * count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        left, right = (symbols[i] for i in best)
        new = _number(left + right, symbols)
        ids = {word: merge_pair(old, best, new) for word, old in ids.items()}
        learned.append((left, right))
    return learned


def splitter(pattern: str) -> Callable[[str], list[str]]:
    """The function that cuts a text into pieces. Pieces are the same for every text, but Python's own `re` cuts one
    that is all ASCII in half the time, given the pattern in ASCII's letters, digits and spaces.
    """
    plain = pattern
    for unicode, ascii in ((r"\p{L}\p{N}]", "A-Za-z0-9]"), (r"[^\s", r"[^\t-\r "), (r"\p{L}", "[A-Za-z]"),
                           (r"\p{N}", "[0-9]"), (r"\s", r"[\t-\r ]"), (r"\S", r"[^\t-\r ]")):
        plain = plain.replace(unicode, ascii)
    full = regex.compile(pattern).findall
    if r"\p{" in plain:
        return full
    quick = re.compile(plain, re.ASCII).findall
    return lambda text: quick(text) if text.isascii() else full(text)


def count_words(texts: Iterable[str], pattern: str, workers: int = 1) -> Counter[bytes]:
    """How often each piece of the pre-split occurs, as UTF-8 bytes.

    workers: processes that split in parallel. Starting them costs about a second, so it pays from some 20 MB on.
    """
    total: Counter[str] = Counter()
    if workers <= 1:
        split = splitter(pattern)
        for text in track(texts, "count words", unit="text"):
            total.update(split(text))
    else:
        jobs = ((list(batch), pattern) for batch in _batches(texts, 1_000))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for counted in track(pool.map(_count_batch, jobs), "count words", unit="batch"):
                total.update(counted)
    words: Counter[bytes] = Counter()
    for word, count in total.items():
        words[word.encode("utf-8", "replace")] += count
    return words


def train_merges(words: Counter[bytes], vocab_size: int) -> list[tuple[bytes, bytes]]:
    """The merges that grow 256 bytes to `vocab_size` tokens, or all there are if the text gives fewer.

    Each symbol is held as one character, chr(id): a word is then a string, and `str.replace` merges a pair, from left
    to right, at C's speed; a pair is a string of two characters, and strings compare as pairs of ids do.
    """
    symbols, known = [bytes([b]) for b in BYTE_ORDER], {bytes([b]): i for i, b in enumerate(BYTE_ORDER)}
    table = {byte: chr(number) for byte, number in BYTE_ID.items()}
    spelled = [word.decode("latin-1").translate(table) for word in words]
    often = list(words.values())
    counts, places = _index(spelled, often)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    learned = []
    for _ in track(range(vocab_size - len(symbols)), "learn merges", unit="merge"):
        pair = _most_frequent(heap, counts)
        while pair is not None:
            left, right = symbols[ord(pair[0])], symbols[ord(pair[1])]
            learned.append((left, right))
            fresh = left + right not in known
            new = known.setdefault(left + right, len(symbols))
            changed = _merge_everywhere(pair, chr(new), spelled, often, counts, places)
            for touched in changed:
                heapq.heappush(heap, (-counts[touched], touched))
            if fresh:
                symbols.append(left + right)
                break
            pair = _most_frequent(heap, counts)  # another way to spell a known token: it fills no place
        if pair is None:
            break
    return learned


def _index(spelled: list[str], often: list[int]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """How often each pair occurs in the text, and in which words."""
    counts: dict[str, int] = {}
    places: dict[str, list[int]] = {}
    for number, word in enumerate(spelled):
        count = often[number]
        for i in range(len(word) - 1):
            pair = word[i:i + 2]
            if pair in counts:
                counts[pair] += count
                places[pair].append(number)
            else:
                counts[pair] = count
                places[pair] = [number]
    return counts, places


def _most_frequent(heap: list, counts: dict[str, int]) -> str | None:
    """Take the most frequent pair off the heap. Its counts may be out of date: then put it back with the true one."""
    while heap:
        count, pair = heapq.heappop(heap)
        actual = counts.get(pair, 0)
        if actual == -count:
            return pair
        if 0 < actual < -count:
            heapq.heappush(heap, (-actual, pair))
    return None


def _merge_everywhere(pair: str, new: str, spelled: list[str], often: list[int], counts: dict[str, int],
                      places: dict[str, list[int]]) -> set[str]:
    """Merge `pair` in the words that hold it and keep the counts true. Returns the pairs that became more frequent."""
    changed = set()
    del counts[pair]
    for number in places.pop(pair):
        word = spelled[number]
        at = word.find(pair)
        if at < 0:
            continue  # an old note: an earlier merge has taken one of its symbols, or the word is listed twice
        spelled[number] = merged = word.replace(pair, new)
        count = often[number]
        if len(word) - len(merged) > 1:  # several occurrences, which may touch: count the whole word anew
            lost = [word[i:i + 2] for i in range(len(word) - 1)]
            won = [merged[i:i + 2] for i in range(len(merged) - 1)]
        else:  # one occurrence: only its neighbours change
            lost, won = [], []
            if at:
                lost.append(word[at - 1:at + 1])
                won.append(merged[at - 1:at + 1])
            if at + 1 < len(merged):
                lost.append(word[at + 1:at + 3])
                won.append(merged[at:at + 2])
        for old in lost:
            if old in counts:
                counts[old] -= count
        for born in won:
            if born in counts:
                counts[born] += count
                places[born].append(number)
            else:
                counts[born] = count
                places[born] = [number]
            changed.add(born)
    counts.pop(pair, None)
    return changed


def _count_batch(job: tuple[list[str], str]) -> Counter[str]:
    """One process's share of the counting."""
    texts, pattern = job
    split = splitter(pattern)
    counted: Counter[str] = Counter()
    for text in texts:
        counted.update(split(text))
    return counted


def _batches(items: Iterable[str], size: int) -> Iterable[list[str]]:
    """Lists of `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _number(token: bytes, symbols: list[bytes]) -> int:
    """The id of a token, which gets the next one if it is new."""
    if token not in symbols:
        symbols.append(token)
    return symbols.index(token)
