"""Prompt tuning: P trained embeddings stand in front of the text, as if they were tokens.

prefix.py with less freedom: only the input of the first layer is trained, P · C numbers, and the layers above make of it what
they make of words. The model reads P more tokens; their logits are cut off. With a cache they are read once, with the prompt's
text, and kept beside it. Source: arXiv:2104.08691. Left out: several prompts in one batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.peft.freeze import Adapter, begin
from minillm.peft.prefix import PrefixCache, moved


class SoftPrompt(Adapter, nn.Module):
    """The vectors (P, C), of the size that embeddings have when the model has scaled them.   Cost: P · C parameters."""

    def __init__(self, vectors: Float[Tensor, "P C"], scale: float):
        super().__init__()
        self.vectors, self.scale, self.reading = nn.Parameter(vectors * scale), scale, False


class _Splitting:
    """A fresh cache that gets the text, and beside it (`in_front`) what was before the text."""

    def __init__(self, inner, length: int):
        self.inner, self.size, self.length, inner.in_front = inner, length, 0, []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values, in two parts."""
        self.inner.in_front.append((k[:, :, :self.size], v[:, :, :self.size]))
        self.inner.update(layer, k[:, :, self.size:], v[:, :, self.size:])
        return k, v


def add_prompt(model: nn.Module, length: int = 16, *, ids: Int[Tensor, "P"] | None = None, seed: int = 0) -> None:
    """Freeze the model and put `length` trained vectors in front of every text: at first the rows of some tokens.

    ids: of these tokens; by default drawn at random.   Raises: ValueError for a length below 1, or a second method.
    """
    length = length if ids is None else len(ids)
    if length < 1:
        raise ValueError(f"a prompt of {length} vectors: it must have at least 1.")
    table = model.embed.weight
    if ids is None:
        ids = torch.randint(len(table), (length,), generator=torch.Generator().manual_seed(seed))
    begin(model, "prompt", length=length)
    start = table.detach()[ids.to(table.device)].to(torch.promote_types(table.dtype, torch.float32))
    model.embed.soft_prompt = SoftPrompt(start, model.config.embed_scale)
    model.register_forward_pre_hook(_make_room, with_kwargs=True)
    model.embed.register_forward_hook(_fill)
    model.register_forward_hook(_cut)


def _make_room(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before the model: places for the prompt, or what is kept of it."""
    ids, prompt, cache = args[0], model.embed.soft_prompt, kwargs.get("cache")
    length = len(prompt.vectors)
    prompt.reading = cache is None or cache.length == 0
    rest = moved(kwargs, len(ids), length, ids.device)
    if not prompt.reading:
        return args, rest | {"cache": PrefixCache(cache.in_front, cache)}
    if "positions" in rest:
        front = torch.arange(length, device=ids.device).expand(len(rest["positions"]), -1)
        rest["positions"] = torch.cat((front, rest["positions"]), dim=1)
    if cache is not None:
        rest["cache"] = _Splitting(cache, length)
    return (torch.cat((ids.new_zeros(len(ids), length), ids), dim=1),), rest


def _fill(embed: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """After the embedding: the prompt's vectors in their places."""
    vectors = embed.soft_prompt.vectors
    if not embed.soft_prompt.reading:
        return out
    front = (vectors / embed.soft_prompt.scale).to(out.dtype).expand(len(out), -1, -1)
    return torch.cat((front, out[:, len(vectors):]), dim=1)


def _cut(model: nn.Module, args: tuple, out):
    """After the model: the text's places alone."""
    length = len(model.embed.soft_prompt.vectors)
    if not model.embed.soft_prompt.reading:
        return out
    if isinstance(out, Tensor):
        return out[:, length:]
    hidden, attention = out.hidden, out.attention
    return type(out)(out.logits[:, length:], hidden and tuple(x[:, length:] for x in hidden),
                     attention and tuple(x[:, :, length:] for x in attention))
