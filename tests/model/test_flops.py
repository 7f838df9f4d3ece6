import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.model.families import PRESETS
from minillm.model.flops import forward_flops, matmul_weights, training_flops_per_token
from minillm.model.transformer import Transformer

CONFIGS = [ModelConfig(vocab_size=61, layers=3, width=40, heads=4, kv_heads=2, head_dim=6, ffn_width=56, context=32),
           ModelConfig(vocab_size=61, layers=2, width=48, heads=4, context=32, norm="layer", mlp="gelu", pos="learned",
                       bias=("qkv", "out", "mlp"), tied=False),
           ModelConfig(vocab_size=61, layers=2, width=48, heads=4, kv_heads=1, context=32, block="parallel", experts=4, top_k=3)]


# Mixtral's paper: of 46.7B parameters a token uses 12.9B, its embedding table counted
def test_published_active_parameters():
    config = PRESETS["mixtral-8x7b"]
    assert (matmul_weights(config) + config.vocab_size * config.width) / 1e9 == pytest.approx(12.9, abs=0.05)


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "gpt2", "experts"])
def test_the_formula_is_what_torch_counts(config):
    model, ids = Transformer(config), torch.zeros(1, 32, dtype=torch.long)
    # the path by hand multiplies the whole square, as the formula says; a fused causal kernel is counted differently
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, return_attention=True).logits
    assert counter.get_total_flops() == forward_flops(config, 32)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * forward_flops(config, 32)
    assert training_flops_per_token(config) == 3 * forward_flops(config, 32) / 32


def test_six_n_plus_twelve_ldt():
    config = CONFIGS[1]
    attention = 12 * config.layers * config.heads * config.head_size * config.context
    assert training_flops_per_token(config) == 6 * matmul_weights(config) + attention
