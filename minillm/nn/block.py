"""One block: attention lets tokens exchange, the feed-forward layer lets each one think; both add to the stream.

Where the norms stand is the one thing that decoders have never agreed on. GPT-1 normalises the stream after each addition
(post); since GPT-2 each part reads a normalised copy and the stream itself is left alone (pre), so that gradients run
through its additions untouched. The others are variations on that. Sources: arXiv:2002.04745 (pre and post),
arXiv:2203.00555 (post with a multiplied stream, DeepNorm), arXiv:2204.02311 §2 (parallel).
"""

from jaxtyping import Float
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.nn.attention import Attention
from minillm.nn.feedforward import FeedForward
from minillm.nn.moe import MixtureOfExperts
from minillm.nn.norms import build_norm


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to the stream. Shapes: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.order, self.alpha, self.kind = config.block, config.residual_alpha, config.layer_kind(layer)
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = build_norm(config) if self.order != "parallel" else None
        self.ffn = MixtureOfExperts(config) if config.experts else FeedForward(config)
        if self.order == "sandwich":
            self.attention_post_norm, self.ffn_post_norm = build_norm(config), build_norm(config)

    def forward(self, x: Float[Tensor, "B T C"], rotary=None, mask=None, cache=None,
                weights: bool = False) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B H _ S"] | None]:
        """The stream after this block, and its attention weights if asked for."""
        attend = (rotary, mask, cache, weights)
        if self.order == "pre":  # GPT-2, LLaMA
            mixed, seen = self.attention(self.attention_norm(x), *attend)
            x = x + mixed
            return x + self.ffn(self.ffn_norm(x)), seen
        if self.order == "post":  # the first Transformer, GPT-1; with alpha: DeepNorm, ChatGLM-6B
            mixed, seen = self.attention(x, *attend)
            x = self.attention_norm(self.alpha * x + mixed)
            return self.ffn_norm(self.alpha * x + self.ffn(x)), seen
        if self.order == "sandwich":  # Gemma 2, GLM-4
            mixed, seen = self.attention(self.attention_norm(x), *attend)
            x = x + self.attention_post_norm(mixed)
            return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x))), seen
        if self.order == "branch":  # OLMo 2
            mixed, seen = self.attention(x, *attend)
            x = x + self.attention_norm(mixed)
            return x + self.ffn_norm(self.ffn(x)), seen
        normed = self.attention_norm(x)  # parallel: GPT-J, PaLM, Falcon-7B; parallel2: GPT-NeoX, Falcon-40B
        mixed, seen = self.attention(normed, *attend)
        return x + mixed + self.ffn(normed if self.ffn_norm is None else self.ffn_norm(x)), seen
