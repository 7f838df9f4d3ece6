"""What a collective costs before it runs: who sends what to whom in which round, and how long that takes on a link.

A message of n bytes takes α + n·β seconds: α to start it, β = 1 / bandwidth for every byte (Hockney 1994). Every rank can
send one message and receive another at once; the next round starts when the slowest message of this one is there. Adding up
takes no time here. `rounds_of` lists every message and is exact in messages and bytes, for sizes that do not divide too
(the algorithms and chunks are those of minillm/parallel/collectives.py); `COSTS` are the closed forms that follow from it.
Links that several messages share: minillm/course/topology.py. Sources: Hockney, "The communication challenge for MPP" (1994);
Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005); Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009): no all-reduce sends less than 2(P-1)/P · n.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minillm.config import ModelConfig

GB = 10 ** 9


@dataclass(frozen=True)
class Link:
    """A way for bytes from one rank to another. Units: seconds, bytes per second in one direction."""

    alpha: float
    """Seconds before the first byte arrives."""
    bandwidth: float
    source: str = "given"

    def __post_init__(self):
        if not (self.alpha >= 0 and self.bandwidth > 0):
            raise ValueError(f"alpha = {self.alpha} s and bandwidth = {self.bandwidth} bytes/s: the first must be 0 or more, "
                             f"the second more than 0.")

    @property
    def beta(self) -> float:
        """Seconds a byte."""
        return 1 / self.bandwidth

    def seconds(self, size: float) -> float:
        """How long one message of `size` bytes takes: α + size·β."""
        return self.alpha + size * self.beta

    @property
    def half_size(self) -> float:
        """The message, in bytes, that reaches half of the bandwidth: α / β. Hockney's n½."""
        return self.alpha * self.bandwidth


_NCCL = "α: NCCL 2.19, src/graph/tuning.cc: hwLat of a ring, protocol Simple"

LINKS = {
    "nvlink-3": Link(3.4e-6, 300 * GB, f"NVIDIA A100 white paper (2020): 12 links of 25 GB/s; {_NCCL}"),
    "nvlink-4": Link(3.4e-6, 450 * GB, f"NVIDIA H100 white paper (2022): 18 links of 25 GB/s; {_NCCL}"),
    "nvlink-5": Link(3.4e-6, 900 * GB, f"NVIDIA Blackwell technical brief (2024): 18 links of 50 GB/s; {_NCCL}"),
    "pcie-4": Link(5.7e-6, 16e9 * 16 / 8 * 128 / 130, f"PCI Express 4.0: 16 lanes of 16 GT/s, 128 bits in 130; {_NCCL}"),
    "pcie-5": Link(5.7e-6, 32e9 * 16 / 8 * 128 / 130, f"PCI Express 5.0: 16 lanes of 32 GT/s, 128 bits in 130; {_NCCL}"),
    "infiniband-hdr": Link(14e-6, 25 * GB, f"NVIDIA ConnectX-6 manual: 200 Gb/s; {_NCCL}"),
    "infiniband-ndr": Link(14e-6, 50 * GB, f"NVIDIA ConnectX-7 manual: 400 Gb/s; {_NCCL}"),
    "ethernet-10g": Link(14e-6, 1.25 * GB, f"IEEE 802.3ae: 10 Gb/s; {_NCCL}"),
    "ethernet-25g": Link(14e-6, 3.125 * GB, f"IEEE 802.3by: 25 Gb/s; {_NCCL}"),
    "ethernet-100g": Link(14e-6, 12.5 * GB, f"IEEE 802.3ba: 100 Gb/s, also under RoCE; {_NCCL}"),
    "ethernet-400g": Link(14e-6, 50 * GB, f"IEEE 802.3bs: 400 Gb/s, also under RoCE; {_NCCL}"),
}
"""Peaks of what the standard carries; protocols take some percent of them. NCCL plans with one α for every network, whatever
it is: most of it is the GPU's and the library's (a ConnectX-6 takes less than 0.6 µs of it, says its manual)."""


