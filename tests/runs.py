"""What the tests of whole runs share: a data folder made once, and small configurations."""

from dataclasses import replace
from pathlib import Path

import torch

from minillm.config import ParallelConfig, TrainConfig
from minillm.data.loader import Batch, Loader
from minillm.data.prepare import DataConfig, Prepared, prepare
from minillm.model.families import preset
from minillm.torch_engine import build_engine
from minillm.train.metrics import read_metrics
from minillm.trainer import Trainer

TINY = preset("first", vocab_size=300, layers=1, width=16, heads=2, context=32)
PLAN = TrainConfig(steps=6, batch_size=4, warmup_steps=2, eval_every=2, eval_sequences=4, checkpoint_every=2, device="cpu")


def small_data(folder: Path) -> Prepared:
    """Forty stories under a vocabulary of 300."""
    return prepare(folder, DataConfig(size=40_000, val_fraction=0.2), 300)


def trainer(data: Prepared, run: Path, model=TINY, parallel=ParallelConfig(), **changes) -> Trainer:
    """A trainer over the small data."""
    plan = replace(PLAN, **changes)
    engine = build_engine(model, plan, parallel)
    loader = Loader(data.train, plan.batch_size, model.context, seed=plan.seed, rank=engine.rank, ranks=engine.ranks)
    return Trainer(engine, loader, data.val, run, tokenizer=data.tokenizer)


def run_losses(run: Path) -> dict[int, float]:
    """Of a run's metrics file, by step."""
    found = [(r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert len(found) == len(dict(found))  # one writer
    return dict(found)


def batch(seed=0, rows=4) -> Batch:
    """Random ids below 300, 32 a row."""
    ids = torch.randint(0, 300, (rows, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone())


def losses(engine, steps=5) -> list[float]:
    """The loss of each of some steps of training."""
    found = []
    for step in range(steps):
        found.append(float(engine.forward_backward(batch(step))))
        engine.clip(1.0)
        engine.step()
    return found
