import pytest
import torch
from small import FAMILIES, gradients_flow_only_where_they_should, ids, shake, small

from minillm.infer.generate import generate
from minillm.infer.kv_cache import StaticCache
from minillm.infer.sampling import Sampling
from minillm.peft.freeze import count_trained
from minillm.peft.prefix import add_prefix
from minillm.peft.prompt import add_prompt

FRONT = torch.tensor([3, 1, 4, 1, 5])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_made_of_words_is_those_words_in_front(family):
    model = small(family)
    expected = model(torch.cat((FRONT.expand(2, -1), ids()), 1))[:, 5:]
    add_prefix(model, ids=FRONT)
    torch.testing.assert_close(model(ids()), expected, rtol=1e-10, atol=1e-10)  # float64: kernels of other sizes round otherwise
    gradients_flow_only_where_they_should(shake(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_sees_the_same(family):
    greedy, padding = Sampling(temperature=0), torch.ones(2, 9, dtype=torch.bool)
    padding[0, :3] = False
    model = small(family)
    add_prefix(model, 4)
    for mask in (None, padding):
        options = dict(sampling=greedy, padding_mask=mask)
        assert torch.equal(generate(model, ids(), 8, **options), generate(model, ids(), 8, cached=False, **options))


def test_padding_changes_nothing():
    model = small()
    add_prefix(model, 4)
    padded, mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids()), 1), torch.arange(12)[None].expand(2, -1) >= 3
    # float64: masked keys add nothing but other sizes of the same sums
    torch.testing.assert_close(model(padded, padding_mask=mask)[:, 3:], model(ids()), rtol=1e-10, atol=1e-10)


def test_its_size_and_what_the_cache_holds():
    model = small()
    add_prefix(model, 6)
    assert count_trained(model).trained == 2 * 2 * 2 * 6 * 8  # 2 · L · G · P · D
    cache = StaticCache(model.config, 2, 9, dtype=torch.float64)
    model(ids(), cache=cache)
    assert cache.length == 9  # the text alone


@pytest.mark.parametrize("add", [add_prefix, add_prompt])
def test_what_cannot_be(add):
    model = small()
    with pytest.raises(ValueError, match="must (be|have) at least 1"):
        add(model, 0)
    add(model, 2)
    with pytest.raises(ValueError, match="has a (prefix|prompt) already"):
        add(model, 2)
    with pytest.raises(ValueError, match="segment_ids with something in front"):
        model(ids(), segment_ids=torch.zeros_like(ids()))
