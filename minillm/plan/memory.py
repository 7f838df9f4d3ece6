"""What training keeps for every parameter, whatever the batch: weights, gradients, master copies, AdamW's two moments.

With weights in 16 bits it is the gradient that conventions disagree on; minillm/train/master_weights.py does all three.
Left out: activations, which depend on the batch and the context, buffers of communication, and fragmentation.
Sources: arXiv:1910.02054 §3.1 (half), Megatron-LM's distributed optimizer (float).
"""

import math
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class States:
    """Bytes by what they hold, of one parameter or of a whole model."""

    weights: int
    gradients: int
    master: int
    """Float32 copies of weights that are kept in 16 bits."""
    moments: int
    """AdamW's running means of the gradient and of its square, in float32."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


CONVENTIONS = {
    "fp32": States(4, 4, 0, 4 + 4),  # also what autocast keeps: its 16-bit copies live as long as a layer runs
    "half": States(2, 2, 4, 4 + 4),  # ZeRO's 16
    "float": States(2, 4, 4, 4 + 4),  # Megatron's 18: gradients are added up in float32
    "both": States(2, 2 + 4, 4, 4 + 4),  # 20: float32 copies of 16-bit gradients, and neither dropped
}
"""Bytes of one parameter."""


def state_bytes(parameters: int, convention: str) -> States:
    """Bytes that a model's parameters take in training. Cost: 16, 16, 18 or 20 each.

    Raises: ValueError for an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"no convention is called {convention!r}: choose from {', '.join(CONVENTIONS)}.")
    return States(**{part: size * parameters for part, size in asdict(CONVENTIONS[convention]).items()})


def tuning_bytes(frozen: int, trained: int, convention: str) -> States:
    """Fine-tuning a part: the base once, in `frozen` bytes as it is stored, and `trained` parameters with all their states.

    What is trained costs eight times its 16-bit weights at 16 bytes a parameter, ten times at 20; the base costs itself.
    """
    states = state_bytes(trained, convention)
    return replace(states, weights=states.weights + frozen)


def least_devices(size: int, memory: int) -> int:
    """How many devices of `memory` bytes hold `size` bytes, spread evenly over them and with nothing else there."""
    return math.ceil(size / memory)
