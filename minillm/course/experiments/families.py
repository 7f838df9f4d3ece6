"""Lesson 04: every family's architecture at one size, on the same stories.

Width, layers and heads are the same for all; the feed-forward width is chosen so that a block has as many parameters as
GPT-2's. What is left of a family is its architecture: the fields that `changes` shows.
"""

from dataclasses import replace

import torch

from minillm.config import ModelConfig, TrainConfig
from minillm.data.loader import evaluation_batches
from minillm.data.prepare import Prepared
from minillm.engine import Engine
from minillm.model import families
from minillm.model.transformer import Transformer

CONTEXT = 128
SEEDS = (0, 1, 2)
PLAN = TrainConfig(steps=600, batch_size=16, lr=4e-3, warmup_steps=40)
PLANS = {"GPT-1, lr / 8": {"lr": PLAN.lr / 8}}  # after-norms do not stand the rate that suits all others
WIDTH, HEADS, LAYERS = 96, 4, 4


def small(family: ModelConfig, **others) -> ModelConfig:
    """A family's architecture at the experiment's size."""
    shape = dict(vocab_size=512, layers=LAYERS, width=WIDTH, heads=HEADS, head_dim=None, context=CONTEXT, init_std=0.02, norm_eps=1e-5,
                 kv_heads=None if family.kv_size == family.heads else min(family.kv_size, HEADS // 2), tied=True)
    if family.embed_scale != 1:
        others["embed_scale"] = WIDTH ** 0.5
    if family.logit_scale != 1:
        others["logit_scale"] = 1.0  # PaLM's 1/√C goes with its own initialisation
    if family.attn_scale is not None:
        others["attn_scale"] = (WIDTH / HEADS) ** -0.5
    if family.residual_alpha != 1:
        others["residual_alpha"] = (2 * LAYERS) ** 0.5
    if family.rope_dim is not None:
        others["rope_dim"] = WIDTH // HEADS // 2
    if family.window is not None:
        others["window"] = CONTEXT // 4
    queries, keys = HEADS, shape["kv_heads"] or HEADS
    saved = WIDTH * WIDTH * 2 * (queries - keys) // HEADS  # what shared KV heads leave for the feed-forward layer
    matrices = 3 if family.gated else 2
    ffn = round((8 * WIDTH * WIDTH + saved) / (matrices * WIDTH) / 8) * 8
    return replace(family, **shape | {"ffn_width": ffn} | others)


ROWS = {
    "GPT-1": small(families.gpt1), "GPT-1, lr / 8": small(families.gpt1), "GPT-2": small(families.gpt2), "GPT-3": small(families.gpt3), "OPT": small(families.opt),
    "BLOOM": small(families.bloom), "GPT-J": small(families.gptj), "PaLM": small(families.palm), "Falcon-7B": small(families.falcon),
    "ChatGLM-6B": small(families.chatglm), "LLaMA": small(families.llama), "Mistral": small(families.mistral),
    "Qwen3": small(families.qwen3), "OLMo-2": small(families.olmo2), "Gemma-2": small(families.gemma2),
}


def measure(model: Transformer, data: Prepared, context: int = CONTEXT) -> dict[str, float]:
    """Validation loss in nats a token, and how far it is above the best possible."""
    engine, total, count = Engine(model, PLAN), 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(evaluation_batches(data.val, batch_size=32, context=context)):
            if number == 12:
                break
            total, count = total + engine.evaluate(batch), count + batch.count
    return {"loss": total / count, "above best": total / count - data.val.nats / data.val.tokens}
