"""Lesson 09's exercises: a loss that ranks can share, gradient hooks, and buckets, on real ranks."""

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "09", "packages": ("torch", "numpy")}
SUMS = {"rtol": 1e-5, "atol": 1e-5, "why": "float32: the ranks' numbers may be added in another order"}


# share_of_loss

def drive_share(answer, rank, features, targets, real, weights):
    """Each rank's loss, and the sum of the gradients that come of them."""
    import torch
    import torch.distributed as dist

    def total(x):
        x = torch.as_tensor(x).detach().clone()
        dist.all_reduce(x)
        return x
    weights = weights.clone().requires_grad_()
    losses = (features[rank] @ weights - targets[rank]).square()
    loss = answer(losses, real[rank], total)
    loss.backward()
    dist.all_reduce(weights.grad)
    return {"loss": loss.detach().clone(), "gradient after the sum": weights.grad}


def altered_share(own=False, ranks=0.0, divides=True, padding=False, average=False):
    """This rank's part of the mean loss; with arguments, with something wrong."""
    def part_of_mean(losses, real, total):
        counted = torch.ones_like(real) if padding else real
        mine = counted.sum().float()
        everyones = total(mine)
        summed = (losses * counted).sum()
        if own:
            summed = summed / mine.clamp(min=1)
        elif divides:
            summed = summed / everyones
        if ranks or average:
            summed = summed * total(torch.ones(())) ** (1.0 if average else ranks)
        return summed
    return part_of_mean


def ranks_with_padding(size: int, empty: bool = False):
    """Rows of each rank with few or many real targets; with `empty`, one rank has none."""
    def inputs(draw: Draw) -> tuple:
        rows, length, width = draw.int(2, 3), draw.int(4, 6), draw.int(2, 4)
        features = [draw.tensor(rows, length, width) for _ in range(size)]
        targets = [draw.tensor(rows, length) for _ in range(size)]
        real = [torch.arange(length).expand(rows, length) < 1 + (rank * 2 + draw.int(0, 1)) % length for rank in range(size)]
        if empty:
            real[draw.int(0, size - 1)] = torch.zeros(rows, length, dtype=torch.bool)
        return features, targets, real, draw.tensor(width)
    return inputs


SHARE = Exercise(
    name="share_of_loss", reference=altered_share(), driver=drive_share, minutes=10, difficulty=1, **COMMON, **SUMS,
    tests=(Test("two ranks", ranks_with_padding(2), points=2, cases=2, ranks=2),
           Test("three ranks, one of them without a target", ranks_with_padding(3, empty=True), points=1, cases=2, ranks=3)),
    hints=("Gradients will be added over the ranks, so the losses must add up to the mean over all targets of all ranks.",
           "The sum of this rank's real losses, over a number that is the same on all ranks.",
           "count = total(real.sum()), and then (losses * real).sum() / count."),
    mutants=(Mutant(altered_share(own=True), "That is the rank's own mean. Added up over the ranks it is the sum of the ranks' means, P times too large, and ranks with few targets count as much as those with many."),
             Mutant(altered_share(own=True, ranks=-1.0), "The mean of the ranks' means: with unequal counts it is not the mean over all targets. Divide by everybody's count."),
             Mutant(altered_share(divides=False), "That is the sum; it is not divided by the number of targets on all ranks."),
             Mutant(altered_share(ranks=-1.0), "Divided by everybody's count and by the number of ranks: one of the two is too much, for gradients are added and not averaged."),
             Mutant(altered_share(average=True), "That would be right if the gradients were averaged over the ranks; here they are added."),
             Mutant(altered_share(padding=True), "Padding counts: use `real`, for the losses and for the count.")),
    variants={"averaged": Variant("the gradients are averaged over the ranks afterwards, as DistributedDataParallel does, and not added; `total(1)` is the number of ranks.",
                                  altered_share(average=True))})


# hook_gradients

