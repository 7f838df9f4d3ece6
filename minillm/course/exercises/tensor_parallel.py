"""Lesson 10's exercises: a linear layer split by columns, one split by rows, and the cross-entropy of split logits, on real ranks."""

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "10", "packages": ("torch", "numpy")}
SUMS = {"rtol": 1e-5, "atol": 1e-5, "why": "float32: the ranks' shares of a sum may be added in another order"}


# column_linear

def drive_columns(answer, rank, x, weight, bias, fused, grads):
    """Run a column-split layer forward and backward; f sums its input's gradient, and what goes through it is counted."""
    import torch
    import torch.distributed as dist

    sent = []

    class F(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            total = grad.contiguous().clone()
            dist.all_reduce(total)
            sent.append(total.numel())
            return total
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in (x, weight, bias))
    out = answer(x, weight, bias, fused, rank, len(grads), F.apply)
    (out * grads[rank]).sum().backward()  # backward(grad) would import sympy, on every rank
    return {"output": out, "gradient of x": x.grad, "gradient of the weight": weight.grad, "gradient of the bias": bias.grad,
            "numbers summed backward": sum(sent)}


def column_inputs(size: int, fused: int):
    def inputs(draw: Draw) -> tuple:
        tokens, width, each = draw.int(2, 4), draw.int(2, 5), draw.int(2, 3)
        out = fused * size * each
        grads = [draw.tensor(tokens, fused * each) for _ in range(size)]
        return draw.tensor(tokens, width), draw.tensor(out, width), draw.tensor(out), fused, grads
    return inputs


def altered_columns(sums=True, whole=False, strided=False, biased=True, behind=False, ordered=True):
    """This rank's columns of each fused matrix; with arguments, with something wrong."""
    def layer(x, weight, bias, fused, rank, size, f):
        def cut(tensor):
            if whole:
                return tensor.chunk(size)[rank]
            if strided:
                return tensor[rank::size]
            parts = [matrix.chunk(size)[rank] for matrix in tensor.chunk(fused)]
            return torch.cat(parts if ordered else parts[::-1])
        y = (f(x) if sums and not behind else x) @ cut(weight).T
        if biased:
            y = y + cut(bias)
        else:
            y = y + 0 * cut(bias)
        return f(y) if behind else y
    return layer


COLUMNS = Exercise(
    name="column_linear", reference=altered_columns(), driver=drive_columns, minutes=12, difficulty=1, **COMMON, **SUMS,
    tests=(Test("one matrix, two ranks", column_inputs(2, 1), points=2, cases=1, ranks=2),
           Test("two fused matrices, three ranks", column_inputs(3, 2), points=3, cases=1, ranks=3)),
    hints=("torch keeps the weight transposed: its rows are the outputs. Which rows are this rank's?",
           "Fused matrices lie one below another. Cut them apart first, take the rank's part of each, and put those together.",
           "weight.chunk(fused), of each .chunk(size)[rank], then torch.cat; the bias likewise. The product is of f(x), not x."),
    mutants=(Mutant(altered_columns(sums=False), "The output is right, but x's gradient is only this rank's share: let x go through f first."),
             Mutant(altered_columns(whole=True), "You cut the fused weight as one block, so that rank 0 gets all of the first matrix. Take each matrix's part."),
             Mutant(altered_columns(strided=True), "You take every size-th output. A rank has neighbouring ones, in each matrix."),
             Mutant(altered_columns(biased=False), "The bias is missing; here each output has one owner, who adds it."),
             Mutant(altered_columns(behind=True), "f stands behind the product. There it would sum gradients of different outputs; it belongs before, at x."),
             Mutant(altered_columns(ordered=False), "The parts of the fused matrices are in another order.")))


# row_linear

