"""A parameter server: one keeps the parameters, workers pull them, push gradients, and need not wait for one another.

`ParameterServer` is what the server decides, without communication: which gradients count, who may go on. `simulate_clock`
drives it in one process by a clock of its own, the same every time; `serve` and `work` drive it between ranks with send and
receive, where a worker that dies or falls silent is noticed and named. Three ways: synchronous (all gradients of a step make
one update); bounded staleness (a gradient counts at once, and nobody starts more than s steps ahead of the slowest);
asynchronous (s = infinity). Unlike an all-reduce, all bytes pass one rank: P times the gradient comes in at every step.
Sources: Li et al., "Scaling Distributed Machine Learning with the Parameter Server" (2014); stale synchronous parallel: Ho
et al. (2013). Left out: several servers with a part each, compressed pushes, workers that join late.
"""

import contextlib
import heapq
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from minillm.parallel.collectives import Traffic
from minillm.parallel.rank import Rank

Gradient = Callable[[Tensor, int, int], Tensor]
"""(parameters, worker, step) -> the gradient of that worker's batch there."""
TAG = 8  # keeps these messages apart from those of other code between the same ranks


@dataclass(frozen=True)
class Update:
    """One change of the parameters."""

    workers: tuple[int, ...]
    """Whose gradients: one, or all of a synchronous step."""
    staleness: int
    """Updates that others made between this worker's pull and its push."""
    seconds: float
    """Since the start."""
    loss: float | None
    """Afterwards, where the server was given a loss."""


@dataclass(frozen=True)
class Result:
    """What a run ends with. lost: workers that did not reach the end, and why."""

    parameters: Tensor
    updates: list[Update]
    lost: dict[int, str]

    def staleness(self) -> dict[int, int]:
        """How many updates had each staleness."""
        return dict(sorted(Counter(update.staleness for update in self.updates).items()))


class ParameterServer:
    """The parameters, each worker's clock (steps that it has pushed), and the rule for who may go on.

    staleness: None for synchronous steps; else a worker starts a step only when it is at most so many ahead of the slowest.
    A gradient of one worker is applied with lr / workers, so that a step of all of them moves as far as a synchronous one. But
    while they are at different steps, the faster ones' data count for more: workers should draw from the same data.
    Between a pull and a push, others make at most (2·staleness + 1)·(workers - 1) updates.
    Raises: ValueError below 1 worker or 1 step, or for a negative staleness.
    """

    def __init__(self, parameters: Float[Tensor, "N"], workers: int, lr: float, steps: int, staleness: float | None = None,
                 loss: Callable[[Tensor], float] | None = None):
        if workers < 1 or steps < 1 or (staleness is not None and not staleness >= 0):
            raise ValueError(f"workers = {workers}, steps = {steps}, staleness = {staleness}: the first two must be at least 1, "
                             f"the third None or at least 0.")
        self.parameters, self.workers, self.lr, self.steps = parameters.clone(), workers, lr, steps
        self.synchronous, self.bound, self.loss = staleness is None, 0 if staleness is None else staleness, loss
        self.updates: list[Update] = []
        self.lost: dict[int, str] = {}
        self.clocks = dict.fromkeys(range(workers), 0)  # of the workers that are not lost
        self._pulled = dict.fromkeys(range(workers), 0)  # updates that were in what each has
        self._waiting = set(range(workers))
        self._held: dict[int, Tensor] = {}  # a synchronous step's gradients so far

    @property
    def done(self) -> bool:
        """Whether every worker that is not lost has pushed all its steps."""
        return all(clock == self.steps for clock in self.clocks.values())

    def ready(self) -> list[int]:
        """The workers that wait for an answer and may have one now; asking makes them wait no longer."""
        slowest = min(self.clocks.values(), default=0)
        going = [worker for worker in sorted(self._waiting) if self.clocks[worker] - slowest <= self.bound]
        for worker in going:
            self._waiting.remove(worker)
            self._pulled[worker] = len(self.updates)
        return going

    def push(self, worker: int, gradient: Float[Tensor, "N"], seconds: float = 0.0) -> None:
        """A worker's gradient has arrived. Raises: ValueError if it was lost, or has not been answered since its last."""
        if worker not in self.clocks or worker in self._waiting or self.clocks[worker] == self.steps:
            raise ValueError(f"worker {worker} cannot push now: it is lost, waits for an answer, or has made its {self.steps} "
                             f"steps.")
        self.clocks[worker] += 1
        self._waiting.add(worker)
        if self.synchronous:
            self._held[worker] = gradient
            self._close_step(seconds)
        else:
            self._apply((worker,), gradient * (self.lr / self.workers), seconds)

    def drop(self, worker: int, why: str, seconds: float = 0.0) -> None:
        """Go on without a worker. What it pushed for an open synchronous step still counts."""
        self.lost[worker] = why
        del self.clocks[worker]
        self._waiting.discard(worker)
        if self.synchronous:
            self._close_step(seconds)

    def result(self) -> Result:
        """The parameters, what was done, who was lost."""
        return Result(self.parameters, self.updates, self.lost)

    def _close_step(self, seconds: float) -> None:
        """Update with the mean, once everybody who is left has pushed."""
        if self._held and self._waiting >= self.clocks.keys():
            workers = tuple(sorted(self._held))
            self._apply(workers, torch.stack([self._held[worker] for worker in workers]).mean(0) * self.lr, seconds)
            self._held.clear()

    def _apply(self, workers: tuple[int, ...], step: Tensor, seconds: float) -> None:
        staleness = len(self.updates) - self._pulled[workers[0]]
        self.parameters = self.parameters - step  # a new tensor: those that workers hold stay as they were
        self.updates.append(Update(workers, staleness, seconds, self.loss(self.parameters) if self.loss else None))


