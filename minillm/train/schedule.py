"""The learning rate over a run: up in a straight line, then down along half a cosine. Source: arXiv:1608.03983."""

import math

from minillm.config import TrainConfig


def warmup_cosine(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Step 0 already takes 1/warmup_steps of the peak, since a rate of 0 would waste it; the last step ends at
    lr · min_lr, and so does everything after it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    after = max(1, config.steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / after)
    floor = config.lr * config.min_lr
    return floor + (config.lr - floor) * (1 + math.cos(math.pi * progress)) / 2
