"""Ranks that stay between calls, and the server that they are forked from."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from minillm.parallel import forkserver
from minillm.parallel.launch import launch
from minillm.parallel.live import Ranks
from minillm.parallel.rank_error import RankError


def count(me, step):
    me.state["sum"] = me.state.get("sum", 0) + step
    total = torch.tensor(me.state["sum"])
    dist.all_reduce(total)
    return me.state["sum"], int(total), os.getpid()


def test_state_and_processes_stay_between_calls():
    with Ranks(2) as ranks:
        first, second = ranks.run(count, 1), ranks.run(count, 10)
    assert [result[:2] for result in first] == [(1, 2)] * 2 and [result[:2] for result in second] == [(11, 22)] * 2
    assert [result[2] for result in first] == [result[2] for result in second] == ranks.pids


def test_two_sessions_at_once():
    with Ranks(2) as a, Ranks(3) as b:
        assert [r[0] for r in a.run(count, 1)] == [1, 1] and [r[0] for r in b.run(count, 2)] == [2] * 3
        assert [r[0] for r in a.run(count, 1)] == [2, 2]


def test_an_error_that_leaves_nobody_waiting_leaves_the_ranks_alive():
    def fail(me):
        me.state["kept"] = me.rank
        if me.rank == 1:
            raise KeyError("a slip of the finger")
    with Ranks(2) as ranks:
        with pytest.raises(RankError, match="rank 1 of 2 raised KeyError in fail .*; rank 0 had returned. Rank 1's"):
            ranks.run(fail)
        assert ranks.run(lambda me: me.state["kept"]) == [0, 1]


def test_an_error_that_leaves_ranks_waiting_ends_them():
    def fail(me):
        if me.rank == 1:
            raise KeyError
        dist.barrier()
    ranks = Ranks(2)
    with pytest.raises(RankError, match="rank 0 waited in barrier, called by fail .* and has been stopped"):
        ranks.run(fail)
    with pytest.raises(RuntimeError, match="these ranks have ended, after an error or by close"):
        ranks.run(fail)
    ranks.close()  # a second time does nothing


def test_a_rank_that_dies_between_calls():
    with Ranks(2) as ranks:
        ranks.run(count, 1)
        os.kill(ranks.pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 of 2 ended by SIGKILL"):
            ranks.run(count, 1)


def test_a_server_that_dies_is_replaced():
    launch(count, 2, 1)
    ranks = Ranks(2, timeout=30)
    forkserver._running.process.kill()
    with pytest.raises((RuntimeError, RankError)):
        ranks.run(lambda me: time.sleep(30))
    end = time.monotonic() + 20
    while time.monotonic() < end and any(running(pid) for pid in ranks.pids):
        time.sleep(0.05)
    assert not any(running(pid) for pid in ranks.pids)  # the ranks have noticed, or were killed as a group
    assert [result[0] for result in launch(count, 2, 1)] == [1, 1]


def running(pid):
    """Whether a process that is not ours to collect still runs: a zombie does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return os.path.exists("/proc/self") is False  # without /proc, the signal's word counts


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(forkserver, "PRELOADED", ["no_such_module_anywhere"])
    with pytest.raises(RuntimeError, match="did not start: (.|\n)*No module named 'no_such_module_anywhere'"):
        forkserver.Server()


def test_the_servers_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert launch(count, 2, 1) and list(tmp_path.iterdir()) == []


def test_file_descriptors_do_not_pile_up():
    launch(count, 2, 1)
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        launch(count, 2, 1)
    assert len(os.listdir("/dev/fd")) == before
