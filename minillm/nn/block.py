"""One block: attention lets tokens exchange, the feed-forward layer lets each one think; both add to the stream.

Pre-norm, as in GPT-2 and everything since: each part reads a normalised copy, and the residual stream itself is never
normalised, so gradients run through its additions untouched. Source: arXiv:2002.04745.
"""

from jaxtyping import Float
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.nn.attention import Attention
from minillm.nn.feedforward import FeedForward
from minillm.nn.norms import build_norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). Shapes: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = build_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Float[Tensor, "B T C"], rotary=None, mask=None, cache=None,
                weights: bool = False) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B H T S"] | None]:
        """The stream after this block, and its attention weights if asked for."""
        mixed, seen = self.attention(self.attention_norm(x), rotary, mask, cache, weights)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), seen
