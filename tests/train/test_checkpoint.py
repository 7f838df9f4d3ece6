import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minillm.model.families import preset
from minillm.model.huggingface import CheckpointError, load_pretrained
from minillm.model.transformer import Transformer
from minillm.train import checkpoint
from minillm.train.checkpoint import (checkpoints, latest_checkpoint, load_checkpoint, prune, save_checkpoint,
                                      what_is_wrong)

MODEL = Transformer(preset("first", vocab_size=30, layers=1, width=8, heads=2, context=8), seed=3)
TENSORS = {"exp_avg/embed.weight": torch.arange(12.0).view(3, 4), "steps_done": torch.tensor(7)}
NOTES = {"step": 7, "loader": {"epoch": 1, "taken": 2}}


def save(run, *steps):
    for step in steps:
        save_checkpoint(run / f"step-{step:06d}", MODEL, TENSORS, NOTES)
    return run / f"step-{steps[-1]:06d}"


def names(run):
    return [folder.name for folder in checkpoints(run)]


def test_what_is_read_back_is_what_was_saved(tmp_path):
    folder = tmp_path / "new" / "run" / "step-000007"
    save_checkpoint(folder, MODEL, TENSORS, NOTES, lambda into: (into / "tokenizer.json").write_text("{}"))
    found = load_checkpoint(folder)
    assert found.folder == folder and found.notes == NOTES
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    weights = MODEL.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in load_pretrained(folder).state_dict().items())
    assert [path.name for path in folder.parent.iterdir()] == ["step-000007"]  # no temporary folder is left


def test_the_manifest_gives_the_size_of_every_other_file(tmp_path):
    folder = save(tmp_path, 7)
    sizes = json.loads((folder / "manifest.json").read_text())
    assert sizes == {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json"}
    assert set(sizes) == {"config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "empty"])
def test_any_damaged_file_is_noticed_and_the_whole_one_before_it_named(tmp_path, name, damage):
    folder = save(tmp_path, 1, 2)
    file = folder / name
    size = file.stat().st_size
    if damage == "missing":
        file.unlink()
    else:
        left = {"shorter": file.read_bytes()[:-1], "longer": file.read_bytes() + b"x", "empty": b""}[damage]
        file.write_bytes(left)
    expected = f"{name} is missing" if damage == "missing" else f"{name} has {len(left):,} of {size:,} bytes"
    assert what_is_wrong(folder) == expected
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    for words in (f"{folder} is incomplete: {expected}", "step-000001", f"--resume {tmp_path / 'step-000001'}"):
        assert words in str(error.value)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"config.json": "long"}', b"\xff"])
def test_a_manifest_that_says_nothing_is_no_manifest(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content)
    assert what_is_wrong(folder)
    assert latest_checkpoint(tmp_path) is None


def test_without_any_whole_checkpoint_the_way_out_is_another(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing.*no other whole checkpoint.*--fresh"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load_checkpoint(tmp_path / "step-000009")


def test_the_newest_has_the_highest_step(tmp_path):
    made = save(tmp_path, 1)
    for step in ("999999", "1000000", "000020"):
        shutil.copytree(made, tmp_path / f"step-{step}")
    assert names(tmp_path) == ["step-000001", "step-000020", "step-999999", "step-1000000"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_pruning_keeps_the_newest_whole_ones_and_broken_ones(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    for step in (1, 4):
        (tmp_path / f"step-00000{step}" / "config.json").unlink()
    prune(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000003", "step-000004", "step-000005"]
    prune(tmp_path, 5)
    assert len(names(tmp_path)) == 4


def test_saving_again_replaces_the_folder_and_clears_what_a_kill_left(tmp_path):
    folder = save(tmp_path, 7)
    (folder / "stray").write_text("of an older version")
    (tmp_path / ".step-000007.tmp").mkdir()
    (tmp_path / ".step-000007.tmp" / "half").write_text("of a checkpoint")
    save_checkpoint(folder, MODEL, TENSORS, {"step": 8})
    assert load_checkpoint(folder).notes == {"step": 8}
    assert not (folder / "stray").exists() and [p.name for p in tmp_path.iterdir()] == ["step-000007"]


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device"), "disk is full"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
    (PermissionError(13, "Permission denied"), "Permission denied")])
@pytest.mark.parametrize("call", ["save_tensors", "write_atomically", "save_pretrained"])
def test_whatever_fails_the_older_checkpoint_stays(tmp_path, monkeypatch, call, error, words):
    folder = save(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, call, fail)
    for step in (1, 2):  # under a new name, and in the place of the older one
        with pytest.raises(CheckpointError, match=f"step-00000{step} could not be written: .*{words}.*step-000001, untouched"):
            save(tmp_path, step)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_nothing_has_the_real_name_before_everything_is_on_the_disk(tmp_path, monkeypatch):
    seen, rename = [], os.rename

    def watched(source, target):
        seen.append((what_is_wrong(source), target.exists()))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    save(tmp_path, 1, 1)
    assert seen == [(None, False), (None, False)]
    assert load_file(tmp_path / "step-000001" / "model.safetensors")
