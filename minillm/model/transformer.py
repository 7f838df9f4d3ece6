"""The decoder: embed, L blocks, norm, and one score for every token of the vocabulary.

One call for every family; everything but `ids` is optional and by keyword. A model is built from its configuration
and a seed: the same seed gives the same weights on every device, since they are drawn on the CPU. On the meta device
it takes no memory, so that LLaMA-65B can be counted on a laptop.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.nn.block import Block
from minillm.nn.masks import causal, combine
from minillm.nn.norms import build_norm
from minillm.nn.positions import Waves, alibi, buckets, rotary_turns, two_axes


class Output(NamedTuple):
    """What the model answers when more than logits was asked for; parts not asked for are None.

    logits (B, T, V); hidden: L + 1 tensors (B, T, C), the stream before each block and the normalised end;
    attention: L tensors (B, H, T, S).
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] | None
    attention: tuple[Tensor, ...] | None


class Transformer(nn.Module):
    """A decoder-only language model: token ids (B, T) in, logits (B, T, V) for the next token out."""

    def __init__(self, config: ModelConfig, *, seed: int = 0, device: str | torch.device = "cpu"):
        super().__init__()
        self.config, self.heads = config, slice(None)  # which of the H heads are here: all, or one rank's
        with torch.device("meta"):  # shapes only: torch's own initial values would be drawn to be thrown away
            self.embed = nn.Embedding(config.vocab_size, config.width)
            learned = nn.Embedding(config.context, config.width) if config.pos == "learned" else None
            self.positions = Waves(config.width) if config.pos == "sinusoidal" else learned
            self.relative = nn.Embedding(config.relative_buckets, config.heads) if config.pos == "relative" else None
            self.embed_norm = build_norm(config) if config.embed_norm else None
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
            self.norm = build_norm(config) if config.final_norm else None
            self.head = nn.Linear(config.width, config.vocab_size, bias="head" in config.bias)
        if torch.device(device).type != "meta":
            self.to_empty(device="cpu")
            self.initialise(seed)
            self.to(device)
        if config.tied:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights: N(0, init_std), norms 1, biases 0, residual projections smaller (init_residual)."""
        generator = torch.Generator().manual_seed(seed)
        shrink = 1 / math.sqrt(2 * self.config.layers) if self.config.init_residual else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("out.weight", "down.weight"))
                parameter.normal_(0.0, self.config.init_std * (shrink if residual else 1.0), generator=generator)

    def forward(self, ids: Int[Tensor, "B T"], *, positions: Int[Tensor, "B T"] | None = None,
                padding_mask: Bool[Tensor, "B S"] | None = None, segment_ids: Int[Tensor, "B T"] | None = None,
                prefix_len: int | Int[Tensor, "B"] | None = None, mask_pos: int | Int[Tensor, "B"] | None = None,
                cache=None, return_hidden: bool = False, return_attention: bool = False,
                ) -> Float[Tensor, "B T V"] | Output:
        """Logits for the next token at every place, or an `Output` when hidden states or attention are asked for.

        positions: place of each token; by default 0, 1, ... after what the cache holds, not counting padding.
        padding_mask: True on real tokens, for all keys (those in the cache too).
        segment_ids: packed documents, which do not see one another.   prefix_len: tokens read in both directions.
        mask_pos: with two axes of positions, the place that the answer fills; the prefix's last by default.
        Raises: ValueError for ids or positions that there are none of, or segments with a cache.
        """
        past = 0 if cache is None else cache.length
        keys = past + ids.shape[1]
        if segment_ids is not None and cache is not None:
            raise ValueError("segment_ids and cache together: packed documents are for training; decode one text a row.")
        if positions is None:
            positions = default_positions(ids, past, padding_mask)
        x = self.embedded(ids, positions)
        views = self.views(ids, keys, positions, padding_mask, segment_ids, prefix_len, mask_pos)
        hidden, attention = [], []
        for block in self.blocks:
            hidden.append(x)
            x, seen = block(x, *views[block.kind], cache, return_attention)
            attention.append(seen)
        x = x if self.norm is None else self.norm(x)
        logits = self.scores(x)
        if not (return_hidden or return_attention):
            return logits
        return Output(logits, tuple(hidden) + (x,) if return_hidden else None,
                      tuple(attention) if return_attention else None)

    def embedded(self, ids: Tensor, positions: Tensor) -> Float[Tensor, "B T C"]:
        """The stream's first value."""
        try:
            x = self.embed(ids)
            if self.config.embed_scale != 1:
                x = x * self.config.embed_scale
            if self.positions is not None:
                x = x + self.positions(positions).to(x.dtype)
        except IndexError:
            raise _out_of_range(self.config, ids, positions) from None
        return x if self.embed_norm is None else self.embed_norm(x)

    def views(self, ids: Tensor, keys: int, positions: Tensor, padding_mask: Tensor | None = None, segment_ids: Tensor | None = None,
              prefix_len=None, mask_pos=None) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """For each kind of layer, what it knows of places and may look at. Arguments as of a call; keys: how many there are."""
        if self.config.rope_axes == 2:
            positions = two_axes(positions, *_answer(ids, padding_mask, prefix_len, mask_pos))
        return {kind: self._view(kind, ids, keys, positions, padding_mask, segment_ids, prefix_len)
                for kind in sorted(set(self.config.pattern))}

    def _view(self, kind: str, ids: Tensor, keys: int, positions: Tensor, padding_mask: Tensor | None,
              segment_ids: Tensor | None, prefix_len) -> tuple[Tensor | None, Tensor | None]:
        """One kind's rotary turns and its mask."""
        config, queries = self.config, ids.shape[1]
        mask = combine(queries, keys, padding_mask=padding_mask, segment_ids=segment_ids, prefix_len=prefix_len,
                       window=config.window if kind == "l" else None, device=ids.device)
        if config.pos == "rope":
            local = kind == "l" and config.rope_theta_local is not None
            stretched = replace(config, rope_scaling="none", rope_factor=1.0) if local else config
            axes = positions if config.rope_axes == 2 else positions[..., None]
            return rotary_turns(axes, stretched, config.rope_theta_local if local else None), mask
        if config.pos in ("alibi", "relative"):
            mask = causal(queries, keys, ids.device) if mask is None else mask
            places = positions if queries == keys else default_positions(ids.new_empty(1, keys), 0, padding_mask)
            if config.pos == "alibi":
                bias = alibi(positions, places, config.heads, self.heads).to(next(self.parameters()).dtype)
            else:
                numbers = buckets(positions, places, config.relative_buckets, config.relative_distance)
                bias = self.relative(numbers).movedim(-1, 1)  # (rows, T, S, H) -> (rows, H, T, S)
            return None, bias.masked_fill(~mask, -math.inf)
        return None, mask

    def scores(self, x: Float[Tensor, "B _ C"]) -> Float[Tensor, "B T V"]:
        """Logits, scaled and capped as the configuration says."""
        logits, cap = self.head(x), self.config.logit_softcap
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return logits if cap is None else cap * torch.tanh(logits / cap)


