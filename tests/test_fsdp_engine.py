"""torch's FSDP2 as an engine against one process and our ZeRO-3, on 2 and 4 ranks and through the trainer."""

import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from runs import PLAN, TINY, run_losses, small_data, trainer
from safetensors.torch import load_file
from steps import batch, dense_of, like_one_process, resumed, share, trained
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from minillm.config import ParallelConfig
from minillm.data.prepare import open_prepared
from minillm.engine import Engine
from minillm.fsdp_engine import FsdpEngine
from minillm.model import families
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.torch_engine import build_engine

# 301 tokens and 42 hidden units divide by none of 2 and 4 ranks evenly (42 by 2); GPT-2's head is its embedding.
SMALL = dict(vocab_size=301, layers=2, width=16, heads=4, ffn_width=42, context=32)
GPT2, LLAMA = replace(families.gpt2, **SMALL), replace(families.llama, **SMALL, kv_heads=2)
BASE = replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1)
PARTS = replace(BASE, microbatch_size=1, z_loss=1e-2)
CASES = {2: [(3, LLAMA, BASE), (3, GPT2, PARTS), (2, LLAMA, PARTS)], 4: [(3, LLAMA, BASE), (3, GPT2, PARTS)]}
NARROW = {"bf16": replace(BASE, precision="bf16"), "bf16 + masters": replace(BASE, precision="bf16", master_weights=True),
          "fp16 + masters": replace(BASE, precision="fp16", master_weights=True)}


MASTERS = "bf16 + masters"


def layout(ranks, zero=3, engine="torch"):
    return ParallelConfig(dp=ranks, zero=zero, engine=engine, bucket_mb=0.01)


def twice(parallel=ParallelConfig()):
    """Two batches before one step."""
    engine = build_engine(Transformer(LLAMA, seed=3).double(), BASE, parallel)
    for step in range(2):
        engine.forward_backward(share(engine, step))
    return dense_of(engine, {name: weight.grad for name, weight in engine.weights.items()})


def overflow_on_one_rank(me, parallel):
    """Step 2 has an infinite gradient on the last rank only."""
    engine, found = build_engine(LLAMA, replace(BASE, precision="fp16", master_weights=True), parallel), []
    for step in range(3):
        engine.forward_backward(share(engine, step))
        if step == 1 and me.rank == me.size - 1:
            next(iter(engine.weights.values())).grad.to_local()[0, 0] = float("inf")
        found.append((engine.step(), engine.scaler.scale))
    return found


def whole(engine):
    """Elements of the weights that are whole on this rank now."""
    return sum(p.numel() for p in engine.model.parameters() if not isinstance(p, DTensor))


def counted(action):
    """Messages of each kind that an action sends."""
    with warnings.catch_warnings(action="ignore"), CommDebugMode() as calls:  # its hooks find modules without gradients
        action()
    return {str(name).split(".")[-1].strip("_"): count for name, count in calls.get_comm_counts().items()}


def seen(me, zero):
    """What a rank holds and sends: its part; what is whole at the head, after a step and an evaluation; messages."""
    engine, at_head = build_engine(Transformer(LLAMA, seed=3), BASE, layout(me.size, zero)), []
    engine.model.head.register_forward_hook(lambda *_: at_head.append(whole(engine)))
    sent = counted(lambda: engine.forward_backward(share(engine, 0)))
    held, after = sum(weight.to_local().numel() for weight in engine.weights.values()), [whole(engine)]
    clipped = counted(lambda: engine.clip(1.0))
    engine.evaluate(batch(1).part(me.rank, me.size))
    after.append(whole(engine))
    engine.load_weights(Transformer(LLAMA, seed=4).state_dict())
    return {"held": held, "at head": at_head[0], "after": after, "sent": sent, "clipped": clipped,
            "kind": type(engine), "loaded": engine.evaluate(batch(1).part(me.rank, me.size))}


