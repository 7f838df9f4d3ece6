"""One error for many ranks: who failed and how, and what the others were doing.

`Call` records what became of one function on all ranks; its `error` is a pure function of that record.
"""

import signal
from dataclasses import dataclass, field

from minillm.parallel.checked import Mismatch
from minillm.parallel.places import Frame, place, several, together, waiting_call, whereabouts
from minillm.parallel.rank import Failure


class RankError(RuntimeError):
    """A rank raised, died or did not answer. `ranks` are those at fault."""

    def __init__(self, message: str, ranks: list[int]):
        super().__init__(message)
        self.ranks = ranks


@dataclass
class Call:
    """One function on `size` ranks: each rank ends in results, failures or deaths, or is still open."""

    size: int
    heard: float  # when a rank last said or printed something
    results: dict[int, object] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)  # in the order in which they arrived
    deaths: dict[int, int] = field(default_factory=dict)  # exit codes, negative for a signal
    last_words: dict[int, str] = field(default_factory=dict)  # the last lines on standard error of those who died
    stacks: dict[int, tuple[list[Frame], float]] = field(default_factory=dict)  # where, and CPU seconds used so far
    deadlocked: bool = False

    def open(self) -> list[int]:
        """The ranks that may still answer."""
        return [r for r in range(self.size) if r not in self.results and r not in self.failures and r not in self.deaths]

    def error(self, timeout: float) -> RankError | None:
        """What went wrong, as one error; None if every rank has returned."""
        if self.deaths:
            first, code = next(iter(self.deaths.items()))
            words = self.last_words.get(first)
            return RankError(f"rank {first} of {self.size} {_ended(code)}{self._others(first)}."
                             + (f" Its last words on standard error:\n{words}" if words else ""), sorted(self.deaths))
        if self.failures:
            first, failure = next(iter(self.failures.items()))
            if failure.kind == Mismatch.__name__:  # says what every rank did
                return RankError(failure.text, sorted(self.failures))
            return RankError(f"rank {first} of {self.size} raised {failure.kind} in {place(failure.frames)}"
                             f"{self._others(first)}. Rank {first}'s traceback:\n{failure.traceback}", sorted(self.failures))
        if self.deadlocked:
            return RankError(f"the ranks wait for one another and none can go on: {self._doing()}. All have been stopped. "
                             f"Every rank of a group must call the same collectives in the same order with the same shapes, "
                             f"and every send needs its receive; checked=True compares the calls.", self.open())
        if self.open():
            late = [rank for rank in self.open() if not waiting_call(self.stacks.get(rank, ((), 0))[0])] or self.open()
            return RankError(f"{several(late)} of {self.size} did not return within {timeout:g} s: {self._doing()}. "
                             f"All have been stopped; timeout= sets the limit.", late)
        return None

    def _others(self, first: int) -> str:
        """What all but the first failing rank did, with its punctuation."""
        raised = {rank: f"raised {failure.kind} in {place(failure.frames)}" for rank, failure in self.failures.items()}
        ended = {rank: _ended(code) for rank, code in self.deaths.items()}
        told = {rank: text for rank, text in {**raised, **ended}.items() if rank != first}
        stopped = " and has been stopped" if len(self.open()) == 1 else " and have been stopped" if self.open() else ""
        parts = [together(told), self._doing(stopped)]
        return "".join(f"; {part}" for part in parts if part)

    def _doing(self, end: str = "") -> str:
        """Where the open ranks are, and which have returned."""
        silent = "did not answer: stopped, or in C code that lets no other thread run"
        where = {rank: whereabouts(self.stacks[rank][0]) if rank in self.stacks else silent for rank in self.open()}
        returned = f"{several(self.results)} had returned" if self.results else ""
        return "; ".join(part for part in (together(where) + end, returned) if part)


def _ended(code: int) -> str:
    """How a rank ended, from its exit code (negative: the signal)."""
    if code >= 0:
        return f"ended with exit code {code} before its function returned"
    name = signal.Signals(-code).name
    return f"ended by {name}" + (" (the system does that when memory runs out)" if name == "SIGKILL" else "")
