import math
from collections import Counter

import pytest

from minillm.data.corpora import documents, languages
from minillm.data.language import ALPHA, COMMON_WORDS, UNKNOWN, Identifier, identifier, identify


def held_out() -> list[tuple[str, str]]:
    """(true, answered) for every sentence, each time by one who has never seen it in any language."""
    page = languages()
    found = []
    for place in range(len(page["English"])):
        knows = Identifier({name: lines[:place] + lines[place + 1:] for name, lines in page.items()})
        found += [(name, knows.identify(lines[place]).language) for name, lines in page.items()]
    return found


def test_sentences_never_seen_are_told_apart():
    found = held_out()
    assert len(found) == 108
    # facts of the page: 96 right, 11 unknown, and one Chinese sentence without a character that the scripts' table has
    answers = Counter("right" if true == said else said for true, said in found)
    assert answers["right"] >= 95 and answers["right"] + answers[UNKNOWN] >= 107
    assert [pair for pair in found if pair[0] != pair[1] and UNKNOWN not in pair] == [("Chinese (traditional)", "Chinese")]


def test_the_page_itself():
    assert [(doc.name, identify(doc.text)) for doc in documents("languages")] == [(name, name) for name in languages()]


def test_documentation_and_stories_are_english(python_docs):
    found = Counter(identify(doc.text) for doc in python_docs if len(doc.text) > 1_000)
    assert found.total() > 100
    # the few others are unknown: lists of names in code; measured with Python 3.11: 379 of 380
    assert found["English"] / found.total() > 0.97 and set(found) <= {"English", UNKNOWN}
    assert {identify(doc.text) for doc in documents("stories", limit=20_000)} == {"English"}


@pytest.mark.parametrize("text", [
    "", "12 + 34 = 46", "Hi!", "สวัสดีตอนเช้า วันนี้คุณเป็นอย่างไรบ้าง",
    "בוקר טוב, מה שלומך היום? הגשר הישן נבנה ביד.",
    "Hyvää huomenta, mitä sinulle kuuluu tänään? Vanha silta joen yli rakennettiin käsin.",
    "Dzień dobry, jak się dziś masz? Stary most nad rzeką zbudowano ręcznie.",
    "xqz wvkj plrt zzxw qpvk jjkw mnbvc lkjhg", "TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5IGJ5IGhpcyByZWFzb24"])
def test_what_is_short_or_alien_is_unknown(text):
    assert identify(text) == UNKNOWN


def test_scores_by_hand():
    knows = Identifier({"a": ["ab", "ab"], "b": ["cd", "cd"]})
    # "ab" has 2 letters, 3 pairs with the spaces, 2 triples and the word: 8 n-grams, each seen twice, of 16 kinds
    score = math.log((2 + ALPHA) / (16 + 16 * ALPHA))
    guess = knows.identify("ab ab ab")
    assert guess.language == "a"
    assert guess.scores == pytest.approx({"a": score, "b": math.log(ALPHA / (16 + 16 * ALPHA))})


def test_the_script_of_chinese():
    assert identify("我妹妹每個星期讀一本新書，學習語言需要時間。") == "Chinese (traditional)"
    assert identify("我妹妹每个星期读一本新书，学习语言需要时间。") == "Chinese"


def test_common_words_are_each_languages_own():
    for name, words in COMMON_WORDS.items():
        assert identify(words) == name and len(set(words.split())) > 40


def test_too_little_to_learn_from():
    with pytest.raises(ValueError, match="1 languages, and fewer than 2 sentences of none"):
        Identifier({"a": ["x", "y"]})
    with pytest.raises(ValueError, match=r"fewer than 2 sentences of \['b'\]"):
        Identifier({"a": ["x", "y"], "b": ["z"]})


def test_it_is_learned_once():
    assert identifier() is identifier()
