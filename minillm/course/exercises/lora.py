"""Lesson 16's exercises: a LoRA layer that can be merged, a trained prefix of keys and values, and a gated adapter."""

import torch
from torch import nn

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "16", "packages": ("torch", "numpy", "einops"), "rtol": 1e-4, "atol": 1e-5,
          "why": "float32: x (W + BA) and xW + xBA are the same sums in another order"}


# LowRankLinear

def drive_lora(answer, weight, start, alpha, xs, target):
    """Build a layer, train what it trains, merge it twice, and take the change out again."""
    import torch

    layer = answer(weight.clone(), start.clone(), alpha)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = {"at first": layer(xs[0]), "numbers trained": sum(p.numel() for p in trained)}
    optimizer = torch.optim.SGD(trained, lr=0.02)
    for x in xs:
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found |= {"after training": layer(xs[0]), "weight after training": layer.weight.detach().clone()}
    layer.merge()
    found |= {"merged": layer(xs[0]), "weight when merged": layer.weight.detach().clone()}
    layer.merge()
    found["merged twice"] = layer(xs[0])
    layer.unmerge()
    return found | {"unmerged": layer(xs[0]), "weight when unmerged": layer.weight.detach().clone()}


def lora_inputs(draw: Draw) -> tuple:
    rank, out, width = draw.int(2, 3), draw.int(5, 8), draw.int(5, 8)
    xs = [draw.tensor(6, width) for _ in range(4)]
    return draw.tensor(out, width), draw.tensor(rank, width) / 2, 4.0 + draw.int(1, 4), xs, draw.tensor(6, out)


def altered_lora(scale="alpha / r", b=0.0, trains=("A", "B"), guard=True, skips=True, into_weight=True, takes_out=True):
    """W x + (alpha / r) B A x; with arguments, with something wrong."""
    class LowRankLinear(nn.Module):
        def __init__(self, weight, start, alpha):
            super().__init__()
            r = len(start)
            self.weight = nn.Parameter(weight, requires_grad="weight" in trains)
            self.A = nn.Parameter(start, requires_grad="A" in trains)
            self.B = nn.Parameter(torch.full((len(weight), r), b) * torch.arange(1, r + 1), requires_grad="B" in trains)
            self.scale = {"alpha / r": alpha / r, "r": r, "alpha": alpha, "root": alpha / r ** 0.5, "r / alpha": r / alpha}[scale]
            self.merged = False

        def forward(self, x):
            y = x @ self.weight.T
            return y if self.merged and skips else y + self.scale * (x @ self.A.T @ self.B.T)

        @torch.no_grad()
        def merge(self):
            if self.merged and guard:
                return
            if into_weight:
                self.weight += self.scale * self.B @ self.A
            self.merged = True

        @torch.no_grad()
        def unmerge(self):
            if self.merged and into_weight and takes_out:
                self.weight -= self.scale * self.B @ self.A
            self.merged = False
    return LowRankLinear


LORA = Exercise(
    name="LowRankLinear", reference=altered_lora(), driver=drive_lora, minutes=25, difficulty=2, **COMMON,
    tests=(Test("a layer's whole life", lora_inputs, points=6, cases=4),),
    hints=("B is (out, r) and zero. nn.Parameter(weight, requires_grad=False) is a weight that no optimizer will find.",
           "forward: x @ weight.T, and unless it is merged, alpha / r times x @ A.T @ B.T. A (r, in) is len(start) rows high.",
           "merge: under torch.no_grad(), and only if self.merged is False, self.weight += scale * B @ A. unmerge is the mirror."),
    mutants=(Mutant(altered_lora("r"), "You scale by r; it is alpha / r, so that the change keeps its size when the rank grows."),
             Mutant(altered_lora("alpha"), "You scale by alpha alone; divide it by r, the number of rows of A."),
             Mutant(altered_lora("root"), "You scale by alpha / √r. That is rsLoRA, a good idea of 2023; here it is alpha / r."),
             Mutant(altered_lora("r / alpha"), "The scale is upside down: alpha / r."),
             Mutant(altered_lora(b=0.1), "At first the layer is not what it was: B must begin at zero."),
             Mutant(altered_lora(trains=("B",)), "A is frozen, so only B learns. Both are trained; what stands still is the weight."),
             Mutant(altered_lora(trains=("A", "B", "weight")), "The weight is trained, too: the base is not frozen, and its gradient and moments cost what you wanted to save."),
             Mutant(altered_lora(guard=False), "Merging twice adds the change twice. Note that it is in, and do nothing the second time."),
             Mutant(altered_lora(skips=False), "When merged the change is in the weight; you add it once more in forward."),
             Mutant(altered_lora(into_weight=False), "After merge() the change must be in the weight, and forward a single product."),
             Mutant(altered_lora(takes_out=False), "unmerge() has to subtract what merge() added.")),
    variants={"rank-stabilised": Variant("scale by alpha / √r (rsLoRA).", altered_lora("root"))})


