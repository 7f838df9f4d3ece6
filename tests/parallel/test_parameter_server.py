import json
import math
import os
import random
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

from minillm.parallel.collectives import Traffic
from minillm.parallel.launch import launch
from minillm.parallel.parameter_server import ParameterServer, serve, simulate_clock, train_with_server, work

F64 = torch.float64
DATA = torch.randn(160, 20, generator=torch.Generator().manual_seed(0), dtype=F64)
WANTED = DATA.sum(1) + torch.randn(160, generator=torch.Generator().manual_seed(1), dtype=F64)
START = torch.zeros(20, dtype=F64)
BEST = float((DATA @ torch.linalg.lstsq(DATA, WANTED[:, None]).solution[:, 0] - WANTED).square().mean())


def _loss(w: torch.Tensor) -> float:
    """Above the best possible; 20 at the start."""
    return float((DATA @ w - WANTED).square().mean()) - BEST


def _gradient(w: torch.Tensor, worker: int, step: int) -> torch.Tensor:
    """Of 16 rows that worker and step determine."""
    rows = torch.randint(160, (16,), generator=torch.Generator().manual_seed(1000 * worker + step))
    return DATA[rows].T @ (DATA[rows] @ w - WANTED[rows]) / 8


def _by_hand(workers: list[int], steps: range, w: torch.Tensor) -> torch.Tensor:
    """Plain SGD on the workers' mean gradient."""
    for step in steps:
        w = w - 0.05 * sum(_gradient(w, worker, step) for worker in workers) / len(workers)
    return w


def _server(workers: int, steps: int, staleness: float | None) -> ParameterServer:
    return ParameterServer(START, workers, 0.05, steps, staleness, _loss)


def _straggling(worker: int, step: int) -> float:
    return [1, 1, 1.1, 3][worker]


def test_synchronous_steps_are_sgd():
    result = simulate_clock(_server(4, 30, None), _gradient, _straggling)
    torch.testing.assert_close(result.parameters, _by_hand([0, 1, 2, 3], range(30), START), rtol=1e-12, atol=1e-12)  # order of sums
    assert result.staleness() == {0: 30} and all(update.workers == (0, 1, 2, 3) for update in result.updates)
    assert [update.seconds for update in result.updates] == pytest.approx([3 * (i + 1) for i in range(30)])  # the slowest's pace


def test_no_step_ahead_is_a_barrier():
    """At staleness 0 all compute at the same parameters, and four gradients at a quarter each are one synchronous step."""
    result = simulate_clock(_server(4, 30, 0), _gradient, _straggling)
    torch.testing.assert_close(result.parameters, _by_hand([0, 1, 2, 3], range(30), START), rtol=1e-12, atol=1e-12)  # order of sums
    assert result.staleness() == {0: 30, 1: 30, 2: 30, 3: 30}


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_bound_holds_whatever_the_speeds(staleness):
    """Nobody starts more than s ahead of the slowest; and others make at most (2s+1)(P-1) updates between a pull and a push."""
    draw, most = random.Random(0), 0
    for _ in range(20):
        server, ahead = _server(3, 12, staleness), []

        def gradient(w: torch.Tensor, worker: int, step: int) -> torch.Tensor:
            ahead.append(step - min(server.clocks.values()))
            return torch.zeros_like(w)

        result = simulate_clock(server, gradient, lambda worker, step: draw.choice([0.1, 1, 5]))
        assert len(result.updates) == 36 and max(ahead) <= staleness
        seconds = [update.seconds for update in result.updates]
        assert seconds == sorted(seconds)
        most = max(most, *result.staleness())
    assert staleness < most <= (2 * staleness + 1) * 2
    unbounded = simulate_clock(_server(3, 12, math.inf), _gradient, lambda worker, step: [1, 1, 20][worker])
    assert max(unbounded.staleness()) == 24  # the slow one's first gradient comes after all of the others'


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_staleness_lowers_the_largest_learning_rate(workers):
    """Equal workers take turns: all gradients are τ = P - 1 updates old. On λw²/2 that is w' = w - lr·λ·w(τ ago), which shrinks
    when lr·λ < 2 sin(π / (4τ + 2)) and grows above. Source: Levin and May, "A note on difference-delay equations" (1976)."""
    limit = 2 * math.sin(math.pi / (4 * (workers - 1) + 2))

    def end(share: float) -> float:
        server = ParameterServer(torch.ones(1, dtype=F64), workers, share * limit * workers, 400, math.inf)  # it splits lr
        result = simulate_clock(server, lambda w, worker, step: w, lambda worker, step: 1.0)
        assert {update.staleness for update in result.updates[workers:]} == {workers - 1}
        return abs(float(result.parameters))

    assert end(0.95) < 0.1 and end(1.05) > 10  # five percent to either side, in 400 steps of each


