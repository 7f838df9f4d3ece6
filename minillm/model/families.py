"""Presets: every family is data, written as a difference from its ancestor, and every size as a few numbers.

The history of the decoder is the source below: read each `replace` as what that paper changed. Sizes are those of the
first published model of a family; the others follow at the end. All inherit GPT-2's smaller initial residual projections,
since most papers do not say how they began.
"""

import difflib
from dataclasses import fields, replace

from minillm.config import ModelConfig

# GPT-1 (2018): the Transformer's decoder alone, with learned positions; the norm after each addition, none at the end.
gpt1 = ModelConfig(vocab_size=40_478, layers=12, width=768, heads=12, context=512, block="post", norm="layer", final_norm=False,
                   mlp="gelu_tanh", pos="learned", bias=("qkv", "out", "mlp", "norm"), tied=True)
# GPT-2 (2019): the norm moves before each part, and one more stands before the head; deep stacks train without care.
gpt2 = replace(gpt1, vocab_size=50_257, context=1024, block="pre", final_norm=True)
# GPT-3 (arXiv:2005.14165): every other layer looks back a band only. The width of the band was not published.
gpt3 = replace(gpt2, layers=96, width=12_288, heads=96, context=2048, pattern="gl", window=256)
# Megatron-Turing NLG (arXiv:2201.11990): GPT-2's architecture at 530B.
mt_nlg = replace(gpt2, vocab_size=51_200, layers=105, width=20_480, heads=128, context=2048)
# OPT (arXiv:2205.01068): GPT-3's size and GPT-2's dense layers, with ReLU.
opt = replace(gpt2, vocab_size=50_272, layers=24, width=2048, heads=32, context=2048, mlp="relu")
# BLOOM (arXiv:2211.05100): ALiBi instead of positions to learn, and a norm after the embedding that calmed bf16.
bloom = replace(gpt2, vocab_size=250_880, layers=70, width=14_336, heads=112, context=2048, pos="alibi", embed_norm=True)

# GPT-J (2021): both parts side by side from one norm, so that their products fuse; rotary positions on a part of each head.
gptj = replace(gpt2, vocab_size=50_400, layers=28, width=4096, heads=16, context=2048, block="parallel", pos="rope", rope_dim=64,
               bias=("mlp", "norm", "head"), tied=False)
# GPT-NeoX (arXiv:2204.06745): a norm for each part again, and biases everywhere.
neox = replace(gptj, vocab_size=50_432, layers=44, width=6144, heads=64, block="parallel2", rope_dim=24, bias=("qkv", "out", "mlp", "norm"))
# PaLM (arXiv:2204.02311): SwiGLU, one KV head, no bias at all, one table for embedding and head.
palm = replace(gptj, vocab_size=256_000, layers=118, width=18_432, heads=48, head_dim=256, kv_heads=1, ffn_width=4 * 18_432,
               mlp="swiglu", rope_dim=None, bias=(), tied=True, logit_scale=18_432 ** -0.5)
# Falcon (arXiv:2311.16867): PaLM with a plain feed-forward layer; from 40B on two norms, and KV heads for each of 8 GPUs.
falcon = replace(palm, vocab_size=65_024, layers=32, width=4544, heads=71, head_dim=None, ffn_width=None, mlp="gelu", bias=("norm",),
                 logit_scale=1.0)
falcon_40b = replace(falcon, layers=60, width=8192, heads=128, kv_heads=8, block="parallel2")

# ChatGLM-6B (2023): post-norm again, calmed by DeepNorm's multiplied stream; a prompt read in both directions, and two
# positions for every token.
chatglm = replace(bloom, vocab_size=130_528, layers=28, width=4096, heads=32, block="post", final_norm=False, residual_alpha=56 ** 0.5,
                  pos="rope", rope_axes=2)

# LLaMA (arXiv:2302.13971): RMSNorm, rotary positions, a gated feed-forward layer, no bias anywhere, a head of its own.
llama = replace(gpt2, vocab_size=32_000, layers=32, width=4096, heads=32, ffn_width=11_008, context=2048, norm="rms", norm_eps=1e-6,
                mlp="swiglu", pos="rope", bias=(), tied=False)
