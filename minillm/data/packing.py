"""Packing: several documents share one training sequence, so that no token is spent on padding.

By default a token may look back into the document before its own, which short contexts hardly notice. `segments` gives
what it takes to keep documents apart: which one each token belongs to, and its position inside it.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def segments(ids: Int[Tensor, "B T"], end_of_text: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """(segment_ids, positions) of packed ids; a document's <|endoftext|> is its own last token.

    With E for the end: [a b E c d E e] -> segments [0 0 0 1 1 1 2], positions [0 1 2 0 1 2 0].
    """
    ends = ids == end_of_text
    starts = torch.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    began = torch.where(starts, places, 0).cummax(dim=1).values
    return starts.long().cumsum(1), places - began
