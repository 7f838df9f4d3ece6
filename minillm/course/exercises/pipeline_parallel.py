"""Lesson 11's exercises: the orders of 1F1B and of interleaved stages, one stage's loop on real ranks, and weight stashing."""

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant
from minillm.parallel.schedules import one_f_one_b

COMMON = {"lesson": "11", "packages": ("torch", "numpy")}
SUMS = {"rtol": 1e-5, "atol": 1e-6, "why": "float32: microbatches may be added up in another order"}


# order_1f1b

def drive_order(answer, stages, microbatches):
    """Every stage's order as numbers; whether they fit together, and how much each holds."""
    kinds = ("forward", "backward", "update")
    orders = [[(kind, int(m)) for kind, m in answer(stage, stages, microbatches)] for stage in range(stages)]
    wrong = [kind for order in orders for kind, _ in order if kind not in kinds]
    if wrong:
        raise ValueError(f"there is no action {wrong[0]!r}: use {', '.join(kinds)}")
    done, places, before = set(), [0] * stages, -1
    while before < len(done):
        before = len(done)
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                kind, m = order[places[stage]]
                after = stage + 1 if kind == "backward" else stage - 1
                own = kind != "backward" or (stage, "forward", m) in done
                if not own or (kind != "update" and 0 <= after < stages and (after, kind, m) not in done):
                    break
                done.add((stage, kind, m))
                places[stage] += 1
    held = []
    for order in orders:
        counts = [sum({"forward": 1, "backward": -1, "update": 0}[kind] for kind, _ in order[:end]) for end in range(len(order) + 1)]
        held.append(max(counts))
    return {"all stages come to their end": places == [len(order) for order in orders], "most microbatches held, by stage": held,
            "by stage, [0 forward or 1 backward, microbatch]": [[[kinds.index(kind), m] for kind, m in order] for order in orders]}


def altered_1f1b(warmup=lambda stage, stages: stages - stage - 1, bounded=True, backwards=1, short=0, updates=False):
    """Forwards to fill the pipeline, then one of each, then the backwards that are left; with arguments, with something wrong."""
    def order(stage, stages, microbatches):
        ahead = warmup(stage, stages)
        if bounded:
            ahead = min(ahead, microbatches)
        plan = [("forward", m) for m in range(ahead)]
        returning = list(range(microbatches))[::backwards]
        for m in range(ahead, microbatches):
            plan += [("forward", m), ("backward", returning.pop(0))]
        plan += [("backward", m) for m in returning[:len(returning) - short]]
        if updates:
            plan = [step for kind, m in plan for step in ([(kind, m), ("update", m)] if kind == "backward" else [(kind, m)])]
        return plan
    return order


def everything_forward_first(stage, stages, microbatches):
    return [("forward", m) for m in range(microbatches)] + [("backward", m) for m in range(microbatches)]


def stages_and_more(draw: Draw) -> tuple:
    stages = draw.int(3, 6)
    return stages, stages + draw.int(1, 8)


def stages_and_fewer(draw: Draw) -> tuple:
    stages = draw.int(4, 9)
    return stages, draw.int(1, stages - 2)


ORDER = Exercise(
    name="order_1f1b", reference=altered_1f1b(), driver=drive_order, minutes=15, difficulty=2, **COMMON,
    tests=(Test("more microbatches than stages", stages_and_more, points=3),
           Test("fewer microbatches than stages", stages_and_fewer, points=1)),
    hints=("The last stage can begin backward right after its first forward. How many more forwards does the stage before it need, to have work meanwhile?",
           "Stage s first does stages - s - 1 forwards; then one forward and one backward in turns; then the backwards that are left.",
           "ahead = min(stages - stage - 1, microbatches). For m in range(ahead, microbatches): forward m, backward m - ahead. Then backwards "
           "from microbatches - ahead on."),
    mutants=(Mutant(altered_1f1b(lambda stage, stages: stages - stage), "One forward too many before the first backward: every stage holds a microbatch more than it must."),
             Mutant(altered_1f1b(lambda stage, stages: max(0, stages - stage - 2)), "One forward too few before the first backward: stages stand idle in every round."),
             Mutant(altered_1f1b(lambda stage, stages: stage), "A deadlock: the first stage must run ahead furthest, and you let the last one. It waits for microbatches that the first will not send before a backward."),
             Mutant(altered_1f1b(lambda stage, stages: stages - 1), "All stages run ahead equally far, so the last one holds as many microbatches as the first. It needs only one."),
             Mutant(everything_forward_first, "That is GPipe: all forwards first. Every stage then holds all microbatches."),
             Mutant(altered_1f1b(backwards=-1), "A deadlock: backward begins with the last microbatch, which has not been forward yet. First in, first out."),
             Mutant(altered_1f1b(short=1), "The last microbatch never gets its backward."),
             Mutant(altered_1f1b(bounded=False), "With few microbatches you plan forwards of some that do not exist: the number ahead is at most `microbatches`.")),
    variants={"updates": Variant('each backward of microbatch m is followed by ("update", m), as in PipeDream.', altered_1f1b(updates=True))})