# LLaMA 2 (arXiv:2307.09288): twice the context; the largest shares its KV heads.
llama2 = replace(llama, norm_eps=1e-5, context=4096)
# LLaMA 3 (arXiv:2407.21783): shared KV heads everywhere, four times the vocabulary, slower rotation; 3.1 stretches it by 8.
llama3 = replace(llama2, vocab_size=128_256, kv_heads=8, ffn_width=14_336, context=8192, rope_theta=500_000.0)
llama31 = replace(llama3, context=131_072, rope_scaling="llama3", rope_factor=8.0, rope_context=8192, rope_fast=4.0)
# Mistral (arXiv:2310.06825): a window in every layer; what is further back comes in through the layers below.
mistral = replace(llama2, kv_heads=8, ffn_width=14_336, context=32_768, pattern="l", window=4096)
# Mixtral (arXiv:2401.04088): 8 feed-forward layers, two for each token; no window after all.
mixtral = replace(mistral, rope_theta=1e6, pattern="g", window=None, experts=8, top_k=2)
# Qwen 2 (arXiv:2407.10671) and 3 (arXiv:2505.09388): biases on q, k and v; then a norm of each head instead.
qwen2 = replace(llama2, vocab_size=152_064, layers=28, width=3584, heads=28, kv_heads=4, ffn_width=18_944, context=131_072,
                norm_eps=1e-6, rope_theta=1e6, bias=("qkv",))
qwen3 = replace(qwen2, vocab_size=151_936, layers=36, width=4096, heads=32, kv_heads=8, head_dim=128, ffn_width=12_288, context=40_960,
                bias=(), qk_norm="head")
qwen3_moe = replace(qwen3, layers=48, width=2048, kv_heads=4, ffn_width=768, experts=128, top_k=8)
# OLMoE (arXiv:2409.02060) and OLMo 2 (arXiv:2501.00656): a norm over all heads at once; norms only after each part.
olmoe = replace(llama2, vocab_size=50_304, layers=16, width=2048, heads=16, ffn_width=1024, qk_norm="full", experts=64, top_k=8,
                norm_topk=False)
olmo2 = replace(llama2, vocab_size=100_352, norm_eps=1e-6, rope_theta=500_000.0, block="branch", qk_norm="full")
# GLM-4 9B (arXiv:2406.12793): half of each head rotated, biases on q, k and v; its 0414 release norms after each part, too.
glm = replace(llama2, vocab_size=151_552, layers=40, kv_heads=2, ffn_width=13_696, context=131_072, norm_eps=1.5625e-7, rope_dim=64,
              bias=("qkv",))
glm4 = replace(glm, context=32_768, norm_eps=1e-5, block="sandwich")
# Gemma (arXiv:2403.08295): GeGLU, one table that is scaled up for the embedding. 2 (arXiv:2408.00118): norms around each
# part, soft caps, every other layer with a window. 3 (arXiv:2503.19786): normed heads instead of caps, one global layer in six.
gemma = replace(llama2, vocab_size=256_000, layers=18, width=2048, heads=8, kv_heads=1, head_dim=256, ffn_width=16_384, context=8192,
                norm_eps=1e-6, mlp="geglu", tied=True, embed_scale=2048 ** 0.5)
gemma2 = replace(gemma, layers=26, width=2304, kv_heads=4, ffn_width=9216, embed_scale=48.0, block="sandwich", pattern="lg", window=4096,
                 attn_scale=1 / 16, attn_softcap=50.0, logit_softcap=30.0)
gemma3 = replace(gemma2, vocab_size=262_144, width=1152, heads=4, kv_heads=1, ffn_width=6912, context=32_768, embed_scale=1152 ** 0.5,
                 pattern="lllllg", window=512, rope_theta=1e6, rope_theta_local=1e4, qk_norm="head", attn_softcap=None, logit_softcap=None)

# The course's own: LLaMA small enough to train in two minutes on two cores. With a vocabulary this small the head
# shares the embedding, as small models do.
first = replace(llama, vocab_size=1024, layers=4, width=128, heads=4, ffn_width=None, context=256, norm_eps=1e-5, tied=True)


def _of(family: ModelConfig, layers: int, width: int, heads: int, **others) -> ModelConfig:
    """Another size of a family; the embedding's scale and the logits' follow the width."""
    scales = {"embed_scale": width ** 0.5} if family.embed_scale != 1 else {}
    scales |= {"logit_scale": width ** -0.5} if family.logit_scale != 1 else {}
    return replace(family, layers=layers, width=width, heads=heads, **scales, **others)