def drive_rows(answer, rank, x_parts, weight, bias, grad):
    """Run a row-split layer forward and backward; g sums, and what goes through it is counted."""
    import torch
    import torch.distributed as dist

    sent = []

    class G(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            total = x.contiguous().clone()
            dist.all_reduce(total)
            sent.append(total.numel())
            return total

        @staticmethod
        def backward(ctx, grad):
            return grad
    x_local, weight, bias = (tensor.clone().requires_grad_() for tensor in (x_parts[rank], weight, bias))
    out = answer(x_local, weight, bias, rank, len(x_parts), G.apply)
    (out * grad).sum().backward()
    return {"output": out, "gradient of x_local": x_local.grad, "gradient of the weight": weight.grad,
            "gradient of the bias": bias.grad, "all-reduces": len(sent), "numbers summed": sum(sent)}


def row_inputs(size: int):
    def inputs(draw: Draw) -> tuple:
        tokens, each, out = draw.int(2, 4), draw.int(2, 4), draw.int(2, 5)
        parts = [draw.tensor(tokens, each) for _ in range(size)]
        return parts, draw.tensor(out, size * each), draw.tensor(out), draw.tensor(tokens, out)
    return inputs


def altered_rows(bias_at="once", sums=True, mean=False, strided=False):
    """The sum of all ranks' products, then the bias; with arguments, with something wrong."""
    def layer(x_local, weight, bias, rank, size, g):
        part = weight[:, rank::size] if strided else weight.chunk(size, 1)[rank]
        y = x_local @ part.T
        if bias_at == "every rank":
            y = y + bias
        if bias_at == "shared":
            y = y + bias / size
        if bias_at == "rank 0" and rank == 0:
            y = y + bias
        total = g(y) if sums else y
        if mean:
            total = total / size
        return total + bias if bias_at == "once" else total + 0 * bias
    return layer


ROWS = Exercise(
    name="row_linear", reference=altered_rows(), driver=drive_rows, minutes=10, difficulty=1, **COMMON, **SUMS,
    tests=(Test("two ranks", row_inputs(2), points=3, cases=1, ranks=2), Test("three ranks", row_inputs(3), points=2, cases=1, ranks=3)),
    hints=("x_local are some of the inputs. Which part of the weight, stored as (out, in), do they meet?",
           "The ranks' products are shares of a sum, and g adds them up. Then who adds the bias, and how often?",
           "g(x_local @ weight.chunk(size, 1)[rank].T) + bias."),
    mutants=(Mutant(altered_rows(bias_at="every rank"), "Every rank adds the bias before the sum, so it is counted once for each rank. Add it to the sum."),
             Mutant(altered_rows(bias_at="shared"), "bias / size on every rank sums to the right output, but every rank's bias gets only 1 / size of its gradient."),
             Mutant(altered_rows(bias_at="rank 0"), "With the bias on rank 0 alone the output is right, but the other ranks' copies get no gradient, and drift away."),
             Mutant(altered_rows(bias_at="never"), "The bias is missing."),
             Mutant(altered_rows(sums=False), "That is this rank's share; let it go through g."),
             Mutant(altered_rows(mean=True), "That is the mean of the shares; their sum is the product."),
             Mutant(altered_rows(strided=True), "You take every size-th input; x_local are neighbouring ones.")))


# vocabulary_cross_entropy

def drive_vocabulary(answer, rank, logits, targets, ends):
    """The loss of each token from split logits, the gradient of this rank's part, and how many numbers were sent."""
    import torch
    import torch.distributed as dist

    sent = []

    def all_reduce(x, operation):
        total = x.detach().contiguous().clone()
        dist.all_reduce(total, operation)
        sent.append(total.numel())
        return total

    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return all_reduce(x, dist.ReduceOp.SUM)

        @staticmethod
        def backward(ctx, grad):
            return grad
    first, end = ends[rank], ends[rank + 1]
    mine = logits[:, first:end].clone().requires_grad_()
    loss = answer(mine, targets, first, Add.apply, lambda x: all_reduce(x, dist.ReduceOp.MAX))
    loss.sum().backward()
    return {"loss of each token": loss, "gradient of the logits": mine.grad, "numbers sent": sum(sent)}


def vocabulary_inputs(size: int, scale: float = 2.0):
    def inputs(draw: Draw) -> tuple:
        tokens, ends = draw.int(4, 6), [0]
        for _ in range(size):
            ends.append(ends[-1] + draw.int(2, 5))
        targets = [draw.int(ends[rank], ends[rank + 1] - 1) for rank in range(size)]  # each rank owns at least one
        targets += draw.ints(tokens - size, 0, ends[-1] - 1)
        return draw.tensor(tokens, ends[-1]) * scale, torch.tensor(targets), ends
    return inputs


def altered_vocabulary(shared=True, subtracts=True, masked=True, owned=True, z_added=True, late=True, base=1.0, sign=1):
    """logsumexp over all ranks minus the target's logit; with arguments, with something wrong."""
    def loss(logits, targets, first, add, largest):
        top = logits.detach().amax(-1)
        if shared:
            top = largest(top)
        if not subtracts:
            top = torch.zeros_like(top)
        z = (logits - top[:, None]).exp().sum(-1)
        if late:
            log_z = (add(z) if z_added else z).log()
        else:
            log_z = add(z.log())
        place = targets - first
        here = (place >= 0) & (place < logits.shape[-1])
        inside = place.clamp(0, logits.shape[-1] - 1)
        own = logits.gather(-1, inside[:, None])[:, 0]
        if masked:
            own = own * here
        if owned:
            own = add(own)
        return sign * (log_z + top - own) / base
    return loss


def gathers(logits, targets, first, add, largest):
    width = int(largest(torch.tensor([float(first + logits.shape[-1])])))
    before, behind = first, width - first - logits.shape[-1]
    whole = add(torch.nn.functional.pad(logits, (before, behind)))
    return torch.nn.functional.cross_entropy(whole, targets, reduction="none")


VOCABULARY = Exercise(
    name="vocabulary_cross_entropy", reference=altered_vocabulary(), driver=drive_vocabulary, minutes=20, difficulty=2, **COMMON,
    rtol=1e-4, atol=1e-4, why="float32: logits of size 300 leave 5 digits behind the point, and exp and log lose one",
    tests=(Test("two ranks", vocabulary_inputs(2), points=3, cases=1, ranks=2),
           Test("three ranks, logits of size 100", vocabulary_inputs(3, 100.0), points=3, cases=1, ranks=3)),
    hints=("-ln p is log Σ exp(logits) minus the target's logit. The first is a sum over ranks; the second is known to one rank only.",
           "Subtract the largest logit before exp, else it overflows; it must be the same number on all ranks. Keep it out of the gradient.",
           "top = largest(logits.detach().amax(-1)); log_z = add(exp(logits - top) summed).log() + top. The target's logit: gather where "
           "first <= target < first + V_local, 0 elsewhere, and add()."),
    mutants=(Mutant(altered_vocabulary(shared=False), "Each rank subtracts its own maximum, so the sums that are added are in different units. Share the maximum first."),
             Mutant(altered_vocabulary(subtracts=False), "exp of a large logit is infinite: subtract the largest one first, and add it again after the log."),
             Mutant(altered_vocabulary(masked=False), "Ranks that do not own the target add some other logit: let them add 0."),
             Mutant(altered_vocabulary(owned=False), "Only the owner knows the target's logit, and the loss must be the same everywhere: add() it."),
             Mutant(altered_vocabulary(masked=False, owned=False), "Every rank takes a logit of its own for the target's: only the owner's counts, and add() brings it to the others."),
             Mutant(altered_vocabulary(z_added=False), "The softmax runs over this rank's tokens only: add() the sums of exp before the log."),
             Mutant(altered_vocabulary(late=False), "The logarithms are added; add the sums, then take the logarithm."),
             Mutant(altered_vocabulary(sign=-1), "The sign is wrong: a loss is -ln p, and never below 0."),
             Mutant(gathers, "Right, but all logits are sent: 3 numbers a token are enough.")),
    variants={"bits": Variant("the loss is asked for in bits, not nats.", altered_vocabulary(base=0.6931471805599453))})

EXERCISES = [COLUMNS, ROWS, VOCABULARY]
