import json
import math
import os

import numpy as np
import pytest

from minillm.data import shards as module
from minillm.data.corpora import Document
from minillm.data.shards import HEADER, MARK, ShardError, open_shards, write_shards
from minillm.text.bpe import CHAT_TOKENS, PATTERNS, BPETokenizer


def every_id(tokenizer, docs) -> list[int]:
    return [token for doc in docs for token in [*tokenizer.encode(doc.text), tokenizer.end_of_text]]


def change_header(path, **changes) -> None:
    raw = path.read_bytes()
    header = json.loads(raw[len(MARK):HEADER].rstrip(b"\0")) | changes
    path.write_bytes((MARK + json.dumps(header).encode()).ljust(HEADER, b"\0") + raw[HEADER:])


@pytest.fixture
def one_shard(tmp_path, tokenizer, docs):
    path, = write_shards(tmp_path, "train", docs[:5], tokenizer)
    return path


def test_what_is_read_is_what_was_written_across_files(shards, tokenizer, docs):
    assert len(shards.headers) > 2
    assert shards[:].tolist() == every_id(tokenizer, docs)
    assert shards[:].dtype == np.int64


def test_any_span_can_be_read(shards):
    whole, edges = shards[:], np.cumsum([header.tokens for header in shards.headers])
    for start in (0, 1, *(int(edge) - 1 for edge in edges), *(int(edge) for edge in edges)):
        for length in (0, 1, 2, 300, len(shards)):
            assert shards[start:start + length].tolist() == whole[start:start + length].tolist()


def test_totals(shards, tokenizer, docs):
    assert shards.tokens == len(shards) == len(every_id(tokenizer, docs))
    assert shards.documents == len(docs)
    assert shards.bytes == sum(len(doc.text.encode()) for doc in docs)
    assert shards.nats == pytest.approx(sum(doc.nats for doc in docs))
    assert shards.vocab_size == tokenizer.vocab_size


def test_true_nats_are_unknown_when_one_document_has_none(tmp_path, tokenizer, docs):
    write_shards(tmp_path, "val", [*docs[:3], Document("no source", "x")], tokenizer)
    assert math.isnan(open_shards(tmp_path, "val").nats)


def test_files_stay_near_their_limit(shards):
    # a file is closed by the document that crosses the limit; the estimate of how many fit may add a few
    assert all(header.tokens < 4_000 * 1.25 for header in shards.headers)


@pytest.mark.parametrize("extra, dtype", [(0, "uint16"), (1, "uint32")])
def test_two_bytes_until_65536_ids_then_four(tmp_path, extra, dtype):
    letters = {bytes([i]): i for i in range(256)}
    tokens = {f"<|{i}|>": 257 + i for i in range(65_536 - 257 + extra)} | {"<|endoftext|>": 256}
    tokenizer = BPETokenizer(letters, PATTERNS["gpt2"], tokens)
    assert tokenizer.vocab_size == 65_536 + extra
    path, = write_shards(tmp_path, "train", [Document("ab", "a")], tokenizer)
    assert open_shards(tmp_path, "train").headers[0].dtype == dtype
    assert path.stat().st_size == HEADER + 3 * np.dtype(dtype).itemsize
    assert open_shards(tmp_path, "train")[:].tolist() == [97, 98, 256]


def test_special_tokens_written_in_a_text_are_text(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [Document("<|endoftext|>", "a")], tokenizer)
    assert open_shards(tmp_path, "train")[:].tolist().count(tokenizer.end_of_text) == 1


def test_no_document_is_an_error_and_keeps_what_was_there(one_shard, tokenizer):
    before = one_shard.read_bytes()
    with pytest.raises(ValueError, match="no document"):
        write_shards(one_shard.parent, "train", [], tokenizer)
    assert one_shard.read_bytes() == before


def test_fewer_shards_leave_none_of_the_older_ones(tmp_path, tokenizer, docs):
    assert len(write_shards(tmp_path, "train", docs, tokenizer, shard_tokens=2_000)) > 2
    write_shards(tmp_path, "val", docs[:2], tokenizer)
    write_shards(tmp_path, "train", docs[:1], tokenizer)
    assert open_shards(tmp_path, "train")[:].tolist() == every_id(tokenizer, docs[:1])
    assert open_shards(tmp_path, "val").documents == 2


