"""Lesson 05's exercises: the loss, AdamW, the schedule, FLOPs, a compute-optimal size, and the arithmetic of articles."""

import math

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "05", "packages": ("torch", "numpy", "einops")}
FLOAT = {"rtol": 1e-4, "atol": 1e-5, "why": "float32: the same sums in another order, of numbers of size 1"}
DOUBLE = {"rtol": 1e-9, "atol": 1e-12, "why": "Python's floats, in another order of operations"}


# next_token_loss

def altered_loss(shift=1, both="both", divide="count", safe=True, exact=True, sign=-1.0, bits=False):
    """The loss; with arguments, with something wrong."""
    def loss(logits, ids, real):
        by_hand = logits.exp() / logits.exp().sum(-1, keepdim=True)
        log_p = {True: logits.log_softmax(-1), "late": logits.softmax(-1).log(), False: by_hand.log()}[safe]
        log_p = log_p if exact else logits
        if shift == 0:
            said, counts = log_p.gather(-1, ids[..., None])[..., 0], real
        elif shift == 1:
            said = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            counts = real[:, 1:] & real[:, :-1] if both == "both" else real[:, :-1] if both == "before" else real[:, 1:]
        else:
            said, counts = log_p[:, 1:].gather(-1, ids[:, :-1, None])[..., 0], real[:, 1:] & real[:, :-1]
        total = sign * (said * counts).sum() / (math.log(2) if bits else 1)
        if divide == "all":
            return total / counts.numel()
        if divide == "rows":
            return (sign * (said * counts).sum(-1) / counts.sum(-1)).mean()
        return total if divide == "nothing" else total / counts.sum()
    return loss


def padding_counts(logits, ids, real):
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()


def loss_inputs(draw: Draw, size: float = 2.0) -> tuple:
    rows, length, vocab = draw.int(2, 4), draw.int(5, 8), draw.int(5, 9)
    ids = torch.tensor([draw.ints(length, 0, vocab - 1) for _ in range(rows)])
    real = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):  # padding at the end, of another length in each row, and before the last row's text
        real[row, length - row:] = False
    real[-1, :2] = False
    return size * draw.tensor(rows, length, vocab), ids, real


EXACT = "exp of a large logit is infinite, and so is the logarithm of a probability that was rounded to 0: take log_softmax at once."
LOSS = Exercise(
    name="next_token_loss", reference=altered_loss(), minutes=12, difficulty=1, **COMMON, **FLOAT,
    bans=("torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss", "torch.nn.CrossEntropyLoss", "torch.nn.NLLLoss"),
    tests=(Test("texts of several lengths", loss_inputs, points=3),
           Test("large logits", lambda draw: loss_inputs(draw, 90.0), points=1)),
    hints=("The logits at place t are about the token at t + 1: which places have no target?",
           "log_softmax, then pick the target's entry with gather. A target counts if it and the token before it are real.",
           "Sum over all that count, in all rows, divided by how many they are: not a mean of the rows' means."),
    mutants=(Mutant(altered_loss(shift=0), "The labels are not shifted: each place is asked for the token it has just read, which a model copies at once."),
             Mutant(altered_loss(shift=-1), "The labels are shifted the wrong way: each place is asked for the token before it."),
             Mutant(padding_counts, "The mean runs over padding too."),
             Mutant(altered_loss(divide="all"), "The sum leaves padding out, but the divisor counts it."),
             Mutant(altered_loss(divide="rows"), "That is a mean of the rows' means: a short text's tokens weigh more. Divide the sum of all by the count of all."),
             Mutant(altered_loss(divide="nothing"), "That is the sum; the mean is asked for."),
             Mutant(altered_loss(both="before"), "The first padding after each text is counted as a target."),
             Mutant(altered_loss(both="after"), "The first token after padding is counted, though the padding before it cannot predict it."),
             Mutant(altered_loss(safe=False), EXACT),
             Mutant(altered_loss(safe="late"), EXACT),
             Mutant(altered_loss(exact=False), "These are logits; take log_softmax first."),
             Mutant(altered_loss(sign=1.0), "The sign: a loss is the negative log-probability.")),
    variants={"bits": Variant("the loss is asked for in bits, not nats.", altered_loss(bits=True))})


