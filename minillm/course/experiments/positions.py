"""Lesson 02: one small model with each scheme of positions, trained on 128 tokens and read on 1,024.

RoPE's trained model is also stretched eight times without further training. Measured is the loss of tokens by how many
tokens stand before them; "none" has no positions at all, and a learned table has rows that were never trained.
"""

from dataclasses import replace

import torch

from minillm.config import ModelConfig, TrainConfig
from minillm.data.loader import evaluation_batches
from minillm.data.prepare import Prepared
from minillm.model.transformer import Transformer

CONTEXT, LONG = 128, 1024
SEEDS = (0, 1, 2)
PLAN = TrainConfig(steps=800, batch_size=16, lr=4e-3, warmup_steps=40)
BASE = ModelConfig(vocab_size=512, layers=3, width=96, heads=4, context=LONG)
ROWS = {pos: replace(BASE, pos=pos) for pos in ("none", "learned", "rope", "alibi", "relative")}
ROWS["sinusoidal"] = replace(BASE, pos="sinusoidal", embed_scale=96 ** 0.5)
RANGES = ((0, 128), (128, 256), (256, 512), (512, 1024))


@torch.no_grad()
def by_position(model: Transformer, data: Prepared, sequences: int = 24) -> list[float]:
    """Mean loss in nats of the tokens in each of RANGES, on validation text of 1,024 tokens."""
    losses = []
    for batch in evaluation_batches(data.val, batch_size=4, context=LONG):
        logits = model(batch.ids)
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none"))
        if len(losses) * 4 >= sequences:
            break
    mean = torch.cat(losses).mean(0)
    return [float(mean[first:last].mean()) for first, last in RANGES]


def stretched(model: Transformer, scaling: str) -> Transformer:
    """The same weights, with rotary positions stretched from CONTEXT to LONG."""
    other = Transformer(replace(model.config, rope_scaling=scaling, rope_factor=LONG / CONTEXT, rope_context=CONTEXT), device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def measure(model: Transformer, data: Prepared) -> dict[str, float]:
    """Losses by range; for RoPE also stretched."""
    found = {f"{last}": loss for (_, last), loss in zip(RANGES, by_position(model, data))}
    for scaling in ("linear", "ntk", "yarn") if model.config.pos == "rope" else ():
        found |= {f"{scaling} {last}": loss for (_, last), loss in zip(RANGES, by_position(stretched(model, scaling), data))}
    return found
