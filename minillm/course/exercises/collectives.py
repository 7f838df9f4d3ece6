"""Lesson 08's exercises: a ring all-reduce and a reduce-scatter on real ranks, and compression with error feedback."""

import torch

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "08", "packages": ("torch", "numpy")}
SUMS = {"rtol": 1e-5, "atol": 1e-6, "why": "float32: the ranks' numbers may be added in another order"}


def drive_ring(answer, rank, parts):
    """Give the rank its numbers and a way to talk; return what it made of them, and what it sent."""
    import torch
    import torch.distributed as dist

    sent, directions = [], set()

    def exchange(tensor, to, source):
        directions.add(((to - rank) % len(parts), (rank - source) % len(parts)))
        tensor = tensor.contiguous()
        coming = torch.empty_like(tensor)
        for request in (dist.isend(tensor, to), dist.irecv(coming, source)):
            request.wait()
        sent.append(tensor.numel())
        return coming
    result = answer(parts[rank].clone(), rank, len(parts), exchange)
    return {"result": result, "messages": len(sent), "numbers sent": sum(sent),
            "only from rank - 1 to rank + 1": directions <= {(1, 1)}}


def ranks_of(size: int):
    def inputs(draw: Draw) -> tuple:
        length = size * draw.int(2, 4)
        return ([draw.tensor(length) for _ in range(size)],)
    return inputs


# ring_all_reduce

def altered_ring(short=0, mean=True, backwards=False, twice=False, gathers=True, shifted=0):
    """The mean over all ranks round a ring; with arguments, with something wrong."""
    def ring(x, rank, size, exchange):
        chunks = [chunk.clone() for chunk in x.chunk(size)]
        after, before = (rank + 1) % size, (rank - 1) % size
        if backwards:
            after, before = before, after
        for step in range(size - 1 - short):
            coming = exchange(chunks[(rank - step) % size], after, before)
            chunks[(rank - step - 1) % size] += 2 * coming if twice else coming
        for step in range(size - 1 if gathers else 0):
            own = (rank + 1 - step + shifted) % size
            chunks[(own - 1) % size] = exchange(chunks[own], after, before)
        total = torch.cat(chunks)
        return total / size if mean else total
    return ring


def everybody_to_everybody(x, rank, size, exchange):
    total = x.clone()
    for distance in range(1, size):
        total += exchange(x, (rank + distance) % size, (rank - distance) % size)
    return total / size


RING = Exercise(
    name="ring_all_reduce", reference=altered_ring(), driver=drive_ring, minutes=25, difficulty=3, **COMMON, **SUMS,
    tests=(Test("three ranks", ranks_of(3), points=3, cases=2, ranks=3), Test("four ranks", ranks_of(4), points=2, cases=2, ranks=4)),
    hints=("Cut x into `size` chunks. In each step every rank passes one chunk on to rank + 1 and gets one from rank − 1, so 2 · (size − 1) steps move everything.",
           "First half: in step s send chunk (rank − s), add what comes to chunk (rank − s − 1). After it rank r holds the finished chunk r + 1.",
           "Second half: in step s send chunk (rank + 1 − s), and put what comes in the place of chunk (rank − s). All indices modulo size. Divide by size at the end."),
    mutants=(Mutant(altered_ring(short=1), "One step of the first half is missing: a chunk must meet all ranks, in size − 1 steps."),
             Mutant(altered_ring(mean=False), "That is the sum; the mean is asked for."),
             Mutant(altered_ring(backwards=True), "You talk to the wrong neighbour: send to rank + 1 and receive from rank − 1."),
             Mutant(altered_ring(twice=True), "What arrives is added twice. Does your `exchange` write where you add again?"),
             Mutant(altered_ring(gathers=False), "After the first half each rank has one finished chunk; the second half, which hands them round, is missing."),
             Mutant(altered_ring(shifted=-1), "The second half starts with the wrong chunk: the one that rank r has finished is r + 1."),
             Mutant(everybody_to_everybody, "The values are right, but everybody sends everything to everybody: (P − 1) · N numbers instead of 2 (P − 1)/P · N.")),
    variants={"sum": Variant("the sum over all ranks is asked for, not the mean.", altered_ring(mean=False))})


# reduce_scatter

