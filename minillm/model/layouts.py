"""How published checkpoints name and shape their tensors: one `Layout` a family, one `Rule` a kind of tensor.

Oddities (transposed weights, queries, keys and values in one tensor, rotary pairs by halves, norms that store w - 1) are
undone by a rule's `unpack` when loading and redone by its `pack` when saving, so that the model itself has none of them.
A layout says what a configuration is called there and back; whether it can express a configuration at all is found by
going there and back, not by a family's name. The families themselves are in published.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from minillm.config import ModelConfig

Unpack = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Pack = Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


@dataclass(frozen=True)
class Rule:
    """One of their tensors and the one or several of ours that it holds; {i} stands for the layer, {j} for the expert."""

    theirs: str
    ours: tuple[str, ...]
    unpack: Unpack = lambda tensor, config: (tensor,)
    pack: Pack = lambda tensors, config: tensors[0]


@dataclass(frozen=True)
class Layout:
    """A family's published form.

    keys: field of ours -> key in their config.json, or (key, value when it is not there).   fixed: fields that the family
    always has.   read, write: what a copy of values cannot say.   constants: keys that are always written so, and
    refused when config.json says otherwise.
    """

    model_type: str
    architecture: str
    prefix: str
    rules: tuple[Rule, ...] | Callable[[ModelConfig], tuple[Rule, ...]]
    keys: dict[str, str | tuple]
    fixed: dict
    read: Callable[[dict], dict] = lambda theirs: {}
    write: Callable[[ModelConfig], dict] = lambda config: {}
    constants: dict = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def rules_for(self, config: ModelConfig) -> tuple[Rule, ...]:
        """The rules; a few families name tensors by what the configuration says."""
        return self.rules(config) if callable(self.rules) else self.rules

    def fields(self, theirs: dict) -> dict:
        """Our fields from their config.json. Raises: KeyError for a missing key, ValueError for what cannot be said."""
        for key, value in self.constants.items():
            if theirs.get(key, value) != value:
                raise ValueError(f"config.json: {key} = {theirs[key]!r} cannot be loaded, only {value!r}.")
        copied = {ours: theirs[key] if isinstance(key, str) else theirs.get(*key) for ours, key in self.keys.items()}
        return {"init_residual": False} | self.fixed | copied | self.read(theirs)

    def config_json(self, config: ModelConfig) -> dict:
        """Their config.json from our fields."""
        resolved = {"kv_heads": config.kv_size, "head_dim": config.head_size, "ffn_width": config.ffn_size,
                    "rope_dim": config.rope_size}
        copied = {key if isinstance(key, str) else key[0]: resolved.get(ours, getattr(config, ours))
                  for ours, key in self.keys.items()}
        return copied | self.constants | self.write(config)


# --- rules -----------------------------------------------------------------------------------------------------------

BOTH = ("weight", "bias")


def same(theirs: str, ours: str, parts: tuple[str, ...] = BOTH) -> list[Rule]:
    """Tensors that differ by name alone."""
    return [Rule(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in parts]


def transposed(theirs: str, ours: str) -> list[Rule]:
    """Conv1D stores (in, out)."""
    turn = Rule(f"{theirs}.weight", (f"{ours}.weight",), lambda t, c: (t.T,), lambda ts, c: ts[0].T)
    return [turn, Rule(f"{theirs}.bias", (f"{ours}.bias",))]


def shifted(theirs: str, ours: str) -> list[Rule]:
    """A norm that stores w - 1 (Gemma)."""
    return [Rule(f"{theirs}.weight", (f"{ours}.weight",), lambda t, c: (t + 1,), lambda ts, c: ts[0] - 1)]


def neighbours(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of each head, from rotary pairs (i, i + n/2) to (2i, 2i + 1); per axis, and what is not rotated stays."""
    return tensor.unflatten(0, (-1, config.head_size))[:, _order(config)].flatten(0, 1)


def halves(tensor: Tensor, config: ModelConfig) -> Tensor:
    """The way back."""
    return tensor.unflatten(0, (-1, config.head_size))[:, _order(config).argsort()].flatten(0, 1)


def _order(config: ModelConfig) -> Tensor:
    """For each of our places in a head, the place in theirs."""
    if config.pos != "rope":
        return torch.arange(config.head_size)
    size = config.rope_size // config.rope_axes
    one = rearrange(torch.arange(size), "(two half) -> (half two)", two=2)
    return torch.cat([one + axis * size for axis in range(config.rope_axes)] + [torch.arange(config.rope_size, config.head_size)])


