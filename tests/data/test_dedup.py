import numpy as np
import pytest

from minillm.data.corpora import Document
from minillm.data.dedup import exact_hash, found_chance, jaccard, near_copies, remove_duplicates, signature, words_of


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


@pytest.mark.parametrize("bands, rows, published", [
    (14, 8, {0.7: 0.56, 0.75: 0.77, 0.8: 0.92, 0.85: 0.988}),  # FineWeb, arXiv:2406.17557 §3.4
    (450, 20, {0.75: 0.76, 0.8: 0.994})])                      # RefinedWeb, arXiv:2306.01116
def test_the_chances_that_papers_print(bands, rows, published):
    for similarity, chance in published.items():
        # less than a unit of the last digit printed, which is a tenth of a percent only above 95%
        assert found_chance(similarity, bands, rows) == pytest.approx(chance, abs=0.001 if chance > 0.95 else 0.01)


def test_a_chain_of_near_copies_is_one_cluster_whatever_the_order():
    words = random_words(7, 300)
    # each link replaces the next 8 of 300 words, so neighbours share all but 8 of their n-grams, and the ends all but 40
    links = [" ".join([*(f"x{i}" for i in range(8 * link)), *words[8 * link:]]) for link in range(6)]
    assert all(jaccard(a, b) >= 0.9 for a, b in zip(links, links[1:], strict=False)) and jaccard(links[0], links[-1]) < 0.8
    alone = " ".join(random_words(8, 300))
    # one row a band finds every pair, so that only the exact comparison and the joining decide
    options = {"bands": 64, "rows": 1, "threshold": 0.9}
    assert near_copies([alone, *links], **options) == [0, 1, 1, 1, 1, 1, 1]
    # the two ends come first, and only the last links join them
    assert near_copies([links[0], links[5], alone, links[1], links[4], links[2], links[3]], **options) == [0, 0, 2, 0, 0, 0, 0]


def test_clusters_are_those_of_comparing_all_with_all():
    texts = [text for seed in range(25) for text in pair(150, 4 + 2 * seed, seed)]
    similar = [(i, j) for j in range(50) for i in range(j) if jaccard(texts[i], texts[j]) >= 0.7]
    wanted = list(range(50))
    for i, j in similar:
        wanted[j] = i  # pairs only: no text is like a third one
    assert 10 < len(similar) < 25 and len({i for pair_ in similar for i in pair_}) == 2 * len(similar)
    # at similarity 0.7, 64 bands of 4 rows miss a pair once in 40 million
    assert near_copies(texts, bands=64, rows=4) == wanted


def test_a_hash_of_the_words():
    assert exact_hash("One, two!") == exact_hash("one  TWO") != exact_hash("two one")


def test_a_signature_does_not_depend_on_how_it_is_computed():
    """Long texts are hashed piece by piece, so that memory stays small; the minimum is the same."""
    text = " ".join(random_words(0, 40_000))
    halves = [" ".join(part) for part in (text.split()[:20_004], text.split()[20_000:])]
    assert (signature(text) == np.minimum(*map(signature, halves))).all()
