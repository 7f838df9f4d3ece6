"""Weights in the order in which a CPU's kernels read them.

Writing one token multiplies every weight with one vector, or a few: the time is that of fetching the weights. A plain matrix
lies row by row, and the kernel that torch calls for it fetches at about half of the speed that memory allows; oneDNN stores
blocks that fit its registers. Same numbers, summed in another order. This is what compilers for inference call weight
prepacking.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.model.transformer import Transformer
from minillm.nn.onednn import product

SMALLEST = 2**17
"""Up to so many weights, oneDNN's call takes longer than its order saves (measured with one thread)."""


class PackedLinear(nn.Module):
    """A linear layer for reading only. Shapes: (..., in) -> (..., out), as of the layer that it was made from."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        # As torch's own compiler does with constant weights; the public torch.utils.mkldnn converts every input as well.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if x.dtype != self.dtype:
            raise ValueError(f"weights packed in {self.dtype} were given {x.dtype}: convert the model, then pack it.")
        return product(x, self.packed, self.bias)

    def __deepcopy__(self, memo: dict) -> "PackedLinear":
        return self  # nothing in it can change

    def _save_to_state_dict(self, *where) -> None:
        raise ValueError("packed weights cannot be saved: save the model that they were made from.")


def packed(model: Transformer, smallest: int = SMALLEST) -> Transformer:
    """A copy of `model` to write with on a CPU, with linear layers of more than `smallest` weights packed by oneDNN.

    For `stream` and `generate`; it cannot be trained, saved or compiled. Layers that an adapter changes stay as they are:
    merge it first.   Cost: the memory of the weights once more.
    Raises: ValueError for a model on another device, in another dtype than float32 and bfloat16, or a torch without oneDNN.
    """
    weight = model.embed.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"packed weights are for float32 and bfloat16 on CPUs; this model is in {weight.dtype} on "
                         f"{weight.device}. Move it, or use compiled=True.")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("this torch was built without oneDNN: write without packing.")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            adapted = child._forward_hooks or child._forward_pre_hooks or len(child._modules)
            if type(child) is nn.Linear and child.weight.numel() > smallest and not adapted:
                setattr(module, name, PackedLinear(child))
    return model
