"""Lesson 06's exercises: rounding to bf16, a step with a loss scale, and a step on master weights."""

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "06", "packages": ("torch", "numpy")}


# round_to_bf16

def round_to_bf16(x):
    pattern = x.view(torch.int32)
    odd = (pattern >> 16) & 1
    return ((pattern + 0x7FFF + odd) & ~0xFFFF).view(torch.float32)


def bits_with(add: int, low: int = 16):
    def wrong(x):
        return ((x.view(torch.int32) + add) & ~((1 << low) - 1)).view(torch.float32)
    return wrong


def to_odd(x):
    pattern = x.view(torch.int32)
    return ((pattern + 0x7FFF + (1 - ((pattern >> 16) & 1))) & ~0xFFFF).view(torch.float32)


def fixed_steps(x):
    return torch.round(x * 128) / 128


def like_fp16(x):
    pattern = x.view(torch.int32)
    return ((pattern + 0xFFF + ((pattern >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def numbers(draw: Draw) -> tuple:
    shape = draw.int(2, 4), draw.int(3, 6)
    return (draw.tensor(*shape) * 10.0 ** draw.int(-20, 20),)


def ties(draw: Draw) -> tuple:
    """Numbers exactly between two of bf16, both with an even and an odd neighbour below, of both signs."""
    steps = torch.tensor(draw.ints(8, 128, 255), dtype=torch.float32)
    return ((steps + 0.5) * torch.tensor([1.0, -1.0]).repeat(4) * 2.0 ** draw.int(-30, 30),)


ROUND = Exercise(
    name="round_to_bf16", reference=round_to_bf16, minutes=20, difficulty=2, **COMMON, bans=("torch.bfloat16", "torch.Tensor.bfloat16"),
    tests=(Test("any numbers", numbers, points=2, cases=6), Test("ties", ties, points=2, cases=6)),
    hints=("bf16 is the upper half of a float32: sign, eight bits of exponent, seven of mantissa. x.view(torch.int32) shows all 32 as one "
           "whole number, and .view(torch.float32) leads back.",
           "Adding to the whole number, before the lower half is cleared, carries into the upper half when the lower is large enough.",
           "Add 0x7FFF, and 1 more where bit 16 is set (the tie goes to the even one); then & ~0xFFFF."),
    mutants=(Mutant(bits_with(0x7FFF), "Ties go towards 0 here; they go to the neighbour whose last bit is 0."),
             Mutant(bits_with(0), "The lower half is cut off; that rounds towards 0. Round to the nearest."),
             Mutant(bits_with(0x8000), "Ties go away from 0 here; they go to the neighbour whose last bit is 0."),
             Mutant(bits_with(0xFFFF), "Everything between two numbers is rounded up in size. Round to the nearest."),
             Mutant(to_odd, "Ties go to the odd neighbour; they go to the even one."),
             Mutant(fixed_steps, "The step between neighbours is not 1/128 everywhere: it doubles with each power of two."),
             Mutant(like_fp16, "That keeps 10 bits of mantissa, as fp16 does; bf16 keeps 7.")),
    variants={"truncate": Variant("numbers are rounded towards 0, as the first TPUs' tools did.", bits_with(0))})


# fp16_step

def drive_scaled(answer, steps, weights, targets, lr, scale, interval, max_norm):
    """A linear layer whose product runs in fp16, trained with the student's step. After each: the state and the weights."""
    import torch

    shift, weights = torch.zeros(targets.shape[1], requires_grad=True), weights.clone().requires_grad_()
    optimizer = torch.optim.SGD([shift, weights], lr=lr, momentum=0.9)
    state, found = {"scale": scale, "good_steps": 0}, {}
    for number, x in enumerate(steps, start=1):
        guess = x.half() @ weights.half()
        loss = (guess.float() + shift - targets).square().mean()
        updated = answer(loss, [shift, weights], optimizer, state, interval, max_norm)
        found[f"step {number}"] = {"returned": updated, "scale": float(state["scale"]), "good steps": int(state["good_steps"]),
                                   "weights": weights.detach().clone(), "shift": shift.detach().clone()}
    return found


def altered_step(clip_first=False, unscaled=True, grows=True, skips=True, resets=True, clears="always", after=0, shrinks=True, clips=True,
                 up=2.0, looks="everywhere", says=True):
    """One step with a loss scale; with arguments, with something wrong."""
    def step(loss, weights, optimizer, state, interval, max_norm):
        (loss * state["scale"]).backward()
        if clip_first:
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        for w in weights if unscaled else ():
            w.grad /= state["scale"]
        where = weights[:1] if looks == "first" else weights
        finite = not any(bool((w.grad.isnan() if looks == "nan" else ~w.grad.isfinite()).any()) for w in where)
        if clips and not clip_first and finite:
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        if finite or not skips:
            optimizer.step()
        if finite:
            state["good_steps"] += 1
            if grows and state["good_steps"] == interval + after:
                state["scale"], state["good_steps"] = state["scale"] * up, 0
        else:
            state["scale"] = state["scale"] / 2 if shrinks else state["scale"]
            state["good_steps"] = 0 if resets else state["good_steps"]
        if clears == "always" or (clears == "good" and finite):
            optimizer.zero_grad()
        return finite if says else None
    return step


def scaled_inputs(draw: Draw, overflow: bool) -> tuple:
    size, outs = draw.int(3, 5), draw.int(2, 3)
    steps = [draw.tensor(4, size) for _ in range(9)]
    if overflow:  # forward it fits; backward the weights' gradient, and only that, is beyond 65,504
        for place in (draw.int(1, 3), draw.int(5, 6)):
            steps[place] = steps[place] * 40
    scale = 2.0 ** (draw.int(9, 10) if overflow else draw.int(3, 6))
    max_norm = 0.05 * draw.int(3, 8) if overflow else 10.0  # 10 is never reached
    return steps, draw.tensor(size, outs) / 4, draw.tensor(4, outs), 0.01 * draw.int(1, 4), scale, draw.int(2, 3), max_norm


STALE = "Clear the gradients after every step, a skipped one too: the next adds to what is left, which is scaled otherwise or infinite."
MISSED = "You let an infinite gradient through: look at every gradient, not only the first, and for inf as well as NaN."
SCALED = Exercise(
    name="fp16_step", reference=altered_step(), driver=drive_scaled, minutes=25, difficulty=2, **COMMON, rtol=1e-4, atol=1e-6,
    why="float32: a gradient may be divided, or multiplied by the inverse",
    tests=(Test("gradients that fit", lambda draw: scaled_inputs(draw, False), points=3), Test("gradients that overflow", lambda draw: scaled_inputs(draw, True), points=3)),
    hints=("The order: scale the loss, backward, unscale, look whether all is finite, clip, step, move the scale, clear the gradients.",
           "A step that is skipped changes no weight and no moment: do not call optimizer.step(). It halves the scale, and the count of good steps begins anew.",
           "After `interval` good steps in a row the scale doubles and the count is 0 again."),
    mutants=(Mutant(altered_step(clip_first=True), "You clip before unscaling: the norm that is held to max_norm is scale times too large, so nearly nothing is left after dividing."),
             Mutant(altered_step(unscaled=False), "The gradients are never divided by the scale, so each step is scale times too long (or clipped to the full norm)."),
             Mutant(altered_step(grows=False), "The scale never grows: after `interval` good steps it doubles."),
             Mutant(altered_step(skips=False), "The optimizer steps although a gradient is inf: that destroys the weights for good."),
             Mutant(altered_step(looks="nan"), MISSED),
             Mutant(altered_step(looks="first"), MISSED),
             Mutant(altered_step(resets=False), "A bad step must set the count of good steps back to 0: they count in a row."),
             Mutant(altered_step(clears="never"), STALE),
             Mutant(altered_step(clears="good"), STALE),
             Mutant(altered_step(after=1), "The scale grows one step late: at the interval-th good step."),
             Mutant(altered_step(shrinks=False), "A step that overflows must halve the scale, or the next one overflows too."),
             Mutant(altered_step(clips=False), "Nothing is clipped to max_norm."),
             Mutant(altered_step(says=False), "Return True or False: whether the weights were updated.")),
    variants={"four": Variant("the scale grows fourfold, not twofold; it still halves.", altered_step(up=4.0))})


# master_step

def drive_master(answer, weight, steps, lr, beta, scale):
    """Steps on one tensor: what the weight, the copy and the average are in the end."""
    import torch

    weight = weight.half()
    state = {"master": weight.float(), "average": torch.zeros_like(weight, dtype=torch.float32)}
    for grad in steps:
        answer(weight, (grad * scale).half(), state, lr, beta, scale)
    return [weight.float(), state["master"], state["average"]]


def altered_master(unscale="wide", copy_back=True, reread=False, on_weight=False, divide=True, narrow=False, keeps=True, fresh=True):
    """A step on the master copy; with arguments, with something wrong."""
    def step(weight, grad, state, lr, beta, scale):
        gradient = grad.float() / scale if unscale == "wide" else (grad / scale).float()
        gradient = gradient if divide else grad.float()
        average = (beta * state["average"] if keeps else 0) + ((1 - beta) if fresh and keeps else 1) * gradient
        state["average"] = average.half().float() if narrow else average
        if on_weight:
            weight.sub_((lr * state["average"]).half())
            state["master"] = weight.float()
            return
        state["master"] = (weight.float() if reread else state["master"]) - lr * state["average"]
        if copy_back:
            weight.copy_(state["master"])
    return step


def master_inputs(draw: Draw, size: float) -> tuple:
    shape = draw.int(2, 3), draw.int(3, 5)
    weight = 1 + draw.tensor(*shape).abs()
    one = draw.tensor(*shape) * size  # the same direction each time, so that small steps add up
    steps = [one * (1 + 0.1 * n) for n in range(8)]
    return weight, steps, 0.02 * draw.int(1, 3), 0.1 * draw.int(5, 9), 2.0 ** draw.int(10, 12)


MASTER = Exercise(
    name="master_step", reference=altered_master(), driver=drive_master, minutes=15, difficulty=2, **COMMON, rtol=2e-6, atol=1e-11,
    why="float32 in another order of operations; the smallest gradients are 1e-7",
    tests=(Test("large gradients", lambda draw: master_inputs(draw, 1.0), points=1), Test("small gradients", lambda draw: master_inputs(draw, 1e-3), points=2),
           Test("gradients below fp16's range", lambda draw: master_inputs(draw, 1e-7), points=2)),
    hints=("Everything but `weight` and `grad` is float32. What must be done before the division by the scale?",
           "The average and the step are on the float32 copy, which remembers what the 16-bit weight cannot show yet.",
           "gradient = grad.float() / scale; update state[\"average\"]; state[\"master\"] -= lr * average; weight.copy_(master)."),
    mutants=(Mutant(altered_master(unscale="narrow"), "You divide by the scale in fp16: there the gradient underflows again. Make it float32 first."),
             Mutant(altered_master(divide=False), "The gradient is never divided by the scale."),
             Mutant(altered_master(copy_back=False), "The 16-bit weight never changes: copy the new master into it, in place."),
             Mutant(altered_master(reread=True), "You start from the 16-bit weight each time: what it could not hold of the last step is lost. Start from the master."),
             Mutant(altered_master(on_weight=True), "The step is made on the 16-bit weight, where small steps round to nothing; make it on the master, and round that."),
             Mutant(altered_master(keeps=False), "The gradient itself is the step; it should be the running mean of all so far."),
             Mutant(altered_master(fresh=False), "The gradient enters the mean whole; it counts (1 − β)."),
             Mutant(altered_master(narrow=True), "The average is kept in 16 bits; small gradients vanish from it.")))

EXERCISES = [ROUND, SCALED, MASTER]