def default_positions(ids: Tensor, past: int, padding_mask: Tensor | None) -> Int[Tensor, "rows T"]:
    """Default positions: count the real tokens, starting after what the cache holds."""
    if padding_mask is None:
        return torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    return (padding_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]


def _answer(ids: Tensor, padding_mask: Tensor | None, prefix_len, mask_pos) -> tuple[Tensor, Tensor]:
    """Where each row's answer begins, and which place it fills: positions that do not count padding, (B or 1, 1)."""
    prompt = torch.as_tensor(0 if prefix_len is None else prefix_len, device=ids.device).reshape(-1, 1)
    if padding_mask is not None:
        keys = torch.arange(padding_mask.shape[1], device=ids.device)
        prompt = (padding_mask & (keys < prompt)).sum(-1, keepdim=True)
    place = (prompt - 1).clamp(min=0) if mask_pos is None else torch.as_tensor(mask_pos, device=ids.device).reshape(-1, 1)
    return prompt, place


def _out_of_range(config: ModelConfig, ids: Tensor, positions: Tensor) -> ValueError:
    """An index error says nothing; this one names the first bad id or position."""
    bad = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(bad):
        return ValueError(f"token id {int(bad[0])} is outside the vocabulary of {config.vocab_size} (0 to "
                          f"{config.vocab_size - 1}). Was the text encoded by another model's tokenizer?")
    return ValueError(f"position {int(positions.max())} is beyond the {config.context} positions that the model has "
                      f"learned. Shorten the text, or train with pos=\"rope\" or a longer context.")


def num_params(model: nn.Module) -> int:
    """Parameters of a model; tied weights count once. Works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())
