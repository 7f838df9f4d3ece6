"""Lesson 05: a loss that jumps, and what calms it, one remedy at a time.

Two ways to hurt a small LLaMA. Damaged data: after 150 steps on stories come five batches of one short gram of tokens repeated
over and over, the kind of document that OLMo 2 found behind its spikes (arXiv:2501.00656 §3.1), while AdamW's beta2 is 0.999
and nothing is clipped. A rate four times too high: nothing is wrong with the data, and the scores of attention grow instead.
Remedies: clipping; a shorter memory of squared gradients; QK-norm (arXiv:2302.05442, arXiv:2309.14322); a norm after the
embedding (BLOOM, arXiv:2211.05100); z-loss (PaLM, arXiv:2204.02311); a longer warm-up; a lower rate.

What came out, with two seeds. Damage: the first clean loss is 3.0 and 3.9 nats above where it was, and stays up for about
50 steps. Clipping leaves a jump of 0.9 and 0.7, over in 7 to 9 steps; beta2 0.95 one of 0.9, over in 18; both together 0.5,
over in 3 to 5; a third of the rate one of 1.0, over in 21, but it has learned less by the end. beta2 0.99 and the
embedding's norm help a little (2 to 3 nats, 34 to 36 steps); QK-norm, z-loss and the longer warm-up, which is over long
before, do not make it smaller. The high rate makes no spike in 240 steps: the loss stalls at 3.1 instead of 2.2 while the
largest score goes to 1,600 (38 at the good rate). QK-norm keeps scores below 25, and ends 0.1 and 0.4 lower; beta2 0.95
ends 0.2 lower, the embedding's norm 0.1 and 0.4; z-loss, clipping (no gradient is large) and warm-up at most 0.1. z-loss
had nothing to calm: ln Z rises with what the model learns, and never runs away here.
"""

from dataclasses import replace
from functools import partial
from statistics import mean

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minillm.config import TrainConfig
from minillm.course.experiments.families import measure
from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.model.families import preset

__all__ = ["measure"]
CONTEXT, SEEDS = 128, (0, 1)
PLAN = TrainConfig(steps=240, batch_size=8, lr=1e-2, warmup_steps=20, schedule="constant", beta2=0.999, clip_norm=0)
MODEL = preset("first", vocab_size=512, layers=3, width=64, context=CONTEXT, init_std=0.1)
DAMAGED = range(151, 156)
REMEDIES = {  # what changes in the model, and in the plan
    "nothing": ({}, {}), "clipping": ({}, {"clip_norm": 1.0}), "beta2 0.99": ({}, {"beta2": 0.99}),
    "beta2 0.95": ({}, {"beta2": 0.95}), "QK-norm": ({"qk_norm": "head"}, {}), "embedding norm": ({"embed_norm": True}, {}),
    "z-loss": ({}, {"z_loss": 1e-4}), "warm-up 100": ({}, {"warmup_steps": 100}), "lr / 3": ({}, {"lr": PLAN.lr / 3}),
    "clipping, beta2 0.95": ({}, {"clip_norm": 1.0, "beta2": 0.95}),
}
"""Against damaged data."""
RATE = ("nothing", "clipping", "beta2 0.95", "QK-norm", "embedding norm", "z-loss", "warm-up 100")
"""Those that are tried against the high rate, too."""


def damage(step: int, batch: Batch) -> Batch:
    """The batch, or at a damaged step rows of a random gram of 1 to 13 tokens repeated over and over."""
    if step not in DAMAGED:
        return batch
    generator, (rows, tokens) = torch.Generator().manual_seed(step), batch.ids.shape
    draw = partial(torch.randint, generator=generator)
    grams = [draw(0, MODEL.vocab_size, (int(draw(1, 14, (1,))),)) for _ in range(rows)]
    spans = torch.stack([gram.repeat(tokens // len(gram) + 2)[:tokens + 1] for gram in grams])
    return Batch(spans[:, :-1].contiguous(), spans[:, 1:].contiguous())


ROWS = {"no damage": MODEL} | {f"damage: {name}": replace(MODEL, **model) for name, (model, _) in REMEDIES.items()}
ROWS |= {f"lr x 4: {name}": replace(MODEL, **REMEDIES[name][0]) for name in RATE}
PLANS = {f"damage: {name}": plan for name, (_, plan) in REMEDIES.items()}
PLANS |= {f"lr x 4: {name}": {"lr": PLAN.lr * 4} | REMEDIES[name][1] for name in RATE}
CHANGES = {f"damage: {name}": damage for name in REMEDIES}


class Probe:
    """The loss of every step; and, every fifth step, what may grow before it does.

    norm: of the gradient, before clipping; score: the largest |q · k| times its scale; log Z: of the softmax over the
    vocabulary, the mean over the batch.
    """

    EVERY = 5

    def __init__(self):
        self.found: dict[str, list[float]] = {"losses": [], "norm": [], "score": [], "log Z": []}

    @torch.no_grad()
    def __call__(self, step: int, loss: float, norm: float, engine: Engine, batch: Batch) -> None:
        self.found["losses"].append(round(loss, 2))
        if step % self.EVERY == 0:
            with _Scores() as scores:
                logits = engine.model(batch.ids)
            for key, value in (("norm", norm), ("score", scores.largest), ("log Z", float(logits.logsumexp(-1).mean()))):
                self.found[key].append(round(value, 2))


class _Scores(TorchFunctionMode):
    """While it is entered, the largest score of a query and a key that it may look at, in every call of torch's attention."""

    def __init__(self):
        super().__init__()
        self.largest = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k = args[:2]
            scores = (q @ k.mT * ((kwargs or {}).get("scale") or q.shape[-1] ** -0.5)).tril()
            self.largest = max(self.largest, float(scores.detach().abs().max()))
        return function(*args, **(kwargs or {}))


def jump(losses: list[float]) -> tuple[float, int | None]:
    """(how far the first clean loss is above the mean of the ten before the damage; clean steps until five in a row are back).

    Back means: their mean is at most 0.1 above. None: not within the run.
    """
    first, after = DAMAGED.start - 1, losses[DAMAGED.stop - 1:]
    before = mean(losses[first - 10:first])
    back = (step for step in range(len(after) - 4) if mean(after[step:step + 5]) <= before + 0.1)
    return after[0] - before, next(back, None)
