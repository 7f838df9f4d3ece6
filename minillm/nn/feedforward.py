"""The feed-forward layer: each token's vector, alone, through a wide hidden layer and back.

Plain: down(act(up(x))). Gated (SwiGLU, GeGLU): down(act(gate(x)) * up(x)), a third matrix for the same parameters at
two thirds of the width. Sources: arXiv:1706.03762 §3.3, arXiv:2002.05202.
"""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.config import ModelConfig

ACTIVATIONS = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu, "swiglu": F.silu, "geglu": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """Shapes: (..., C) -> (..., C), through (..., F)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        bias = "mlp" in config.bias
        self.gate = nn.Linear(config.width, config.ffn_size, bias=bias) if config.gated else None
        self.up = nn.Linear(config.width, config.ffn_size, bias=bias)
        self.down = nn.Linear(config.ffn_size, config.width, bias=bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "... C"]:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))
