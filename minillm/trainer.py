"""The loop: batches in, metrics and checkpoints out, and a clean end whatever happens.

Killed at any moment, a run resumes from its last checkpoint to the same losses, bit for bit on one device: weights,
optimizer, random state and the loader's position are saved together. Ctrl-C and SIGTERM finish the step, save and stop.
On several ranks all do the same steps; the first one alone writes, shows and does what is planned, and the others wait. A
signal to one of them stops all after the same step.
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from torch import Tensor

from minillm.config import ParallelConfig, TrainConfig
from minillm.data.loader import Batch, Loader, evaluation_batches
from minillm.data.shards import TokenShards
from minillm.engine import Engine
from minillm.model.huggingface import CheckpointError, load_pretrained
from minillm.model.flops import training_flops_per_token
from minillm.model.transformer import Transformer
from minillm.progress import bar, say
from minillm.train.checkpoint import latest_checkpoint, leave_behind, load_checkpoint, prune, save_checkpoint
from minillm.train.loss import bits_per_byte
from minillm.train.metrics import Metrics

# Fields that may differ when a run resumes: when to look and save, and how fast (compiling rounds differently).
FREE_TO_CHANGE = ("eval_every", "eval_sequences", "checkpoint_every", "keep", "compile")
SKIPS = 30
"""Steps that a loss scaler may skip in a row: by then the scale has fallen from 65,536 to 1/16,384."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, what is saved, and what to try."""


