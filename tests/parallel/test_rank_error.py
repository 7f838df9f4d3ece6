"""Messages from records of calls, without processes."""

import sys
import sysconfig
import traceback

import torch

from minillm.parallel.places import OURS, Frame, frames_of, place, several, together, users_frame, waiting_call, whereabouts
from minillm.parallel.rank import Failure
from minillm.parallel.rank_error import Call

DISTRIBUTED = torch.distributed.__path__[0] + "/distributed_c10d.py"
WRAPPER = torch.distributed.__path__[0] + "/c10d_logger.py"
WAITING = [Frame(DISTRIBUTED, 9, "_inner"), Frame(DISTRIBUTED, 8, "all_reduce"), Frame(WRAPPER, 7, "wrapper"),
           Frame("/a/train.py", 12, "step"), Frame("/a/train.py", 30, "loop")]
WORKING = [Frame(sysconfig.get_path("stdlib") + "/random.py", 3, "shuffle"), Frame("/tmp/ipykernel_12/34.py", 5, "step")]


def test_the_innermost_frame_of_the_users_own_code():
    assert users_frame(WAITING) == 3 and users_frame(WORKING) == 1
    assert users_frame([Frame(OURS + "/parallel/data_parallel.py", 1, "hook"), *WAITING]) == 0
    assert users_frame([Frame(OURS + "/parallel/rank.py", 1, "_call"), *WAITING]) is None and users_frame([]) is None


def test_places_in_words():
    assert whereabouts(WAITING) == "waited in all_reduce, called by step (train.py:12)"
    ring = [Frame(OURS + "/parallel/collectives.py", 1, name) for name in ("_exchange", "ring_reduce_scatter", "ring_all_reduce")]
    assert whereabouts([*ring, *WAITING[3:]]) == "waited in ring_all_reduce, called by step (train.py:12)"
    assert whereabouts(WORKING) == "worked in step (line 5 of a cell)"
    assert place([]) == "code that is not the caller's" and waiting_call([]) is None
    assert several([2]) == "rank 2" and several([3, 0, 1]) == "ranks 0, 1 and 3"
    assert together({0: "slept", 2: "worked", 1: "slept"}) == "ranks 0 and 1 slept; rank 2 worked"


def test_a_wait_that_only_the_source_line_shows():
    class Request:
        def wait(self):
            return frames_of(traceback.walk_stack(sys._getframe()))
    request = Request()
    frames = request.wait()
    assert waiting_call(frames[1:]) == "`frames = request.wait()`" and waiting_call(frames) is None
    # Python's own waits, as for a thread or a process, are no communication: others may be at work
    assert waiting_call([Frame(sysconfig.get_path("stdlib") + "/threading.py", 1, "wait"), *frames[1:]]) is None


def call(**record):
    return Call(3, heard=0.0, **record)


def test_nothing_wrong():
    assert call(results={0: 1, 1: 2, 2: None}).error(5) is None


def test_a_death_comes_before_the_exceptions_that_it_causes():
    failure = Failure("RuntimeError", "peer gone", "Traceback ...", WAITING)
    error = call(failures={0: failure}, deaths={1: -9}, stacks={2: (WAITING, 0.0)}).error(5)
    assert error.ranks == [1] and str(error) == (
        "rank 1 of 3 ended by SIGKILL (the system does that when memory runs out); rank 0 raised RuntimeError in step "
        "(train.py:12); rank 2 waited in all_reduce, called by step (train.py:12) and has been stopped.")


def test_the_late_rank_is_the_one_that_does_not_wait():
    error = call(stacks={0: (WAITING, 0.0), 1: (WORKING, 0.0)}, results={2: None}).error(5)
    assert error.ranks == [1] and str(error).startswith("rank 1 of 3 did not return within 5 s: rank 0 waited in all_reduce")
    assert str(error).endswith("rank 2 had returned. All have been stopped; timeout= sets the limit.")


def test_a_failure_outside_the_users_code():
    error = call(failures={0: Failure("TypeError", "no", "Traceback: no", [])}, results={1: 0, 2: 0}).error(5)
    assert str(error).startswith("rank 0 of 3 raised TypeError in code that is not the caller's; ranks 1 and 2 had returned. Rank 0's")
