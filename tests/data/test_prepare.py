import json
import math
import shutil
from dataclasses import replace

import pytest

from minillm.data.prepare import DataConfig, open_prepared, prepare
from minillm.data.shards import write_shards
from minillm.data.stories import stories
from minillm.text.bpe import BPETokenizer

CONFIG = DataConfig(size=40_000, val_fraction=0.2, tokenizer_size=20_000)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"), CONFIG, 320)


def test_both_splits_hold_the_documents_with_their_true_nats(prepared):
    assert prepared.train.documents + prepared.val.documents > 30
    assert prepared.train.bytes > 2 * prepared.val.bytes > 0
    assert not math.isnan(prepared.val.nats)
    text = prepared.tokenizer.decode(prepared.train[:prepared.train.tokens].tolist())
    first = next(stories(1, seed=CONFIG.seed)).text
    assert (first in text) != (first in prepared.tokenizer.decode(prepared.val[:prepared.val.tokens].tolist()))
    assert prepared.tokenizer.vocab_size == 320 == prepared.train.vocab_size


def test_the_same_request_opens_what_is_there(prepared, monkeypatch):
    monkeypatch.setattr("minillm.data.prepare.BPETokenizer.train", lambda *_, **__: pytest.fail("made again"))
    again = prepare(prepared.folder, CONFIG, 320)
    assert again.train[:].tolist() == prepared.train[:].tolist()


def test_another_request_is_refused(prepared):
    with pytest.raises(ValueError, match="vocab_size was 320 and is now 400"):
        prepare(prepared.folder, CONFIG, 400)


def test_an_unfinished_folder_is_not_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.json"):
        open_prepared(tmp_path)


def test_an_interrupted_preparation_is_done_again(prepared, tmp_path, monkeypatch):
    def interrupted(folder, name, documents, tokenizer):
        if name == "val":
            raise KeyboardInterrupt
        return write_shards(folder, name, list(documents)[:3], tokenizer)  # and this one left unfinished

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("minillm.data.prepare.write_shards", interrupted)
        prepare(tmp_path, CONFIG, 320)
    with pytest.raises(FileNotFoundError, match="no finished data folder"):
        open_prepared(tmp_path)
    again = prepare(tmp_path, CONFIG, 320)
    for split in ("train", "val"):
        assert getattr(again, split)[:].tolist() == getattr(prepared, split)[:].tolist()


def test_stories_are_never_thinned_out(tmp_path, monkeypatch):
    # without its rare near-copies, the text would no longer have the entropy that the grammar says
    monkeypatch.setattr("minillm.data.prepare.remove_duplicates", lambda *_: pytest.fail("looked for duplicates"))
    assert CONFIG.dedup and prepare(tmp_path, CONFIG, 300).train.documents > 20


def test_duplicates_are_removed_from_text_and_counted(tmp_path):
    lines = [story.text for story in stories(20, 1)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*lines, *lines[:7]]))
    config = DataConfig(source=str(source), val_fraction=0.3)
    made = prepare(tmp_path / "data", config, 300)
    assert made.train.documents + made.val.documents == 20
    assert json.loads((tmp_path / "data" / "data.json").read_text())["duplicates_removed"] == 7


def test_cleaning_is_part_of_the_request_and_noted(tmp_path):
    good = [story.text for story in stories(20, 1)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*good, good[0], "too short", "buy now " * 99]))
    config = DataConfig(source=str(source), val_fraction=0.3, clean=True)
    made = prepare(tmp_path / "data", config, 300)
    assert made.train.documents + made.val.documents == 20
    notes = json.loads((tmp_path / "data" / "data.json").read_text())
    assert notes["duplicates_removed"] == 1 and any(line.startswith("quality rules: ") for line in notes["cleaning"])
    with pytest.raises(ValueError, match="clean was True and is now False"):
        prepare(tmp_path / "data", replace(config, clean=False), 300)
    with pytest.raises(ValueError, match="min_words was None and is now 60"):
        prepare(tmp_path / "data", replace(config, min_words=60), 300)


def test_a_folder_made_before_there_was_cleaning_still_opens(prepared, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(prepared.folder, folder)
    notes = json.loads((folder / "data.json").read_text())
    del notes["request"]["clean"], notes["request"]["min_words"]
    (folder / "data.json").write_text(json.dumps(notes))
    assert prepare(folder, CONFIG, 320).train.documents == prepared.train.documents


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(ValueError, match="1 documents leave none for (train|validation)"):
        prepare(tmp_path / "data", DataConfig(source=str(tmp_path / "one.txt")), 300)


def test_a_single_file_is_cut_at_its_blank_lines(tmp_path):
    (tmp_path / "one.txt").write_text("\n\n".join(f"document number {n}" for n in range(20)))
    config = DataConfig(source=str(tmp_path / "one.txt"), val_fraction=0.3, dedup=False)
    made = prepare(tmp_path / "data", config, 300)
    assert made.train.documents + made.val.documents == 20 and made.val.documents


def test_a_tokenizer_can_be_given(tmp_path, prepared):
    config = DataConfig(source="languages", val_fraction=0.3)
    made = prepare(tmp_path / "data", config, tokenizer=prepared.tokenizer)
    assert made.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    other = BPETokenizer.train(["another text"], 290)
    with pytest.raises(ValueError, match="tokenizer was "):
        prepare(tmp_path / "data", config, tokenizer=other)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"tokenizer_size": 0}, {"val_fraction": 0.0}, {"val_fraction": 1.0},
                                   {"clean": True}, {"min_words": 5}, {"min_words": -1, "clean": True, "source": "languages"}])
def test_a_wrong_request_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        DataConfig(**wrong)
