"""Eight-bit matrix products, emulated: the numbers that an H100 would multiply, at the speed of the machine you have.

Three bits of mantissa are enough for a product if each tensor is first scaled so that its largest number is the format's
largest. Forward, inputs and weights go to e4m3; backward, gradients, which span more orders of magnitude, go to e5m2. Sums are
float32, and weights, optimizer and everything but the products stay as they were. Source: arXiv:2209.05433.
Left out: scales from the history of maxima (delayed scaling), scales for blocks (arXiv:2412.19437 §3.3), and the speed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.nn.formats import FORMATS, Format, round_to


def scaled_to(x: Float[Tensor, "*shape"], form: Format) -> tuple[Float[Tensor, "*shape"], Float[Tensor, ""]]:
    """x times a scale, rounded to the format, and that scale: the format's largest number over x's largest."""
    scale = form.largest / x.abs().amax().float().clamp(min=1e-30)
    return round_to(x.float() * scale, form, saturate=True), scale


def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], a_form: Format, b_form: Format) -> Float[Tensor, "n m"]:
    """a @ b with both rounded to their formats, summed in float32."""
    (a8, a_scale), (b8, b_scale) = scaled_to(a, a_form), scaled_to(b, b_form)
    return (a8 @ b8) / (a_scale * b_scale)


class _Linear8(torch.autograd.Function):
    """x Wᵀ; its three products, one forward and two backward, are all in eight bits."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight.mT, FORMATS["e4m3"], FORMATS["e4m3"]).unflatten(0, x.shape[:-1]).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients have the wider range of e5m2; what they meet is in e4m3."""
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        to_x = product(rows, weight, FORMATS["e5m2"], FORMATS["e4m3"]).view_as(x).to(x.dtype)
        return to_x, product(rows.mT, x.flatten(0, -2), FORMATS["e5m2"], FORMATS["e4m3"]).to(weight.dtype)


def linear8(x: Float[Tensor, "*batch C"], weight: Float[Tensor, "rows C"],
            bias: Float[Tensor, "rows"] | None = None) -> Float[Tensor, "*batch rows"]:
    """F.linear in eight bits, in x's dtype; the bias is added at full width."""
    out = _Linear8.apply(x if x.ndim > 1 else x[None], weight)
    out = out if x.ndim > 1 else out[0]
    return out if bias is None else out + bias.to(out.dtype)
