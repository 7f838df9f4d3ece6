from dataclasses import asdict

import pytest
import torch

from minillm.config import ModelConfig
from minillm.model.families import preset
from minillm.model.transformer import Transformer, num_params
from minillm.plan.devices import DEVICES, GB
from minillm.plan.memory import CONVENTIONS, States, least_devices, state_bytes, zero_bytes, zero_traffic
from minillm.train.master_weights import MasterWeights

SMALL = ModelConfig(vocab_size=50, layers=2, width=24, heads=2, context=8)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def measured(convention: str) -> States:
    """Bytes alive after a backward pass and a step of AdamW."""
    model = Transformer(SMALL)
    weights = list(model.parameters())
    master = None if convention == "fp32" else MasterWeights(model, torch.bfloat16, convention)
    copies = [] if master is None else list(master.masters.values())
    optimizer = torch.optim.AdamW(copies or weights)
    model(torch.zeros(1, 8, dtype=torch.long)).float().logsumexp(-1).sum().backward()
    optimizer.step() if master is None else master.step(optimizer)
    moments = [m for state in optimizer.state.values() for name, m in state.items() if name != "step"]
    return States(size(weights), size(p.grad for p in weights + copies), size(copies), size(moments))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_bytes_are_those_of_the_live_optimizer(convention):
    assert measured(convention) == state_bytes(num_params(Transformer(SMALL)), convention)


def test_bytes_of_a_parameter():
    assert {name: (*asdict(each).values(), each.total) for name, each in CONVENTIONS.items()} == {
        "fp32": (4, 4, 0, 8, 16), "half": (2, 2, 4, 8, 16), "float": (2, 4, 4, 8, 18), "both": (2, 6, 4, 8, 20)}
    with pytest.raises(ValueError, match="no convention is called 'mixed': choose from fp32, half, float, both"):
        state_bytes(1, "mixed")


def test_gpt2_of_the_zero_paper():
    """arXiv:1910.02054 §3.1: 1.5B parameters take 3 GB as fp16 weights, and at least 24 GB in training."""
    states = state_bytes(1_500_000_000, "half")
    assert (states.weights, states.total) == (3 * GB, 24 * GB)
    checkpoint = num_params(Transformer(preset("gpt2-1.5b"), device="meta"))  # 1.558B
    assert round(state_bytes(checkpoint, "half").total / GB, 1) == 24.9


def test_the_zero_paper():
    """arXiv:1910.02054, figure 1 and §7: 7.5B parameters on 64 GPUs; each rank's elements by stage, as times Ψ(P-1)/P."""
    held = [zero_bytes(7_500_000_000, 64, stage).total / GB for stage in range(4)]
    assert [round(size, 1) for size in held] == [120.0, 31.4, 16.6, 1.9]
    assert [zero_traffic(64, 64, stage) for stage in range(4)] == [2 * 63, 2 * 63, 2 * 63, 3 * 63]
    assert [zero_traffic(64, 64, stage, 4) for stage in range(4)] == [2 * 63, 2 * 63, 5 * 63, 12 * 63]
    for stage in range(4):  # one rank has it all
        assert zero_bytes(1001, 1, stage, "float") == state_bytes(1001, "float") and zero_traffic(64, 1, stage) == 0
    with pytest.raises(ValueError, match="stage = 4"):
        zero_bytes(1, 2, 4)


def test_claim_that_gpt1_trains_in_1_4_gb():
    """It is what 12 bytes a parameter come to: weights and both moments in float32. The gradients were forgotten."""
    states = state_bytes(num_params(Transformer(preset("gpt1"), device="meta")), "fp32")
    assert round((states.total - states.gradients) / GB, 1) == 1.4
    assert round(states.total / GB, 2) == 1.86


def test_claim_that_a_trillion_numbers_of_four_bytes_need_51_2_h100s():
    """50 do. The other number takes 4 TB for 4 x 1,024 GB, but leaves a GB at 10⁹ bytes; and there is no fifth of a GPU."""
    memory = DEVICES["h100"].memory
    assert 4 * 10 ** 12 / memory == 50 and least_devices(4 * 10 ** 12, memory) == 50
    assert 4 * 1024 * GB / memory == 51.2
    # If the card's 80 GB are binary, as what nvidia-smi shows suggests, and a trillion stays a trillion, it takes even fewer.
    assert least_devices(4 * 10 ** 12, 80 * 2 ** 30) == 47


def test_devices_come_whole():
    assert [least_devices(n, 80) for n in (1, 80, 81, 160)] == [1, 1, 2, 2]
