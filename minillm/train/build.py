"""The optimizer that a configuration asks for, over named parameters: a model's own, or their float32 copies."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minillm.config import TrainConfig
from minillm.train.adafactor import Adafactor
from minillm.train.muon import Muon, muon_groups
from minillm.train.optim import AdamW, decay_groups

STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum_buffer"}, {"step", "row_var", "col_var"}, {"step", "variance"})
"""What an optimizer keeps of one parameter, for each of them."""


def build_optimizer(model: nn.Module | Iterable[tuple[str, Tensor]], config: TrainConfig) -> torch.optim.Optimizer:
    """A module's optimizer, or that of names and parameters."""
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    groups = decay_groups(named, config.weight_decay, config.decay_embeddings)
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=config.lr)
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    if config.optimizer == "muon":
        return Muon(muon_groups(named, config.weight_decay, config.decay_embeddings), **options)
    if config.optimizer == "by_hand":
        return AdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)