class Trainer:
    """Drives an engine over a loader.

    validation: token shards, or batches that are measured as they are (conversations, say).
    at: functions of the whole model to call after certain steps (0 is before the first), which return values for the
    metrics file.
    peak: floating-point operations a second that a rank's device could do; then the model's share of them (MFU) is told, too.
    save_model: writes an adapter's files to a checkpoint, instead of the whole model.
    load_model: reads what save_model wrote, if that has a config.json (a reward model's files, say).
    """

    def __init__(self, engine: Engine, loader: Loader, validation: TokenShards | Sequence[Batch], run: str | Path, *,
                 tokenizer=None, tensorboard: bool = False,
                 at: dict[int, Callable[[Transformer], dict]] | None = None, peak: float | None = None,
                 save_model: Callable[[Transformer, Path], None] | None = None,
                 load_model: Callable[..., Transformer] = load_pretrained):
        self.engine, self.loader, self.validation, self.run = engine, loader, validation, Path(run)
        self.config: TrainConfig = engine.config
        self.tokenizer, self.tensorboard, self.at = tokenizer, tensorboard, at or {}
        self.peak, self.save_model, self.load_model = peak, save_model, load_model
        self._skipped = 0  # steps in a row, by the loss scaler
        self._stop: signal.Signals | None = None

    def train(self, *, resume: Path | None = None) -> bool:
        """Train to the last step. Returns True when the run is finished, False when a signal stopped it early.

        resume: a checkpoint folder to go on from.
        Raises: TrainingError for a loss that is not finite, CheckpointError for a checkpoint that does not fit.
        """
        if resume:
            self.restore(resume)
            for name in self.engine.on_first(lambda: [folder.name for folder in leave_behind(self.run, Path(resume))]):
                say(f"{name} comes later than {Path(resume).name} and was put aside under this name.")
        metrics = None
        if self.engine.first:
            metrics = Metrics(self.run / "metrics.jsonl", resume_at=self.engine.steps_done if resume else None,
                              tensorboard=self.tensorboard)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._loop(metrics, fresh=not resume)
        finally:
            if metrics:
                metrics.close()
            for which, handler in previous.items():
                signal.signal(which, handler)

    def _loop(self, metrics: Metrics | None, fresh: bool) -> bool:
        """All the steps that are left."""
        steps, started, stopped = self.config.steps, time.perf_counter(), False
        saved = None if fresh else self.engine.steps_done
        if fresh:
            self._look(metrics)
        with bar("train", total=steps, unit="step", start=self.engine.steps_done) as progress:
            while self.engine.steps_done < steps and not (stopped := self.engine.any_rank(self._stop is not None)):
                found = self._step()
                done, now = self.engine.steps_done, time.perf_counter()
                tokens = self.config.batch_size * self.loader.context
                speed = self._speed(tokens / (now - started))
                if metrics:
                    metrics.write(done, **found, tokens=done * tokens, **speed)
                started = now
                if done % self.config.eval_every == 0 or done == steps or done in self.at:
                    seen = self._look(metrics)
                    share = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
                    progress.set_postfix_str(f"train {found.get('loss', math.nan):.3f}, validation {seen['val_loss']:.3f}{share}")
                    started = time.perf_counter()
                if done % self.config.checkpoint_every == 0 or done == steps:
                    self.save()
                    saved = done
                progress.update(1)
        if stopped and saved != self.engine.steps_done:
            self.save()
        return self.engine.steps_done >= steps

    def _step(self) -> dict[str, float]:
        """One optimizer step: its loss, learning rate and gradient norm. Weights stay as they were if it goes wrong.

        With a loss scaler, a step whose gradients are not finite is skipped (its norm is then left out); many in a row are
        an error, as one is without a scaler.
        """
        scaler, found = self.engine.scaler, {"lr": self.engine.learning_rate}
        if scaler:
            found["loss_scale"] = scaler.scale
        loss = float(self.engine.forward_backward(next(self.loader)))
        norm = float(self.engine.clip(self.config.clip_norm))
        finite = math.isfinite(loss) and math.isfinite(norm)
        self._skipped = 0 if finite else self._skipped + 1
        if not finite and (scaler is None or self._skipped > SKIPS):
            raise TrainingError(self._explain(loss, norm, found["lr"]))
        self.engine.step()
        if not finite:
            return found | {"skipped": True}
        return {"loss": loss, **found, "grad_norm": norm}

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        """How fast it goes, and how much of the device that uses: model FLOPs utilisation, arXiv:2204.02311 appendix B."""
        found = {"tokens_per_second": round(tokens_per_second)}
        if self.peak:
            needed = training_flops_per_token(self.engine.model.config, self.loader.context)
            found["mfu"] = round(tokens_per_second * needed / (self.peak * self.engine.world), 4)
        return found

    def _look(self, metrics: Metrics | None) -> dict:
        """Measure the validation loss, and do whatever is planned for this step."""
        done = self.engine.steps_done
        found = self.evaluate(None if done >= self.config.steps else self.config.eval_sequences)
        planned = {}
        if done in self.at:
            model = self.engine.whole_model() if self.engine.saves else None
            planned = self.engine.on_first(lambda: self.at[done](model))
        for values in (found, planned) if metrics else ():
            if values:
                metrics.write(done, **values)
        return found

    def evaluate(self, sequences: int | None = None) -> dict:
        """Validation loss in nats a token, and over the whole set (None) in bits a byte of its text too, where it is one."""
        nats, count = 0.0, 0
        size = self.config.microbatch_size or self.config.batch_size
        most = None if sequences is None else -(-sequences // size)
        is_text = isinstance(self.validation, TokenShards)
        batches = evaluation_batches(self.validation, size, self.loader.context) if is_text else self.validation
        for batch in islice(batches, most):
            share = batch.part(self.engine.rank, self.engine.ranks)
            nats, count = nats + self.engine.evaluate(share), count + batch.count
        found = {"val_loss": nats / count, "val_tokens": count}
        if sequences is None and is_text:
            found["val_bits_per_byte"] = bits_per_byte(nats, self.validation.bytes)
        return found

    def save(self) -> Path:
        """Write a checkpoint of this very moment, and remove the oldest."""
        folder = self.run / f"step-{self.engine.steps_done:06d}"
        whole = (self.engine.whole_model(), self.engine.state_dict()) if self.engine.saves else ()
        self.engine.on_first(lambda: self._write(folder, *whole))
        return folder

    def _write(self, folder: Path, model: Transformer, tensors: dict[str, Tensor]) -> None:
        notes = {"step": self.engine.steps_done, "model": asdict(self.engine.model.config),
                 "train": asdict(self.config), "parallel": asdict(self.engine.parallel), "device": str(self.engine.device),
                 "loader": self.loader.state_dict()}
        save_checkpoint(folder, model, tensors, notes, self.tokenizer.save if self.tokenizer else None,
                        self.save_model)
        prune(self.run, self.config.keep)

    def restore(self, folder: Path) -> None:
        """Take back weights, optimizer, random state and the loader's position.

        Raises: CheckpointError when it is incomplete or of another configuration (naming the fields that differ).
        """
        checkpoint = load_checkpoint(folder)
        self._check_same(checkpoint.folder, checkpoint.notes)
        if (folder / "config.json").exists():  # else it is an adapter's, whose weights the engine has kept
            weights = self.load_model(folder, dtype=next(self.engine.model.parameters()).dtype).state_dict()
            self.engine.load_weights(weights)
        self.engine.load_state_dict(checkpoint.tensors)
        self.loader.load_state_dict(checkpoint.notes["loader"])

    def _check_same(self, folder: Path, notes: dict) -> None:
        """A checkpoint of another run must not be continued by accident. The layout may differ: the batches are the same."""
        asked = {"model": self.engine.model.config, "train": self.config}
        differing = []
        for part, config in asked.items():
            for field, value in asdict(config).items():
                value = list(value) if isinstance(value, tuple) else value
                saved = notes[part].get(field)
                if saved != value and not (part == "train" and field in FREE_TO_CHANGE):
                    differing.append(f"{part}.{field} was {saved!r} and is now {value!r}")
        if differing:
            raise CheckpointError(f"{folder} belongs to another configuration: {'; '.join(differing)}. Give the same "
                                  f"options to go on, or start afresh with --fresh or another --out.")

    def _on_signal(self, number: int, frame) -> None:
        """Remember to stop after this step; a second signal does what it always does."""
        self._stop = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        say(f"{self._stop.name}: finishing this step, then saving.")

    def _explain(self, loss: float, norm: float, rate: float) -> str:
        """What to do about a loss that is no number."""
        last = latest_checkpoint(self.run)
        saved = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
        return (f"step {self.engine.steps_done + 1}: the loss is {loss} and the gradient norm {norm}. The weights were "
                f"not updated. {saved} Try a lower --train.lr (it was {rate:.2g}), a longer --train.warmup-steps, or a "
                f"smaller --train.clip-norm; with 16 bits, try --train.precision fp32.")
