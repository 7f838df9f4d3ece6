"""What a model knows, measured: held-out loss, multiple choice by likelihood, and exact match of what it writes.

A choice is scored by its log-likelihood behind the context (likelihood.py), which is what lm-evaluation-harness calls
`loglikelihood`: the sum of its tokens' log-probabilities, and whether greedy decoding would write it. The harness's
acc_norm divides by the choice's characters; `byte` here divides by its bytes.
Source: github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md. Left out: chat templates, several samples.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch

from minillm.data.corpora import Document
from minillm.data.tasks import Item
from minillm.infer.generate import stream
from minillm.infer.likelihood import Score, choice_rows, score_rows, size_of, windows
from minillm.infer.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.progress import track
from minillm.train.loss import bits_per_byte

NORMALISATIONS = ("sum", "token", "byte", "unconditional")
ANSWER_CONTEXT = "Answer:"
"""What the unconditional probability of a choice is measured behind; the choice brings the space."""
Z95 = 1.959964  # standard deviations that hold 95% of a normal distribution


@dataclass(frozen=True)
class Likelihoods:
    """The choices of one item. cut: tokens of the context that found no room in the model's window."""

    scores: tuple[Score, ...]
    unconditional: tuple[Score, ...]
    sizes: tuple[int, ...]
    cut: int

    def by(self, normalisation: str) -> list[float]:
        """What the choices are compared by: the log-likelihood (sum), the mean over its tokens or over the choice's
        bytes, or the gain over the unconditional one, log P(choice | context) - log P(choice | "Answer:").

        Source of the last: arXiv:2005.14165 §2.4.   Raises: ValueError for another name.
        """
        sums = [score.log_likelihood for score in self.scores]
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation {normalisation!r}: expected one of {', '.join(NORMALISATIONS)}.")
        if normalisation == "unconditional":
            return [x - score.log_likelihood for x, score in zip(sums, self.unconditional, strict=True)]
        over = {"sum": repeat(1), "token": [score.tokens for score in self.scores], "byte": self.sizes}[normalisation]
        return [x / n for x, n in zip(sums, over)]


class Accuracy(NamedTuple):
    """So many right of so many."""

    right: int
    count: int

    @property
    def value(self) -> float:
        """The share of right answers."""
        return self.right / self.count

    @property
    def error(self) -> float:
        """Its standard error: the questions are a sample of the task. sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1 - self.value) / self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval, which stays between 0 and 1 and is right for few questions or shares near the ends.

        Source: E. B. Wilson, 1927, Journal of the American Statistical Association 22.
        """
        p, n, z2 = self.value, self.count, Z95 ** 2
        middle, half = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low, high = ((middle + side * half) / (1 + z2 / n) for side in (-1, 1))
        return (0.0 if self.right == 0 else low), (1.0 if self.right == n else high)


class HeldOut(NamedTuple):
    """The loss on a set of documents, each with its end. best_nats: the least possible, where the source knows it."""

    documents: int
    tokens: int
    bytes: int
    nats: float
    best_nats: float | None

    @property
    def nats_per_token(self) -> float:
        """The loss that training shows; it depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of it: among how many equally likely tokens the model seems to choose."""
        return math.exp(self.nats_per_token)

    @property
    def nats_per_byte(self) -> float:
        """A loss that does not depend on the tokenizer."""
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """The same in bits: what an arithmetic coder with this model would need."""
        return bits_per_byte(self.nats, self.bytes)


def choice_log_likelihoods(model: Transformer, tokenizer, items: Sequence[Item], *, window: int | None = None,
                           batch_size: int = 16) -> list[Likelihoods]:
    """The log-likelihood of every choice of every item. A prompt too long for the window loses its beginning.

    All choices of an item see the same context, and stay whole.   window: tokens at a time, the model's context by default.
    Raises: ValueError for no items, items without choices, a choice without a token or longer than the window, or a
    tokenizer with more tokens than the model.
    """
    window = _window(model, tokenizer, window)
    if not items:
        raise ValueError("the task is empty: there is no item to ask.")
    rows, cuts = [], []
    for item in items:
        if not item.choices:
            raise ValueError(f"the item {item.context[-40:]!r} has no choices; use exact_match for a target.")
        for context in (item.context, ANSWER_CONTEXT):
            more, cut = choice_rows(tokenizer, context, item.choices, window)
            rows += more
            cuts.append(cut)
    scores, found, at = score_rows(model, rows, batch_size), [], 0
    for number, item in enumerate(items):
        n = len(item.choices)
        sizes = tuple(size_of(choice) for choice in item.choices)
        found.append(Likelihoods(tuple(scores[at:at + n]), tuple(scores[at + n:at + 2 * n]), sizes, cuts[2 * number]))
        at += 2 * n
    return found


