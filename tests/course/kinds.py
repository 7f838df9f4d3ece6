"""Small exercises of the kinds that lesson 01 does not have: a layer, a hook, an optimizer's step, a function on ranks.

They show what later lessons will do, and are loaded as an instructor's own file would be.
"""

from minillm.course.exercise import Exercise, Mutant, Test

COMMON = {"lesson": "99", "minutes": 5, "hints": ("Think.",), "why": "float32 rounds to 7 digits; sums in another order", "rtol": 1e-5, "atol": 1e-6}


# a layer inside a model

def drive_layer(answer, x, weight):
    import torch
    layer = answer(weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = torch.nn.Sequential(torch.nn.Identity(), layer)
    x = x.requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"output": y, "gradient of x": x.grad, "gradient of the weight": layer.weight.grad}


def scale_layer(width):
    import torch

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x * self.weight
    return Scale()


def scale_without_gradient(width):
    layer = scale_layer(width)
    layer.forward = lambda x: x * layer.weight.detach() + 0 * layer.weight
    return layer


# a gradient hook

def drive_hook(answer, x):
    import torch
    weight = torch.ones(x.shape[-1], requires_grad=True)
    answer(weight)
    (x * weight).sum().backward()
    return weight.grad


def clip_hook(weight):
    weight.register_hook(lambda grad: grad.clamp(-1, 1))


def clip_one_side(weight):
    weight.register_hook(lambda grad: grad.clamp(max=1))


# an optimizer's step

def drive_step(answer, weights, grads, rate):
    import torch
    state = {}
    for grad in grads:
        weights = answer(weights, grad, state, rate)
    return weights if isinstance(weights, torch.Tensor) else None


def momentum_step(weights, grad, state, rate):
    state["v"] = 0.9 * state.get("v", 0) + grad
    return weights - rate * state["v"]


# on ranks

def drive_ranks(answer, rank, parts):
    return answer(parts[rank])


def mean_of_all(part):
    import torch.distributed as dist
    total = part.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sum_of_all(part):
    import torch.distributed as dist
    total = part.clone()
    dist.all_reduce(total)
    return total


EXERCISES = [
    Exercise(name="scale_layer", reference=scale_layer, driver=drive_layer, **COMMON,
             tests=(Test("in a model", lambda d: (d.tensor(d.int(2, 4), width := d.int(2, 6)), d.tensor(width))),),
             mutants=(Mutant(scale_without_gradient, "The weight gets no gradient."),)),
    Exercise(name="clip_hook", reference=clip_hook, driver=drive_hook, **COMMON,
             tests=(Test("gradients", lambda d: (d.tensor(9, d.int(3, 6)),)),),
             mutants=(Mutant(clip_one_side, "Only one side is clipped."),)),
    Exercise(name="momentum_step", reference=momentum_step, driver=drive_step, **COMMON,
             tests=(Test("three steps", lambda d: (d.tensor(5), [d.tensor(5) for _ in range(3)], 0.1)),),
             mutants=(Mutant(lambda w, g, s, r: w - r * g, "The velocity is forgotten between steps."),)),
    Exercise(name="mean_of_all", reference=mean_of_all, driver=drive_ranks, **COMMON,
             tests=(Test("two ranks", lambda d: ([d.tensor(3) for _ in range(2)],), ranks=2, cases=1),
                    Test("four ranks", lambda d: ([d.tensor(3) for _ in range(4)],), ranks=4, cases=2)),
             mutants=(Mutant(sum_of_all, "That is the sum; divide by the number of ranks."),)),
]
