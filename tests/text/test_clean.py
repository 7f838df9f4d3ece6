import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.text.clean import (clean, remove_controls, repair_surrogates, simplify_chinese, tidy_spaces,
                                unify_line_ends)

# Any code point, halves of surrogate pairs included, with the troublesome ones often.
TROUBLE = " \t\n\r\v\x00\x85\xa0\xad\u0308\u200b\u2028\u3000\ufeffａé國\ud83d\ude00"
TEXT = st.text(st.one_of(st.characters(), st.sampled_from(TROUBLE)))


@given(TEXT, st.sampled_from(["NFC", "NFKC"]), st.sampled_from(["prose", "code"]), st.booleans())
def test_cleaning_twice_changes_nothing_more(text, form, layout, simplified):
    once = clean(text, form=form, layout=layout, simplified_chinese=simplified)
    assert clean(once, form=form, layout=layout, simplified_chinese=simplified) == once


@given(TEXT)
def test_what_cleaning_promises(text):
    cleaned = clean(text)
    cleaned.encode()  # no half of a surrogate pair is left
    assert unicodedata.is_normalized("NFKC", cleaned)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n" for c in cleaned)
    assert "  " not in cleaned and " \n" not in cleaned and "\n\n\n" not in cleaned


def test_prose():
    messy = "\ufeffＣａｆe\u0301\u00a0 №\u00ad1 \r\n\r\n\r\n\r\n\tﬁne\x07\u3000text\u2028"
    assert clean(messy) == "Café No1\n\nfine text"


def test_code_keeps_its_layout():
    assert clean("def f():\r\n    x  = 1\t \r\n", layout="code") == "def f():\n    x  = 1"
    assert clean("def f():\r\n    x  = 1\t \r\n") == "def f():\nx = 1"


def test_nfc_keeps_what_nfkc_replaces():
    assert clean("ﬁ① e\u0301", form="NFC") == "ﬁ① é"
    assert clean("ﬁ① e\u0301", form="NFKC") == "fi1 é"


def test_an_accent_joins_its_letter_although_something_invisible_stood_between():
    assert clean("e\u00ad\u0301") == "é"


def test_joiners_stay_for_the_scripts_that_need_them():
    assert clean("👩\u200d👧 می\u200cخواهم") == "👩\u200d👧 می\u200cخواهم"


def test_each_step():
    assert unify_line_ends("a\r\nb\rc\vd\fe\x85f\u2028g\u2029h") == "a\nb\nc\nd\ne\nf\ng\nh"
    assert remove_controls("a\x00b\tc\nd\x1b\u200b\u202ee") == "ab\tc\nde"
    assert tidy_spaces(" \n\n a\u00a0\t b \n \n\n\n c\n") == "a b\n\nc"
    assert tidy_spaces("a\nb\n\nc\n\n\nd") == "a\nb\n\nc\n\nd"
    assert tidy_spaces("  a  b \n\n\n\nc", "code") == "  a  b\n\nc"


def test_surrogates():
    assert repair_surrogates("plain 😀") == "plain 😀"
    assert repair_surrogates("\ud83d\ude00") == "😀"
    assert repair_surrogates("a\ud83db\ude00") == "a\ufffdb\ufffd"
    assert clean("x\udc80") == "x\ufffd"


def test_traditional_chinese_becomes_simplified_where_that_needs_no_context():
    assert simplify_chinese("漢語：我們學習機器的語言") == "汉语：我们学习机器的语言"
    assert simplify_chinese("乾坤, 著名, 简体") == "乾坤, 著名, 简体"
    assert clean("國", simplified_chinese=True) == "国" and clean("國") == "國"


@pytest.mark.parametrize("options", [{"form": "NFD"}, {"layout": "poem"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="NFD|poem"):
        clean("x", **options)
