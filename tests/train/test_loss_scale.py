import pytest
import torch
from torch import nn

from minillm.train.loss_scale import LossScaler


def run(scaler_steps, pattern, model, optimizer):
    """Train on a scaled loss that overflows where the pattern says; returns the scales and whether weights moved."""
    scales, moved = [], []
    for step, overflows in enumerate(pattern):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        before = model.weight.detach().clone()
        scales.append(scaler_steps(model(x * (1e38 if overflows else 1.0)).square().mean(), optimizer))
        optimizer.zero_grad()
        moved.append(not torch.equal(before, model.weight))
    return scales, moved


@pytest.mark.parametrize("options", [{}, {"growth": 4.0, "backoff": 0.25, "interval": 2}, {"scale": 3.0, "interval": 5}])
def test_the_same_scales_and_skipped_steps_as_torchs_grad_scaler(options):
    settings = {"scale": 2.0 ** 10, "growth": 2.0, "backoff": 0.5, "interval": 3} | options
    pattern = [False] * 4 + [True, False, True, True] + [False] * 7 + [True] + [False] * 3

    def build():
        model = nn.Linear(4, 3, bias=False)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    theirs = torch.amp.GradScaler("cpu", settings["scale"], settings["growth"], settings["backoff"], settings["interval"])

    def torch_step(loss, optimizer):
        theirs.scale(loss).backward()
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        return theirs.get_scale()

    ours = LossScaler(**settings)

    def our_step(loss, optimizer):
        (loss * ours.scale).backward()
        finite = ours.unscale(p.grad for group in optimizer.param_groups for p in group["params"])
        if finite:
            optimizer.step()
        ours.update(finite)
        return ours.scale

    torch_model, torch_optimizer = build()
    our_model, our_optimizer = build()
    their_scales, their_moves = run(torch_step, pattern, torch_model, torch_optimizer)
    our_scales, our_moves = run(our_step, pattern, our_model, our_optimizer)
    assert our_scales == their_scales and our_moves == their_moves == [not bad for bad in pattern]
    assert len(set(our_scales)) > 3
    assert torch.equal(our_model.weight, torch_model.weight)  # the same operations on the same numbers


def test_a_fixed_scale_stays():
    scaler = LossScaler(128.0, dynamic=False, interval=1)
    for finite in (True, False, True):
        scaler.update(finite)
    assert scaler.scale == 128.0


def test_gradients_in_16_bits_are_refused():
    with pytest.raises(TypeError, match="float16 cannot be unscaled in place: divided by 65536 it would underflow"):
        LossScaler().unscale([torch.ones(2, dtype=torch.float16)])
