"""From a source of text to a folder that training opens: a tokenizer and memory-mapped shards of both splits.

    DATA/tokenizer.json   train-00000.bin ...   val-00000.bin ...   data.json

data.json says what the folder was made from. The same request finds the folder done; another one is refused, so that
a model is never trained on data other than it says.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.data.corpora import Document, documents, split
from minillm.data.dedup import remove_duplicates
from minillm.data.quality import clean_documents, cleaning_for
from minillm.data.shards import TokenShards, open_shards, write_shards
from minillm.files import write_atomically
from minillm.progress import track
from minillm.text.bpe import BPETokenizer


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    source: str = "stories"
    """stories, python-docs, python-source or languages; a file, folder or glob; or hf:owner/name."""
    size: int = 12_000_000
    """Bytes of text to take at most."""
    val_fraction: float = 0.02
    """Share of the documents kept for validation."""
    tokenizer_size: int = 2_000_000
    """Bytes of training text that the tokenizer learns from."""
    dedup: bool = True
    """Remove exact and near duplicates (never from the stories, whose distribution must stay what it is)."""
    clean: bool = False
    """Take out other languages and what breaks the rules of quality; minillm/data/quality.py says which for which source."""
    min_words: int | None = None
    """With clean: the least words of a document; None means what is usual for the source."""
    seed: int = 0
    """Seed of the generated text and of the split."""

    def __post_init__(self):
        """Refuse sizes that leave nothing to train or validate on."""
        if self.size < 1 or self.tokenizer_size < 1:
            raise ValueError(f"size = {self.size}, tokenizer_size = {self.tokenizer_size}: both must be at least 1 byte.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction = {self.val_fraction}: must be between 0 and 1.")
        if self.clean and self.source == "stories":
            raise ValueError("clean = True with source = 'stories': their distribution is known and must stay what it is. "
                             "Leave clean out, or choose another source, such as python-docs.")
        if self.min_words is not None and not (self.clean and self.min_words >= 0):
            raise ValueError(f"min_words = {self.min_words} with clean = {self.clean}: it is a length that cleaning asks for, "
                             f"so it needs clean = True and must not be negative.")


@dataclass(frozen=True)
class Prepared:
    """An opened data folder."""

    folder: Path
    tokenizer: BPETokenizer
    train: TokenShards
    val: TokenShards


def prepare(folder: str | Path, config: DataConfig, vocab_size: int = 0, tokenizer: BPETokenizer | None = None) -> Prepared:
    """Make the data folder, or open it when it was made by the same request.

    vocab_size: of the tokenizer that is trained, if none is given.

    Raises: ValueError when the folder was made by another request, when the source is empty, or the vocabulary too small.
    """
    folder = Path(folder)
    request = asdict(config) | {"vocab_size": tokenizer.vocab_size if tokenizer else vocab_size}
    request |= {"tokenizer": tokenizer.fingerprint} if tokenizer else {}
    made = folder / "data.json"
    if made.exists():
        _check_same_request(folder, json.loads(made.read_text())["request"], request)
        return open_prepared(folder)
    texts, notes = _collect(config)
    parts = split(texts, config.val_fraction, config.seed)
    for name, part in zip(("train", "validation"), parts, strict=True):
        if not part:
            raise ValueError(f"{config.source}: {len(texts)} documents leave none for {name} at val_fraction = "
                             f"{config.val_fraction}. Give more documents (a single file is cut at its blank lines; a folder "
                             f"or a .jsonl file is many), or change val_fraction.")
    if tokenizer is None:
        sample = _up_to(config.tokenizer_size, parts[0])
        tokenizer = BPETokenizer.train((d.text for d in sample), vocab_size, split_digits=True)
    tokenizer.save(folder)
    for name, part in zip(("train", "val"), parts, strict=True):
        write_shards(folder, name, track(part, f"tokenize {name}", unit="doc"), tokenizer)
    write_atomically(made, json.dumps({"request": request} | notes, indent=1))  # last: it says "done"
    return open_prepared(folder)


def open_prepared(folder: str | Path) -> Prepared:
    """Open a data folder. Raises: FileNotFoundError when it is not one, ValueError when its parts do not match."""
    folder = Path(folder)
    if not (folder / "data.json").exists():
        raise FileNotFoundError(f"{folder} has no data.json: it is no finished data folder. "
                                f"Make one with: minillm tokenize --out {folder}")
    tokenizer = BPETokenizer.load(folder)
    return Prepared(folder, tokenizer, open_shards(folder, "train", tokenizer), open_shards(folder, "val", tokenizer))


def _collect(config: DataConfig) -> tuple[list[Document], dict]:
    """All documents that are to be used, and notes on those that are not."""
    texts = list(track(documents(config.source, limit=config.size, seed=config.seed), f"read {config.source}", unit="doc"))
    if not texts:
        raise ValueError(f"{config.source} holds no text: there is nothing to train on.")
    if len(texts) == 1:  # else nothing would be left to validate on; `minillm data --out` writes such files
        pieces = [piece for piece in texts[0].text.split("\n\n") if piece.strip()]
        texts = [Document(piece, f"{texts[0].name}, part {number}") for number, piece in enumerate(pieces, 1)]
    if config.clean:
        kept, report = clean_documents(texts, cleaning_for(config.source, config.min_words, config.dedup))
        copies = sum(s.documents_in - s.documents_out for s in report.stages if s.name.endswith("copies"))
        return kept, {"duplicates_removed": copies, "cleaning": report.table().split("\n")}
    kept = list(remove_duplicates(texts)) if config.dedup and config.source != "stories" else texts
    return kept, {"duplicates_removed": len(texts) - len(kept)}


def _up_to(size: int, texts: Iterable[Document]) -> Iterator[Document]:
    """The first documents, until they hold `size` bytes."""
    taken = 0
    for document in texts:
        if taken >= size:
            return
        taken += len(document.text.encode(errors="replace"))
        yield document


def _check_same_request(folder: Path, made_by: dict, asked: dict) -> None:
    """A folder made from other text must not be trained on by accident."""
    made_by = asdict(DataConfig()) | made_by  # what an older folder does not name was not there, or as it is by default
    differing = [f"{k} was {made_by.get(k)!r} and is now {v!r}" for k, v in asked.items() if made_by.get(k) != v]
    if differing:
        raise ValueError(f"{folder} was made by another request: {'; '.join(differing)}. Give the same options, or "
                         f"another folder, or remove this one.")
