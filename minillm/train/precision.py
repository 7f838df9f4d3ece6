"""Autocast, written out: which operation runs in which format while weights stay in float32.

Products of matrices are most of the work and forgive rounding, so they run in 16 bits; operations that add up many numbers or
span many orders of magnitude get float32; the rest takes what comes. `Autocast` is that rule as a few lines around every torch
function, and equals torch.autocast, which the engine uses for bf16 and fp16. With `linear`, products of linear layers are
done by another function: eight bits. Source: arXiv:1710.03740 §3.3; torch.amp's lists of operations.
Differs: on CUDA torch's cross entropy of 16-bit logits rounds its logarithms to 16 bits again (seen in 2.11); here they are wide,
as in minillm/train/loss.py, which casts its logits first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minillm.nn.fp8 import linear8
from minillm.nn.onednn import OneDNN, helps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NARROW = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm,
          F.scaled_dot_product_attention}
"""Products: in 16 bits on every device."""
WIDE = {
    "cpu": {F.cross_entropy, F.nll_loss, F.mse_loss, torch.linalg.vector_norm},
    "cuda": {F.cross_entropy, F.nll_loss, F.mse_loss, torch.linalg.vector_norm, F.layer_norm, F.softmax, torch.softmax,
             torch.Tensor.softmax, torch.Tensor.log_softmax, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.rsqrt,
             torch.Tensor.rsqrt, torch.pow, torch.Tensor.pow, torch.sum, torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum},
}
"""In float32. A CPU's kernels for norms and softmax sum in float32 whatever they are given, so there they are not here."""


class Autocast(TorchFunctionMode):
    """`with Autocast(torch.bfloat16):` inside it, functions of tensors get their floating arguments in the right format."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", linear: Callable | None = None, keep: tuple[Tensor, ...] = ()):
        """linear: replaces F.linear, but for layers whose weight is in `keep`."""
        super().__init__()
        self.dtype, self.wide, self.linear, self.keep = dtype, WIDE[device], linear, keep

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in NARROW:
            kept = any(args[1] is weight for weight in self.keep)
            args, kwargs = _cast(args, self.dtype), _cast(kwargs, self.dtype)
            if function is F.linear and self.linear and not kept:
                return self.linear(*args, **kwargs)
        elif function in self.wide:
            args, kwargs = _cast(args, torch.float32), _cast(kwargs, torch.float32)
        return function(*args, **kwargs)


def autocast(precision: str, model: nn.Module, device: str, compiled: bool = False) -> AbstractContextManager:
    """What a forward pass of a model with float32 weights runs under. fp8: eight bits in the blocks, bf16 in the head. fp32: on a CPU
    where oneDNN helps, its products; a compiled model calls its own."""
    if precision == "fp8":
        return Autocast(torch.bfloat16, device, linear8, keep=(model.head.weight,))
    if precision == "fp32":
        return OneDNN() if device == "cpu" and not compiled and helps() else nullcontext()
    return torch.autocast(device, DTYPES[precision])


def _cast(value, dtype: torch.dtype):
    """Floating tensors of a value in another format; all else as it is. float64 is left alone, as torch.autocast does."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in DTYPES.values() else value
    if isinstance(value, dict):
        return {key: _cast(v, dtype) for key, v in value.items()}
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, tuple | list) else value