def drive_hooks(answer, rank, weights, rows, microbatches):
    """Two steps of so many microbatches through tanh layers; returns what was sent, when, and the gradients."""
    import torch
    import torch.distributed as dist

    names = [f"layer {number}" for number in range(len(weights))]
    layers = {name: weight.clone().requires_grad_() for name, weight in zip(names, weights)}
    log, left = [], []

    def send(name, gradient):
        dist.all_reduce(gradient)
        log.append(f"{name} sent")
    answer(layers, lambda: not left, send)
    found = []
    for step in range(2):
        left = list(range(microbatches))
        for part in range(microbatches):
            left.pop()
            x = rows[rank][step][part]
            for name, weight in layers.items():
                x = torch.tanh(x @ weight)
                x.register_hook(lambda _, name=name: log.append(f"backward in {name}"))
            x.square().sum().backward()
        found.append([weight.grad.clone() for weight in layers.values()])
        for weight in layers.values():
            weight.grad = None
    return {"gradients": found, "log": log}


def altered_hooks(waits=True, early=False, copies=False, first=False, share=0.0, last_layer_only=False):
    """A hook on every weight that sends its gradient; with arguments, with something wrong."""
    def watch(weights, is_last, send):
        def arrived(name, weight):
            if waits and is_last() == first:
                return
            if share:
                weight.grad.mul_(share)
            send(name, weight.grad.clone() if copies else weight.grad)

        def passing(name):
            def seen(gradient):
                if not waits or is_last():
                    gradient = gradient.clone()
                    send(name, gradient)
                return gradient
            return seen
        for name, weight in list(weights.items())[-1 if last_layer_only else 0:]:
            if early:
                weight.register_hook(passing(name))
            else:
                weight.register_post_accumulate_grad_hook(lambda w, name=name: arrived(name, w))
    return watch


def only_ready_ones(weights, is_last, send):
    """All at once, when backward has come to the first layer."""
    def all_of_them(_):
        if is_last():
            for name in reversed(weights):
                send(name, weights[name].grad)
    next(iter(weights.values())).register_post_accumulate_grad_hook(all_of_them)


def layers_and_rows(size: int, microbatches: int):
    def inputs(draw: Draw) -> tuple:
        width, depth, count = draw.int(2, 4), draw.int(2, 4), draw.int(2, 3)
        weights = [draw.tensor(width, width) for _ in range(depth)]
        rows = [[[draw.tensor(count, width) for _ in range(microbatches)] for _ in range(2)] for _ in range(size)]
        return weights, rows, microbatches
    return inputs


HOOKS = Exercise(
    name="hook_gradients", reference=altered_hooks(), driver=drive_hooks, minutes=15, difficulty=2, **COMMON, **SUMS,
    tests=(Test("two ranks, one microbatch", layers_and_rows(2, 1), points=1, cases=2, ranks=2),
           Test("two ranks, three microbatches", layers_and_rows(2, 3), points=2, cases=2, ranks=2)),
    hints=("weight.register_post_accumulate_grad_hook(f) calls f(weight) whenever backward has added a gradient to weight.grad.",
           "While microbatches are still to come, the hook has nothing to do: ask is_last() inside of it, not when you install it.",
           "For each name: def f(weight, name=name): if is_last(): send(name, weight.grad). Without name=name, all hooks would share the last one."),
    mutants=(Mutant(altered_hooks(waits=False), "It sends after every microbatch, before the accumulation has ended: more traffic, and what is a sum already is summed again."),
             Mutant(altered_hooks(early=True), "The hook runs before the gradient is added up: it sends the last microbatch's part alone. Use register_post_accumulate_grad_hook."),
             Mutant(altered_hooks(copies=True), "The sum arrives in a copy, and weight.grad stays this rank's own."),
             Mutant(altered_hooks(first=True), "It sends in all microbatches but the last one; is it asking for the opposite?"),
             Mutant(altered_hooks(share=0.5), "That is the mean over the ranks; gradients are added here, since the loss has been divided already."),
             Mutant(altered_hooks(last_layer_only=True), "Only one weight has a hook. Do all your hooks share one variable?"),
             Mutant(only_ready_ones, "Everything is sent at the end of backward: each gradient must leave as soon as it is there, so that the sending overlaps.")))


# cut_into_buckets

def drive_cut(answer, sizes, most):
    """Buckets as places among the names, counted from 0."""
    names = list(sizes)
    return [[names.index(name) for name in bucket] for bucket in answer(sizes, most)]


