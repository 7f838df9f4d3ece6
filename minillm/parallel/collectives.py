"""Every collective from send and receive alone: naive and tree, ring and recursive doubling, with what each one sends.

All return new tensors, without gradients, and leave their input as it was. Chunks are those of torch.tensor_split along
dimension 0, so sizes need not divide: the first chunks have one row more. `rank` below is the rank in the group. Every
rank ends with the same bits; another algorithm adds in another order, and may end with others.
Costs are per rank, with N the bytes of the whole tensor and P the ranks of the group; `Traffic` counts them.
Differs from torch.distributed: no asynchronous forms, no pipelining of large messages. Source: Thakur, Rabenseifner and
Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from minillm.parallel.checked import compare

Group = dist.ProcessGroup


@dataclass
class Traffic:
    """What this rank has sent: messages, and bytes. Pass one to any collective; it adds up."""

    messages: int = 0
    bytes: int = 0


@torch.no_grad()
def broadcast_naive(x: Shaped[Tensor, "*shape"], source: int, group: Group,
                    traffic: Traffic | None = None) -> Shaped[Tensor, "*shape"]:
    """The source's x on every rank; the others give a tensor of the same shape. The source sends to each in turn.

    Cost: the source sends P-1 messages, (P-1)·N bytes; the others nothing. P-1 rounds.
    """
    compare("broadcast_naive", x, group)
    rank, size, out = dist.get_rank(group), dist.get_world_size(group), x.clone()
    if rank == source:
        for other in range(size):
            if other != source:
                _exchange(group, traffic, send=[(out, other)])
    else:
        _exchange(group, traffic, receive=[(out, source)])
    return out


@torch.no_grad()
def broadcast_tree(x: Shaped[Tensor, "*shape"], source: int, group: Group,
                   traffic: Traffic | None = None) -> Shaped[Tensor, "*shape"]:
    """The source's x on every rank: in each round every rank that has it passes it on, so their number doubles.

    Cost: the source sends ⌈log2 P⌉ messages of N bytes, no rank more; all ranks together P-1. ⌈log2 P⌉ rounds.
    """
    compare("broadcast_tree", x, group)
    size, out = dist.get_world_size(group), x.clone()
    mine = (dist.get_rank(group) - source) % size  # numbered from the source
    reach = 1
    while reach < size:
        if mine < reach and mine + reach < size:
            _exchange(group, traffic, send=[(out, (mine + reach + source) % size)])
        elif reach <= mine < 2 * reach:
            _exchange(group, traffic, receive=[(out, (mine - reach + source) % size)])
        reach *= 2
    return out


@torch.no_grad()
def reduce(x: Shaped[Tensor, "*shape"], target: int, group: Group,
           traffic: Traffic | None = None) -> Shaped[Tensor, "*shape"] | None:
    """The sum over ranks on the target, None elsewhere: the tree of `broadcast_tree` from its leaves to its root.

    Cost: every rank but the target sends 1 message of N bytes. ⌈log2 P⌉ rounds.
    """
    compare("reduce", x, group)
    size, total = dist.get_world_size(group), x.clone()
    mine = (dist.get_rank(group) - target) % size
    reach = 1
    while reach < size:
        if mine % (2 * reach):
            _exchange(group, traffic, send=[(total, (mine - reach + target) % size)])
            return None
        if mine + reach < size:
            coming = torch.empty_like(total)
            _exchange(group, traffic, receive=[(coming, (mine + reach + target) % size)])
            total += coming
        reach *= 2
    return total


@torch.no_grad()
def scatter(x: Shaped[Tensor, "N *rest"], source: int, group: Group,
            traffic: Traffic | None = None) -> Shaped[Tensor, "N_local *rest"]:
    """Chunk `rank` of the source's x; the others give a tensor of the same shape.

    Cost: the source sends P-1 messages, N bytes less its own chunk; the others nothing.
    """
    compare("scatter", x, group)
    rank, chunks = dist.get_rank(group), x.tensor_split(dist.get_world_size(group))
    mine = chunks[rank].clone()
    if rank == source:
        _exchange(group, traffic, send=[(chunk, other) for other, chunk in enumerate(chunks) if other != source])
    else:
        _exchange(group, traffic, receive=[(mine, source)])
    return mine


@torch.no_grad()
def gather(part: Shaped[Tensor, "N_local *rest"], target: int, group: Group, rows: int | None = None,
           traffic: Traffic | None = None) -> Shaped[Tensor, "N *rest"] | None:
    """All parts one after another on the target, None elsewhere. rows: N, if it is not P times this part's.

    Cost: every rank but the target sends 1 message, its part.   Raises: ValueError if the part is not chunk-sized.
    """
    compare("gather", part[:0], group)
    rank = dist.get_rank(group)
    if rank != target:
        _room_for(part, group, rows)
        _exchange(group, traffic, send=[(part, target)])
        return None
    out, chunks = _room_for(part, group, rows)
    _exchange(group, traffic, receive=[(chunk, other) for other, chunk in enumerate(chunks) if other != target])
    return out


@torch.no_grad()
def ring_reduce_scatter(x: Shaped[Tensor, "N *rest"], group: Group,
                        traffic: Traffic | None = None) -> Shaped[Tensor, "N_local *rest"]:
    """Chunk `rank` of the sum over ranks. Partial sums go round the ring; each rank adds its own chunk and passes them on.

    Cost: P-1 messages, N bytes less chunk `rank`: (P-1)/P · N where P divides.
    """
    compare("ring_reduce_scatter", x, group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    chunks = x.tensor_split(size)
    partial = chunks[(rank - 1) % size].clone()
    for step in range(size - 1):
        own = chunks[(rank - 2 - step) % size]
        coming = torch.empty_like(own, memory_format=torch.contiguous_format)
        _exchange(group, traffic, send=[(partial, (rank + 1) % size)], receive=[(coming, (rank - 1) % size)])
        partial = coming + own
    return partial


@torch.no_grad()
def ring_all_gather(part: Shaped[Tensor, "N_local *rest"], group: Group, rows: int | None = None,
                    traffic: Traffic | None = None) -> Shaped[Tensor, "N *rest"]:
    """All parts one after another on every rank: each goes once round the ring. rows: N, if it is not P times this part's.

    Cost: P-1 messages, N bytes less chunk `rank + 1`: (P-1)/P · N where P divides.
    Raises: ValueError if the part is not the size of chunk `rank`.
    """
    compare("ring_all_gather", part[:0], group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    out, chunks = _room_for(part, group, rows)
    for step in range(size - 1):
        _exchange(group, traffic, send=[(chunks[(rank - step) % size], (rank + 1) % size)],
                  receive=[(chunks[(rank - step - 1) % size], (rank - 1) % size)])
    return out


@torch.no_grad()
def ring_all_reduce(x: Shaped[Tensor, "*shape"], group: Group, traffic: Traffic | None = None) -> Shaped[Tensor, "*shape"]:
    """The sum over ranks on every rank: reduce-scatter, then all-gather, of the elements in a row.

    Cost: 2(P-1) messages, 2N bytes less chunks `rank` and `rank + 1`: 2(P-1)/P · N where P divides, which no
    algorithm undercuts. 2(P-1) rounds.
    """
    compare("ring_all_reduce", x, group)
    part = ring_reduce_scatter(x.reshape(-1), group, traffic)
    return ring_all_gather(part, group, x.numel(), traffic).reshape(x.shape)


@torch.no_grad()
def doubling_all_reduce(x: Shaped[Tensor, "*shape"], group: Group,
                        traffic: Traffic | None = None) -> Shaped[Tensor, "*shape"]:
    """The sum over ranks on every rank by recursive doubling: partners at distance 1, 2, 4 ... swap whole sums.

    Fewer rounds than the ring and more bytes: for small tensors. With Q the largest power of two up to P, the first
    2(P-Q) ranks pair up: the even one lends its numbers to the odd one and gets the sum back at the end.
    Cost: log2 Q messages of N bytes; 1 for a rank that lends, log2 Q + 1 for one that is lent to.
    """
    compare("doubling_all_reduce", x, group)
    rank, size, total = dist.get_rank(group), dist.get_world_size(group), x.clone()
    power = 1 << (size.bit_length() - 1)
    pairs = size - power
    if rank < 2 * pairs and rank % 2 == 0:
        _exchange(group, traffic, send=[(total, rank + 1)])
        _exchange(group, traffic, receive=[(total, rank + 1)])
        return total
    coming = torch.empty_like(total)
    if rank < 2 * pairs:
        _exchange(group, traffic, receive=[(coming, rank - 1)])
        total += coming
    place = rank // 2 if rank < 2 * pairs else rank - pairs  # among the Q that take part
    reach = 1
    while reach < power:
        partner = place ^ reach
        partner = 2 * partner + 1 if partner < pairs else partner + pairs
        _exchange(group, traffic, send=[(total, partner)], receive=[(coming, partner)])
        total = total + coming
        reach *= 2
    if rank < 2 * pairs:
        _exchange(group, traffic, send=[(total, rank - 1)])
    return total


@torch.no_grad()
def all_to_all(parts: Sequence[Tensor], group: Group, rows: Sequence[int] | None = None,
               traffic: Traffic | None = None) -> list[Tensor]:
    """parts[i] goes to rank i; returns what each rank sent here. rows: of what comes from each, if not as parts[rank].

    Cost: P-1 messages, the bytes of all parts but parts[rank]: (P-1)/P · N where they are equal.
    Raises: ValueError unless there is a part, and a number of rows, for every rank.
    """
    compare("all_to_all", parts[0][:0], group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = [len(parts[rank])] * size if rows is None else rows
    if not len(parts) == len(rows) == size:
        raise ValueError(f"{len(parts)} parts and {len(rows)} numbers of rows for {size} ranks: give one of each per rank.")
    out = [parts[rank].new_empty((count, *parts[rank].shape[1:])) for count in rows]
    out[rank].copy_(parts[rank])
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        _exchange(group, traffic, send=[(parts[to], to)], receive=[(out[source], source)])
    return out


def _exchange(group: Group, traffic: Traffic | None, send: Sequence[tuple[Tensor, int]] = (),
              receive: Sequence[tuple[Tensor, int]] = ()) -> None:
    """Start all of these (tensor, rank in the group) at once, and wait for them."""
    sends = [(tensor.contiguous(), to) for tensor, to in send]
    work = [dist.P2POp(dist.isend, tensor, group=group, group_peer=to) for tensor, to in sends]
    work += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=source) for tensor, source in receive]
    for request in dist.batch_isend_irecv(work) if work else ():  # a group of one has nothing to send
        request.wait()
    if traffic is not None:
        traffic.messages += len(sends)
        traffic.bytes += sum(tensor.numel() * tensor.element_size() for tensor, _ in sends)


def _room_for(part: Tensor, group: Group, rows: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A tensor for all parts, with this one in its place, and its chunks."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    out = part.new_empty((size * len(part) if rows is None else rows, *part.shape[1:]))
    chunks = out.tensor_split(size)
    if len(chunks[rank]) != len(part):
        raise ValueError(f"rank {rank} gives {len(part)} rows; of {len(out)} rows for {size} ranks its chunk has "
                         f"{len(chunks[rank])}.")
    chunks[rank].copy_(part)
    return out, chunks
