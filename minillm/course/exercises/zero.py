"""Lesson 12's exercises: who updates what, a step of ZeRO-1, ZeRO-3's gathering and freeing, and another number of ranks."""

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "12", "packages": ("torch", "numpy")}


# pieces_of_rank

def drive_pieces(answer, sizes, ranks):
    """What every rank says, and how many elements of each weight are updated by none, one or several."""
    said = [answer(sizes, rank, ranks) for rank in range(ranks)]
    owners = {name: [sum(first <= place < end for first, end in (pieces[name] for pieces in said)) for place in range(size)]
              for name, size in sizes.items()}
    return {"pieces by rank": said, "updated by no rank": sum(count == 0 for counts in owners.values() for count in counts),
            "updated by several": sum(count > 1 for counts in owners.values() for count in counts)}


def altered_pieces(each=False, floor=False, flat=False, shared=False, leaks=False, clamped=True):
    """Places in each weight of this rank's part; with arguments, with something wrong."""
    def pieces(sizes, rank, ranks):
        total, found, before = sum(sizes.values()), {}, 0
        length = total // ranks if floor else -(-total // ranks)
        for name, size in sizes.items():
            if each:
                width = -(-size // ranks)
                found[name] = (min(rank * width, size), min((rank + 1) * width, size))
                continue
            first, end = rank * length - before, (rank + 1) * length - before
            if clamped:
                last = name == list(sizes)[-1]
                first, end = max(0, min(first, size)), max(0, min(end, length * ranks - before if leaks and last else size))
            if shared and end > first:
                first, end = 0, size
            found[name] = (first + before, end + before) if flat else (first, end)
            before += size
        return found
    return pieces


def whole_weights(sizes, rank, ranks):
    """Weights in turn, as they are."""
    return {name: (0, size if number % ranks == rank else 0) for number, (name, size) in enumerate(sizes.items())}


def weight_sizes(draw: Draw) -> tuple:
    """One that is large enough to be cut, small ones beside it, and a total that the ranks do not divide."""
    ranks = draw.int(2, 5)
    sizes = [draw.int(1, 4), draw.int(12, 30), draw.int(2, 5), draw.int(8, 20), draw.int(4, 9)]
    sizes[1] += sum(sizes) % ranks == 0
    sizes[1] += sum(sizes) % ranks == 0
    return {f"weight {number}": size for number, size in enumerate(sizes)}, ranks


PIECES = Exercise(
    name="pieces_of_rank", reference=altered_pieces(), driver=drive_pieces, minutes=10, difficulty=1, **COMMON,
    tests=(Test("weights of all sizes", weight_sizes, points=3, cases=6),),
    hints=("All weights lie in one row. A part has ceil(total / ranks) places of that row; which does this rank's begin and end at?",
           "Subtract from both where the weight begins in the row; what is below 0 or beyond the weight's size is not in it.",
           "first = min(max(rank * length - before, 0), size), end likewise from (rank + 1) * length; before grows by size. An empty piece has first = end."),
    mutants=(Mutant(altered_pieces(each=True), "Each weight is cut into parts by itself. That would work, with padding in every weight; here the whole row is cut."),
             Mutant(altered_pieces(floor=True), "The parts are rounded down, so the last elements belong to nobody and never learn."),
             Mutant(altered_pieces(flat=True), "Those are places in the row; places in the weight are asked for."),
             Mutant(altered_pieces(shared=True), "A weight that lies across a border is updated by two ranks, whole. Each element has one owner."),
             Mutant(altered_pieces(leaks=True), "The last piece goes on into the padding: no weight has elements there."),
             Mutant(altered_pieces(clamped=False), "Pieces reach beyond their weights: cut them off at 0 and at the weight's size."),
             Mutant(whole_weights, "Whole weights are handed out in turn: the largest makes one rank's part larger than the others'.")))


# sharded_step

def drive_step(answer, rank, weights, gradients, masters, most, lr, beta):
    """Three steps. Collectives are counted; everybody's masters are compared with the weights that the model has."""
    import torch
    import torch.distributed as dist

    size, sent = len(masters), []

    def add(x):
        total = torch.as_tensor(x, dtype=torch.float32).detach().clone()
        dist.all_reduce(total)
        sent.append(total.numel())
        return total

    def all_gather(x):
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        sent.append((size - 1) * x.numel())
        return torch.cat(parts)

    def reduce_scatter(x):
        total = x.detach().clone()
        dist.all_reduce(total)
        sent.append((size - 1) * total.numel() // size)
        return total.view(size, -1)[rank].clone()
    model, master = weights.bfloat16(), masters[rank].clone()
    momentum = torch.zeros_like(master)
    found = []
    for step in gradients[rank]:
        model, master, momentum = answer(model.clone(), step.clone(), master.clone(), momentum.clone(), rank, size, most, lr, beta,
                                         reduce_scatter, all_gather, add)
        sends = sum(sent)
        sent.clear()
        everyones = all_gather(master)[:len(weights)]
        sent.clear()
        off = (model.float() - everyones).abs() > everyones.abs() / 128
        found.append({"master": master, "momentum": momentum, "weights that are not their owner's": int(off.sum()), "numbers sent": sends})
    return found


def altered_step(gathers=True, norm="all", masters=True, padding=0.0, mean=False, stretches=False, everyone=False):
    """New weights, master and momentum; with arguments, with something wrong."""
    def step(weights, gradient, master, momentum, rank, ranks, max_norm, lr, beta, reduce_scatter, all_gather, add):
        missing = len(master) * ranks - len(gradient)
        row = torch.nn.functional.pad(gradient, (0, missing), value=padding)
        if everyone:
            part = all_gather(row).view(ranks, -1).sum(0).view(ranks, -1)[rank]
        else:
            part = reduce_scatter(row)
        if mean:
            part = part / ranks
        square = part.square().sum()
        if norm == "all":
            length = add(square).sqrt()
        elif norm == "sum":
            length = add(square.sqrt())
        else:
            length = square.sqrt() + 0 * add(square)
        scale = max_norm / length if stretches else (max_norm / length).clamp(max=1.0)
        part = part * scale
        if not masters:
            last = torch.nn.functional.pad(weights.float(), (0, missing))
            master = last.view(ranks, -1)[rank]
        momentum = beta * momentum + part
        master = master - lr * momentum
        if not gathers:
            after = torch.nn.functional.pad(weights, (0, missing)).view(ranks, -1).clone()
            after[rank] = master.to(weights.dtype)
            return after.view(-1)[:len(weights)] + 0 * all_gather(master)[:len(weights)].to(weights.dtype), master, momentum
        whole = all_gather(master.to(weights.dtype))
        return whole[:len(weights)], master, momentum
    return step


def step_inputs(size: int):
    """Numbers that the ranks do not divide; first gradients that are clipped, then some that are not."""
    def inputs(draw: Draw) -> tuple:
        length = draw.int(3, 5)
        total = size * length - draw.int(1, size - 1)
        weights = 1 + draw.tensor(total).abs()
        rows = torch.nn.functional.pad(weights, (0, size * length - total)).view(size, length)
        gradients = [[draw.tensor(total) * scale for scale in (1.0, 1.0, 0.02)] for _ in range(size)]
        return weights, gradients, list(rows.unbind()), 1.0, 0.5, 0.9
    return inputs


STEP = Exercise(
    name="sharded_step", reference=altered_step(), driver=drive_step, minutes=20, difficulty=2, **COMMON,
    rtol=1e-5, atol=1e-6, why="float32: the ranks' numbers may be added, and factors multiplied, in another order",
    tests=(Test("bfloat16 with masters, three ranks", step_inputs(3), points=6, cases=1, ranks=3),),
    hints=("Pad the gradient with zeros to ranks * len(master), and reduce_scatter it: the rest happens in the part.",
           "The norm is of all gradients: the root of the sum over ranks of the parts' squares. The scale is 1 at most.",
           "part *= min(1, max_norm / norm); momentum = beta * momentum + part; master = master - lr * momentum; weights = all_gather(master in the weights' dtype), without the padding."),
    mutants=(Mutant(altered_step(gathers=False), "The new weights stay with their owner: every rank has its own part new and the others' old. All-gather them."),
             Mutant(altered_step(norm="part"), "The norm is of this rank's part only, so each rank scales by something else. Add up the squares over the ranks."),
             Mutant(altered_step(norm="sum"), "The parts' norms are added. Add their squares, and take the root then."),
             Mutant(altered_step(masters=False), "The master weights are thrown away and made anew from the rounded ones: what was rounded off is lost at every step."),
             Mutant(altered_step(padding=1.0), "The padding is not 0, and counts in the norm and in the update."),
             Mutant(altered_step(mean=True), "That is the mean over ranks; here gradients are added, since the loss has been divided already."),
             Mutant(altered_step(stretches=True), "Gradients that are short enough are made longer: the scale is 1 at most."),
             Mutant(altered_step(everyone=True), "Right, but every rank gets every gradient; with reduce_scatter it gets the sum of its part alone.")),
    variants={"averaged": Variant("gradients are averaged over the ranks, and not added: the loss was not divided.", altered_step(mean=True))})


# gather_and_free

def drive_gather(answer, rank, parts, x, targets):
    """Layers x -> tanh(x W) whose weights are in parts. Memory is real: what is freed is gone. The order is noted."""
    import torch
    import torch.distributed as dist

    size, log, coming, whole, most, kept, sums = len(x), [], {}, {}, [0], {}, {}

    def start(block):
        log.append(f"start {block}")
        pieces = [torch.empty_like(parts[block][rank]) for _ in range(size)]
        coming[block] = dist.all_gather(pieces, parts[block][rank].clone(), async_op=True), pieces
        most[0] = max(most[0], len(coming) + len(whole))

    def ready(block):
        if block not in coming:
            start(block)
        work, pieces = coming.pop(block)
        work.wait()
        log.append(f"ready {block}")
        whole[block] = torch.cat(pieces)
        return whole[block]

    def free(block):
        log.append(f"free {block}")
        whole.pop(block).untyped_storage().resize_(0)

    def there(block, weight):
        if not weight.untyped_storage().nbytes():
            raise RuntimeError(f"block {block} computes with weights that have been freed")

    def forward(block, weight, given):
        log.append(f"forward {block}")
        there(block, weight)
        kept[block] = given, torch.tanh(given @ weight)
        return kept[block][1]

    def backward(block, weight, gradient):
        log.append(f"backward {block}")
        there(block, weight)
        given, out = kept.pop(block)
        gradient = gradient * (1 - out.square())
        return gradient @ weight.T, given.T @ gradient

    def send(block, gradient):
        log.append(f"send {block}")
        dist.all_reduce(gradient)
        sums[block] = gradient.chunk(size)[rank].clone()
    answer(len(parts), x[rank], lambda out: out - targets[rank], start, ready, free, forward, backward, send)
    return {"gradients of the parts": [sums.get(block, torch.zeros(1)) for block in range(len(parts))], "log": log,
            "blocks whole at once": most[0], "gathered": sum(line.startswith("start") for line in log)}


def altered_gather(frees=True, frees_late=True, ahead=1, back=-1, early=True, before=False, sends="now"):
    """One forward and one backward through blocks that come and go; with arguments, with something wrong."""
    def run(blocks, x, gradient_of, start, ready, free, forward, backward, send):
        held, gradients = {}, {}

        def bring(block, after):
            weight = held[block] if block in held else ready(block)
            if early and 0 <= after < blocks and after not in held:
                start(after)
            if before:
                free(block)
            return weight

        def done(block, after, now):
            if not early and 0 <= after < blocks:
                start(after)
            if now:
                held.pop(block, None)
            if now and not before:
                free(block)
        start(0)
        for block in range(blocks):
            weight = bring(block, block + ahead)
            x = forward(block, weight, x)
            if not frees:
                held[block] = weight
            done(block, block + ahead, frees)
        gradient = gradient_of(x)
        if frees:
            start(blocks - 1)
        for block in reversed(range(blocks)):
            weight = bring(block, block + back)
            gradient, of_weight = backward(block, weight, gradient)
            done(block, block + back, frees_late)
            if sends == "now":
                send(block, of_weight)
            gradients[block] = of_weight
        for block in reversed(range(blocks)) if sends == "late" else ():
            send(block, gradients[block])
    return run


def wrong_way(blocks, x, gradient_of, start, ready, free, forward, backward, send):
    """In backward the block that comes next in forward is fetched."""
    start(0)
    for block in range(blocks):
        weight = ready(block)
        if block + 1 < blocks:
            start(block + 1)
        x = forward(block, weight, x)
        free(block)
    gradient = gradient_of(x)
    for block in reversed(range(blocks)):
        weight = ready(block)
        if block + 1 < blocks:
            start(block + 1)
        gradient, of_weight = backward(block, weight, gradient)
        free(block)
        send(block, of_weight)


def blocks_in_parts(size: int):
    def inputs(draw: Draw) -> tuple:
        width, rows = size * draw.int(1, 2), draw.int(2, 3)
        parts = [[draw.tensor(width // size, width) for _ in range(size)] for _ in range(draw.int(4, 5))]
        return parts, [draw.tensor(rows, width) for _ in range(size)], [draw.tensor(rows, width) for _ in range(size)]
    return inputs


GATHER = Exercise(
    name="gather_and_free", reference=altered_gather(), driver=drive_gather, minutes=20, difficulty=2, **COMMON,
    rtol=1e-5, atol=1e-5, why="float32: the ranks' gradients may be added in another order",
    tests=(Test("two ranks", blocks_in_parts(2), points=5, cases=1, ranks=2),),
    hints=("Each block goes through the same five moments: start, ready, compute, free, and in backward send.",
           "Right behind ready(b), before it computes, let the next one's weights set out: b + 1 in forward, b - 1 in backward.",
           "start(0); for b: w = ready(b); start(b + 1) if there is one; x = forward(b, w, x); free(b). Then start(blocks - 1), and the same from the last to the first, with send(b, of_weight) behind free(b)."),
    mutants=(Mutant(altered_gather(frees=False), "Nothing is freed after forward: in the end all blocks are whole at once."),
             Mutant(altered_gather(frees_late=False), "Blocks are freed after forward, and stay whole after backward."),
             Mutant(wrong_way, "In backward the wrong block is fetched ahead: the next one is b - 1."),
             Mutant(altered_gather(ahead=10 ** 6, back=10 ** 6), "Nothing is fetched ahead: every block waits for its weights, and the wire for every block."),
             Mutant(altered_gather(early=False), "The next block's weights set out only when this one has computed, so nothing overlaps."),
             Mutant(altered_gather(before=True), "The weights are freed before the block has computed with them."),
             Mutant(altered_gather(sends="late"), "All gradients are held until the end of backward: send each when it is there."),
             Mutant(altered_gather(sends="never"), "The gradients are sent to nobody.")))


# other_layout

def drive_layout(answer, saved, weights, ranks):
    """What every rank of the new layout would begin with."""
    return [answer([{name: part.clone() for name, part in file.items()} for file in saved], weights.clone(), rank, ranks)
            for rank in range(ranks)]


def altered_layout(lost=False, forgets=False, length="new", dirty=False, strided=False, backwards=False):
    """This rank's master and momentum; with arguments, with something wrong."""
    def load(saved, weights, rank, ranks):
        found = {}
        for name in ("master", "momentum"):
            row = torch.cat([file[name] for file in (saved[::-1] if backwards else saved)])
            if length == "new":
                row = row if dirty else row[:len(weights)]
            each = -(-(len(row) if length == "padded" else len(weights)) // ranks)
            row = torch.nn.functional.pad(row, (0, max(0, each * ranks - len(row))))[:each * ranks]
            found[name] = row[rank::ranks].clone() if strided else row.view(ranks, each)[rank].clone()
        if lost:
            each = len(found["master"])
            found["master"] = torch.nn.functional.pad(weights.float(), (0, each * ranks - len(weights))).view(ranks, each)[rank]
        if forgets:
            found["momentum"] = torch.zeros_like(found["momentum"])
        return found
    return load


def saved_parts(more: bool):
    """Parts of some ranks, whose padding holds numbers that nobody should use; more ranks load them, or fewer."""
    def inputs(draw: Draw) -> tuple:
        size = draw.int(2, 3) if more else draw.int(4, 5)
        ranks = draw.int(5, 6) if more else draw.int(2, 3)
        total = draw.int(3, 4) * size * ranks + 1
        each = -(-total // size)
        rows = {name: draw.tensor(each * size) for name in ("master", "momentum")}
        saved = [{name: row.view(size, each)[rank].clone() for name, row in rows.items()} for rank in range(size)]
        return saved, rows["master"][:total].to(torch.bfloat16), ranks
    return inputs


LAYOUT = Exercise(
    name="other_layout", reference=altered_layout(), driver=drive_layout, minutes=10, difficulty=1, **COMMON,
    tests=(Test("on more ranks", saved_parts(True), points=2), Test("on fewer ranks", saved_parts(False), points=1)),
    hints=("Put the old parts together, as they lay before; then cut anew.",
           "The old padding is at the end of the row, beyond len(weights); the new one is as long as the new number of ranks needs.",
           "row = torch.cat(parts)[:len(weights)]; n = ceil(len(weights) / ranks); pad with zeros to n * ranks; row[rank * n:(rank + 1) * n]."),
    mutants=(Mutant(altered_layout(lost=True), "The master weights are lost: those are the 16-bit ones, widened, and what was rounded off is gone."),
             Mutant(altered_layout(forgets=True), "The momentum begins at 0 again: it was saved, too."),
             Mutant(altered_layout(length="padded"), "The new parts are as long as the old padding wants: their length follows from the weights alone."),
             Mutant(altered_layout(dirty=True), "The old padding is carried into the new one: beyond the weights there are zeros."),
             Mutant(altered_layout(strided=True), "You take every ranks-th number; a part has neighbouring ones."),
             Mutant(altered_layout(backwards=True), "The old parts are put together in the wrong order.")))

EXERCISES = [PIECES, STEP, GATHER, LAYOUT]
