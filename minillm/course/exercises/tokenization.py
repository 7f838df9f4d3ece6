"""Lesson 01's exercises: counting pairs, merging one, learning the merges, encoding with them."""

from collections import Counter

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant
from minillm.text.bpe_train import count_pairs, merge_pair

PYTHON_ONLY = {"lesson": "01", "packages": ("numpy", "einops", "regex"), "why": "exact"}


def word(draw: Draw, longest: int = 9) -> tuple[int, ...]:
    """A word over few letters, so that pairs repeat and overlap (1 1 1)."""
    return tuple(draw.ints(draw.int(1, longest), 1, draw.int(1, 3)))


def words(draw: Draw) -> dict[tuple[int, ...], int]:
    """Some words with their counts."""
    return {word(draw): draw.int(1, 9) for _ in range(draw.int(3, 8))}


# count_pairs

def ignores_counts(words):
    return dict(Counter(pair for word in words for pair in zip(word, word[1:])))


def once_a_word(words):
    pairs = Counter()
    for word, count in words.items():
        for pair in set(zip(word, word[1:])):
            pairs[pair] += count
    return pairs


def across_words(words):
    row = [symbol for word, count in words.items() for _ in range(count) for symbol in word]
    return Counter(zip(row, row[1:]))


def without_overlap(words):
    pairs = Counter()
    for word, count in words.items():
        at = 0
        while at + 1 < len(word):
            pairs[word[at], word[at + 1]] += count
            at += 2 if word[at:at + 2] == word[at + 1:at + 3] else 1
    return pairs


COUNT_PAIRS = Exercise(
    name="count_pairs", reference=count_pairs, minutes=8, difficulty=1, **PYTHON_ONLY,
    tests=(Test("one word", lambda draw: ({word(draw, 12) + (1, 1, 1): draw.int(2, 5)},)),
           Test("many words", lambda draw: (words(draw),), cases=6)),
    hints=("zip(word, word[1:]) gives each symbol with the one after it.",
           "words.items() gives each word with its count: how often do the pairs of a word stand in the text, if the word "
           "stands there 5 times?",
           "pairs = Counter(); for each word and count: for each pair of zip(word, word[1:]): pairs[pair] += count."),
    mutants=(Mutant(ignores_counts, "Each word is counted once; but a word that stands in the text 5 times has all its "
                                    "pairs 5 times."),
             Mutant(once_a_word, "A pair that stands in a word twice counts twice: no set here."),
             Mutant(across_words, "The last symbol of a word and the first of the next are no pair: merges never cross words."),
             Mutant(without_overlap, "In 1 1 1 the pair (1, 1) stands twice, at places 0 and 1; overlapping ones count too.")))


# merge_pair

def first_only(ids, pair, new_id):
    for at in range(len(ids) - 1):
        if tuple(ids[at:at + 2]) == tuple(pair):
            return (*ids[:at], new_id, *ids[at + 2:])
    return tuple(ids)


def from_the_right(ids, pair, new_id):
    return merge_pair(ids[::-1], pair[::-1], new_id)[::-1]


def overlapping(ids, pair, new_id):
    merged, at = [], 0
    while at < len(ids):
        if tuple(ids[at:at + 2]) == tuple(pair):
            merged.append(new_id)
            at += 1 if tuple(ids[at + 1:at + 3]) == tuple(pair) else 2
        else:
            merged.append(ids[at])
            at += 1
    return tuple(merged)


def loses_the_last(ids, pair, new_id):
    merged, at = [], 0
    while at < len(ids) - 1:
        found = tuple(ids[at:at + 2]) == tuple(pair)
        merged.append(new_id if found else ids[at])
        at += 2 if found else 1
    return tuple(merged)


def either_order(ids, pair, new_id):
    merged, at = [], 0
    while at < len(ids):
        found = sorted(ids[at:at + 2]) == sorted(pair)
        merged.append(new_id if found else ids[at])
        at += 2 if found else 1
    return tuple(merged)


def pair_of(draw: Draw) -> tuple:
    return tuple(draw.ints(2, 1, 2))


