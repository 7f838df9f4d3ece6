import pytest
import torch
from torch.nn import functional as F

from minillm.model.families import preset
from minillm.model.transformer import Transformer, num_params
from minillm.train.live_bytes import LiveBytes
from minillm.train.master_weights import MasterWeights

SMALL = preset("llama-7b", vocab_size=64, layers=4, width=32, heads=2, ffn_width=64, context=16)
IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def backward(model, scale=1.0):
    (scale * F.cross_entropy(model(IDS).float().flatten(0, 1), IDS.flatten())).backward()


@pytest.mark.parametrize("gradients, expected", [("half", 16), ("float", 18), ("both", 20)])
def test_bytes_a_parameter(gradients, expected):
    with LiveBytes() as live:
        model = Transformer(SMALL, seed=0)
        built = live.now - 4 * num_params(model)  # tables of positions and the like, which are no parameters
        masters = MasterWeights(model, torch.bfloat16, gradients)
        optimizer = torch.optim.AdamW([p for _, p in masters.named_parameters()], lr=1e-3, fused=True)
        for _ in range(2):  # the moments appear in the first step
            backward(model)
            before = live.now
            live.peak = 0
            masters.step(optimizer)
            peak, after = live.peak, live.now
            model.zero_grad()
            optimizer.zero_grad()
    count, largest = num_params(model), max(p.numel() for p in model.parameters())
    steps = 4 * len(masters.masters)  # AdamW counts its steps, once for each tensor
    states = expected * count + steps + built
    if gradients == "both":  # all float32 gradients appear in the update
        assert before == states - 4 * count and after == states
        assert peak == states
    else:
        assert before == after == states
        assert peak == states + (4 * largest if gradients == "half" else 0)  # one float32 gradient at a time


@pytest.mark.parametrize("gradients", ["half", "float", "both"])
def test_every_way_to_keep_gradients_trains_the_same(gradients):
    def train(gradients):
        model = Transformer(SMALL, seed=0)
        masters = MasterWeights(model, torch.bfloat16, gradients)
        optimizer = torch.optim.AdamW([p for _, p in masters.named_parameters()], lr=1e-2)
        for _ in range(4):
            backward(model, scale=8.0)
            masters.step(optimizer, scale=8.0)
            model.zero_grad()
            optimizer.zero_grad()
        return masters

    # one microbatch a step and a scale that is a power of two, so nothing is rounded differently
    found, expected = train(gradients), train("both")
    for (_, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_small_updates_add_up_in_the_copy_and_are_lost_without_it():
    def after(with_master):
        layer = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.ones_(layer.weight)
        masters = MasterWeights(layer, torch.bfloat16, "half") if with_master else None
        layer.bfloat16()
        optimizer = torch.optim.SGD([p for _, p in (masters or layer).named_parameters()], lr=1.0)
        for _ in range(100):  # each a quarter of the distance to the number below 1
            layer.weight.grad = torch.full_like(layer.weight, 2.0 ** -10)
            masters.step(optimizer) if masters else optimizer.step()
        return float(layer.weight.detach()[0, 0])

    assert after(with_master=False) == 1.0
    assert after(with_master=True) == 1 - 100 * 2.0 ** -10 == 231 / 256  # a number that bf16 has


def test_gradients_of_microbatches_are_summed_in_float32():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    masters = MasterWeights(layer, torch.bfloat16, "float")
    for value in (256.0, 1.0, 1.0):  # bf16 has no 257
        layer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    (_, master), = masters.named_parameters()
    assert layer.weight.grad is None and float(master.grad) == 258.0


def test_tied_weights_stay_one():
    model = Transformer(preset("gpt2", vocab_size=64, layers=1, width=32, heads=2, context=16), seed=0)
    masters = MasterWeights(model, torch.float16)
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == torch.float16
    assert [name for name, _ in masters.named_parameters()] == [name for name, _ in model.named_parameters()]
