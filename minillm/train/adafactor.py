"""Adafactor: AdamW's second moment from a row and a column, and no first moment, so that state is nearly nothing.

The squared gradients of a matrix are kept as the means of its rows and of its columns; their product over the mean of all
gives back an estimate for each number: n + m numbers instead of n · m. Two guards replace momentum: steps whose
root mean square is above 1 are clipped, and the rate is relative to the size of the parameter itself.
Source: arXiv:1804.04235, algorithms 4 and 5. Differs from the paper: decay is decoupled, as in AdamW.
"""

import torch
from torch import Tensor

from minillm.train.optim import ByHand


class Adafactor(ByHand):
    """State: step, and row_var (n, 1) and col_var (1, m) of a matrix, or variance of a vector.

    The rate of step t is min(lr, 1/√t) times the parameter's root mean square, or times 0.001 if that is smaller.
    Cost: n + m numbers of state for a matrix of n · m.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, beta2_decay: float = -0.8, smallest: float = 1e-3):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.beta2_decay, self.smallest = beta2_decay, smallest

    def update(self, parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        """One step."""
        step, tiny = float(state["step"]), torch.finfo(parameter.dtype).eps
        fresh = step ** self.beta2_decay  # 1 - beta2: the averages need no correction, since the first one is all new
        size = max(self.smallest, _rms(parameter))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = grad / _squares(grad, state, fresh, tiny).clamp(min=tiny * tiny).sqrt()
        parameter.sub_(update / max(1.0, _rms(update)), alpha=min(group["lr"], step ** -0.5) * size)


def _squares(grad: Tensor, state: dict, fresh: float, tiny: float) -> Tensor:
    """The running mean of the squared gradients: kept whole for a vector, estimated for a matrix from its margins."""
    if grad.ndim < 2:
        return state.setdefault("variance", torch.zeros_like(grad)).lerp_(grad * grad, fresh)
    squared = grad * grad
    rows = state.setdefault("row_var", torch.zeros_like(grad[:, :1])).lerp_(squared.mean(1, keepdim=True), fresh)
    columns = state.setdefault("col_var", torch.zeros_like(grad[:1])).lerp_(squared.mean(0, keepdim=True), fresh)
    return rows * columns / rows.mean().clamp(min=tiny)


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm() / tensor.numel() ** 0.5)
