"""Every family whose checkpoints can be read and written, each as what its files call things. See layouts.py for the rules.

A family that differs from LLaMA by its norms, its biases or its feed-forward layer takes a few lines; the older ones, which
named everything anew, take a dozen.
"""

from functools import partial

import torch

from minillm.config import ModelConfig
from minillm.model.layouts import (GATED, PLAIN, Layout, Rule, by_halves, choice, fused, join_by_group, named, read_rope, same,
                                   shifted, split_by_group, transposed, write_rope)

WEIGHT = ("weight",)
only_weight = partial(same, parts=WEIGHT)
ALL = ("qkv", "out", "mlp", "norm")


def _whole_heads(config: ModelConfig) -> dict:
    """Some classes want a width that divides into heads, though head_dim says how large they are."""
    if config.width % config.heads:
        raise ValueError(f"width {config.width} does not divide into {config.heads} heads, which this layout asks for.")
    return {}


WHOLE_HEADS = (lambda theirs: {}, _whole_heads)


def activation(theirs_key: str, known: dict[str, str]) -> tuple:
    """read and write for the name of an activation."""
    return (lambda theirs: {"mlp": choice(theirs, theirs_key, known)}, lambda config: {theirs_key: named(config.mlp, known)})


def both(*pairs) -> tuple:
    """Several (read, write) pairs as one."""
    return (lambda theirs: {k: v for read, _ in pairs for k, v in read(theirs).items()},
            lambda config: {k: v for _, write in pairs for k, v in write(config).items()})


ROPE = (read_rope, write_rope)
PARTIAL_ROPE = (read_rope, partial(write_rope, partial=True))
NO_DROPOUT = (lambda theirs: {}, lambda config: {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})


# --- GPT-1, GPT-2, GPT-Neo: one after the other on nanoGPT's shape ------------------------------------------------------

def _conv_qkv() -> list[Rule]:
    return (fused("h.{i}.attn.c_attn", lambda t, c: t.T.chunk(3), lambda ts, c: torch.cat(ts).T, WEIGHT)
            + fused("h.{i}.attn.c_attn", lambda t, c: t.chunk(3), lambda ts, c: torch.cat(ts), ("bias",)))


CONV = (_conv_qkv() + transposed("h.{i}.attn.c_proj", "blocks.{i}.attention.out") + transposed("h.{i}.mlp.c_fc", "blocks.{i}.ffn.up")
        + transposed("h.{i}.mlp.c_proj", "blocks.{i}.ffn.down") + same("h.{i}.ln_1", "blocks.{i}.attention_norm")
        + same("h.{i}.ln_2", "blocks.{i}.ffn_norm"))
HEAD = only_weight("lm_head", "head")
LEARNED = {"norm": "layer", "pos": "learned", "bias": ALL}
N_SIZES = {"vocab_size": "vocab_size", "layers": "n_layer", "width": "n_embd", "heads": "n_head", "context": "n_positions",
           "norm_eps": "layer_norm_epsilon", "init_std": ("initializer_range", 0.02)}

