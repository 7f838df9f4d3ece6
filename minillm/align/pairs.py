"""Answers to one prompt that are compared: a batch whose rows belong together, which reward.py and dpo.py learn from.

Rows stand group by group, the best answer first, so that a loss reads (prompts, answers) by one reshape. A group is one target
of the Engine: the loss is a mean over prompts, however many tokens the answers have, and microbatches and ranks keep
groups whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.align.sft import pad_rows
from minillm.data.instructions import Preference
from minillm.data.loader import Batch
from minillm.text.chat import Template, render


@dataclass(frozen=True)
class Groups(Batch):
    """`group` rows after one another answer the same prompt, the best first. Targets are the answers' tokens.

    reference: the reference model's log-probability of each answer, in nats; for DPO.
    """

    reference: Float[Tensor, "B"] | None = None
    group: int = 2

    @property
    def count(self) -> int:
        """Prompts."""
        return len(self.ids) // self.group

    def split(self, size: int) -> list["Groups"]:
        """Microbatches of `size` rows. Raises: ValueError when that would cut a group."""
        if size % self.group:
            raise ValueError(f"microbatches of {size} rows would cut groups of {self.group} answers: use a "
                             f"multiple of {self.group}.")
        return super().split(size)

    def part(self, rank: int, ranks: int) -> "Groups":
        """One rank's groups."""
        return self.take(torch.arange(len(self.ids)).view(-1, self.group).tensor_split(ranks)[rank].flatten())


def pair_batch(template: Template, tokenizer, pairs: Sequence[Preference]) -> Groups:
    """Chosen and rejected in turns, one conversation a row, padded on the right. Shapes: 2B rows for B pairs."""
    rows = [render(template, tokenizer, [*pair.prompt, {"role": "assistant", "content": answer}])
            for pair in pairs for answer in (pair.chosen, pair.rejected)]
    return Groups(**vars(pad_rows(rows)))
