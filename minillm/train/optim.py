"""AdamW by hand, which parameters decay, and the optimizer that a configuration asks for.

`AdamW` here is the algorithm as the paper writes it, one tensor after another; torch's fused one, which `build_optimizer`
makes by default, computes the same in one pass. muon and adafactor, beside this file, keep less and do something else with a
gradient; all share `ByHand`, the loop over parameters. Source: arXiv:1711.05101, algorithm 2; arXiv:1412.6980.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ByHand(torch.optim.Optimizer):
    """The loop of an optimizer; a subclass says how one parameter is updated."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", torch.tensor(0.0)) + 1
                    self.update(parameter, parameter.grad, state, group)

    def update(self, parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        """One step on one tensor, in place; state["step"] counts from 1."""
        raise NotImplementedError


def slots_like(parameter: Tensor, state: dict, *names: str) -> list[Tensor]:
    """The state's tensors of these names, zeros of the parameter's shape at first."""
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(parameter)
    return [state[name] for name in names]


@torch.no_grad()
def adamw_update(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: int, *, lr: float, beta1: float,
                 beta2: float, eps: float, weight_decay: float) -> None:
    """One step on one tensor, in place. `step` counts from 1; mean and square are the running averages.

    Shapes: all (N...). Early averages are too small because they start at 0; dividing by 1 - beta^step mends that.
    """
    parameter.mul_(1 - lr * weight_decay)  # decoupled: decay does not go through the averages
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    corrected_mean = mean / (1 - beta1 ** step)
    corrected_square = square / (1 - beta2 ** step)
    parameter.sub_(lr * corrected_mean / (corrected_square.sqrt() + eps))


class AdamW(ByHand):
    """The optimizer around `adamw_update`, with torch's names for its state: step, exp_avg, exp_avg_sq."""

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def update(self, parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        """AdamW's step."""
        mean, square = slots_like(parameter, state, "exp_avg", "exp_avg_sq")
        adamw_update(parameter, grad, mean, square, int(state["step"]), lr=group["lr"], beta1=group["betas"][0],
                     beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"])


def is_table(name: str) -> bool:
    """Whether a parameter of that name is looked up by row: embeddings, and the head that scores the same rows."""
    return name.split(".")[-2] in ("embed", "positions", "relative", "head") if "." in name else False


def decay_groups(model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float, embeddings: bool = True) -> list[dict]:
    """Two groups: matrices decay towards 0; vectors (norms, biases) do not, since 0 is not where they rest.

    model: a module, or names and parameters.   embeddings: whether tables decay like other matrices.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and (embeddings or not is_table(name))].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