GPT1 = Layout("openai-gpt", "OpenAIGPTLMHeadModel", "transformer.", tuple(
    only_weight("tokens_embed", "embed") + only_weight("positions_embed", "positions") + CONV + HEAD),
    N_SIZES, LEARNED | {"block": "post", "final_norm": False},
    *both(activation("afn", {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu"}), NO_DROPOUT), skip=(".attn.bias",))  # its gelu is the tanh form

GPT2 = Layout("gpt2", "GPT2LMHeadModel", "transformer.", tuple(
    only_weight("wte", "embed") + only_weight("wpe", "positions") + same("ln_f", "norm") + CONV + HEAD),
    N_SIZES | {"ffn_width": ("n_inner", None)}, LEARNED | {"init_residual": True},
    *both(activation("activation_function", PLAIN), NO_DROPOUT),
    constants={"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}, skip=(".attn.bias", ".attn.masked_bias"))


def _read_neo(theirs: dict) -> dict:
    kinds = [kind for kinds, times in theirs["attention_types"] for _ in range(times) for kind in kinds]
    return _pattern(["l" if kind == "local" else "g" for kind in kinds], theirs["window_size"]) | {"attn_scale": 1.0}


def _pattern(kinds: list[str], window: int | None) -> dict:
    """The shortest pattern that gives these layers."""
    size = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return {"pattern": "".join(kinds[:size]), "window": window if "l" in kinds else None}


def _kinds(config: ModelConfig, names: dict[str, str]) -> list[str]:
    return [names[config.layer_kind(layer)] for layer in range(config.layers)]


NEO = Layout("gpt_neo", "GPTNeoForCausalLM", "transformer.", tuple(
    only_weight("wte", "embed") + only_weight("wpe", "positions") + same("ln_f", "norm") + HEAD
    + [r for x in "qkv" for r in only_weight(f"h.{{i}}.attn.attention.{x}_proj", f"blocks.{{i}}.attention.{x}")]
    + same("h.{i}.attn.attention.out_proj", "blocks.{i}.attention.out") + same("h.{i}.mlp.c_fc", "blocks.{i}.ffn.up")
    + same("h.{i}.mlp.c_proj", "blocks.{i}.ffn.down") + same("h.{i}.ln_1", "blocks.{i}.attention_norm")
    + same("h.{i}.ln_2", "blocks.{i}.ffn_norm")),
    {"vocab_size": "vocab_size", "layers": "num_layers", "width": "hidden_size", "heads": "num_heads",
     "context": "max_position_embeddings", "ffn_width": ("intermediate_size", None), "norm_eps": "layer_norm_epsilon"},
    {"norm": "layer", "pos": "learned", "bias": ("out", "mlp", "norm")},
    *both(activation("activation_function", PLAIN), (_read_neo, lambda c: {
        "attention_types": [[_kinds(c, {"g": "global", "l": "local"}), 1]], "window_size": c.window or 256,
        "attention_layers": _kinds(c, {"g": "global", "l": "local"})})),
    skip=(".attention.bias", ".masked_bias"))


# --- GPT-J, GPT-NeoX, BLOOM, Falcon, OPT ------------------------------------------------------------------------------

GPTJ = Layout("gptj", "GPTJForCausalLM", "transformer.", tuple(
    only_weight("wte", "embed") + same("ln_f", "norm") + same("lm_head", "head") + same("h.{i}.ln_1", "blocks.{i}.attention_norm")
    + [r for x in ("q", "k", "v", "out") for r in only_weight(f"h.{{i}}.attn.{x}_proj", f"blocks.{{i}}.attention.{x}")]
    + same("h.{i}.mlp.fc_in", "blocks.{i}.ffn.up") + same("h.{i}.mlp.fc_out", "blocks.{i}.ffn.down")),
    N_SIZES | {"ffn_width": ("n_inner", None), "rope_dim": "rotary_dim"},
    {"norm": "layer", "pos": "rope", "block": "parallel", "bias": ("mlp", "norm", "head")},  # rotary pairs are neighbours
    *activation("activation_function", PLAIN), skip=(".attn.bias", ".attn.masked_bias"))


def _dense(part: str) -> list[Rule]:
    """Fused queries, keys and values by group, and a feed-forward layer, as BLOOM's descendants call them."""
    return (fused(f"{part}.query_key_value", split_by_group, join_by_group) + same(f"{part}.dense", "blocks.{i}.attention.out")
            + same(f"{part.rpartition('.')[0]}.mlp.dense_h_to_4h", "blocks.{i}.ffn.up")
            + same(f"{part.rpartition('.')[0]}.mlp.dense_4h_to_h", "blocks.{i}.ffn.down"))


SIZES = {"vocab_size": "vocab_size", "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
         "init_std": ("initializer_range", 0.02)}

NEOX = Layout("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", tuple(
    only_weight("embed_in", "embed") + same("final_layer_norm", "norm") + only_weight("embed_out", "head")
    + same("layers.{i}.input_layernorm", "blocks.{i}.attention_norm") + same("layers.{i}.post_attention_layernorm", "blocks.{i}.ffn_norm")
    + _dense("layers.{i}.attention")),
    SIZES | {"context": "max_position_embeddings", "ffn_width": "intermediate_size", "norm_eps": "layer_norm_eps"},
    {"norm": "layer"},
    *both(activation("hidden_act", PLAIN), (
        lambda t: read_rope({"partial_rotary_factor": t.get("rotary_pct", 0.25), **t}) | {
            "block": "parallel2" if t.get("use_parallel_residual", True) else "pre",
            "bias": ALL if t.get("attention_bias", True) else ("mlp", "norm")},
        lambda c: write_rope(c, True) | {"use_parallel_residual": c.block == "parallel2", "attention_bias": "qkv" in c.bias,
                                   "rotary_pct": c.rope_size / c.head_size})),
    skip=(".attention.bias", ".masked_bias", "rotary_emb.inv_freq"))

BLOOM = Layout("bloom", "BloomForCausalLM", "transformer.", tuple(
    only_weight("word_embeddings", "embed") + same("word_embeddings_layernorm", "embed_norm") + same("ln_f", "norm") + HEAD
    + same("h.{i}.input_layernorm", "blocks.{i}.attention_norm") + same("h.{i}.post_attention_layernorm", "blocks.{i}.ffn_norm")
    + _dense("h.{i}.self_attention")),
    {"vocab_size": "vocab_size", "layers": "n_layer", "norm_eps": "layer_norm_epsilon", "context": ("seq_length", 2048),
     "init_std": ("initializer_range", 0.02)},
    {"norm": "layer", "pos": "alibi", "embed_norm": True, "mlp": "gelu_tanh", "bias": ALL},
    lambda t: {"width": t.get("hidden_size") or t["n_embed"], "heads": t.get("n_head") or t["num_attention_heads"]},
    lambda c: {"hidden_size": c.width, "n_head": c.heads}, constants={"apply_residual_connection_post_layernorm": False})


def _falcon_rules(config: ModelConfig) -> tuple[Rule, ...]:
    two = config.block == "parallel2"
    return tuple(only_weight("word_embeddings", "embed") + same("ln_f", "norm") + HEAD + _dense("h.{i}.self_attention")
                 + same("h.{i}.ln_attn" if two else "h.{i}.input_layernorm", "blocks.{i}.attention_norm")
                 + same("h.{i}.ln_mlp" if two else "h.{i}.post_attention_layernorm", "blocks.{i}.ffn_norm"))


def _read_falcon(theirs: dict) -> dict:
    new, heads = theirs.get("new_decoder_architecture", False), theirs["num_attention_heads"]
    norms = theirs.get("num_ln_in_parallel_attn") or (2 if new else 1)
    return {"kv_heads": theirs.get("num_kv_heads", heads) if new else 1 if theirs.get("multi_query", True) else heads,
            "block": "pre" if not new and not theirs.get("parallel_attn", True) else "parallel2" if norms == 2 else "parallel",
            "bias": ALL if theirs.get("bias", False) else ("norm",)}


FALCON = Layout("falcon", "FalconForCausalLM", "transformer.", _falcon_rules,
                SIZES | {"context": ("max_position_embeddings", 2048), "ffn_width": ("ffn_hidden_size", None),
                         "norm_eps": ("layer_norm_epsilon", 1e-5)},
                {"norm": "layer"},
                *both(ROPE, (_read_falcon, lambda c: {
                    "new_decoder_architecture": c.kv_size not in (1, c.heads) or c.block == "parallel2", "multi_query": c.kv_size == 1,
                    "num_kv_heads": c.kv_size, "parallel_attn": c.block != "pre", "bias": "qkv" in c.bias,
                    "num_ln_in_parallel_attn": {"parallel": 1, "parallel2": 2}.get(c.block)}),
                    (lambda t: {"mlp": PLAIN[t.get("activation", "gelu")]}, lambda c: {"activation": named(c.mlp, PLAIN)})),
                constants={"alibi": False}, skip=("rotary_emb.inv_freq",))


def _opt_positions() -> list[Rule]:
    """The table's first two rows belong to padding."""
    return [Rule("embed_positions.weight", ("positions.weight",), lambda t, c: (t[2:],),
                 lambda ts, c: torch.cat((torch.zeros_like(ts[0][:2]), ts[0])))]


def _at_full_width(theirs: dict) -> dict:
    narrow = theirs.get("word_embed_proj_dim", theirs["hidden_size"])
    if narrow != theirs["hidden_size"]:
        raise ValueError(f"config.json: word_embed_proj_dim = {narrow} with hidden_size = {theirs['hidden_size']} cannot be loaded: "
                         f"embeddings narrower than the model (OPT-350m) are not built here.")
    return {}


OPT = Layout("opt", "OPTForCausalLM", "model.decoder.", tuple(
    only_weight("embed_tokens", "embed") + _opt_positions() + same("final_layer_norm", "norm") + HEAD
    + [r for x in ("q", "k", "v", "out") for r in same(f"layers.{{i}}.self_attn.{x}_proj", f"blocks.{{i}}.attention.{x}")]
    + same("layers.{i}.fc1", "blocks.{i}.ffn.up") + same("layers.{i}.fc2", "blocks.{i}.ffn.down")
    + same("layers.{i}.self_attn_layer_norm", "blocks.{i}.attention_norm") + same("layers.{i}.final_layer_norm", "blocks.{i}.ffn_norm")),
    SIZES | {"context": "max_position_embeddings", "ffn_width": "ffn_dim", "init_std": ("init_std", 0.02)}, LEARNED,
    *both(activation("activation_function", {"relu": "relu"}), (_at_full_width, lambda c: {"word_embed_proj_dim": c.width})),
    constants={"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False})


# --- ChatGLM-6B: its "pre-norm" block multiplies the normalised stream, which is a post-norm block one norm later -----------

def _chatglm_rules(config: ModelConfig) -> tuple[Rule, ...]:
    norms = same("layers.0.input_layernorm", "embed_norm") + same("layers.{i}.post_attention_layernorm", "blocks.{i}.attention_norm")
    for layer in range(1, config.layers):
        norms += same(f"layers.{layer}.input_layernorm", f"blocks.{layer - 1}.ffn_norm")
    return tuple(only_weight("word_embeddings", "embed") + HEAD + norms + _dense("layers.{i}.attention")
                 + same("final_layernorm", f"blocks.{config.layers - 1}.ffn_norm"))


CHATGLM = Layout("chatglm", "ChatGLMForConditionalGeneration", "transformer.", _chatglm_rules,
                 {"vocab_size": "vocab_size", "layers": "num_layers", "width": "hidden_size", "heads": "num_attention_heads",
                  "ffn_width": "inner_hidden_size", "context": "max_sequence_length", "norm_eps": "layernorm_epsilon"},
                 {"norm": "layer", "block": "post", "embed_norm": True, "final_norm": False, "mlp": "gelu_tanh", "pos": "rope",
                  "rope_axes": 2, "bias": ALL},
                 lambda t: {"residual_alpha": (2 * t["num_layers"]) ** 0.5}, lambda c: {"head_dim": c.head_size},
                 constants={"position_encoding_2d": True}, skip=("rotary_emb.inv_freq",))


# --- LLaMA and what came from it -----------------------------------------------------------------------------------------

PRE = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
GATED_FFN = [r for x in ("gate", "up", "down") for r in same(f"layers.{{i}}.mlp.{x}_proj", f"blocks.{{i}}.ffn.{x}")]
GATE_UP = [Rule("layers.{i}.mlp.gate_up_proj.weight", ("blocks.{i}.ffn.gate.weight", "blocks.{i}.ffn.up.weight"),
                lambda t, c: t.chunk(2), lambda ts, c: torch.cat(ts)), *only_weight("layers.{i}.mlp.down_proj", "blocks.{i}.ffn.down")]


def expert_rules(part: str, gate: str, up: str, down: str) -> list[Rule]:
    """A router and experts below `part`."""
    rules = only_weight(f"{part}.gate", "blocks.{i}.ffn.router")
    for theirs, ours in ((gate, "gate"), (up, "up"), (down, "down")):
        rules += only_weight(f"{part}.experts.{{j}}.{theirs}", f"blocks.{{i}}.ffn.experts.{{j}}.{ours}")
    return rules


def modern(norms: dict[str, str], turned=by_halves, norm=only_weight, ffn=GATED_FFN, shift: float = 0.0) -> tuple[Rule, ...]:
    """LLaMA's names; norms: theirs -> ours."""
    rules = only_weight("embed_tokens", "embed") + norm("norm", "norm") + HEAD + ffn
    for theirs, ours in norms.items():
        rules += norm(f"layers.{{i}}.{theirs}", f"blocks.{{i}}.{ours}")
    for x in "qk":
        rules += turned(f"layers.{{i}}.self_attn.{x}_proj", f"blocks.{{i}}.attention.{x}")
        rules += by_halves(f"layers.{{i}}.self_attn.{x}_norm", f"blocks.{{i}}.attention.{x}_norm", WEIGHT, shift)
    return tuple(rules + same("layers.{i}.self_attn.v_proj", "blocks.{i}.attention.v")
                 + same("layers.{i}.self_attn.o_proj", "blocks.{i}.attention.out"))


MODERN = SIZES | {"kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None), "ffn_width": "intermediate_size",
                  "context": "max_position_embeddings", "norm_eps": "rms_norm_eps"}
SILU = activation("hidden_act", GATED)


def biased(qkv_only: bool = False, mlp: bool = False) -> tuple:
    """read and write for attention_bias (and mlp_bias)."""
    parts = ("qkv",) if qkv_only else ("qkv", "out")
    return (lambda t: {"bias": parts * bool(t.get("attention_bias")) + ("mlp",) * bool(mlp and t.get("mlp_bias"))},
            lambda c: {"attention_bias": "qkv" in c.bias} | ({"mlp_bias": "mlp" in c.bias} if mlp else {}))


def _windowed(theirs: dict, every: int | None = None, flagged: bool = False) -> dict:
    """Which layers have a window: those that layer_types says. Without it every one; or all but each `every`th (Gemma); or,
    where a flag has to be set for any, those from max_window_layers on (Qwen)."""
    if not theirs.get("use_sliding_window", not flagged) or (window := theirs["sliding_window"]) is None:
        return {}
    kinds, layers = theirs.get("layer_types"), range(theirs["num_hidden_layers"])
    if kinds is None and (every := theirs.get("sliding_window_pattern", every)):
        kinds = ["full" if (layer + 1) % every == 0 else "sliding" for layer in layers]
    if kinds is None:
        first = theirs["max_window_layers"] if flagged else 0
        kinds = ["sliding" if layer >= first else "full" for layer in layers]
    return _pattern(["l" if kind.startswith("sliding") else "g" for kind in kinds], window)


def _write_windows(config: ModelConfig, flag: bool = False) -> dict:
    kinds = {"layer_types": _kinds(config, {"g": "full_attention", "l": "sliding_attention"})}
    return {"sliding_window": config.window} | ({"use_sliding_window": config.window is not None, **kinds} if flag else {})


WINDOW = (_windowed, _write_windows)
FLAGGED_WINDOWS = (partial(_windowed, flagged=True), partial(_write_windows, flag=True))
ALL_OR_NONE = (lambda t: _windowed({**t, "layer_types": None, "max_window_layers": 0}, flagged=True),
               lambda c: {"sliding_window": c.window, "use_sliding_window": c.window is not None})
EXPERTS = {"experts": "num_local_experts", "top_k": "num_experts_per_tok"}
HUB_EXPERTS = expert_rules("layers.{i}.mlp", "gate_proj", "up_proj", "down_proj")

LLAMA = Layout("llama", "LlamaForCausalLM", "model.", modern(PRE), MODERN, {"norm": "rms"}, *both(ROPE, SILU, biased(mlp=True), WHOLE_HEADS),
               skip=("rotary_emb.inv_freq",))
MISTRAL = Layout("mistral", "MistralForCausalLM", "model.", modern(PRE), MODERN, {"norm": "rms"}, *both(ROPE, SILU, WINDOW))
MIXTRAL = Layout("mixtral", "MixtralForCausalLM", "model.", modern(PRE, ffn=expert_rules("layers.{i}.block_sparse_moe", "w1", "w3", "w2")),
                 MODERN | EXPERTS, {"norm": "rms"}, *both(ROPE, SILU, WINDOW))
QWEN2 = Layout("qwen2", "Qwen2ForCausalLM", "model.", modern(PRE), MODERN, {"norm": "rms", "bias": ("qkv",)}, *both(ROPE, SILU, FLAGGED_WINDOWS))
QWEN3 = Layout("qwen3", "Qwen3ForCausalLM", "model.", modern(PRE), MODERN, {"norm": "rms", "qk_norm": "head"},
               *both(ROPE, SILU, biased(), FLAGGED_WINDOWS))
NORM_TOPK = (lambda t: {"experts": t.get("num_experts") or t["num_local_experts"]}, lambda c: {"num_experts": c.experts})
QWEN3_MOE = Layout("qwen3_moe", "Qwen3MoeForCausalLM", "model.", modern(PRE, ffn=HUB_EXPERTS),
                   MODERN | {"ffn_width": "moe_intermediate_size", "top_k": "num_experts_per_tok", "norm_topk": ("norm_topk_prob", False)},
                   {"norm": "rms", "qk_norm": "head"}, *both(ROPE, SILU, biased(), ALL_OR_NONE, NORM_TOPK),
                   constants={"decoder_sparse_step": 1, "mlp_only_layers": []})
OLMOE = Layout("olmoe", "OlmoeForCausalLM", "model.", modern(PRE, ffn=HUB_EXPERTS),
               MODERN | {"top_k": "num_experts_per_tok", "norm_topk": ("norm_topk_prob", False)},
               {"norm": "rms", "qk_norm": "full"}, *both(ROPE, SILU, biased(), NORM_TOPK), constants={"clip_qkv": None})
OLMO2 = Layout("olmo2", "Olmo2ForCausalLM", "model.", modern({"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "ffn_norm"}),
               MODERN, {"norm": "rms", "block": "branch", "qk_norm": "full"}, *both(ROPE, SILU, biased()))

def _always_windowed(every: int) -> tuple:
    """Gemma's classes build a mask with a window even when no layer has one."""
    return (partial(_windowed, every=every),
            lambda config: _write_windows(config, flag=True) | {"sliding_window": config.window or config.context})


EMBED_SCALE = (lambda t: {"embed_scale": t["hidden_size"] ** 0.5}, lambda c: {})
SANDWICH = {"input_layernorm": "attention_norm", "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "ffn_post_norm"}
gemma = partial(modern, turned=by_halves, norm=shifted, shift=1.0)
GEMMA_SCALE = (lambda t: {"attn_scale": t["query_pre_attn_scalar"] ** -0.5}, lambda c: {
    "query_pre_attn_scalar": round((c.attn_scale or c.head_size ** -0.5) ** -2)})
SOFTCAPS = {"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
GELU = activation("hidden_activation", GATED)


def _read_gemma3_rope(theirs: dict) -> dict:
    rope = theirs.get("rope_parameters") or {}
    whole = rope.get("full_attention") or {"rope_theta": theirs.get("rope_theta", 1e6), **(theirs.get("rope_scaling") or {})}
    local = rope.get("sliding_attention") or {"rope_theta": theirs.get("rope_local_base_freq", 10_000.0)}
    return read_rope(theirs, whole) | {"rope_theta_local": float(local["rope_theta"])}


def _write_gemma3_rope(config: ModelConfig) -> dict:
    local = {"rope_type": "default", "rope_theta": config.rope_theta_local or config.rope_theta}
    return {"rope_parameters": {"full_attention": write_rope(config)["rope_parameters"], "sliding_attention": local}}


GEMMA = Layout("gemma", "GemmaForCausalLM", "model.", gemma(PRE), MODERN, {"norm": "rms"},
               *both(ROPE, (lambda t: {"mlp": "geglu"}, lambda c: {"hidden_act": named(c.mlp, GATED)}), biased(), EMBED_SCALE),
               constants={"use_bidirectional_attention": None})
GEMMA2 = Layout("gemma2", "Gemma2ForCausalLM", "model.", gemma(SANDWICH), MODERN | SOFTCAPS, {"norm": "rms", "block": "sandwich"},
                *both(ROPE, GELU, biased(), EMBED_SCALE, GEMMA_SCALE, _always_windowed(2), WHOLE_HEADS), constants={"use_bidirectional_attention": None})
GEMMA3 = Layout("gemma3_text", "Gemma3ForCausalLM", "model.", gemma(SANDWICH), MODERN | SOFTCAPS,
                {"norm": "rms", "block": "sandwich", "qk_norm": "head"},
                *both((_read_gemma3_rope, _write_gemma3_rope), GELU, biased(), EMBED_SCALE, GEMMA_SCALE, _always_windowed(6), WHOLE_HEADS),
                constants={"use_bidirectional_attention": False})
GLM = Layout("glm", "GlmForCausalLM", "model.", modern(PRE, turned=same, ffn=GATE_UP), MODERN, {"norm": "rms"},
             *both(PARTIAL_ROPE, SILU, biased(True)))
GLM4 = Layout("glm4", "Glm4ForCausalLM", "model.", modern(
    {"input_layernorm": "attention_norm", "post_self_attn_layernorm": "attention_post_norm", "post_attention_layernorm": "ffn_norm",
     "post_mlp_layernorm": "ffn_post_norm"}, turned=same, ffn=GATE_UP), MODERN, {"norm": "rms", "block": "sandwich"},
              *both(PARTIAL_ROPE, SILU, biased(True)))
COHERE = Layout("cohere", "CohereForCausalLM", "model.", modern({"input_layernorm": "attention_norm"}, turned=same),
                MODERN | {"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"}, {"norm": "layer", "block": "parallel"},
                *both(ROPE, SILU, biased()), constants={"use_qk_norm": False})

LAYOUTS: tuple[Layout, ...] = (OPT, GPT2, LLAMA, GPT1, NEO, GPTJ, NEOX, BLOOM, FALCON, CHATGLM, MISTRAL, MIXTRAL, QWEN2, QWEN3,
                               QWEN3_MOE, OLMOE, OLMO2, GEMMA, GEMMA2, GEMMA3, GLM, GLM4, COHERE)
