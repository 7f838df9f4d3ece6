"""Lesson 04's exercises: RMSNorm, SwiGLU, a parallel block, and the converter of a fused projection."""

import torch
from torch.nn import functional as F

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "04", "packages": ("torch", "numpy", "einops"), "rtol": 1e-4, "atol": 1e-5,
          "why": "float32: the same sums in another order, of numbers of size 1"}


# rms_norm

def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def subtracts_the_mean(x, weight, eps):
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def norm_inputs(draw: Draw, size: float = 1.0, shift: float = 1.0) -> tuple:
    width = draw.int(4, 12)
    return size * (draw.tensor(draw.int(1, 3), draw.int(2, 5), width) + shift), 1 + draw.tensor(width) / 2, 10.0 ** -draw.int(1, 3)


RMS_NORM = Exercise(
    name="rms_norm", reference=rms_norm, minutes=8, difficulty=1,
    bans=("torch.nn.functional.rms_norm", "torch.rms_norm", "torch.nn.RMSNorm"), **COMMON,
    tests=(Test("any vectors", norm_inputs, points=2), Test("small vectors, where eps counts", lambda draw: norm_inputs(draw, 0.05))),
    hints=("The root mean square of (3, 4) is the root of (9 + 16) / 2 = 3.54.",
           "x.square().mean(-1, keepdim=True) keeps the dim, so that it divides each vector of x.",
           "x / torch.sqrt(that + eps) * weight."),
    mutants=(Mutant(subtracts_the_mean, "You subtract the mean, as LayerNorm does; RMSNorm leaves it in. That is the whole difference."),
             Mutant(lambda x, w, e: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + e) * w, "That is the root of the sum of squares; the mean is asked for."),
             Mutant(lambda x, w, e: x / (x.square().mean(-1, keepdim=True) + e) * w, "The root is missing: divide by √(mean of squares + eps)."),
             Mutant(lambda x, w, e: x / (x.square().mean(-1, keepdim=True).sqrt() + e) * w, "eps belongs under the root."),
             Mutant(lambda x, w, e: x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * w, "eps is forgotten: small vectors must not be blown up."),
             Mutant(lambda x, w, e: rms_norm(x, 1 + w, e), "That multiplies by 1 + weight: Gemma's files store it so, but the formula here is plain."),
             Mutant(lambda x, w, e: rms_norm(x, 1.0, e), "The weight is not used."),
             Mutant(lambda x, w, e: x * torch.rsqrt(x.square().mean() + e) * w, "One mean for all tokens; each vector has its own.")),
    variants={"gemma": Variant("the stored weight is the real one minus 1, as in Gemma: multiply by 1 + weight.",
                               lambda x, w, e: rms_norm(x, 1 + w, e))})


# swiglu

def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def ffn_inputs(draw: Draw) -> tuple:
    width, hidden = draw.int(3, 6), draw.int(7, 12)
    return draw.tensor(draw.int(1, 3), draw.int(2, 4), width), draw.tensor(hidden, width), draw.tensor(hidden, width), draw.tensor(width, hidden)


SWIGLU = Exercise(
    name="swiglu", reference=swiglu, minutes=8, difficulty=1, **COMMON | {"rtol": 1e-3, "atol": 1e-4},
    tests=(Test("any weights", ffn_inputs, points=3, cases=5),),
    hints=("A Linear layer with weight (F, C) computes x @ weight.T.",
           "silu(z) = z · sigmoid(z); torch.nn.functional.silu has it. Which of the two projections goes through it?",
           "(F.silu(x @ gate.T) * (x @ up.T)) @ down.T."),
    mutants=(Mutant(lambda x, g, u, d: swiglu(x, u, g, d), "Gate and up are swapped: the activation belongs to the gate."),
             Mutant(lambda x, g, u, d: (F.silu(x @ g.T) + x @ u.T) @ d.T, "The two are added; a gate multiplies."),
             Mutant(lambda x, g, u, d: (torch.sigmoid(x @ g.T) * (x @ u.T)) @ d.T, "That is sigmoid, the first GLU; silu(z) is z · sigmoid(z)."),
             Mutant(lambda x, g, u, d: (F.gelu(x @ g.T) * (x @ u.T)) @ d.T, "That is GELU (GeGLU); SwiGLU takes SiLU."),
             Mutant(lambda x, g, u, d: F.silu((x @ g.T) * (x @ u.T)) @ d.T, "The activation is on the product; it belongs on the gate alone."),
             Mutant(lambda x, g, u, d: F.silu(x @ u.T) @ d.T, "There is no gate: that is a plain layer with up and down.")),
    variants={"geglu": Variant("the activation is the exact GELU (GeGLU), not SiLU.", lambda x, g, u, d: (F.gelu(x @ g.T) * (x @ u.T)) @ d.T)})


# parallel_block

def drive_block(answer, x, mix, wide):
    """The parts of a block, small: a norm, an attention that averages over the past, a feed-forward layer."""
    import torch

    def norm(y):
        return torch.nn.functional.layer_norm(y, y.shape[-1:])

    def attention(y):
        return y.cumsum(-2) / torch.arange(1, y.shape[-2] + 1)[:, None] @ mix

    def ffn(y):
        return torch.tanh(y @ wide)
    return answer(x, norm, attention, ffn)


