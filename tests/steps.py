"""Training steps of an engine in any layout, and all that can be seen of them, as one process would have it."""

import pytest
import torch

from minillm.config import ParallelConfig
from minillm.data.loader import IGNORED, Batch
from minillm.model.transformer import Transformer
from minillm.torch_engine import build_engine


def batch(step, rows=8):
    """The first rows have few targets, so that the data ranks' counts differ."""
    ids = torch.randint(0, 300, (rows, 33), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    targets[:1, :30] = targets[1:2, 4:] = IGNORED
    return Batch(ids[:, :-1].clone(), targets)


def share(engine, step, rows=8):
    return batch(step, rows).part(engine.rank, engine.ranks)


def dense_of(engine, tensors):
    """The tensors as one process has them, on the CPU."""
    return on_cpu(engine.gather({name: tensor.detach().clone() for name, tensor in tensors.items()}))


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def take_step(engine, step):
    loss = float(engine.forward_backward(share(engine, step)))
    gradients = dense_of(engine, {name: weight.grad for name, weight in engine.weights.items()})
    norm = float(engine.clip(engine.config.clip_norm))
    engine.step()
    return loss, norm, gradients


def trained(model, plan, parallel=ParallelConfig(), wide=True, steps=10):
    """Everything that can be seen of some steps. wide: in float64."""
    engine = build_engine(Transformer(model, seed=3).double() if wide else model, plan, parallel)
    losses, norms, gradients = zip(*(take_step(engine, step) for step in range(steps)), strict=True)
    return {"losses": losses, "norms": norms, "gradients": gradients[0], "last": gradients[-1],
            "weights": dense_of(engine, engine.weights), "state": engine.state_dict(),
            "evaluation": [engine.evaluate(share(engine, 100, rows)) for rows in (1, 8)],  # of 1 row, one rank has none
            "model": on_cpu(engine.whole_model().state_dict()), "held": sum(w.numel() for w in engine.weights.values())}


def resumed(model, plan, source, parallel=ParallelConfig(), wide=True):
    """The losses after the state and weights of another layout were loaded."""
    fresh = Transformer(model, seed=9)
    engine = build_engine(fresh.double() if wide else fresh, plan, parallel)
    engine.load_weights(source["model"])
    engine.load_state_dict(source["state"])
    return engine.steps_done, [take_step(engine, step)[0] for step in (11, 12)]


def like_one_process(ours, wanted, evaluated=1e-9):
    """Both from `trained`. evaluated: how close a pipeline's sum is, which is in float32, too: 1e-6."""
    # the loss that is returned is added up in float32, all else in float64: only the order of summation differs
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert ours["norms"] == pytest.approx(wanted["norms"], rel=1e-9)
    assert ours["evaluation"] == pytest.approx(wanted["evaluation"], rel=evaluated)
    for part in ("gradients", "last", "weights", "model", "state"):
        assert ours[part].keys() == wanted[part].keys() and len(ours[part]) > 5
        for key, expected in wanted[part].items():
            if not key.startswith("rng"):  # nobody draws from it, and each process began with its own
                torch.testing.assert_close(ours[part][key], expected, rtol=1e-7, atol=1e-10, msg=lambda text: f"{part}, {key}: {text}")