def by_halves(theirs: str, ours: str, parts: tuple[str, ...] = BOTH, shift: float = 0.0) -> list[Rule]:
    """Queries, keys or their norms, with rotary pairs by halves; shift: as in `shifted`."""
    return [Rule(f"{theirs}.{part}", (f"{ours}.{part}",), lambda t, c: (neighbours(t + shift, c),),
                 lambda ts, c: halves(ts[0], c) - shift) for part in parts]


def fused(theirs: str, split: Unpack, join: Pack, parts: tuple[str, ...] = BOTH) -> list[Rule]:
    """Queries, keys and values in one tensor."""
    return [Rule(f"{theirs}.{part}", tuple(f"blocks.{{i}}.attention.{x}.{part}" for x in "qkv"), split, join) for part in parts]


def split_by_group(tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """One view decodes BLOOM, GPT-NeoX, ChatGLM and every Falcon: for each KV head its queries, then its key and value."""
    grouped = tensor.unflatten(0, (config.kv_size, config.heads // config.kv_size + 2, config.head_size))
    q, k, v = grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)
    return neighbours(q, config), neighbours(k, config), v


def join_by_group(tensors: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
    """The way back."""
    q, k, v = halves(tensors[0], config), halves(tensors[1], config), tensors[2]
    q = q.unflatten(0, (config.kv_size, config.heads // config.kv_size, config.head_size))
    k, v = (x.unflatten(0, (config.kv_size, 1, config.head_size)) for x in (k, v))
    return torch.cat((q, k, v), dim=1).flatten(0, 2)


# --- configurations --------------------------------------------------------------------------------------------------

PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu",
         "silu": "silu"}
GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
SCALINGS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


def choice(theirs: dict, key: str, known: dict[str, str]) -> str:
    """Translate a named choice, or say which ones can be."""
    if theirs[key] not in known:
        raise ValueError(f"config.json: {key} = {theirs[key]!r} cannot be loaded; known are {', '.join(known)}.")
    return known[theirs[key]]


def named(value: str, known: dict[str, str]) -> str | None:
    """The way back: the first name for it, or None."""
    return next((theirs for theirs, ours in known.items() if ours == value), None)


def read_rope(theirs: dict, rope: dict | None = None) -> dict:
    """Rotary fields: from rope_parameters (transformers 5), or rope_theta, rope_scaling and partial_rotary_factor."""
    rope = rope or theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = {"type": rope.get("rope_type", rope.get("type", "default"))}
    scaling, part = choice(kind, "type", SCALINGS), rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))
    fields = {"pos": "rope", "rope_scaling": scaling,
              "rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", theirs.get("rotary_emb_base", 10_000.0))))}
    if part not in (None, 1.0):
        width = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
        fields["rope_dim"] = int(width * part)
    if scaling == "none":
        return fields
    fields |= {"rope_factor": float(rope["factor"]), "rope_context": rope.get("original_max_position_embeddings", theirs["max_position_embeddings"])}
    if scaling == "llama3":
        return fields | {"rope_slow": rope["low_freq_factor"], "rope_fast": rope["high_freq_factor"]}
    if scaling == "yarn":
        if own := [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)] + ["truncate"] * (rope.get("truncate") is False):
            raise ValueError(f"config.json: a yarn scaling with {own[0]} of its own cannot be loaded.")
        return fields | {"rope_slow": rope.get("beta_slow", 1.0), "rope_fast": rope.get("beta_fast", 32.0)}
    return fields


def write_rope(config: ModelConfig, partial: bool = False) -> dict:
    """The same for config.json, in the new form; `partial` where a class can rotate a part of each head.

    Raises: ValueError for a part in a class that cannot.
    """
    if config.rope_size != config.head_size and not partial:
        raise ValueError(f"rope_dim = {config.rope_size} of {config.head_size} cannot be said in this layout.")
    rope = {"rope_type": named(config.rope_scaling, SCALINGS), "rope_theta": config.rope_theta}
    if partial:  # always, because these classes' own default is a part
        rope["partial_rotary_factor"] = config.rope_size / config.head_size
    if config.rope_scaling != "none":
        trained = config.rope_context or int(config.context / config.rope_factor)
        rope |= {"factor": config.rope_factor, "original_max_position_embeddings": trained}
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": config.rope_slow, "high_freq_factor": config.rope_fast}
    if config.rope_scaling == "yarn":
        rope |= {"beta_slow": config.rope_slow, "beta_fast": config.rope_fast}
    return {"rope_parameters": rope, "rope_theta": config.rope_theta}
