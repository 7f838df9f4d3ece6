"""torch's engine against ours in one process, on 2 and 4 ranks and through the trainer. One launch per number of ranks."""

import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from commands import TRAIN, ended, start
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from runs import PLAN, TINY, run_losses, small_data, trainer
from safetensors.torch import load_file
from steps import like_one_process, resumed, share, trained
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from minillm.config import ParallelConfig
from minillm.data.prepare import open_prepared
from minillm.engine import Engine
from minillm.model import families
from minillm.parallel.launch import launch
from minillm.plan.network import tensor_parallel_all_reduces
from minillm.torch_engine import TorchEngine, build_engine

# 301 tokens and 42 hidden units divide by none of 2 and 4 ranks evenly (42 by 2).
SMALL = dict(vocab_size=301, layers=2, width=16, heads=4, ffn_width=42, context=32)
GPT2, LLAMA = replace(families.gpt2, **SMALL), replace(families.llama, **SMALL, kv_heads=2)
NORMED = replace(families.gemma3, **SMALL | dict(kv_heads=2), head_dim=6, window=3)  # norms over heads; norms before and behind
BASE = replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1)
PARTS = replace(BASE, microbatch_size=2, z_loss=1e-2)
CASES = {2: [(dict(dp=2), GPT2, BASE), (dict(dp=2), LLAMA, PARTS), (dict(tp=2), GPT2, PARTS), (dict(tp=2), LLAMA, BASE),
             (dict(tp=2, sequence_parallel=True), GPT2, BASE), (dict(tp=2, sequence_parallel=True), NORMED, PARTS)],
         4: [(dict(dp=2, tp=2), GPT2, PARTS), (dict(dp=2, tp=2), LLAMA, BASE)]}
SLOW = [(dict(dp=2, tp=2, sequence_parallel=True), LLAMA, PARTS), (dict(tp=4), GPT2, BASE), (dict(dp=4), NORMED, PARTS)]
NUMBERED = [(ranks, number) for ranks, cases in CASES.items() for number in range(len(cases))]


def layout(degrees):
    return ParallelConfig(**degrees, bucket_mb=0.01, engine="torch")


def overflow_on_one_rank(me, parallel):
    """Step 2 has an infinite gradient on the last rank only."""
    engine, found = build_engine(LLAMA, replace(BASE, precision="fp16"), parallel), []
    for step in range(3):
        engine.forward_backward(share(engine, step))
        if step == 1 and me.rank == me.size - 1:
            next(iter(engine.weights.values())).grad[0, 0] = float("inf")
        found.append((engine.step(), engine.scaler.scale))
    return found


def all_trained(me, cases):
    return [trained(model, plan, layout(degrees)) for degrees, model, plan in cases]


def all_reduces(engine):
    """How many DTensor and the loss make in one forward and backward, and whether anything else is sent."""
    with warnings.catch_warnings(action="ignore"), CommDebugMode() as calls:  # its hooks find modules without gradients
        engine.forward_backward(share(engine, 0))
    counts = {str(name): count for name, count in calls.get_comm_counts().items()}
    return counts.pop("c10d_functional.all_reduce"), counts


def everything(me, cases, dense):
    found = {"runs": all_trained(me, cases)}
    if me.size == 4:
        return found | {"resumed": [resumed(LLAMA, BASE, dense, layout(dict(dp=2, tp=2)))]}
    dp, tp = layout(dict(dp=2)), layout(dict(tp=2))
    return found | {"calls": [all_reduces(build_engine(model, BASE, tp)) for model in (GPT2, LLAMA)],
                    "resumed": [resumed(LLAMA, BASE, dense, parallel) for parallel in (dp, tp)],
                    "overflow": [overflow_on_one_rank(me, parallel) for parallel in (dp, tp)],
                    "narrow": {name: trained(LLAMA, replace(BASE, precision=name), parallel, wide=False)["losses"]
                               for name, parallel in (("fp16", dp), ("bf16", tp))}}


@pytest.fixture(scope="module")
def dense():
    return trained(LLAMA, BASE)


@pytest.fixture(scope="module")
def results(dense):
    return {ranks: launch(everything, ranks, cases, dense, backend="gloo") for ranks, cases in CASES.items()}


@pytest.mark.parametrize(("ranks", "number"), NUMBERED)
def test_ten_steps_are_those_of_our_engine_in_one_process(results, ranks, number):
    _, model, plan = CASES[ranks][number]
    wanted = trained(model, plan)
    for rank in results[ranks]:
        like_one_process(rank["runs"][number], wanted)


def test_a_rank_holds_its_part(results):
    for ranks, number in NUMBERED:
        degrees, model, _ = CASES[ranks][number]
        whole, tp = sum(p.numel() for p in Engine(model, BASE).weights.values()), degrees.get("tp", 1)
        held = [rank["runs"][number]["held"] for rank in results[ranks]]
        # norms, learned positions and biases behind rows are whole on each rank; the last rank's chunks may be smaller
        assert max(held) == whole if tp == 1 else max(held) < 1.2 * whole / tp and sum(held) > whole


def test_dtensor_makes_the_all_reduces_that_are_foreseen_for_ours(results):
    """Two a block forward, two backward, one for the embedding, one for the head, three for the loss."""
    for rank in results[2]:
        assert rank["calls"] == [(len(tensor_parallel_all_reduces(model, tokens=8 * 32)), {}) for model in (GPT2, LLAMA)]


def test_16_bits_and_skipped_steps(results):
    for rank in results[2]:
        for name, ours in rank["narrow"].items():
            # products of 8 or 11 bits, and partial sums rounded to as many; ten steps of Adam, a mean of 200 tokens
            assert ours == pytest.approx(trained(LLAMA, replace(BASE, precision=name), wide=False)["losses"], rel=3e-3)
        assert rank["overflow"] == [[(True, 65_536), (False, 32_768), (True, 32_768)]] * 2


