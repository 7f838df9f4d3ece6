import copy
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minillm.text.bpe import BPETokenizer
from minillm.text.tokenizer_json import from_json, hidden, ranks_of, to_json, visible

SMALL = BPETokenizer.train(["low lower newest widest"], 275)
CONTENT = to_json(SMALL.ranks, SMALL.merges, SMALL.pattern, SMALL.special_tokens)


def changed(path: str, value: object) -> dict:
    """CONTENT with one entry replaced; the path is its keys, joined by dots."""
    content = copy.deepcopy(CONTENT)
    *keys, last = path.split(".")
    inner = content
    for key in keys:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    return content


def test_bytes_as_visible_characters():
    assert visible(b" a\n\x00\xc3") == "ĠaĊĀÃ"
    every = bytes(range(256))
    assert hidden(visible(every)) == every
    assert len(set(visible(every))) == 256 and visible(every).isprintable()


def test_the_letters_of_bytes_are_hugging_faces():
    assert set(visible(bytes(range(256)))) == set(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a é中\x00😀\n")
    assert pieces[0][0] == visible("a é中\x00😀\n".encode())


def test_what_is_written_is_read_back():
    assert from_json(json.loads(json.dumps(CONTENT))) == (SMALL.ranks, SMALL.pattern, SMALL.special_tokens)


def test_a_file_of_hugging_faces_own_trainer_is_read(mixed_texts):
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(mixed_texts, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    ours = BPETokenizer(*from_json(json.loads(theirs.to_str())))
    assert ours.end_of_text == 0  # they put special tokens first
    assert [ours.encode(text, allowed_special="all") for text in mixed_texts] == [
        theirs.encode(text).ids for text in mixed_texts]


def test_merges_may_be_strings_or_pairs():
    pairs = changed("model.merges", [merge.split() for merge in CONTENT["model"]["merges"]])
    assert from_json(pairs) == from_json(CONTENT)


@pytest.mark.parametrize("path, value, message", [
    ("model", None, "its model is missing"),
    ("model", {"type": "Unigram", "vocab": [["a", -1.0]]}, "its model is Unigram"),
    ("model.type", "WordPiece", "model.type is 'WordPiece'"),
    ("model.byte_fallback", True, "byte_fallback is True"),
    ("model.dropout", 0.1, "dropout is 0.1"),
    ("model.continuing_subword_prefix", "##", "continuing_subword_prefix is '##'"),
    ("normalizer", {"type": "NFC"}, "normalizer is {'type': 'NFC'}"),
    ("pre_tokenizer", None, r"pre_tokenizer is \[None\]"),
    ("pre_tokenizer", {"type": "Metaspace"}, "Metaspace"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space is True"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, "use_regex is F"),
    ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "behavior is 'Removed'"),
    ("pre_tokenizer.pretokenizers.0.invert", True, "invert is True"),
    ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "only a Regex"),
    ("added_tokens.1.lstrip", True, r"lstrip of the added token '<\|pad\|>' is True"),
    ("model.merges", CONTENT["model"]["merges"][::-1], "Ids must rise"),
    ("model.merges", CONTENT["model"]["merges"][1:], "1 tokens have no merge"),
    ("model.vocab", {"▁the": 0}, "stands for no byte"),
])
def test_what_would_mean_other_ids_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_json(changed(path, value))


def test_a_list_is_no_tokenizer():
    with pytest.raises(ValueError, match="its model is missing"):
        from_json(["not", "a", "tokenizer"])


def test_several_merges_of_one_token_are_accepted_as_llama3s_file_has_them():
    vocab = {visible(bytes([byte])): byte for byte in range(256)} | {"ab": 256, "bc": 257, "abc": 258}
    ranks = ranks_of(vocab, ["a b", "b c", "ab c", "a bc"], {})
    assert ranks[b"abc"] == 258 and len(ranks) == 259


def test_a_special_token_that_the_file_cannot_tell_from_another_is_refused():
    with pytest.raises(ValueError, match="'low' is also how this file spells"):
        to_json(SMALL.ranks, SMALL.merges, SMALL.pattern, {"low": 999})
