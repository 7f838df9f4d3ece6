"""LLaMA-Adapter: in the upper layers, queries also look at a few trained vectors, through a gate that begins closed.

As in prefix tuning each layer has keys and values of its own in front of the text, but they are projected by the layer's frozen
matrices from P trained vectors, have a softmax of their own, and each head's answer is multiplied by tanh(gate), with gate = 0
at first: the model begins exactly as it was, and what is random at first cannot disturb it. Queries are rotated, these keys
are not. Source: arXiv:2303.16199 §3.2. Left out: pictures as input, gates shared by all heads (PEFT's AdaptionPrompt).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.nn.attention import attend_by_hand
from minillm.peft.freeze import Adapter, begin


class GatedPrefix(Adapter, nn.Module):
    """One layer's vectors (P, C) and gates (H).   Cost: P · C + H parameters."""

    def __init__(self, length: int, heads: int, like: Tensor, std: float, generator: torch.Generator):
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        start = torch.empty(length, like.shape[-1]).normal_(0, std, generator=generator)
        self.prompt = nn.Parameter(start.to(like.device, dtype))
        self.gate = nn.Parameter(torch.zeros(heads, device=like.device, dtype=dtype))

    def forward(self, q: Float[Tensor, "B H T D"], attention: nn.Module) -> Float[Tensor, "B H T D"]:
        """What is added to the heads' own answers."""
        prompt = self.prompt.to(q.dtype)
        k, v = attention.k(prompt), attention.v(prompt)
        k = attention.k_norm(k) if attention.qk_norm == "full" else k
        k, v = (x.unflatten(-1, (-1, attention.head_size)) for x in (k, v))  # (P, G·D) -> (P, G, D)
        k = attention.k_norm(k) if attention.qk_norm == "head" else k
        k, v = (x.transpose(0, 1).expand(len(q), -1, -1, -1).to(q.dtype) for x in (k, v))  # (B, G, P, D)
        everything = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mixed, _ = attend_by_hand(q, k, v, everything, scale=attention.scale, softcap=attention.softcap)
        return self.gate.tanh().to(mixed.dtype)[:, None, None] * mixed


def add_llama_adapter(model: nn.Module, length: int = 10, layers: int | None = None, *, seed: int = 0) -> None:
    """Freeze the model and give its last `layers` (all by default) gated prefixes of `length` vectors.

    Raises: ValueError for more layers than there are, or a second method.
    """
    blocks = list(model.blocks)
    layers = len(blocks) if layers is None else layers
    if not 1 <= layers <= len(blocks) or length < 1:
        raise ValueError(f"{length} vectors in {layers} layers: the model has {len(blocks)}, and both must be at least 1.")
    begin(model, "llama_adapter", length=length, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    for block in blocks[-layers:]:
        block.attention.extra = GatedPrefix(length, model.config.heads, model.embed.weight, model.config.init_std, generator)