PRESETS: dict[str, ModelConfig] = {
    "first": first,
    "gpt1": gpt1,
    "gpt2": gpt2, "gpt2-medium": _of(gpt2, 24, 1024, 16), "gpt2-large": _of(gpt2, 36, 1280, 20), "gpt2-xl": _of(gpt2, 48, 1600, 25),
    "gpt3-6.7b": _of(gpt3, 32, 4096, 32), "gpt3-13b": _of(gpt3, 40, 5120, 40), "gpt3": gpt3,
    "mt-nlg": mt_nlg,
    "opt-1.3b": opt, "opt-13b": _of(opt, 40, 5120, 40),
    "bloom-560m": _of(bloom, 24, 1024, 16), "bloom-7b": _of(bloom, 30, 4096, 32), "bloom": bloom,
    "gptj": gptj, "gpt-neox": neox,
    "palm-8b": _of(palm, 32, 4096, 16, ffn_width=4 * 4096), "palm-62b": _of(palm, 64, 8192, 32, ffn_width=4 * 8192), "palm": palm,
    "falcon-7b": falcon, "falcon-40b": falcon_40b,
    "chatglm-6b": chatglm, "glm-4-9b": glm, "glm-4-9b-0414": glm4,
    "llama-7b": llama, "llama-13b": _of(llama, 40, 5120, 40, ffn_width=13_824), "llama-33b": _of(llama, 60, 6656, 52, ffn_width=17_920),
    "llama-65b": _of(llama, 80, 8192, 64, ffn_width=22_016),
    "llama2-7b": llama2, "llama2-70b": _of(llama2, 80, 8192, 64, kv_heads=8, ffn_width=28_672),
    "llama3-8b": llama3, "llama3.1-8b": llama31, "llama3.1-70b": _of(llama31, 80, 8192, 64, ffn_width=28_672),
    "llama3.1-405b": _of(llama31, 126, 16_384, 128, ffn_width=53_248),
    "llama3.2-1b": _of(llama31, 16, 2048, 32, ffn_width=8192, rope_factor=32.0, tied=True),
    "mistral-7b": mistral, "mixtral-8x7b": mixtral,
    "qwen2-7b": qwen2, "qwen3-0.6b": _of(qwen3, 28, 1024, 16, ffn_width=3072, tied=True), "qwen3-8b": qwen3, "qwen3-30b-a3b": qwen3_moe,
    "olmoe-1b-7b": olmoe, "olmo2-7b": olmo2,
    "gemma-2b": gemma, "gemma-7b": _of(gemma, 28, 3072, 16, kv_heads=16, ffn_width=24_576),
    "gemma2-2b": gemma2, "gemma2-9b": _of(gemma2, 42, 3584, 16, kv_heads=8, ffn_width=14_336),
    "gemma2-27b": _of(gemma2, 46, 4608, 32, kv_heads=16, head_dim=128, ffn_width=36_864, attn_scale=1 / 12),
    "gemma3-1b": gemma3,
}

BY_SIZE = {"gpt1-117m": "gpt1", "gpt2-124m": "gpt2", "gpt2-1.5b": "gpt2-xl", "gpt3-175b": "gpt3", "mt-nlg-530b": "mt-nlg",
           "bloom-176b": "bloom", "gptj-6b": "gptj", "gpt-neox-20b": "gpt-neox", "palm-540b": "palm"}
"""Other names of presets that are known by their size as well."""

SIZES = ("vocab_size", "layers", "width", "heads", "head_dim", "ffn_width", "context", "norm_eps", "rope_context")


def preset(name: str, **changes) -> ModelConfig:
    """The configuration of that name, with any fields changed: `preset("gpt2", layers=2)`.

    Raises: ValueError for an unknown name, with the nearest known one.
    """
    name = BY_SIZE.get(name, name)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, [*PRESETS, *BY_SIZE], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no preset is called {name!r}.{hint} There are: {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)


def changes(ancestor: ModelConfig, family: ModelConfig) -> dict[str, tuple]:
    """What an architecture changed: field -> (before, after), sizes left out."""
    return {f.name: (getattr(ancestor, f.name), getattr(family, f.name)) for f in fields(ModelConfig)
            if f.name not in SIZES and getattr(ancestor, f.name) != getattr(family, f.name)}
