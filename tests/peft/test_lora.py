import copy
import math

import pytest
import torch
from small import FAMILIES, gradients_flow_only_where_they_should, ids, shake, small

from minillm.infer.generate import generate
from minillm.infer.sampling import Sampling
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.nn.quantize import dequantize_linears, quantize_linears
from minillm.peft.freeze import count_trained, trained_parameters
from minillm.peft.lora import LoraConfig, add_lora, adapter_names, lora_layers, merge_lora, unmerge_lora, use_lora

WIDE = LoraConfig(rank=3, alpha=5, targets=("attention.*", "*.ffn.*", "embed"))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_layer_of_any_family(family):
    base = small(family)
    model = copy.deepcopy(base)
    layers = add_lora(model, WIDE)
    assert len(layers) == 1 + base.config.tied + 2 * (6 + base.config.gated)
    assert torch.equal(model(ids()), base(ids()))  # B is zero
    shake(model)
    tuned = model(ids())
    assert (tuned - base(ids())).abs().max() > 1e-3
    gradients_flow_only_where_they_should(model)
    merge_lora(model)
    torch.testing.assert_close(model(ids()), tuned, rtol=1e-10, atol=1e-10)  # float64: a sum of products, in another order
    unmerge_lora(model)
    for name, weight in base.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-14)  # added and taken away: one rounding each


def test_by_hand():
    model = shake_all(small(), LoraConfig(rank=2, alpha=6, targets=("blocks.1.ffn.up",)))
    layer = model.blocks[1].ffn.up
    x, pair = torch.randn(5, 32, dtype=torch.float64), layer.lora["default"]
    expected = x @ (layer.weight + 3 * pair.B @ pair.A).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)  # float64, another order of the same sums
    assert list(lora_layers(model)) == ["blocks.1.ffn.up"]


def shake_all(model, config, name="default"):
    add_lora(model, config, name)
    return shake(model)


def test_scales():
    assert LoraConfig(rank=16, alpha=32).scale == 2 and LoraConfig(rank=16, alpha=32, rank_stabilised=True).scale == 8


def test_switching_and_stacking():
    model = small()
    plain = model(ids())
    shake_all(model, LoraConfig(rank=2, targets=("q",)), "one")
    one = model(ids())
    shake_all(model, LoraConfig(rank=4, targets=("q", "down")), "two")
    two = model(ids())
    assert adapter_names(model) == ["one", "two"] and all(".two." in name for name in trained_parameters(model))
    use_lora(model, "one")
    assert torch.equal(model(ids()), one) and all(".one." in name for name in trained_parameters(model))
    use_lora(model, "two")
    assert torch.equal(model(ids()), two)
    use_lora(model, "one", "two")
    both = model(ids())
    merge_lora(model, "one")
    torch.testing.assert_close(model(ids()), both, rtol=1e-10, atol=1e-10)  # float64, another order
    merge_lora(model, "two")
    torch.testing.assert_close(model(ids()), both, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="one, two is merged into .*: call unmerge_lora"):
        use_lora(model, "one")
    with pytest.raises(ValueError, match="one is merged already"):
        merge_lora(model, "one")
    unmerge_lora(model)
    use_lora(model)
    torch.testing.assert_close(model(ids()), plain, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="'three'; there are: one, two"):
        use_lora(model, "three")


def test_a_copy_has_its_own_changes():
    model = shake_all(small(), LoraConfig())
    tuned, twin = model(ids()), copy.deepcopy(model)
    shake(twin)
    assert torch.equal(model(ids()), tuned) and not torch.equal(twin(ids()), tuned)


def test_a_tied_head_and_its_embedding_are_one():
    for target in ("embed", "head"):
        model = shake_all(small(), LoraConfig(rank=2, targets=(target,)))
        assert len(trained_parameters(model)) == 2 and list(lora_layers(model)) == ["embed", "head"]
    model = small("olmo2-7b")
    assert add_lora(model, LoraConfig(targets=("head",))) == ["head"]


def test_dropout_in_training_alone():
    model = shake_all(small(), LoraConfig(dropout=0.5))
    assert torch.equal(model(ids()), model(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))


def test_the_cache_sees_the_same():
    model, greedy = shake_all(small(), WIDE), Sampling(temperature=0)
    assert torch.equal(generate(model, ids(), 8, sampling=greedy), generate(model, ids(), 8, sampling=greedy, cached=False))


def test_the_seed_decides():
    first, second, other = small(), small(), small()
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        add_lora(model, seed=seed)
    one, two, three = (model.blocks[0].attention.q.lora["default"].A for model in (first, second, other))
    assert torch.equal(one, two) and not torch.equal(one, three) and one.abs().max() <= 1 / math.sqrt(32)


def test_beside_weights_in_four_bits():
    model = small(width=64, ffn_width=64).float()
    quantize_linears(model)
    frozen = model.blocks[0].attention.q.codes.clone()
    add_lora(model, LoraConfig(targets=("attention.*",)))
    shake(model)
    gradients_flow_only_where_they_should(model)
    assert torch.equal(model.blocks[0].attention.q.codes, frozen)
    with pytest.raises(ValueError, match="is stored in nf4, which rounds a small change away: call dequantize_linears"):
        merge_lora(model)
    tuned = model(ids())
    dequantize_linears(model)
    torch.testing.assert_close(model(ids()), tuned)
    merge_lora(model)
    torch.testing.assert_close(model(ids()), tuned, rtol=1e-4, atol=1e-5)  # float32, another order of sums


def test_the_paper_s_counts():
    def trained(model, config):
        add_lora(model, config)
        return count_trained(model).trained

    gpt3 = preset("gpt3")
    # arXiv:2106.09685 table 4: 4.7M and 37.7M; §4.2: r = 4 on q and v, a checkpoint of 35 MB in 16 bits instead of 350 GB
    assert trained(Transformer(gpt3, device="meta"), LoraConfig(rank=1)) == 4_718_592
    assert trained(Transformer(gpt3, device="meta"), LoraConfig(rank=8)) == 37_748_736
    assert trained(Transformer(gpt3, device="meta"), LoraConfig(rank=4)) * 2 / 2 ** 20 == 36.0


@pytest.mark.parametrize(("options", "message"), [
    (dict(targets=("q_prj",)), "no layer matches 'q_prj'. .*Names end in: down, embed, gate, head, k, out, q, up, v"),
    (dict(targets=("attention.w",)), "The nearest are attention"),
    (dict(rank=65, targets=("q",)), r"rank = 65 is above what blocks.0.attention.q of \(32, 32\) can have: at most 32"),
    (dict(rank=0), "rank = 0, alpha = 16.0: both must be above 0"),
    (dict(alpha=-1.0), "alpha = -1.0"),
    (dict(dropout=1.0), "dropout = 1.0: must be at least 0 and below 1"),
    (dict(targets=()), "names are needed"),
])
def test_what_cannot_be(options, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraConfig(**options))
    assert all(p.requires_grad for p in model.parameters())  # nothing was begun


def test_a_name_twice():
    model = small()
    add_lora(model)
    with pytest.raises(ValueError, match="an adapter called 'default' is there already"):
        add_lora(model)
    with pytest.raises(ValueError, match="has an adapter already: quantise first"):
        quantize_linears(model, group="row")
