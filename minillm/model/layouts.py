"""How published checkpoints name and shape their tensors: one `Layout` a family, one `Rule` a kind of tensor.

Oddities (transposed weights, queries, keys and values in one tensor, rotary pairs by halves) are undone by a rule's
`unpack` when loading and redone by its `pack` when saving, so that the model itself has none of them.
A layout says what a configuration is called there and back; whether it can express a configuration at all is found by
going there and back, not by a family's name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from minillm.config import ModelConfig

Unpack = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Pack = Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


@dataclass(frozen=True)
class Rule:
    """One of their tensors and the one or several of ours that it holds; `{i}` stands for the layer."""

    theirs: str
    ours: tuple[str, ...]
    unpack: Unpack = lambda tensor, config: (tensor,)
    pack: Pack = lambda tensors, config: tensors[0]


@dataclass(frozen=True)
class Layout:
    """A family's published form. `read` and `write` translate the configuration."""

    model_type: str
    architecture: str
    prefix: str
    rules: tuple[Rule, ...]
    read: Callable[[dict], dict]
    write: Callable[[ModelConfig], dict]
    skip: tuple[str, ...] = ()


def _same(theirs: str, ours: str, parts: tuple[str, ...] = ("weight", "bias")) -> list[Rule]:
    """Rules for tensors that differ by name alone."""
    return [Rule(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in parts]


# --- GPT-2: Conv1D stores (in, out); queries, keys and values are one tensor -----------------------------------------

def _transposed(theirs: str, ours: str) -> list[Rule]:
    turn = Rule(f"{theirs}.weight", (f"{ours}.weight",), lambda t, c: (t.T,), lambda ts, c: ts[0].T)
    return [turn, Rule(f"{theirs}.bias", (f"{ours}.bias",))]


def _fused_qkv() -> list[Rule]:
    names = [f"blocks.{{i}}.attention.{x}" for x in "qkv"]
    weight = Rule("h.{i}.attn.c_attn.weight", tuple(f"{n}.weight" for n in names),
                  lambda t, c: t.T.chunk(3), lambda ts, c: torch.cat(ts).T)
    bias = Rule("h.{i}.attn.c_attn.bias", tuple(f"{n}.bias" for n in names),
                lambda t, c: t.chunk(3), lambda ts, c: torch.cat(ts))
    return [weight, bias]


GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
                    "silu": "silu"}


def _read_gpt2(theirs: dict) -> dict:
    return dict(vocab_size=theirs["vocab_size"], layers=theirs["n_layer"], width=theirs["n_embd"],
                heads=theirs["n_head"], ffn_width=theirs.get("n_inner"), context=theirs["n_positions"],
                norm="layer", norm_eps=theirs["layer_norm_epsilon"], pos="learned", init_residual=True,
                mlp=_choice(theirs, "activation_function", GPT2_ACTIVATIONS), bias=("qkv", "out", "mlp", "norm"),
                init_std=theirs.get("initializer_range", 0.02))


