"""A run that is killed anywhere, or whose disk fills up, goes on to the losses and weights of one that never stopped."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import TRAIN
from safetensors.torch import load_file

from minillm.cli import main
from minillm.progress import show_progress
from minillm.train.checkpoint import checkpoints, latest_checkpoint, what_is_wrong
from minillm.train.metrics import read_metrics
from runs import small_data, trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL: Linux or macOS")

# Where to kill: what is called, and at which of its calls. Six steps, a checkpoint after every second one.
PLACES = [*[("before the update", step) for step in range(1, 7)],
          *[("in the middle of a line of metrics", line) for line in (1, 4, 9)],
          *[("in the middle of a file of a checkpoint", file) for file in range(1, 7)],
          *[("before a checkpoint gets its name", number) for number in (1, 2, 3)],
          *[("before the oldest checkpoint is removed", number) for number in (1, 2, 3)]]

# One process that forks a child for every place: importing torch so often would take a minute.
SCRIPT = """
import json, os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from minillm import trainer as module
from minillm.data.prepare import open_prepared
from minillm.engine import Engine
from minillm.model.huggingface import CheckpointError
from minillm.train import checkpoint
from minillm.train.metrics import Metrics
from runs import PLAN, TINY
from test_resume import a_run

Engine(TINY, PLAN)  # what torch imports on first use is imported once, here

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_line(metrics, step, **values):
    metrics._file.write('{"step": ' + str(step) + ', "lo')
    metrics._file.flush()
    die()

def half_a_file(path, tensors):
    path.write_bytes(b"half")
    die()

KILLERS = {"before the update": (Engine, "step", die),
           "in the middle of a line of metrics": (Metrics, "write", half_a_line),
           "in the middle of a file of a checkpoint": (checkpoint, "save_tensors", half_a_file),
           "before a checkpoint gets its name": (os, "rename", die),
           "before the oldest checkpoint is removed": (module, "prune", die)}

def kill_at(place, number):
    owner, name, killer = KILLERS[place]
    real, calls = getattr(owner, name), []
    def counted(*args, **options):
        calls.append(args)
        return (killer if len(calls) == number else real)(*args, **options)
    setattr(owner, name, counted)
    if name == "save_tensors":  # save_pretrained has its own name for it
        from minillm.model import huggingface
        huggingface.save_tensors = counted

def fill_the_disk(model):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return {"full": True}

def child(run, place, number):
    job = a_run(open_prepared(sys.argv[2]), run)
    if place == "full disk":
        job.at[number] = fill_the_disk
        try:
            job.train()
        except CheckpointError as error:
            (run / "error.txt").write_text(str(error))
            return 5
    else:
        kill_at(place, number)
        job.train()
    return 0

ended = []
for place, number in json.loads(sys.argv[4]):
    run = Path(sys.argv[3]) / f"{place} {number}"
    if not (pid := os.fork()):
        try:
            os._exit(child(run, place, number))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


def a_run(data, run):
    """A trainer that also draws random numbers on its way: they must go on where they were, too."""
    torch.manual_seed(1)
    job = trainer(data, run)
    job.at = {step: lambda model: {"drawn": float(torch.rand(()))} for step in (1, 5)}
    return job


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert a_run(data, run).train()
    return run


@pytest.fixture(scope="module")
def cut(data, whole):
    """(place, number) -> how the run that was stopped there ended. Their folders are beside the whole one's."""
    places = [*PLACES, ("full disk", 3)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, Path(__file__).parent, data.folder, whole.parent, json.dumps(places)],
                          capture_output=True, text=True, timeout=200, 
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})  # forks cannot use CUDA
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(places, json.loads(done.stdout), strict=True))


def measured(run):
    """Everything in the metrics file but the time that it took."""
    return [{name: value for name, value in record.items() if name not in ("tokens_per_second", "mfu", "sample_seconds")}
            for record in read_metrics(run / "metrics.jsonl")]


def goes_on_as_if_nothing_had_happened(data, run, whole):
    assert a_run(data, run).train(resume=latest_checkpoint(run))
    assert measured(run) == measured(whole)
    for file in ("model.safetensors", "optimizer.safetensors"):  # the second holds the random state too
        found, expected = (load_file(folder / "step-000006" / file) for folder in (run, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = [folder.name for folder in checkpoints(run) if what_is_wrong(folder) is None]
    assert names[-2:] == ["step-000004", "step-000006"]
    assert not list(run.glob(".*"))  # a checkpoint that was never finished is cleared away


@pytest.mark.parametrize("place, number", PLACES)
def test_killed_at_any_moment(data, whole, cut, place, number):
    assert cut[place, number] == -signal.SIGKILL
    run = whole.parent / f"{place} {number}"
    goes_on_as_if_nothing_had_happened(data, run, whole)


def test_a_disk_that_is_really_full_keeps_the_last_checkpoint(data, whole, cut):
    assert cut["full disk", 3] == 5
    run = whole.parent / "full disk 3"
    said = (run / "error.txt").read_text()
    assert re.search(r"step-000004 could not be written: the disk is full \([\d,]+ bytes free, about [\d,]+ needed\)", said)
    assert f"{run / 'step-000002'}, untouched" in said
    assert [folder.name for folder in checkpoints(run)] == ["step-000002"] and not list(run.glob(".*"))
    goes_on_as_if_nothing_had_happened(data, run, whole)



def test_the_command_passes_over_a_broken_checkpoint(tmp_path, capsys):
    def train():
        with pytest.raises(SystemExit) as end:
            main([*TRAIN, "--out", str(tmp_path / "run")])
        return end.value.code, capsys.readouterr().out

    try:
        assert train()[0] == 0
        before = measured(tmp_path / "run")
        weights = tmp_path / "run" / "step-000006" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        code, said = train()
    finally:
        show_progress(False)
    assert code == 0 and "step-000006 is not whole and is passed over" in said and "going on from step-000004" in said
    assert measured(tmp_path / "run") == before
    assert what_is_wrong(tmp_path / "run" / "step-000006") is None