# adamw_step

def drive_adamw(answer, weights, steps, lr, betas, eps, decay):
    """Some steps from an empty state: the weights after each."""
    state, found, owned = {}, [], dict(weights)
    for grads in steps:
        answer(weights, grads, state, lr, betas, eps, decay)
        found.append({name: w.clone() for name, w in owned.items()})
    return {f"weights after step {number}": w for number, w in enumerate(found, start=1)}


def altered_adamw(correct=True, vectors=False, coupled=False, inside=False, scaled=True, swapped=False, first=1, squares=True, decays=True, counts="steps", in_place=True):
    """AdamW; with arguments, with something wrong."""
    def step(weights, grads, state, lr, betas, eps, decay):
        state["step"] = state.get("step", first - 1) + (1 if counts == "steps" else 0)
        b1, b2 = betas[::-1] if swapped else betas
        for name, w in weights.items():
            g = grads[name]
            state["step"] += 1 if counts == "tensors" else 0
            w = w if in_place else w.clone()
            matrix = (w.ndim >= 2 or vectors) and decays
            if matrix and coupled:
                g = g + decay * w
            elif matrix:
                w.mul_(1 - (lr if scaled else 1) * decay)
            m, v = state.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g * g if squares else g.abs())
            state[name] = m, v
            t = state["step"]
            m_hat, v_hat = (m / (1 - b1 ** t), v / (1 - b2 ** t)) if correct else (m, v)
            w.sub_(lr * m_hat / ((v_hat + eps).sqrt() if inside else v_hat.sqrt() + eps))
            weights[name] = w
    return step


def adamw_inputs(draw: Draw) -> tuple:
    shapes = {"matrix": (draw.int(2, 4), draw.int(2, 4)), "norm": (draw.int(3, 5),)}
    weights = {name: draw.tensor(*shape) + 1 for name, shape in shapes.items()}
    steps = [{name: draw.tensor(*shape) for name, shape in shapes.items()} for _ in range(4)]
    betas = (0.1 * draw.int(7, 9), 0.9 + 0.01 * draw.int(2, 8))
    return weights, steps, 0.01 * draw.int(2, 5), betas, 10.0 ** -draw.int(2, 3), 0.1 * draw.int(2, 5)


ADAMW = Exercise(
    name="adamw_step", reference=altered_adamw(), driver=drive_adamw, minutes=20, difficulty=2, **COMMON, **FLOAT,
    bans=("torch.optim.AdamW", "torch.optim.Adam"),
    tests=(Test("four steps", adamw_inputs, points=4),),
    hints=("`state` is empty at the first step and is yours: keep the number of steps in it, and two averages a weight, zeros at first.",
           "Both averages start at 0 and so are too small at first: divide by 1 − beta^t, with t = 1 at the first step.",
           "w ← w · (1 − lr · decay) for matrices; m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²; w ← w − lr · m̂ / (√v̂ + eps)."),
    mutants=(Mutant(altered_adamw(correct=False), "The bias correction is missing: the averages start at 0 and are too small in the first steps."),
             Mutant(altered_adamw(vectors=True), "Norms decay, too: weights of one dimension rest at 1 or wherever they are needed, not at 0. Decay matrices only."),
             Mutant(altered_adamw(coupled=True), "The decay goes through the gradient and its averages: that is Adam with L2. In AdamW it is decoupled."),
             Mutant(altered_adamw(scaled=False), "The decay is not multiplied by the learning rate."),
             Mutant(altered_adamw(decays=False), "Nothing decays: that is Adam."),
             Mutant(altered_adamw(inside=True), "eps is added after the root, not under it."),
             Mutant(altered_adamw(swapped=True), "The betas are swapped: the first is the mean's, the second that of the squares."),
             Mutant(altered_adamw(first=2), "The steps are counted from 2: at the first, divide by 1 − beta¹."),
             Mutant(altered_adamw(counts="tensors"), "The step is counted once for every weight; it is one number for the whole step."),
             Mutant(altered_adamw(in_place=False), "The dict gets new tensors; change those that are in it, in place: the model holds on to them."),
             Mutant(altered_adamw(squares=False), "The second average is of g², not of |g|.")),
    variants={"all": Variant("vectors decay as matrices do.", altered_adamw(vectors=True))})


