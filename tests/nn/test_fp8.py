import pytest
import torch
from torch.nn import functional as F

from minillm.nn.formats import FORMATS
from minillm.nn.fp8 import linear8, product, scaled_to


def operands(seed=0, rows=32, inner=64, columns=48):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator) * 0.02


def test_the_largest_number_becomes_the_formats_largest():
    x, _ = operands()
    for name in ("e4m3", "e5m2"):
        scaled, scale = scaled_to(x, FORMATS[name])
        assert scaled.abs().max() == FORMATS[name].largest
        assert torch.equal(scaled.to(FORMATS[name].dtype).float(), scaled)
        # half a step of the mantissa, relative; what is 2^-14 of the largest or less may be subnormal
        torch.testing.assert_close(scaled / scale, x, rtol=FORMATS[name].step / 2, atol=float(x.abs().max()) * 2 ** -14)
    zeros, scale = scaled_to(torch.zeros(3), FORMATS["e4m3"])
    assert not zeros.any() and scale.isfinite()


def test_products_are_those_of_torchs_own_eight_bit_kernel():
    x, weight = operands()
    (x8, sx), (w8, sw) = scaled_to(x, FORMATS["e4m3"]), scaled_to(weight, FORMATS["e4m3"])
    theirs = torch._scaled_mm(x8.to(torch.float8_e4m3fn), w8.to(torch.float8_e4m3fn).t(), scale_a=1 / sx, scale_b=1 / sw,
                              out_dtype=torch.float32)
    # float32 sums of 64 exact products in another order
    torch.testing.assert_close(product(x, weight.mT, FORMATS["e4m3"], FORMATS["e4m3"]), theirs, rtol=1e-5, atol=1e-5)


def test_a_product_keeps_about_five_bits():
    x, weight = operands()
    exact, rounded = x @ weight.mT, linear8(x, weight)
    error = (rounded - exact).norm() / exact.norm()
    # each factor is off by up to 2^-4, uniformly: 2^-4 / √3 · √2 would be 0.05 if mantissas stood at 1; on average they are larger
    assert 0.02 < error < 0.06, error


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_gradients_are_products_in_eight_bits_too(shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape, requires_grad=True), torch.randn(48, 64, requires_grad=True), torch.randn(48, requires_grad=True)
    grad = torch.randn(*shape[:-1], 48)
    out = linear8(x, weight, bias)
    found = torch.autograd.grad(out, (x, weight, bias), grad)
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    assert out.shape == (*shape[:-1], 48)
    for ours, theirs in zip(found[:2], exact[:2]):
        # e5m2's two bits of mantissa: off by up to 2^-3 each, about a third of that on average
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.1
    torch.testing.assert_close(found[2], exact[2])
    rows = grad.reshape(-1, 48)
    torch.testing.assert_close(found[0].reshape(-1, 64), product(rows, weight.detach(), FORMATS["e5m2"], FORMATS["e4m3"]))
