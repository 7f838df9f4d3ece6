"""How likely a model finds a given continuation: the one measurement that every evaluation here is made of.

A row is (ids, n): the last n ids are scored, given all before them. `choice_rows` makes the rows of one question, `windows`
those of a text of any length; `score_rows` runs the model. Every text begins behind <|endoftext|>, as in training.

Context and choice are tokenised together. Where lm-evaluation-harness counts the tokens of the context alone and cuts
there, here the scored part begins at the first token that differs between the choices or reaches into them: a token
across the boundary, part context and part choice, is then scored, and all choices answer for the same text. Where no
token crosses, the two agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from minillm.model.transformer import Transformer
from minillm.progress import track
from minillm.text.clean import repair_surrogates

Row = tuple[list[int], int]


class Score(NamedTuple):
    """A scored continuation: its log-likelihood in nats, its tokens, and whether greedy decoding writes it."""

    log_likelihood: float
    tokens: int
    greedy: bool


@torch.inference_mode()
def score_rows(model: Transformer, rows: Sequence[Row], batch_size: int) -> list[Score]:
    """For each (ids, n): how likely the last n ids are after those before them.

    Texts of like length go together, padded on the right, where a causal model does not look. Rows that differ only in
    their last id, as choices of one token do, are one text: the last id is never read, only looked up.
    """
    texts: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(rows):
        texts.setdefault(tuple(ids[:-1]), []).append(number)
    order, device, scores = sorted(texts, key=len), model.embed.weight.device, [None] * len(rows)
    for at in track(range(0, len(order), batch_size), "score", unit="batch"):
        batch = order[at:at + batch_size]
        logits = model(torch.tensor([[*text, *[0] * (len(batch[-1]) - len(text))] for text in batch], device=device))
        for text, row_logits in zip(batch, logits):
            for number in texts[text]:
                ids, n = rows[number]
                wide = row_logits[len(text) - n:len(text)].to(torch.promote_types(logits.dtype, torch.float32))
                targets = torch.tensor(ids[-n:], device=device)
                chosen = wide.log_softmax(-1).gather(-1, targets[:, None])
                scores[number] = Score(float(chosen.sum()), n, bool((wide.argmax(-1) == targets).all()))
    return scores


def windows(ids: list[int], window: int, stride: int) -> list[Row]:
    """(ids, how many of the last to score): every id but the first is scored once, from at most `window` before it."""
    found = [(ids[:window + 1], min(window, len(ids) - 1))]
    for start in range(window + 1, len(ids), stride):
        end = min(start + stride, len(ids))
        found.append((ids[end - window - 1:end], end - start))
    return found


def choice_rows(tokenizer, context: str, choices: Sequence[str], window: int) -> tuple[list[Row], int]:
    """The rows of a question's choices, and how many tokens of its context were cut off on the left.

    All choices see the same context, and stay whole.
    Raises: ValueError for a choice without a token of its own, or with more than the window holds.
    """
    joint = [tokenizer.encode(context + choice) for choice in choices]
    shared, room = 0, size_of(context)
    for column in zip(*joint):
        room -= len(tokenizer.decode_bytes(column[:1]))
        if room < 0 or len(set(column)) > 1:
            break
        shared += 1
    for ids, choice in zip(joint, choices, strict=True):
        if len(ids) == shared:
            raise ValueError(f"the choice {choice!r} has no token of its own behind {context[-40:]!r}: it cannot be scored.")
        if len(ids) - shared > window:
            raise ValueError(f"the choice {choice[:40]!r} has {len(ids) - shared} tokens, and the model reads {window} at "
                             f"a time. Shorten the choice, or use a model with a longer context.")
    cut = max(0, 1 + max(map(len, joint)) - (window + 1))
    return [([tokenizer.end_of_text, *ids][cut:], len(ids) - shared) for ids in joint], cut


def size_of(text: str) -> int:
    """Bytes of what the tokenizer reads."""
    return len(repair_surrogates(text).encode())