# schedule

def drive_schedule(answer, peak, warmup, total, floor):
    """The rate of every step of a run, and of two beyond it."""
    return [float(answer(step, peak, warmup, total, floor)) for step in range(total + 2)]


def altered_schedule(from_zero=False, whole=False, late=False, absolute=False, to_zero=False, line=False, back=False):
    """The schedule; with arguments, with something wrong."""
    def rate(step, peak, warmup, total, floor):
        if step < warmup:
            return peak * (step + (0 if from_zero else 1)) / warmup
        low = 0.0 if to_zero else floor if absolute else peak * floor
        begin, end = (0 if whole else warmup), (total if late else total - 1)
        done = (step - begin) / max(1, end - begin)
        done = done if back else min(1.0, done)
        height = 1 - done if line else (1 + math.cos(math.pi * done)) / 2
        return low + (peak - low) * height
    return rate


def schedule_inputs(draw: Draw) -> tuple:
    warmup = draw.int(2, 6)
    return 10.0 ** -draw.int(2, 4) * draw.int(1, 9), warmup, warmup + draw.int(6, 15), 0.05 * draw.int(1, 6)


SCHEDULE = Exercise(
    name="schedule", reference=altered_schedule(), driver=drive_schedule, minutes=12, difficulty=1, **COMMON, **DOUBLE,
    tests=(Test("whole runs", schedule_inputs, points=3),),
    hints=("Steps count from 0. The first takes 1/warmup of the peak, and step warmup − 1 takes all of it.",
           "After that, how far is the way from step `warmup` (nothing done) to step total − 1 (all done)?",
           "low + (peak − low) · (1 + cos(π · done)) / 2, with low = peak · floor and done held to at most 1."),
    mutants=(Mutant(altered_schedule(from_zero=True), "The warm-up is off by one: step 0 has the rate 0, and nothing is learned from the first batch."),
             Mutant(altered_schedule(whole=True), "The cosine starts at step 0, so the rate jumps down where the warm-up ends. It starts at step `warmup`."),
             Mutant(altered_schedule(late=True), "The end is off by one: the last step, total − 1, must have the lowest rate."),
             Mutant(altered_schedule(absolute=True), "floor is a fraction of the peak, not a rate."),
             Mutant(altered_schedule(to_zero=True), "The rate falls to 0; it should end at peak · floor."),
             Mutant(altered_schedule(line=True), "That falls in a straight line; half a cosine is asked for."),
             Mutant(altered_schedule(back=True), "After the last step the cosine rises again: hold it at the lowest rate.")),
    variants={"linear": Variant("after the warm-up the rate falls in a straight line.", altered_schedule(line=True))})


# flops

def altered_flops(two=2, times=3, scores=4, kv=True, matrices=3, embedding=False, head=True, square=False):
    """Training FLOPs; with arguments, with something wrong."""
    def count(layers, width, heads, kv_heads, head_dim, ffn_width, vocab, tokens):
        keys = kv_heads if kv else heads
        head_dim = width // heads if square else head_dim
        attention = width * head_dim * (2 * heads + 2 * keys)
        weights = layers * (attention + matrices * width * ffn_width) + (vocab * width if head else 0) + (vocab * width if embedding else 0)
        forward = two * weights * tokens + scores * layers * tokens * tokens * heads * head_dim
        return times * forward
    return count


