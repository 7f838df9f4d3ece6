"""ChatGLM-6B written out from its published model, for comparison: transformers has no class of its own for it.

Its block normalises, and adds what comes out to the *normalised* stream times α = √(2L). Names and shapes are those of its
checkpoint; each half of a head rotates by one of two positions, in pairs (i, i + n/2); [gMASK] stands last in the prompt.
"""

import math

import torch
from torch.nn import functional as F

V, L, C, H, INNER, CONTEXT = 67, 3, 48, 3, 50, 64
D = C // H


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {"transformer.word_embeddings.weight": (V, C), "lm_head.weight": (V, C), "transformer.final_layernorm.weight": (C,),
              "transformer.final_layernorm.bias": (C,)}
    for i in range(L):
        part = f"transformer.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{part}{norm}.weight": (C,), f"{part}{norm}.bias": (C,)}
        for name, (rows, columns) in {"attention.query_key_value": (3 * C, C), "attention.dense": (C, C), "mlp.dense_h_to_4h": (INNER, C),
                                      "mlp.dense_4h_to_h": (C, INNER)}.items():
            shapes |= {f"{part}{name}.weight": (rows, columns), f"{part}{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


CONFIG = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "vocab_size": V, "num_layers": L, "hidden_size": C,
          "num_attention_heads": H, "inner_hidden_size": INNER, "max_sequence_length": CONTEXT, "layernorm_epsilon": 1e-5,
          "position_encoding_2d": True}


def turn(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x (T, H, D/2) by its places (T,)."""
    n = x.shape[-1]
    angle = places[:, None].float() / 10_000 ** (torch.arange(0, n, 2) / n)
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))
    return x * cos + torch.cat((-x[..., n // 2:], x[..., :n // 2]), -1) * sin


def logits(w: dict[str, torch.Tensor], ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """One text (T,), of which the first `prompt` tokens end with [gMASK] and the next is <bos>; (T, V)."""
    places = torch.arange(len(ids))
    block = (places - prompt + 1).clamp(min=0)
    places[prompt:] = prompt - 1
    hidden = ((torch.arange(len(ids)) > torch.arange(len(ids))[:, None]) & (torch.arange(len(ids)) >= prompt))

    def part(name: str, x: torch.Tensor, kind=F.linear) -> torch.Tensor:
        weight, bias = w[f"transformer.{name}.weight"], w[f"transformer.{name}.bias"]
        return F.linear(x, weight, bias) if kind is F.linear else F.layer_norm(x, (C,), weight, bias, 1e-5)

    x, alpha = w["transformer.word_embeddings.weight"][ids], math.sqrt(2 * L)
    for i in range(L):
        y = part(f"layers.{i}.input_layernorm", x, F.layer_norm)
        q, k, v = part(f"layers.{i}.attention.query_key_value", y).view(len(ids), H, 3 * D).chunk(3, -1)
        q, k = (torch.cat((turn(z[..., :D // 2], places), turn(z[..., D // 2:], block)), -1) for z in (q, k))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D)
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -1e4).softmax(-1), v).flatten(1)
        x = alpha * y + part(f"layers.{i}.attention.dense", mixed)
        y = part(f"layers.{i}.post_attention_layernorm", x, F.layer_norm)
        x = alpha * y + part(f"layers.{i}.mlp.dense_4h_to_h", F.gelu(part(f"layers.{i}.mlp.dense_h_to_4h", y), approximate="tanh"))
    return part("final_layernorm", x, F.layer_norm) @ w["lm_head.weight"].T
