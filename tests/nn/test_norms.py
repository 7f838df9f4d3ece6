import pytest
import torch
from torch.nn import functional as F

from minillm.nn.norms import LayerNorm, RMSNorm


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12),
    (torch.float32, 1e-5),  # another order of the same sums
    (torch.bfloat16, 2e-2),  # bfloat16 keeps 8 bits: one unit in the last place of numbers around 2
])
def test_rms_norm_equals_torch_with_and_without_gradients(dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    expected = F.rms_norm(x, (24,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(norm(x).square().sum(), (x, norm.weight))
    theirs = torch.autograd.grad(expected.square().sum(), (x, norm.weight))
    if dtype != torch.bfloat16:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)  # sums over 15 rows


def test_layer_norm_by_its_formula():
    torch.manual_seed(0)
    norm = LayerNorm(24, eps=1e-3, bias=True).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)  # float64 rounding


def test_rms_norms_statistics_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    norm, x = RMSNorm(24, eps=1e-3), torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = norm(x)
        half = norm(x.bfloat16())
    assert torch.equal(mixed, norm(x))
    assert torch.equal(half, norm(x.bfloat16().float()).bfloat16())
