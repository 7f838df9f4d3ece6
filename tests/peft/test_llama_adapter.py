import pytest
import torch
from small import FAMILIES, gradients_flow_only_where_they_should, ids, shake, small

from minillm.infer.generate import generate
from minillm.infer.sampling import Sampling
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.peft.freeze import count_trained
from minillm.peft.llama_adapter import add_llama_adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_base_and_then_differs(family):
    model, greedy = small(family), Sampling(temperature=0)
    before = model(ids())
    add_llama_adapter(model, 3)
    assert torch.equal(model(ids()), before)
    assert (shake(model, 0.5)(ids()) - before).abs().max() > 1e-6
    gradients_flow_only_where_they_should(model)
    assert torch.equal(generate(model, ids(), 6, sampling=greedy), generate(model, ids(), 6, sampling=greedy, cached=False))


def test_by_hand():
    """One softmax for the text, one for the prefix, the gate between; keys of the prefix are not rotated, queries are."""
    model = small("olmo2-7b", qk_norm="none")
    add_llama_adapter(model, 3)
    attention = shake(model, 0.5).blocks[0].attention
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    prompt = attention.extra.prompt
    k, v = ((prompt @ layer.weight.T).view(3, 4, 8).transpose(0, 1) for layer in (attention.k, attention.v))
    weights = (q @ k.mT / 8 ** 0.5).softmax(-1) * attention.extra.gate.tanh()[:, None, None]
    torch.testing.assert_close(attention.extra(q, attention), weights @ v, rtol=1e-12, atol=1e-12)  # float64, the same sums


def test_at_first_only_the_gate_learns():
    model = small()
    add_llama_adapter(model, 3, layers=1)
    model(ids()).square().sum().backward()
    assert model.blocks[0].attention.extra is None
    extra = model.blocks[1].attention.extra
    assert extra.gate.grad.abs().min() > 0 and not extra.prompt.grad.any()


def test_the_paper_s_count():
    model = Transformer(preset("llama-7b"), device="meta")
    add_llama_adapter(model, 10, layers=30)
    # arXiv:2303.16199: 1.2M, 10 vectors in the 30 upper layers; and a gate for each head
    assert count_trained(model).trained == 30 * (10 * 4096 + 32) == 1_229_760


def test_what_cannot_be():
    with pytest.raises(ValueError, match="10 vectors in 3 layers: the model has 2"):
        add_llama_adapter(small(), layers=3)
