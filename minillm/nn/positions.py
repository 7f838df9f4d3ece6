"""Positions: how a token's place comes into attention, which by itself sees a set and not a sequence.

Rotary (RoPE) turns each pair of numbers in a query or key by an angle that grows with its position. The dot product of
two turned vectors depends only on the difference of their positions, so attention sees distance. Pairs are neighbours,
(0, 1), (2, 3), ...: one complex number each, as in the paper. Checkpoints that pair the first half of a head with the
second (Hugging Face's LLaMA) have their rows reordered when they are loaded.
ALiBi turns nothing and subtracts from each score a multiple of the distance; T5 learns what to add for each distance. Waves
are added to the embedding, and so is a learned table, in minillm/model/transformer.py.
Sources: arXiv:2104.09864 §3.4, arXiv:2108.12409, arXiv:1910.10683 §2.1, arXiv:1706.03762 §3.5.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.config import ModelConfig


def rotary_frequencies(size: int, theta: float, device: torch.device | None = None) -> Float[Tensor, "half"]:
    """Radians per token for each pair: theta^(-2i/size) for i = 0, ..., size/2 - 1."""
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    return theta ** -exponents


def stretch(frequencies: Float[Tensor, "half"], config: ModelConfig, theta: float) -> Float[Tensor, "half"]:
    """Frequencies that carry a model to texts `rope_factor` times longer than those it was trained on.

    linear: all pairs slower (position interpolation, arXiv:2306.15595). ntk: a larger theta, so that the slowest pair is
    slowed by the whole factor and the fastest not at all. yarn and llama3: a pair that turns more than rope_fast times in
    a text of training is left alone, one that turns less than rope_slow times is slowed by the whole factor, and between
    them it slides: in the pair's number (yarn, arXiv:2309.00071), or in the number of turns (llama3).
    """
    size, factor = config.rope_size // config.rope_axes, config.rope_factor
    trained = config.rope_context or config.context / factor
    if config.rope_scaling == "none":
        return frequencies
    if config.rope_scaling == "linear":
        return frequencies / factor
    if config.rope_scaling == "ntk":
        return rotary_frequencies(size, theta * factor ** (size / (size - 2)), frequencies.device)
    if config.rope_scaling == "llama3":
        turns = trained * frequencies / (2 * math.pi)
        kept = ((turns - config.rope_slow) / (config.rope_fast - config.rope_slow)).clamp(0, 1)
    else:
        def pair(turns: float) -> float:  # which pair turns this often in a text of training
            return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        first, last = max(math.floor(pair(config.rope_fast)), 0), min(math.ceil(pair(config.rope_slow)), size - 1)
        numbers = torch.arange(size // 2, device=frequencies.device, dtype=torch.float32)
        kept = 1 - ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotary_turns(positions: Int[Tensor, "rows T axes"], config: ModelConfig, theta: float | None = None,
                 ) -> Float[Tensor, "rows T 1 half 2"]:
    """cos and sin of the angle of every position and pair; the 1 is for the heads.

    With two axes, the first half of the pairs turns by the first position and the second half by the second. YaRN also
    makes queries and keys longer, by 1 + ln(factor)/10. Always float32: positions run to millions, and bfloat16 cannot
    count past 256.
    """
    theta = theta or config.rope_theta
    frequencies = stretch(rotary_frequencies(config.rope_size // config.rope_axes, theta, positions.device), config, theta)
    angles = (positions[..., None].float() * frequencies).flatten(-2)[:, :, None]  # (rows, T, axes, ·) -> (rows, T, 1, half)
    turns = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return turns * (1 + 0.1 * math.log(config.rope_factor)) if config.rope_scaling == "yarn" else turns


def rotate(x: Float[Tensor, "B T heads D"], turns: Float[Tensor, "rows T 1 half 2"]) -> Float[Tensor, "B T heads D"]:
    """Turn each pair (a, b) of the last dim to (a cos - b sin, a sin + b cos); what is beyond the pairs stays as it is.

    Eager, it is one complex product in float32, several times as fast on a CPU as the four real ones, which the
    compiler fuses better and which float64 needs to keep its precision.
    """
    turned = 2 * turns.shape[3]
    if turned < x.shape[3]:
        return torch.cat((rotate(x[..., :turned], turns), x[..., turned:]), dim=-1)
    if x.dtype != torch.float64 and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, heads, D) -> (B, T, heads, D/2)
        return torch.view_as_real(pairs * torch.view_as_complex(turns)).flatten(-2).type_as(x)
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def two_axes(places: Int[Tensor, "#B T"], prompt: Int[Tensor, "#B 1"], mask_pos: Int[Tensor, "#B 1"],
             ) -> Int[Tensor, "rows T 2"]:
    """ChatGLM-6B's two positions of a token: its place in the prompt, where an answer stays at the place that it fills
    (mask_pos), and its place in the answer, 1, 2, ... with 0 for the prompt. Source: GLM, arXiv:2103.10360 §2.2."""
    answer = places >= prompt
    return torch.stack((torch.where(answer, mask_pos, places), (places - prompt + 1).clamp(min=0).expand_as(answer)), dim=-1)


def alibi_slopes(heads: int, device: torch.device | None = None) -> Float[Tensor, "H"]:
    """What each head loses per token of distance: 2^(-8/n), 2^(-16/n), ... for n heads, if n is a power of two.

    Else those of the next power of two below, and between them every other one of the next above.
    """
    def slopes(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    below = 2 ** int(math.log2(heads))
    return torch.tensor(slopes(below) + slopes(2 * below)[::2][:heads - below], device=device)


def alibi(queries: Int[Tensor, "#rows T"], keys: Int[Tensor, "#rows S"], heads: int, mine: slice = slice(None),
          ) -> Float[Tensor, "rows H T S"]:
    """What is added to the scores: minus slope times distance, for queries and keys at these positions.

    mine: those of the heads that are wanted, if not all.
    """
    distance = queries[:, None, :, None] - keys[:, None, None, :]
    return -alibi_slopes(heads, queries.device)[mine, None, None] * distance


def buckets(queries: Int[Tensor, "#rows T"], keys: Int[Tensor, "#rows S"], count: int, furthest: int) -> Int[Tensor, "rows T S"]:
    """T5's buckets of distances to the past: one for each below count/2, then wider and wider ones, up to `furthest`."""
    distance, exact = (queries[:, :, None] - keys[:, None, :]).clamp(min=0), count // 2
    wide = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact) * (count - exact)).long()
    return torch.where(distance < exact, distance, wide.clamp(max=count - 1))


def waves(positions: Int[Tensor, "rows T"], width: int) -> Float[Tensor, "rows T C"]:
    """The first Transformer's positions: sine and cosine side by side, of wavelengths from 2π to 2π · 10,000 tokens."""
    angles = positions[:, :, None].float() * rotary_frequencies(width + width % 2, 10_000.0, positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


class Waves(nn.Module):
    """`waves` in the place of a learned table. Shapes: positions (rows, T) -> (rows, T, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, positions: Int[Tensor, "rows T"]) -> Float[Tensor, "rows T C"]:
        return waves(positions, self.width)