def find_link(name: str) -> Link:
    """The link of that name. Raises: ValueError for an unknown name, with the nearest known one."""
    if name not in LINKS:
        begun = [known for known in LINKS if name and known.startswith(name)]
        near = begun or difflib.get_close_matches(name, LINKS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no link is called {name!r}.{hint} There are: {', '.join(LINKS)}. Or give Link(alpha, bandwidth).")
    return LINKS[name]


@dataclass(frozen=True)
class Message:
    """One message: from rank to rank, in bytes."""

    source: int
    target: int
    size: float


Rounds = list[list[Message]]
"""Messages that go at once, round by round."""


@dataclass(frozen=True)
class Sent:
    """What each rank sends, in rank order."""

    messages: tuple[int, ...]
    bytes: tuple[int, ...]


def rounds_of(algorithm: str, size: int, ranks: int, item: int = 1, root: int = 0) -> Rounds:
    """Every message of a collective, round by round.

    size: bytes of the whole tensor (of all a rank's parts together in all_to_all).  item: bytes of what is not split: an
    element, or a row.  root: the source of a broadcast or scatter, the target of a reduce or gather.
    Raises: ValueError for an unknown algorithm, no ranks, a size that is not whole items, or a root that is no rank.
    """
    _cost(algorithm, ranks)
    if size < 0 or item < 1 or size % item or not 0 <= root < ranks:
        raise ValueError(f"{size} bytes in items of {item} on {ranks} ranks with root {root}: size must be a multiple of "
                         f"item, root from 0 to ranks - 1.")
    if algorithm in ("broadcast_naive", "broadcast_tree", "reduce", "tree_all_reduce"):
        return _ROOTED[algorithm](size, ranks, root)
    if algorithm in ("doubling_all_reduce", "halving_all_reduce"):
        return _folded(size, ranks, item, algorithm)
    chunks = chunk_sizes(size, ranks, item)
    if algorithm in ("scatter", "gather"):
        return [[Message(root, other, chunks[other]) if algorithm == "scatter" else Message(other, root, chunks[other])]
                for other in range(ranks) if other != root]
    if algorithm == "all_to_all":
        return [[Message(rank, (rank + step) % ranks, chunks[(rank + step) % ranks]) for rank in range(ranks)]
                for step in range(1, ranks)]
    scatter = [[Message(rank, (rank + 1) % ranks, chunks[(rank - 1 - step) % ranks]) for rank in range(ranks)]
               for step in range(ranks - 1)]
    gather = [[Message(rank, (rank + 1) % ranks, chunks[(rank - step) % ranks]) for rank in range(ranks)]
              for step in range(ranks - 1)]
    return {"ring_reduce_scatter": scatter, "ring_all_gather": gather, "ring_all_reduce": scatter + gather}[algorithm]


def chunk_sizes(size: int, ranks: int, item: int = 1) -> list[int]:
    """Bytes of each rank's chunk, as torch.tensor_split cuts: the first ones have an item more where it does not divide."""
    items = size // item
    return [(items // ranks + (rank < items % ranks)) * item for rank in range(ranks)]


def traffic(rounds: Rounds, ranks: int) -> Sent:
    """Messages and bytes that each rank sends in these rounds."""
    sent = [[message.size for messages in rounds for message in messages if message.source == rank] for rank in range(ranks)]
    return Sent(tuple(map(len, sent)), tuple(map(sum, sent)))


def seconds_of(rounds: Rounds, link: Link) -> float:
    """How long the rounds take when every message has the link to itself: in each, the largest message's time."""
    return sum(link.seconds(max(message.size for message in messages)) for messages in rounds if messages)


def _broadcast_naive(size: int, ranks: int, root: int) -> Rounds:
    return [[Message(root, other, size)] for other in range(ranks) if other != root]


def _broadcast_tree(size: int, ranks: int, root: int) -> Rounds:
    """Those who have it, numbered from the root, double in every round."""
    return [[Message((mine + root) % ranks, (mine + reach + root) % ranks, size) for mine in range(min(reach, ranks - reach))]
            for reach in (1 << step for step in range(_steps(ranks)))]


def _reduce(size: int, ranks: int, root: int) -> Rounds:
    return [[Message((mine + root) % ranks, (mine - reach + root) % ranks, size) for mine in range(reach, ranks, 2 * reach)]
            for reach in (1 << step for step in range(_steps(ranks)))]


def _tree_all_reduce(size: int, ranks: int, root: int) -> Rounds:
    return _reduce(size, ranks, root) + _broadcast_tree(size, ranks, root)


_ROOTED = {"broadcast_naive": _broadcast_naive, "broadcast_tree": _broadcast_tree, "reduce": _reduce,
           "tree_all_reduce": _tree_all_reduce}


def _folded(size: int, ranks: int, item: int, algorithm: str) -> Rounds:
    """An all-reduce among the largest power of two of ranks; of the first 2(P-Q) ranks the even ones lend and get back."""
    power = 1 << (ranks.bit_length() - 1)
    pairs = ranks - power
    seats = [2 * place + 1 if place < pairs else place + pairs for place in range(power)]
    lend = [[Message(2 * pair, 2 * pair + 1, size) for pair in range(pairs)]] if pairs else []
    back = [[Message(2 * pair + 1, 2 * pair, size) for pair in range(pairs)]] if pairs else []
    distances = [1 << step for step in range(_steps(power))]
    if algorithm == "doubling_all_reduce":
        middle = [[Message(seats[place], seats[place ^ reach], size) for place in range(power)] for reach in distances]
    else:
        chunks = chunk_sizes(size, power, item)
        down = [[Message(seats[place], seats[place ^ reach], _block(chunks, place ^ reach, reach)) for place in range(power)]
                for reach in reversed(distances)]
        up = [[Message(seats[place], seats[place ^ reach], _block(chunks, place, reach)) for place in range(power)]
              for reach in distances]
        middle = down + up
    return lend + middle + back


def _block(chunks: list[int], place: int, reach: int) -> int:
    """Bytes of the aligned block of `reach` chunks around a place."""
    start = place // reach * reach
    return sum(chunks[start:start + reach])


def _steps(ranks: int) -> int:
    """⌈log2 P⌉"""
    return (ranks - 1).bit_length()


def _power(ranks: int) -> tuple[int, int, int]:
    """The largest power of two Q up to P, its logarithm, and 2 where P is not Q: the rounds that the rest needs."""
    logarithm = ranks.bit_length() - 1
    return 1 << logarithm, logarithm, 2 * (ranks != 1 << logarithm)


COSTS = {
    "broadcast_naive": lambda P: (P - 1, P - 1),
    "broadcast_tree": lambda P: (_steps(P), _steps(P)),
    "reduce": lambda P: (_steps(P), _steps(P)),
    "scatter": lambda P: (P - 1, (P - 1) / P),
    "gather": lambda P: (P - 1, (P - 1) / P),
    "ring_reduce_scatter": lambda P: (P - 1, (P - 1) / P),
    "ring_all_gather": lambda P: (P - 1, (P - 1) / P),
    "ring_all_reduce": lambda P: (2 * (P - 1), 2 * (P - 1) / P),
    "doubling_all_reduce": lambda P: (_power(P)[1] + _power(P)[2], _power(P)[1] + _power(P)[2]),
    "halving_all_reduce": lambda P: (2 * _power(P)[1] + _power(P)[2], 2 * (_power(P)[0] - 1) / _power(P)[0] + _power(P)[2]),
    "tree_all_reduce": lambda P: (2 * _steps(P), 2 * _steps(P)),
    "all_to_all": lambda P: (P - 1, (P - 1) / P),
}
"""Per algorithm and number of ranks P: rounds, and how many times n bytes pass one after another. Exact where chunks are
equal. halving_all_reduce is Rabenseifner's: recursive halving, then recursive doubling, the ring's bytes in 2·log2 P rounds."""


def predict(algorithm: str, size: float, ranks: int, link: Link) -> float:
    """Seconds: rounds·α + factor·size·β, from `COSTS`. For any size; `seconds_of(rounds_of(...))` where chunks are unequal.

    Raises: ValueError for an unknown algorithm or no ranks.
    """
    rounds, factor = _cost(algorithm, ranks)
    return rounds * link.alpha + factor * size * link.beta


def crossover(few_rounds: str, few_bytes: str, ranks: int, link: Link) -> float:
    """The size in bytes above which `few_bytes` (say ring_all_reduce) is faster than `few_rounds` (say tree_all_reduce).

    0 where it always is, infinity where it never is. Source: the two lines a + b·n of `COSTS`, which meet once.
    """
    (rounds, factor), (more_rounds, less) = _cost(few_rounds, ranks), _cost(few_bytes, ranks)
    if factor <= less:
        return math.inf
    return max(0.0, (more_rounds - rounds) / (factor - less) * link.alpha * link.bandwidth)


def _cost(algorithm: str, ranks: int) -> tuple[int, float]:
    """From `COSTS`. Raises: ValueError for an unknown algorithm, with the nearest known one, or no ranks."""
    if algorithm not in COSTS:
        near = difflib.get_close_matches(algorithm, COSTS, n=1)
        raise ValueError(f"no algorithm is called {algorithm!r}.{f' Did you mean {near[0]!r}?' if near else ''} "
                         f"There are: {', '.join(COSTS)}.")
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: at least 1 is needed.")
    return COSTS[algorithm](ranks)


def data_parallel_all_reduces(sizes: Sequence[int], bucket_bytes: int = 25 * 2 ** 20, item: int = 4) -> list[int]:
    """Bytes of every all-reduce that one step of data parallelism makes, however many microbatches it has.

    sizes: elements of each trained parameter that a rank holds, in the model's order, a tied one once.   item: bytes of a
    gradient.   The buckets (minillm/parallel/data_parallel.py), then the count of targets (int64) and the loss (float32).
    """
    buckets = [0]
    for size in (elements * item for elements in reversed(sizes)):
        if buckets[-1] and buckets[-1] + size > bucket_bytes:
            buckets.append(0)
        buckets[-1] += size
    return buckets + [8, 4]


def tensor_parallel_all_reduces(config: ModelConfig, tokens: int, item: int = 2, recompute: bool = False) -> list[int]:
    """Bytes of every all-reduce that one step of a tensor-parallel model makes, on `tokens` tokens.

    item: bytes of a number in the stream; the loss's three are of 4 or more.   recompute: whether each block runs forward
    again in backward, which sums again.   Source: arXiv:1909.08053 §3.   Left out: gradients of weights that ranks share
    (KV heads held by several, norms over one head); sequence parallelism, which sends the same bytes in other calls.
    """
    stream = tokens * config.width * item
    blocks = config.layers * (2 + 2 + 2 * recompute)  # forward, backward, forward again
    return [stream] * (blocks + 2) + [tokens * max(item, 4)] * 3  # and the embedding forward, the head backward; the loss


BUS_FACTORS = {"all_reduce": lambda P: 2 * (P - 1) / P, "reduce_scatter": lambda P: (P - 1) / P,
               "all_gather": lambda P: (P - 1) / P, "all_to_all": lambda P: (P - 1) / P,
               "broadcast": lambda P: 1.0, "reduce": lambda P: 1.0}
"""By collective: how many times its bytes the busiest link must carry, at least."""


def bus_bandwidth(collective: str, size: float, seconds: float, ranks: int) -> float:
    """Bytes per second that the links must have carried, to compare with their peak whatever the number of ranks.

    size / seconds is the algorithm's bandwidth; the factor is what the best algorithm sends of each byte. Source: nccl-tests,
    doc/PERFORMANCE.md ("busbw").   Raises: ValueError for a collective without a factor.
    """
    if collective not in BUS_FACTORS:
        raise ValueError(f"no bus bandwidth is defined for {collective!r}: choose from {', '.join(BUS_FACTORS)}.")
    return size / seconds * BUS_FACTORS[collective](ranks)


@dataclass(frozen=True)
class Fit:
    """A link from measured times, and how far it is from them."""

    link: Link
    residual: float
    """Root mean square of (α + size·β) / seconds - 1: 0.1 is ten percent off."""


def fit_link(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """α and β by least squares of the relative error, so that a message of microseconds counts as much as one of seconds.

    Raises: ValueError for fewer than two different sizes, times that are not above 0, or times that do not grow with size.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 2 or min(seconds, default=0) <= 0:
        raise ValueError(f"{len(set(sizes))} different sizes and {len(seconds)} times, the shortest "
                         f"{min(seconds, default=0)} s: a link needs a time above 0 for each size, and two different sizes.")
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    relative = torch.stack([1 / t, n / t], dim=1)  # times (α, β): what the line says over what was measured, which should be 1
    alpha, beta = torch.linalg.lstsq(relative, torch.ones_like(relative[:, :1])).solution.flatten().tolist()
    if alpha < 0:  # the nearest line from 0 on
        alpha, beta = 0.0, float((n / t).sum() / (n / t).square().sum())
    if beta <= 0:
        raise ValueError(f"times of {seconds} s for {sizes} bytes do not grow with the size: measure larger messages, or more "
                         f"often.")
    error = (alpha + n * beta) / t - 1
    return Fit(Link(alpha, 1 / beta, f"fitted to {len(t)} times"), float(error.square().mean().sqrt()))
