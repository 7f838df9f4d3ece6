"""The learning rate over a run: up in a straight line, then down along half a cosine, a line, or only at the end.

A cosine has to know the last step from the first, and its models before the end are worse than they need be. WSD (warm-up,
stable, decay) stays at the peak, so that a run can be prolonged, or branched into several lengths, and falls once at the end.
Sources: arXiv:1608.03983 (cosine), arXiv:2404.06395 §4 (WSD).
"""

import math

from minillm.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Step 0 already takes 1/warmup_steps of the peak, since a rate of 0 would waste it; the last step ends at
    lr · min_lr (a constant schedule at lr), and so does everything after it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr
    return floor + (config.lr - floor) * _height(step, config)


def _height(step: int, config: TrainConfig) -> float:
    """How much of the way from the lowest to the peak rate is left after the warm-up: from 1 to 0."""
    if config.schedule == "constant":
        return 1.0
    first = config.warmup_steps  # the first step after the peak
    if config.schedule == "wsd":
        first = max(first, config.steps - max(1, round(config.cooldown * config.steps)) - 1)
    progress = min(1.0, max(0.0, (step - first) / max(1, config.steps - 1 - first)))
    return (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
