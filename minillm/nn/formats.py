"""Number formats, bit by bit: what a float of so many bits can say, and rounding to it by arithmetic alone.

A float is a sign, an exponent and a mantissa: ±1.mantissa · 2^(exponent - bias), or ±0.mantissa · 2^(1 - bias) where the
exponent's bits are all zero (subnormal numbers, which fill the gap around 0). Exponent bits buy range, mantissa bits buy
precision. `round_to` gives what torch's casts give, without a cast. Sources: IEEE 754; fp8: arXiv:2209.05433.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A float format. infinite: whether the topmost exponent is for infinity; e4m3 uses it for numbers, and has only NaN."""

    name: str
    exponent: int
    """Bits of the exponent."""
    mantissa: int
    """Bits of the mantissa that are stored; the leading 1 is not."""
    dtype: torch.dtype
    infinite: bool = True

    @property
    def bits(self) -> int:
        """Of a number, with its sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        if self.infinite:
            return 2.0 ** self.bias * (2 - 2.0 ** -self.mantissa)
        return 2.0 ** (self.bias + 1) * (2 - 2 * 2.0 ** -self.mantissa)  # the last mantissa of the top exponent is NaN

    @property
    def smallest_normal(self) -> float:
        """The smallest number with full precision."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above 0: subnormal, with one bit left."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def step(self) -> float:
        """The distance from 1 to the next number: a relative change of less than half of it is lost."""
        return 2.0 ** -self.mantissa


FORMATS = {f.name: f for f in (
    Format("fp32", 8, 23, torch.float32), Format("bf16", 8, 7, torch.bfloat16), Format("fp16", 5, 10, torch.float16),
    Format("e4m3", 4, 3, torch.float8_e4m3fn, infinite=False), Format("e5m2", 5, 2, torch.float8_e5m2))}


class Bits(NamedTuple):
    """The stored bits of a number as text, and its value."""

    sign: str
    exponent: str
    mantissa: str
    value: float


def bits_of(number: float, form: Format) -> Bits:
    """The nearest number of a format, and its bits as they are stored: 1.0 in bf16 is 0, 01111111, 0000000."""
    if not form.infinite:  # torch's versions differ in what they make of numbers beyond e4m3's largest
        number = max(-form.largest, min(form.largest, number)) if number == number else number
    stored = torch.tensor(number, dtype=torch.float64).to(form.dtype)
    size = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[form.bits // 8]
    pattern = int(stored.view(size)) % 2 ** form.bits
    text = f"{pattern:0{form.bits}b}"
    return Bits(text[0], text[1:1 + form.exponent], text[1 + form.exponent:], float(stored.to(torch.float64)))


def round_to(x: Float[Tensor, "*shape"], form: Format, *, saturate: bool = False) -> Float[Tensor, "*shape"]:
    """Each number's nearest neighbour in a format, ties to the even mantissa, still stored as x is (float32 or wider).

    What is too large becomes infinite (NaN in e4m3), or with `saturate` the largest number.
    """
    _, exponent = torch.frexp(x)  # |x| = [0.5, 1) · 2^exponent
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=2 - form.bias) - 1 - form.mantissa)
    rounded = torch.where(x.isfinite(), torch.round(x / step) * step, x)
    if saturate:
        return rounded.clamp(-form.largest, form.largest)
    beyond = torch.full_like(x, torch.inf if form.infinite else torch.nan).copysign(x)
    return torch.where(rounded.abs() > form.largest, beyond, rounded)