def test_who_need_not_wait_for_a_straggler_learns_sooner():
    """Seconds of the clock until the loss is below 0.5, with one worker of four three times slower: 60 in step, 24 without."""
    results = {bound: simulate_clock(_server(4, 60, bound), _gradient, _straggling) for bound in (None, 0, 1, 4, math.inf)}
    reached = {bound: next(update.seconds for update in result.updates if update.loss < 0.5) for bound, result in results.items()}
    assert reached[None] >= reached[0] > reached[1] > reached[4] > 1.5 * reached[math.inf]
    assert all(0 < result.updates[-1].loss < 0.05 for result in results.values())  # measured 0.019 for each
    again = simulate_clock(_server(4, 60, 4), _gradient, _straggling)
    assert again.updates == results[4].updates  # to the bit: the clock only counts


@pytest.mark.parametrize("staleness", [None, 1])
def test_a_silent_worker_is_lost_and_the_others_go_on(staleness):
    def duration(worker: int, step: int) -> float:
        return math.inf if (worker, step) == (2, 5) else 1.0

    result = simulate_clock(_server(3, 10, staleness), _gradient, duration, patience=4)
    assert result.lost == {2: "silent for 4 s"}
    if staleness is None:
        expected = _by_hand([0, 1], range(5, 10), _by_hand([0, 1, 2], range(5), START))
        torch.testing.assert_close(result.parameters, expected, rtol=1e-12, atol=1e-12)  # order of sums
        assert [update.seconds for update in result.updates] == pytest.approx([1, 2, 3, 4, 5, 9, 10, 11, 12, 13])
    else:
        assert len(result.updates) == 10 + 10 + 5 and result.updates[-1].loss < _loss(START)
    nobody = simulate_clock(_server(2, 3, staleness), _gradient, lambda worker, step: math.inf, patience=1)
    assert set(nobody.lost) == {0, 1} and nobody.updates == [] and torch.equal(nobody.parameters, START)


def test_what_cannot_be_served():
    for arguments in ((0, 1, None), (1, 0, None), (1, 1, -1), (1, 1, math.nan)):
        with pytest.raises(ValueError, match="must be at least 1"):
            _server(*arguments)
    server = _server(2, 1, None)
    with pytest.raises(ValueError, match="worker 0 cannot push now"):
        server.push(0, START)  # it has nothing yet
    server.ready()
    server.drop(1, "gone")
    with pytest.raises(ValueError, match="worker 1 cannot push now"):
        server.push(1, START)


def _train(me, steps: int, staleness: float | None):
    traffic = Traffic()
    return train_with_server(me, _server(me.size - 1, steps, staleness), _gradient, 60.0, traffic), traffic


