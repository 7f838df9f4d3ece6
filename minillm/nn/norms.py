"""Normalisation: give every token's vector the same size before a layer reads it.

LayerNorm subtracts the mean and divides by the standard deviation; RMSNorm only divides by the root mean square,
which is one reduction less and trains as well. Sources: arXiv:1607.06450, arXiv:1910.07467.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.config import ModelConfig


class LayerNorm(nn.Module):
    """y = (x - mean) / √(variance + eps) · weight + bias, over the last dim. Shapes: (..., C) -> (..., C)."""

    def __init__(self, width: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + eps) · weight, over the last dim. Shapes: (..., C) -> (..., C).

    The statistics are taken in float32 (or wider), whatever x is.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], self.weight.type_as(x), self.eps)
        # On a CPU F.rms_norm is slower than its parts. The mean is taken of a product, not by vecdot, which autocast
        # would compute in 16 bits.
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = (wide * wide).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * inverse * self.weight).to(x.dtype)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that the configuration asks for, over the residual stream."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return LayerNorm(config.width, config.norm_eps, "norm" in config.bias)
