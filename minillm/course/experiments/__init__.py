"""`make experiments`: comparisons too long for a notebook, stored as JSON that the lessons draw.

An experiment is a file beside this one with ROWS (name -> ModelConfig), PLAN (a TrainConfig), CONTEXT, SEEDS and
`measure(model, data)`, which returns numbers; each row is trained once for each seed, all rows on the same text in the same
order. It may also have PLANS (row -> what it changes in the plan), SEEDS_OF (row -> other seeds), DATA (other text), tokenizer
(a function that returns one, where none is to be trained), CHANGES (row -> a function that changes batches), Probe: a class
whose instance is called at every step of a run and ends with a dict `found`, which is stored as well; or TRAIN (row -> a
function in the place of `train_row`, without these two; it may return the model and such a dict). The results say with which versions,
on what machine and by which command they were made. A lesson shows them, and trains one row anew.
"""

import importlib
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

import torch

from minillm.config import ModelConfig, TrainConfig
from minillm.data.loader import Batch, Loader
from minillm.data.prepare import DataConfig, Prepared, prepare
from minillm.engine import Engine
from minillm.files import write_atomically
from minillm.model.transformer import Transformer, num_params
from minillm.progress import show_progress, track

DATA, VOCABULARY = DataConfig(size=4_000_000), 512


def train_row(config: ModelConfig, plan: TrainConfig, data: Prepared, context: int, seed: int,
              watch: Callable[[int, float], None] | None = None,
              probe: Callable[[int, float, float, Engine, Batch], None] | None = None,
              change: Callable[[int, Batch], Batch] | None = None) -> Transformer:
    """A model trained by the plan on windows of `context` tokens.

    `watch(step, loss)` sees every step; `probe(step, loss, gradient norm, engine, batch)` sees it before the weights change;
    `change(step, batch)` may give another batch.
    """
    engine = Engine(config, replace(plan, seed=seed))
    loader = Loader(data.train, batch_size=plan.batch_size, context=context, seed=seed)
    for step in range(1, plan.steps + 1):
        batch = change(step, next(loader)) if change else next(loader)
        loss = engine.forward_backward(batch)
        norm = engine.clip(plan.clip_norm)
        if probe:
            probe(step, float(loss), float(norm), engine, batch)
        engine.step()
        if watch:
            watch(step, float(loss))
    return engine.model.eval()


def drive(engine: Engine, batches: Iterator[Batch], watch: Callable[[int, float], None] | None = None) -> Transformer:
    """The engine's model after all steps of its plan, one batch each. `watch(step, loss)` sees every step."""
    for step in range(1, engine.config.steps + 1):
        loss = engine.forward_backward(next(batches))
        engine.clip(engine.config.clip_norm)
        engine.step()
        if watch:
            watch(step, float(loss))
    return engine.model.eval()


def results(name: str) -> dict:
    """The stored results of an experiment: "made" (how and where), "rows" (row -> a dict of numbers for each seed)."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())


def spread(name: str, key: str) -> dict[str, tuple[float, float]]:
    """Row -> mean and standard deviation over the seeds of one number."""
    return {row: (mean(run[key] for run in runs), stdev(run[key] for run in runs)) for row, runs in results(name)["rows"].items()}


def plan_of(experiment: ModuleType, row: str) -> TrainConfig:
    """How a row is trained."""
    return replace(experiment.PLAN, **getattr(experiment, "PLANS", {}).get(row, {}))


def seeds_of(experiment: ModuleType, row: str) -> tuple[int, ...]:
    """The seeds that a row is trained with."""
    return getattr(experiment, "SEEDS_OF", {}).get(row, experiment.SEEDS)


def data_of(experiment: ModuleType) -> DataConfig:
    """The stories that an experiment's rows are trained on."""
    return getattr(experiment, "DATA", DATA)


def data_for(experiment: ModuleType, folder: str | Path) -> Prepared:
    """That text as tokens, in a folder."""
    if hasattr(experiment, "tokenizer"):
        return prepare(folder, data_of(experiment), tokenizer=experiment.tokenizer())
    return prepare(folder, data_of(experiment), VOCABULARY)


def _one(name: str, row: str, seed: int, folder: str) -> dict:
    torch.set_num_threads(1)
    experiment = importlib.import_module(f"{__name__}.{name}")
    data = data_for(experiment, folder)
    probe = experiment.Probe() if hasattr(experiment, "Probe") else None
    usual = partial(train_row, probe=probe, change=getattr(experiment, "CHANGES", {}).get(row))
    train = getattr(experiment, "TRAIN", {}).get(row, usual)
    trained = train(experiment.ROWS[row], plan_of(experiment, row), data, experiment.CONTEXT, seed)
    model, noted = trained if isinstance(trained, tuple) else (trained, probe.found if probe else {})
    found: Mapping[str, float] = experiment.measure(model, data)
    return {"seed": seed, "parameters": num_params(model), **{key: round(value, 4) for key, value in found.items()}, **noted}


def run(name: str) -> Path:
    """Train all rows of an experiment, two at a time, and store what was measured."""
    experiment = importlib.import_module(f"{__name__}.{name}")
    jobs = [(row, seed) for row in experiment.ROWS for seed in seeds_of(experiment, row)]
    jobs.sort(key=lambda job: -plan_of(experiment, job[0]).steps * experiment.ROWS[job[0]].width)  # no core waits for a long last run
    with tempfile.TemporaryDirectory() as folder:
        data_for(experiment, folder)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(_one, name, row, seed, folder) for row, seed in jobs]
            found = [future.result() for future in track(futures, name, unit="run")]
    rows = {row: [result for (r, _), result in zip(jobs, found) if r == row] for row in experiment.ROWS}
    made = {"command": f"python -m minillm.course.experiments {name}", "torch": torch.__version__, "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread a run",
            "plan": {"steps": experiment.PLAN.steps, "batch_size": experiment.PLAN.batch_size, "context": experiment.CONTEXT,
                     "lr": experiment.PLAN.lr, "data": f"{data_of(experiment).size:,} bytes of {data_of(experiment).source}",
                     "vocabulary": next(iter(experiment.ROWS.values())).vocab_size}}
    path = Path(__file__).with_name(f"{name}.json")
    write_atomically(path, _json({"made": made, "rows": rows}))
    return path


def _json(values: dict) -> str:
    """Indented JSON in which a list of numbers is one line."""
    return re.sub(r"\[[^][{}\"]+\]", lambda found: json.dumps(json.loads(found[0])), json.dumps(values, indent=1)) + "\n"


def main() -> None:
    """Run the experiments named on the command line."""
    show_progress()
    for name in sys.argv[1:]:
        run(name)
