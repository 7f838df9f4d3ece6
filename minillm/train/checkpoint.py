"""Checkpoints that are whole or not there: everything that a run needs to go on, in one folder.

    runs/first/step-000400/
        config.json  model.safetensors  tokenizer.json    what `load_pretrained` and Hugging Face read
        optimizer.safetensors                             AdamW's averages and the random state
        trainer.json                                      step, loader position, the run's configuration
        manifest.json                                     the size of every file above, written last

The folder is filled under a temporary name, synced and renamed, so a run that is killed, or a disk that fills up,
leaves the last checkpoint as it was.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from minillm.files import sync, write_atomically
from minillm.model.huggingface import CheckpointError, load_tensors, save_pretrained, save_tensors
from minillm.model.transformer import Transformer

NEEDED = ("optimizer.safetensors", "trainer.json")
MODEL = (("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors"))
"""A whole model, or what was added to one that is elsewhere."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back: the folder, the optimizer's tensors by name, and the trainer's notes."""

    folder: Path
    tensors: dict[str, Tensor]
    notes: dict


def save_checkpoint(folder: Path, model: Transformer, tensors: dict[str, Tensor], notes: dict,
                    save_tokenizer: Callable[[Path], None] | None = None,
                    save_model: Callable[[Transformer, Path], None] | None = None) -> None:
    """Write a whole checkpoint or nothing. save_model: writes an adapter's files instead of the model's.

    Raises: CheckpointError when the disk is full; the message names the last whole checkpoint.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        (save_model or save_pretrained)(model, temporary)
        save_tensors(temporary / "optimizer.safetensors", tensors)
        write_atomically(temporary / "trainer.json", json.dumps(notes, indent=1))
        if save_tokenizer:
            save_tokenizer(temporary)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        write_atomically(temporary / "manifest.json", json.dumps(sizes, indent=1))
        sync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_not_written(folder, model, error)) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint back, after holding every file to the size that the manifest gives.

    Raises: CheckpointError when a file is missing or truncated, naming the last whole checkpoint beside it.
    """
    folder = Path(folder)
    wrong = what_is_wrong(folder)
    if wrong:
        whole = latest_checkpoint(folder.parent)
        way_out = (f" The last whole checkpoint is {whole.name}; continue from it with --resume {whole}." if whole
                   else " There is no other whole checkpoint here; start again with --fresh.")
        raise CheckpointError(f"{folder} is incomplete: {wrong}.{way_out}")
    return Checkpoint(folder, load_tensors(folder / "optimizer.safetensors"),
                      json.loads((folder / "trainer.json").read_text()))


def what_is_wrong(folder: Path) -> str | None:
    """The first thing that makes a checkpoint unusable, or None when it is whole."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return "manifest.json is missing" if folder.exists() else "the folder does not exist"
    try:
        sizes = json.loads(manifest.read_text())
    except ValueError:
        return "manifest.json is not whole"
    if not isinstance(sizes, dict) or not any(all(isinstance(sizes.get(name), int) for name in NEEDED + pair) for pair in MODEL):
        return "manifest.json does not list the files of a checkpoint"
    for name, expected in sizes.items():
        file = folder / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected:
            return f"{name} has {file.stat().st_size:,} of {expected:,} bytes"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    return sorted(Path(run).glob("step-*"), key=_age)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next((folder for folder in reversed(checkpoints(run)) if what_is_wrong(folder) is None), None)


def find_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a run, or the folder itself when it is a model or an adapter.

    Raises: FileNotFoundError when it is neither.
    """
    if any((folder / pair[0]).exists() for pair in MODEL):
        return folder
    if whole := latest_checkpoint(folder):
        return whole
    raise FileNotFoundError(f"{folder} holds no checkpoint. Train one with: minillm train --out {folder}")


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest whole checkpoints; broken ones are left for their owner to look at."""
    whole = [folder for folder in checkpoints(run) if what_is_wrong(folder) is None]
    for folder in whole[:-keep]:
        shutil.rmtree(folder)


def leave_behind(run: Path, start: Path) -> list[Path]:
    """Give the checkpoints of a run that are later than `start` other names: going on from there, the run takes
    another way, and neither pruning nor the next resume may mix the two. Returns the new names, left-step-...
    """
    left = []
    for folder in checkpoints(run):
        if start.resolve().parent == Path(run).resolve() and _age(folder) > _age(start):
            aside = folder.with_name(f"left-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)  # the same step of a way that was left before
            left.append(folder.rename(aside))
    return left


def _age(folder: Path) -> tuple[int, str]:
    """Sorts step-1000000 behind step-999999, which as text comes first."""
    return len(folder.name), folder.name


def _not_written(folder: Path, model: Transformer, error: Exception) -> str:
    """Why a checkpoint could not be written, and what is still there."""
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    # safetensors writes in Rust, whose errors carry the number in their text only
    full = any(getattr(error, "errno", None) == number or f"(os error {number})" in str(error)
               for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    whole = latest_checkpoint(folder.parent)
    kept = f"The last whole checkpoint is {whole}, untouched." if whole else "There is no earlier checkpoint."
    free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
    reason = f"the disk is full ({free:,} bytes free, about {needed:,} needed)" if full else str(error)
    return f"{folder} could not be written: {reason}. {kept} Make room, or choose another --out, and resume."
