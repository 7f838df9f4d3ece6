"""Who may look at whom: each reason to hide a key is one boolean mask, and they combine with `&`.

True means "this query may see this key". With nothing but causality to say, `combine` answers None: torch's attention
then uses its own causal path, which never builds the T x S square.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def causal(queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "1 1 T S"]:
    """Each query sees the keys up to its own place; the queries are the last ones of the keys."""
    places = torch.arange(keys, device=device)
    return (places <= places[keys - queries:, None])[None, None]


def prefix(queries: int, keys: int, length: int | Int[Tensor, "B"],
           device: torch.device | None = None) -> Bool[Tensor, "batch 1 T S"]:
    """Causal, but the first `length` keys are seen by everybody: a prompt read in both directions."""
    lengths = torch.as_tensor(length, device=device).reshape(-1, 1, 1, 1)
    return causal(queries, keys, device) | (torch.arange(keys, device=device) < lengths)


def banded(queries: int, keys: int, window: int, device: torch.device | None = None) -> Bool[Tensor, "1 1 T S"]:
    """Keys closer than `window`: the token itself and the window - 1 before it (and after it, where a prefix allows)."""
    places = torch.arange(keys, device=device)
    return ((places - places[keys - queries:, None]).abs() < window)[None, None]


def padding(real: Bool[Tensor, "B S"]) -> Bool[Tensor, "B 1 1 S"]:
    """Padding keys are seen by nobody."""
    return real[:, None, None, :]


def documents(segment_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """Packed documents do not see one another."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def combine(queries: int, keys: int, *, padding_mask: Bool[Tensor, "B S"] | None = None,
            segment_ids: Int[Tensor, "B T"] | None = None, prefix_len: int | Int[Tensor, "B"] | None = None,
            window: int | None = None, device: torch.device | None = None) -> Bool[Tensor, "batch 1 T S"] | None:
    """All the reasons at once, or None when there is only causality.

    A query that would see nothing (a padding token in front of a text) sees itself instead: softmax over an empty
    row is not a number, and its output is ignored anyway.
    """
    narrow = window is not None and window < keys
    if padding_mask is None and segment_ids is None and prefix_len is None and not narrow:
        return None
    mask = causal(queries, keys, device) if prefix_len is None else prefix(queries, keys, prefix_len, device)
    if narrow:
        mask = mask & banded(queries, keys, window, device)
    if padding_mask is not None:
        mask = mask & padding(padding_mask)
    if segment_ids is not None:
        mask = mask & documents(segment_ids)
    places = torch.arange(keys, device=device)
    itself = (places == places[keys - queries:, None])[None, None]
    return mask | (itself & ~mask.any(-1, keepdim=True))
