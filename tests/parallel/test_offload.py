"""Offload and Infinity against everything in one place, on one rank and two; and under a limit that memory has."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minillm.config import TrainConfig
from minillm.parallel.launch import launch
from minillm.parallel.offload import Infinity, Offload
from minillm.train.build import build_optimizer
from minillm.train.master_weights import MasterWeights

PLAN = TrainConfig(lr=1e-2)
ROOT = Path(__file__).resolve().parents[2]


def net(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7)).double().to(device)


def loss_of(model, step, part=slice(None)):
    ids = torch.randint(7, (2, 8), generator=torch.Generator().manual_seed(step))[:, part]
    ids = ids.to(model[1].weight.device)
    return F.cross_entropy(model(ids[0]), ids[1], reduction="sum") / 8


def trained(make, me=None, device="cpu"):
    """Losses of this rank's share, and the weights at the end, of four steps of two microbatches."""
    model, losses = net(device), []
    zero = make(model)
    optimizer = zero.build_optimizer(PLAN)
    rank, size = (me.rank, me.size) if me else (0, 1)
    for step in range(4):
        losses.append(0.0)
        for half in range(2):
            loss = loss_of(model, step, slice(rank + size * half, None, 2 * size))
            loss.backward()
            losses[-1] += float(loss.detach())
        zero.finish()
        zero.clip(0.1)
        zero.step(optimizer)
    return losses, zero.gather(dict(zero.named_parameters()))


def dense():
    model = net()
    optimizer, losses = build_optimizer(model, PLAN), []
    for step in range(4):
        loss = loss_of(model, step)
        loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


def both_ways(me=None, device="cpu"):
    with tempfile.TemporaryDirectory() as folder:
        group = me.group if me else None
        return [trained(lambda model: Offload(model, group, bucket_bytes=400), me, device),
                trained(lambda model: Infinity(model, group, Path(folder), bucket_bytes=400), me, device),
                sorted(name for name in os.listdir(folder) if name.endswith(f"rank{me.rank if me else 0}"))]


@pytest.mark.parametrize("size", [1, 2])
def test_losses_and_weights_are_those_of_one_place(size):
    losses, weights = dense()
    ranks = launch(both_ways, size, backend="gloo") if size > 1 else [both_ways()]
    for number in (0, 1):
        # float64: only the order of summation differs
        torch.testing.assert_close([sum(step) for step in zip(*(rank[number][0] for rank in ranks))], losses, rtol=1e-12, atol=0)
        for rank in ranks:
            for name, weight in weights.items():
                torch.testing.assert_close(rank[number][1][name], weight.detach(), rtol=1e-9, atol=1e-12)
    for rank, found in enumerate(ranks):
        assert found[2] == [f"{flat}-{what}-rank{rank}" for flat in ("0.weight", "1.bias", "1.weight", "3.bias", "3.weight")
                            for what in ("exp_avg", "exp_avg_sq", "master")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: streams, and memory that cannot be moved")
def test_states_of_a_gpu_live_on_the_host():
    losses, weights = dense()
    for found, end in both_ways(device="cuda")[:2]:
        # float64: a GPU adds up in another order
        torch.testing.assert_close(found, losses, rtol=1e-10, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(end[name].cpu(), weight.detach(), rtol=1e-8, atol=1e-11)
    zero = Offload(net("cuda"), None)
    assert all(piece.is_cpu for _, piece in zero.named_parameters()) and zero.flats[0].master.is_pinned()


LAYERS, LIMIT = 16, 8  # of a million weights; bytes for each


def sixteen_bits(way):
    """Three losses of a model in bf16 with float32 masters, or why there are none."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(LAYERS))).bfloat16()
    x, plan, losses = torch.randn(2, 1000).bfloat16(), TrainConfig(lr=1e-3), []
    with tempfile.TemporaryDirectory() as folder:
        if way == "whole":
            masters = MasterWeights(model, torch.bfloat16, "half")
            optimizer = build_optimizer(masters.named_parameters(), plan)
        else:
            zero = Infinity(model, None, Path(folder), dtype=torch.bfloat16, bucket_bytes=2_100_000)
            optimizer = zero.build_optimizer(plan)
        for _ in range(3):
            loss = model(x).float().square().mean() * 100
            loss.backward()
            if way == "whole":
                masters.step(optimizer)
                model.zero_grad()
            else:
                zero.finish()
                zero.step(optimizer)
            losses.append(float(loss.detach()))
    return losses


def under_a_limit():
    """For a process of its own: what it says of both ways when it may take that much more memory than it has."""
    small = nn.Linear(2, 2)  # what the first step loads is no part of the limit
    small(torch.ones(2)).sum().backward()
    build_optimizer(small, TrainConfig()).step()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    resource.setrlimit(resource.RLIMIT_DATA, (int(status["VmData"].split()[0]) * 1024 + LIMIT * LAYERS * 1_001_000,) * 2)
    said = {}
    for way in ("infinity", "whole"):
        try:
            said[way] = sixteen_bits(way)
        except RuntimeError as error:
            said[way] = str(error)
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on data that counts mappings (RLIMIT_DATA) is Linux's")
def test_states_in_files_train_where_memory_has_no_room_for_them():
    """A weight takes 16 bytes, its gradient and states with it; there is room for 8."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536",  # so that what is freed does not count
                                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])}
    code = "import json, test_offload; print(json.dumps(test_offload.under_a_limit()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "can't allocate memory" in said["whole"]
    assert said["infinity"] == sixteen_bits("whole")  # to the last bit: the same operations on the same numbers


def test_two_models_in_one_folder_do_not_crash_each_other(tmp_path):
    """The second takes the files' names; the first goes on with its own, which have none any more."""
    zeros = [Infinity(net(), None, tmp_path, bucket_bytes=400) for _ in range(2)]
    for zero in zeros:
        optimizer = zero.build_optimizer(PLAN)
        loss_of(zero.model, 0).backward()
        zero.finish()
        zero.step(optimizer)
    for mine, other in zip(zeros[0].model.parameters(), zeros[1].model.parameters(), strict=True):
        assert torch.equal(mine, other) and not torch.equal(mine, torch.zeros_like(mine))
