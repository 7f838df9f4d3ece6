"""Learning byte-level BPE's merges: which two neighbouring tokens become one, 9,738 times over.

`count_pairs`, `merge_pair` and `naive_merges` are the idea in a dozen lines: count every pair of neighbours,
merge the most frequent one everywhere, start again. `learn_merges` learns the same merges thousands of times
faster, because it never starts again: a merge changes only the counts of the pairs beside it, and it knows
where they are.

Both work on unique words with their counts, so time grows with the different words of a text, not with its
length. Ids 0 to 255 are the bytes in GPT-2's order (see BYTE_ORDER) and id 256 + n is the n-th merge. Between
equally frequent pairs the one with the lower ids wins, first by its left, then by its right token. Hugging
Face's trainer does the same with the same order of bytes, so the merges are the same too.
Source: arXiv:1508.07909 §3.2. Left out: limits on the length of tokens or on the least count of a pair.
"""

import gc
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from operator import add

from minillm.progress import bar, track
from minillm.text.clean import repair_surrogates
from minillm.text.patterns import word_finder

Pair = tuple[int, int]

_PRINTING = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_ORDER = bytes(_PRINTING + [byte for byte in range(256) if byte not in _PRINTING])
"""The byte of each of the first 256 ids: bytes that are a visible character in Latin-1, then the other 68."""
_ID_OF_BYTE = bytes(BYTE_ORDER.index(byte) for byte in range(256))

# A pair is kept as one integer, left << 20 | right: it hashes faster than a tuple and sorts the same.
_BITS = 20
_NO_TOKEN = (1 << _BITS) - 1
_BATCH = 4_000_000  # characters that a worker counts at a time: much more than it costs to send them


# The idea, in full

def count_pairs(words: Mapping[tuple[int, ...], int]) -> Counter[Pair]:
    """How often each two ids stand side by side, in words that each occur as often as their count says."""
    pairs = Counter()
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += count
    return pairs


def merge_pair(ids: Sequence[int], pair: Pair, new_id: int) -> tuple[int, ...]:
    """`ids` with `new_id` wherever `pair` stood, from left to right: (1, 1) turns 1 1 1 into new_id 1."""
    merged, at = [], 0
    while at < len(ids):
        if tuple(ids[at:at + 2]) == tuple(pair):
            merged.append(new_id)
            at += 2
        else:
            merged.append(ids[at])
            at += 1
    return tuple(merged)


