import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.config import ParallelConfig
from minillm.data.loader import IGNORED, Batch
from minillm.engine import Engine, choose_device
from minillm.model.huggingface import CheckpointError
from minillm.model.transformer import Transformer
from minillm.train.loss import cross_entropy
from minillm.train.schedule import learning_rate
from runs import PLAN, TINY


def batch(seed=0, rows=4):
    ids = torch.randint(0, 300, (rows, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone())


def gradients(engine):
    return {name: p.grad.clone() for name, p in engine.model.named_parameters()}


def test_microbatches_give_the_gradient_of_the_whole_batch():
    uneven = batch()
    uneven.targets[0, :30] = IGNORED  # a mean of means would weigh the two targets left in this row sixteen-fold
    whole, parts = (Engine(Transformer(TINY).double(), replace(PLAN, microbatch_size=size)) for size in (None, 1))
    # float64: the only difference left is the order of summation
    torch.testing.assert_close(parts.forward_backward(uneven), whole.forward_backward(uneven), rtol=1e-12, atol=1e-12)
    expected = gradients(whole)
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    logits = whole.model(uneven.ids)
    by_hand = cross_entropy(logits, uneven.targets) / (4 * 32 - 30)
    torch.testing.assert_close(whole.evaluate(uneven) / uneven.count, float(by_hand.detach()), rtol=1e-12, atol=1e-12)
    whole.model.zero_grad()
    # the loss that is returned is added up in float32, its gradient is not
    torch.testing.assert_close(whole.forward_backward(uneven), by_hand.detach().float(), rtol=1e-6, atol=0.0)
    by_hand.backward()  # on top of what is there: twice the same
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-10, atol=1e-12)


def losses(engine, steps=5):
    found = []
    for step in range(steps):
        found.append(float(engine.forward_backward(batch(step))))
        engine.clip(1.0)
        engine.step()
    return found


def test_the_optimizer_by_hand_trains_like_torchs():
    ours, fused = (losses(Engine(Transformer(TINY).double(), replace(PLAN, optimizer=kind, lr=1e-2)))
                   for kind in ("by_hand", "fused"))
    assert ours == pytest.approx(fused, rel=1e-9)  # float64, five steps of rounding
    assert ours[0] != pytest.approx(ours[-1], rel=1e-4)


def test_each_step_takes_the_schedules_rate():
    engine = Engine(TINY, PLAN)
    for step in range(4):
        assert engine.learning_rate == learning_rate(step, PLAN)
        engine.forward_backward(batch())
        engine.step()
        assert {group["lr"] for group in engine.optimizer.param_groups} == {learning_rate(step, PLAN)}
    assert engine.steps_done == 4 and all(p.grad is None for p in engine.model.parameters())


def test_clipping_scales_to_the_norm_and_zero_leaves_gradients_alone():
    engine = Engine(TINY, PLAN)
    engine.forward_backward(batch())
    before = gradients(engine)
    norm = engine.clip(0.0)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in before.values()]).norm()), rel=1e-5)
    assert all(torch.equal(g, before[n]) for n, g in gradients(engine).items())
    engine.clip(float(norm) / 10)
    for name, gradient in gradients(engine).items():
        torch.testing.assert_close(gradient, before[name] / 10, rtol=1e-4, atol=1e-9)  # clip adds 1e-6 to the norm


def test_bf16_stays_close_to_fp32():
    full, half = (losses(Engine(TINY, replace(PLAN, precision=p)))[-1] for p in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=5e-3) and half != full  # bfloat16 has 8 bits: 0.4% a number


COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from minillm.engine import Engine
from runs import PLAN, TINY
import test_engine
eager, compiled = (test_engine.losses(Engine(TINY, replace(PLAN, compile=c)), 2) for c in (False, True))
# float32, operations fused in another order
assert all(abs(a - b) < 1e-5 * abs(a) for a, b in zip(eager, compiled, strict=True)), (eager, compiled)
"""


@pytest.mark.slow
def test_compiled_gives_the_same_losses():
    """In a process of its own: the shape checks that this suite switches on cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED, Path(__file__).parent], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_state_goes_on_bit_for_bit():
    first = Engine(TINY, PLAN)
    losses(first, 3)
    second = Engine(TINY, PLAN)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.steps_done == 3
    assert losses(second, 3) == losses(first, 3)
    wrong = first.state_dict()
    del wrong["exp_avg/embed.weight"]
    with pytest.raises(CheckpointError, match="embed.weight"):
        second.load_state_dict(wrong)


def test_another_loss_fits_the_same_seam():
    engine = Engine(TINY, PLAN, loss=lambda logits, b: logits.square().sum())
    expected = engine.model(batch().ids).square().sum() / batch().count
    torch.testing.assert_close(engine.forward_backward(batch()), expected.detach())


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="dp = 2"):
        Engine(TINY, PLAN, ParallelConfig(dp=2))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not there"):
            choose_device("cuda")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
