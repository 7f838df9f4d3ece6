"""The engine and the trainer on pipeline ranks, alone and with data- and tensor-parallel ones, against one process."""

import shutil
from dataclasses import replace

import pytest
import torch
from commands import TRAIN, ended, start
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from safetensors.torch import load_file

from minillm.config import ParallelConfig
from minillm.data.prepare import open_prepared
from minillm.engine import Engine, check_layout
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.train.checkpoint import checkpoints
from minillm.train.metrics import read_metrics
from runs import PLAN, TINY, run_losses, small_data, trainer
from steps import dense_of, like_one_process, resumed, share, trained

MODEL = replace(TINY, layers=4, heads=4, kv_heads=2)
BASE = replace(PLAN, batch_size=8, microbatch_size=2, lr=1e-2, clip_norm=0.1)
PLANS = {"plain": BASE, "z-loss, by hand": replace(BASE, z_loss=1e-2, clip_norm=0.0, microbatch_size=1, optimizer="by_hand")}
STEPS = {"plain": 4, "z-loss, by hand": 2}  # ten of every schedule: tests/parallel/test_pipeline.py
NARROW = {"bf16": replace(BASE, precision="bf16"), "fp16 + masters": replace(BASE, precision="fp16", master_weights=True)}
LAYOUTS = {2: [dict(pp=2), dict(pp=2, schedule="zero_bubble"), dict(pp=2, schedule="interleaved", chunks=2)],
           4: [dict(dp=2, pp=2, schedule="zero_bubble"), dict(tp=2, pp=2, sequence_parallel=True), dict(pp=4, schedule="gpipe")],
           8: [dict(dp=2, tp=2, pp=2)]}


def overflow_on_one_rank(me, parallel):
    """Step 2 has an infinite gradient on the last rank only."""
    engine, found = Engine(MODEL, NARROW["fp16 + masters"], parallel), []
    for step in range(3):
        engine.forward_backward(share(engine, step))
        if step == 1 and me.rank == me.size - 1:
            next(iter(engine.weights.values())).grad.flatten()[0] = float("inf")
        found.append((engine.step(), engine.scaler.scale))
    return found


def twice(parallel=ParallelConfig()):
    """Two batches before one step."""
    engine = Engine(Transformer(MODEL, seed=3).double(), BASE, parallel)
    for step in range(2):
        engine.forward_backward(share(engine, step))
    return dense_of(engine, {name: weight.grad for name, weight in engine.weights.items()})


def everything(me, layouts, dense):
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout, bucket_mb=0.01)
        found.append({"runs": {name: trained(MODEL, plan, parallel, steps=STEPS[name]) for name, plan in PLANS.items()},
                      "twice": twice(parallel), "resumed": resumed(MODEL, BASE, dense, parallel)})
    found[0] |= {"narrow": {name: trained(MODEL, plan, parallel, wide=False, steps=4) for name, plan in NARROW.items()},
                 "overflow": overflow_on_one_rank(me, parallel)}
    return found if me.rank in (0, me.size - 1) else None


@pytest.fixture(scope="module")
def dense():
    return {name: trained(MODEL, plan, steps=STEPS[name]) for name, plan in PLANS.items()}


@pytest.fixture(scope="module", params=[2, 4, pytest.param(8, marks=pytest.mark.slow)])
def results(request, dense):
    """Of the first and the last rank, for each layout."""
    found = launch(everything, request.param, LAYOUTS[request.param], dense["plain"], backend="gloo")
    return list(zip(found[0], found[-1]))


def test_steps_are_those_of_one_process(results, dense):
    for name, wanted in dense.items():
        for ours in (rank["runs"][name] for ranks in results for rank in ranks):
            like_one_process(ours, wanted)


def test_what_two_batches_add_up_to(results):
    wanted = twice()
    for rank in (rank for ranks in results for rank in ranks):
        for name, expected in wanted.items():
            torch.testing.assert_close(rank["twice"][name], expected, rtol=1e-9, atol=1e-12)  # float64


def test_in_16_bits_it_stays_close_to_one_process(results):
    for name, plan in NARROW.items():
        wanted = trained(MODEL, plan, wide=False, steps=4)
        for ours in (rank["narrow"][name] for rank in results[0]):
            # products of 8 or 11 bits, added up in another order; four steps of Adam, a mean of 200 tokens
            assert ours["losses"] == pytest.approx(wanted["losses"], rel=3e-3)
            assert ours["norms"] == pytest.approx(wanted["norms"], rel=3e-2)  # of gradients, unscaled
            assert ours["weights"]["embed.weight"].dtype == torch.float32


def test_all_ranks_skip_the_same_steps(results):
    for rank in results[0]:
        assert rank["overflow"] == [(True, 65_536), (False, 32_768), (True, 32_768)]


def test_a_rank_holds_its_layers_and_a_state_goes_on_in_every_layout(results, dense):
    wanted, whole = resumed(MODEL, BASE, dense["plain"]), dense["plain"]["held"]
    for rank in (rank for ranks in results for rank in ranks):
        assert rank["runs"]["plain"]["held"] < 0.9 * whole  # the embedding is on two stages
        # float64; the loss that is returned is added up in float32
        assert rank["resumed"][0] == 4 and rank["resumed"][1] == pytest.approx(wanted[1], rel=1e-6)
        assert resumed(MODEL, BASE, rank["runs"]["plain"])[1] == pytest.approx(wanted[1], rel=1e-6)


