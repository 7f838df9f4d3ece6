"""Training on two ranks: the same curve as alone, one writer, one end for all; in this machine's ranks and under torchrun."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import TRAIN, ended, start
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from safetensors.torch import load_file

from minillm.config import ParallelConfig
from minillm.data.prepare import open_prepared
from minillm.model.flops import training_flops_per_token
from minillm.model.huggingface import CheckpointError
from minillm.parallel.agreement import FirstRankError, on_first
from minillm.parallel.launch import launch
from minillm.train.checkpoint import checkpoints, latest_checkpoint
from minillm.train.metrics import read_metrics
from minillm.trainer import TrainingError
from runs import TINY, small_data, trainer

TWO = ParallelConfig(dp=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


def curve(run):
    return [{name: value for name, value in record.items() if name not in ("tokens_per_second", "prompt", "sample", "sample_seconds", "mfu")}
            for record in read_metrics(run / "metrics.jsonl")]


def close(ours, theirs):
    """Float32: sums over other rows; a few steps of Adam, whose first ones amplify what is close to 0."""
    assert [record.keys() for record in ours] == [record.keys() for record in theirs] and len(ours) > 5
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)


def jobs(me, folder, runs):
    """Three runs: whole; stopped by a signal to the last rank and resumed; one that fails, and one whose disk is full."""
    data, found = open_prepared(folder), {}
    looked = []
    job = trainer(data, runs / "whole", parallel=TWO)
    job.peak, job.at = 1e9, {3: lambda model: looked.append(me.rank) or {"sample": "text"}}
    found["whole"], found["looked"] = job.train(), looked

    job = trainer(data, runs / "cut", parallel=TWO)
    step = job.engine.step

    def interrupted():
        if me.rank == me.size - 1 and job.engine.steps_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()
    job.engine.step = interrupted
    found["cut"] = job.train(), job.engine.steps_done
    job = trainer(data, runs / "cut", parallel=TWO)
    found["resumed"] = job.train(resume=on_first(lambda: latest_checkpoint(runs / "cut"), me.group)), job.loader.state_dict()

    job = trainer(data, runs / "broken", parallel=TWO)
    right = job.engine.loss
    job.engine.loss = lambda logits, b: right(logits, b) * (
        float("nan") if me.rank == 1 and logits.requires_grad and job.engine.steps_done == 3 else 1.0)
    try:
        job.train()
    except TrainingError as error:
        found["broken"] = str(error)

    job = trainer(data, runs / "full", parallel=TWO)
    job._write = lambda *_: (_ for _ in ()).throw(CheckpointError("the disk is full"))
    try:
        job.train()
    except (CheckpointError, FirstRankError) as error:
        found["full"] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    job = trainer(data, runs / "alone")
    job.at = {3: lambda model: {"sample": "text"}}
    job.train()
    return runs, launch(jobs, 2, data.folder, runs, backend="gloo")


def test_the_curve_and_the_files_are_those_of_one_process(ranks):
    runs, found = ranks
    assert [rank["whole"] for rank in found] == [True, True]
    close(curve(runs / "whole"), curve(runs / "alone"))
    assert [folder.name for folder in checkpoints(runs / "whole")] == ["step-000004", "step-000006"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(runs / name / "step-000006" / file) for name in ("whole", "alone"))
        assert ours.keys() == theirs.keys()


def test_one_process_goes_on_where_two_ranks_were(ranks, data, tmp_path):
    runs, _ = ranks
    shutil.copytree(runs / "whole", tmp_path / "run")
    assert trainer(data, tmp_path / "run").train(resume=tmp_path / "run" / "step-000004")
    ours, theirs = ([(r["step"], r["loss"]) for r in curve(run) if "loss" in r] for run in (tmp_path / "run", runs / "alone"))
    assert [step for step, _ in ours] == list(range(1, 7))
    assert dict(ours) == pytest.approx(dict(theirs), rel=1e-4)


def test_what_is_planned_happens_once(ranks):
    runs, found = ranks
    assert [rank["looked"] for rank in found] == [[0], []]
    assert [record["sample"] for record in read_metrics(runs / "whole" / "metrics.jsonl") if "sample" in record] == ["text"]


def test_the_share_of_the_peak_is_that_of_all_ranks(ranks):
    runs, _ = ranks
    records = [r for r in read_metrics(runs / "whole" / "metrics.jsonl") if "mfu" in r]
    for record in records:  # rounded to four digits after the point
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * training_flops_per_token(TINY, 32) / 2e9, abs=1e-4)
    assert len(records) == 6


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_nothing_is_lost(ranks):
    runs, found = ranks
    assert [rank["cut"] for rank in found] == [(False, 3), (False, 3)]
    assert all(rank["resumed"][0] and rank["resumed"][1] == found[0]["resumed"][1] for rank in found)
    losses = [[(r["step"], r["loss"]) for r in curve(runs / name) if "loss" in r] for name in ("whole", "cut")]
    assert losses[0] == losses[1]  # on the same ranks, bit for bit
    whole, cut = (load_file(runs / name / "step-000006" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_loss_that_is_no_number_on_one_rank_stops_all(ranks):
    runs, found = ranks
    assert found[0]["broken"] == found[1]["broken"] and "step 4: the loss is nan" in found[0]["broken"]
    assert "step-000002" in found[0]["broken"] and checkpoints(runs / "broken")[-1].name == "step-000002"


def test_all_hear_that_the_first_could_not_write(ranks):
    _, found = ranks
    assert found[0]["full"] == "CheckpointError: the disk is full"
    assert found[1]["full"] == "FirstRankError: the first rank of the group could not go on: CheckpointError: the disk is full"


@pytest.mark.slow
def test_torchrun_does_what_one_process_does(tmp_path):
    code, alone, err = ended(start(*TRAIN, "--out", tmp_path / "alone"))
    assert code == 0, err
    code, said, err = ended(start(*TRAIN, "--out", tmp_path / "two", "--parallel.dp", "2", ranks=2))
    assert code == 0, err
    close(curve(tmp_path / "two"), curve(tmp_path / "alone"))
    for words in ("Done. Validation loss", "report.html", "6 steps of 128 tokens on cpu"):  # said once, by the first rank
        assert alone.count(words) == said.count(words) == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(path.name for path in (tmp_path / "alone").iterdir())
    shutil.rmtree(tmp_path / "two" / "step-000006")
    code, said, err = ended(start(*TRAIN, "--out", tmp_path / "two", "--parallel.dp", "2", ranks=2))
    assert code == 0 and "going on from step-000004" in said, err
    code, said, err = ended(start(*TRAIN, "--out", tmp_path / "two", ranks=2))  # without --parallel.dp
    assert code != 0 and err.count("2 ranks have been started, and the layout has 1: add --parallel.dp 2") == 1
    code, said, err = ended(start("train", "--data.source", tmp_path / "nowhere", "--out", tmp_path / "three", "--parallel.dp", "2", ranks=2))
    assert code != 0 and err.count("minillm: ") == 1 and "nowhere" in err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
def test_a_signal_to_one_rank_under_torchrun(tmp_path):
    run = tmp_path / "run"
    process = start(*TRAIN, "--train.steps", "100000", "--train.checkpoint-every", "100000", "--train.eval-every", "100000",
                    "--out", run, "--parallel.dp", "2", ranks=2)
    try:
        while len(read_metrics(run / "metrics.jsonl")) < 20:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        last = next(pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(int(last), signal.SIGTERM)
        code, said, err = ended(process)
    finally:
        process.kill()
    assert code == 0, err
    assert said.count("Stopped after step") == 1
    newest = latest_checkpoint(run)
    assert int(newest.name.removeprefix("step-")) == read_metrics(run / "metrics.jsonl")[-1]["step"] >= 19


def test_without_ranks_it_says_what_to_type(capsys, tmp_path, monkeypatch):
    from minillm.cli import main
    from minillm.progress import show_progress

    def said(*words):
        with pytest.raises(SystemExit) as end:
            main([*TRAIN, "--out", str(tmp_path / "run"), *words])
        show_progress(False)
        assert end.value.code == 2
        return capsys.readouterr().err

    err = said("--parallel.dp", "2")
    assert "torchrun --nproc-per-node 2 -m minillm train --parallel.dp 2" in err and "Traceback" not in err
    assert "a batch of 4 sequences does not divide over dp = 3 ranks" in said("--parallel.dp", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 ranks have been started, and the layout has 4" in said("--parallel.dp", "4")
    monkeypatch.setenv("RANK", "1")
    assert said("--parallel.dp", "4") == ""  # the first rank says it
    assert not (tmp_path / "run").exists()