def everything(me, dense, narrow):
    found = {"runs": [trained(model, plan, layout(me.size, zero)) for zero, model, plan in CASES[me.size]],
             "ours": trained(LLAMA, BASE, layout(me.size, engine="ours")), "resumed": resumed(LLAMA, BASE, dense, layout(me.size))}
    if me.size == 2:
        found |= {"twice": twice(layout(2)), "overflow": overflow_on_one_rank(me, layout(2)), "seen": {zero: seen(me, zero) for zero in (2, 3)},
                  "narrow": {name: trained(LLAMA, plan, layout(2), wide=False) for name, plan in NARROW.items()},
                  "narrow resumed": resumed(LLAMA, NARROW[MASTERS], narrow, layout(2), wide=False)}
    return found


@pytest.fixture(scope="module")
def dense():
    return trained(LLAMA, BASE)


@pytest.fixture(scope="module")
def narrow():
    return trained(LLAMA, NARROW[MASTERS], wide=False)


@pytest.fixture(scope="module")
def results(dense, narrow):
    return {ranks: launch(everything, ranks, dense, narrow, backend="gloo", timeout=100) for ranks in CASES}


@pytest.mark.parametrize(("ranks", "number"), [(ranks, number) for ranks, cases in CASES.items() for number in range(len(cases))])
def test_ten_steps_are_those_of_one_process(results, ranks, number):
    _, model, plan = CASES[ranks][number]
    wanted = trained(model, plan)
    for rank in results[ranks]:
        like_one_process(rank["runs"][number], wanted)


def test_ten_steps_are_those_of_our_zero_3(results):
    for ranks in CASES:
        for rank in results[ranks]:
            like_one_process(rank["runs"][0], rank["ours"])


def test_what_a_rank_holds_and_sends(results):
    model = Transformer(LLAMA)
    whole_model, blocks = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks))
    wanted = float(Engine(Transformer(LLAMA, seed=4), BASE).evaluate(batch(1)))
    for number, rank in enumerate(results[2]):
        for zero, found in rank["seen"].items():
            assert found["kind"] is FsdpEngine and found["after"] == [0, 0]
            assert found["held"] == sum(p.chunk(2)[number].numel() for p in model.parameters())
            assert found["at head"] == whole_model - (blocks if zero == 3 else 0)
            # a gather for each block and the rest, with 3 another for each block in backward; the targets' count and the loss
            assert found["sent"] == {"allgather_base": 3 + 2 * (zero == 3), "reduce_scatter_base": 3, "allreduce": 2}
            assert found["clipped"] == {"all_reduce": 1}
            assert found["loaded"] == pytest.approx(wanted, rel=1e-5)  # float32, a sum of 200 losses in another order


def test_what_two_batches_add_up_to(results):
    wanted = twice()
    for rank in results[2]:
        assert rank["twice"].keys() == wanted.keys()
        for name, expected in wanted.items():
            torch.testing.assert_close(rank["twice"][name], expected, rtol=1e-9, atol=1e-12)  # float64


def test_a_state_goes_on_in_the_other_engines(results, dense):
    wanted = resumed(LLAMA, BASE, dense)
    for ranks in CASES:
        for rank in results[ranks]:
            # float64; the loss that is returned is added up in float32
            assert rank["resumed"] == (10, pytest.approx(wanted[1], rel=1e-6))
            assert resumed(LLAMA, BASE, rank["runs"][0])[1] == pytest.approx(wanted[1], rel=1e-6)


def test_16_bits_and_skipped_steps(results, narrow):
    for name, plan in NARROW.items():
        wanted = trained(LLAMA, plan, wide=False)
        for ours in (rank["narrow"][name] for rank in results[2]):
            # products of 8 or 11 bits, added up in another order; ten steps of Adam, a mean of 200 tokens
            assert ours["losses"] == pytest.approx(wanted["losses"], rel=5e-3)
            assert ours["state"].keys() == wanted["state"].keys() and ours["weights"]["embed.weight"].dtype == torch.float32
            assert ours["model"]["embed.weight"].dtype == wanted["model"]["embed.weight"].dtype
    # as above
    goes_on = 10, pytest.approx(resumed(LLAMA, NARROW[MASTERS], narrow, wide=False)[1], rel=5e-3)
    assert [rank["narrow resumed"] for rank in results[2]] == [goes_on] * 2
    assert [rank["overflow"] for rank in results[2]] == [[(True, 65_536), (False, 32_768), (True, 32_768)]] * 2