FOUR = ParallelConfig(dp=2, pp=2)
CHANGES = dict(model=MODEL, microbatch_size=1)


def jobs(me, folder, runs):
    """A whole run, and one that goes on from the checkpoint of one process."""
    data, looked = open_prepared(folder), []
    job = trainer(data, runs / "four", parallel=FOUR, **CHANGES)
    job.at = {3: lambda model: looked.append(model(torch.zeros(1, 4, dtype=torch.long)).shape) or {"sample": "text"}}
    finished = job.train()
    job = trainer(data, runs / "went on", parallel=FOUR, **CHANGES)
    if me.rank == me.size - 1:  # a signal to one rank: all stop after the same step
        job.engine.any_rank = lambda flag, right=job.engine.any_rank: right(flag or job.engine.steps_done == 5)
    stopped = job.train(resume=runs / "went on" / "step-000004"), job.engine.steps_done
    again = trainer(data, runs / "went on", parallel=FOUR, **CHANGES).train(resume=runs / "went on" / "step-000005")
    return finished, stopped, again, looked


def test_a_run_is_that_of_one_process_and_goes_on_in_another_layout(tmp_path):
    data = small_data(tmp_path / "data")
    trainer(data, tmp_path / "alone", **CHANGES).train()
    shutil.copytree(tmp_path / "alone", tmp_path / "went on")
    found = launch(jobs, 4, data.folder, tmp_path, backend="gloo")
    assert found == [(True, (False, 5), True, [torch.Size([1, 4, 300])]), *[(True, (False, 5), True, [])] * 3]
    shutil.copytree(tmp_path / "four", tmp_path / "back")
    assert trainer(data, tmp_path / "back", **CHANGES).train(resume=tmp_path / "back" / "step-000004")
    wanted = run_losses(tmp_path / "alone")
    assert list(wanted) == [1, 2, 3, 4, 5, 6]
    for run in ("four", "went on", "back"):
        # float32: sums in another order; a few steps of Adam, whose first ones amplify what is close to 0
        assert run_losses(tmp_path / run) == pytest.approx(wanted, rel=1e-4)
        assert checkpoints(tmp_path / run)[-1].name == "step-000006"
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(tmp_path / name / "step-000006" / file) for name in (run, "alone"))
            assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    sides = [{r["step"]: r["val_loss"] for r in read_metrics(tmp_path / run / "metrics.jsonl") if "val_loss" in r and r["step"] != 3}
             for run in ("alone", "four")]
    assert sides[0] == pytest.approx(sides[1], rel=1e-4) and list(sides[0]) == [0, 2, 4, 6]


def test_layouts_that_do_not_fit():
    two = ParallelConfig(pp=2)
    for model, plan, parallel, words in (
            (MODEL, BASE, ParallelConfig(pp=8), "pp = 8 with chunks = 1 makes 8 stages, and the model has 4 layers"),
            (MODEL, replace(BASE, microbatch_size=4, batch_size=12), ParallelConfig(dp=2, pp=2),
             "a rank's 6 sequences do not divide into microbatches of 4"),
            (MODEL, replace(BASE, microbatch_size=8), ParallelConfig(pp=2, schedule="interleaved", chunks=2),
             "1 microbatches do not come in groups of 2 ranks"),
            (MODEL, replace(BASE, compile=True), two, "pp = 2 with compile: it has not been tried"),
            (MODEL, replace(BASE, precision="fp8"), two, "pp = 2 with precision = 'fp8'"),
            (MODEL, BASE, two, r"a layout of 2 ranks \(pp = 2\) does not fit a world of 1")):
        with pytest.raises(ValueError, match=words):
            Engine(model, plan, parallel)
    for options, words in ((dict(pp=0), "pp = 0"), (dict(schedule="gpipe"), "schedule = 'gpipe' with pp = 1"),
                           (dict(pp=2, chunks=2), "schedule = '1f1b' with chunks = 2"),
                           (dict(pp=2, schedule="interleaved"), "schedule = 'interleaved' with chunks = 1"),
                           (dict(pp=2, schedule="gpipes"), "Did you mean 'gpipe'")):
        with pytest.raises(ValueError, match=words):
            ParallelConfig(**options)
    assert check_layout(MODEL, BASE, ParallelConfig(dp=2, tp=2, pp=2)) is None


@pytest.mark.slow
def test_torchrun_on_three_axes_does_what_one_process_does(tmp_path):
    options = ["--model.layers", "2", "--train.microbatch-size", "1"]
    code, alone, err = ended(start(*TRAIN, *options, "--out", tmp_path / "alone"))
    assert code == 0, err
    axes = [word for axis in ("dp", "tp", "pp") for word in (f"--parallel.{axis}", "2")]
    code, said, err = ended(start(*TRAIN, *options, "--out", tmp_path / "eight", *axes, ranks=8))
    assert code == 0, err
    assert "on cpu, 8 ranks" in said and alone.count("Done. Validation loss") == said.count("Done. Validation loss") == 1
    wanted = run_losses(tmp_path / "alone")
    # float32: sums in another order
    assert len(wanted) == 6 and run_losses(tmp_path / "eight") == pytest.approx(wanted, rel=1e-4)
    code, said, err = ended(start(*TRAIN, *options, "--out", tmp_path / "eight", *axes))
    assert code == 2 and "--parallel.dp 2 --parallel.tp 2 --parallel.pp 2 is for 8 ranks, and this is one process" in err
