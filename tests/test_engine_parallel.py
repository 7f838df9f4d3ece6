"""The engine on 1, 2 and 4 ranks against the engine of one process. One launch per number of ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import functions_travel_by_value  # noqa: F401  a fixture

from minillm.config import ParallelConfig
from minillm.data.loader import IGNORED, Batch
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.parallel.data_parallel import Event, differing, trace_backward
from minillm.parallel.launch import launch
from minillm.parallel.live import Ranks
from minillm.parallel.mesh import build_mesh
from minillm.parallel.rank_error import RankError
from runs import PLAN, TINY

MODEL = replace(TINY, layers=2)
BASE = replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1)
PLANS = {"plain": BASE, "accumulated": replace(BASE, microbatch_size=1), "z-loss": replace(BASE, z_loss=1e-2, clip_norm=0.0),
         "muon": replace(BASE, optimizer="muon")}
NARROW = {"bf16": replace(BASE, precision="bf16", microbatch_size=2), "fp16": replace(BASE, precision="fp16"),
          "bf16 + masters": replace(BASE, precision="bf16", master_weights=True, microbatch_size=2),
          "fp16 + masters": replace(BASE, precision="fp16", master_weights=True)}


def batch(step, rows=8):
    """The first rows have few targets, so that the ranks' counts differ."""
    ids = torch.randint(0, 300, (rows, 33), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    targets[0, :30] = targets[1, 4:] = IGNORED
    return Batch(ids[:, :-1].clone(), targets)


def take_step(engine, step):
    """(loss, gradient norm), and the gradients before they are clipped."""
    loss = float(engine.forward_backward(batch(step).part(engine.rank, engine.ranks)))
    gradients = {name: weight.grad.clone() for name, weight in engine.weights.items()}
    norm = float(engine.clip(engine.config.clip_norm))
    engine.step()
    return loss, norm, gradients


def trained(plan, parallel=ParallelConfig(), wide=True, steps=10):
    """Everything that can be seen of some steps. wide: in float64."""
    engine = Engine(Transformer(MODEL, seed=3).double() if wide else MODEL, plan, parallel)
    found = [take_step(engine, step) for step in range(steps)]
    losses, norms, gradients = zip(*found, strict=True)
    return {"losses": losses, "norms": norms, "gradients": gradients[0], "last": gradients[-1],
            "weights": {name: weight.detach().clone() for name, weight in engine.weights.items()},
            "evaluation": [engine.evaluate(batch(100, rows).part(engine.rank, engine.ranks)) for rows in (2, 8)],
            "state": engine.state_dict(), "model": engine.model.state_dict()}


def same(ours, theirs):
    # the loss that is returned is added up in float32, all else in float64: only the order of summation differs
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-9)
    assert ours["evaluation"] == pytest.approx(theirs["evaluation"], rel=1e-9)
    for part in ("gradients", "last", "weights"):
        assert ours[part].keys() == theirs[part].keys() and len(ours[part]) > 5
        for name, expected in theirs[part].items():
            torch.testing.assert_close(ours[part][name], expected, rtol=1e-7, atol=1e-10)


