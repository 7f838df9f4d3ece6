"""AdamW by hand, and which parameters decay.

`AdamW` here is the algorithm as the paper writes it, one tensor after another; torch's fused one, which `build_optimizer`
makes by default, computes the same in one pass. Source: arXiv:1711.05101, algorithm 2; arXiv:1412.6980.
"""

import torch
from torch import Tensor, nn

from minillm.config import TrainConfig


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


class AdamW(torch.optim.Optimizer):
    """The optimizer around `adamw_update`, with torch's names for its state: step, exp_avg, exp_avg_sq."""

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter),
                                 exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
                adamw_update(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], int(state["step"]),
                             lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                             weight_decay=group["weight_decay"])


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay towards 0; vectors (norms, biases) do not, since 0 is not where they rest."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration asks for."""
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    groups = decay_groups(model, config.weight_decay)
    if config.optimizer == "by_hand":
        return AdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)
