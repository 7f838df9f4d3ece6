"""What accelerators can do, as their makers say: memory, dense peaks, bandwidths.

Peaks are of dense products; where a data sheet prints twice that "with sparsity", it is halved here. Products in 16 and 8
bits are those that add up in float32. No training reaches a peak: see `utilisation` in minillm/model/flops.py. Memory is
the name's gigabytes taken as 10⁹ bytes. NVIDIA's cards hold some 7% more (nvidia-smi shows 81,559 MiB on an H100 of 80 GB),
which the driver and fragmentation take back.
"""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator. Units: bytes, operations per second, bytes per second."""

    name: str
    memory: int
    """Bytes that it holds."""
    peaks: dict[str, float]
    """Operations per second by the format of the factors."""
    bandwidth: float
    """Bytes per second between its memory and its cores."""
    link: float | None
    """Bytes per second to the accelerators beside it, both directions together; None where the maker names no such link."""
    source: str

    def peak(self, precision: str) -> float:
        """Operations per second in a format. Raises: ValueError when the device has no products in it."""
        if precision not in self.peaks:
            raise ValueError(f"{self.name} has no matrix products in {precision}: choose from {', '.join(self.peaks)}.")
        return self.peaks[precision]

    def intensity(self, precision: str) -> float:
        """Operations that each byte read must be used for to keep the cores busy: peak over bandwidth."""
        return self.peak(precision) / self.bandwidth


def _peaks(**tera: float) -> dict[str, float]:
    """10¹² operations per second, by format."""
    return {name: peak * 1e12 for name, peak in tera.items()}


GB, TB = 10 ** 9, 10 ** 12
_HOPPER = _peaks(fp32=66.9, tf32=494.7, fp16=989.4, bf16=989.4, fp8=1978.9)
_AMPERE = _peaks(fp32=19.5, tf32=156, fp16=312, bf16=312)

DEVICES = {device.name: device for device in (
    Device("t4", 16 * GB, _peaks(fp32=8.1, fp16=65), 320 * GB, None, "NVIDIA T4 data sheet (2019); bandwidth: its product brief"),
    Device("v100-32g", 32 * GB, _peaks(fp32=15.7, fp16=125), 900 * GB, 300 * GB,
           "NVIDIA V100 data sheet (2020), SXM2"),
    Device("a100-40g", 40 * GB, _AMPERE, 1555 * GB, 600 * GB, "NVIDIA A100 data sheet (2021), SXM"),
    Device("a100-80g", 80 * GB, _AMPERE, 2039 * GB, 600 * GB, "NVIDIA A100 data sheet (2021), SXM"),
    Device("h100", 80 * GB, _HOPPER, 3.35 * TB, 900 * GB,
           "NVIDIA H100 architecture white paper (2022), SXM5; bandwidth: H100 data sheet"),
    Device("h200", 141 * GB, _HOPPER, 4.8 * TB, 900 * GB, "NVIDIA H200 data sheet (2024), SXM; the processor is H100's"),
    Device("b200", 180 * GB, _peaks(fp32=80, tf32=1100, fp16=2250, bf16=2250, fp8=4500), 8 * TB, 1800 * GB,
           "NVIDIA Blackwell technical brief (2024), HGX B200; memory: an eighth of the DGX B200 data sheet's 1,440 GB"),
    Device("rtx-4090", 24 * GB, _peaks(fp32=82.6, tf32=82.6, fp16=165.2, bf16=165.2, fp8=330.3), 1008 * GB, None,
           "NVIDIA Ada architecture white paper (2022), appendix A"),
    Device("mi300x", 192 * GB, _peaks(fp32=163.4, tf32=653.7, fp16=1307.4, bf16=1307.4, fp8=2614.9), 5.3 * TB, 896 * GB,
           "AMD Instinct MI300X data sheet (2023)"),
    Device("tpu-v4", 32 * 2 ** 30, _peaks(bf16=275), 1200 * GB, 300 * GB,
           "arXiv:2304.01433 table 4: 32 GiB, 6 links of 50 GB/s"),
)}


def find_device(name: str) -> Device:
    """The device of that name. Raises: ValueError for an unknown name, with the nearest known one."""
    if name not in DEVICES:
        near = [known for known in DEVICES if name and known.startswith(name)] or difflib.get_close_matches(name, DEVICES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no GPU is called {name!r}.{hint} There are: {', '.join(DEVICES)}.")
    return DEVICES[name]