def test_a_full_disk_leaves_nothing_half_written(tmp_path, tokenizer, docs, monkeypatch):
    def full(fileno):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shards(tmp_path, "train", docs[:3], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_middle_leaves_nothing_half_written(tmp_path, tokenizer, docs):
    def interrupted():
        yield docs[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "train", interrupted(), tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2, 500])
def test_a_truncated_file_is_refused_with_both_sizes(one_shard, cut):
    size = one_shard.stat().st_size
    os.truncate(one_shard, size - cut)
    with pytest.raises(ShardError, match=rf"{size - cut:,} of {size:,} bytes"):
        open_shards(one_shard.parent, "train")


@pytest.mark.parametrize("content, words", [(b"", "no token shard"), (b"PK\3\4" + bytes(5_000), "no token shard"),
                                            (MARK + b"{broken" + bytes(5_000), "header cannot be read"),
                                            (MARK + b'{"tokens": 1}' + bytes(5_000), "header cannot be read")])
def test_a_foreign_file_is_refused(tmp_path, content, words):
    (tmp_path / "train-00000.bin").write_bytes(content)
    with pytest.raises(ShardError, match=words):
        open_shards(tmp_path, "train")


@pytest.mark.parametrize("changes", [{"dtype": "uint17"}, {"dtype": "int16"}, {"dtype": "|S2"}, {"tokens": 0}, {"tokens": "6"},
                                     {"vocab_size": "many"}])
def test_a_header_that_makes_no_sense_is_refused(one_shard, changes):
    change_header(one_shard, **changes)
    with pytest.raises(ShardError, match="train-00000.bin: the header cannot be read"):
        open_shards(one_shard.parent, "train")


def test_a_file_of_another_version_is_refused(one_shard):
    one_shard.write_bytes(b"minillm0" + one_shard.read_bytes()[len(MARK):])
    with pytest.raises(ShardError, match="no token shard of this version"):
        open_shards(one_shard.parent, "train")


def test_another_tokenizer_is_refused_with_both_fingerprints(one_shard, tokenizer):
    other = BPETokenizer.train(["quite another text, another, another"], 300, special_tokens=CHAT_TOKENS)
    with pytest.raises(ShardError) as caught:
        open_shards(one_shard.parent, "train", other)
    for part in (tokenizer.fingerprint[:12], other.fingerprint[:12], "tokenize again"):
        assert part in str(caught.value)


def test_an_id_outside_the_vocabulary_is_refused(one_shard, tokenizer):
    with open(one_shard, "r+b") as file:
        file.seek(HEADER + 20)
        file.write(np.uint16(tokenizer.vocab_size).tobytes())
    with pytest.raises(ShardError, match=f"token id {tokenizer.vocab_size}, outside"):
        open_shards(one_shard.parent, "train")


def test_shards_of_two_tokenizers_are_not_mixed(tmp_path, tokenizer, docs):
    paths = write_shards(tmp_path, "train", docs, tokenizer, shard_tokens=2_000)
    change_header(paths[1], tokenizer="0123456789abcdef")
    with pytest.raises(ShardError, match="different tokenizers"):
        open_shards(tmp_path, "train")


def test_a_crash_in_a_later_shard_leaves_whole_files_only(tmp_path, tokenizer, docs):
    def crashing():
        yield from docs[:25]
        raise RuntimeError("power cut")

    older = write_shards(tmp_path, "train", docs, tokenizer, shard_tokens=2_000)
    with pytest.raises(RuntimeError):
        write_shards(tmp_path, "train", crashing(), tokenizer, shard_tokens=2_000)
    left = sorted(tmp_path.iterdir())
    assert 0 < len(left) < len(older)
    whole = open_shards(tmp_path, "train")
    assert whole[:].tolist() == every_id(tokenizer, docs)[:len(whole)]  # new text only, none of it cut


def test_a_missing_shard_is_noticed(tmp_path, tokenizer, docs):
    paths = write_shards(tmp_path, "train", docs, tokenizer, shard_tokens=2_000)
    paths[1].unlink()
    with pytest.raises(ShardError, match="train-00001.bin"):
        open_shards(tmp_path, "train")


def test_nothing_there_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="minillm tokenize"):
        open_shards(tmp_path, "train")


def test_the_ids_are_mapped_and_not_read(shards):
    assert all(isinstance(ids, np.memmap) and not ids.flags.writeable for ids in shards._maps)
    assert module.HEADER % 4_096 == 0  # so that the ids begin on a page
