"""A rank is killed without warning: torchrun starts all anew and the run goes on from its last checkpoint; also on fewer ranks."""

import os
import signal
import time
from pathlib import Path

import pytest
from commands import TRAIN, ended, start

from minillm.train.checkpoint import latest_checkpoint
from minillm.train.metrics import read_metrics

STEPS = ["--train.steps", "60", "--train.checkpoint-every", "10", "--train.eval-every", "60"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")]


def rank_of(process, rank):
    """The process of a rank that torchrun has started, or None."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)


def kill_one(process, run):
    """SIGKILL for rank 1, some steps after the first checkpoint; returns the step."""
    while latest_checkpoint(run) is None or read_metrics(run / "metrics.jsonl")[-1]["step"] < 13:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    return read_metrics(run / "metrics.jsonl")[-1]["step"]


def losses(run):
    return {entry["step"]: entry["loss"] for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = ended(start(*TRAIN, *STEPS, "--out", run))
    assert code == 0, err
    return losses(run)


@pytest.mark.parametrize("restarts", [1, 0])
def test_the_run_goes_on_from_its_last_checkpoint(tmp_path, alone, restarts):
    run = tmp_path / "run"
    process = start(*TRAIN, *STEPS, "--out", run, "--parallel.dp", "2", "--parallel.zero", "3", ranks=2, restarts=restarts)
    try:
        killed = kill_one(process, run)
        code, said, err = ended(process)
    finally:
        process.kill()
    assert 10 < killed < 60
    if not restarts:  # nobody starts it again but we, and there is one rank left
        assert code != 0
        code, said, err = ended(start(*TRAIN, *STEPS, "--out", run))
    assert code == 0 and "going on from step-" in said, err
    assert losses(run).keys() == alone.keys() and len(alone) == 60
    # float32: two ranks add up the gradients in another order, over sixty steps
    assert losses(run) == pytest.approx(alone, rel=1e-4)
