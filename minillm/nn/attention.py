"""Attention: every token asks a question (q), every earlier token offers an answer (v) under a label (k).

Two paths compute the same thing. `attend_by_hand` is the formula, and gives the weights back for a picture; `attend`
goes through torch's scaled_dot_product_attention, which never writes the T x S square of weights to memory.
Grouped-query attention is the general case: H query heads share G key and value heads; G = H is multi-head attention,
G = 1 multi-query. The readable path runs when it must: for weights, and for soft caps. Sources: arXiv:1706.03762 §3.2, arXiv:2305.13245.
"""

import math

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.config import ModelConfig
from minillm.nn.masks import causal
from minillm.nn.norms import RMSNorm
from minillm.nn.positions import rotate


Mask = Bool[Tensor, "batch heads T S"] | Float[Tensor, "batch heads T S"]


def attend_by_hand(q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"],
                   mask: Mask | None = None, *, scale: float | None = None, softcap: float | None = None,
                   ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T S"]]:
    """softmax(q kᵀ · scale + mask) v, and the weights. Softmax runs in float32 or wider.

    mask: True where a query sees a key, or numbers to add to the scores; none means causal.   scale: 1/√D by default.
    softcap: scores are squeezed into ± this by a tanh, before the mask.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (repeat(x, "b g s d -> b (g group) s d", group=group) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = causal(q.shape[2], k.shape[2], q.device) if mask is None else mask
    wide = scores.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else scores + seen
    weights = wide.softmax(-1, dtype=torch.promote_types(wide.dtype, torch.float32)).to(v.dtype)
    return weights @ v, weights


def attend(q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"],
           mask: Mask | None = None, *, scale: float | None = None) -> Float[Tensor, "B H T D"]:
    """The same by torch's fused kernels. No mask means causal, with the queries last among the keys."""
    (_, heads, queries, _), (_, kv_heads, keys, _) = q.shape, k.shape
    if mask is None and queries == 1:  # one query sees everything
        if kv_heads == heads:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        # Let the heads of a group stand as queries beside each other, without copies of k.
        grouped = q.unflatten(1, (kv_heads, -1)).squeeze(3)  # (B, H, 1, D) -> (B, G, H/G, D)
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(q.shape)
    if mask is None and queries < keys:
        mask = causal(queries, keys, q.device)  # torch's own causal mask would start the queries at the first key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                                          enable_gqa=kv_heads != heads)


class Attention(nn.Module):
    """Project to queries, keys and values; rotate; attend; project back. Shapes: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_size = layer, config.head_size  # how many heads, the weights' shapes say
        self.scale, self.softcap, self.qk_norm = config.attn_scale, config.attn_softcap, config.qk_norm
        queries, keys = config.heads * config.head_size, config.kv_size * config.head_size
        self.q = nn.Linear(config.width, queries, bias="qkv" in config.bias)
        self.k = nn.Linear(config.width, keys, bias="qkv" in config.bias)
        self.v = nn.Linear(config.width, keys, bias="qkv" in config.bias)
        self.out = nn.Linear(queries, config.width, bias="out" in config.bias)
        if self.qk_norm != "none":
            one = config.head_size if self.qk_norm == "head" else None
            self.q_norm, self.k_norm = RMSNorm(one or queries, config.norm_eps), RMSNorm(one or keys, config.norm_eps)
        self.extra = None  # a module from outside that adds to what the heads bring: minillm/peft/llama_adapter.py

    def forward(self, x: Float[Tensor, "B T C"], rotary: Float[Tensor, "rows T 1 half 2"] | None = None,
                mask: Mask | None = None, cache=None,
                weights: bool = False) -> tuple[Float[Tensor, "B _ C"], Float[Tensor, "B H T S"] | None]:
        """The layer's output (with sequence parallelism, of a part of the tokens), and the attention weights if asked for."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        # Plain views here: writing one token at a time, einops would take a seventh of the time of a small model.
        q = q.unflatten(-1, (-1, self.head_size))  # (B, T, H·D) -> (B, T, H, D)
        k = k.unflatten(-1, (-1, self.head_size))  # (B, T, G·D) -> (B, T, G, D)
        v = v.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, T, G·D) -> (B, G, T, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, T, heads, D) -> (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if weights or self.softcap is not None:
            mixed, seen = attend_by_hand(q, k, v, mask, scale=self.scale, softcap=self.softcap)
        else:
            mixed, seen = attend(q, k, v, mask, scale=self.scale), None
        if self.extra is not None:
            mixed = mixed + self.extra(q, self)
        return self.out(mixed.transpose(1, 2).flatten(2)), seen  # (B, H, T, D) -> (B, T, H·D)
