"""`minillm evaluate`: the loss by domain and the accuracy by task, as rows for JSON and as tables to read."""

import json
from collections.abc import Sequence
from pathlib import Path

from minillm.data.corpora import Document, documents, split
from minillm.data.prepare import DataConfig
from minillm.data.story_tasks import SEED, best_accuracy, story_task
from minillm.data.tasks import Item, chance, read_items, with_examples
from minillm.infer.evaluate import NORMALISATIONS, Accuracy, choice_accuracy, choice_log_likelihoods, exact_match, held_out
from minillm.model.transformer import Transformer
from minillm.train.loss import bits_per_byte

FRESH = 12_345
"""Added to the seed of the stories in training, for stories that are none of them."""


def trained_on(folder: Path) -> DataConfig | None:
    """What the data folder of a run, or of a checkpoint's run, was made from; None when there is no such folder."""
    for place in (folder, folder.parent):
        if (made := place / "data" / "data.json").exists():
            request = json.loads(made.read_text())["request"]
            return DataConfig(**{key: value for key, value in request.items() if key != "vocab_size"})
    return None


def unseen(source: str, size: int, seen: DataConfig | None) -> list[Document]:
    """About `size` bytes of a source that training has not read: fresh stories, the validation part of the source in
    training, or any part of another. Python's docs are part of its source: a model of one has seen much of the other.
    """
    if source == "stories":
        return list(documents(source, limit=size, seed=FRESH + (seen.seed if seen else 0)))
    if seen is None or source != seen.source:
        return list(documents(source, limit=size))
    kept, taken = [], 0
    for document in split(documents(source, limit=seen.size), seen.val_fraction, seen.seed)[1]:
        if taken < size:
            kept.append(document)
            taken += len(document.text.encode(errors="replace"))
    return kept


def domain_losses(model: Transformer, tokenizer, domains: Sequence[str], size: int,
                  seen: DataConfig | None) -> list[dict]:
    """A row for each source of text."""
    rows = []
    for source in domains:
        found = held_out(model, tokenizer, unseen(source, size, seen))
        best = None if found.best_nats is None else bits_per_byte(found.best_nats, found.bytes)
        rows.append({"domain": source, "documents": found.documents, "tokens": found.tokens, "bytes": found.bytes,
                     "nats_per_token": found.nats_per_token, "perplexity": found.perplexity,
                     "nats_per_byte": found.nats_per_byte, "bits_per_byte": found.bits_per_byte,
                     "best_bits_per_byte": best})
    return rows


def task_scores(model: Transformer, tokenizer, tasks: Sequence[str], shots: Sequence[int], count: int,
                seed: int = SEED) -> list[dict]:
    """A row for each task and number of examples. A task is a name of story_tasks.TASKS or a .jsonl file, of which the
    first `count` items are asked. Raises: ValueError for a count below 1, or items that this model cannot be asked."""
    if count < 1:
        raise ValueError(f"items = {count}: ask at least one question of each task.")
    rows = []
    for task in tasks:
        items = read_items(task)[:count] if task.endswith(".jsonl") else story_task(task, count, seed)
        best = best_accuracy(items)
        for number in shots:
            asked = with_examples(items, number, seed)
            try:
                found = _answers(model, tokenizer, asked)
            except ValueError as error:
                raise ValueError(f"task {task}, {number} shots: {error}") from None
            rows.append({"task": task, "items": len(items), "shots": number, "chance": chance(items), "best": best, **found})
    return rows


def _answers(model: Transformer, tokenizer, items: list[Item]) -> dict:
    """Accuracy by every normalisation that there is for such items, and how many prompts did not fit."""
    if items[0].target is not None:
        return {**_told(exact_match(model, tokenizer, items)), "by": {}, "domains": {}, "cut": None}
    found = choice_log_likelihoods(model, tokenizer, items)
    parts = {}
    for domain in sorted({item.domain for item in items} - {""}):
        inside = [place for place, item in enumerate(items) if item.domain == domain]
        parts[domain] = _told(choice_accuracy([items[i] for i in inside], [found[i] for i in inside]))
    others = {name: choice_accuracy(items, found, name).value for name in NORMALISATIONS[1:]}
    return {**_told(choice_accuracy(items, found)), "by": others, "domains": parts,
            "cut": sum(one.cut > 0 for one in found) / len(found)}


def _told(found: Accuracy) -> dict:
    """An accuracy for JSON."""
    return {"accuracy": found.value, "right": found.right, "standard_error": found.error, "interval": found.interval}


def loss_table(rows: Sequence[dict]) -> list[str]:
    """Lines."""
    lines = [f"{'held-out loss':<20}{'documents':>10}{'tokens':>10}{'nats/token':>12}{'perplexity':>12}{'nats/byte':>11}"
             f"{'bits/byte':>11}{'best possible':>15}"]
    for row in rows:
        best = "" if row["best_bits_per_byte"] is None else f"{row['best_bits_per_byte']:.3f}"
        lines.append(f"{_short(row['domain']):<20}{row['documents']:>10,}{row['tokens']:>10,}{row['nats_per_token']:>12.3f}"
                     f"{row['perplexity']:>12,.1f}{row['nats_per_byte']:>11.3f}{row['bits_per_byte']:>11.3f}{best:>15}")
    return lines


def task_table(rows: Sequence[dict]) -> list[str]:
    """Lines; accuracies in percent, "cut" is the share of prompts too long for the model's window."""
    lines = [f"{'accuracy, %':<20}{'items':>6}{'shots':>7}{'chance':>8}{'best':>7}{'right':>8}{'95% interval':>16}"
             f"{'per token':>11}{'per byte':>10}{'over P(choice)':>16}{'cut':>6}"]
    for row in rows:
        low, high = row["interval"]
        shown = [_percent(row[key]) for key in ("chance", "best", "accuracy")]
        others = [_percent(row["by"].get(name)) for name in NORMALISATIONS[1:]]
        lines.append(f"{_short(row['task']):<20}{row['items']:>6}{row['shots']:>7}{shown[0]:>8}{shown[1]:>7}{shown[2]:>8}"
                     f"{f'{100 * low:.1f} to {100 * high:.1f}':>16}{others[0]:>11}{others[1]:>10}{others[2]:>16}"
                     f"{_percent(row['cut']):>6}")
    return lines


def _short(name: str) -> str:
    """A name, or the last part of a path, in a column of 20."""
    return name.rstrip("/").rpartition("/")[2][-19:]


def _percent(share: float | None) -> str:
    """0.5 -> 50.0; nothing for what there is not."""
    return "" if share is None else f"{100 * share:.1f}"