@pytest.fixture(scope="module")
def dense():
    return {name: trained(plan) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def dense_narrow():
    return {name: trained(plan, wide=False) for name, plan in NARROW.items()}


def on_top(engine):
    """Two batches without a step in between."""
    for step in (0, 1):
        engine.forward_backward(batch(step).part(engine.rank, engine.ranks))
    return {name: weight.grad.clone() for name, weight in engine.weights.items()}


def overflow_on_one_rank(me):
    """Steps 2 and 3 have an infinite gradient on the last rank only; then one that is found where the others saw none."""
    engine = Engine(MODEL, NARROW["fp16"], ParallelConfig(dp=me.size))
    right, found = engine.loss, []
    engine.loss = lambda logits, b: right(logits, b) * (float("inf") if engine.steps_done in (1, 2) and me.rank == me.size - 1 else 1.0)
    for step in range(5):
        engine.forward_backward(batch(step).part(engine.rank, engine.ranks))
        if step == 4 and me.rank == 0:
            engine.weights["embed.weight"].grad[0, 0] = float("nan")
        found.append((engine.step(), engine.scaler.scale))
    return found, differing(engine.weights, me.group)


def broken_seeds(me):
    """Ranks that built different models all train the first one's."""
    engine = Engine(Transformer(MODEL, seed=me.rank), BASE, ParallelConfig(dp=me.size))
    return differing(dict(engine.model.named_parameters()), me.group) or torch.equal(engine.model.embed.weight, Transformer(MODEL, seed=0).embed.weight)


def traced(me):
    engine = Engine(MODEL, BASE, ParallelConfig(dp=me.size, bucket_mb=0.02))
    trace = engine.replicas.trace = []
    trace_backward({f"block {n}": block for n, block in enumerate(engine.model.blocks)}, trace)
    engine.forward_backward(batch(0).part(engine.rank, engine.ranks))
    return sorted((event.kind, event.name) for event in trace if isinstance(event, Event))


def everything(me):
    parallel = ParallelConfig(dp=me.size, bucket_mb=0.01)
    found = {name: trained(plan, parallel) for name, plan in PLANS.items()}
    unlike = [name for plan in (BASE, NARROW["fp16 + masters"])
              for name in differing(Engine(MODEL, plan, parallel).weights, me.group)]
    given = Engine(Transformer(MODEL, seed=3).double(), BASE, parallel, mesh=build_mesh(parallel))
    return {"runs": found, "unlike": unlike, "on top": on_top(given), "overflow": overflow_on_one_rank(me),
            "narrow": {name: trained(plan, parallel, wide=False) for name, plan in NARROW.items()},
            "seeds": broken_seeds(me), "trace": traced(me)}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return launch(everything, request.param, backend="gloo")


@pytest.mark.parametrize("name", PLANS)
def test_ten_steps_are_those_of_one_process(ranks, dense, name):
    for rank in ranks:
        same(rank["runs"][name], dense[name])


@pytest.mark.parametrize("name", NARROW)
def test_every_precision_stays_close_to_one_process(ranks, dense_narrow, name):
    wanted = dense_narrow[name]
    for rank in ranks:
        ours = rank["narrow"][name]
        # products of 8 (bf16) or 11 (fp16) bits, summed over other rows; ten steps of Adam, the loss a mean of 200 tokens
        assert ours["losses"] == pytest.approx(wanted["losses"], rel=2e-3)
        assert ours["weights"]["embed.weight"].dtype == torch.float32
        assert all(torch.equal(weight, ranks[0]["narrow"][name]["weights"][n]) for n, weight in ours["weights"].items())


def test_state_is_the_same_on_all_ranks_and_goes_on_in_one_process(ranks, dense):
    for name, plan in PLANS.items():
        states = [rank["runs"][name]["state"] | rank["runs"][name]["model"] for rank in ranks]
        assert all(state.keys() == states[0].keys() and len(state) > 10 for state in states)
        assert all(torch.equal(value, states[0][key]) for state in states for key, value in state.items())
        alone, again = (Engine(Transformer(MODEL, seed=3).double(), plan) for _ in range(2))
        for engine, source in ((alone, ranks[-1]["runs"][name]), (again, dense[name])):
            engine.model.load_state_dict(source["model"])
            engine.load_state_dict(source["state"])
            assert engine.steps_done == 10
        # float64; what the ranks' order of summation left in ten steps
        assert take_step(alone, 11)[0] == pytest.approx(take_step(again, 11)[0], rel=1e-6)


def test_gradients_add_up_without_a_step(ranks):
    wanted = on_top(Engine(Transformer(MODEL, seed=3).double(), BASE))
    for rank in ranks:
        for name, gradient in wanted.items():
            # float64: the order of summation
            torch.testing.assert_close(rank["on top"][name], gradient, rtol=1e-9, atol=1e-12)


def test_all_ranks_skip_the_same_steps(ranks):
    for rank in ranks:
        assert rank["overflow"] == ([(True, 65_536), (False, 32_768), (False, 16_384), (True, 16_384), (False, 8_192)], [])


def test_the_same_seed_gives_the_same_model_and_another_seed_is_overruled(ranks):
    assert all(rank["unlike"] == [] and rank["seeds"] is True for rank in ranks)


def test_a_step_can_be_traced(ranks):
    """Two blocks of about 12,800 bytes, and a table of 19,200: three buckets of at most 0.02 MiB."""
    wanted = [("backward", "block 0"), ("backward", "block 1"), ("bucket", "0"), ("bucket", "1"), ("bucket", "2")]
    assert all(rank["trace"] == wanted for rank in ranks)


def test_one_rank_has_no_hooks_and_no_group(dense):
    def alone(me):
        engine = Engine(MODEL, BASE, ParallelConfig(dp=1))
        assert engine.group is None and engine.replicas is None and not engine.any_rank(False)
        return trained(BASE, ParallelConfig(dp=1)), dist.get_world_size()
    ((found, size),) = launch(alone, 1, backend="gloo")
    assert size == 1
    assert found["losses"] == dense["plain"]["losses"]
    assert all(torch.equal(weight, dense["plain"]["weights"][name]) for name, weight in found["weights"].items())


def test_layouts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"2 ranks \(dp = 2\) does not fit a world of 1: start as many with torchrun"):
        Engine(MODEL, BASE, ParallelConfig(dp=2))
    with pytest.raises(ValueError, match="batch of 8 sequences does not divide over dp = 3 ranks. Nearest that work: a batch of 6 or 9, or dp = 2 or 4"):
        Engine(MODEL, BASE, ParallelConfig(dp=3))
    with Ranks(2, backend="gloo") as live, pytest.raises(RankError, match="dp = 4. does not fit a world of 2"):
        live.run(lambda me: Engine(MODEL, BASE, ParallelConfig(dp=4)) and None)
