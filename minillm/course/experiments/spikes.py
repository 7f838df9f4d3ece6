"""Lesson 05"""
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minillm.data.loader import Batch
from minillm.engine import Engine

class _Scores(TorchFunctionMode):
    """Sees the arguments of torch's attention while a model runs: the largest |q · k| scale of a query and a key it may look at."""

    def __init__(self):
        super().__init__()
        self.largest = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            scores = (q @ k.mT * (kwargs.get("scale") or q.shape[-1] ** -0.5)).tril()
            self.largest = max(self.largest, float(scores.abs().max()))
        return func(*args, **(kwargs or {}))


class Probe:
    """Keeps, every few steps, the loss and what may grow with it."""

    EVERY = 5

    def __init__(self):
        self.found: dict[str, list[float]] = {"step": [], "loss": [], "gradient norm": [], "largest score": [], "log Z": []}

    @torch.no_grad()
    def __call__(self, step: int, loss: float, norm: float, engine: Engine, batch: Batch) -> None:
        if step % self.EVERY:
            return
        with _Scores() as scores:
            logits = engine.model(batch.ids)
        values = (step, loss, norm, scores.largest, float(logits.logsumexp(-1).mean()))
        for key, value in zip(self.found, values):
            self.found[key].append(round(value, 3))
