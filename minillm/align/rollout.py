"""Rollouts: sample answers to many prompts at once, and say how likely the policy found each token.

The prompts are padded on the left to write in step (infer/generate.py); what comes out is padded on the right, as sft.py lays
conversations out. The log-probabilities are taken by the very forward pass that training takes, so the first ratio of PPO
is 1; sampling engines that report their own are off by their rounding, as training under autocast, or by oneDNN's products, is
here. For the same reason there is no temperature or top-k: the policy that is improved is the one that was sampled.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.align.sft import pad_rows
from minillm.data.loader import Batch
from minillm.infer.generate import stream
from minillm.infer.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.text.chat import Rendered
from minillm.train.loss import token_log_probs


class Rollouts(NamedTuple):
    """batch: prompts and answers, whose tokens are the targets.   answers: ids, without the stop token.
    finished: whether it came.   log_probs (B, T): of each target under the policy, 0 elsewhere."""

    batch: Batch
    answers: list[list[int]]
    finished: list[bool]
    log_probs: Tensor


def sample(model: Transformer, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Collection[int], *,
           generator: torch.Generator | None = None, greedy: bool = False) -> Rollouts:
    """One answer to each prompt, up to a stop token, which is learned too. For K answers, give a prompt K times.

    greedy: the likeliest tokens, to see how good the policy is.   Raises: ValueError for no prompts or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"{len(prompts)} prompts, {sum(not p for p in prompts)} of them empty: each needs a token to begin "
                         f"with.")
    answers = [row[:_end(row, stop_ids)] for row in _write(model, prompts, max_new_tokens, stop_ids, generator, greedy)]
    rows = [Rendered(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for prompt, answer in zip(prompts, answers)]
    batch = pad_rows(rows).to(model.embed.weight.device)
    finished = [answer[-1] in stop_ids for answer in answers]
    return Rollouts(batch, [answer[:-1] if done else answer for answer, done in zip(answers, finished)], finished,
                    log_probs_of(model, batch))


@torch.no_grad()
def log_probs_of(model: Transformer, batch: Batch) -> Float[Tensor, "B T"]:
    """ln p of each target, 0 elsewhere, by the forward pass of training."""
    batch = batch.to(model.embed.weight.device)
    return token_log_probs(model(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids), batch.targets)


def _write(model: Transformer, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Collection[int],
           generator: torch.Generator | None, greedy: bool) -> list[list[int]]:
    """What comes after each prompt, in step."""
    longest, device = max(map(len, prompts)), model.embed.weight.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[n >= longest - len(prompt) for n in range(longest)] for prompt in prompts], device=device)
    tokens = stream(model, ids, max_new_tokens, sampling=Sampling(temperature=0.0 if greedy else 1.0), stop_ids=stop_ids,
                    padding_mask=mask, generator=generator)
    return torch.stack(list(tokens), dim=1).tolist()


def _end(row: list[int], stop_ids: Collection[int]) -> int:
    """Where a row ends: behind its first stop token."""
    return next((place + 1 for place, token in enumerate(row) if token in stop_ids), len(row))
