"""The loss of a language model: how surprised it is by the token that comes next, in nats.

Sums, not means: a batch may be read in microbatches and by many ranks, and the mean over all its targets is the sum of
the sums over the count of all; a mean of means would weigh a short text's tokens more.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over the targets of -ln p(target), in nats; targets of -100 do not count. In float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def token_log_probs(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """ln p(target) for each target, 0 where it is -100: the cross-entropy before it is added up, with the sign turned."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


def next_token_loss(logits: Float[Tensor, "B T V"], batch) -> Float[Tensor, ""]:
    """The pretraining loss of a batch: the sum over its targets, which the engine divides by `batch.count`."""
    return cross_entropy(logits, batch.targets)


def log_z_squared(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over the targets that count of ln²Z, where Z = Σ exp(logits) is the softmax's denominator.

    Softmax does not notice when all logits grow together, and in 16 bits large ones are coarse; this pulls Z towards 1.
    Source: PaLM, arXiv:2204.02311 §5, with 1e-4 in front.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1).square()[targets != IGNORED].sum()


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """A loss that does not depend on the tokenizer: the whole text's nats, in bits, over its length in bytes."""
    return nats / math.log(2) / text_bytes
