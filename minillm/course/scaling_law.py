"""A scaling law: the loss that a model of N parameters reaches after D tokens, fitted to runs and asked about others.

    L(N, D) = E + A / N^alpha + B / D^beta

E is what no model can get below (the text's entropy), the second term what a model of this size lacks, the third what it
has not read. With C = 6 N D FLOPs to spend, the two terms are traded against each other, and one size is the best.
Every run that is fitted needs a schedule that ends with its own D. Source: arXiv:2203.15556 §3.3 and appendix D.3.
Differs from the paper: N and D are divided by their geometric means first, so that 18 starts do what 4,500 did.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product

import torch
from torch import Tensor

Run = tuple[float, float, float]
"""Parameters, tokens, loss in nats a token."""


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss that the law expects, in nats a token."""
        return self.E + self.A / parameters ** self.alpha + self.B / tokens ** self.beta

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) with the lowest loss among all with 6 · parameters · tokens = flops.

        N = G (C/6)^a and D = (C/6)^b / G, with a = beta / (alpha + beta), b = alpha / (alpha + beta) and
        G = (alpha A / (beta B))^(1 / (alpha + beta)): there the two terms' slopes in ln N cancel.
        """
        both = self.alpha + self.beta
        factor = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return factor * (flops / 6) ** (self.beta / both), (flops / 6) ** (self.alpha / both) / factor


CHINCHILLA = ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
"""What the paper prints (arXiv:2203.15556, equation 10); the exponents are rounded, and a budget far away feels that."""
CHINCHILLA_REFITTED = ScalingLaw(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
"""Fitted again to 240 points read off the paper's figure 4; agrees with the paper's other two approaches (arXiv:2404.10102)."""


def fit_scaling_law(runs: Sequence[Run], floor: float | None = None, start: ScalingLaw | None = None,
                    delta: float = 1e-3) -> ScalingLaw:
    """The law whose logarithm is nearest to that of the measured losses, by the Huber loss: a bad run does not pull it far.

    floor: E, when it is known; None fits it too.   start: where to begin, instead of a grid of starts (to refit quickly).
    delta: the error in ln L up to which the Huber loss is a square.
    Raises: ValueError for fewer runs than constants, fewer than two sizes or lengths, or losses that are not above the floor.
    """
    _check(runs, floor)
    sizes, lengths, losses = torch.tensor(runs, dtype=torch.float64).log().unbind(1)
    middle, between = sizes.mean(), lengths.mean()
    parts = (sizes - middle, lengths - between, losses)
    starts = [_logs(start, float(middle), float(between))] if start else _grid(float(losses.exp().min()), float(losses.exp().mean()))
    fitted = [_descend(point, parts, floor, delta) for point in starts]
    _, (e, a, alpha, b, beta) = min((one for one in fitted if math.isfinite(one[0])), key=lambda one: one[0])
    return ScalingLaw(math.exp(e) if floor is None else floor, math.exp(a + alpha * float(middle)), alpha,
                      math.exp(b + beta * float(between)), beta)


def residuals(law: ScalingLaw, runs: Sequence[Run]) -> list[float]:
    """ln(measured / expected) of every run: 0.01 is a loss one percent above the law."""
    return [math.log(loss / law.loss(parameters, tokens)) for parameters, tokens, loss in runs]


def leave_one_out(runs: Sequence[Run], floor: float | None = None) -> list[ScalingLaw]:
    """The laws fitted without the first run, without the second, and so on: how much one run decides."""
    whole = fit_scaling_law(runs, floor)
    return [fit_scaling_law([*runs[:i], *runs[i + 1:]], floor, start=whole) for i in range(len(runs))]


def _descend(start: tuple[float, ...], parts: tuple[Tensor, Tensor, Tensor], floor: float | None,
             delta: float) -> tuple[float, list[float]]:
    """L-BFGS from one start: the Huber loss at the end, and (ln E, ln A, alpha, ln B, beta)."""
    sizes, lengths, losses = parts
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([point], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        e, a, alpha, b, beta = point
        e = e if floor is None else torch.full_like(e, math.log(floor))
        expected = torch.stack((e.expand_as(sizes), a - alpha * sizes, b - beta * lengths)).logsumexp(0)  # ln(E + A/… + B/…)
        error = torch.nn.functional.huber_loss(expected, losses, reduction="sum", delta=delta) / delta ** 2
        error.backward()
        return error

    optimizer.step(closure)
    return float(closure().detach()), point.tolist()


def _grid(lowest: float, mean: float) -> list[tuple[float, ...]]:
    """Starts: the floor at two shares of the lowest loss, the rest of the mean in equal parts, exponents from 0.2 to 1."""
    return [(math.log(share * lowest), math.log((mean - share * lowest) / 2), alpha, math.log((mean - share * lowest) / 2), beta)
            for share, alpha, beta in product((0.3, 0.8), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))]


def _logs(law: ScalingLaw, middle: float, between: float) -> tuple[float, ...]:
    """A law as a point of the search, at the runs' geometric means."""
    E, A, alpha, B, beta = astuple(law)
    return math.log(E), math.log(A) - alpha * middle, alpha, math.log(B) - beta * between, beta


def _check(runs: Sequence[Run], floor: float | None) -> None:
    constants = 5 if floor is None else 4
    sizes, lengths = {run[0] for run in runs}, {run[1] for run in runs}
    if len(runs) < constants or len(sizes) < 2 or len(lengths) < 2:
        raise ValueError(f"{len(runs)} runs of {len(sizes)} sizes and {len(lengths)} lengths do not determine {constants} constants. "
                         f"Train at least {constants}, at two sizes and two lengths or more.")
    lowest = min(run[2] for run in runs)
    if lowest <= (floor or 0):
        raise ValueError(f"the lowest loss is {lowest} and the floor {floor or 0}: every loss must be above it. "
                         f"Is the floor in nats a token, as the losses are?")
