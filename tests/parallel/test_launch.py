"""What launch returns, and how it ends: whatever a rank does, one error that names it, in time, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minillm.parallel.collectives import ring_all_reduce
from minillm.parallel.launch import launch
from minillm.parallel.live import Ranks
from minillm.parallel.rank import choose_backend
from minillm.parallel.rank_error import RankError

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 30.0  # far above what any of these needs, so that it cannot be what ends them


def alive(pids):
    """Those of these processes that still run."""
    found = []
    for pid in pids:
        try:
            os.kill(pid, 0)
            found.append(pid)
        except ProcessLookupError:
            pass
    return found


def failing(fn, ranks=4, timeout=TIMEOUT, **options):
    """The error of a call, after the proof that its processes are gone."""
    live = Ranks(ranks, timeout=timeout, **options)
    assert len(alive(live.pids)) == ranks
    with pytest.raises(RankError) as error, live:
        live.run(fn)
    assert alive(live.pids) == []
    return error.value


def identify(me, factor):
    number = torch.full((2,), float(me.rank), device=me.device)
    dist.all_reduce(number)
    return me.rank * factor, me.size, me.device.type, number.tolist(), os.getpid(), torch.get_num_threads()


def test_results_come_in_rank_order(backend):
    results = launch(identify, 4, 10, backend=backend)
    device = "cuda" if backend == "nccl" else "cpu"
    assert [result[:4] for result in results] == [(10 * rank, 4, device, [6.0, 6.0]) for rank in range(4)]
    pids = [result[4] for result in results]
    assert len({*pids, os.getpid()}) == 5 and alive(pids) == []
    assert {result[5] for result in results} == {1}


def test_a_result_larger_than_every_buffer():
    (big,) = launch(lambda me: torch.arange(3_000_000), 1)
    assert torch.equal(big, torch.arange(3_000_000))


def test_ranks_start_from_the_same_seeds_every_time():
    def draw(me):
        import random
        return random.random(), torch.rand(1).item()
    assert len({*launch(draw, 2), *launch(draw, 2)}) == 1


def test_the_callers_surroundings_reach_the_ranks(monkeypatch, tmp_path):
    """Those of this call, not those of the server's start; a world's address in the environment is no world."""
    launch(lambda me: None, 1)
    (tmp_path / "only_here.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "host.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    monkeypatch.setenv("OF_THIS_CALL", "yes")

    def look(me):
        import only_here
        dist.barrier()
        return only_here.answer, os.getcwd(), os.environ["OF_THIS_CALL"], os.environ["RANK"]

    assert launch(look, 2) == [(42, str(tmp_path), "yes", str(rank)) for rank in range(2)]


def test_printed_text_is_kept_apart_and_shown_in_rank_order(capfd):
    def speak(me):
        for line in range(2):
            dist.barrier()
            print("line", line)
        os.write(1, b"from C\n")
        print("careful", file=sys.stderr)
    launch(speak, 3)
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"rank {rank} | {text}" for rank in range(3) for text in ("line 0", "line 1", "from C")]
    assert err == "rank 0,1,2 | careful\n"


def raises(me):
    if me.rank == 2:
        raise ZeroDivisionError("by purpose")
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_raises():
    error = failing(raises)
    line = raises.__code__.co_firstlineno
    message = str(error)
    assert message.startswith(
        f"rank 2 of 4 raised ZeroDivisionError in raises (test_launch.py:{line + 2}); ranks 0, 1 and 3 waited in all_reduce, "
        f"called by raises (test_launch.py:{line + 3}) and have been stopped. Rank 2's traceback:\n")
    assert 'raise ZeroDivisionError("by purpose")' in message and message.rstrip().endswith("ZeroDivisionError: by purpose")
    assert error.ranks == [2] and "minillm/parallel" not in message


def test_all_ranks_raise_the_same():
    error = failing(lambda me: [][me.rank])
    assert error.ranks == [0, 1, 2, 3] and str(error).count("Traceback") == 1 and "stopped" not in str(error)


@pytest.mark.parametrize("end, words", [
    (lambda: os._exit(3), "ended with exit code 3 before its function returned"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL (the system does that when memory runs out)"),
    (lambda: os.abort(), "ended by SIGABRT")], ids=["exit", "killed", "abort"])
def test_a_rank_that_dies(end, words):
    def die(me):
        if me.rank == 1:
            end()
        dist.all_reduce(torch.ones(1))
    error = failing(die)
    assert error.ranks == [1] and f"rank 1 of 4 {words}" in str(error)
    if "SIGABRT" in words:
        assert "Its last words on standard error:\nFatal Python error: Aborted" in str(error)


def test_a_rank_that_does_not_return():
    def work_for_ever(me):
        while me.rank == 1:
            pass
        dist.all_reduce(torch.ones(1))
    error = failing(work_for_ever, timeout=1.0)
    assert error.ranks == [1] and str(error).startswith("rank 1 of 4 did not return within 1 s: ranks 0, 2 and 3 waited in all_reduce")
    assert "rank 1 worked in work_for_ever (test_launch.py:" in str(error)


def test_a_rank_that_is_stopped():
    def stop(me):
        if me.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
    error = failing(stop, timeout=1.0)
    assert error.ranks == [1] and "rank 1 did not answer: stopped, or in C code" in str(error)


def in_another_order(me):
    x = torch.ones(3)
    dist.broadcast(x, 0) if me.rank == 3 else dist.all_reduce(x)


def other_shapes(me):
    dist.all_reduce(torch.ones(3 if me.rank else 4))


def leaves_early(me):
    if me.rank:
        dist.barrier()


def waits_for_nobody(me):
    if me.rank == 0:
        dist.irecv(torch.ones(1), 1).wait()


@pytest.fixture
def soon(monkeypatch):
    """Look for ranks that wait for one another after a moment, so that tests need not wait for seconds."""
    monkeypatch.setattr("minillm.parallel.live.QUIET", 0.3)
    monkeypatch.setattr("minillm.parallel.live.APART", 0.2)


def ring_without_one(me):
    if me.rank:
        ring_all_reduce(torch.ones(8), me.group)


def waits_in_backward(me):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    loss = model(torch.ones(1, 2)).sum()
    if me.rank:
        loss.backward()


@pytest.mark.parametrize("fn, words", [
    (waits_in_backward, "ranks 1, 2 and 3 waited in `loss.backward()`, called by waits_in_backward"),
    (ring_without_one, "ranks 1, 2 and 3 waited in ring_all_reduce, called by ring_without_one"),
    (in_another_order, "ranks 0, 1 and 2 waited in all_reduce, called by in_another_order"),
    (other_shapes, "rank 0 waited in all_reduce, called by other_shapes"),
    (leaves_early, "ranks 1, 2 and 3 waited in barrier, called by leaves_early"),
    (waits_for_nobody, "rank 0 waited in `dist.irecv(torch.ones(1), 1).wait()`, called by waits_for_nobody")],
    ids=lambda value: getattr(value, "__name__", ""))
def test_ranks_that_wait_for_one_another(fn, words, soon):
    """Found long before the timeout, and the call of each is named."""
    error = failing(fn)
    assert str(error).startswith("the ranks wait for one another and none can go on: ") and words in str(error)


@pytest.mark.parametrize("fn, words", [
    (in_another_order, "ranks 0, 1 and 2 called all_reduce on float32[3] in in_another_order (test_launch.py:{}); "
                       "rank 3 called broadcast on float32[3] in in_another_order (test_launch.py:{})"),
    (other_shapes, "rank 0 called all_reduce on float32[4] in other_shapes (test_launch.py:{}); "
                   "ranks 1, 2 and 3 called all_reduce on float32[3] in other_shapes (test_launch.py:{})")],
    ids=["order", "shapes"])
def test_checked_mode_compares_the_calls(fn, words):
    line = fn.__code__.co_firstlineno + (2 if fn is in_another_order else 1)
    error = failing(fn, checked=True)
    assert words.format(line, line) in str(error)


def sends_unequally(me):
    if me.rank == 0:
        for other in range(1, me.size):
            dist.send(torch.ones(1), other)
    else:
        dist.recv(torch.ones(1), 0)
    parts = [torch.zeros(1) for _ in range(me.size)]
    dist.all_gather(parts, torch.full((1,), float(me.rank)))
    some = dist.new_group([0, 1])
    dist.all_reduce(parts[0], group=some)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    dist.barrier()
    return torch.cat(parts).tolist()


def test_checked_mode_lets_correct_programs_pass():
    assert launch(sends_unequally, 3, checked=True) == [[0.0, 1.0, 2.0]] * 3


def test_in_checked_mode_a_missing_rank_is_waited_for_in_the_comparison(soon):
    assert "ranks 1, 2 and 3 waited in the comparison of checked mode, called by leaves_early" in str(failing(leaves_early, checked=True))


def test_slow_ranks_are_no_deadlock(soon):
    """One that sleeps while the others wait, one that computes, and one that answers late for its work in C."""
    def slow(me):
        if me.rank == 0:
            time.sleep(2)
        if me.rank == 1:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                torch.ones(300, 300) @ torch.ones(300, 300)
        if me.rank == 2:
            sum(range(10 ** 7))
        dist.barrier()
        return me.rank
    assert launch(slow, 4) == [0, 1, 2, 3]


def test_an_interrupt_ends_the_ranks():
    """Ctrl-C in the caller while its ranks work."""
    live = Ranks(2, timeout=TIMEOUT)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        live.run(lambda me: time.sleep(60))
    assert alive(live.pids) == []


def test_a_caller_that_is_killed_takes_its_ranks_along(tmp_path):
    program = textwrap.dedent("""
        import os, time
        from minillm.parallel.live import Ranks
        ranks = Ranks(2)
        print(*ranks.pids, flush=True)
        ranks.run(lambda me: time.sleep(100))
    """)
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    assert len(alive(pids)) == 2
    caller.kill()
    caller.wait()
    end = time.monotonic() + 20
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(pids) == []


def test_what_cannot_be_sent():
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot be sent to the ranks: .*lock.* Make inside the function"):
        launch(lambda me: lock, 1)
    with pytest.raises(RankError, match="the result, a generator, cannot be sent to the caller"):
        launch(lambda me: (number for number in range(3)), 1)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"forgetful\(\) cannot take the rank and 0 more: too many .* as in def forgetful\(me, ...\)"):
        def forgetful(): ...
        launch(forgetful, 2)
    with pytest.raises(ValueError, match="ranks = 0: at least 1"):
        launch(identify, 0)
    with pytest.raises(ValueError, match="backend = 'mpi': choose auto, gloo or nccl"):
        launch(identify, 2, backend="mpi")
    many = 1 + torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"backend = 'nccl' for {many} ranks needs {many} GPUs, and there are"):
        launch(identify, many, backend="nccl")
    assert choose_backend("auto", many) == choose_backend("gloo", 1) == "gloo"


def test_a_world_of_another_size(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="asked for 4 ranks inside a world of 2 .*start 4 with torchrun --nproc-per-node, or unset"):
        launch(identify, 4, 1)


def test_inside_a_rank_the_world_exists():
    def inner(me):
        return launch(identify, 2, 1)
    (first, second) = launch(inner, 2)
    assert first == second and [result[0] for result in first] == [0, 1]


SCRIPT = """
    import torch, torch.distributed as dist
    from minillm.parallel.launch import launch

    def double(me, x):
        total = torch.tensor([float(me.rank + 1)])
        dist.all_reduce(total)
        return me.rank, me.size, x * total.item()

    results = launch(double, 2, 10)
    assert results == [(0, 2, 30.0), (1, 2, 30.0)], results
    print("done")
"""


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert run(sys.executable, str(script)).split() == ["done"]


@pytest.mark.slow
def test_the_same_script_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)).count("done") == 2


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("ip")), reason="needs unshare and ip to take the network away")
@pytest.mark.parametrize("loopback", ["up", "down"])
def test_without_a_network(tmp_path, loopback):
    """Only the loopback interface is there; without that too, the error says what is missing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    shell = f"ip link set lo {loopback} && exec {sys.executable} {script}"
    done = subprocess.run(["unshare", "-rn", "sh", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    if "unshare failed" in done.stderr:
        pytest.skip("this user may not take the network away")
    if loopback == "up":
        assert done.stdout.split() == ["done"], done.stderr
    else:
        assert "could not connect to one another by gloo over the loopback interface lo, which must be up" in done.stderr
