import pytest
import torch
from small import FAMILIES, gradients_flow_only_where_they_should, ids, shake, small

from minillm.infer.generate import generate
from minillm.infer.kv_cache import StaticCache
from minillm.infer.sampling import Sampling
from minillm.peft.freeze import count_trained
from minillm.peft.prompt import add_prompt

FRONT = torch.tensor([3, 1, 4, 1, 5])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_words_is_those_words_in_front(family):
    model = small(family)
    whole = model(torch.cat((FRONT.expand(2, -1), ids()), 1), return_hidden=True, return_attention=True)
    add_prompt(model, ids=FRONT)
    found = model(ids(), return_hidden=True, return_attention=True)
    # float64: the same operations on the same numbers, but for the scale of the embedding, which is divided out again
    torch.testing.assert_close(found.logits, whole.logits[:, 5:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.hidden[1], whole.hidden[1][:, 5:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.attention[1], whole.attention[1][:, :, 5:], rtol=1e-10, atol=1e-10)
    positions = torch.arange(9).expand(2, -1)
    assert torch.equal(model(ids(), positions=positions), model(ids()))
    gradients_flow_only_where_they_should(shake(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_sees_the_same(family):
    greedy, padding = Sampling(temperature=0), torch.ones(2, 9, dtype=torch.bool)
    padding[0, :3] = False
    model = small(family)
    add_prompt(model, 4)
    for mask in (None, padding):
        options = dict(sampling=greedy, padding_mask=mask)
        assert torch.equal(generate(model, ids(), 8, **options), generate(model, ids(), 8, cached=False, **options))


def test_its_size_and_what_the_cache_holds():
    model = small()
    add_prompt(model, 6)
    assert count_trained(model).trained == 6 * 32
    cache = StaticCache(model.config, 2, 10, dtype=torch.float64)
    whole = model(ids(length=10))
    first = model(ids(length=10)[:, :7], cache=cache)
    assert cache.length == 7
    rest = model(ids(length=10)[:, 7:], cache=cache)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-10, atol=1e-10)  # float64: other sizes of the same sums


def test_the_seed_decides():
    found = []
    for seed in (1, 1, 2):
        model = small()
        add_prompt(model, 3, seed=seed)
        found.append(model.embed.soft_prompt.vectors)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
