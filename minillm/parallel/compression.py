"""Gradients made smaller before they travel: the largest entries, a low rank, or 8 bits.

Each scheme is a pair of pure functions, and a small class that holds what it keeps between steps: `average` takes this
worker's gradient and its `Peers` and returns the same average to all. What is not sent is either added to the next gradient
(error feedback: top-k and PowerSGD, which are biased) or random with mean zero (8 bits, which is not). The error is kept in
units of the gradient; the papers multiply by the learning rate first, which is the same while it is constant.
One object per tensor. `sent` counts the bytes given to the collective; what that makes of them is its `Traffic`.
Sources: top-k: arXiv:1809.07599; error feedback: arXiv:1901.09847; PowerSGD: arXiv:1905.13727; stochastic rounding:
arXiv:1610.02132 (QSGD), with a scale per block as in arXiv:2110.02861. Left out: choosing k or the rank during training.
"""

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from minillm.parallel.peers import Peers


def largest(x: Float[Tensor, "N"], k: int) -> tuple[Float[Tensor, "K"], Int[Tensor, "K"]]:
    """The k entries of largest magnitude, and where they are.

    What is left holds at most 1 - k/N of the squared norm. Source: arXiv:1809.07599 definition 2.1.
    Raises: ValueError unless k is from 1 to N.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"k = {k} of {len(x)} entries: choose from 1 to {len(x)}.")
    places = x.abs().topk(k).indices
    return x[places], places


def spread(values: Float[Tensor, "K"], places: Int[Tensor, "K"], size: int) -> Float[Tensor, "N"]:
    """Zeros with the values at their places. Values for the same place add up."""
    return values.new_zeros(size).index_add_(0, places, values)


def orthogonalise(matrix: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
    """Columns of length 1 at right angles that span the same (Gram-Schmidt). A column that adds nothing becomes 0.

    A column is taken to add nothing when all but 1e-6 of it (1e-12 in float64) lay in those before it.
    """
    done = []
    for column in matrix.unbind(1):
        least = column.norm() * (1e-12 if matrix.dtype == torch.float64 else 1e-6)
        for _ in range(2):  # twice: rounding leaves something after the first
            for other in done:
                column = column - (other @ column) * other
        norm = column.norm()
        done.append(column / norm if norm > least else torch.zeros_like(column))
    return torch.stack(done, dim=1)


def power_step(matrix: Float[Tensor, "N M"], q: Float[Tensor, "M R"],
               peers: Peers) -> tuple[Float[Tensor, "N R"], Float[Tensor, "M R"]]:
    """(P, Q) with P Qᵀ near the mean of all workers' matrices: one step of the power method from the given q.

    Only M·q and Mᵀ·P are averaged, and both are linear in M: the result is that of the mean matrix, which nobody holds.
    Cost: two means, of (N + M)·R elements together. Source: arXiv:1905.13727, algorithm 1.
    """
    p = orthogonalise(peers.mean(matrix @ q))
    return p, peers.mean(matrix.T @ p)


def quantise(x: Float[Tensor, "N"], block: int,
             generator: torch.Generator) -> tuple[Int8[Tensor, "N"], Float[Tensor, "blocks"]]:
    """Whole numbers from -127 to 127 and a scale for each block, so that code · scale is x on average.

    Each number is rounded up with the probability of its fraction: wrong by less than a scale (the block's largest / 127),
    right in the mean.   Raises: ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block = {block}: at least 1 is needed.")
    rows = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
    scales = rows.abs().amax(1) / 127
    steps = rows / torch.where(scales > 0, scales, 1)[:, None]
    up = torch.rand(rows.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return (steps + up).floor().clamp(-127, 127).to(torch.int8).view(-1)[:len(x)], scales


def dequantise(codes: Int8[Tensor, "*P N"], scales: Float[Tensor, "*P blocks"], block: int) -> Float[Tensor, "*P N"]:
    """code · scale of its block."""
    return codes * scales.repeat_interleave(block, dim=-1)[..., :codes.shape[-1]]


class TopK:
    """Every worker sends its k largest entries; with feedback it keeps the rest and adds it to its next gradient.

    Cost: two gathers, of k elements and k places of 4 bytes, from every worker: what a worker receives grows with P.
    """

    def __init__(self, k: int, feedback: bool = True):
        self.k, self.feedback, self.sent = k, feedback, 0
        self.error: Tensor | None = None

    def average(self, gradient: Float[Tensor, "*shape"], peers: Peers) -> Float[Tensor, "*shape"]:
        """The mean over workers of what each sent."""
        x = gradient.flatten() if self.error is None else gradient.flatten() + self.error
        values, places = largest(x, self.k)
        if self.feedback:
            self.error = x - spread(values, places, len(x))
        self.sent += self.k * (values.element_size() + 4)
        values, places = peers.gather(values), peers.gather(places.to(torch.int32))
        return (spread(values.flatten(), places.flatten(), len(x)) / peers.size).view_as(gradient)


class PowerSGD:
    """Every worker's matrix as one product of thin ones, found together; each starts from the last step's Q.

    Tensors of more dimensions are matrices of their first against the others. Vectors, and matrices that would not get
    smaller, are averaged whole. Q starts from `seed`, the same on every worker.
    Cost: means of (N + M)·R elements for a matrix of N × M, whatever P. Source: arXiv:1905.13727, algorithms 1 and 2.
    Differs from the paper: the error is that of the average, not of the worker's own share; torch's hook does the same.
    """

    def __init__(self, rank: int, seed: int = 0, feedback: bool = True, warm: bool = True):
        if rank < 1:
            raise ValueError(f"rank = {rank}: at least 1 is needed.")
        self.rank, self.feedback, self.warm, self.sent = rank, feedback, warm, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.q: Tensor | None = None
        self.error: Tensor | None = None

    def average(self, gradient: Float[Tensor, "*shape"], peers: Peers) -> Float[Tensor, "*shape"]:
        """P Qᵀ for the mean of all workers' gradients and errors."""
        size = gradient.element_size()
        if gradient.dim() < 2 or not self._smaller(gradient):
            self.sent += gradient.numel() * size
            return peers.mean(gradient)
        matrix = gradient.flatten(1) if self.error is None else gradient.flatten(1) + self.error
        rows, columns = matrix.shape
        if self.q is None or not self.warm:
            self.q = torch.randn(columns, min(self.rank, rows, columns), generator=self.generator).to(matrix)
        p, self.q = power_step(matrix, self.q, peers)
        result = p @ self.q.T
        if self.feedback:
            self.error = matrix - result
        self.sent += (p.numel() + self.q.numel()) * size
        return result.view_as(gradient)

    def _smaller(self, gradient: Tensor) -> bool:
        rows, columns = gradient.flatten(1).shape
        return (rows + columns) * min(self.rank, rows, columns) < rows * columns


class EightBit:
    """Every worker sends a byte an entry and a scale a block. Right in the mean, so it keeps no error.

    Cost: two gathers, of N bytes and of ⌈N / block⌉ scales. Each worker needs a generator of its own: errors that are
    drawn apart partly cancel in the mean. Left out: 8 bits also for a sum that goes round a ring.
    """

    def __init__(self, generator: torch.Generator, block: int = 256):
        self.generator, self.block, self.sent = generator, block, 0

    def average(self, gradient: Float[Tensor, "*shape"], peers: Peers) -> Float[Tensor, "*shape"]:
        """The mean over workers of what each sent."""
        codes, scales = quantise(gradient.flatten(), self.block, self.generator)
        self.sent += codes.numel() + scales.numel() * scales.element_size()
        return dequantise(peers.gather(codes), peers.gather(scales), self.block).mean(0).view_as(gradient)
