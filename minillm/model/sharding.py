"""Which weight splits how over tensor-parallel ranks: data only; the work is done by minillm/parallel/tensor_parallel.py.

A matrix whose outputs are independent of one another (heads, hidden units) is split by columns of xW, so that every rank
makes some of them; the matrix behind it, which adds them up, is split by rows, and the ranks' results are summed. Tables
and the head are split by token. What remains is small, or needs all of a token's vector, and stays whole on every rank.
torch's nn.Linear stores W transposed: its columns are dimension 0.
Source: arXiv:1909.08053 §3. Differs from Megatron-LM: feed-forward widths and vocabularies need not divide, the first
ranks take one more; there, vocabularies are padded. Left out: experts, which split by expert.
"""

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from minillm.config import ModelConfig
from minillm.model.transformer import Transformer


class Split(NamedTuple):
    """How one parameter is shared out."""

    how: Literal["columns", "rows", "vocabulary", "whole"]
    """By outputs, by inputs, by token, or not at all."""
    pieces: int = 1
    """What must stay together, how often: heads, hidden units, tokens. With fewer pieces than ranks, several ranks hold
    the same one."""
    even: bool = False
    """Whether all ranks must get the same number: else query heads would not sit with their KV heads."""


WHOLE = Split("whole")


def sharding_table(config: ModelConfig) -> dict[str, Split]:
    """Pattern of parameter names -> its split; the first that matches counts. It covers every parameter of the model.

    The last entry is no parameter but the slice of heads that ALiBi's slopes are for.
    """
    heads, keys = Split("columns", config.heads, even=True), Split("columns", config.kv_size, even=True)
    hidden, tokens = Split("columns", config.ffn_size), Split("vocabulary", config.vocab_size)
    return {
        "embed.weight": tokens, "head.*": tokens,
        "positions.weight": WHOLE,
        "relative.weight": heads,  # T5's table: a column of numbers for each head
        "*norm.*": WHOLE,  # over a token's vector, or over one head (qk_norm = "head")
        "blocks.*.attention.q.*": heads, "blocks.*.attention.k.*": keys, "blocks.*.attention.v.*": keys,
        "blocks.*.attention.out.weight": Split("rows", config.heads, even=True),
        "blocks.*.attention.out.bias": WHOLE,  # added once, to the sum
        "blocks.*.ffn.gate.*": hidden, "blocks.*.ffn.up.*": hidden,
        "blocks.*.ffn.down.weight": Split("rows", config.ffn_size),
        "blocks.*.ffn.down.bias": WHOLE,
        "heads": heads,
    }


def why_not(config: ModelConfig, ranks: int) -> str | None:
    """Why this model cannot be split over so many ranks, and what can; None if it can."""
    if ranks < 1:
        return f"tp = {ranks}: at least 1 rank is needed."
    if ranks == 1:
        return None
    if config.experts:
        return (f"tp = {ranks} with {config.experts} experts: experts are shared out whole, each to one rank (expert parallelism), "
                f"not cut. Use tp = 1.")
    if config.qk_norm == "full":
        return (f"tp = {ranks} with qk_norm = \"full\": the norm is over all {config.heads} heads at once, and a rank would see "
                f"{config.heads / ranks:g}. Use tp = 1, or qk_norm = \"head\".")
    if config.heads % ranks or (config.kv_size % ranks and ranks % config.kv_size):
        shared = f" that share {config.kv_size} KV heads" if config.kv_size != config.heads else ""
        fit = [p for p in range(1, config.heads + 1) if config.heads % p == 0 and (config.kv_size % p == 0 or p % config.kv_size == 0)]
        return (f"{config.heads} query heads{shared} cannot be shared out evenly to {ranks} ranks. "
                f"Numbers of ranks that work: {', '.join(map(str, fit))}.")
    for name, size in (("ffn_width", config.ffn_size), ("vocab_size", config.vocab_size)):
        if size < ranks:
            return f"{name} = {size} is less than {ranks} ranks: some would have nothing. Use tp = {size} or less."
    return None


def sharding_rows(config: ModelConfig, ranks: int) -> str:
    """A table for reading: each parameter of one block and outside the blocks, its shape, its split, and one rank's shape.

    Where the ranks' shares differ, the shape is that of the first. Raises: ValueError with the reason of `why_not`.
    """
    if reason := why_not(config, ranks):
        raise ValueError(reason)
    table, rows = sharding_table(config), [("parameter", "whole", "split by", f"on each of {ranks} ranks")]
    for name, parameter in Transformer(replace(config, layers=1), device="meta").named_parameters():
        split, shape = _look_up(name, table), list(parameter.shape)
        along = 1 if split.how == "rows" or name.startswith("relative") else 0
        if split.how != "whole":
            shape[along] = -(-split.pieces // ranks) * (shape[along] // split.pieces)
        held = f"  (each by {ranks // split.pieces})" if split.how != "whole" and split.pieces < ranks else ""
        rows.append((name.replace("blocks.0", "blocks.i"), _shape(parameter.shape), split.how, _shape(shape) + held))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _look_up(name: str, table: dict[str, Split]) -> Split:
    return next(split for pattern, split in table.items() if fnmatchcase(name, pattern))


def _shape(shape) -> str:
    return " x ".join(f"{size:,}" for size in shape)