def parallel_block(x, norm, attention, ffn):
    y = norm(x)
    return x + attention(y) + ffn(y)


def pre_block(x, norm, attention, ffn):
    x = x + attention(norm(x))
    return x + ffn(norm(x))


def block_inputs(draw: Draw) -> tuple:
    width = draw.int(4, 8)
    return 2 * draw.tensor(draw.int(1, 3), draw.int(3, 6), width), draw.tensor(width, width), draw.tensor(width, width)


PARALLEL_BLOCK = Exercise(
    name="parallel_block", reference=parallel_block, driver=drive_block, minutes=8, difficulty=1, **COMMON | {"rtol": 1e-3, "atol": 1e-4},
    tests=(Test("any parts", block_inputs, points=2, cases=5),),
    hints=("One norm is computed, and both parts read it.", "Neither part sees what the other did; both add to the same stream.",
           "y = norm(x); x + attention(y) + ffn(y)."),
    mutants=(Mutant(pre_block, "That is GPT-2's block, one part after the other; here both read the same normed stream."),
             Mutant(lambda x, n, a, f: x + a(n(x)) + f(x), "The feed-forward layer reads the stream itself; it reads the normed one, too."),
             Mutant(lambda x, n, a, f: a(n(x)) + f(n(x)), "The stream is not added: without the residual nothing of x gets through."),
             Mutant(lambda x, n, a, f: n(x) + a(n(x)) + f(n(x)), "The normed stream is added; the stream itself must go through untouched."),
             Mutant(lambda x, n, a, f: x + f(n(a(n(x)))), "The parts are chained; they stand side by side."),
             Mutant(lambda x, n, a, f: n(x + a(x) + f(x)), "The norm comes last, as in GPT-1; here it comes first.")),
    variants={"halved": Variant("what both parts say is halved before it is added: x + (attention + ffn) / 2.",
                                lambda x, n, a, f: x + (a(n(x)) + f(n(x))) / 2)})


# split_qkv

def split_qkv(fused, heads, kv_heads):
    size = fused.shape[0] // (heads + 2 * kv_heads)
    grouped = fused.reshape(kv_heads, heads // kv_heads + 2, size, -1)
    parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
    return {name: part.reshape(-1, fused.shape[1]) for name, part in parts.items()}


def concatenated(fused, heads, kv_heads):
    size = fused.shape[0] // (heads + 2 * kv_heads)
    return dict(zip("qkv", fused.split([heads * size, kv_heads * size, kv_heads * size])))


def rearranged(order: str, front: bool = False):
    def wrong(fused, heads, kv_heads):
        size = fused.shape[0] // (heads + 2 * kv_heads)
        grouped = fused.reshape(kv_heads, heads // kv_heads + 2, size, -1)
        q, first, second = (grouped[:, 2:], grouped[:, 0], grouped[:, 1]) if front else (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
        found = {"q": q, order[0]: first, order[1]: second}
        return {name: found[name].reshape(-1, fused.shape[1]) for name in "qkv"}
    return wrong


def heads_mixed(fused, heads, kv_heads):
    right = split_qkv(fused, heads, kv_heads)
    q = right["q"].reshape(kv_heads, heads // kv_heads, -1, fused.shape[1]).transpose(0, 1)
    return right | {"q": q.reshape(-1, fused.shape[1])}


def qkv_inputs(draw: Draw) -> tuple:
    groups, shared, size = draw.int(2, 3), draw.int(2, 3), draw.int(2, 4)
    return draw.tensor((groups * shared + 2 * groups) * size, draw.int(4, 7)), groups * shared, groups


SPLIT_QKV = Exercise(
    name="split_qkv", reference=split_qkv, minutes=15, difficulty=2, **COMMON | {"rtol": 0.0, "atol": 0.0, "why": "exact"},
    tests=(Test("grouped heads", qkv_inputs, points=2), Test("one KV head for each query head", lambda draw: (draw.tensor(3 * 4 * 3, 5), 4, 4))),
    hints=("The rows of one KV head are: its H/G query heads, one key head, one value head, D rows each.",
           "fused.reshape(kv_heads, heads // kv_heads + 2, D, C) gives that structure names: [group, which head, row, column].",
           "[:, :-2] are the queries, [:, -2] the keys, [:, -1] the values; reshape each back to (rows, C)."),
    mutants=(Mutant(concatenated, "That is GPT-2's layout, all q, then all k, then all v; here they alternate by KV head."),
             Mutant(rearranged("vk"), "Keys and values are swapped: each group ends with its key, then its value."),
             Mutant(rearranged("kv", front=True), "The queries come first in each group, not last."),
             Mutant(heads_mixed, "The query heads are out of order: first all of group 0, then all of group 1."),
             Mutant(lambda f, h, g: {n: t.T for n, t in split_qkv(f, h, g).items()}, "The weights are transposed: a Linear layer stores (out, in), as the fused one does.")),
    variants={"values_first": Variant("each group ends with its value head, then its key head.", rearranged("vk"))})

EXERCISES = [RMS_NORM, SWIGLU, PARALLEL_BLOCK, SPLIT_QKV]