MODEL = replace(TINY, layers=2, heads=4, kv_heads=2, tied=True)
CHANGES = dict(model=MODEL, microbatch_size=1)


def jobs(me, folder, runs):
    """A whole run, which is looked into; ours goes on from its checkpoint, and it from one process's; a signal to the last rank."""
    data, looked, torchs = open_prepared(folder), [], layout(2)
    job = trainer(data, runs / "torch", parallel=torchs, **CHANGES)
    job.at = {3: lambda model: looked.append(model(torch.zeros(1, 4, dtype=torch.long)).shape) or {"sample": "text"}}
    ended = [job.train()]
    job.engine.on_first(lambda: str(shutil.copytree(runs / "torch", runs / "then ours")))
    for run, parallel in (("then ours", layout(2, engine="ours")), ("went on", layout(2, zero=2))):
        ended.append(trainer(data, runs / run, parallel=parallel, **CHANGES).train(resume=runs / run / "step-000004"))
    job = trainer(data, runs / "cut", parallel=torchs, **CHANGES)
    step = job.engine.step

    def interrupted():
        if me.rank == me.size - 1 and job.engine.steps_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()
    job.engine.step = interrupted
    return looked, ended, job.train(), job.engine.steps_done


def test_a_run_changes_engines_at_a_checkpoint(tmp_path):
    data = small_data(tmp_path / "data")
    trainer(data, tmp_path / "alone", **CHANGES).train()
    shutil.copytree(tmp_path / "alone", tmp_path / "went on")
    found = launch(jobs, 2, data.folder, tmp_path, backend="gloo", timeout=100)
    assert found == [(looked, [True] * 3, False, 3) for looked in ([torch.Size([1, 4, 300])], [])]
    assert trainer(data, tmp_path / "cut", **CHANGES).train(resume=tmp_path / "cut" / "step-000003")
    wanted = run_losses(tmp_path / "alone")
    for run in ("torch", "then ours", "went on", "cut"):
        # float32: sums in another order; a few steps of Adam, whose first ones amplify what is close to 0
        assert run_losses(tmp_path / run) == pytest.approx(wanted, rel=1e-4) and len(wanted) == 6
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(tmp_path / name / "step-000006" / file) for name in (run, "alone"))
            assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_what_it_cannot_do_is_refused():
    for plan, parallel, words in (
            (BASE, dict(dp=2, zero=1), "zero = 1 with engine = 'torch': FSDP2 shares out the gradients, too. Use zero = 2"),
            (BASE, dict(dp=2, tp=2, zero=3), "zero = 3 with engine = 'torch' and tp = 2: .* Use --parallel.engine ours, or zero = 0"),
            (BASE, dict(dp=2, pp=2, zero=3), "zero = 3 with pp = 2"),
            (replace(BASE, compile=True), dict(dp=2, zero=2), "zero = 2 with compile: weights come and go"),
            (replace(BASE, precision="fp8"), dict(dp=2, zero=2), "zero = 2 with precision = 'fp8'"),
            (replace(BASE, optimizer="muon"), dict(dp=2, zero=3), "zero = 3 with optimizer = 'muon'")):
        with pytest.raises(ValueError, match=words):
            build_engine(LLAMA, plan, ParallelConfig(**parallel, engine="torch"))
    with pytest.raises(ValueError, match="engine = 'fsdp', and this is the engine 'ours': use build_engine"):
        Engine(LLAMA, BASE, ParallelConfig(dp=2, zero=3, engine="torch"))


def short_runs(me, models):
    return [trained(model, BASE, layout(me.size), steps=2) for model in models]


@pytest.mark.slow
def test_every_family(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).with_name("parallel"))
    from split_families import CONFIGS
    models = [replace(config, vocab_size=301, context=32) for config in CONFIGS.values()] + [replace(LLAMA, experts=4)]
    assert len(models) >= 30
    for rank in launch(short_runs, 2, models, backend="gloo", timeout=100):
        for ours, model in zip(rank, models, strict=True):
            like_one_process(ours, trained(model, BASE, steps=2))