# prefix_attention

def drive_prefix(answer, q, k, v, before_k, before_v):
    """The answer, and the gradients of what is trained. rotate(x, positions) is RoPE on (..., T, D)."""
    import torch

    def rotate(x, positions):
        half = x.shape[-1] // 2
        angles = positions[:, None] * 10.0 ** -torch.arange(half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)
    before_k, before_v = before_k.clone().requires_grad_(), before_v.clone().requires_grad_()
    out = answer(q, k, v, before_k, before_v, rotate)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return {"output": out, "gradient of the keys": before_k.grad, "gradient of the values": before_v.grad}


def prefix_inputs(draw: Draw) -> tuple:
    batch, heads, length, size, front = draw.int(2, 3), draw.int(1, 3), draw.int(3, 6), 2 * draw.int(2, 3), draw.int(2, 4)
    text = [draw.tensor(batch, heads, length, size) for _ in range(3)]
    return *text, draw.tensor(heads, front, size), draw.tensor(heads, front, size)


def altered_prefix(rotates_prefix=False, begins=True, sees="all", scaled=True, behind=False, values=True, causal=True, share=1.0):
    """Attention with P keys and values in front; with arguments, with something wrong."""
    def attention(q, k, v, before_k, before_v, rotate):
        batch, heads, length, size = q.shape
        front = before_k.shape[1]
        places = torch.arange(length) + (front if begins else 0)
        q, k = rotate(q, places), rotate(k, places)
        first = rotate(before_k, torch.arange(front)) if rotates_prefix else before_k
        first_v = before_v if values else 0 * before_v
        keys, everything = ([front_part.expand(batch, -1, -1, -1), text] for front_part, text in ((first, k), (first_v, v)))
        keys, everything = torch.cat(keys, 2), torch.cat(everything, 2)
        scores = q @ keys.mT / (size ** 0.5 if scaled else 1.0)
        past = torch.ones(length, length, dtype=torch.bool).tril() if causal else torch.ones(length, length, dtype=torch.bool)
        before = torch.ones(length, front, dtype=torch.bool)
        if sees == "past":
            before = torch.ones(length, front + length, dtype=torch.bool).tril()[:, :front]
            past = torch.ones(length, front + length, dtype=torch.bool).tril()[:, front:]
        if behind:
            split = scores[..., :front].softmax(-1) @ everything[:, :, :front]
            return split + scores[..., front:].masked_fill(~past, -torch.inf).softmax(-1) @ everything[:, :, front:]
        scores = scores.masked_fill(~torch.cat((before, past), 1), -torch.inf)
        return share * scores.softmax(-1) @ everything
    return attention


PREFIX = Exercise(
    name="prefix_attention", reference=altered_prefix(), driver=drive_prefix, minutes=20, difficulty=2, **COMMON,
    bans=("torch.nn.functional.scaled_dot_product_attention",),
    tests=(Test("any text, any prefix", prefix_inputs, points=5, cases=5),),
    hints=("before_k and before_v have no batch dim: every text gets the same. .expand(len(q), -1, -1, -1) makes room without a copy.",
           "rotate(q, positions) with positions = torch.arange(P, P + T); the keys of the text likewise, the prefix's not at all.",
           "The mask is (T, P + T): ones in its first P columns, then a lower triangle. One softmax over all of it."),
    mutants=(Mutant(altered_prefix(rotates_prefix=True), "You rotate the prefix's keys. They are trained as they are used, and stand at no place."),
             Mutant(altered_prefix(begins=False), "The text's places begin at 0; they begin at P, behind the prefix."),
             Mutant(altered_prefix(sees="past"), "The causal mask is drawn as if the prefix were part of the text: a query at t sees all of the prefix, and the text up to t."),
             Mutant(altered_prefix(scaled=False), "The scores are not divided by √D."),
             Mutant(altered_prefix(behind=True), "Prefix and text each have a softmax of their own; here one softmax shares its weight among both. (LLaMA-Adapter has two, and a gate.)"),
             Mutant(altered_prefix(values=False), "The prefix's keys draw weight away from the text, but its values are not added."),
             Mutant(altered_prefix(causal=False), "The text sees its own future.")),
    variants={"from 0": Variant("the text's places begin at 0, as if nothing stood in front.", altered_prefix(begins=False))})


