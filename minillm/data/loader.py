"""The loader: batches of token windows, shuffled anew every epoch, the same whatever the number of ranks.

The stream of ids is cut into windows of `context` inputs, each predicting the token that follows; the remainder at the
end of the stream is left out. The order of an epoch is a permutation drawn from (seed, epoch). A global batch is
`batch_size` windows of that order; rank r of P takes the r-th of P equal parts, so putting the ranks' batches
side by side gives the batch that one rank would see. Its position is two numbers, and saved with every checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minillm.data.packing import segments
from minillm.data.shards import TokenShards

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Inputs and what should come next. Targets of -100 do not count."""

    ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"] | None = None
    segment_ids: Int[Tensor, "B T"] | None = None

    @property
    def count(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> list["Batch"]:
        """Microbatches of `size` sequences."""
        return [self._map(lambda tensor: tensor[i:i + size]) for i in range(0, len(self.ids), size)]

    def take(self, rows: Int[Tensor, "N"]) -> "Batch":
        """Some of the rows, by their numbers."""
        return self._map(lambda tensor: tensor[rows])

    def part(self, rank: int, ranks: int) -> "Batch":
        """One rank's rows, as even as it goes: the first ranks have one more, and the last may have none."""
        return self if ranks == 1 else self._map(lambda tensor: tensor.tensor_split(ranks)[rank])

    def _map(self, change) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()})


class Loader:
    """An endless iterator of this rank's batches.

    packed_mask: keep the documents of a window apart (positions and segment_ids are filled; needs end_of_text).
    Shapes: ids and targets (batch_size / ranks, context), int64.
    Raises: ValueError when the data has fewer windows than a batch, or the batch does not divide by the ranks.
    """

    def __init__(self, shards: TokenShards, batch_size: int, context: int, *, seed: int = 0, rank: int = 0,
                 ranks: int = 1, shuffle: bool = True, packed_mask: bool = False, end_of_text: int | None = None):
        self.windows = (len(shards) - 1) // context
        if self.windows < 1:
            raise ValueError(f"a context of {context:,} is longer than the data: {len(shards):,} tokens make no window of "
                             f"{context:,} and a target. Use more text, or a context of at most {len(shards) - 1:,}.")
        if self.windows < batch_size:
            raise ValueError(f"{len(shards):,} tokens make {self.windows:,} windows of {context}, fewer than one batch of "
                             f"{batch_size}. Use more text, a shorter context or a smaller batch.")
        if batch_size % ranks or not 0 <= rank < ranks:
            raise ValueError(f"a batch of {batch_size} does not divide over {ranks} ranks, or rank {rank} is not one.")
        if packed_mask and end_of_text is None:
            raise ValueError("packed_mask needs end_of_text, the id between documents.")
        self.shards, self.batch_size, self.context = shards, batch_size, context
        self.seed, self.rank, self.ranks, self.shuffle = seed, rank, ranks, shuffle
        self.end_of_text = end_of_text if packed_mask else None
        self.epoch, self.taken = 0, 0  # finished epochs, and batches taken from this one
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass; the windows left over take part in another epoch's order."""
        return self.windows // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        windows = self._next_windows()
        spans = torch.from_numpy(np.stack([self.shards[w * self.context:(w + 1) * self.context + 1] for w in windows]))
        ids, targets = spans[:, :-1].contiguous(), spans[:, 1:].contiguous()
        if self.end_of_text is None:
            return Batch(ids, targets)
        segment_ids, positions = segments(ids, self.end_of_text)
        return Batch(ids, targets, positions, segment_ids)

    def _next_windows(self) -> np.ndarray:
        """The numbers of this rank's next windows; the position moves on."""
        if self.taken == self.batches_per_epoch:
            self.epoch, self.taken = self.epoch + 1, 0
        share = self.batch_size // self.ranks
        start = self.taken * self.batch_size + self.rank * share
        self.taken += 1
        return self._permutation()[start:start + share]

    def state_dict(self) -> dict[str, int]:
        """The position: enough, with the same arguments, to go on exactly here."""
        return {"epoch": self.epoch, "taken": self.taken, "windows": self.windows, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position. Raises: ValueError when it was saved over other data or another batch size."""
        for name in ("windows", "batch_size"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the position was saved with {name} = {state[name]:,}, and now it is "
                                 f"{getattr(self, name):,}: the data or the batch has changed since.")
        self.epoch, self.taken = state["epoch"], state["taken"]

    def _permutation(self) -> np.ndarray:
        """The order of windows in this epoch."""
        if self._order is None or self._order[0] != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
            order = generator.permutation(self.windows) if self.shuffle else np.arange(self.windows)
            self._order = (self.epoch, order)
        return self._order[1]


def evaluation_batches(shards: TokenShards, batch_size: int, context: int) -> Iterator[Batch]:
    """One pass in order in which every token but the first is a target exactly once; the end is padded with -100."""
    total = len(shards) - 1
    for start in range(0, total, batch_size * context):
        span = shards[start:min(start + batch_size * context, total) + 1]
        rows = -(-(len(span) - 1) // context)
        ids, targets = np.zeros(rows * context, np.int64), np.full(rows * context, IGNORED, np.int64)
        ids[:len(span) - 1], targets[:len(span) - 1] = span[:-1], span[1:]
        yield Batch(torch.from_numpy(ids).view(rows, context), torch.from_numpy(targets).view(rows, context))
