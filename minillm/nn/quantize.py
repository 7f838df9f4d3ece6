"""Weights in 8 or 4 bits: each number becomes the index of the nearest entry of a small codebook, times its group's largest.

int8 and int4 are codebooks with equal steps; NF4's steps hold equal shares of a normal distribution, which trained weights
nearly have. A group is the whole tensor, a row, or some numbers side by side: small groups keep one outlier from spoiling the
rest, and cost a scale each. Double quantisation stores the scales of groups in 8 bits, too. Only storage shrinks: a layer
brings its weight back to full width, multiplies and drops it, in backward once more. Sources: arXiv:2305.14314 §3 and
appendix E, arXiv:2208.07339. Left out: products in integers, outlier columns, codes that look at data (GPTQ, AWQ); the
scales' own 8 bits are int8 here and a float of 8 bits in the paper.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

SCALES_GROUP = 256
"""Scales of groups that share one scale of their own."""


def normal_float4() -> Float[Tensor, "16"]:
    """NF4's codebook: quantiles of the normal distribution, 8 above 0, 7 below, 0 itself, scaled to [-1, 1].

    The outermost is the quantile halfway between those that 15 and 16 equal shares would end in.
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((below, torch.zeros(1, dtype=torch.float64), above.flip(0)))
    return values / values.abs().max()


CODEBOOKS = {"int8": torch.arange(-127, 128, dtype=torch.float64) / 127, "int4": torch.arange(-7, 8, dtype=torch.float64) / 7,
             "nf4": normal_float4()}


def codebook(form: str) -> Float[Tensor, "codes"]:
    """The values that a format can say, from -1 to 1 in rising order.  Raises: ValueError for an unknown format."""
    if form not in CODEBOOKS:
        raise ValueError(f"form = {form!r}: choose from {', '.join(CODEBOOKS)}.")
    return CODEBOOKS[form]


class Packed(NamedTuple):
    """A tensor in few bits. codes: one byte a number (int8) or half of one, (n,) or (n/2,); scales: one a group, as numbers
    or packed themselves around their mean."""

    codes: UInt8[Tensor, "bytes"]
    scales: "Tensor | Packed"
    mean: Float[Tensor, ""]
    form: str
    shape: tuple[int, ...]
    group: int
    """Numbers that share a scale."""

    @property
    def bytes(self) -> int:
        """Of codes and scales. Cost: 8 or 4 bits a number, and 32 a group; 8 and an eighth a group when packed twice."""
        double = isinstance(self.scales, Packed)
        return self.codes.numel() + (self.scales.bytes if double else self.scales.numel() * self.scales.element_size())


def quantize(weight: Float[Tensor, "*shape"], form: str = "nf4", *, group: int | Literal["tensor", "row"] = 64,
             double: bool = False) -> Packed:
    """Round each number to the nearest of its group's codebook.

    group: numbers side by side that share a scale, or a row, or the whole tensor.   double: pack the scales, too.
    Raises: ValueError when the tensor does not divide into groups, or has numbers that are not finite.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{int((~weight.isfinite()).sum())} numbers are not finite: a group's largest would be infinite.")
    size = {"tensor": weight.numel(), "row": weight.shape[-1]}.get(group, group)
    if weight.numel() % size:
        raise ValueError(f"{tuple(weight.shape)}: {weight.numel():,} numbers do not divide into groups of {size}. Use \"row\".")
    groups = weight.detach().reshape(-1, size).float()
    scales, values = groups.abs().amax(-1), codebook(form).to(weight.device, torch.float32)
    codes = torch.bucketize(groups / scales.clamp(min=1e-30)[:, None], (values[1:] + values[:-1]) / 2).flatten().to(torch.uint8)
    if form != "int8":
        codes = F.pad(codes, (0, len(codes) % 2))
        codes = codes[0::2] << 4 | codes[1::2]
    mean = scales.mean() if double else torch.zeros_like(scales[0])
    if double:
        outer = min(SCALES_GROUP, len(scales))
        scales = quantize(F.pad(scales - mean, (0, -len(scales) % outer)), "int8", group=outer)
    return Packed(codes, scales, mean, form, tuple(weight.shape), size)


def dequantize(packed: Packed) -> Float[Tensor, "*shape"]:
    """The numbers again, in float32."""
    count, values = torch.Size(packed.shape).numel(), codebook(packed.form).to(packed.codes.device, torch.float32)
    if packed.form != "int8":  # a byte names a pair
        sixteen = F.pad(values, (0, 16 - len(values)))
        values = torch.cartesian_prod(sixteen, sixteen)
    values = values[packed.codes.int()].flatten()[:count]
    scales = dequantize(packed.scales) + packed.mean if isinstance(packed.scales, Packed) else packed.scales
    return (values.view(-1, packed.group) * scales.float()[:count // packed.group, None]).view(packed.shape)


class _Linear(torch.autograd.Function):
    """x Wᵀ. What autograd would keep for backward is W at full width, the very thing to be saved: it is unpacked again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """To x alone: W is frozen."""
        return (grad @ ctx.layer.weight.to(grad.dtype)).to(ctx.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is packed. Shapes: (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, form: str = "nf4", *, group: int | Literal["tensor", "row"] = 64, double: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        packed = quantize(linear.weight, form, group=group, double=double)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales.codes if double else packed.scales)
        self.register_buffer("outer", packed.scales.scales if double else None)
        self.register_buffer("mean", packed.mean)
        self.bias, self._group = linear.bias, packed.group

    @property
    def packed(self) -> Packed:
        """What is stored."""
        scales = self.scales
        if self.outer is not None:
            scales = Packed(scales, self.outer, torch.zeros_like(self.mean), "int8", tuple(scales.shape), len(scales) // len(self.outer))
        return Packed(self.codes, scales, self.mean, self.form, (self.out_features, self.in_features), self._group)

    @property
    def weight(self) -> Float[Tensor, "rows C"]:
        """Unpacked, anew each time."""
        return dequantize(self.packed)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch rows"]:
        out = _Linear.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantize_linears(model: nn.Module, form: str = "nf4", *, group: int | Literal["tensor", "row"] = 64, double: bool = True,
                     skip: tuple[str, ...] = ("head", "router")) -> int:
    """Pack the weight of every linear layer of a model in place, but for names that end in `skip`. Returns how many.

    Raises: ValueError when there is none, or a weight does not divide into groups.
    """
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if isinstance(child, nn.Linear) and name not in skip]
    if not found:
        raise ValueError("there is no linear layer to quantise: has that been done already?")
    for parent, name, child in found:
        if hasattr(child, "lora"):
            raise ValueError(f"{name} has an adapter already: quantise first, then add_lora.")
        setattr(parent, name, QuantizedLinear(child, form, group=group, double=double))
    return len(found)


def dequantize_linears(model: nn.Module) -> None:
    """Turn packed layers back into linear ones, with the rounded weights and whatever has been added to them from outside."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device=child.codes.device)
                linear.weight, linear.bias = nn.Parameter(child.weight, requires_grad=False), child.bias
                for extra, module in child.named_children():  # what was added from outside, and its hooks
                    linear.add_module(extra, module)
                linear._forward_hooks = child._forward_hooks
                setattr(parent, name, linear)
