"""Mixture of experts: several feed-forward layers, of which each token uses a few, so parameters grow and work does not.

A router scores the experts for each token; the best top_k answer, weighted by their probabilities. Here every expert
sees its tokens in turn, which is exact and drops nobody. Sources: arXiv:1701.06538, arXiv:2401.04088 §2.1.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.nn.feedforward import FeedForward


def route(scores: Float[Tensor, "N E"], top_k: int, renormalise: bool) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Weights and numbers of the experts that each token goes through: softmax over all, then the best top_k."""
    weights, chosen = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).topk(top_k)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), chosen


class MixtureOfExperts(nn.Module):
    """Shapes: (B, T, C) -> (B, T, C). Cost: top_k feed-forward layers and the router for each token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.renormalise = config.top_k, config.norm_topk
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        tokens = rearrange(x, "b t c -> (b t) c")
        weights, chosen = route(self.router(tokens), self.top_k, self.renormalise)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)  # which tokens, and as their how manieth choice
            out.index_add_(0, token, expert(tokens[token]) * weights[token, place, None].to(x.dtype))
        return rearrange(out, "(b t) c -> b t c", b=len(x))
