from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from minillm.config import ModelConfig
from minillm.model.families import PRESETS, preset
from minillm.model.flops import (Parts, backward_parts, forward_flops, forward_parts, layer_parts, matmul_weights, pairs,
                                 training_days, training_flops, training_flops_per_token, utilisation)
from minillm.model.transformer import Transformer
from minillm.nn.masks import combine

gpt2 = ModelConfig(vocab_size=61, layers=2, width=48, heads=4, context=32, norm="layer", mlp="gelu", pos="learned",
                   bias=("qkv", "out", "mlp"), tied=False)
CONFIGS = {
    "gpt2": gpt2,
    "gpt1": replace(gpt2, block="post", final_norm=False, tied=True),
    "llama": ModelConfig(vocab_size=61, layers=3, width=40, heads=4, kv_heads=2, head_dim=6, ffn_width=56, context=32),
    "parallel": ModelConfig(vocab_size=61, layers=2, width=48, heads=4, kv_heads=1, context=32, block="parallel", mlp="gelu"),
    "banded": ModelConfig(vocab_size=61, layers=3, width=48, heads=4, kv_heads=2, context=32, pattern="gl", window=5),
    "experts": ModelConfig(vocab_size=61, layers=2, width=48, heads=4, kv_heads=1, context=32, block="parallel", experts=4,
                           top_k=3),
}
every = pytest.mark.parametrize("name", CONFIGS)
ATEN = torch.ops.aten
T = 32


