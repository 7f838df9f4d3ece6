"""Muon: the step of a matrix is its momentum with all singular values set to about 1, so that every direction moves alike.

AdamW scales each number by its own history; Muon looks at a matrix as a map, in which a few directions dominate the gradient
and the rare ones hardly move. Orthogonalising by Newton-Schulz takes matrix products alone, no decomposition. It keeps one
matrix of state where AdamW keeps two. Embeddings, head and vectors are no maps of the stream and stay with AdamW.
Sources: Jordan et al., Muon (2024), kellerjordan.github.io/posts/muon; the scale 0.2·√max(rows, columns), which gives a step
AdamW's usual size, so that its learning rate and decay can be kept: arXiv:2502.16982 §2.2.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.train.optim import AdamW, decay_groups, is_table, slots_like

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a·s + b·s³ + c·s⁵ lifts small singular values fastest; it does not converge to 1 but to about 0.7 to 1.2."""


def orthogonalise(matrix: Float[Tensor, "rows columns"], steps: int = 5,
                  dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows columns"]:
    """A matrix of the same singular vectors whose singular values are about 1: U Vᵀ, roughly.

    Cost: 3 products a step, of (m, n), (m, m) and (m, n) with m the smaller side. `dtype` is what they are computed in.
    """
    a, b, c = QUINTIC
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / x.norm().clamp(min=1e-7)  # the Frobenius norm is at least the largest singular value, which must be below 1
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(AdamW):
    """Muon where a group says "matrices": True, AdamW elsewhere. State of a matrix: step, momentum_buffer."""

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, momentum: float = 0.95):
        super().__init__(params, lr, betas, eps)
        self.momentum = momentum

    def update(self, parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        """Nesterov's momentum, orthogonalised."""
        if not group.get("matrices"):
            return super().update(parameter, grad, state, group)
        [momentum] = slots_like(parameter, state, "momentum_buffer")
        momentum.lerp_(grad, 1 - self.momentum)
        ahead = grad.lerp(momentum, self.momentum)
        # bfloat16 is enough for a direction, and fast where it is multiplied in hardware; a plain CPU is faster in float32
        exact = torch.bfloat16 if parameter.device.type == "cuda" else torch.promote_types(parameter.dtype, torch.float32)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(ahead, dtype=exact), alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def muon_groups(named: Iterable[tuple[str, Tensor]], weight_decay: float, embeddings: bool = True) -> list[dict]:
    """The blocks' matrices for Muon, then AdamW's two groups for all other parameters."""
    named = list(named)
    inner = {name for name, parameter in named if parameter.ndim == 2 and not is_table(name)}
    return [{"params": [p for n, p in named if n in inner], "weight_decay": weight_decay, "matrices": True},
            *decay_groups([(n, p) for n, p in named if n not in inner], weight_decay, embeddings)]