# interleaved_order

def drive_chunks(answer, ranks, chunks, microbatches):
    """Every rank's order as numbers; whether they fit together, and how much each holds."""
    stages, kinds = ranks * chunks, ("forward", "backward")
    orders = [[(kind, int(stage), int(m)) for kind, stage, m in answer(rank, ranks, chunks, microbatches)] for rank in range(ranks)]
    wrong = [kind for order in orders for kind, _, _ in order if kind not in kinds]
    if wrong:
        raise ValueError(f"there is no action {wrong[0]!r}: use {', '.join(kinds)}")
    done, places, before = set(), [0] * ranks, -1
    while before < len(done):
        before = len(done)
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                kind, stage, m = order[places[rank]]
                after = stage + 1 if kind == "backward" else stage - 1
                own = kind == "forward" or ("forward", stage, m) in done
                if not own or (0 <= after < stages and (kind, after, m) not in done):
                    break
                done.add((kind, stage, m))
                places[rank] += 1
    held = [max(sum(1 if kind == "forward" else -1 for kind, _, _ in order[:end]) for end in range(len(order) + 1)) for order in orders]
    return {"all ranks come to their end": places == [len(order) for order in orders], "most held, by rank": held,
            "by rank, [0 forward or 1 backward, stage, microbatch]": [[[kinds.index(k), stage, m] for k, stage, m in order] for order in orders]}


def altered_chunks(double=2, whole=True, reversed_back=True, grouped=True, neighbours=False, short=0):
    """Megatron's interleaved order of one rank; with arguments, with something wrong."""
    def order(rank, ranks, chunks, microbatches):
        group = ranks if grouped else microbatches
        turns = [(chunk, m) for first in range(0, microbatches, group) for chunk in range(chunks) for m in range(first, first + group)]
        turns = turns[:len(turns) - short * ranks * chunks]

        def stage_of(chunk):
            return rank * chunks + chunk if neighbours else chunk * ranks + rank
        forwards = [("forward", stage_of(chunk), m) for chunk, m in turns]
        backwards = [("backward", stage_of(chunks - 1 - chunk if reversed_back else chunk), m) for chunk, m in turns]
        ahead = min(double * (ranks - rank - 1) + (chunks - 1) * ranks * whole, len(turns))
        plan = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards):
            plan += [forward, backward]
        return plan + backwards[len(forwards) - ahead:]
    return order


def chunk_sizes(draw: Draw) -> tuple:
    ranks = draw.int(2, 4)
    return ranks, draw.int(2, 3), ranks * draw.int(2, 3)


CHUNKS = Exercise(
    name="interleaved_order", reference=altered_chunks(), driver=drive_chunks, minutes=20, difficulty=3, **COMMON,
    tests=(Test("several chunks a rank", chunk_sizes, points=4, cases=5),),
    hints=("Write the rank's forwards in order first, without any backwards: `ranks` microbatches of chunk 0, the same of chunk 1, ..., then the next `ranks` microbatches.",
           "The backwards have the same order with the chunks counted from the last. Chunk c of rank r is stage c · ranks + r.",
           "ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, len(forwards)); then forwards[ahead:] and the first backwards in turns; then what is left."),
    mutants=(Mutant(altered_chunks(whole=False), "A deadlock: before the first backward a microbatch must have been through all chunks, so (chunks - 1) · ranks more forwards."),
             Mutant(altered_chunks(double=1), "Too few forwards ahead: a rank needs two more for each rank behind it, since a microbatch goes there and comes back."),
             Mutant(altered_chunks(reversed_back=False), "A deadlock: backward begins at the last chunk, and yours at the first."),
             Mutant(altered_chunks(grouped=False), "All microbatches go through chunk 0 before any goes on: then filling takes as long as with one chunk, and more is held. Change the chunk every `ranks` microbatches."),
             Mutant(altered_chunks(neighbours=True), "Your rank has neighbouring stages, so a microbatch stays on it for all of its chunks. Chunk c is stage c · ranks + rank."),
             Mutant(altered_chunks(short=1), "The last group of microbatches is missing.")))