def _write_gpt2(config: ModelConfig) -> dict:
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    return dict(vocab_size=config.vocab_size, n_layer=config.layers, n_embd=config.width, n_head=config.heads,
                n_inner=config.ffn_width, n_positions=config.context, layer_norm_epsilon=config.norm_eps,
                activation_function=names.get(config.mlp), initializer_range=config.init_std,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


GPT2 = Layout("gpt2", "GPT2LMHeadModel", "transformer.", tuple(
    _same("wte", "embed", ("weight",)) + _same("wpe", "positions", ("weight",)) + _same("ln_f", "norm")
    + _same("h.{i}.ln_1", "blocks.{i}.attention_norm") + _same("h.{i}.ln_2", "blocks.{i}.ffn_norm")
    + _fused_qkv() + _transposed("h.{i}.attn.c_proj", "blocks.{i}.attention.out")
    + _transposed("h.{i}.mlp.c_fc", "blocks.{i}.ffn.up") + _transposed("h.{i}.mlp.c_proj", "blocks.{i}.ffn.down")
    + _same("lm_head", "head", ("weight",))),
    _read_gpt2, _write_gpt2, skip=(".attn.bias", ".attn.masked_bias"))


# --- LLaMA: a rotary pair is (i, i + D/2), ours is (2i, 2i + 1) ------------------------------------------------------

def _rotary(theirs: str, ours: str) -> list[Rule]:
    def neighbours(tensor: Tensor, config: ModelConfig) -> tuple[Tensor]:
        return (rearrange(tensor, "(h two half) ... -> (h half two) ...", two=2, half=config.head_size // 2),)

    def halves(tensors: tuple[Tensor], config: ModelConfig) -> Tensor:
        return rearrange(tensors[0], "(h half two) ... -> (h two half) ...", two=2, half=config.head_size // 2)

    return [Rule(f"{theirs}.{part}", (f"{ours}.{part}",), neighbours, halves) for part in ("weight", "bias")]


GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def _read_llama(theirs: dict) -> dict:
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json asks for rotary scaling {kind!r}; only 'default' can be loaded.")
    attention, mlp = theirs.get("attention_bias", False), theirs.get("mlp_bias", False)
    return dict(vocab_size=theirs["vocab_size"], layers=theirs["num_hidden_layers"], width=theirs["hidden_size"],
                heads=theirs["num_attention_heads"], kv_heads=theirs.get("num_key_value_heads"),
                head_dim=theirs.get("head_dim"), ffn_width=theirs["intermediate_size"],
                context=theirs["max_position_embeddings"], norm="rms", norm_eps=theirs["rms_norm_eps"],
                mlp=_choice(theirs, "hidden_act", GATED), pos="rope", init_residual=False,
                rope_theta=rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)),
                bias=("qkv", "out") * attention + ("mlp",) * mlp, init_std=theirs.get("initializer_range", 0.02))


def _write_llama(config: ModelConfig) -> dict:
    names = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
    return dict(vocab_size=config.vocab_size, num_hidden_layers=config.layers, hidden_size=config.width,
                num_attention_heads=config.heads, num_key_value_heads=config.kv_size, head_dim=config.head_size,
                intermediate_size=config.ffn_size, max_position_embeddings=config.context,
                rms_norm_eps=config.norm_eps, hidden_act=names.get(config.mlp), rope_theta=config.rope_theta,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                attention_bias="qkv" in config.bias, mlp_bias="mlp" in config.bias,
                initializer_range=config.init_std)


LLAMA = Layout("llama", "LlamaForCausalLM", "model.", tuple(
    _same("embed_tokens", "embed", ("weight",)) + _same("norm", "norm", ("weight",))
    + _same("layers.{i}.input_layernorm", "blocks.{i}.attention_norm", ("weight",))
    + _same("layers.{i}.post_attention_layernorm", "blocks.{i}.ffn_norm", ("weight",))
    + _rotary("layers.{i}.self_attn.q_proj", "blocks.{i}.attention.q")
    + _rotary("layers.{i}.self_attn.k_proj", "blocks.{i}.attention.k")
    + _same("layers.{i}.self_attn.v_proj", "blocks.{i}.attention.v")
    + _same("layers.{i}.self_attn.o_proj", "blocks.{i}.attention.out")
    + _same("layers.{i}.mlp.gate_proj", "blocks.{i}.ffn.gate") + _same("layers.{i}.mlp.up_proj", "blocks.{i}.ffn.up")
    + _same("layers.{i}.mlp.down_proj", "blocks.{i}.ffn.down") + _same("lm_head", "head", ("weight",))),
    _read_llama, _write_llama, skip=("rotary_emb.inv_freq",))

LAYOUTS: tuple[Layout, ...] = (GPT2, LLAMA)


def _choice(theirs: dict, key: str, known: dict[str, str]) -> str:
    """Translate a named choice, or say which ones can be."""
    if theirs[key] not in known:
        raise ValueError(f"config.json: {key} = {theirs[key]!r} cannot be loaded; known are {', '.join(known)}.")
    return known[theirs[key]]
