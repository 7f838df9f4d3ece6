import pytest
import torch

from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.nn.quantize import QuantizedLinear, codebook, dequantize, dequantize_linears, normal_float4, quantize, quantize_linears

# arXiv:2305.14314 appendix E
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
             -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
             0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lost(tensor, form, **options):
    return float((dequantize(quantize(tensor, form, **options)) - tensor).norm() / tensor.norm())


def test_nf4_is_the_published_codebook():
    # theirs was computed in float32 from a quantile written with 7 digits
    torch.testing.assert_close(normal_float4(), torch.tensor(PUBLISHED, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("group", ["tensor", "row", 16])
def test_every_number_becomes_the_nearest_of_its_group(form, group):
    tensor = weight(6, 64)
    size = {"tensor": 384, "row": 64, 16: 16}[group]
    rows = tensor.view(-1, size)
    values = codebook(form).float() * rows.abs().amax(-1)[:, None, None]
    nearest = (rows[..., None] - values).abs().amin(-1)
    # float32: dividing by the scale and multiplying by it again may round to the neighbour of two equally near
    torch.testing.assert_close((dequantize(quantize(tensor, form, group=group)).view(-1, size) - rows).abs(), nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_what_the_codebook_says_comes_back(form):
    tensor = codebook(form).float().repeat(4) * 3
    # float32: 3 times a value divided by 3
    torch.testing.assert_close(dequantize(quantize(tensor, form, group="tensor")), tensor, rtol=1e-6, atol=0)


def test_bits_of_a_number():
    tensor = weight(256, 1024)

    def bits(form, **options):
        return quantize(tensor, form, **options).bytes * 8 / tensor.numel()

    assert bits("int8", group="row") == 8 + 32 / 1024 and bits("int8", group=64) == 8.5
    assert bits("nf4") == bits("int4") == 4.5
    # QLoRA §3: double quantisation takes 0.5 bits a number down to 8/64 + 32/(64 · 256) = 0.127
    assert bits("nf4", double=True) == pytest.approx(4.127, abs=1e-3)
    assert quantize(tensor, "nf4").codes.numel() == tensor.numel() // 2


def test_smaller_groups_and_quantiles_lose_less_of_normal_weights():
    tensor = weight(256, 1024)
    for form in ("int8", "int4", "nf4"):
        assert lost(tensor, form) < lost(tensor, form, group="row") < lost(tensor, form, group="tensor")
        assert lost(tensor, form, double=True) < 1.05 * lost(tensor, form)
    assert lost(tensor, "int8") < 0.007 and 0.09 < lost(tensor, "nf4") < 0.093 and 0.105 < lost(tensor, "int4") < 0.11


def test_one_outlier_spoils_its_group_alone():
    tensor = weight(8, 256)
    tensor[0, 0] = 100.0
    rest = slice(1, None)
    spoiled, kept = (dequantize(quantize(tensor, "int8", group=group))[rest] - tensor[rest] for group in ("tensor", "row"))
    assert spoiled.norm() > 20 * kept.norm()


def test_odd_sizes_and_zeros():
    for tensor in (weight(3, 5), torch.zeros(3, 5)):
        for double in (False, True):
            assert dequantize(quantize(tensor, "nf4", group="row", double=double)).shape == (3, 5)
    assert not dequantize(quantize(torch.zeros(2, 64), "nf4")).any()


def test_a_layer_is_its_rounded_weight_forward_and_backward():
    linear = torch.nn.Linear(128, 24)
    packed = QuantizedLinear(linear, "nf4", double=True)
    plain = torch.nn.functional.linear
    x, y = (weight(3, 128).requires_grad_() for _ in range(2))
    packed(x).square().sum().backward()
    plain(y, packed.weight, linear.bias).square().sum().backward()
    # the same products in the same order
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)
    assert not [p for name, p in packed.named_parameters() if name != "bias"]


def test_no_full_weight_is_kept_for_backward():
    layer, kept = QuantizedLinear(torch.nn.Linear(128, 256)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(weight(2, 128).requires_grad_())
    assert torch.Size([256, 128]) not in kept


def test_a_model_in_four_bits_and_back():
    model = Transformer(preset("first", vocab_size=64, layers=2, width=64, context=16))
    ids = torch.arange(16)[None]
    before = model(ids)
    assert quantize_linears(model) == 14 and isinstance(model.head, torch.nn.Linear)
    rounded = model(ids)
    assert 0 < (rounded - before).abs().max() < 0.2
    dequantize_linears(model)
    assert torch.equal(model(ids), rounded) and type(model.blocks[0].attention.q) is torch.nn.Linear


def test_bfloat16_runs_through():
    layer = QuantizedLinear(torch.nn.Linear(64, 8))
    with torch.autocast("cpu", torch.bfloat16):
        x = weight(2, 64).requires_grad_()
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"\(3, 5\): 15 numbers do not divide into groups of 64"):
        quantize(weight(3, 5), "nf4")
    with pytest.raises(ValueError, match="form = 'nf8': choose from int8"):
        quantize(weight(2, 64), "nf8")
    with pytest.raises(ValueError, match="1 numbers are not finite"):
        quantize(torch.full((1, 1), torch.nan), "nf4")
    model = Transformer(preset("first", vocab_size=64, layers=1, width=64))
    quantize_linears(model)
    with pytest.raises(ValueError, match="no linear layer to quantise: has that been done"):
        quantize_linears(model)
