import random
from itertools import pairwise

import pytest

from minillm.data.corpora import Document, documents
from minillm.data.filters import GOPHER, broken
from minillm.data.quality import Cleaning, cleaning_for, clean_documents
from minillm.data.stories import stories


def corpus() -> list[Document]:
    """Twenty stories, and five documents that each belong to one stage."""
    texts = {f"story {i}": story.text for i, story in enumerate(stories(20, 9))}
    words = texts["story 3"].split()
    words[40] = "changed"
    texts |= {"empty": "\ufeff \n", "copy": texts["story 5"].upper(),
              "german": "Der alte Mann ging mit dem Hund durch den Wald. " * 9,
              "menu": "Skip to the main page\nRead more of this\nSign in with your name\n" * 30, "near": " ".join(words)}
    return [Document(text, name) for name, text in texts.items()]


ENGLISH = Cleaning(languages=("English",))


def test_each_stage_takes_what_is_its_own():
    kept, report = clean_documents(corpus(), ENGLISH)
    assert [document.name for document in kept] == [f"story {i}" for i in range(20)]
    assert [stage.examples for stage in report.stages[:3]] == [
        ["empty (empty)"], ["copy (copy of story 5)"], ["german (German)"]]
    assert report.stages[3].examples[0].startswith("menu (") and report.stages[3].reasons["repeated lines"] == 1
    assert report.stages[4].examples == ["near (near copy of story 3)"]


def test_the_figures_add_up():
    docs = corpus()
    kept, report = clean_documents(docs, ENGLISH)
    first, last = report.stages[0], report.stages[-1]
    assert (first.documents_in, first.bytes_in) == (25, sum(len(doc.text.encode()) for doc in docs))
    assert (last.documents_out, last.bytes_out) == (len(kept), sum(len(doc.text.encode()) for doc in kept))
    for one, next_one in pairwise(report.stages):
        assert (one.documents_out, one.bytes_out) == (next_one.documents_in, next_one.bytes_in)
    for stage in report.stages:
        assert stage.removed == pytest.approx((stage.bytes_in - stage.bytes_out) / stage.bytes_in)
        assert stage.documents_in - stage.documents_out == 1
    lines = report.table().splitlines()
    assert lines[6].split()[:3] == ["left", "20", f"{last.bytes_out:,}"] and "menu (" in report.table()


def test_the_same_twice_and_once_more_changes_nothing():
    kept, report = clean_documents(corpus(), ENGLISH)
    again, same = clean_documents(corpus(), ENGLISH)
    assert kept == again and report == same
    assert clean_documents(kept, ENGLISH)[0] == kept


def test_another_order_leaves_as_many():
    mixed = random.Random(0).sample(corpus(), 25)
    assert len(clean_documents(mixed, ENGLISH)[0]) == 20


def test_copies_stay_when_they_are_wanted_even_under_one_name():
    text = next(stories(1)).text
    same = [Document(text, "a"), Document(text, "a")]
    assert len(clean_documents(same, Cleaning(dedup=False))[0]) == 2
    assert len(clean_documents(same, Cleaning())[0]) == 1


def test_texts_get_one_spelling_and_keep_their_indentation():
    kept, report = clean_documents([Document("if a:\r\n    b = 'cafe\u0301'\u200b  \r\n", "x.py")], Cleaning())
    assert [document.text for document in kept] == ["if a:\n    b = 'café'"] and report.stages[0].removed > 0


def test_nothing_left_is_an_error_that_names_the_rule():
    short = [Document(f"The cat number {i} sat with the dog on that mat.", f"{i}") for i in range(30)]
    with pytest.raises(ValueError, match="left none of 30 documents: \"quality rules\" took 30, 30 of .* \"words\".*now 50"):
        clean_documents(short, Cleaning(dedup=False))
    assert len(clean_documents(short, Cleaning(dedup=False, min_words=5))[0]) == 30
    with pytest.raises(ValueError, match="\"language\" took 30, 30 of them for \"English\""):
        clean_documents(short, Cleaning(dedup=False, languages=("German",)))
    assert clean_documents([], Cleaning())[0] == []


def test_min_words():
    assert [cleaning_for(*args).min_words for args in (("languages",), ("languages", 3), ("a/b",))] == [20, 3, 50]
    with pytest.raises(ValueError, match="min_words = -1"):
        Cleaning(min_words=-1)


def test_programs_have_their_own_rules():
    program = "x = {'a': 1}\nprint(x)\n"
    assert broken(program, GOPHER)
    assert len(clean_documents([Document(program, "a.py")], cleaning_for("folder"))[0]) == 1
    with pytest.raises(ValueError, match="words"):  # there, a.py is the name of a module's docstrings
        clean_documents([Document(program, "a.py")], cleaning_for("python-docs"))
    with pytest.raises(ValueError, match="longest line"):
        clean_documents([Document("x = 1\n" * 200 + "y" * 2_000, "a.py")], cleaning_for("python-source"))


def test_no_source_loses_all_and_each_what_is_said(python_docs):
    removed = {}
    part = [doc for doc in documents("python-source") if doc.name.startswith(("asyncio/", "encodings/"))]
    for source, found in (("stories", documents("stories", limit=100_000)), ("languages", documents("languages")),
                          ("python-docs", python_docs), ("python-source", part)):
        _, report = clean_documents(found, cleaning_for(source))
        removed[source] = {stage.name: stage for stage in report.stages}
        assert sum(stage.documents_in for stage in report.stages) > 5 * 10
    # every release of Python: nothing of the stories and of the page; a good part of the docs, most of it for short or
    # repeated text (33% of the bytes in 3.11); little of the source, most of it near copies (the tables of encodings)
    assert {s.documents_in - s.documents_out for source in ("stories", "languages") for s in removed[source].values()} == {0}
    rules = removed["python-docs"]["quality rules"]
    assert 0.05 < rules.removed < 0.6 and {"words", "repeated 5-grams"} <= set(rules.reasons)
    assert removed["python-docs"]["language"].removed < 0.01
    source = removed["python-source"]
    assert source["quality rules"].removed < 0.1 and source["near copies"].reasons["near copy"] > 5
