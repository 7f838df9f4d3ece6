"""The engine and the trainer on tensor-parallel ranks, with and without data-parallel ones, against one process."""

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
from minillm.model.huggingface import CheckpointError
from minillm.parallel.agreement import FirstRankError
from minillm.parallel.launch import launch
from minillm.parallel.mesh import build_mesh
from minillm.train.checkpoint import checkpoints
from minillm.train.loss import next_token_loss
from minillm.train.metrics import read_metrics
from runs import PLAN, TINY, run_losses, small_data, trainer
from steps import like_one_process, resumed, share, trained

MODEL = replace(TINY, layers=2, heads=4, kv_heads=2)  # on four ranks, two hold the same KV head
BASE = replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1)
PLANS = {"plain": BASE, "accumulated": replace(BASE, microbatch_size=2, optimizer="by_hand"),
         "z-loss": replace(BASE, z_loss=1e-2, clip_norm=0.0)}
NARROW = {"bf16": replace(BASE, precision="bf16"), "fp16 + masters": replace(BASE, precision="fp16", master_weights=True)}
LAYOUTS = {2: [dict(dp=2), dict(tp=2), dict(tp=2, sequence_parallel=True)],
           4: [dict(dp=2, tp=2), dict(tp=4), dict(dp=2, tp=2, sequence_parallel=True)]}
CASES = [(ranks, number, name) for ranks in LAYOUTS for number in range(3) for name in PLANS]


def overflow_on_one_rank(me, parallel):
    """Step 2 has an infinite gradient on the last rank only."""
    engine = Engine(MODEL, NARROW["fp16 + masters"], parallel)
    found = []
    for step in range(3):
        engine.forward_backward(share(engine, step))
        if step == 1 and me.rank == me.size - 1:
            next(iter(engine.weights.values())).grad[0, 0] = float("inf")
        found.append((engine.step(), engine.scaler.scale))
    return found


def everything(me, layouts, dense):
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout, bucket_mb=0.01)
        found.append({"runs": {name: trained(MODEL, plan, parallel) for name, plan in PLANS.items()},
                      "narrow": {name: trained(MODEL, plan, parallel, wide=False) for name, plan in NARROW.items()},
                      "overflow": overflow_on_one_rank(me, parallel), "resumed": resumed(MODEL, BASE, dense, parallel)})
    return found


@pytest.fixture(scope="module")
def dense():
    return {name: trained(MODEL, plan) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def results(dense):
    return {ranks: launch(everything, ranks, layouts, dense["plain"], backend="gloo") for ranks, layouts in LAYOUTS.items()}


@pytest.mark.parametrize(("ranks", "number", "name"), CASES)
def test_ten_steps_are_those_of_one_process(results, dense, ranks, number, name):
    for rank in results[ranks]:
        like_one_process(rank[number]["runs"][name], dense[name])


def test_a_rank_holds_its_part(results, dense):
    whole = dense["plain"]["held"]
    for ranks, layouts in LAYOUTS.items():
        for number, layout in enumerate(layouts):
            tp = layout.get("tp", 1)
            held = [rank[number]["runs"]["plain"]["held"] for rank in results[ranks]]
            assert all(size == whole if tp == 1 else whole / tp <= size < 1.2 * whole / tp for size in held)


def test_in_16_bits_it_stays_close_to_one_process(results):
    for name, plan in NARROW.items():
        wanted = trained(MODEL, plan, wide=False)
        for rank in [rank for ranks in results.values() for rank in ranks]:
            for ours in rank:
                # products of 8 or 11 bits, and partial sums rounded to as many; ten steps of Adam, a mean of 200 tokens
                assert ours["narrow"][name]["losses"] == pytest.approx(wanted["losses"], rel=3e-3)
                assert ours["narrow"][name]["weights"]["embed.weight"].dtype == torch.float32


def test_all_ranks_skip_the_same_steps(results):
    for rank in [rank for ranks in results.values() for rank in ranks]:
        for ours in rank:
            assert ours["overflow"] == [(True, 65_536), (False, 32_768), (True, 32_768)]


def test_a_state_goes_on_in_every_layout(results, dense):
    wanted = resumed(MODEL, BASE, dense["plain"])
    assert wanted[0] == 10
    for rank in [rank for ranks in results.values() for rank in ranks]:
        for ours in rank:
            # float64; the loss that is returned is added up in float32
            assert ours["resumed"][0] == 10 and ours["resumed"][1] == pytest.approx(wanted[1], rel=1e-6)
            assert resumed(MODEL, BASE, ours["runs"]["plain"])[1] == pytest.approx(wanted[1], rel=1e-6)


FOUR = ParallelConfig(dp=2, tp=2)


def jobs(me, folder, runs):
    """A whole run; one that goes on from the checkpoint of one process; and one whose disk is full."""
    data, looked = open_prepared(folder), []
    job = trainer(data, runs / "four", model=MODEL, parallel=FOUR)
    job.at = {3: lambda model: looked.append(model(torch.zeros(1, 4, dtype=torch.long)).shape) or {"sample": "text"}}
    finished = job.train()
    again = trainer(data, runs / "went on", model=MODEL, parallel=FOUR).train(resume=runs / "went on" / "step-000004")
    job = trainer(data, runs / "full", model=MODEL, parallel=FOUR)
    job._write = lambda *_: (_ for _ in ()).throw(CheckpointError("the disk is full"))
    try:
        job.save()
    except (CheckpointError, FirstRankError) as error:
        return finished, again, looked, type(error).__name__, "the disk is full" in str(error)


def test_checkpoints_are_dense_and_a_run_goes_on_in_another_layout(tmp_path):
    data = small_data(tmp_path / "data")
    trainer(data, tmp_path / "alone", model=MODEL).train()
    shutil.copytree(tmp_path / "alone", tmp_path / "went on")
    found = launch(jobs, 4, data.folder, tmp_path, backend="gloo")
    assert found == [(True, True, [torch.Size([1, 4, 300])], "CheckpointError", True),
                     *[(True, True, [], "FirstRankError", True)] * 3]
    shutil.copytree(tmp_path / "four", tmp_path / "back")
    assert trainer(data, tmp_path / "back", model=MODEL).train(resume=tmp_path / "back" / "step-000004")
    wanted = run_losses(tmp_path / "alone")
    assert list(wanted) == [1, 2, 3, 4, 5, 6]
    for run in ("four", "went on", "back"):
        # float32: sums in another order; a few steps of Adam, whose first ones amplify what is close to 0
        assert run_losses(tmp_path / run) == pytest.approx(wanted, rel=1e-4)
        assert [folder.name for folder in checkpoints(tmp_path / run)] == ["step-000004", "step-000006"]
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(tmp_path / name / "step-000006" / file) for name in (run, "alone"))
            assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def on_another_mesh(me):
    try:
        Engine(MODEL, BASE, ParallelConfig(dp=2), mesh=build_mesh(dp=1, tp=2))
    except ValueError as error:
        return str(error)


