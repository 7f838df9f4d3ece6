import gc
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hard_texts import HARD_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm.text.bpe_train as bpe_train
from minillm.text.bpe_train import (BYTE_ORDER, count_pairs, count_words, learn_merges, merge_pair,
                                    naive_merges)
from minillm.text.patterns import PATTERNS
from minillm.text.tokenizer_json import visible


def spelled(pairs: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """Merges as Hugging Face writes them."""
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    return [(visible(tokens[left]), visible(tokens[right])) for left, right in pairs]


def test_count_pairs_by_hand():
    assert count_pairs({(1, 2, 1, 2): 3, (2, 1): 10, (7,): 99}) == {(1, 2): 6, (2, 1): 13}
    assert count_pairs({(5, 5, 5): 2}) == {(5, 5): 4}  # overlapping pairs both count


@pytest.mark.parametrize("ids, merged", [
    ([1, 2, 3, 1, 2], (9, 3, 9)), ([1, 1, 2, 2], (1, 9, 2)), ([2, 1], (2, 1)), ([], ()), ([1, 2], (9,))])
def test_merge_pair_by_hand(ids, merged):
    assert merge_pair(ids, (1, 2), 9) == merged


def test_runs_are_merged_from_the_left():
    assert merge_pair((4, 4, 4, 4, 4), (4, 4), 9) == (9, 9, 4)


def test_the_classic_example():
    # Sennrich et al., Figure 1, without its end-of-word sign: e s 9 times, then es t, then l o 7 times, lo w.
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert spelled(learn_merges(words, 4)) == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]


WORDS = st.dictionaries(st.text("aabc é", min_size=1, max_size=12), st.integers(1, 4), max_size=8)


@settings(max_examples=300)
@given(WORDS, st.integers(0, 40))
def test_the_fast_trainer_learns_what_the_naive_one_does(words, merges):
    assert learn_merges(words, merges) == naive_merges(words, merges)


@pytest.mark.parametrize("name", PATTERNS)
def test_merges_equal_hugging_faces_on_mixed_text(name, mixed_texts, train_hugging_face):
    ours = learn_merges(count_words(mixed_texts, PATTERNS[name]), 10_000)
    assert len(ours) > 800  # to the end, where no pair is left
    assert spelled(ours) == train_hugging_face(mixed_texts, 10_000, PATTERNS[name])


@pytest.mark.parametrize("letters", ["abcde", "aéñßz", "中a文éж", "~!\x00😀\x7f"])
def test_ties_break_as_hugging_faces_do(letters, train_hugging_face):
    # All orders of a few letters, of one to four bytes: every pair of letters is as frequent as any other.
    texts = ["\n".join(map("".join, itertools.permutations(letters)))]
    merges = train_hugging_face(texts, 10_000)
    assert len(merges) > 100
    assert spelled(learn_merges(count_words(texts, PATTERNS["gpt2"]), 10_000)) == merges


def test_lower_ids_win_ties_and_ids_follow_gpt2s_order_of_bytes():
    # "a" comes before "é"'s first byte, and that before the space, which GPT-2 moves behind all that print.
    merges = learn_merges({"xa": 1, "xé": 1, "x ": 1, "ax": 1}, 5)
    assert spelled(merges) == [("a", "x"), ("x", "a"), ("x", "Ã"), ("x", "Ġ"), ("xÃ", "©")]
    assert BYTE_ORDER[:3] == b"!\"#" and BYTE_ORDER.index(b" ") == 220
    assert sorted(BYTE_ORDER) == list(range(256))


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text("ab \n1'sé中", max_size=40), min_size=1, max_size=4))
def test_merges_equal_hugging_faces_on_random_texts(texts, train_hugging_face):
    assert spelled(learn_merges(count_words(texts, PATTERNS["gpt2"]), 60)) == train_hugging_face(texts, 60)


def test_training_ends_when_every_word_is_one_token():
    assert spelled(learn_merges({"aaaa": 2, "b": 5}, 100)) == [("a", "a"), ("aa", "aa")]
    assert learn_merges({}, 5) == []


def test_time_follows_unique_words(monkeypatch):
    # The same words a thousand times as often are the same work, counted in looks at the row, not in seconds.
    looks = Counter()

    class CountedRow(list):
        def __getitem__(self, at):
            looks["now"] += 1
            return super().__getitem__(at)

    made = bpe_train._Pairs.__init__

    def counting(self, words):
        made(self, words)
        self.row = CountedRow(self.row)

    monkeypatch.setattr(bpe_train._Pairs, "__init__", counting)
    results = []
    for copies in (1, 1000):
        looks.clear()
        words = count_words(["the cat sat on the mat, the rat sat on the cat\n"] * copies, PATTERNS["gpt2"])
        results.append((learn_merges(words, 50), looks["now"]))
    assert results[0] == results[1] and results[0][1] > 0


def test_work_on_a_long_word_is_linear():
    # A word of 100,000 letters takes some 20 merges, each of half as many places as the one before.
    pairs = bpe_train._Pairs({"a" * 100_000: 1})
    merged = 0
    while (pair := pairs.most_frequent()) is not None:
        merged += len(pairs.places[pair])
        pairs.merge(pair)
    assert merged < 2.5 * 100_000  # in all; looking through the word for each merge would be 20 times that


def test_words_are_counted_per_text_and_surrogates_repaired():
    assert count_words(["a b", "a b"], PATTERNS["gpt2"]) == {"a": 2, " b": 2}  # not "ba"
    assert count_words(["\ud83d\ude00", "x\ud83d"], PATTERNS["gpt2"]) == {"😀": 1, "x": 1, "\ufffd": 1}


def test_processes_count_the_same_words(monkeypatch):
    monkeypatch.setattr(bpe_train, "_BATCH", 300)  # so that there are many more batches than processes
    texts = [text for text in HARD_TEXTS if text.isprintable()] * 3
    assert count_words(iter(texts), PATTERNS["cl100k"], workers=2) == count_words(texts, PATTERNS["cl100k"])


def test_a_script_without_a_guard_is_told_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from minillm.text.bpe_train import count_words\ncount_words(['a'], 'a', workers=2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(Path(bpe_train.__file__).parents[2])})
    assert "RuntimeError: The 2 counting processes died" in done.stderr and "__main__" in done.stderr


def test_the_garbage_collector_is_back_on_after_training():
    learn_merges({"ab": 1}, 1)
    assert gc.isenabled()


def test_errors():
    with pytest.raises(ValueError, match="workers = 0"):
        count_words(["a"], "a", workers=0)
    with pytest.raises(ValueError, match="at most 1,048,319"):
        learn_merges({"ab": 1}, 2_000_000)