def test_a_state_goes_on_in_the_other_engine(results, dense):
    wanted = resumed(LLAMA, BASE, dense)
    for ranks, number in ((2, 3), (4, 1)):
        for rank in results[ranks]:
            # float64; the loss that is returned is added up in float32
            assert all(found == (10, pytest.approx(wanted[1], rel=1e-6)) for found in rank["resumed"])
        assert resumed(LLAMA, BASE, results[ranks][0]["runs"][number])[1] == pytest.approx(wanted[1], rel=1e-6)


MODEL = replace(TINY, layers=2, heads=4, kv_heads=2)
FOUR = ParallelConfig(dp=2, tp=2, engine="torch")


def jobs(me, folder, runs):
    """A whole run; one that goes on from our checkpoint; one that a signal to the last rank stops."""
    data = open_prepared(folder)
    job = trainer(data, runs / "torch", model=MODEL, parallel=FOUR)
    kinds = type(job.engine) is TorchEngine, isinstance(job.engine.replicas, DistributedDataParallel)
    finished = job.train()
    again = trainer(data, runs / "went on", model=MODEL, parallel=FOUR).train(resume=runs / "went on" / "step-000004")
    job = trainer(data, runs / "cut", model=MODEL, parallel=FOUR)
    step = job.engine.step

    def interrupted():
        if me.rank == me.size - 1 and job.engine.steps_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()
    job.engine.step = interrupted
    return kinds, finished, again, job.train(), job.engine.steps_done


def test_a_run_changes_engines_at_a_checkpoint(tmp_path):
    data = small_data(tmp_path / "data")
    trainer(data, tmp_path / "alone", model=MODEL).train()
    shutil.copytree(tmp_path / "alone", tmp_path / "went on")
    assert launch(jobs, 4, data.folder, tmp_path, backend="gloo") == [((True, True), True, True, False, 3)] * 4
    for name, begun in (("torch", "step-000004"), ("cut", "step-000003")):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}, then ours")
        assert trainer(data, tmp_path / f"{name}, then ours", model=MODEL).train(resume=tmp_path / f"{name}, then ours" / begun)
    wanted = run_losses(tmp_path / "alone")
    for run in ("torch", "went on", "torch, then ours", "cut, then ours"):
        # float32: sums in another order; a few steps of Adam, whose first ones amplify what is close to 0
        assert run_losses(tmp_path / run) == pytest.approx(wanted, rel=1e-4) and len(wanted) == 6
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(tmp_path / name / "step-000006" / file) for name in (run, "alone"))
            assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_alone_it_is_our_engine():
    found = trained(GPT2, BASE, ParallelConfig(engine="torch"))
    like_one_process(found, trained(GPT2, BASE))


def test_what_torch_cannot_do_is_refused():
    two = ParallelConfig(tp=2, engine="torch")
    for model, plan, parallel, words in (
            (replace(LLAMA, kv_heads=1), BASE, two, "tp = 2 and 1 KV heads: .* Use a tp that divides 1, or --parallel.engine ours"),
            (LLAMA, replace(BASE, precision="bf16", master_weights=True), ParallelConfig(dp=2, engine="torch"), "master_weights: DDP sums"),
            (LLAMA, BASE, ParallelConfig(dp=2, pp=2, engine="torch"), "engine = 'torch' with pp = 2: it has the axes dp and tp"),
            (replace(LLAMA, experts=4), BASE, two, "tp = 2 with 4 experts"),
            (LLAMA, BASE, two, r"a layout of 2 ranks \(tp = 2\) does not fit a world of 1")):
        with pytest.raises(ValueError, match=words):
            build_engine(model, plan, parallel)
    with pytest.raises(ValueError, match="engine = 'torch', and this is the engine 'ours': use build_engine"):
        Engine(GPT2, BASE, ParallelConfig(engine="torch"))


@pytest.mark.slow
def test_ten_steps_on_four_ranks_in_other_layouts():
    for rank in launch(all_trained, 4, SLOW, backend="gloo"):
        for ours, (_, model, plan) in zip(rank, SLOW, strict=True):
            like_one_process(ours, trained(model, plan))


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [dict(tp=2), dict(tp=2, sequence_parallel=True)], ids=["tp", "sequence parallel"])
def test_every_family_that_torch_can_split(degrees, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).with_name("parallel"))
    from split_families import CONFIGS
    cases = [(degrees, replace(config, vocab_size=301, context=32), BASE) for config in CONFIGS.values() if config.kv_size % 2 == 0]
    assert len(cases) >= 20
    wanted = [trained(model, plan) for _, model, plan in cases]
    for rank in launch(all_trained, 2, cases, backend="gloo"):
        for ours, alone in zip(rank, wanted, strict=True):
            like_one_process(ours, alone)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--engine", "torch", "--parallel.tp", "2"],
                                   ["--parallel.engine", "torch", "--parallel.dp", "2", "--train.compile"],
                                   ["--engine", "torch", "--parallel.dp", "2", "--parallel.zero", "3"]])
def test_under_torchrun(tmp_path, words):
    code, _, err = ended(start(*TRAIN, "--out", tmp_path / "alone"))
    assert code == 0, err
    code, said, err = ended(start(*TRAIN, "--out", tmp_path / "two", *words, ranks=2))
    assert code == 0 and "on cpu, 2 ranks" in said, err
    # float32: sums in another order, and compiled operations round elsewhere
    assert run_losses(tmp_path / "two") == pytest.approx(run_losses(tmp_path / "alone"), rel=1e-4)
    assert '"engine": "torch"' in (tmp_path / "two" / "step-000006" / "trainer.json").read_text()
