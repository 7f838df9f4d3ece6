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
from runs import PLAN, TINY, batch, losses


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


PRECISIONS = {"bf16": {}, "fp16": {}, "fp8": {}, "bf16 + masters": {"master_weights": True},
              "fp16 + masters": {"master_weights": True}}


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_trains_close_to_fp32(name):
    plan = replace(PLAN, lr=1e-2, precision=name.split()[0], **PRECISIONS[name])
    full = losses(Engine(TINY, replace(plan, precision="fp32", master_weights=False)))
    narrow = losses(Engine(TINY, plan))
    # bf16's neighbours are 1/128 apart, e4m3's 1/8; the loss is a mean over 128 tokens
    assert narrow != full and narrow == pytest.approx(full, rel=2e-2 if name == "fp8" else 5e-3)


def test_with_master_weights_the_model_is_in_16_bits_and_rounds_its_copy():
    engine = Engine(TINY, replace(PLAN, precision="bf16", master_weights=True, lr=1e-2))
    losses(engine, 3)
    for name, parameter in engine.model.named_parameters():
        master = engine.weights[name]
        assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32 and parameter.grad is None
        assert torch.equal(parameter, master.bfloat16())
    assert any(not torch.equal(p.float(), engine.weights[n]) for n, p in engine.model.named_parameters())


def test_master_weights_accumulate_microbatches():
    whole, parts = (Engine(TINY, replace(PLAN, precision="bf16", master_weights=True, microbatch_size=size)) for size in (None, 1))
    for engine in (whole, parts):
        engine.forward_backward(batch())
    for name, weight in whole.weights.items():
        # each part's gradient is rounded to bf16 (8 bits) before it is added
        error = (parts.weights[name].grad - weight.grad).norm() / weight.grad.norm()
        assert error < 2 ** -6, name


def test_fp16_scales_the_loss_and_clips_what_is_unscaled():
    plain = Engine(TINY, PLAN)
    scaled = Engine(TINY, replace(PLAN, precision="fp16", loss_scale=1024.0))
    returned = float(plain.forward_backward(batch()))
    assert float(scaled.forward_backward(batch())) == pytest.approx(returned, rel=1e-3)  # not scaled
    for name, gradient in gradients(scaled).items():
        error = (gradient / 1024 - plain.weights[name].grad).norm() / plain.weights[name].grad.norm()
        assert error < 2 ** -6, name  # fp16 has 11 bits
    norm = plain.clip(0.1)
    assert scaled.clip(0.1) == pytest.approx(float(norm), rel=1e-2)
    total = torch.nn.utils.get_total_norm([w.grad for w in scaled.weights.values()])
    assert total == pytest.approx(0.1, rel=1e-3)  # had it been clipped first, it would be 0.1 / 1024
    assert scaled.step() is True


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    engine = Engine(TINY, replace(PLAN, precision="fp16"))
    before = {n: w.detach().clone() for n, w in engine.weights.items()}
    engine.forward_backward(batch())
    engine.weights["embed.weight"].grad[0, 0] = float("inf")
    assert engine.step() is False and engine.scaler.scale == 32_768 and engine.steps_done == 1
    assert all(torch.equal(w, before[n]) for n, w in engine.weights.items()) and not engine.optimizer.state
    engine.forward_backward(batch())
    assert engine.step() is True and engine.scaler.scale == 32_768 and engine.scaler.good_steps == 1
    assert any(not torch.equal(w, before[n]) for n, w in engine.weights.items())


def test_z_loss_is_in_the_gradients_and_not_in_the_loss():
    plain, calmed = (Engine(Transformer(TINY).double(), replace(PLAN, z_loss=z)) for z in (0.0, 0.1))
    assert float(plain.forward_backward(batch())) == float(calmed.forward_backward(batch()))
    model = Transformer(TINY).double()
    logits = model(batch().ids)
    penalty = 0.1 * logits.logsumexp(-1).square().mean()
    (cross_entropy(logits, batch().targets) / 128 + penalty).backward()
    for name, parameter in model.named_parameters():
        # float64: the order of summation
        torch.testing.assert_close(calmed.weights[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(calmed.weights["embed.weight"].grad, plain.weights["embed.weight"].grad)
    assert plain.evaluate(batch()) == calmed.evaluate(batch())


CHANGES = {"lr": 1e-2, "min_lr": 0.5, "schedule": "linear", "warmup_steps": 3, "weight_decay": 0.5, "decay_embeddings": False,
           "beta1": 0.5, "beta2": 0.5, "adam_eps": 1e-2, "clip_norm": 0.01, "z_loss": 0.1, "precision": "bf16", "seed": 1,
           "optimizer": "muon", "batch_size": 2}
"""Each field of training that a step depends on, and another value of it."""


@pytest.mark.parametrize("name", CHANGES)
def test_no_field_is_dead(name):
    def trained(plan):
        engine = Engine(TINY, plan)
        for step in range(4):
            engine.forward_backward(batch(step, rows=plan.batch_size))
            engine.clip(plan.clip_norm)
            engine.step()
        return engine.weights

    base = replace(PLAN, lr=5e-3)
    usual, changed = trained(base), trained(replace(base, **{name: CHANGES[name]}))
    assert any(not torch.equal(usual[n], changed[n]) for n in usual)


COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from minillm.engine import Engine
from runs import PLAN, TINY, losses
eager, compiled = (losses(Engine(TINY, replace(PLAN, compile=c)), 2) for c in (False, True))
# float32, operations fused in another order
assert all(abs(a - b) < 1e-5 * abs(a) for a, b in zip(eager, compiled, strict=True)), (eager, compiled)
"""


@pytest.mark.slow
def test_compiled_gives_the_same_losses():
    """In a process of its own: the shape checks that this suite switches on cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED, Path(__file__).parent], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


STATES = {"AdamW": {}, "by hand": {"optimizer": "by_hand"}, "Muon": {"optimizer": "muon"}, "Adafactor": {"optimizer": "adafactor"},
          "fp16": {"precision": "fp16"}, "fp8": {"precision": "fp8"}, "masters": {"precision": "bf16", "master_weights": True},
          "fp16, masters": {"precision": "fp16", "master_weights": True, "optimizer": "muon"}}


@pytest.mark.parametrize("name", STATES)
def test_state_goes_on_bit_for_bit(name):
    plan = replace(PLAN, **STATES[name])
    first = Engine(TINY, plan)
    losses(first, 3)
    second = Engine(TINY, plan)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.steps_done == 3
    if first.scaler:
        assert second.scaler == first.scaler
    assert losses(second, 3) == losses(first, 3)
    assert all(torch.equal(w, second.weights[n]) for n, w in first.weights.items())
    wrong = first.state_dict()
    for key in [k for k in wrong if k.endswith("/embed.weight") and not k.startswith("master")][:1]:
        del wrong[key]
    with pytest.raises(CheckpointError, match="embed.weight"):
        second.load_state_dict(wrong)


def test_master_weights_must_be_in_the_checkpoint():
    plan = replace(PLAN, precision="bf16")
    without = Engine(TINY, plan)
    losses(without, 1)
    with pytest.raises(CheckpointError, match="no master weights for embed.weight: it was trained without them"):
        Engine(TINY, replace(plan, master_weights=True)).load_state_dict(without.state_dict())


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
