"""Master weights: the model in 16 bits, and a float32 copy of every weight that only the optimizer sees.

A step changes a weight by about a thousandth of it, and bf16's neighbours are a 128th apart: most steps would round to
nothing. In the copy they add up until the 16-bit weight moves. What a parameter costs depends on what is kept of its
gradient, with AdamW's two moments always in float32:

    gradients   weight  gradient  master  moments   bytes
    "half"         2        2        4      4 + 4      16    the update takes one tensor at a time (ZeRO's count)
    "float"        2        4        4      4 + 4      18    each microbatch is added to a float32 sum (Megatron's)
    "both"         2      2 + 4      4      4 + 4      20    all copied to float32, and none dropped before the update

Sources: arXiv:1710.03740 §3.1, arXiv:1910.02054 §3.1. Autocast (train/precision.py) does it the other way round: the
model's weights are the float32 ones, and products cast them. That is 16 bytes, too, and a 16-bit copy while they run.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn


class MasterWeights:
    """Turns a model's weights to 16 bits and holds float32 copies of those that are trained: the optimizer is built from them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, gradients: Literal["half", "float", "both"] = "float"):
        self.gradients = gradients
        named = {name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters() if p.requires_grad}
        model.to(dtype)  # the same parameters, so a tied weight stays one
        self.masters = {name: nn.Parameter(copy) for name, copy in named.items()}
        self._pairs = [(parameter, self.masters[name]) for name, parameter in model.named_parameters() if name in self.masters]
        if gradients == "float":
            for parameter, master in self._pairs:
                parameter.register_post_accumulate_grad_hook(lambda p, master=master: _move_gradient(p, master))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The copies by the names of the weights."""
        return iter(self.masters.items())

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
        """Update the copies and write them back to the model. scale: what the gradients still have to be divided by."""
        if self.gradients == "half":  # one tensor at a time, so that one float32 gradient is alive
            for parameter, master in self._pairs:
                if parameter.grad is not None:
                    master.grad = parameter.grad.float().div_(scale)
                    optimizer.step()
                    master.grad = None
        else:
            for parameter, master in self._pairs:
                if self.gradients == "both" and parameter.grad is not None:
                    master.grad = parameter.grad.float()
                if scale != 1 and master.grad is not None:
                    master.grad.div_(scale)
            optimizer.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into the model's weights."""
        for parameter, master in self._pairs:
            parameter.copy_(master)


def _move_gradient(parameter: Tensor, master: nn.Parameter) -> None:
    """Add a fresh 16-bit gradient to the float32 sum, and drop it."""
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
