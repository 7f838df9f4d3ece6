"""Random configurations that a published layout claims to express: Hugging Face's class must read them to the same logits."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm.config import ModelConfig
from minillm.model.families import PRESETS
from minillm.model.huggingface import layout_for, load_pretrained, save_pretrained
from minillm.model.transformer import Transformer

# One of these on top of a family: sometimes still expressible, sometimes in another family's layout, mostly in none.
TWISTS = [{}, {}, {"norm_eps": 1e-3}, {"rope_theta": 99.0}, {"attn_scale": 0.3}, {"logit_scale": 0.5}, {"attn_softcap": 4.0},
          {"logit_softcap": 3.0}, {"final_norm": False}, {"embed_norm": True}, {"pattern": "ggl", "window": 4}, {"tied": True}, {"tied": False},
          *({"mlp": mlp} for mlp in ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")),
          *({"bias": bias} for bias in ((), ("qkv",), ("qkv", "out"), ("mlp", "norm"), ("qkv", "out", "mlp", "norm", "head"))),
          *({"qk_norm": kind} for kind in ("none", "head", "full")),
          *({"block": block} for block in ("pre", "parallel", "parallel2", "sandwich", "branch", "post"))]


def draw(rng: random.Random) -> ModelConfig:
    """A small model of some family with odd sizes and a twist. Raises: ValueError for what cannot be."""
    base = PRESETS[rng.choice([name for name in PRESETS if name != "first"])]
    groups = rng.choice([1, 2, 3])
    heads, size = groups * rng.randint(1, 3), 4 * rng.randint(1, 3)
    width = heads * size
    sizes = dict(vocab_size=60, layers=rng.randint(1, 4), width=width, heads=heads, kv_heads=rng.choice([groups, None]), context=64,
                 head_dim=rng.choice([None, 4 * rng.randint(1, 3)]), ffn_width=rng.choice([None, 4 * width, 52]))
    if base.rope_dim:
        sizes["rope_dim"] = rng.choice([2, None])
    if base.window:
        sizes["window"] = rng.choice([3, 9])
    if base.experts:
        sizes |= dict(experts=4, top_k=rng.randint(1, 4))
    if base.embed_scale != 1:
        sizes["embed_scale"] = rng.choice([width ** 0.5, 1.0])
    if base.rope_scaling != "none":
        sizes |= dict(rope_context=rng.choice([16, None]), rope_factor=4.0)
    return replace(base, **sizes | rng.choice(TWISTS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_what_a_layout_claims_it_keeps(seed, tmp_path):
    rng, tried = random.Random(seed), 0
    while tried < 25:
        try:
            config = draw(rng)
        except ValueError:
            continue
        layout = layout_for(config)
        if layout is None or layout.model_type == "chatglm":  # transformers has no class for ChatGLM-6B
            continue
        tried += 1
        model = Transformer(config, seed=tried).eval()
        generator = torch.Generator().manual_seed(tried)
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        ids = torch.randint(1, 60, (2, 16), generator=generator)
        folder = tmp_path / str(tried)
        save_pretrained(model, folder)
        expected, theirs = model(ids), AutoModelForCausalLM.from_pretrained(folder).eval()
        # float32: the same sums in another order, so 7 digits of the largest numbers that were summed
        close = dict(rtol=1e-4, atol=2e-5 * max(1, expected.abs().max().item()), msg=lambda text: f"{layout.model_type} {config}: {text}")
        torch.testing.assert_close(theirs(ids).logits, expected, **close)
        torch.testing.assert_close(load_pretrained(folder)(ids), expected, **close)
