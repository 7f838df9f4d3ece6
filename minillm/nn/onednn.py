"""Products in float32 by oneDNN, where the library that torch would call leaves half of the processor unused.

For float32, torch for x86 calls MKL, which is Intel's and does not use AVX-512 on AMD's processors: 110 of 260 GFLOP/s that one Zen 5
core gives oneDNN, which torch has in it for 16 bits and for its compiler. The numbers are the same, summed in another order.
The engine computes linear layers so in training where `helps` says so; infer/packed.py is for writing.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEAST = 2**21
"""Multiplications from which on a layer's three products save more than their call from Python takes (measured, one thread)."""


def helps() -> bool:
    """Whether to use oneDNN here. torch.backends.mkldnn.enabled = False says no."""
    return torch.backends.mkldnn.enabled and _amd_with_mkl()


@cache
def _amd_with_mkl() -> bool:
    about = Path("/proc/cpuinfo")
    vendor = about.read_text() if about.exists() else platform.processor()
    return ("AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available())


def product(x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None,
            ) -> Float[Tensor, "*batch out"]:
    """x weightᵀ + bias, without a gradient. weight may be packed. This is what torch's own compiler calls for linear layers."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """All three products, one forward and two backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is frozen gets none."""
        (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (product(grad, weight.mT) if for_x else None, product(rows.mT, x.flatten(0, -2).mT) if for_weight else None,
                rows.sum(0) if for_bias else None)


def linear(x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None,
           ) -> Float[Tensor, "*batch out"]:
    """F.linear, by oneDNN for float32 and `LEAST` multiplications or more. Its gradient has none of its own."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)  # a DTensor, say, knows itself what to do
    fits = plain and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() * len(weight) >= LEAST
    return _Linear.apply(x, weight, bias) if fits else F.linear(x, weight, bias)


class OneDNN(TorchFunctionMode):
    """`with OneDNN():` inside it, F.linear is `linear`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (linear if function is F.linear else function)(*args, **(kwargs or {}))
