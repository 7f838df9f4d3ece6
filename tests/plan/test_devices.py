import pytest

from minillm.plan.devices import DEVICES, GB, find_device

FORMATS = {"fp32", "tf32", "fp16", "bf16", "fp8"}


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_whole_and_in_its_units(name):
    """A slip of a thousand, or a peak with sparsity, falls out of these ranges."""
    device = find_device(name)
    assert device.name == name and device.source and set(device.peaks) <= FORMATS
    assert 16 * GB <= device.memory <= 192 * GB
    assert 0.3e12 <= device.bandwidth <= 8e12 and (device.link is None or 0.3e12 <= device.link <= 1.8e12)
    widest = device.peak("bf16" if "bf16" in device.peaks else "fp16")
    assert 50e12 < widest <= 2.25e15
    assert 100 < device.intensity("bf16" if "bf16" in device.peaks else "fp16") < 300  # operations a byte
    if "fp8" in device.peaks:
        assert device.peak("fp8") == pytest.approx(2 * widest, rel=1e-3)  # half the bits, twice the rate; four digits printed
    if {"fp16", "bf16"} <= set(device.peaks):
        assert device.peak("fp16") == device.peak("bf16")
    if name.startswith(("a100", "h", "mi", "rtx")):
        assert device.peak("tf32") == pytest.approx(widest / 2, rel=1e-3)


def test_halves_of_what_the_data_sheet_prints_with_sparsity():
    h100 = DEVICES["h100"]  # NVIDIA's H100 data sheet, SXM: 989, 1,979 and 3,958 TFLOP/s with sparsity
    assert [round(2 * h100.peak(p) / 1e12) for p in ("tf32", "bf16", "fp8")] == [989, 1979, 3958]
    assert round(h100.intensity("bf16")) == 295


@pytest.mark.parametrize(("name", "near"), [("v100", "v100-32g"), ("a100", "a100-40g"), ("h10", "h100"), ("rtx4090", "rtx-4090")])
def test_an_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"no GPU is called '{name}'. Did you mean '{near}'"):
        find_device(name)


def test_a_format_that_a_device_lacks():
    with pytest.raises(ValueError, match="v100-32g has no matrix products in bf16: choose from fp32, fp16"):
        DEVICES["v100-32g"].peak("bf16")