def flops_inputs(draw: Draw) -> tuple:
    kv_heads, head_dim = draw.int(2, 8), 2 ** draw.int(4, 7)
    heads = kv_heads * draw.int(2, 4)
    return draw.int(2, 90), draw.int(4, 90) * 64, heads, kv_heads, head_dim, draw.int(4, 300) * 64, 1000 * draw.int(8, 256), 128 * draw.int(2, 64)


FLOPS = Exercise(
    name="flops", reference=altered_flops(), minutes=15, difficulty=2, **COMMON, rtol=1e-12, why="a float has 15 digits, these counts have up to 21",
    tests=(Test("any model", flops_inputs, points=3),),
    hints=("A product of a vector with a matrix of n weights is n multiplications and n additions.",
           "Queries and output have H · D columns, keys and values G · D. The scores are T · T · D for each query head, and the values as many again.",
           "Backward computes two products for each of forward: one for the weights' gradient, one for the input's."),
    mutants=(Mutant(altered_flops(two=1, scores=2), "Each weight costs a multiplication and an addition: 2 operations."),
             Mutant(altered_flops(times=1), "That is the forward pass; backward costs two more of it."),
             Mutant(altered_flops(times=2), "Backward costs twice the forward pass: the weights' gradients and the inputs'."),
             Mutant(altered_flops(scores=0), "The scores and the weighted sum of values are missing: they have no weights, but they are products."),
             Mutant(altered_flops(scores=2), "Attention counts half: two products have the size T · T, queries with keys and weights with values, and the whole square counts."),
             Mutant(altered_flops(kv=False), "Keys and values are projected to G heads, not H."),
             Mutant(altered_flops(square=True), "H · D need not be the width: take head_dim as it is given."),
             Mutant(altered_flops(matrices=2), "A gated feed-forward layer has three matrices."),
             Mutant(altered_flops(embedding=True), "The embedding is a lookup: no product."),
             Mutant(altered_flops(head=False), "The output head is a product with V · C weights.")),
    variants={"forward": Variant("only the forward pass is asked for.", altered_flops(times=1))})


# compute_optimal

def altered_optimum(six=6, swapped=False, ratio=True, equal=False, inverted=False, tokens_first=False, rest=None):
    """The optimum of A/N^alpha + B/D^beta under 6ND = budget; with arguments, with something wrong."""
    def optimum(budget, A, alpha, B, beta):
        scale = (alpha * A / (beta * B)) if ratio else A / B
        scale = (1 / scale if inverted else scale) ** (1 / (alpha + beta))
        share = 0.5 if equal else (alpha if swapped else beta) / (alpha + beta)
        parameters = scale * (budget / six) ** share
        tokens = budget / (rest or six) / parameters
        return [tokens, parameters] if tokens_first else [parameters, tokens]
    return optimum


def optimum_inputs(draw: Draw) -> tuple:
    return 10.0 ** draw.int(18, 25), 100 + draw.random() * 500, 0.25 + draw.random() / 5, 100 + draw.random() * 500, 0.25 + draw.random() / 5


OPTIMUM = Exercise(
    name="compute_optimal", reference=altered_optimum(), minutes=15, difficulty=3, **COMMON, rtol=1e-3,
    why="a closed form is exact; a search by halving or a fine grid may stop at a thousandth",
    tests=(Test("any law", optimum_inputs, points=3, cases=6),),
    hints=("D is no free choice: the budget fixes it at D = budget / (6N). So the loss is a function of N alone.",
           "Where its derivative is 0, αA / N^α = βB / D^β: both terms, weighted by their exponents, are equal.",
           "N = (αA / βB)^(1/(α+β)) · (budget / 6)^(β/(α+β))."),
    mutants=(Mutant(altered_optimum(six=1), "The budget buys 6ND operations, not ND."),
             Mutant(altered_optimum(six=2), "2ND is the forward pass; training costs 6ND."),
             Mutant(altered_optimum(swapped=True), "The exponents are swapped: N grows with the budget to the power β/(α+β)."),
             Mutant(altered_optimum(ratio=False), "The derivative brings the exponents down: αA against βB."),
             Mutant(altered_optimum(inverted=True), "The fraction is upside down: a larger A asks for more parameters."),
             Mutant(altered_optimum(tokens_first=True), "N and D are swapped: the parameters come first."),
             Mutant(altered_optimum(rest=1), "N is right; but 6ND is the budget, so D = budget / (6N)."),
             Mutant(altered_optimum(equal=True), "Half of the exponent each is right only when α = β.")))


