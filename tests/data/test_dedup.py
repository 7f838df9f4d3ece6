import numpy as np
import pytest

from minillm.data.corpora import Document
from minillm.data.dedup import found_chance, jaccard, remove_duplicates, signature, words_of


def random_words(seed: int, count: int) -> list[str]:
    return [f"w{i}" for i in np.random.Generator(np.random.PCG64(seed)).integers(0, 10 ** 6, count)]


def pair(shared: int, own: int, seed: int) -> tuple[str, str]:
    """Two texts with `shared` equal words first, then `own` different ones."""
    common = random_words(seed, shared)
    return tuple(" ".join(common + random_words(10_000 + 2 * seed + i, own)) for i in range(2))


def named(*texts: str) -> list[Document]:
    return [Document(text, f"document {i}") for i, text in enumerate(texts)]


def kept(*texts: str, **options) -> list[str]:
    return [document.name for document in remove_duplicates(named(*texts), **options)]


def test_words():
    assert words_of("The CAT, the dog's 2 ears!") == ["the", "cat", "the", "dog", "s", "2", "ears"]


def test_jaccard_by_hand():
    # n-grams ab bc cd and bc cd de: 2 shared of 4
    assert jaccard("a b c d", "b c d e", n=2) == 0.5
    assert jaccard("A b!", "a, B", n=2) == 1
    assert jaccard("one two", "three four", n=2) == 0
    assert jaccard("", "", n=2) == 1


def test_copies_are_removed_whatever_their_case_and_spaces():
    text = "The old bridge over the river was built by hand."
    assert kept(text, "Another text.", text, text.upper() + "\n\n", text.replace(" ", "  ")) == ["document 0", "document 1"]


def test_planted_near_copies_are_removed_and_nothing_else():
    originals = [" ".join(random_words(seed, 300)) for seed in range(30)]
    changed = []
    for seed in range(0, 30, 3):  # every third one comes again, with 2 words of 300 replaced: similarity about 0.94
        words = random_words(seed, 300)
        words[100] = words[200] = "other"
        changed.append(" ".join(words))
    assert jaccard(originals[0], changed[0]) > 0.9
    assert kept(*originals, *changed) == [f"document {i}" for i in range(30)]
    assert kept(*changed, *originals) == [f"document {i}" for i in range(10)] + [
        f"document {10 + i}" for i in range(30) if i % 3]


def test_nothing_below_the_threshold_is_removed():
    texts = pair(100, 60, seed=1)
    similarity = jaccard(*texts)
    assert 0.3 < similarity < 0.6
    # one row a band finds every pair of this similarity, so that only the exact comparison decides
    assert found_chance(similarity, bands=64, rows=1) > 0.9999999
    assert len(kept(*texts, bands=64, rows=1, threshold=similarity + 0.01)) == 2
    assert len(kept(*texts, bands=64, rows=1, threshold=similarity)) == 1


def test_the_same_documents_give_the_same_result_and_order_is_kept():
    texts = [text for seed in range(10) for text in pair(200, 5, seed)]
    assert kept(*texts) == kept(*texts) == sorted(kept(*texts), key=lambda name: int(name.split()[1]))


def test_empty_and_short_texts_do_no_harm():
    assert kept("", "a", "b", "", "A") == ["document 0", "document 1", "document 2"]


@pytest.mark.parametrize("shared, own", [(60, 60), (100, 30), (120, 10)])
def test_equal_shares_of_signatures_estimate_jaccard(shared, own):
    texts = pair(shared, own, seed=3)
    equal = np.mean(signature(texts[0], hashes=4_000) == signature(texts[1], hashes=4_000))
    truth = jaccard(*texts)
    # 4 standard errors of a share of 4,000 (nearly) independent hashes
    assert equal == pytest.approx(truth, abs=4 * (truth * (1 - truth) / 4_000) ** 0.5)


@pytest.mark.parametrize("shared, own", [(50, 25), (60, 15), (80, 15)])
def test_pairs_are_found_as_often_as_banding_says(shared, own):
    bands, rows, pairs = 8, 4, 300
    found = expected = 0.0
    for seed in range(pairs):
        first, second = pair(shared, own, seed)
        a, b = (signature(text, hashes=bands * rows, seed=seed).reshape(bands, rows) for text in (first, second))
        found += bool((a == b).all(axis=1).any())
        expected += found_chance(jaccard(first, second), bands, rows)
    chance = expected / pairs
    assert 0.1 < chance < 0.98
    assert found / pairs == pytest.approx(chance, abs=4 * (chance * (1 - chance) / pairs) ** 0.5 + 1 / pairs)


def test_found_chance():
    assert found_chance(0) == 0 and found_chance(1) == 1
    assert found_chance(0.5, bands=1, rows=3) == pytest.approx(0.125)
    assert found_chance(0.5, bands=2, rows=1) == pytest.approx(0.75)


def test_a_signature_does_not_depend_on_how_it_is_computed():
    """Long texts are hashed piece by piece, so that memory stays small; the minimum is the same."""
    text = " ".join(random_words(0, 40_000))
    halves = [" ".join(part) for part in (text.split()[:20_004], text.split()[20_000:])]
    assert (signature(text) == np.minimum(*map(signature, halves))).all()
