import json

import pytest

from minillm.train.metrics import Metrics, read_metrics


def test_lines_are_there_at_once_and_a_cut_line_is_left_out(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(1, loss=2.5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]  # before the file is closed
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "los')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_resuming_drops_what_came_after_the_checkpoint_and_a_fresh_run_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    Metrics(path, resume_at=2).close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    Metrics(path).close()
    assert read_metrics(path) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    metrics = Metrics(tmp_path / "metrics.jsonl", tensorboard=True)
    metrics.write(7, loss=1.5, sample="text is not for it")
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 1.5)]


def test_tensorboard_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Metrics(tmp_path / "metrics.jsonl", tensorboard=True)