def counted(model: Transformer, mapping: dict | None = None, **asked) -> tuple[FlopCounterMode, FlopCounterMode]:
    """torch's counts of one text's forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        out = model(torch.zeros(1, T, dtype=torch.long), **asked)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        (out.logits if asked else out).sum().backward()
    return forward, backward


# All comparisons with torch are of whole numbers, and exact.

@every
@pytest.mark.parametrize("way", ["by hand", "math"])
def test_the_formula_is_what_torch_counts(name, way):
    config, asked = CONFIGS[name], {"return_attention": True} if way == "by hand" else {}
    with sdpa_kernel(SDPBackend.MATH):
        forward, backward = counted(Transformer(config), **asked)
    assert forward.get_total_flops() == forward_flops(config, T) == forward_parts(config, T).total
    assert backward.get_total_flops() == 2 * forward_flops(config, T) == backward_parts(config, T).total
    assert training_flops_per_token(config) == 3 * forward_flops(config, T) / T


@every
def test_each_part_is_what_torch_counts_in_its_module(name):
    config = CONFIGS[name]
    forward, _ = counted(Transformer(config), return_attention=True)
    of_module = {module: sum(counts.values()) for module, counts in forward.get_flop_counts().items()}
    parts = [layer_parts(config, layer, T) for layer in range(config.layers)]
    for layer, own in enumerate(parts):
        block = f"Transformer.blocks.{layer}"
        assert of_module[f"{block}.attention"] == own.projections + own.scores
        assert sum(of_module[f"{block}.attention.{matrix}"] for matrix in ("q", "k", "v", "out")) == own.projections
        assert of_module[f"{block}.ffn"] == own.ffn + own.router
        assert of_module.get(f"{block}.ffn.router", 0) == own.router and bool(own.router) == bool(config.experts)
    assert of_module["Transformer.head"] == forward_parts(config, T).head
    assert sum(parts, Parts(head=forward_parts(config, T).head)) == forward_parts(config, T)


def test_fused_attention_multiplies_five_times_backward():
    """torch's own formulas for fused kernels, put on the CPU's, which FlopCounterMode otherwise passes over."""
    def forward(q, k, v, *_, out_shape=None, **__):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *_, out_shape=None, **__):
        return sdpa_backward_flop_count(grad, q, k, v)

    mapping = {ATEN._scaled_dot_product_flash_attention_for_cpu: forward,
               ATEN._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    grouped = torch.__version__ >= "2.13"  # older formulas refuse fewer KV heads than query heads
    for name in ("gpt2", "llama", "banded") if grouped else ("gpt2",):
        config = CONFIGS[name]
        first, second = counted(Transformer(config), mapping)
        assert first.get_total_flops() == forward_flops(config, T)
        assert second.get_total_flops() == backward_parts(config, T, fused=True).total
        assert backward_parts(config, T, fused=True).scores == 2.5 * forward_parts(config, T).scores
        first, second = counted(Transformer(config))
        assert first.get_total_flops() == forward_flops(config, T) - forward_parts(config, T).scores
        assert second.get_total_flops() == backward_parts(config, T).total - backward_parts(config, T).scores


@pytest.mark.parametrize(("block", "spared"), [("pre", False), ("post", True), ("branch", True)])
def test_a_frozen_embedding_spares_the_first_input_gradient_only_where_no_norm_stands_before_it(block, spared):
    config = replace(CONFIGS["llama"], block=block, tied=False)
    model = Transformer(config)
    model.embed.requires_grad_(False)
    _, backward = counted(model, return_attention=True)
    first = 2 * T * config.width * (config.heads + 2 * config.kv_size) * config.head_size
    assert backward.get_total_flops() == backward_parts(config, T).total - (first if spared else 0)


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 32])
def test_seen_pairs_are_those_of_the_mask(tokens):
    config = CONFIGS["banded"]
    for layer, window in enumerate((None, config.window, None)):
        mask = combine(tokens, tokens, prefix_len=0, window=window)
        assert pairs(config, layer, tokens, seen_only=True) == int(mask.sum()) and pairs(config, layer, tokens) == tokens ** 2
    whole, seen = forward_parts(config, tokens), forward_parts(config, tokens, seen_only=True)
    assert {**asdict(whole), "scores": 0} == {**asdict(seen), "scores": 0}
    assert seen.scores == 4 * config.heads * config.head_size * sum(pairs(config, layer, tokens, True) for layer in range(3))
    assert backward_parts(config, tokens, seen_only=True) == seen * 2


def test_six_n_plus_twelve_ldt():
    config = CONFIGS["gpt2"]
    attention = 12 * config.layers * config.heads * config.head_size * config.context
    assert training_flops_per_token(config) == 6 * matmul_weights(config) + attention
    assert training_flops(matmul_weights(config), 1000) == 1000 * (training_flops_per_token(config) - attention)


# --- Published numbers; each tolerance is the rounding of what was printed ----------------------------------------------

# Mixtral's paper: of 46.7B parameters a token uses 12.9B, its embedding table counted
def test_published_active_parameters():
    config = PRESETS["mixtral-8x7b"]
    assert (matmul_weights(config) + config.vocab_size * config.width) / 1e9 == pytest.approx(12.9, abs=0.05)


# arXiv:2005.14165 table D.1: parameters, tokens, operations
@pytest.mark.parametrize(("parameters", "flops"), [(125e6, 2.25e20), (6_660e6, 1.20e22), (12_850e6, 2.31e22),
                                                   (174_600e6, 3.14e23)])
def test_gpt3s_table_of_compute(parameters, flops):
    assert training_flops(parameters, 300e9) == pytest.approx(flops, rel=0.005)


V100, A100, TPU4 = 125e12, 312e12, 275e12  # minillm/plan/devices.py has their sources


def test_gpt3_in_a_month_on_ten_thousand_v100s_would_be_a_tenth_of_their_peak():
    a_month = utilisation(300e9 / (30 * 86_400), training_flops(175e9, 1), V100, 10_000)
    assert a_month == pytest.approx(0.10, abs=0.005)
    # arXiv:2104.10350 table 4 has 24.6 TFLOP/s for each V100, a fifth of the peak, and so 14.8 days
    assert training_days(3.14e23, 10_000, V100, 24.6e12 / V100) == pytest.approx(14.8, abs=0.05)


def test_llama_65b_took_21_days():
    """arXiv:2302.13971 §2.4: 380 tokens/s on each of 2,048 A100s, about 21 days; table 15: 1,022,362 GPU-hours."""
    config, tokens, gpus = preset("llama-65b"), 1.4e12, 2048
    bare = utilisation(380, 6 * matmul_weights(config), A100)
    whole = utilisation(380, training_flops_per_token(config), A100)
    assert (round(bare, 3), round(whole, 3)) == (0.475, 0.495)
    days = training_days(tokens * training_flops_per_token(config), gpus, A100, whole)
    assert days == pytest.approx(tokens / 380 / gpus / 86_400)  # the same sum twice: float rounding only
    assert round(days) == 21 and days * 24 * gpus == pytest.approx(1_022_362, rel=0.005)  # "around 380": two digits


def test_palms_mfu():
    """arXiv:2204.02311 §4.1 and appendix B: 238.3K tokens/s on 6,144 TPU v4; MT-NLG's 65.43K on 2,240 A100s."""
    palm, mt_nlg = preset("palm"), preset("mt-nlg")
    assert utilisation(238.3e3, training_flops(540.35e9, 1), TPU4, 6144) == pytest.approx(0.457, abs=5e-4)
    assert utilisation(238.3e3, 6 * matmul_weights(palm), TPU4, 6144) == pytest.approx(0.457, abs=5e-4)
    assert utilisation(238.3e3, training_flops_per_token(palm), TPU4, 6144) == pytest.approx(0.462, abs=5e-4)
    assert utilisation(65.43e3, training_flops(530e9, 1), A100, 2240) == pytest.approx(0.297, abs=1e-3)  # 29.77, cut not rounded
    assert utilisation(65.43e3, training_flops_per_token(mt_nlg), A100, 2240) == pytest.approx(0.302, abs=1e-3)


def test_chinchilla():
    """arXiv:2203.15556: 70B parameters, 1.4T tokens, the compute of Gopher's 280B on 300B tokens (5.76e23)."""
    assert 1.4e12 / 70e9 == 20
    assert training_flops(70e9, 1.4e12) == pytest.approx(5.76e23, rel=0.03)  # they count in more detail than 6ND


def test_days_need_a_share_and_a_gpu():
    for share in (0, -0.1, 1.5, 40):
        with pytest.raises(ValueError, match=f"utilisation = {share}"):
            training_days(1e20, 8, A100, share)
    with pytest.raises(ValueError, match="gpus = 0"):
        training_days(1e20, 0, A100, 0.4)