MERGE_PAIR = Exercise(
    name="merge_pair", reference=merge_pair, minutes=10, difficulty=1, **PYTHON_ONLY,
    tests=(Test("a pair of different symbols", lambda draw: (word(draw) + (1, 2) + word(draw) + (2, 1), (1, 2), draw.int(256, 999)), cases=6),
           Test("overlaps and ends", lambda draw: ((2, 1, 1, 1) + word(draw, 4) + (1, 1, 1), (1, 1), draw.int(256, 999)), cases=6),
           Test("any", lambda draw: (word(draw, 14), pair_of(draw), draw.int(256, 999)), cases=10)),
    hints=("Walk through ids with an index that you advance yourself: by 2 after a merge, by 1 otherwise.",
           "What does ids[at:at + 2] hold at the last symbol? It must not be lost, and must not match.",
           "while at < len(ids): if tuple(ids[at:at + 2]) == pair, append new_id and go on 2; else append ids[at] and go on 1."),
    mutants=(Mutant(first_only, "Only the first place is merged; all of them must be."),
             Mutant(from_the_right, "Overlaps are merged from the right: 1 1 1 must become 9 1, not 1 9."),
             Mutant(overlapping, "A symbol was used in two merges: after a merge, both of its symbols are gone."),
             Mutant(loses_the_last, "The last symbol is lost when it is not part of a merge."),
             Mutant(either_order, "(2, 1) is not the pair (1, 2): the order counts.")),
    variants={"from_the_right": Variant(
        "where the pair overlaps itself, the rightmost place counts: 1 1 1 becomes 1 9.", from_the_right,
        (Mutant(lambda ids, pair, new_id: merge_pair(ids[::-1], pair, new_id)[::-1],
                "Turning the ids round turns the pair round, too: (1, 2) becomes (2, 1)."),))})


# learn_merges

def merges_of(words, merges, better=lambda pairs, pair: (-pairs[pair], pair), first_id=256, apply=True):
    """Byte-pair encoding's training, with the places where people go wrong as arguments."""
    learned, words = [], dict(words)
    while len(learned) < merges and (pairs := count_pairs(words)):
        if not apply:
            pairs = Counter({pair: count for pair, count in pairs.items() if pair not in learned})
            if not pairs:
                break
        best = min(pairs, key=lambda pair: better(pairs, pair))
        if apply:
            merged = Counter()
            for ids, count in words.items():
                merged[merge_pair(ids, best, first_id + len(learned))] += count
            words = merged
        learned.append(best)
    return learned


def learn_merges(words, merges):
    return merges_of(words, merges)


LEARN_MERGES = Exercise(
    name="learn_merges", reference=learn_merges, minutes=15, difficulty=2, needs=("count_pairs", "merge_pair"), **PYTHON_ONLY,
    tests=(Test("the first merge, ties too", lambda draw: (words(draw), 1), cases=8),
           Test("merges of merges", lambda draw: (words(draw), draw.int(3, 6)), points=2, cases=6),
           Test("until nothing is left", lambda draw: ({word(draw, 5) + (1,): 2, (3, 2, 1): 1}, 60))),
    hints=("Use your count_pairs and merge_pair. Each round: count, take the best pair, merge it in all words.",
           "The best pair: min(pairs, key=lambda pair: (-pairs[pair], pair)) takes the highest count, and of equals the lower pair.",
           "Start from scratch each round: a merge makes new pairs. Stop when count_pairs gives nothing."),
    mutants=(Mutant(lambda words, merges: merges_of(words, merges, lambda pairs, pair: -pairs[pair]),
                    "Between equally frequent pairs the lower one wins; here it is the one met first."),
             Mutant(lambda words, merges: merges_of(words, merges, lambda pairs, pair: (-pairs[pair], -pair[0], -pair[1])),
                    "Between equally frequent pairs the lower one wins, not the higher."),
             Mutant(lambda words, merges: merges_of(words, merges, apply=False),
                    "The words are not merged between rounds, so no merge can build on another."),
             Mutant(lambda words, merges: merges_of(words, merges, first_id=257),
                    "The first merge makes the id 256, not 257."),
             Mutant(lambda words, merges: merges_of(words, merges, lambda pairs, pair: (pairs[pair], pair)),
                    "That is the rarest pair; the most frequent one is merged.")),
    variants={"higher_wins": Variant(
        "between equally frequent pairs the higher one wins, first by its left, then by its right id.",
        lambda words, merges: merges_of(words, merges, lambda pairs, pair: (-pairs[pair], -pair[0], -pair[1])))})


