"""Which text counts as new to a model. The tables are tested with the command, in tests/test_cli.py."""

import json
from dataclasses import asdict

import pytest

from minillm.course.evaluation import FRESH, trained_on, unseen
from minillm.data.corpora import documents, split
from minillm.data.prepare import DataConfig


def test_what_a_run_was_trained_on_is_read_beside_it(tmp_path):
    config = DataConfig(source="python-docs", val_fraction=0.1, seed=3)
    checkpoint = tmp_path / "step-000001"
    assert trained_on(checkpoint) is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.json").write_text(json.dumps({"request": asdict(config) | {"vocab_size": 300}}))
    assert trained_on(checkpoint) == trained_on(tmp_path) == config


def test_of_the_source_in_training_only_the_validation_part_is_new(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"text number {number}")
    config = DataConfig(source=str(tmp_path), val_fraction=0.4)
    train, val = split(documents(str(tmp_path)), 0.4)
    assert len(train) > 5 and len(val) > 5
    assert unseen(str(tmp_path), 10_000, config) == val
    assert unseen(str(tmp_path), 20, config) == val[:2]  # 13 or 14 bytes each
    for other in (None, DataConfig(source="stories")):
        assert len(unseen(str(tmp_path), 10_000, other)) == 40


@pytest.mark.parametrize("seen", [None, DataConfig(seed=5), DataConfig(source="languages", seed=5)])
def test_stories_are_always_fresh(seen):
    seed = seen.seed if seen else 0
    found = {document.text for document in unseen("stories", 20_000, seen)}
    assert found == {document.text for document in documents("stories", limit=20_000, seed=FRESH + seed)}
    assert not found & {document.text for document in documents("stories", limit=100_000, seed=seed)}