def altered_cut(forwards=False, over=False, reopens=False, drops=False, splits=False, strict=False):
    """Names by bucket, from the last one to the first; with arguments, with something wrong."""
    def cut(sizes, most):
        buckets, filled = [], 0
        for name in (sizes if forwards else reversed(sizes)):
            room = filled < most if over else filled + sizes[name] < most if strict else filled + sizes[name] <= most
            if drops and sizes[name] > most:
                continue
            if splits and sizes[name] > most:
                buckets.insert(0, [name])
                continue
            if buckets and room:
                buckets[-1].append(name)
                filled += sizes[name]
            else:
                buckets.append([name])
                filled = sizes[name]
        if reopens:
            buckets = [bucket[::-1] for bucket in buckets]
        return buckets
    return cut


def best_fit(sizes, most):
    """Each into the first bucket that has room: fewer buckets, in an order that backward does not have."""
    buckets = []
    for name in reversed(sizes):
        for bucket in buckets:
            if sum(sizes[other] for other in bucket) + sizes[name] <= most:
                bucket.append(name)
                break
        else:
            buckets.append([name])
    return buckets


def parameter_sizes(draw: Draw) -> tuple:
    """A large one in between, and one bucket that is filled to the last byte."""
    most = draw.int(30, 60)
    sizes = [draw.int(most // 3, most // 2) for _ in range(draw.int(4, 7))]
    sizes[draw.int(1, len(sizes) - 2)] = most + draw.int(1, 20)
    half = draw.int(10, 20)
    sizes += [draw.int(2, 8), half, most - half]
    return {f"weight {number}": size for number, size in enumerate(sizes)}, most


CUT = Exercise(
    name="cut_into_buckets", reference=altered_cut(), driver=drive_cut, minutes=10, difficulty=1, **COMMON,
    tests=(Test("sizes of all kinds", parameter_sizes, points=2),),
    hints=("Backward reaches the last layer first: go through the names in reverse.",
           "Keep one bucket open. If the next one does not fit, close it for good and open another.",
           "if buckets and filled + size <= most: append to buckets[-1]; else buckets.append([name]) and filled = size. One that is too large gets its own that way."),
    mutants=(Mutant(altered_cut(forwards=True), "Those are in the order of forward; backward fills the last layer's gradient first."),
             Mutant(altered_cut(over=True), "A bucket may not hold more than `most`, unless it holds one tensor only: test before adding."),
             Mutant(altered_cut(strict=True), "A bucket that is exactly full is allowed."),
             Mutant(altered_cut(drops=True), "A tensor that is too large for any bucket is left out; it gets a bucket of its own."),
             Mutant(altered_cut(splits=True), "Tensors that are too large come first, out of order: then all other buckets wait for them."),
             Mutant(altered_cut(reopens=True), "The names of each bucket are in the order of forward; backward's is asked for."),
             Mutant(best_fit, "Earlier buckets are filled up with later tensors: then they wait for gradients that come late. Once closed, a bucket stays closed.")))


# send_buckets

def drive_buckets(answer, rank, weights, buckets, swapped, rows):
    """Two steps. On the rank `swapped` backward reaches the layers in another order. Sums come when backward is over."""
    import torch
    import torch.distributed as dist

    layers = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    log, travelling = [], []

    def send(flat):
        log.append(f"{len(travelling)}: {flat.numel()} numbers")
        travelling.append(flat)
    finish = answer(layers, buckets, send)
    found = []
    for step in range(2):
        x = rows[rank][step]
        for name in (reversed(layers) if rank == swapped else layers):
            x = torch.tanh(x * layers[name].sum() + layers[name].square().mean())
            x.register_hook(lambda _, name=name: log.append(f"backward in {name}"))
        x.sum().backward()
        messages = torch.tensor(len(travelling))
        dist.all_reduce(messages, dist.ReduceOp.MAX)
        for number in range(int(messages)):
            padded = torch.zeros(sum(weight.numel() for weight in weights.values()))
            if number < len(travelling):
                padded[:travelling[number].numel()] = travelling[number]
            dist.all_reduce(padded)
            if number < len(travelling):
                travelling[number].copy_(padded[:travelling[number].numel()])
        travelling.clear()
        log.append("sums are here")
        finish()
        found.append({name: weight.grad.clone() for name, weight in layers.items()})
        for weight in layers.values():
            weight.grad = None
    return {"gradients": found, "log": log}


def altered_buckets(hasty=False, as_filled=False, singly=False, at_once=False, once=False, mixed=False, late=False, share=1.0):
    """Hooks that fill and send buckets; with arguments, with something wrong."""
    def install(weights, buckets, send):
        groups = [[name] for names in buckets for name in names] if singly else buckets
        missing, flats, sent = [set(names) for names in groups], {}, []

        def put_back(number):
            names = groups[number][::-1] if mixed else groups[number]
            parts = flats[number].split([weights[name].numel() for name in names])
            for name, part in zip(names, parts):
                weights[name].grad = share * part.view_as(weights[name])

        def dispatch(number):
            flats[number] = torch.cat([torch.zeros_like(weights[name]).flatten() if weights[name].grad is None
                                       else weights[name].grad.flatten() for name in groups[number]])
            sent.append(number)
            send(flats[number])
            if at_once:
                put_back(number)

        def arrived(number, name):
            missing[number].discard(name)
            ready = [n for n in range(len(groups)) if n not in sent
                     and (len(missing[n]) < len(groups[n]) if hasty else not missing[n])]
            if late and any(missing):
                return
            for n in ready:
                if as_filled or n == len(sent):
                    dispatch(n)

        for number, names in enumerate(groups):
            for name in names:
                weights[name].register_post_accumulate_grad_hook(
                    lambda _, number=number, name=name: arrived(number, name))

        def finish():
            for number in () if at_once else range(len(groups)):
                put_back(number)
            sent.clear()
            for waiting, names in zip(missing, groups):
                waiting.update(() if once else names)
        return finish
    return install


def buckets_and_rows(size: int, swaps: bool = False):
    """Layers of all sizes in three buckets, the first and the last of them with at least two."""
    def inputs(draw: Draw) -> tuple:
        counts = [draw.int(2, 3), draw.int(1, 2), draw.int(2, 3)]
        names = [f"layer {number}" for number in range(sum(counts))]
        weights = {name: draw.tensor(1 + number % 3, draw.int(2, 4)) for number, name in enumerate(names)}
        order, buckets = names[::-1], []
        for count in counts:
            buckets.append(order[:count])
            order = order[count:]
        rows = [[draw.tensor(3) for _ in range(2)] for _ in range(size)]
        return weights, buckets, draw.int(0, size - 1) if swaps else size, rows
    return inputs


BUCKETS = Exercise(
    name="send_buckets", reference=altered_buckets(), driver=drive_buckets, minutes=25, difficulty=3, **COMMON, **SUMS,
    tests=(Test("two ranks", buckets_and_rows(2), points=3, cases=2, ranks=2),
           Test("two ranks, one of which goes another way", buckets_and_rows(2, swaps=True), points=2, cases=2, ranks=2)),
    hints=("Each bucket needs a set of the names that are still missing. A hook on every weight takes its name out; what is to be done when the set is empty?",
           "Send bucket n only after bucket n − 1: after each gradient, go on sending while the next one in order is full. torch.cat of the flattened gradients is the message; keep it.",
           "finish(): for each bucket, cut its flat tensor by the weights' numel(), give each weight its part as .grad with its shape, fill the sets again, and start counting from 0."),
    mutants=(Mutant(altered_buckets(hasty=True), "A bucket is sent before its last gradient is there."),
             Mutant(altered_buckets(as_filled=True), "Buckets are sent in the order in which they fill up. That may differ between ranks, and then the first message of one is added to the second of another."),
             Mutant(altered_buckets(singly=True), "Each gradient is sent alone: one message for each bucket is asked for."),
             Mutant(altered_buckets(at_once=True), "The gradients are put back before the sum has arrived: that is what finish() is for."),
             Mutant(altered_buckets(once=True), "The second step goes wrong: after finish() all gradients are missing again."),
             Mutant(altered_buckets(mixed=True), "The parts are given back in another order than they were put together."),
             Mutant(altered_buckets(late=True), "All buckets are sent at the end of backward: the first must leave when it is full."),
             Mutant(altered_buckets(share=0.5), "That is the mean over the ranks; the sum is asked for.")))

EXERCISES = [SHARE, HOOKS, CUT, BUCKETS]
