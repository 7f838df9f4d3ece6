"""The engine with ZeRO, alone and with tensor and pipeline ranks, against one process. One launch per number of ranks."""

import shutil
from dataclasses import replace

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from safetensors.torch import load_file
from steps import dense_of, like_one_process, resumed, share, trained

from minillm.config import ParallelConfig
from minillm.data.prepare import open_prepared
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.torch_engine import build_engine
from minillm.train.metrics import read_metrics
from minillm.zero_engine import ZeroEngine
from runs import PLAN, TINY, small_data, trainer

MODEL = replace(TINY, layers=3, tied=True, norm="layer", bias=("qkv", "out", "mlp", "norm"))
BASE = replace(PLAN, batch_size=8, microbatch_size=2, lr=1e-2, clip_norm=0.1)
NARROW = {"bf16": replace(BASE, precision="bf16"), "bf16 + masters": replace(BASE, precision="bf16", master_weights=True),
          "fp16 + masters": replace(BASE, precision="fp16", master_weights=True)}
MASTERS = "bf16 + masters"
LAYOUTS = {2: [dict(zero=1), dict(zero=2), dict(zero=3)],
           4: [dict(tp=2, zero=1), dict(pp=2, zero=1), dict(tp=2, sequence_parallel=True, zero=3)],
           8: [dict(tp=2, pp=2, zero=1)]}


def twice(parallel=ParallelConfig()):
    """Two batches before one step."""
    engine = build_engine(Transformer(MODEL, seed=3).double(), BASE, parallel)
    for step in range(2):
        engine.forward_backward(share(engine, step))
    return dense_of(engine, {name: weight.grad for name, weight in engine.weights.items()})


def overflow_on_one_rank(me, parallel):
    """Step 2 has an infinite gradient on the last rank only."""
    engine, found = build_engine(MODEL, NARROW["fp16 + masters"], parallel), []
    for step in range(3):
        engine.forward_backward(share(engine, step))
        if step == 1 and me.rank == me.size - 1:
            next(w.grad for w in engine.weights.values() if w.numel()).view(-1)[0] = float("inf")
        found.append((engine.step(), engine.scaler.scale))
    return found


def everything(me, layouts, dense, narrow):
    found = []
    for layout in layouts:
        parallel = ParallelConfig(dp=2, **layout, bucket_mb=0.01)
        found.append({"run": trained(MODEL, BASE, parallel), "evaluated": 1e-6 if parallel.pp > 1 else 1e-9,
                      "twice": twice(parallel), "resumed": resumed(MODEL, BASE, dense, parallel),
                      "overflow": overflow_on_one_rank(me, parallel)})
        if me.size == 2:
            found[-1]["narrow"] = {name: trained(MODEL, plan, parallel, wide=False) for name, plan in NARROW.items()}
            found[-1]["narrow resumed"] = resumed(MODEL, NARROW[MASTERS], narrow, parallel, wide=False)
    return found if me.rank in (0, me.size - 1) else None


@pytest.fixture(scope="module")
def dense():
    return trained(MODEL, BASE)


@pytest.fixture(scope="module")
def narrow():
    return trained(MODEL, NARROW[MASTERS], wide=False)


@pytest.fixture(scope="module", params=[2, 4, pytest.param(8, marks=pytest.mark.slow)])
def results(request, dense, narrow):
    """Of the first and the last rank, for each layout."""
    found = launch(everything, request.param, LAYOUTS[request.param], dense, narrow, backend="gloo", timeout=100)
    return [*found[0], *found[-1]]


def test_ten_steps_are_those_of_one_process(results, dense):
    for rank in results:
        like_one_process(rank["run"], dense, evaluated=rank["evaluated"])


def test_a_rank_holds_its_share(results, dense):
    for rank in results:  # pieces of two data ranks, and padding
        assert rank["run"]["held"] < 0.51 * dense["held"]


def test_what_two_batches_add_up_to(results):
    wanted = twice()
    for rank in results:
        assert rank["twice"].keys() == wanted.keys()
        for name, expected in wanted.items():
            torch.testing.assert_close(rank["twice"][name], expected, rtol=1e-9, atol=1e-12)  # float64


def test_a_state_goes_on_in_every_layout(results, dense):
    wanted = resumed(MODEL, BASE, dense)
    for rank in results:
        # float64; the loss that is returned is added up in float32
        assert rank["resumed"][0] == 10 and rank["resumed"][1] == pytest.approx(wanted[1], rel=1e-6)
        assert resumed(MODEL, BASE, rank["run"])[1] == pytest.approx(wanted[1], rel=1e-6)


