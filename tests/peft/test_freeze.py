import pytest
from small import gradients_flow_only_where_they_should, small

from minillm.nn.quantize import quantize_linears
from minillm.peft.freeze import base_parameters, count_trained, freeze, train_all, train_only_biases, trained_parameters
from minillm.peft.lora import add_lora


def test_only_biases():
    model = small("gpt2")
    train_only_biases(model)
    assert all(name.endswith("bias") for name in trained_parameters(model)) and len(trained_parameters(model)) == 2 * 8 + 1
    gradients_flow_only_where_they_should(small_biases())
    with pytest.raises(ValueError, match="no bias at all, so there is nothing for BitFit"):
        train_only_biases(small("first"))


def small_biases():
    """A bias of keys adds the same to all scores of a query, so it has no gradient: leave it out."""
    model = small("gpt2")
    train_only_biases(model)
    for block in model.blocks:
        block.attention.k.bias.requires_grad_(False)
    return model


def test_everything_and_nothing():
    model = small()
    total = count_trained(model)
    assert total.trained == total.total == sum(p.numel() for p in model.parameters()) and total.share == 1
    add_lora(model)
    added = count_trained(model)
    assert added.total == total.total + added.trained and set(base_parameters(model)) == set(base_parameters(small()))
    train_all(model)
    assert count_trained(model).share == 1
    freeze(model)
    assert count_trained(model) == added


def test_packed_weights_are_counted():
    model = small(width=64, ffn_width=64)
    total = count_trained(model).total
    quantize_linears(model)
    assert count_trained(model).total == total
