"""Supervised fine-tuning: the loss of pretraining, on conversations, and only on what the model itself is to say.

Training is otherwise unchanged: the same Engine, Trainer and loss. What differs is the batch. Targets that are not part of
an answer are -100; conversations, which are short, share rows without seeing one another. Where pretraining cuts the text
wherever a window ends, here every conversation stays whole. The loss is the mean over the learned tokens of a whole batch,
whatever its rows, as in TRL. Source: arXiv:2203.02155 §3.5; best-fit packing, arXiv:2404.10830 §3.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from minillm.data.loader import IGNORED, Batch, Loader
from minillm.text.chat import Rendered


def pad_rows(rows: Sequence[Rendered], pad: int = 0) -> Batch:
    """One conversation a row, padded on the right, where a causal model does not look.

    Shapes: rows of at most N ids -> all in (B, N). The last id is read too, as a reward model must, though nothing follows it.
    """
    whole = [[Rendered([*ids, pad], [*learned, False])] for ids, learned in rows]
    return _laid_out(whole, max(len(row.ids) for row in rows), pad)


def pack(rows: Sequence[Rendered], context: int, pad: int = 0) -> Batch:
    """Conversations side by side in rows of `context`, kept apart by segment_ids, with positions of their own.

    The longest first, each into the row where it leaves the least room (best fit, decreasing). Padding is a segment too.
    Shapes: -> ids, targets, positions, segment_ids (B, context).
    Cost: at most 11/9 of the fewest rows possible, and one more.
    Raises: ValueError for a conversation longer than the context, or with nothing to learn.
    """
    for number, row in enumerate(rows):
        if len(row.ids) - 1 > context:
            raise ValueError(f"conversation {number} has {len(row.ids):,} tokens, which do not fit a context of {context:,} "
                             f"(and one target). Use a context of {len(row.ids) - 1:,}, or leave the conversation out.")
        if not any(row.learned[1:]):
            raise ValueError(f"conversation {number} has no answer, so there is nothing to learn from it.")
    bins: list[list[Rendered]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, which bin), sorted
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        size = len(row.ids) - 1
        at = bisect_left(rooms, (size, -1))
        if at == len(rooms):
            bins.append([])
            insort(rooms, (context, len(bins) - 1))
            at = bisect_left(rooms, (size, -1))
        room, number = rooms.pop(at)
        bins[number].append(row)
        insort(rooms, (room - size, number))
    return _laid_out(bins, context, pad)


class RowLoader(Loader):
    """An endless iterator of this rank's batches from rows that are laid out already, shuffled every epoch.

    group: rows after one another that stay together (pairs.py).   Shapes: batch_size / ranks rows of the batch given.
    Raises: ValueError for fewer rows than a batch, or a batch that the ranks, or groups, do not divide.
    """

    def __init__(self, rows: Batch, batch_size: int, *, group: int = 1, seed: int = 0, rank: int = 0, ranks: int = 1):
        if len(rows.ids) < batch_size:
            raise ValueError(f"{len(rows.ids):,} rows of {rows.ids.shape[1]} are fewer than one batch of {batch_size}. Use more "
                             f"examples, a shorter context or a smaller batch.")
        if batch_size % (group * ranks):
            raise ValueError(f"a batch of {batch_size} does not divide over {ranks} ranks"
                             + (f" in groups of {group}." if group > 1 else "."))
        self.rows, self.group, self.windows, self.batch_size = rows, group, len(rows.ids) // group, batch_size // group
        self.context, self.seed, self.rank, self.ranks = rows.ids.shape[1], seed, rank, ranks
        self.shuffle, self.epoch, self.taken, self._order = True, 0, 0, None

    def __next__(self) -> Batch:
        chosen = torch.from_numpy(self._next_windows())
        return self.rows.take((chosen[:, None] * self.group + torch.arange(self.group)).flatten())


class ConversationLoader(RowLoader):
    """Batches of packed conversations; they are packed once. Shapes, errors: as `pack` and RowLoader."""

    def __init__(self, conversations: Sequence[Rendered], batch_size: int, context: int, *, pad: int = 0, **options):
        super().__init__(pack(conversations, context, pad), batch_size, **options)


def _laid_out(bins: Sequence[Sequence[Rendered]], width: int, pad: int) -> Batch:
    """Tensors of rows, each of which holds some conversations and then padding."""
    rows = [[], [], [], []]
    for members in bins:
        ids, targets, positions, segments = [], [], [], []
        for number, (tokens, learned) in enumerate(members):
            ids += tokens[:-1]
            targets += [token if wanted else IGNORED for token, wanted in zip(tokens[1:], learned[1:], strict=True)]
            positions += range(len(tokens) - 1)
            segments += [number] * (len(tokens) - 1)
        rest = width - len(ids)
        for column, values in zip(rows, (ids + [pad] * rest, targets + [IGNORED] * rest, positions + list(range(rest)),
                                         segments + [len(members)] * rest), strict=True):
            column.append(values)
    return Batch(*map(torch.tensor, rows))
