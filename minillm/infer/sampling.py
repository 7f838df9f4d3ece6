"""From logits to the next token: each filter is a function on logits (B, V) that rules tokens out with -inf.

Order, as in Hugging Face's generate: repetition penalty, temperature, top-k, top-p, min-p, then one draw.
Sources: top-k arXiv:1805.04833, top-p arXiv:1904.09751, min-p arXiv:2407.01082, penalty arXiv:1909.05858 §4.1.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default draws from the model's own distribution."""

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the fewest most likely tokens whose probabilities reach p together."""
    min_p: float | None = None
    """Keep tokens at least min_p times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Make every token already in the text this many times less attractive (1 is off)."""

    def __post_init__(self):
        """Refuse values that mean nothing."""
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or above.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1, or None to keep every token.")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} = {value}: must be above 0 and at most 1, or None.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty}: must be above 0; 1 is off.")


def penalise_repetition(logits: Float[Tensor, "B V"], seen: Int[Tensor, "B T"],
                        penalty: float) -> Float[Tensor, "B V"]:
    """Divide the positive logits of tokens already seen by `penalty`, multiply the negative ones."""
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Rule out all but the k largest."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Rule out the tail: keep the fewest tokens, most likely first, whose probabilities sum to at least p."""
    ordered, places = logits.sort(descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # what the more likely tokens already cover
    return logits.masked_fill((before >= p).scatter(1, places, before >= p), -math.inf)


def keep_min_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Rule out tokens less likely than p times the most likely one."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def choose(logits: Float[Tensor, "B V"], sampling: Sampling, seen: Int[Tensor, "B T"],
           generator: torch.Generator | None = None) -> Int[Tensor, "B"]:
    """One token for every row. `seen` is the text so far, for the repetition penalty."""
    if sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