# stage_loop

def drive_loop(answer, rank, weights, inputs, targets, orders, routes, most):
    """Run a stage on this rank. Messages arrive where they must; where they were sent to is told."""
    import weakref

    import torch
    import torch.distributed as dist

    size, weight = len(weights), weights[rank].clone().requires_grad_()
    asked, made, peak, travelling = {"sent": [], "received": []}, [], 0, []
    tags = {"forward": 0, "backward": 1}

    def model(x):
        nonlocal peak
        y = torch.tanh(x @ weight)
        made.append(weakref.ref(y))
        peak = max(peak, sum(ref() is not None for ref in made))
        return y

    def send(kind, m, tensor, to):
        if tensor.shape != inputs[0].shape:
            raise ValueError(f"a message of shape {tuple(tensor.shape)}; all are {tuple(inputs[0].shape)}")
        asked["sent"].append([tags[kind], m, to])
        travelling.append(tensor.detach().clone())
        travelling.append(dist.isend(travelling[-1], routes[kind][rank][1], tag=2 * m + tags[kind]))

    def receive(kind, m, source):
        asked["received"].append([tags[kind], m, source])
        arriving = torch.empty_like(inputs[0])
        dist.recv(arriving, routes[kind][rank][0], tag=2 * m + tags[kind])
        return arriving

    def loss(y, m):
        return (y - targets[m]).square().mean()
    mine = inputs if rank == 0 else [None] * len(inputs)
    value = answer(model, orders[rank], rank, size, mine, loss, send, receive)
    for sending in travelling[1::2]:
        sending.wait()
    return {"mean loss": torch.as_tensor(value).detach().clone() if rank == size - 1 else 0.0,
            "gradient of the weight": torch.zeros_like(weight) if weight.grad is None else weight.grad,
            "[0 forward or 1 backward, microbatch, sent to rank]": asked["sent"],
            "[0 forward or 1 backward, microbatch, received from rank]": asked["received"],
            "holds no more than it needs": peak <= most[rank]}


def altered_loop(scaled="once", forgets=0, far=False, last_out=False, frees=True, ones=False, mean=True, detached=True):
    """Forwards and backwards in the order given; with arguments, with something wrong."""
    def loop(model, order, rank, size, inputs, loss, send, receive):
        kept, losses, count = {}, [], len(inputs)
        for kind, m in order:
            if m >= count - forgets:
                continue
            if kind == "forward":
                x = inputs[m].clone() if rank == 0 else receive("forward", m, rank - 1)
                y = model(x.requires_grad_(detached))
                if rank == size - 1:
                    y = loss(y, m)
                    losses.append(y.detach())
                    y = y if scaled == "never" else y / count
                else:
                    send("forward", m, y, size - 1 if far else rank + 1)
                kept[m] = x, y
                continue
            x, y = kept.popitem()[1] if last_out else kept.pop(m) if frees else kept[m]
            if rank == size - 1:
                y.backward()
            else:
                grad = receive("backward", m, rank + 1)
                (y * (torch.ones_like(grad) if ones else grad)).sum().backward()
            if rank > 0:
                send("backward", m, x.grad / count if scaled == "everywhere" else x.grad, 0 if far else rank - 1)
        if rank == size - 1:
            return sum(losses) / count if mean else losses[-1]
    return loop


def pipelines(size: int):
    def inputs(draw: Draw) -> tuple:
        rows, width, microbatches = draw.int(2, 3), draw.int(2, 4), size + draw.int(2, 3)
        plan = one_f_one_b(size, microbatches)
        orders = [[[action.kind, action.microbatch] for action in actions] for actions in plan]
        routes = {"forward": [[rank - 1, rank + 1] for rank in range(size)], "backward": [[rank + 1, rank - 1] for rank in range(size)]}
        rows_of = [[draw.tensor(rows, width) for _ in range(microbatches)] for _ in range(2)]
        most = [size - rank + 1 for rank in range(size)]  # those alive, and the one that a variable still names
        return [draw.tensor(width, width) for _ in range(size)], *rows_of, orders, routes, most
    return inputs


