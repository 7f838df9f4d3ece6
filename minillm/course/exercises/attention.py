"""Lesson 02's exercises: causal attention, shared KV heads, rotation, ALiBi, and a mask of each kind."""

import math

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "02", "packages": ("torch", "numpy", "einops"), "rtol": 1e-4, "atol": 1e-5,
          "why": "float32: the same sums in another order, of numbers of size 1"}
ORACLES = ("torch.nn.functional.scaled_dot_product_attention", "torch._C._nn.scaled_dot_product_attention",
           "torch.nn.functional.multi_head_attention_forward", "torch.nn.MultiheadAttention")


# causal_attention

def attention_of(q, k, v, scale=None, ahead=0, dim=-1, fill=-math.inf, mask=True):
    """Causal attention, with the places where people go wrong as arguments."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + ahead)
    return scores.masked_fill(hidden & mask, fill).softmax(dim).nan_to_num() @ v


def causal_attention(q, k, v):
    return attention_of(q, k, v)


def unmasked_softmax(q, k, v):
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights.tril() @ v


def qkv(draw: Draw, groups: int | None = None) -> tuple:
    heads = 6 if groups else draw.int(1, 3)
    sizes, tokens, size = draw.int(1, 2), draw.int(4, 8), draw.int(5, 12)
    return tuple(1.5 * draw.tensor(sizes, h, tokens, size) for h in (heads, groups or heads, groups or heads))


CAUSAL_ATTENTION = Exercise(
    name="causal_attention", reference=causal_attention, minutes=15, difficulty=1, bans=ORACLES, **COMMON,
    tests=(Test("one head and more", qkv, points=3, cases=5),),
    hints=("Scores are all dot products at once: q @ k.mT has the shape (..., T, T). Divide them by the root of D.",
           "torch.ones(T, T, dtype=torch.bool).triu(1) is True exactly on the keys that come after a query.",
           "scores.masked_fill(that, -math.inf).softmax(-1) @ v."),
    mutants=(Mutant(lambda q, k, v: attention_of(q, k, v, scale=1.0),
                    "The scores are not divided by √D: row 0 cannot tell, but all others are too sure of themselves."),
             Mutant(lambda q, k, v: attention_of(q, k, v, scale=1 / q.shape[-1]), "The scores are divided by D, not by its root."),
             Mutant(lambda q, k, v: attention_of(q, k, v, scale=q.shape[-2] ** -0.5), "That is the root of T; D, the size of a head, is the last dim."),
             Mutant(lambda q, k, v: attention_of(q, k, v, ahead=1), "Each token sees one token too many, the next one: triu(1), not triu(2)."),
             Mutant(lambda q, k, v: attention_of(q, k, v, ahead=-1), "A token does not see itself: the diagonal stays."),
             Mutant(lambda q, k, v: attention_of(q, k, v, dim=-2), "Softmax runs over the queries; each query's weights, along the last dim, must sum to 1."),
             Mutant(lambda q, k, v: attention_of(q, k, v, mask=False), "Nothing is masked: tokens see the future."),
             Mutant(lambda q, k, v: attention_of(q, k, v, fill=0.0), "Masked scores are 0, which softmax takes for an ordinary score: use -inf."),
             Mutant(unmasked_softmax, "The mask comes after softmax, so the rows no longer sum to 1: it belongs before.")),
    variants={"banded": Variant("a token sees itself and the two before it, and nothing further back.",
                                lambda q, k, v: _banded(q, k, v, 3))})


def _banded(q, k, v, window):
    scores, ones = q @ k.mT * q.shape[-1] ** -0.5, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    return scores.masked_fill(ones.triu(1) | ones.tril(-window), -math.inf).softmax(-1) @ v


# grouped_attention

def grouped_attention(q, k, v):
    group = q.shape[1] // k.shape[1]
    return attention_of(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


GROUPED_ATTENTION = Exercise(
    name="grouped_attention", reference=grouped_attention, minutes=10, difficulty=2, bans=ORACLES, needs=("causal_attention",), **COMMON,
    tests=(Test("two or three groups", lambda draw: qkv(draw, draw.int(2, 3)), points=2), Test("one KV head for all", lambda draw: qkv(draw, 1))),
    hints=("With 6 query heads and 2 KV heads, heads 0, 1 and 2 read KV head 0, and 3, 4 and 5 read KV head 1.",
           "repeat_interleave(n, dim=1) repeats each head n times in a row; repeat would repeat the whole set.",
           "Repeat k and v H / G times along dim 1, then call your causal_attention."),
    mutants=(Mutant(lambda q, k, v: attention_of(q, *(x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))),
                    "The KV heads stand in the wrong order: 0 1 0 1 0 1 instead of 0 0 0 1 1 1. Neighbouring query heads share one."),
             Mutant(lambda q, k, v: attention_of(q, k[:, :1], v[:, :1]), "All query heads read the first KV head."),
             Mutant(lambda q, k, v: attention_of(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.mean(1, keepdim=True)),
                    "The values are averaged over the KV heads; each group has its own.")))


# rotary

def turned(x, positions, theta, sign=1, half=False, exponent=None, offset=0):
    """Rotary positions, with the places where people go wrong as arguments."""
    size = x.shape[-1]
    rates = theta ** -(torch.arange(0, size, 2) / size if exponent is None else exponent(size))
    angle = (positions + offset)[:, None] * rates
    cos, sin = angle.cos(), sign * angle.sin()
    a, b = (x[..., :size // 2], x[..., size // 2:]) if half else (x[..., 0::2], x[..., 1::2])
    pairs = a * cos - b * sin, a * sin + b * cos
    return torch.cat(pairs, -1) if half else torch.stack(pairs, -1).flatten(-2)


def rotary(x, positions, theta):
    return turned(x, positions, theta)


def rotary_inputs(draw: Draw) -> tuple:
    tokens, start = draw.int(3, 7), draw.int(0, 20)
    return draw.tensor(tokens, 2 * draw.int(2, 5)), torch.arange(start, start + tokens), float(draw.int(20, 500))


ROTARY = Exercise(
    name="rotary", reference=rotary, minutes=15, difficulty=2, **COMMON | {"atol": 1e-4},
    tests=(Test("positions from anywhere", rotary_inputs, points=3, cases=5),
           Test("one pair, one radian a token", lambda draw: (draw.tensor(4, 2), torch.arange(4), 10_000.0))),
    hints=("Pair i is x[..., 2i] and x[..., 2i + 1]; it turns theta^(-2i/D) radians for each position. Pair 0 always turns by 1.",
           "Angles have the shape (T, D/2): positions[:, None] * rates. Even entries are a = x[..., 0::2], odd ones b = x[..., 1::2].",
           "The new pair is (a cos - b sin, a sin + b cos); torch.stack(the two, -1).flatten(-2) puts them side by side again."),
    mutants=(Mutant(lambda x, p, t: turned(x, p, t, half=True),
                    "Your pairs are (i, i + D/2), as Hugging Face stores them; here neighbours are a pair: 0 with 1, 2 with 3."),
             Mutant(lambda x, p, t: turned(x, p, t, sign=-1), "It turns the wrong way: (a cos - b sin, a sin + b cos)."),
             Mutant(lambda x, p, t: turned(x, p, t, exponent=lambda size: torch.arange(size // 2) / size),
                    "The rates fall half as fast as they should: the exponent of pair i is 2i/D, not i/D."),
             Mutant(lambda x, p, t: turned(x, p, t, exponent=lambda size: -torch.arange(0, size, 2) / size),
                    "The rates grow: theta has a negative exponent, so that later pairs turn more slowly."),
             Mutant(lambda x, p, t: turned(x, p, t, offset=1), "Positions are counted from 1; token 0 is not turned at all."),
             Mutant(lambda x, p, t: turned(x, torch.arange(len(x)), t), "The positions given are ignored: a text need not begin at 0.")),
    variants={"halves": Variant("entry i is paired with entry i + D/2, as in Hugging Face's LLaMA.", lambda x, p, t: turned(x, p, t, half=True))})


# alibi_bias

def penalty(heads, tokens, sign=-1, first=1, base=8.0, future=True, absolute=False):
    slopes = 2.0 ** (-base * (torch.arange(heads) + first) / heads)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    bias = sign * slopes[:, None, None] * (distance.abs() if absolute else distance)
    return bias.masked_fill(distance < 0, -math.inf) if future else bias


def alibi_bias(heads, tokens):
    return penalty(heads, tokens)


ALIBI_BIAS = Exercise(
    name="alibi_bias", reference=alibi_bias, minutes=10, difficulty=1, **COMMON,
    tests=(Test("heads and lengths", lambda draw: (2 ** draw.int(0, 4), draw.int(3, 9)), points=2, cases=5),),
    hints=("Head h of H (counted from 0) has the slope 2^(-8 (h + 1) / H): for 8 heads 1/2, 1/4, ..., 1/256.",
           "torch.arange(T)[:, None] - torch.arange(T) is the distance of every query from every key.",
           "-slopes[:, None, None] * distance, and -inf where the distance is negative."),
    mutants=(Mutant(lambda h, t: penalty(h, t, sign=1), "The sign: a penalty lowers the score of what is far away."),
             Mutant(lambda h, t: penalty(h, t, first=0), "The first slope is 1; it should be 2^(-8/H). Count heads from 1."),
             Mutant(lambda h, t: penalty(h, t, base=h), "The slopes are 1/2, 1/4, ... for any number of heads; the exponent is -8 (h + 1) / H."),
             Mutant(lambda h, t: penalty(h, t, future=False), "The future is not masked: it gets a bonus instead of -inf."),
             Mutant(lambda h, t: penalty(h, t, future=False, absolute=True), "The future is punished like the past; it must be -inf."),
             Mutant(lambda h, t: penalty(h, t).mT, "Queries and keys are swapped: rows are queries.")))


# masks

def four_masks(real, prefix, window, include=0, strict=0):
    tokens = len(real)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    causal = key <= query - strict
    return {"causal": causal, "padding": causal & real, "prefix": causal | (key < prefix + include),
            "banded": causal & (query - key < window + include)}


def masks(real, prefix, window):
    return four_masks(real, prefix, window)


def drive_masks(answer, kind, real, prefix, window):
    return answer(real, prefix, window)[kind]


def mask_inputs(kind: str):
    def inputs(draw: Draw) -> tuple:
        tokens = draw.int(5, 9)
        real = torch.tensor([False] * draw.int(1, 2) + [True] * tokens)
        return kind, real, draw.int(2, 4), draw.int(2, 3)
    return inputs


MASKS = Exercise(
    name="masks", reference=masks, driver=drive_masks, minutes=15, difficulty=2, **COMMON | {"rtol": 0.0, "atol": 0.0, "why": "exact"},
    tests=tuple(Test(kind, mask_inputs(kind)) for kind in ("causal", "padding", "prefix", "banded")),
    hints=("With query = torch.arange(T)[:, None] and key = torch.arange(T), every mask is a comparison or two.",
           "Reasons to hide combine with &, permissions with |: padding hides more, a prefix allows more.",
           "key <= query; that & real; that | (key < prefix); that & (query - key < window)."),
    mutants=(Mutant(lambda *a: four_masks(*a, strict=1), "A token does not see itself: key <= query."),
             Mutant(lambda *a: {k: ~v for k, v in four_masks(*a).items()}, "True and False are swapped: here True means that the query sees the key."),
             Mutant(lambda *a: {k: v.mT for k, v in four_masks(*a).items()}, "Rows are queries, and columns are keys."),
             Mutant(lambda *a: four_masks(*a, include=1), "One too many: a prefix of n is keys 0 to n - 1, and a window of w is the token itself and w - 1 before it."),
             Mutant(lambda real, *a: four_masks(real, *a) | {"padding": four_masks(real, *a)["causal"] & real[:, None]},
                    "The padding queries are masked; it is padding keys that nobody may see."),
             Mutant(lambda real, prefix, window: four_masks(real, prefix, window) | {"prefix": four_masks(real, prefix, window)["causal"] & (torch.arange(len(real)) < prefix)},
                    "The prefix hides what comes after it; it should add to what causality allows.")))

EXERCISES = [CAUSAL_ATTENTION, GROUPED_ATTENTION, ROTARY, ALIBI_BIAS, MASKS]
