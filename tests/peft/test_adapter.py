import pytest
import torch
from small import FAMILIES, gradients_flow_only_where_they_should, ids, shake, small
from torch.nn import functional as F

from minillm.infer.generate import generate
from minillm.infer.sampling import Sampling
from minillm.peft.adapter import add_adapters
from minillm.peft.freeze import count_trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parallel", [False, True])
def test_it_begins_as_the_base_and_then_differs(family, parallel):
    model, greedy = small(family), Sampling(temperature=0)
    before = model(ids())
    add_adapters(model, 5, parallel=parallel, scale=0.5)
    assert torch.equal(model(ids()), before)
    assert (shake(model)(ids()) - before).abs().max() > 1e-4
    gradients_flow_only_where_they_should(model)
    assert torch.equal(generate(model, ids(), 6, sampling=greedy), generate(model, ids(), 6, sampling=greedy, cached=False))


def test_where_it_stands():
    """Written out for GPT-2's block: after each part, before the sum; parallel ones read what the part reads."""
    for parallel in (False, True):
        model = small("gpt2")
        add_adapters(model, 5, parallel=parallel, scale=2.0)
        block, x = shake(model).blocks[0], torch.randn(2, 3, 32, dtype=torch.float64)
        found, _ = block(x)
        for part, norm in (("attention", block.attention_norm), ("ffn", block.ffn_norm)):
            module = getattr(block, part)
            read = norm(x)
            out = module.forward(read)  # without hooks
            out = out[0] if part == "attention" else out
            small_one = module.bottleneck
            fed = read if parallel else out
            hidden = F.gelu(fed @ small_one.down.weight.T + small_one.down.bias)
            x = x + out + 2 * (hidden @ small_one.up.weight.T + small_one.up.bias)
        torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)  # float64, the same sums


def test_its_size():
    model = small()
    add_adapters(model, 5)
    assert count_trained(model).trained == 2 * 2 * (2 * 5 * 32 + 5 + 32)  # arXiv:1902.00751 §2.1: 2md + d + m each
    model = small()
    add_adapters(model, 5, parts=("ffn",))
    assert count_trained(model).trained == 2 * (2 * 5 * 32 + 5 + 32)


def test_what_cannot_be():
    model = small()
    for wrong in (dict(size=0), dict(parts=()), dict(parts=("norm",))):
        with pytest.raises(ValueError, match="a size of at least 1 is needed, in \"attention\""):
            add_adapters(model, **wrong)
    add_adapters(model)
    with pytest.raises(ValueError, match="has a bottleneck already, and bottleneck cannot be added"):
        add_adapters(model)
