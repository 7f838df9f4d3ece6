import math

import pytest
import torch

from minillm.nn.formats import FORMATS, bits_of, round_to


@pytest.mark.parametrize("name, largest, smallest_normal, smallest", [
    ("fp32", 3.4028235e38, 1.1754944e-38, 1.4012985e-45), ("bf16", 3.3895314e38, 1.1754944e-38, 9.1835496e-41),
    ("fp16", 65504, 6.1035156e-5, 5.9604645e-8), ("e4m3", 448, 2 ** -6, 2 ** -9), ("e5m2", 57344, 2 ** -14, 2 ** -16)])
def test_ranges_are_the_published_ones(name, largest, smallest_normal, smallest):
    form = FORMATS[name]
    assert (form.largest, form.smallest_normal, form.smallest) == pytest.approx((largest, smallest_normal, smallest), rel=1e-7)
    info = torch.finfo(form.dtype)
    assert (info.max, info.tiny, info.eps, info.bits) == (form.largest, form.smallest_normal, form.step, form.bits)


def test_bits_by_hand():
    assert bits_of(1.0, FORMATS["bf16"]) == ("0", "01111111", "0000000", 1.0)
    assert bits_of(-6.5, FORMATS["fp16"]) == ("1", "10001", "1010000000", -6.5)  # -1.625 · 2², 2 + 15 = 10001
    assert bits_of(0.1, FORMATS["e4m3"]) == ("0", "0011", "101", 0.1015625)  # 1.625 · 2⁻⁴, -4 + 7 = 0011
    assert bits_of(2 ** -16, FORMATS["e5m2"]) == ("0", "00000", "01", 2 ** -16)  # subnormal
    assert bits_of(1e9, FORMATS["fp16"]).value == math.inf
    assert all(len("".join(bits_of(0.3, f)[:3])) == f.bits for f in FORMATS.values())


def numbers() -> torch.Tensor:
    """Random float32 of every size, halves between neighbours, and the ends."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=generator) * 2.0 ** torch.randint(-30, 20, (20_000,), generator=generator)
    ties = torch.arange(-600, 600) / 16.0
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65504, 65519.9, 65520, 448, 464, 464.1, 57344, 61439, 61440, 1e-45, 3.4e38, -3.4e38])
    return torch.cat((spread, ties, ties * 2 ** -12, ends))


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3", "e5m2"])
def test_rounding_by_arithmetic_is_torchs_cast(name):
    form, x = FORMATS[name], numbers()
    cast = x.to(form.dtype).float()
    ours = round_to(x, form)
    if not form.infinite:  # torch makes what is too large NaN or the largest number, depending on its version
        beyond = ours.isnan()
        assert torch.equal(beyond, x.abs() > 464) and (cast[beyond].isnan() | (cast[beyond].abs() == form.largest)).all()
        ours, cast = ours[~beyond], cast[~beyond]
    assert torch.equal(ours.isnan(), cast.isnan()) and torch.equal(ours[~ours.isnan()], cast[~cast.isnan()])
    kept = round_to(x[x.isfinite()], form, saturate=True)
    assert kept.abs().max() == form.largest and torch.equal(round_to(kept, form), kept)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp16", "bf16"])
def test_every_number_of_a_format_is_kept(name):
    form = FORMATS[name]
    if form.bits == 8:
        every = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    else:
        every = torch.arange(-2 ** 15, 2 ** 15).to(torch.int16).view(form.dtype).float()
    every = every[every.isfinite()]
    assert torch.equal(round_to(every, form), every)
