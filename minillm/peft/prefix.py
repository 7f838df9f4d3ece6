"""Prefix tuning: P trained keys and values in front of the text, in every layer.

A frozen model looks back at a text that never was, so that its state can be anything, not only what some words would give
(prompt.py). The keys are taken as they are, never rotated; the text's places begin at P, as in PEFT. All goes through the
cache's door: a cache that already holds P tokens is what the model is given. Source: arXiv:2101.00190.
Left out: training through a small network that is dropped afterwards (their §4.3); text before the prefix.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.peft.freeze import Adapter, begin


class PrefixCache:
    """A cache with keys and values in front of what another cache holds, or of nothing.

    before: for each layer a pair (keys, values), each (G, P, D), or (B, G, P, D).
    """

    def __init__(self, before, inner=None):
        self.before, self.inner = before, inner
        self.length = before[0][0].shape[-2] + (inner.length if inner is not None else 0)

    def update(self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"],
               ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """All keys and values of a layer: those in front, those so far, and these."""
        k, v = (k, v) if self.inner is None else self.inner.update(layer, k, v)
        keys, values = (x.to(k.dtype).expand(len(k), -1, -1, -1) for x in self.before[layer])
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)


class Recorder:
    """A cache that keeps what it is given."""

    def __init__(self):
        self.length, self.before = 0, []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep one layer's."""
        self.before.append((k, v))
        return k, v


class Prefix(Adapter, nn.Module):
    """The table (L, 2, G, P, D): for each layer its keys and values.   Cost: 2 · L · G · P · D parameters."""

    def __init__(self, table: Float[Tensor, "L 2 G P D"]):
        super().__init__()
        self.table = nn.Parameter(table)


def add_prefix(model: nn.Module, length: int = 16, *, ids: Int[Tensor, "P"] | None = None, seed: int = 0) -> None:
    """Freeze the model and put `length` trained keys and values in front of every text.

    ids: begin with the keys and values of these tokens, so that at first the model acts as if they stood in front.
    Raises: ValueError for a length below 1, or a second method.
    """
    config, like = model.config, model.embed.weight
    length = length if ids is None else len(ids)
    if length < 1:
        raise ValueError(f"a prefix of {length}: it must be at least 1.")
    if ids is None:
        shape, generator = (config.layers, 2, config.kv_size, length, config.head_size), torch.Generator().manual_seed(seed)
        table = torch.randn(shape, generator=generator)
    else:
        seen = Recorder()
        with torch.no_grad():
            model(ids[None], cache=seen)
        table = torch.stack([torch.stack((k[0], v[0])) for k, v in seen.before])
    begin(model, "prefix", length=length)
    model.prefix = Prefix(table.to(like.device, torch.promote_types(like.dtype, torch.float32)))
    model.register_forward_pre_hook(_put_before, with_kwargs=True)


def moved(kwargs: dict, rows: int, length: int, device: torch.device) -> dict:
    """The model's options where `length` places come before the text.  Raises: ValueError for packed documents."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if "segment_ids" in kwargs:
        raise ValueError("segment_ids with something in front of the text: packed documents would share it. Use one text a row.")
    for name in ("positions", "prefix_len", "mask_pos"):
        if name in kwargs:
            kwargs[name] = kwargs[name] + length
    if "padding_mask" in kwargs:
        front = torch.ones(rows, length, dtype=torch.bool, device=device)
        kwargs["padding_mask"] = torch.cat((front, kwargs["padding_mask"]), dim=1)
    return kwargs


def _put_before(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The hook: what the model is called with."""
    ids, table = args[0], model.prefix.table
    return args, moved(kwargs, len(ids), table.shape[3], ids.device) | {"cache": PrefixCache(table, kwargs.get("cache"))}
