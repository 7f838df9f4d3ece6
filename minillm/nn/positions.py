"""Rotary positions (RoPE): turn each pair of numbers in a query or key by an angle that grows with its position.

The dot product of two turned vectors depends only on the difference of their positions, so attention sees distance.
Pairs are neighbours, (0, 1), (2, 3), ...: one complex number each, as in the paper. Checkpoints that pair the first
half of a head with the second (Hugging Face's LLaMA) have their rows reordered when they are loaded.
Source: arXiv:2104.09864 §3.4. Learned positions are a plain table in minillm/model/transformer.py.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_frequencies(head_size: int, theta: float, device: torch.device | None = None) -> Float[Tensor, "half"]:
    """Radians per token for each pair: theta^(-2i/D) for i = 0, ..., D/2 - 1."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    return theta ** -exponents


def rotary_turns(positions: Int[Tensor, "rows T"], frequencies: Float[Tensor, "half"],
                 ) -> Float[Tensor, "rows T 1 half 2"]:
    """cos and sin of the angle of every position and pair; the 1 is for the heads.

    Always float32: positions run to millions, and bfloat16 cannot count past 256.
    """
    angles = positions[:, :, None, None].float() * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Float[Tensor, "B T heads D"], turns: Float[Tensor, "rows T 1 half 2"]) -> Float[Tensor, "B T heads D"]:
    """Turn each pair (a, b) of the last dim to (a cos - b sin, a sin + b cos).

    Eager, it is one complex product in float32, several times as fast on a CPU as the four real ones, which the
    compiler fuses better and which float64 needs to keep its precision.
    """
    if x.dtype != torch.float64 and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, heads, D) -> (B, T, heads, D/2)
        return torch.view_as_real(pairs * torch.view_as_complex(turns)).flatten(-2).type_as(x)
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