@pytest.mark.parametrize("staleness", [None, 0, 2, math.inf])
def test_on_ranks(staleness):
    """In step the same as SGD, and otherwise as good; the bytes of the Cost line on both sides."""
    (result, served), *workers = launch(_train, 4, 60, staleness)
    assert result.lost == {} and len(result.updates) == (60 if staleness is None else 180)
    if staleness in (None, 0):
        # float64: sums in another order; at staleness 0 in whichever the pushes came
        torch.testing.assert_close(result.parameters, _by_hand([0, 1, 2], range(60), START), rtol=1e-10, atol=1e-10)
    if staleness not in (None, math.inf):
        assert max(result.staleness()) <= (2 * staleness + 1) * 2
    assert 0 < result.updates[-1].loss < 0.05  # in step 0.02; the scatter is that of the batches
    for nothing, sent in workers:
        assert nothing is None and (sent.messages, sent.bytes) == (60, 60 * 20 * 8)
    assert (served.messages, served.bytes) == (3 * 61, 3 * 61 * 21 * 8)


class _Leaves(Exception):
    pass


@pytest.mark.parametrize(("how", "staleness", "patience"), [
    ("breaks", None, 60), ("breaks", 1, 60), ("says nothing", None, 2), ("is slow", 1, 2)])
def test_a_rank_that_is_lost(how, staleness, patience, tmp_path):
    """Worker 1 leaves in its fourth step; the server names it, and the others make all their steps. A slow one is told to stop."""
    given_up = tmp_path / "given up"

    class Telling(ParameterServer):
        def drop(self, *args) -> None:
            super().drop(*args)
            given_up.touch()

    def gradient(w: torch.Tensor, worker: int, step: int) -> torch.Tensor:
        if (worker, step) == (1, 3) and how != "is slow":
            raise _Leaves
        while (worker, step) == (1, 3) and not given_up.exists():
            time.sleep(0.01)
        return _gradient(w, worker, step)

    def run(me):
        dist.barrier(me.group)  # patience begins when all are there
        if me.rank == 0:
            return serve(me, Telling(START, 2, 0.05, 8, staleness), patience)
        try:
            return work(me, START, gradient)
        except _Leaves:
            if how == "breaks":
                me.group = None  # the last that holds the connections
                dist.destroy_process_group()
            return "left"

    result, stayed, left = launch(run, 3)
    assert result.lost == {1: "its connection broke" if how == "breaks" else "silent for 2 s"}
    assert stayed == 8 and left == (4 if how == "is slow" else "left")
    if staleness is None:
        expected = _by_hand([0], range(3, 8), _by_hand([0, 1], range(3), START))
        torch.testing.assert_close(result.parameters, expected, rtol=1e-12, atol=1e-12)  # order of sums
    else:
        assert len(result.updates) == 8 + 3


def test_a_process_that_dies(tmp_path):
    """Not under launch, which ends all ranks when one dies: three processes, of which one exits in the middle of a step."""
    script = textwrap.dedent("""
        import json, os, sys, torch, torch.distributed as dist
        from minillm.parallel.parameter_server import ParameterServer, train_with_server
        from minillm.parallel.rank import join_world
        rank = 2 if os.fork() == 0 else 1 if os.fork() == 0 else 0
        me = join_world(rank, 3, "gloo", 60, False, rank, dist.FileStore(sys.argv[1], 3))

        def gradient(w, worker, step):
            if (worker, step) == (1, 2):
                os._exit(9)
            return torch.ones_like(w)

        result = train_with_server(me, ParameterServer(torch.zeros(4), 2, 0.1, 6), gradient, 30.0)
        if rank == 0:
            print(json.dumps([result.lost, len(result.updates), result.parameters.tolist()]), flush=True)
        os._exit(0)
    """)
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], capture_output=True, text=True, timeout=120,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ran.returncode == 0, ran.stderr
    lost, updates, parameters = json.loads(ran.stdout)
    assert lost == {"1": "its connection broke"} and updates == 6 and parameters == pytest.approx([-0.6] * 4)  # float32 rounding


def test_ranks_and_workers_must_match():
    with pytest.raises(Exception, match="3 workers and a server need 4 ranks, and there are 2"):
        launch(lambda me: train_with_server(me, _server(3, 1, None), _gradient), 2)
