"""Token shards: the ids of many documents in a file that is mapped into memory instead of being read.

A shard is a header of 4096 bytes (JSON after an 8-byte mark) and then the ids, two bytes each when the vocabulary fits
(up to 65,536) and four when not. Each document is followed by <|endoftext|>. The header says which tokenizer wrote the
file and how many tokens it holds, and opening checks both: ids mean nothing under another tokenizer.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from minillm.data.corpora import Document
from minillm.files import replacing
from minillm.text.bpe import BPETokenizer

MARK = b"minillm1"
HEADER = 4096


class ShardError(ValueError):
    """A token shard cannot be used; the message says which file, why and what to do."""


@dataclass(frozen=True)
class Header:
    """What a shard says about itself. bytes: of text; nats: of the text under its true source, NaN if unknown."""

    dtype: str
    vocab_size: int
    tokenizer: str
    tokens: int
    documents: int
    bytes: int
    nats: float


class TokenShards:
    """The shards of one split, read as one long sequence of ids.

    `shards[start:end]` gives an int64 array; `tokens`, `documents`, `bytes` and `nats` are totals.
    """

    def __init__(self, paths: list[Path], headers: list[Header]):
        self.headers = headers
        self._maps = [np.memmap(path, dtype=header.dtype, mode="r", offset=HEADER, shape=(header.tokens,))
                      for path, header in zip(paths, headers, strict=True)]
        self._starts = np.cumsum([0] + [header.tokens for header in headers])
        self.tokens = int(self._starts[-1])
        self.documents = sum(header.documents for header in headers)
        self.bytes = sum(header.bytes for header in headers)
        self.nats = sum(header.nats for header in headers)
        self.vocab_size, self.tokenizer = headers[0].vocab_size, headers[0].tokenizer

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids of a span, which may cross from one file into the next."""
        start, end, _ = span.indices(self.tokens)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < end:
            stop = min(end, int(self._starts[first + 1]))
            parts.append(self._maps[first][start - self._starts[first]:stop - self._starts[first]])
            start, first = stop, first + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def write_shards(folder: str | Path, name: str, documents: Iterable[Document], tokenizer: BPETokenizer, *,
                 shard_tokens: int = 100_000_000) -> list[Path]:
    """Tokenize documents into NAME-00000.bin, NAME-00001.bin, ..., each of about `shard_tokens` tokens at most.

    Each file takes its name only when it is whole. Older shards NAME-*.bin in the folder are replaced, all of them.
    Raises: ValueError when there is no document.
    """
    folder, stream, paths = Path(folder), iter(documents), []
    kind = np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32
    while first := list(islice(stream, 1)):
        path = folder / f"{name}-{len(paths):05d}.bin"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(bytes(HEADER))
            totals = _write_tokens(file, first, stream, tokenizer, kind, shard_tokens)
            header = Header(kind.__name__, tokenizer.vocab_size, tokenizer.fingerprint, *totals)
            file.seek(0)
            file.write((MARK + json.dumps(asdict(header)).encode()).ljust(HEADER, b"\0"))
        paths.append(path)
        if len(paths) == 1:  # from here on the folder holds the new text only, even if the next shard is never finished
            for older in set(_paths(folder, name)) - {path}:
                older.unlink()
    if not paths:
        raise ValueError(f"{folder / name}: there is no document to write.")
    return paths


def open_shards(folder: str | Path, name: str, tokenizer: BPETokenizer | None = None) -> TokenShards:
    """Open the shards NAME-*.bin of a folder, after checking each header.

    Raises: FileNotFoundError; ShardError for a truncated or foreign file, or another tokenizer's.
    """
    paths = _paths(folder, name)
    if not paths:
        raise FileNotFoundError(f"{folder} has no {name}-*.bin. Make token shards with: minillm tokenize --out {folder}")
    for number, path in enumerate(paths):
        if path.name != f"{name}-{number:05d}.bin":
            raise ShardError(f"{folder} has {path.name} but no {name}-{number:05d}.bin: a shard is missing. Copy it again, "
                             f"or make all of them again with minillm tokenize.")
    headers = [_read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if tokenizer is not None and header.tokenizer != tokenizer.fingerprint:
            raise ShardError(f"{path} was written by tokenizer {header.tokenizer[:12]} ({header.vocab_size:,} tokens), but "
                             f"the one given is {tokenizer.fingerprint[:12]} ({tokenizer.vocab_size:,}). Use the "
                             f"tokenizer.json beside the shards, or tokenize again.")
        if header.tokenizer != headers[0].tokenizer:
            raise ShardError(f"{path} and {paths[0]} were written by different tokenizers. Remove one of them.")
    return TokenShards(paths, headers)


def _paths(folder: str | Path, name: str) -> list[Path]:
    """The shards of this name, in order."""
    return sorted(Path(folder).glob(f"{name}-{'[0-9]' * 5}.bin"))


def _write_tokens(file, first: list[Document], stream: Iterator[Document], tokenizer: BPETokenizer, kind: type,
                  limit: int) -> tuple[int, int, int, float]:
    """Write documents until the shard is full. Returns tokens, documents, bytes, nats."""
    tokens = count = size = 0
    nats, batch = 0.0, first
    while batch:
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            file.write(np.array([*ids, tokenizer.end_of_text], dtype=kind).tobytes())
            tokens, count = tokens + len(ids) + 1, count + 1
            size += len(document.text.encode("utf-8", "replace"))
            nats += math.nan if document.nats is None else document.nats
        if tokens >= limit:
            break
        # as many documents as are likely to fit, so that a shard does not grow far beyond its limit
        batch = list(islice(stream, max(1, min(1_000, (limit - tokens) * count // tokens))))
    return tokens, count, size, nats


def _read_header(path: Path) -> Header:
    """A shard's header, held against the file's size and its ids against the vocabulary."""
    with open(path, "rb") as file:
        raw = file.read(HEADER)
    if not raw.startswith(MARK):
        raise ShardError(f"{path} is no token shard of this version: it begins with {raw[:8]!r} instead of {MARK!r}. "
                         f"Make it again with minillm tokenize.")
    try:
        header = Header(**json.loads(raw[len(MARK):].rstrip(b"\0")))
        if header.dtype not in ("uint16", "uint32") or not (header.tokens >= 1 and header.vocab_size >= 1):
            raise ValueError(f"{header.tokens!r} ids of {header.vocab_size!r} as {header.dtype!r}")
    except (ValueError, TypeError) as error:
        raise ShardError(f"{path}: the header cannot be read ({error}). Make the shard again.") from None
    expected = HEADER + header.tokens * np.dtype(header.dtype).itemsize
    actual = path.stat().st_size
    if actual != expected:
        raise ShardError(f"{path} is incomplete: it has {actual:,} of {expected:,} bytes. Make it again with minillm "
                         f"tokenize, or copy it again.")
    highest = int(np.memmap(path, dtype=header.dtype, mode="r", offset=HEADER, shape=(header.tokens,)).max())
    if highest >= header.vocab_size:
        raise ShardError(f"{path} holds token id {highest}, outside its vocabulary of {header.vocab_size:,}. It is "
                         f"damaged: make it again.")
    return header
