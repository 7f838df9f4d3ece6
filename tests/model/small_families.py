"""A tiny Hugging Face model of every family, with odd sizes: grouped heads, a head size that is not width / heads, heads
that are no power of two, windows shorter than the text. Used by the tests of loading, saving and caching."""

import transformers as hf

ENDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
MODERN = dict(vocab_size=67, hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=50,
              max_position_embeddings=64, **ENDS)
WIDE = MODERN | dict(head_dim=10)
EXPERT_WIDTH = dict(intermediate_size=52)  # their grouped product wants rows of 16 bytes
OLDER = dict(vocab_size=67, n_embd=36, n_layer=3, n_head=3, n_positions=40, **ENDS)
LLAMA31 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, rope_theta=100.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=100.0, beta_fast=8.0, beta_slow=0.5)
TYPES = ["sliding_attention", "sliding_attention", "full_attention"]

FAMILIES = {
    "gpt1": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**OLDER)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OLDER)),
    "gpt2, exact gelu, narrow, untied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
        **OLDER, n_inner=30, activation_function="gelu", layer_norm_epsilon=1e-3, tie_word_embeddings=False)),
    "gpt_neo, banded": lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(
        vocab_size=67, hidden_size=36, num_layers=4, num_heads=3, max_position_embeddings=40, window_size=5,
        attention_types=[[["global", "local"], 2]], **ENDS)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**OLDER | dict(n_head=3), rotary_dim=4)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
        vocab_size=67, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50, max_position_embeddings=64,
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.25), **ENDS)),
    "gpt_neox, one after the other": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
        vocab_size=67, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, use_parallel_residual=False,
        attention_bias=False, rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5), **ENDS)),
    "bloom, 6 heads": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=67, hidden_size=36, n_layer=3, n_head=6, **ENDS)),
    "falcon 7b": lambda: hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=67, hidden_size=36, num_hidden_layers=3, num_attention_heads=6, multi_query=True, **ENDS)),
    "falcon 40b": lambda: hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=67, hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_kv_heads=2, new_decoder_architecture=True, **ENDS)),
    "falcon, one norm, grouped": lambda: hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=67, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, num_kv_heads=3, new_decoder_architecture=True,
        num_ln_in_parallel_attn=1, bias=True, **ENDS)),
    "falcon, one after the other": lambda: hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=67, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, multi_query=False, parallel_attn=False, bias=True, **ENDS)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=67, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, ffn_dim=50, max_position_embeddings=40,
        word_embed_proj_dim=36, bos_token_id=0, eos_token_id=0, pad_token_id=1)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**MODERN | dict(num_key_value_heads=6))),
    "llama, grouped, wide heads, biases, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(
        **WIDE, attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="default", rope_theta=500.0), tie_word_embeddings=True)),
    "llama 3.1": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, rope_parameters=LLAMA31)),
    "llama, interpolated": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(
        **MODERN, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=100.0))),
    "llama, yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, rope_parameters=YARN)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WIDE, sliding_window=5)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WIDE | EXPERT_WIDTH, num_local_experts=5, num_experts_per_tok=2, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**WIDE)),
    "qwen2, some layers with a window": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(
        **MODERN, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(
        **WIDE, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**MODERN | EXPERT_WIDTH, num_experts=4, num_experts_per_tok=2)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**WIDE)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**WIDE | dict(num_key_value_heads=1))),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WIDE, query_pre_attn_scalar=7, sliding_window=5, attn_logit_softcapping=5.0,
                                                           final_logit_softcapping=3.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(
        **WIDE, query_pre_attn_scalar=12, sliding_window=5, layer_types=TYPES,
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
                             sliding_attention=dict(rope_type="default", rope_theta=50.0)))),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**MODERN | dict(head_dim=12))),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**MODERN | dict(head_dim=12))),
    "glm4, whole heads turned": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(
        **MODERN | dict(head_dim=12), rope_parameters=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=1.0))),
    "gemma3, no window anywhere": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WIDE, query_pre_attn_scalar=12, layer_types=TYPES[2:] * 3)),
    "mistral, no window, heads that do not divide the width": lambda: hf.MistralForCausalLM(hf.MistralConfig(
        **WIDE | dict(hidden_size=34), sliding_window=None)),
    "cohere, one KV head (PaLM)": lambda: hf.CohereForCausalLM(hf.CohereConfig(**WIDE | dict(num_key_value_heads=1), logit_scale=0.5)),
}

# As the classes come, but for sizes: what a config.json leaves out, it means like this.
PLAIN = {
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(vocab_size=67, hidden_size=36, num_layers=24, num_heads=3, **ENDS)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**OLDER | dict(n_embd=192))),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
        vocab_size=67, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, **ENDS)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(vocab_size=67, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, **ENDS)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**WIDE, num_experts=9, moe_intermediate_size=20)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**MODERN | EXPERT_WIDTH, num_experts=9)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**WIDE | EXPERT_WIDTH)),
} | {name: lambda model=model, config=config: getattr(hf, model)(getattr(hf, config)(**MODERN)) for name, model, config in (
    ("llama", "LlamaForCausalLM", "LlamaConfig"), ("mistral", "MistralForCausalLM", "MistralConfig"), ("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config"), ("cohere", "CohereForCausalLM", "CohereConfig"))
} | {name: lambda model=model, config=config: getattr(hf, model)(getattr(hf, config)(**WIDE | dict(head_dim=12))) for name, model, config in (
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config"), ("gemma", "GemmaForCausalLM", "GemmaConfig"), ("gemma2", "Gemma2ForCausalLM", "Gemma2Config"),
    ("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig"), ("glm", "GlmForCausalLM", "GlmConfig"), ("glm4", "Glm4ForCausalLM", "Glm4Config"))}
