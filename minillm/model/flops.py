"""What a token costs in floating-point operations, counted from the configuration alone.

Only matrix products count, two operations (multiply, add) for each weight and token; the rest is below one percent at
the widths people train. Attention counts the whole T x T square, as torch's FlopCounterMode does: a causal kernel may
skip half of it. Source for 6N: arXiv:2001.08361 §2.1.
"""

from minillm.config import ModelConfig


def matmul_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied by: all matrices, the head too, but no embedding, norm, bias or idle expert."""
    queries, keys = config.heads * config.head_size, config.kv_size * config.head_size
    attention = config.width * (queries + 2 * keys) + queries * config.width
    ffn = (3 if config.gated else 2) * config.width * config.ffn_size
    if config.experts:  # each token goes through top_k of them, and through the router
        ffn = config.top_k * ffn + config.width * config.experts
    return config.layers * (attention + ffn) + config.width * config.vocab_size


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """Operations to read one text of `tokens` tokens: 2 per weight and token, and 4·T²·H·D a layer for attention."""
    attention = 4 * config.layers * tokens * tokens * config.heads * config.head_size
    return 2 * matmul_weights(config) * tokens + attention


def training_flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """Operations per token of training: backward costs two forwards, so 3 in all: 6N + 12·L·H·D·T."""
    context = context or config.context
    return 3 * forward_flops(config, context) / context
