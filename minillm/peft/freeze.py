"""What is trained and what is frozen: the two ends of the scale (all weights; only biases), and the count of both.

The methods beside this file add parameters to a frozen model; these choose among those that are there. Source of BitFit:
arXiv:2106.10199 (every bias, those of norms too).
"""

from dataclasses import dataclass

from torch import Tensor, nn


class Adapter:
    """Marks a module that was added to a model from outside: its parameters are no part of the base."""


@dataclass(frozen=True)
class Trained:
    """How many parameters are trained, of how many in all; frozen weights that are stored as packed integers count too."""

    trained: int
    total: int

    @property
    def share(self) -> float:
        """The trained part of all."""
        return self.trained / self.total


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that no adapter has brought, by name."""
    added = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in added}


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training will change, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: nn.Module) -> None:
    """Train nothing of the base; what adapters have brought stays as it is."""
    for parameter in base_parameters(model).values():
        parameter.requires_grad_(False)


def begin(model: nn.Module, method: str, **settings) -> None:
    """Freeze the base, and note which method is added to it, so that it can be saved. (LoRA notes its own, layer by layer.)

    Raises: ValueError when one of these methods is there already.
    """
    if before := getattr(model, "adapter_settings", None):
        raise ValueError(f"this model has a {before['method']} already, and {method} cannot be added to it. Load the base again.")
    freeze(model)
    model.adapter_settings = {"method": method, **settings}


def train_all(model: nn.Module) -> None:
    """Full fine-tuning: train all of the base."""
    for parameter in base_parameters(model).values():
        parameter.requires_grad_(True)


def train_only_biases(model: nn.Module) -> None:
    """BitFit: train the base's biases and nothing else of it.

    Raises: ValueError for a model without biases, such as LLaMA.
    """
    freeze(model)
    biases = [p for name, p in base_parameters(model).items() if name.endswith("bias")]
    if not biases:
        raise ValueError('this model has no bias at all, so there is nothing for BitFit to train. Use a family with biases '
                         '(gpt2, opt, bloom), or add_lora.')
    for bias in biases:
        bias.requires_grad_(True)


def count_trained(model: nn.Module) -> Trained:
    """Trained and all parameters. Works on the meta device."""
    packed = sum(module.in_features * module.out_features for module in model.modules()
                 if hasattr(module, "in_features") and "weight" not in dict(module.named_parameters(recurse=False)))
    return Trained(sum(p.numel() for p in trained_parameters(model).values()),
                   sum(p.numel() for p in model.parameters()) + packed)