# encode

def encode(text, merges):
    """The lowest merge that is possible, everywhere, until none is."""
    ids = tuple(text.encode())
    rank = {pair: number for number, pair in enumerate(merges)}
    while candidates := [pair for pair in zip(ids, ids[1:]) if pair in rank]:
        best = min(candidates, key=rank.get)
        ids = merge_pair(ids, best, 256 + rank[best])
    return list(ids)


def characters(text, merges):
    ids = tuple(map(ord, text))
    for number, pair in enumerate(merges):
        ids = merge_pair(ids, pair, 256 + number)
    return list(ids)


def leftmost_first(text, merges):
    ids, rank = tuple(text.encode()), {pair: number for number, pair in enumerate(merges)}
    while candidates := [at for at in range(len(ids) - 1) if ids[at:at + 2] in rank]:
        at = candidates[0]
        ids = (*ids[:at], 256 + rank[ids[at:at + 2]], *ids[at + 2:])
    return list(ids)


def one_round(text, merges):
    ids, rank = tuple(text.encode()), {pair: number for number, pair in enumerate(merges)}
    candidates = {pair for pair in zip(ids, ids[1:]) if pair in rank}
    for pair in sorted(candidates, key=rank.get):
        ids = merge_pair(ids, pair, 256 + rank[pair])
    return list(ids)


def longest_match(text, merges):
    spelled = {number: bytes([number]) for number in range(256)}
    for number, (left, right) in enumerate(merges):
        spelled[256 + number] = spelled[left] + spelled[right]
    id_of, data, ids = {token: number for number, token in reversed(spelled.items())}, text.encode(), []
    while data:
        size = max(n for n in range(1, len(data) + 1) if data[:n] in id_of)
        ids.append(id_of[data[:size]])
        data = data[size:]
    return ids


def text_and_merges(draw: Draw, letters: str, size: int) -> tuple[str, list[tuple[int, int]]]:
    """A text over a few letters, and merges learned from others over the same letters."""
    def some(length):
        return "".join(draw.choice(letters) for _ in range(length))
    learned = learn_merges({tuple(some(draw.int(2, 7)).encode()): draw.int(1, 5) for _ in range(12)}, draw.int(5, 14))
    return some(size), learned


ENCODE = Exercise(
    name="encode", reference=encode, minutes=15, difficulty=2, needs=("merge_pair",), **PYTHON_ONLY,
    tests=(Test("a few letters", lambda draw: text_and_merges(draw, "abc", draw.int(12, 30)), points=2, cases=10),
           Test("characters of several bytes", lambda draw: text_and_merges(draw, "aé早🙂", draw.int(8, 20)), cases=6)),
    hints=("text.encode() gives bytes, and tuple() of bytes gives their numbers.",
           "Merge number n makes the id 256 + n. Of all merges that are possible now, the one with the lowest number comes first.",
           "for number, pair in enumerate(merges): ids = merge_pair(ids, pair, 256 + number). Why is one pass enough?"),
    mutants=(Mutant(characters, "These are characters, not bytes: é is two bytes in UTF-8, so start from text.encode()."),
             Mutant(leftmost_first, "The leftmost possible merge came first; it must be the one that was learned first."),
             Mutant(one_round, "Merges make new pairs: merges that became possible only by others are missing."),
             Mutant(longest_match, "That is the longest token that fits, as in WordPiece; BPE applies the merges in their order.")))

EXERCISES = [COUNT_PAIRS, MERGE_PAIR, LEARN_MERGES, ENCODE]