LOOP = Exercise(
    name="stage_loop", reference=altered_loop(), driver=drive_loop, minutes=25, difficulty=3, **COMMON, **SUMS,
    tests=(Test("three ranks", pipelines(3), points=6, cases=1, ranks=3),),
    hints=("A backward needs what its forward had: keep (x, y) in a dict by microbatch, and take it out again when its backward comes.",
           "What arrives is no part of a graph: x.requires_grad_() before the model sees it, so that x.grad is there afterwards. On the last rank y is loss(y, m) / len(inputs).",
           "On the other ranks, (y * receive('backward', m, rank + 1)).sum().backward() goes on from the gradient that arrives. Then send('backward', m, x.grad, rank - 1), but not from rank 0."),
    mutants=(Mutant(altered_loop(scaled="never"), "Gradients are not divided by the number of microbatches: the loss of the batch is the mean of theirs."),
             Mutant(altered_loop(scaled="everywhere"), "Divided on every stage: once on the last one is enough, since all gradients come from there."),
             Mutant(altered_loop(forgets=1), "The last microbatch is forgotten."),
             Mutant(altered_loop(far=True), "Messages go to the wrong stage: an activation to the next rank, a gradient to the one before, and no further."),
             Mutant(altered_loop(last_out=True), "backward takes what was kept last, not what its own microbatch kept."),
             Mutant(altered_loop(frees=False), "What was kept is never let go: after its backward a microbatch must not be held any more."),
             Mutant(altered_loop(ones=True), "The gradient that arrives is not used: backward starts from ones."),
             Mutant(altered_loop(mean=False), "That is the last microbatch's loss; the mean of all is asked for."),
             Mutant(altered_loop(detached=False), "What arrives needs requires_grad_(), or there is no x.grad to send back.")))


# stashed_stage

def drive_stash(answer, weight, order, xs, grads, rate):
    """What a stage sends forward and backward, and where its weights end."""
    ahead, back, end = answer(weight.clone(), order, [x.clone() for x in xs], grads, rate)
    return {"outputs": list(ahead), "gradients of the inputs": list(back), "weight at the end": end}


def altered_stash(stash="all", onto="now", sign=1, late=False):
    """tanh(x @ weight), with the weights of a microbatch's forward in its backward; with arguments, with something wrong."""
    def stage(weight, order, xs, grads, rate):
        kept, ahead, back, start = {}, [None] * len(xs), [None] * len(xs), weight
        for kind, m in order:
            if kind == "forward":
                ahead[m] = torch.tanh(xs[m] @ weight)
                kept[m] = weight, ahead[m]
                continue
            old, y = kept.pop(m)
            if stash == "none":
                old, y = weight, torch.tanh(xs[m] @ weight)
            inner = grads[m] * (1 - y.square())
            back[m] = inner @ (weight if stash == "outputs" else old).T
            step = sign * rate * (xs[m].T @ inner)
            if late:
                start = start - step
            else:
                weight = (weight if onto == "now" else old) - step
        return ahead, back, start if late else weight
    return stage


def stages_with_delay(least: int, most: int):
    def inputs(draw: Draw) -> tuple:
        rows, width, microbatches, stages = draw.int(2, 3), draw.int(2, 4), draw.int(5, 7), draw.int(least, most)
        order = [[action.kind, action.microbatch] for action in one_f_one_b(stages, microbatches)[0]]
        xs, grads = ([draw.tensor(rows, width) for _ in range(microbatches)] for _ in range(2))
        return draw.tensor(width, width), order, xs, grads, 0.2
    return inputs


STASH = Exercise(
    name="stashed_stage", reference=altered_stash(), driver=drive_stash, minutes=15, difficulty=2, **COMMON, **SUMS,
    tests=(Test("the last stage: no delay", stages_with_delay(1, 1), points=1), Test("a stage with others behind it", stages_with_delay(2, 4), points=3)),
    hints=("Between the forward and the backward of a microbatch the weights may have been updated. Which ones made the output?",
           "Keep the weights with the microbatch at its forward. Do not update in place (`weight -= ...`), or what you kept changes too.",
           "With autograd: w = weight.clone().requires_grad_(), x likewise, y = tanh(x @ w), keep (x, w, y). In backward (y * grads[m]).sum().backward(), "
           "then weight = weight - rate * w.grad."),
    mutants=(Mutant(altered_stash(stash="none"), "The stash is not used: backward runs through the weights of now, which did not make that output."),
             Mutant(altered_stash(stash="outputs"), "The input's gradient goes through the weights of now. Do you keep a copy, or the tensor that is updated in place?"),
             Mutant(altered_stash(onto="old"), "The update starts from the kept weights, so that all updates in between are lost. Gradients are of the old weights; the step is taken from the new ones."),
             Mutant(altered_stash(late=True), "All updates come at the end; here each backward is followed by its own."),
             Mutant(altered_stash(sign=-1), "The step goes uphill: subtract rate times the gradient.")))

EXERCISES = [ORDER, CHUNKS, LOOP, STASH]