# check_the_article

def altered_article(states=16, unit=1e9, stored=None, six=6, hours=24, whole=True, rounds=math.ceil, percent=1):
    """What an article's numbers imply; with arguments, with something wrong."""
    def verdict(parameters, tokens, gpu_gb, gpus, peak, days):
        memory = states * parameters / unit
        least = (memory if stored is None else stored * parameters / unit) / gpu_gb
        used = six * parameters * tokens / (gpus * peak * days * hours * 3600)
        return {"states_gb": memory, "least_gpus": rounds(least) if whole else least, "utilisation": percent * used}
    return verdict


def article_inputs(draw: Draw) -> tuple:
    gpu_gb = draw.int(2, 20) * 8
    parameters = draw.int(2, 300) * 1e9 if draw.random() < 0.7 else gpu_gb * draw.int(3, 20) / 16 * 1e9  # then they fit exactly
    return parameters, draw.int(100, 2000) * 1e9, gpu_gb, draw.int(100, 10_000), draw.int(100, 1000) * 1e12, draw.int(10, 60)


ARTICLE = Exercise(
    name="check_the_article", reference=altered_article(), minutes=15, difficulty=1, **COMMON, **DOUBLE,
    tests=(Test("any article", article_inputs, points=3, cases=8),),
    hints=("Mixed precision with AdamW keeps 2 + 2 + 4 + 4 + 4 bytes a parameter: weight, gradient, master copy, two averages.",
           "Gigabytes here are 10⁹ bytes on both sides. GPUs come whole.",
           "What was needed, 6ND, over what the GPUs could have done at their peak in all those seconds."),
    mutants=(Mutant(altered_article(states=14), "14 bytes: the gradients are forgotten, as in the article about GPT-1."),
             Mutant(altered_article(states=18), "That is 18 bytes a parameter, with gradients in float32; 16 is asked for."),
             Mutant(altered_article(unit=2 ** 30), "GPUs are sold by 10⁹ bytes here; you divide by 2³⁰ on one side only."),
             Mutant(altered_article(stored=2), "The weights alone fit on those; training needs the optimizer's states too."),
             Mutant(altered_article(six=2), "2ND is reading the tokens; training on them is 6ND."),
             Mutant(altered_article(hours=1), "A day has 24 hours of 3,600 seconds."),
             Mutant(altered_article(whole=False), "GPUs come whole: round up."),
             Mutant(altered_article(states=12), "12 bytes: which of 2 + 2 + 4 + 4 + 4 is missing?"),
             Mutant(altered_article(percent=100), "The utilisation is asked for as a share, 0.4, and not in percent."),
             Mutant(altered_article(rounds=lambda x: int(x) + 1), "One too many where they fit exactly: int(x) + 1 is no rounding up."),
             Mutant(altered_article(rounds=round), "Rounded to the nearest; the last bytes need a place too: round up."),
             Mutant(altered_article(rounds=math.floor), "Rounded down, the last bytes have no place: round up.")),
    variants={"float": Variant("gradients are kept in float32, so 18 bytes a parameter.", altered_article(states=18))})

EXERCISES = [LOSS, ADAMW, SCHEDULE, FLOPS, OPTIMUM, ARTICLE]
