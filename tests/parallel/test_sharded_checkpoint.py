"""A run that changes its layout twice against one that never had any: stages, numbers of ranks, and one process."""


import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minillm.config import TrainConfig
from minillm.parallel.launch import launch
from minillm.parallel.sharded_checkpoint import dense_pieces, load_sharded, load_zero, save_sharded, stored, zero_pieces
from minillm.parallel.zero1 import Zero1
from minillm.parallel.zero2 import Zero2
from minillm.parallel.zero3 import Zero3
from minillm.train.build import build_optimizer

PLAN = TrainConfig(lr=1e-2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 9), nn.Linear(9, 7)).double()


def loss_of(model, step, rank=0, size=1):
    ids = torch.randint(7, (2, 8), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(ids[0, rank::size]), ids[1, rank::size], reduction="sum") / 8


def share(stage, model, group):
    if stage == 3:
        return Zero3(model, group, [model[1]])
    return {1: Zero1, 2: Zero2}[stage](model, group, bucket_bytes=300)


def go_on(me, stage, start, end, steps):
    """Some steps from one folder to another."""
    model = net()
    zero = share(stage, model, me.group)
    optimizer = zero.build_optimizer(PLAN)
    if start:
        load_zero(start, zero, optimizer)
    for step in steps:
        loss_of(model, step, me.rank, me.size).backward()
        zero.finish()
        zero.step(optimizer)
    save_sharded(end, zero_pieces(zero, optimizer), me.group)


def states(model, optimizer):
    named = dict(model.named_parameters())
    return {f"master/{name}": p for name, p in named.items()} | {
        f"{slot}/{name}": value for name, p in named.items() for slot, value in optimizer.state[p].items()}


def alone(model, optimizer, steps):
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_goes_on_in_another_layout(tmp_path):
    """Two steps of ZeRO-1 on four ranks, two of ZeRO-3 on two, two in one process, two of ZeRO-2 on two."""
    launch(go_on, 4, 1, None, tmp_path / "a", range(2), backend="gloo")
    launch(go_on, 2, 3, tmp_path / "a", tmp_path / "b", range(2, 4), backend="gloo")
    model, whole = net(), net()
    optimizer, wanted = build_optimizer(model, PLAN), build_optimizer(whole, PLAN)
    loss_of(model, 0).backward()
    optimizer.step()  # so that there are states to read into
    optimizer.zero_grad()
    load_sharded(tmp_path / "b", dense_pieces(states(model, optimizer)))
    alone(model, optimizer, range(4, 6))
    save_sharded(tmp_path / "c", dense_pieces(states(model, optimizer)))
    launch(go_on, 2, 2, tmp_path / "c", tmp_path / "d", range(6, 8), backend="gloo")
    alone(whole, wanted, range(8))
    load_sharded(tmp_path / "d", dense_pieces(states(model, optimizer)))
    for name, value in states(whole, wanted).items():
        # float64: only the order of summation differs
        torch.testing.assert_close(states(model, optimizer)[name], value, rtol=1e-9, atol=1e-12)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 4 and not list(tmp_path.glob(".*"))


def test_what_does_not_fit_is_named(tmp_path):
    numbers = {"master/a": torch.arange(6.0).view(2, 3), "step/a": torch.tensor(3.0)}
    save_sharded(tmp_path / "a", dense_pieces(numbers))
    save_sharded(tmp_path / "a", dense_pieces(numbers))  # in place of the first
    assert stored(tmp_path / "a") == {"master/a": 6, "step/a": 1}
    with pytest.raises(ValueError, match="has no numbers as master/b, and the model 6: it belongs to another model"):
        load_sharded(tmp_path / "a", dense_pieces({"master/b": torch.zeros(6)}))
    with pytest.raises(ValueError, match="has 6 numbers as master/a, and the model 7"):
        load_sharded(tmp_path / "a", dense_pieces({"master/a": torch.zeros(7)}))
