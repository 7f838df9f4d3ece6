"""What a model costs in floating-point operations, forward and backward, counted from the configuration alone.

Only matrix products count, two operations (multiply, add) for each weight and token; the rest is below one percent at
the widths people train. The backward pass takes two products for each one of the forward: the gradient of its input and
that of its weight. None is spared while the embedding is trained, since even the first layer's input needs a gradient.
Two habits of counting differ in attention. By default the whole T x T square counts, as in torch's FlopCounterMode, to
which this file is equal to the last operation; with `seen_only`, just the pairs that the mask lets through, which is what
a kernel that skips the others has to do. Source for 6N: arXiv:2001.08361 §2.1; with attention: arXiv:2204.02311 appendix B.
Left out: norms, softmax, activations, the optimizer's step.
"""

from dataclasses import asdict, dataclass

from minillm.config import ModelConfig


@dataclass(frozen=True)
class Parts:
    """Operations by what they are spent on. Parts add up, and multiply by a whole number."""

    projections: int = 0
    """q, k, v and the way out of attention."""
    scores: int = 0
    """Queries times keys, and weights times values: the only part that grows with the square of the text."""
    ffn: int = 0
    """The feed-forward layer; with experts, the top_k that a token goes through."""
    router: int = 0
    """What chooses the experts."""
    head: int = 0
    """The stream to logits."""

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def __mul__(self, factor: int) -> "Parts":
        return Parts(**{name: value * factor for name, value in asdict(self).items()})


def pairs(config: ModelConfig, layer: int, tokens: int, seen_only: bool = False) -> int:
    """Pairs of a query and a key in one layer: T², or those that causality and the layer's window let through.

    Seen with a window of W < T: the first W queries see 1, 2, ..., W keys, all others W.
    """
    if not seen_only:
        return tokens * tokens
    window = min(config.window, tokens) if config.layer_kind(layer) == "l" else tokens
    return window * (window + 1) // 2 + (tokens - window) * window


def layer_parts(config: ModelConfig, layer: int, tokens: int, seen_only: bool = False) -> Parts:
    """Forward operations of one block on one text of `tokens` tokens."""
    queries, keys = config.heads * config.head_size, config.kv_size * config.head_size
    expert = (3 if config.gated else 2) * config.width * config.ffn_size
    return Parts(projections=2 * tokens * config.width * (2 * queries + 2 * keys),
                 scores=4 * pairs(config, layer, tokens, seen_only) * queries,
                 ffn=2 * tokens * expert * (config.top_k if config.experts else 1),
                 router=2 * tokens * config.width * config.experts)


def forward_parts(config: ModelConfig, tokens: int, seen_only: bool = False) -> Parts:
    """Operations to read one text of `tokens` tokens: all blocks and the head."""
    blocks = (layer_parts(config, layer, tokens, seen_only) for layer in range(config.layers))
    return sum(blocks, Parts(head=2 * tokens * config.width * config.vocab_size))


def backward_parts(config: ModelConfig, tokens: int, seen_only: bool = False, fused: bool = False) -> Parts:
    """Operations of the backward pass of the same text, all weights trained: two for each one of the forward.

    fused: FlashAttention does not keep its scores and multiplies queries by keys again, so that attention takes five
    products instead of four. FlopCounterMode counts that for torch's fused CUDA kernels, and does not count the fused
    CPU kernel at all. Such repeated work is the machine's, not the model's: MFU leaves it out.
    """
    forward = forward_parts(config, tokens, seen_only)
    return forward * 2 + Parts(scores=forward.scores // 2 if fused else 0)


def matmul_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied by: all matrices, the head too, but no embedding, norm, bias or idle expert."""
    parts = forward_parts(config, 1)
    return (parts.total - parts.scores) // 2


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """Operations to read one text of `tokens` tokens: 2 per weight and token, and 4·T²·H·D a layer for attention."""
    return forward_parts(config, tokens).total


def training_flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """Operations per token of training: backward costs two forwards, so 3 in all: 6N + 12·L·H·D·T."""
    context = context or config.context
    return 3 * forward_flops(config, context) / context


def training_flops(parameters: float, tokens: float) -> float:
    """The rule of thumb: 6ND operations to train N parameters on D tokens, attention's scores left out."""
    return 6 * parameters * tokens


def utilisation(tokens_per_second: float, flops_per_token: float, peak: float, gpus: int = 1) -> float:
    """MFU: the share of the GPUs' peak (operations per second, each) that went into the model's own operations.

    tokens_per_second: of all GPUs together.   flops_per_token: forward and backward, nothing computed twice.
    """
    return tokens_per_second * flops_per_token / (gpus * peak)


def training_days(flops: float, gpus: int, peak: float, utilisation: float) -> float:
    """Days that `gpus` GPUs take, each at this share of its peak (operations per second).

    Raises: ValueError for a utilisation outside 0 to 1, or without GPUs.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation = {utilisation}: a share of the peak, above 0 and at most 1. 0.3 to 0.5 is usual.")
    if gpus < 1:
        raise ValueError(f"gpus = {gpus}: training needs at least 1.")
    return flops / (gpus * peak * utilisation) / 86_400