def test_layouts_that_do_not_fit():
    two = ParallelConfig(tp=2)
    for model, plan, parallel, words in (
            (MODEL, BASE, ParallelConfig(tp=3), "4 query heads that share 2 KV heads cannot be shared out evenly to 3 ranks"),
            (replace(MODEL, experts=4), BASE, two, "tp = 2 with 4 experts"),
            (replace(MODEL, qk_norm="full"), BASE, two, "tp = 2 with qk_norm"),
            (MODEL, replace(BASE, optimizer="muon"), two, "tp = 2 with optimizer = 'muon': it looks at whole matrices"),
            (MODEL, replace(BASE, optimizer="adafactor"), two, "tp = 2 with optimizer = 'adafactor'"),
            (MODEL, replace(BASE, precision="fp8"), two, "tp = 2 with precision = 'fp8'"),
            (MODEL, replace(BASE, compile=True), two, "tp = 2 with compile"),
            (replace(MODEL, context=33), BASE, ParallelConfig(tp=2, sequence_parallel=True), "a context of 33 tokens"),
            (MODEL, BASE, FOUR, r"a layout of 4 ranks \(dp = 2, tp = 2\) does not fit a world of 1")):
        with pytest.raises(ValueError, match=words):
            Engine(model, plan, parallel)
    with pytest.raises(ValueError, match="tp = 2 with a loss of its own: the logits are split by token"):
        Engine(MODEL, BASE, two, loss=lambda logits, b: next_token_loss(logits, b))
    assert check_layout(MODEL, BASE, FOUR) is None
    for found in launch(on_another_mesh, 2, backend="gloo"):
        assert found == "the mesh has the axes dp, tp of (1, 2) ranks, and the layout tp = 1: they must agree."


@pytest.mark.slow
def test_torchrun_does_what_one_process_does(tmp_path):
    code, alone, err = ended(start(*TRAIN, "--out", tmp_path / "alone"))
    assert code == 0, err
    code, said, err = ended(start(*TRAIN, "--out", tmp_path / "four", "--parallel.dp", "2", "--parallel.tp", "2", ranks=4))
    assert code == 0, err
    assert "on cpu, 4 ranks" in said and alone.count("Done. Validation loss") == said.count("Done. Validation loss") == 1
    wanted = run_losses(tmp_path / "alone")
    # float32: sums in another order
    assert len(wanted) == 6 and run_losses(tmp_path / "four") == pytest.approx(wanted, rel=1e-4)
    samples = [[r["sample"] for r in read_metrics(tmp_path / run / "metrics.jsonl") if "sample" in r]
               for run in ("alone", "four")]
    assert len(samples[0]) == len(samples[1]) > 0 and all(samples[1])
    code, said, err = ended(start(*TRAIN, "--out", tmp_path / "four", "--parallel.dp", "2", "--parallel.tp", "2"))
    assert code == 2 and "--parallel.dp 2 --parallel.tp 2 is for 4 ranks, and this is one process" in err