def simulate_clock(server: ParameterServer, gradient: Gradient, duration: Callable[[int, int], float],
                   patience: float = math.inf) -> Result:
    """Run the workers by a clock that only counts. duration: (worker, step) -> seconds from a pull to the push.

    A worker that takes longer than `patience` is lost then, as in `serve`. Messages take no time. Of two pushes at the same
    time the lower worker's is first.
    """
    events, now = [], 0.0  # (time, worker, the parameters it has, or None: lost)
    while True:
        for worker in server.ready():
            if server.clocks[worker] < server.steps:
                took = duration(worker, server.clocks[worker])
                event = (now + took, worker, server.parameters) if took <= patience else (now + patience, worker, None)
                heapq.heappush(events, event)
        if not events:
            return server.result()
        now, worker, parameters = heapq.heappop(events)
        if parameters is None:
            server.drop(worker, f"silent for {patience:g} s", now)
        else:
            server.push(worker, gradient(parameters, worker, server.clocks[worker]), now)


def train_with_server(me: Rank, server: ParameterServer, gradient: Gradient, patience: float = 30.0,
          traffic: Traffic | None = None) -> Result | None:
    """On every rank: rank 0 serves, rank r is worker r - 1. Returns the result on rank 0, None elsewhere.

    Raises: ValueError unless there is one rank more than workers.
    """
    if me.size != server.workers + 1:
        raise ValueError(f"{server.workers} workers and a server need {server.workers + 1} ranks, and there are {me.size}.")
    if me.rank == 0:
        return serve(me, server, patience, traffic)
    work(me, server.parameters, gradient, traffic)
    return None


def work(me: Rank, like: Float[Tensor, "N"], gradient: Gradient, traffic: Traffic | None = None) -> int:
    """A worker: pull, compute, push, until the server says that it is enough. Returns the steps made.

    like: a tensor of the parameters' size and dtype, on the CPU.
    Cost: sends N elements a step; receives N + 1, the first of which says whether to go on, and at the end once more.
    """
    answer, step = like.new_empty(len(like) + 1), 0
    while True:
        dist.recv(answer, 0, me.group, TAG)
        if not answer[0]:
            return step
        pushed = gradient(answer[1:].clone(), me.rank - 1, step).contiguous()
        dist.send(pushed, 0, me.group, TAG)
        _count(traffic, pushed)
        step += 1


def serve(me: Rank, server: ParameterServer, patience: float = 30.0, traffic: Traffic | None = None) -> Result:
    """The server, on rank 0. A worker is lost when its connection breaks or it is silent for `patience` seconds; the rest go on.

    A thread for each worker waits for its pushes: to wait with a time limit would end all of gloo's connections. A worker that
    was only slow is told to stop when it comes back; do not use a rank that never did for other work with the server.
    """
    inbox, dismissed, begin = queue.Queue(), set(), time.monotonic()
    due: dict[int, float] = {}  # when a worker's silence becomes too long
    sending: dict[int, dist.Work] = {}
    for worker in range(server.workers):
        threading.Thread(target=_listen, args=(me, worker, server, inbox, dismissed), daemon=True).start()
    while True:
        for worker in server.ready():
            going = server.clocks[worker] < server.steps
            due[worker] = time.monotonic() + patience if going else math.inf
            with contextlib.suppress(RuntimeError):  # a broken connection: its listener says so
                sending[worker] = _answer(me, worker, server.parameters, going, traffic)
        if server.done:
            break
        for worker, message in _next(inbox, due, patience):
            due[worker], seconds = math.inf, time.monotonic() - begin
            if worker in server.clocks and isinstance(message, Tensor):
                server.push(worker, message, seconds)
            elif worker in server.clocks:
                dismissed.add(worker)
                server.drop(worker, message, seconds)
            elif isinstance(message, Tensor):  # it was on its way when the server gave up
                sending[worker] = _answer(me, worker, server.parameters, False, traffic)
    for worker in server.clocks:
        with contextlib.suppress(RuntimeError, KeyError):  # who dies now has done all its steps
            sending[worker].wait(timedelta(seconds=patience))
    return server.result()


def _next(inbox: queue.Queue, due: dict[int, float], patience: float) -> Iterable[tuple[int, Tensor | str]]:
    """The next message, or those workers that have been silent for too long."""
    wait = min(due.values()) - time.monotonic()
    try:
        return [inbox.get(timeout=max(0.0, min(wait, threading.TIMEOUT_MAX)))]
    except queue.Empty:
        now = time.monotonic()
        return [(worker, f"silent for {patience:g} s") for worker, moment in due.items() if moment <= now]


def _listen(me: Rank, worker: int, server: ParameterServer, inbox: queue.Queue, dismissed: set[int]) -> None:
    """Pass on a worker's gradients, and the end of its connection."""
    try:
        for _ in range(server.steps):
            gradient = torch.empty_like(server.parameters)
            dist.recv(gradient, worker + 1, me.group, TAG)
            if worker in dismissed:
                _answer(me, worker, server.parameters, False, None).wait()
                return
            inbox.put((worker, gradient))
    except RuntimeError:
        inbox.put((worker, "its connection broke"))


def _answer(me: Rank, worker: int, parameters: Tensor, going: bool, traffic: Traffic | None) -> dist.Work:
    """Start to send a worker the parameters, and whether to go on. Raises: RuntimeError if it is gone."""
    answer = torch.cat([parameters.new_tensor([going]), parameters])
    sending = dist.isend(answer, worker + 1, me.group, TAG)
    _count(traffic, answer)
    return sending


def _count(traffic: Traffic | None, sent: Tensor) -> None:
    if traffic is not None:
        traffic.messages += 1
        traffic.bytes += sent.numel() * sent.element_size()
