"""`minillm train`, and so `make run`: from raw text to a model that writes, with a report to show for it.

Everything of a run is in one folder: data/, step-*/ (checkpoints), metrics.jsonl, loss.png, report.html.
Under torchrun every rank runs this; the first one prepares the data, writes and prints, and the others wait for it.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from minillm.course.doctor import matmul_rate
from minillm.course.report import write_report
from minillm.data.loader import Loader
from minillm.data.prepare import DataConfig, Prepared, open_prepared, prepare
from minillm.engine import Engine, check_layout
from minillm.files import write_atomically
from minillm.infer.generate import stream_text
from minillm.infer.sampling import Sampling
from minillm.model.transformer import Transformer, num_params
from minillm.parallel.agreement import on_first
from minillm.parallel.launch import launch
from minillm.progress import say
from minillm.torch_engine import build_engine, check_torch_layout
from minillm.train.checkpoint import checkpoints, latest_checkpoint
from minillm.train.metrics import read_metrics
from minillm.train.precision import DTYPES
from minillm.trainer import Trainer
from minillm.zero_engine import check_zero

SAMPLE_TOKENS = 120
PATIENCE = 3600.0
"""Seconds that ranks wait for the first one to prepare the data, or to write."""


def first_run(request) -> int:
    """Carry out a `Train` request of the command line. Returns the exit code.

    Raises: ValueError where there are not as many ranks as the layout has.
    """
    check_layout(request.model, request.train, request.parallel)
    if request.parallel.engine == "torch":
        check_torch_layout(request.model, request.train, request.parallel)
    if request.parallel.zero:
        check_zero(request.train, request.parallel)
    return on_ranks(request, "train", _run)


def on_ranks(request, command: str, work) -> int:
    """Do `work(request, group)` on every rank that the request's layout has, or alone. Returns the first one's exit code.

    Raises: ValueError where as many have not been started.
    """
    ranks, started = request.parallel.world_size, int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and started == 1:
        axes = " ".join(f"--parallel.{axis} {size}" for axis, size in request.parallel.axes.items())
        raise ValueError(f"{axes} is for {ranks} ranks, and this is one process. Start them with: "
                         f"{Path(sys.executable).with_name('torchrun')} --nproc-per-node {ranks} -m minillm "
                         f"{command} {axes} and your other options.")
    if ranks != started:
        fits, rest = divmod(started, request.parallel.tp * request.parallel.pp)
        raise ValueError(f"{started} ranks have been started, and the layout has {ranks}: "
                         + ("start with" if rest or not fits else f"add --parallel.dp {fits}, or start with")
                         + f" --nproc-per-node {ranks}.")
    if ranks == 1:
        return work(request, None)
    return launch(lambda me: work(request, me.group), ranks, timeout=PATIENCE)[0]


def _run(request, group) -> int:
    """The whole of it, on one of the group's ranks or alone."""
    run = Path(request.out)
    resume = on_first(lambda: place_to_begin(request, run), group)
    data = _data(request, run, group)
    model = _fitting(request.model, data)
    size = num_params(Transformer(model, device="meta"))
    engine = build_engine(model, request.train, request.parallel)
    loader = Loader(data.train, request.train.batch_size, model.context, seed=request.train.seed, rank=engine.rank,
                    ranks=engine.ranks)
    steps = request.train.steps
    trainer = Trainer(engine, loader, data.val, run, tokenizer=data.tokenizer, tensorboard=request.tensorboard,
                      peak=engine.on_first(lambda: _peak(engine)))
    # Three looks at the same prompt: early, when words begin to form, and at the end.
    for step in sorted({max(1, steps // 20), max(1, steps // 4), steps}):
        trainer.at[step] = partial(_sample, data=data, prompt=request.prompt, step=step)
    say(f"{run}: {size:,} parameters, {data.train.tokens:,} training tokens, {steps:,} steps of "
        f"{request.train.batch_size * model.context:,} tokens on {engine.device}"
        + (f", {engine.world} ranks" if engine.world > 1 else "") + (f", going on from {resume.name}" if resume else ""))
    finished = trainer.train(resume=resume)
    engine.on_first(lambda: _conclude(run, data, request.prompt) if finished else print(
        f"Stopped after step {engine.steps_done} and saved. Go on with the same command."))
    return 0


def _conclude(run: Path, data: Prepared, prompt: str) -> None:
    """Write the report and say where it is."""
    notes = json.loads((latest_checkpoint(run) / "trainer.json").read_text())
    _say_goodbye(run, write_report(run, data, notes, prompt))


def _peak(engine: Engine) -> float:
    """What this device's matrix products reach in the run's format, which its share (MFU) is told of."""
    device, precision = engine.device.type, engine.config.precision
    return matmul_rate(DTYPES["bf16" if precision == "fp8" else precision], device, 1024 if device == "cpu" else 4096)


def _data(request, run: Path, group) -> Prepared:
    """The run's own data, or a folder prepared before."""
    if request.prepared is None:
        return open_prepared(on_first(lambda: prepare(run / "data", request.data, request.model.vocab_size).folder, group))
    if request.data != DataConfig():
        raise ValueError(f"--prepared {request.prepared} already says what the data is: leave the --data.* options out.")
    return open_prepared(request.prepared)


def _fitting(model, data: Prepared):
    """The model, if its vocabulary holds the tokenizer's. A larger one is fine: its last rows are never used."""
    if model.vocab_size < data.tokenizer.vocab_size:
        raise ValueError(f"the model has {model.vocab_size:,} rows for tokens, but the tokenizer of {data.folder} has "
                         f"{data.tokenizer.vocab_size:,} tokens. Use --model.vocab-size {data.tokenizer.vocab_size}.")
    return model


def place_to_begin(request, run: Path) -> Path | None:
    """The checkpoint to go on from, if any; with --fresh, what is there makes room first."""
    if request.fresh:
        set_aside(run)
    return _where_to_resume(run, request.resume)


def _where_to_resume(run: Path, asked: Path | None) -> Path | None:
    """The checkpoint to go on from: the one asked for, else the newest whole one of this folder."""
    if asked is not None:
        return asked
    newest = latest_checkpoint(run)
    found = checkpoints(run)
    if found and found[-1] != newest:
        say(f"{found[-1]} is not whole and is passed over.")
    return newest


def set_aside(run: Path) -> None:
    """Give an old run, or a file of one, another name, so that --fresh loses nothing."""
    if run.exists():
        number = 1
        while (aside := run.with_name(f"{run.name}-before-{number}")).exists():
            number += 1
        run.rename(aside)
        say(f"{run} was there: it is now {aside}.")


def note_request(noted: Path, asked: dict) -> None:
    """Write down what a folder is made from; another request in the same folder is refused. Raises: ValueError that names the fields."""
    asked = json.loads(json.dumps(asked))
    made = json.loads(noted.read_text()) if noted.exists() else asked
    if differing := [f"{key} was {made.get(key)!r} and is now {value!r}" for key, value in asked.items() if made.get(key) != value]:
        raise ValueError(f"{noted.parent} was begun by another request: {'; '.join(differing)}. Give the same options, another "
                         f"--out, or --fresh.")
    write_atomically(noted, json.dumps(asked, indent=1))


def rewrite_report(run: Path) -> bool:
    """Write the report of a finished run once more, with what was added since; False where the folder is none."""
    if not (run / "data" / "data.json").exists() or not (newest := latest_checkpoint(run)):
        return False
    records = [record for record in read_metrics(run / "metrics.jsonl") if "prompt" in record]
    notes = json.loads((newest / "trainer.json").read_text())
    write_report(run, open_prepared(run / "data"), notes, records[-1]["prompt"] if records else "")
    return True


def _sample(model: Transformer, data: Prepared, prompt: str, step: int) -> dict[str, str]:
    """What the model writes now; the same seed every time, so that only the model differs."""
    started = time.perf_counter()
    model.eval()
    text = "".join(stream_text(model, data.tokenizer, prompt, SAMPLE_TOKENS, sampling=Sampling(temperature=0.8), seed=0))
    say(f"\n  step {step}: {prompt}{text}\n")
    return {"prompt": prompt, "sample": text, "sample_seconds": round(time.perf_counter() - started, 3)}


def _say_goodbye(run: Path, summary: dict) -> None:
    """What came out, and what to type next."""
    best = f" (the best possible is {summary['floor']:.3f})" if "floor" in summary else ""
    print(f"""
Done. Validation loss {summary['first_loss']:.3f} -> {summary['final_loss']:.3f} nats per token{best}.

  {run / 'report.html'}   the curve, the numbers, the samples: open it in a browser
  {run / 'metrics.jsonl'}   every step's loss

What next?
  .venv/bin/minillm sample {run} --prompt "Once upon a time" --temperature 0.7
  .venv/bin/minillm train --out runs/second --model.layers 6 --train.steps 300
  make lab          the course, from its first page
""".rstrip())
