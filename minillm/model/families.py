"""Presets: every family is data, written as a difference from its ancestor, and every size as a few numbers.

The history of the decoder is the source below: read each `replace` as what that paper changed.
"""

import difflib
from dataclasses import replace

from minillm.config import ModelConfig

# GPT-2: a norm before each part, learned positions, biases everywhere but in the head, which is the embedding.
gpt2 = ModelConfig(vocab_size=50_257, layers=12, width=768, heads=12, context=1024, norm="layer", mlp="gelu_tanh",
                   pos="learned", bias=("qkv", "out", "mlp", "norm"), tied=True, init_residual=True)

# LLaMA: RMSNorm, rotary positions, a gated feed-forward layer, no bias anywhere, a head of its own.
llama = replace(gpt2, vocab_size=32_000, layers=32, width=4096, heads=32, ffn_width=11_008, context=2048, norm="rms",
                norm_eps=1e-6, mlp="swiglu", pos="rope", bias=(), tied=False, init_residual=False)

# The course's own: LLaMA small enough to train in two minutes on two cores. With a vocabulary this small the head
# shares the embedding, as small models do.
first = replace(llama, vocab_size=1024, layers=4, width=128, heads=4, ffn_width=None, context=256, norm_eps=1e-5,
                tied=True, init_residual=True)

PRESETS: dict[str, ModelConfig] = {
    "first": first,
    "gpt2": gpt2,
    "gpt2-medium": replace(gpt2, layers=24, width=1024, heads=16),
    "gpt2-large": replace(gpt2, layers=36, width=1280, heads=20),
    "gpt2-xl": replace(gpt2, layers=48, width=1600, heads=25),
    "llama-7b": llama,
    "llama-13b": replace(llama, layers=40, width=5120, heads=40, ffn_width=13_824),
    "llama-33b": replace(llama, layers=60, width=6656, heads=52, ffn_width=17_920),
    "llama-65b": replace(llama, layers=80, width=8192, heads=64, ffn_width=22_016),
    "llama2-70b": replace(llama, layers=80, width=8192, heads=64, kv_heads=8, ffn_width=28_672, context=4096,
                          norm_eps=1e-5),
}


def preset(name: str, **changes) -> ModelConfig:
    """The configuration of that name, with any fields changed: `preset("gpt2", layers=2)`.

    Raises: ValueError for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no preset is called {name!r}.{hint} There are: {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