def test_in_16_bits_it_stays_close_to_one_process(results):
    for name, plan in NARROW.items():
        wanted = trained(MODEL, plan, wide=False)
        for ours in (rank["narrow"][name] for rank in results if "narrow" in rank):
            # products of 8 or 11 bits, added up in another order; ten steps of Adam, a mean of 200 tokens
            assert ours["losses"] == pytest.approx(wanted["losses"], rel=5e-3)
            assert ours["state"].keys() == wanted["state"].keys() and ours["weights"]["embed.weight"].dtype == torch.float32
            assert ours["model"]["embed.weight"].dtype == wanted["model"]["embed.weight"].dtype


def test_master_weights_go_on(results, narrow):
    wanted = resumed(MODEL, NARROW[MASTERS], narrow, wide=False)
    for rank in results:
        if "narrow resumed" in rank:
            assert rank["narrow resumed"] == (10, pytest.approx(wanted[1], rel=5e-3))  # as above


def test_all_ranks_skip_the_same_steps(results):
    for rank in results:
        assert rank["overflow"] == [(True, 65_536), (False, 32_768), (True, 32_768)]


LAYOUT = dict(dp=2, zero=3, bucket_mb=0.01)
CHANGES = dict(model=MODEL, microbatch_size=1)


def jobs(me, folder, runs):
    """A whole run, and one that goes on from the checkpoint of one process; looks get a model that can be asked."""
    data, looked, parallel = open_prepared(folder), [], ParallelConfig(**LAYOUT)
    job = trainer(data, runs / "two", parallel=parallel, **CHANGES)
    job.at = {3: lambda model: looked.append(model(torch.zeros(1, 4, dtype=torch.long)).shape) or {"sample": "text"}}
    job.train()
    trainer(data, runs / "went on", parallel=parallel, **CHANGES).train(resume=runs / "went on" / "step-000004")
    return looked


def test_a_run_is_that_of_one_process_and_goes_on_in_another_layout(tmp_path):
    data = small_data(tmp_path / "data")
    trainer(data, tmp_path / "alone", **CHANGES).train()
    shutil.copytree(tmp_path / "alone", tmp_path / "went on")
    assert launch(jobs, 2, data.folder, tmp_path, backend="gloo") == [[torch.Size([1, 4, 300])], []]
    shutil.copytree(tmp_path / "two", tmp_path / "back")
    trainer(data, tmp_path / "back", **CHANGES).train(resume=tmp_path / "back" / "step-000004")
    wanted, *others = [{r["step"]: r["loss"] for r in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in r}
                       for run in ("alone", "two", "went on", "back")]
    assert list(wanted) == [1, 2, 3, 4, 5, 6]
    for found in others:
        # float32: sums in another order; a few steps of Adam, whose first ones amplify what is close to 0
        assert found == pytest.approx(wanted, rel=1e-4)
    ours, theirs = (load_file(tmp_path / run / "step-000006" / "optimizer.safetensors") for run in ("two", "alone"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize(("changes", "layout", "words"), [
    (dict(optimizer="muon"), dict(zero=1), "zero = 1 with optimizer = 'muon': it looks at whole matrices"),
    ({}, dict(zero=2, pp=2), "zero = 2 with pp = 2: each of the microbatches on their way would send its gradients"),
    (dict(compile=True), dict(zero=3), "zero = 3 with compile: weights come and go"),
    (dict(precision="fp8"), dict(zero=3), "zero = 3 with precision = 'fp8'")])
def test_what_does_not_go_together(changes, layout, words):
    with pytest.raises(ValueError, match=words):
        ZeroEngine(MODEL, replace(BASE, **changes), ParallelConfig(dp=2, **layout))


def test_configurations_that_make_no_sense():
    with pytest.raises(ValueError, match="zero = 1 with dp = 1: it is data-parallel ranks that share out"):
        ParallelConfig(zero=1)
    with pytest.raises(ValueError, match="zero = 4: choose from 0, 1, 2, 3"):
        ParallelConfig(dp=2, zero=4)
    with pytest.raises(ValueError, match="engine = 'zero', and this is the engine 'ours': use build_engine"):
        Engine(MODEL, BASE, ParallelConfig(dp=2, zero=1))