def choice_accuracy(items: Sequence[Item], likelihoods: Sequence[Likelihoods], normalisation: str = "sum") -> Accuracy:
    """How often the likeliest choice is the right one; of equals, the first counts as chosen."""
    picked = [values.index(max(values)) for values in (found.by(normalisation) for found in likelihoods)]
    return Accuracy(sum(pick == item.answer for pick, item in zip(picked, items, strict=True)), len(items))


def exact_match(model: Transformer, tokenizer, items: Sequence[Item], *, max_new_tokens: int = 16,
                stop: Sequence[str] = (",", ".", "\n"), window: int | None = None) -> Accuracy:
    """How often greedy decoding writes the target, up to a stop string; spaces around it do not count.

    Raises: ValueError for no items, items without a target, a window without room for an answer, or another tokenizer.
    """
    window = _window(model, tokenizer, window)
    if not items or any(item.target is None for item in items):
        raise ValueError("exact_match needs items with a target; choices are scored by choice_log_likelihoods.")
    if max_new_tokens >= window:
        raise ValueError(f"max_new_tokens = {max_new_tokens} leaves no room for a prompt in a window of {window} tokens.")
    right = 0
    for item in track(items, "write", unit="item"):
        ids = [tokenizer.end_of_text, *tokenizer.encode(item.context)][max_new_tokens - window:]
        right += _write(model, tokenizer, ids, max_new_tokens, stop).strip() == item.target.strip()
    return Accuracy(right, len(items))


def held_out(model: Transformer, tokenizer, documents: Iterable[Document], *, window: int | None = None,
             stride: int | None = None, batch_size: int = 8) -> HeldOut:
    """The loss on documents, each read alone from its beginning to its end (the end counts, as in training).

    A document longer than the window is read in windows that move on by `stride` tokens: each token is scored once, and
    all but those of the first window see at least window - stride tokens before them. By default half a window.
    Cost: window / stride passes over a long text.   Raises: ValueError for no documents, a stride outside 1 to window, or a
    tokenizer with more tokens than the model.
    """
    window = _window(model, tokenizer, window)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride = {stride}: must be 1 to the window of {window} tokens, or tokens would be left out.")
    rows, count, size, best = [], 0, 0, 0.0
    for document in documents:
        ids = [tokenizer.end_of_text, *tokenizer.encode(document.text), tokenizer.end_of_text]
        rows += windows(ids, window, stride)
        count, size = count + 1, size + size_of(document.text)
        best = None if best is None or document.nats is None else best + document.nats
    if not size:
        raise ValueError("there is no text to measure the loss on.")
    scores = score_rows(model, rows, batch_size)
    return HeldOut(count, sum(s.tokens for s in scores), size, -sum(s.log_likelihood for s in scores), best)


def _write(model: Transformer, tokenizer, ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> str:
    """The greedy continuation, up to a stop string or the end of the text."""
    written: list[int] = []
    prompt = torch.tensor([ids], device=model.embed.weight.device)
    for token in stream(model, prompt, max_new_tokens, sampling=Sampling(temperature=0)):
        if int(token) == tokenizer.end_of_text:
            break
        written.append(int(token))
        text = tokenizer.decode(written)
        if places := [text.index(s) for s in stop if s in text]:
            return text[:min(places)]
    return tokenizer.decode(written)


def _window(model: Transformer, tokenizer, window: int | None) -> int:
    """Tokens to read at a time. Raises: ValueError for a tokenizer of another model, or an impossible window."""
    context, known = model.config.context, model.config.vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {known:,}: they do not belong "
                         f"together. Load both from one folder.")
    if window is not None and (window < 1 or (model.config.pos == "learned" and window > context)):
        raise ValueError(f"window = {window}: must be 1 to {context}, the positions that the model has learned.")
    return context if window is None else window