def naive_merges(words: Mapping[str, int], merges: int) -> list[Pair]:
    """The merges, recounting everything before each one: what `learn_merges` must equal."""
    split = Counter({tuple(word.encode().translate(_ID_OF_BYTE)): count for word, count in words.items()})
    learned: list[Pair] = []
    while len(learned) < merges and (pairs := count_pairs(split)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        split = {merge_pair(word, best, 256 + len(learned)): count for word, count in split.items()}
        learned.append(best)
    return learned


# Words

def count_words(texts: Iterable[str], pattern: str, workers: int = 1) -> Counter[str]:
    """How often each word (each match of `pattern`) occurs. Merges never cross from one word into the next.

    workers > 1 counts in that many new processes. They take seconds to start: they pay from about 100 MB on.
    Raises: ValueError if workers < 1; RuntimeError if the processes cannot start.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: must be at least 1 (1 counts in this process).")
    texts = track(texts, "count words", unit="text")
    return _count_batch(texts, pattern) if workers == 1 else _count_in_processes(texts, pattern, workers)


def _count_batch(texts: Iterable[str], pattern: str) -> Counter[str]:
    """The words of some texts, counted here."""
    words, find = Counter(), word_finder(pattern)
    for text in texts:
        words.update(find(repair_surrogates(text)))
    return words


def _count_in_processes(texts: Iterable[str], pattern: str, workers: int) -> Counter[str]:
    """The words of all texts, counted by processes that share nothing (spawned, which is safe everywhere)."""
    words: Counter[str] = Counter()
    waiting: list[Future[Counter[str]]] = []
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for batch in _batches(texts):
                waiting.append(pool.submit(_count_batch, batch, pattern))
                if len(waiting) > 2 * workers:  # enough to keep all busy, without holding the whole corpus
                    words.update(waiting.pop(0).result())
            for counted in waiting:
                words.update(counted.result())
    except BrokenProcessPool as error:
        raise RuntimeError(f"The {workers} counting processes died or could not start. A script must call "
                           "this under `if __name__ == '__main__':`, because each process imports the script "
                           "again. Or use workers=1.") from error
    return words


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with at least _BATCH characters each, but for the last."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# The trainer

def learn_merges(words: Mapping[str, int], merges: int) -> list[Pair]:
    """The pairs of ids to merge, the most frequent first; fewer than asked once every word is a single token.

    Cost: each place where two bytes of a unique word meet is merged at most once; the rest is the queue.
    Raises: ValueError if the ids would pass 2^20 - 2.
    """
    if 256 + merges > _NO_TOKEN:
        raise ValueError(f"{merges:,} merges: this trainer's ids end at {_NO_TOKEN - 1:,}. Learn at most "
                         f"{_NO_TOKEN - 256:,} merges.")
    learned: list[Pair] = []
    with bar("learn merges", total=merges, unit="merge") as progress, _collector_paused():
        pairs = _Pairs(words)
        while len(learned) < merges and (pair := pairs.most_frequent()) is not None:
            pairs.merge(pair)
            learned.append((pair >> _BITS, pair & _NO_TOKEN))
            progress.update()
    return learned


class _Pairs:
    """All unique words, the pairs of neighbours in them, and where each pair is.

    `row` has a symbol for each byte of the words, and _NO_TOKEN around each word. A token writes its id on
    its first and on its last byte, so both tokens can be read at the place where they meet. `places` has, for
    each pair, all places where it came to meet; which of them are gone is noticed when the pair's turn comes.
    (Within a token old ids may be left, but only of the pair that was merged there, whose turn is over.)
    """

    def __init__(self, words: Mapping[str, int]):
        self.lengths = [1] * 256  # bytes in each token
        self.row, self.weights = [_NO_TOKEN], [0]  # weights: how often the word at this place occurs
        for word, count in words.items():
            symbols = word.encode().translate(_ID_OF_BYTE)
            self.row.extend(symbols)
            self.row.append(_NO_TOKEN)
            self.weights.extend([count] * (len(symbols) + 1))
        self.places = _meeting_places(self.row)
        self.counts = {pair: sum(map(self.weights.__getitem__, at)) for pair, at in self.places.items()}
        self.queue = [_entry(pair, count) for pair, count in self.counts.items()]
        heapq.heapify(self.queue)

    def most_frequent(self) -> int | None:
        """Take the pair with the highest count. Counts only fall: an entry that is too high is corrected."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            pair = entry & ((1 << 2 * _BITS) - 1)
            count = self.counts[pair]
            if entry == _entry(pair, count):
                return pair
            if count:
                heapq.heappush(self.queue, _entry(pair, count))
        return None

    def merge(self, pair: int) -> None:
        """Write the next id wherever `pair` stands, and bring the pairs beside it up to date."""
        left, right, row = pair >> _BITS, pair & _NO_TOKEN, self.row
        left_length, right_length, new = self.lengths[left], self.lengths[right], len(self.lengths)
        self.lengths.append(left_length + right_length)
        before, after = defaultdict(list), defaultdict(list)  # neighbour -> where it meets the new token
        for place in self.places.pop(pair):  # ascending, so a run like aaa is merged from its left
            if row[place] == right and row[place - 1] == left:
                start, end = place - left_length, place + right_length
                row[start] = row[end - 1] = new
                before[row[start - 1]].append(start)
                after[row[end]].append(end)
        for neighbours in before, after:
            neighbours.pop(_NO_TOKEN, None)
        for neighbour, at in after.items():
            self._replace(right << _BITS | neighbour, new << _BITS | neighbour, at)
        for neighbour, at in before.items():  # second: in abab the neighbour is the new token, met just above
            self._replace(neighbour << _BITS | left, neighbour << _BITS | new, at)

    def _replace(self, old: int, new: int, at: list[int]) -> None:
        """At these places the pair `new` has taken the place of the pair `old`."""
        count = sum(map(self.weights.__getitem__, at))
        self.counts[old] -= count
        self.counts[new] = count
        self.places[new] = at
        heapq.heappush(self.queue, _entry(new, count))


def _meeting_places(row: list[int]) -> dict[int, list[int]]:
    """For each pair, the places where its right token begins, in ascending order."""
    places = defaultdict(list)
    lefts = map((1 << _BITS).__mul__, row)
    for place, pair in enumerate(map(add, lefts, row[1:]), start=1):
        places[pair].append(place)
    return {pair: at for pair, at in places.items() if _NO_TOKEN not in (pair >> _BITS, pair & _NO_TOKEN)}


def _entry(pair: int, count: int) -> int:
    """An integer whose order in the queue is: the higher count first, then the lower pair."""
    return pair - (count << 2 * _BITS)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without Python's search for reference cycles: there are none, and it would read all lists each time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