def altered_scatter(own=-1, short=0, adds=True, mean=False):
    """Chunk `rank` of the sum over all ranks; with arguments, with something wrong."""
    def partial_sums(x, rank, size, exchange):
        chunks = x.chunk(size)
        moving = chunks[(rank + own) % size].clone()
        for step in range(size - 1 - short):
            moving = exchange(moving, (rank + 1) % size, (rank - 1) % size)
            if adds:
                moving += chunks[(rank + own - 1 - step) % size]
        return moving / size if mean else moving
    return partial_sums


def reduces_everything(x, rank, size, exchange):
    return altered_ring(mean=False)(x, rank, size, exchange).chunk(size)[rank]


REDUCE_SCATTER = Exercise(
    name="reduce_scatter", reference=altered_scatter(), driver=drive_ring, minutes=15, difficulty=2, **COMMON, **SUMS,
    tests=(Test("three ranks", ranks_of(3), points=2, cases=2, ranks=3), Test("four ranks", ranks_of(4), points=1, cases=2, ranks=4)),
    hints=("It is the first half of the ring all-reduce, but each rank must end with its own chunk, number `rank`.",
           "A chunk that starts at rank r is finished at rank r − 1, one step before it would be back. So who starts with which?",
           "Start with chunk (rank − 1). In step s pass on what you hold, and add your own chunk (rank − 2 − s) to what comes."),
    mutants=(Mutant(altered_scatter(own=0), "Rank r ends with chunk r + 1: that is the natural end of the ring, but the wrong shard. Start one chunk earlier."),
             Mutant(altered_scatter(short=1), "One step is missing: a chunk must meet all ranks."),
             Mutant(altered_scatter(adds=False), "The chunk is passed round, but nobody adds to it."),
             Mutant(altered_scatter(mean=True), "That is the mean; the sum is asked for."),
             Mutant(reduces_everything, "Right, but it reduces everything and throws most of it away: twice the traffic.")),
    variants={"mean": Variant("the mean over all ranks is asked for, not the sum.", altered_scatter(mean=True))})


# top_k_feedback

def drive_top_k(answer, gradients, k):
    """What is sent at each step, as a full vector, and what is remembered in the end."""
    import torch

    memory, sent = torch.zeros_like(gradients[0]), []
    for gradient in gradients:
        values, places = answer(gradient.clone(), memory, k)
        full = torch.zeros_like(gradient)
        full[places] = values
        sent.append(full)
    return [sent, memory]


def altered_top_k(remembers=True, clears=True, signed=False, adds=True, reads=True, largest=True):
    """The k largest of gradient and memory; with arguments, with something wrong."""
    def compress(gradient, memory, k):
        wanted = gradient + memory if reads else gradient
        places = (wanted if signed else wanted.abs()).topk(k, largest=largest).indices
        values = (wanted if adds else gradient)[places].clone()
        if remembers:
            memory.copy_(wanted)
            if clears:
                memory[places] = 0
        return values, places
    return compress


def top_k_inputs(draw: Draw) -> tuple:
    length = draw.int(6, 12)
    return [draw.tensor(length) for _ in range(6)], draw.int(1, 3)


TOP_K = Exercise(
    name="top_k_feedback", reference=altered_top_k(), driver=drive_top_k, minutes=12, difficulty=1, **COMMON, **SUMS,
    tests=(Test("six gradients in a row", top_k_inputs, points=3),),
    hints=("What was not sent last time is still owed: it belongs to this step's gradient.",
           "Choose by size, whatever the sign, but send the numbers with their sign.",
           "wanted = gradient + memory; the k places of the largest wanted.abs(); memory becomes wanted, with zeros in those places, in place."),
    mutants=(Mutant(altered_top_k(remembers=False), "The rest is forgotten: what is never among the largest is never learned. Keep it in `memory`, in place."),
             Mutant(altered_top_k(clears=False), "What has been sent stays in the memory, and will be sent again."),
             Mutant(altered_top_k(signed=True), "You choose the largest numbers; the largest in size are asked for."),
             Mutant(altered_top_k(adds=False), "You choose by gradient plus memory, but send the gradient alone."),
             Mutant(altered_top_k(reads=False), "The memory is written and never read."),
             Mutant(lambda gradient, memory, k: altered_top_k()(gradient, memory, k)[::-1], "The values come first, then the places."),
             Mutant(altered_top_k(largest=False), "Those are the smallest.")))

EXERCISES = [RING, REDUCE_SCATTER, TOP_K]