# GatedAdapter

def drive_gate(answer, mix, down, up, xs, target):
    """Put an adapter around a layer, count what it trains, train, and look at the output and the layer."""
    import torch

    layer = torch.nn.Linear(mix.shape[1], mix.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(mix.clone())
    model = answer(layer, down.clone(), up.clone())
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {"at first": model(xs[0]), "numbers trained": sum(p.numel() for p in trained)}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step, x in enumerate(xs):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"after step {step + 1}"] = model(xs[0])
    return found | {"the layer's weight": layer.weight.detach().clone()}


def gate_inputs(draw: Draw) -> tuple:
    width, size = draw.int(4, 6), draw.int(2, 3)
    xs = [draw.tensor(5, width) for _ in range(4)]
    return draw.tensor(width, width) / 2, draw.tensor(size, width), draw.tensor(width, size), xs, draw.tensor(5, width)


def altered_gate(start=0.0, squash="tanh", freezes=True, reads="layer", stream=True, keeps=True, bends=True, up_start=1.0):
    """x + layer(x) + tanh(gate) · up(gelu(down(layer(x)))); with arguments, with something wrong."""
    class GatedAdapter(nn.Module):
        def __init__(self, layer, down, up):
            super().__init__()
            self.layer = layer.requires_grad_(not freezes)
            self.down, self.up, self.gate = nn.Parameter(down), nn.Parameter(up_start * up), nn.Parameter(torch.tensor(start))

        def forward(self, x):
            y = self.layer(x)
            read = {"layer": y, "stream": x, "sum": x + y}[reads]
            hidden = read @ self.down.T
            said = (nn.functional.gelu(hidden) if bends else hidden) @ self.up.T
            open_by = {"tanh": self.gate.tanh(), "none": self.gate, "sigmoid": self.gate.sigmoid()}[squash]
            return (x if stream else 0) + (y if keeps else 0) + open_by * said
    return GatedAdapter


GATE = Exercise(
    name="GatedAdapter", reference=altered_gate(), driver=drive_gate, minutes=15, difficulty=2, **COMMON,
    tests=(Test("at first and in training", gate_inputs, points=5, cases=4),),
    hints=("Three parameters of yours: down (m, C), up (C, m) and one number, the gate. The layer's own are to have requires_grad False.",
           "layer.requires_grad_(False) freezes all of a module. torch.zeros(()) is a gate that is shut.",
           "y = self.layer(x); return x + y + self.gate.tanh() * (gelu(y @ self.down.T) @ self.up.T)."),
    mutants=(Mutant(altered_gate(start=1.0), "At first the block is not what it was: the gate must begin at 0."),
             Mutant(altered_gate(squash="sigmoid"), "sigmoid(0) is a half, so the gate begins half open. tanh(0) is 0."),
             Mutant(altered_gate(squash="none"), "The gate goes through tanh, which keeps it between −1 and 1."),
             Mutant(altered_gate(freezes=False), "The layer is trained, too: the base is not frozen."),
             Mutant(altered_gate(reads="stream"), "Your adapter reads what the layer reads (a parallel adapter); here it reads what the layer returns."),
             Mutant(altered_gate(reads="sum"), "Your adapter comes after the residual's sum; it reads what the layer returns, before x is added."),
             Mutant(altered_gate(stream=False), "The stream x is not added."),
             Mutant(altered_gate(keeps=False), "The layer's own answer is gone; the adapter adds to it."),
             Mutant(altered_gate(bends=False), "Without GELU down and up are one matrix of low rank, and that could be merged: the function between them is the point."),
             Mutant(altered_gate(up_start=0.0), "The gate is shut and up is zero as well, so each waits for the other: neither ever gets a gradient. Use up as it is given.")),
    variants={"after the sum": Variant("the adapter reads the sum x + layer(x), as arXiv:2005.00247 does.", altered_gate(reads="sum"))})

EXERCISES = [LORA, PREFIX, GATE]
