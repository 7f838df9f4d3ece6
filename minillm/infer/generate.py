"""Write on: feed the text, choose a token, feed that token, and so on.

`stream` yields tokens as they come, `generate` collects them, `stream_text` turns them into text that never shows half
a character or the beginning of a stop string. The cache is on by default; without it the tokens are the same, and
every step reads the whole text again.
"""

import codecs
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minillm.infer.kv_cache import StaticCache
from minillm.infer.packed import PackedLinear
from minillm.infer.sampling import Sampling, choose
from minillm.model.transformer import Transformer


def stream(model: Transformer, ids: Int[Tensor, "B T"], max_new_tokens: int, *, sampling: Sampling = Sampling(),
           stop_ids: Collection[int] = (), padding_mask: Bool[Tensor, "B T"] | None = None,
           prefix_len: int | Int[Tensor, "B"] | None = None, mask_pos: int | Int[Tensor, "B"] | None = None,
           generator: torch.Generator | None = None, cached: bool = True, compiled: bool = False) -> Iterator[Int[Tensor, "B"]]:
    """Yield one token for every row, until `max_new_tokens` or until every row has stopped.

    A row that has stopped repeats its stop token. padding_mask: False on padding, which stands on the left.
    prefix_len, mask_pos: as in the model's call, for prompts that are read in both directions.
    compiled: read single tokens by torch.compile: half a minute at first, and faster after, for long texts of small models.
    Raises: ValueError for an empty prompt, more tokens than learned positions reach, or compiled with packed weights.
    """
    _check_room(model, ids, max_new_tokens)
    if compiled and any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("compiled with packed weights: take one of them; packing helps large weights, compiling small models.")
    cache = None
    if cached:
        weight = model.embed.weight
        cache = StaticCache(model.config, len(ids), ids.shape[1] + max_new_tokens, dtype=weight.dtype,
                            device=weight.device)
    text, fresh, read = ids, ids, model
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    last = ids[:, -1]
    stops = torch.tensor(sorted(stop_ids), dtype=ids.dtype, device=ids.device)
    for _ in range(max_new_tokens):
        with torch.inference_mode():  # a sixth faster than no_grad; left before every yield
            logits = read(fresh if cached else text, cache=cache, padding_mask=padding_mask, prefix_len=prefix_len,
                          mask_pos=mask_pos)[:, -1]
            token = choose(logits, sampling, text, generator)
            if len(stops):
                token = torch.where(done, last, token)
                done = done | torch.isin(token, stops)
            last, fresh = token, token[:, None]
            if compiled and read is model:  # the prompt's length is new each time, and compiling for it would not pay
                read = torch.compile(model)
            text = torch.cat((text, fresh), dim=1)
            if padding_mask is not None:
                padding_mask = torch.cat((padding_mask, torch.ones_like(fresh, dtype=torch.bool)), dim=1)
        yield token.clone()  # a tensor like any other: one made in inference mode could not be trained on
        if len(stops) and bool(done.all()):
            return


def generate(model: Transformer, ids: Int[Tensor, "B T"], max_new_tokens: int, **options) -> Int[Tensor, "B longer"]:
    """The prompt and what the model writes after it; options as for `stream`.

    Shapes: ids (B, T) -> (B, T + n) with n <= max_new_tokens.
    """
    tokens = list(stream(model, ids, max_new_tokens, **options))
    return torch.cat([ids] + [token[:, None] for token in tokens], dim=1)


def stream_text(model: Transformer, tokenizer, prompt: str, max_new_tokens: int, *, stop: Sequence[str] = (),
                allowed_special: Collection[str] | str = (), seed: int | None = None, **options) -> Iterator[str]:
    """Yield what the model writes after `prompt`, piece by piece, up to a stop string or the end-of-text token.

    Characters of several tokens come out whole; text that may be the beginning of a stop string waits until that is
    known. An empty prompt starts a new text.
    """
    ids = tokenizer.encode(prompt, allowed_special=allowed_special) or [tokenizer.end_of_text]
    yield from stream_pieces(model, tokenizer, ids, max_new_tokens, (tokenizer.end_of_text,), stop=stop, seed=seed, **options)


def stream_pieces(model: Transformer, tokenizer, ids: Sequence[int], max_new_tokens: int, ends: Collection[int], *,
                  stop: Sequence[str] = (), seed: int | None = None, **options) -> Iterator[str]:
    """As `stream_text`, from ids to text, up to one of the tokens `ends` or a stop string."""
    device = model.embed.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    tokens = stream(model, torch.tensor([ids], device=device), max_new_tokens, stop_ids=ends, generator=generator, **options)
    for token in tokens:
        if int(token) in ends:
            break
        held += decoder.decode(tokenizer.decode_bytes([int(token)]))
        found = [held.index(s) for s in stop if s in held]
        if found:
            yield held[:min(found)]
            return
        keep = _unfinished(held, stop)
        if len(held) > keep:
            yield held[:len(held) - keep]
            held = held[len(held) - keep:]
    held += decoder.decode(b"", final=True)
    if held:
        yield held


def _unfinished(text: str, stop: Sequence[str]) -> int:
    """How many last characters of `text` may be the beginning of a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def _check_room(model: Transformer, ids: Tensor, max_new_tokens: int) -> None:
    """Refuse at the start what would fail in the middle."""
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token, for example the end-of-text token.")
    total, context = ids.shape[1] + max_new_tokens, model.config.context
    if model.config.pos == "learned" and total > context:
        raise ValueError(f"{ids.shape[1]} prompt tokens and {max_new_tokens} new ones make {total}, but the model has "
                         f"learned only {context} positions. Ask for {max(0, context - ids.shape[1])} tokens at most, "
                         f"or shorten the prompt.")
