"""When each action of a pipeline schedule runs: a simulation of discrete events, with given times.

overlap.py lets one rank compute while it sends; here ranks wait for one another. The schedule (parallel/schedules.py) says in
which order each rank works, the times say how long, and the rest follows: an action begins when its rank is free and what it
needs has arrived. Sending takes time, but none of the sending rank's. A `Timeline` can also be made of the spans that real
ranks measured, and `measured_times` makes them the times of a simulation. course/plots.py draws it.
Left out: ranks that slow each other down, and links that several messages share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import NamedTuple

from minillm.parallel.schedules import Action, Schedule, check_schedule, needs, parts

Seconds = float | Sequence[float]


@dataclass(frozen=True)
class Times:
    """Seconds of each kind of action, one number for all stages or one for each; a whole backward takes both its parts.
    transfer: from a stage to the next one or the one before, if that is on another rank."""

    forward: Seconds = 1.0
    backward_input: Seconds = 1.0
    backward_weight: Seconds = 1.0
    update: Seconds = 0.0
    transfer: Seconds = 0.0

    def of(self, kind: str, stage: int) -> float:
        """One part's seconds on a stage, or those of a message that leaves it."""
        seconds = getattr(self, kind)
        return seconds[stage] if isinstance(seconds, Sequence) else seconds


class Span(NamedTuple):
    """One action of a rank, from when to when: seconds."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each rank did when."""

    spans: list[Span]
    ranks: int

    @property
    def makespan(self) -> float:
        """Seconds from the first action's start to the last one's end."""
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    def idle(self, rank: int) -> float:
        """Seconds of the makespan in which a rank waits."""
        return self.makespan - sum(span.end - span.start for span in self.spans if span.rank == rank)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait: (K-1)/(M+K-1) for GPipe and 1F1B on K equal stages."""
        return sum(map(self.idle, range(self.ranks))) / (self.ranks * self.makespan)

    def live(self, rank: int) -> list[tuple[float, int]]:
        """How many microbatches' activations a rank holds: (since when, how many), one entry for each change.

        They are held from the forward's start to the end of the last part of backward; each chunk of a rank has its own.
        """
        changes = [(span.start, 1) for span in self.spans if span.rank == rank and span.action.kind == "forward"]
        changes += [(span.end, -1) for span in self.spans
                    if span.rank == rank and span.action.kind in ("backward", "backward_weight")]
        changes.sort()  # at the same time, what is freed comes first
        return list(dict(zip((when for when, _ in changes), accumulate(change for _, change in changes))).items())


def simulate(schedule: Schedule, times: Times = Times()) -> Timeline:
    """Let each rank do its actions in order, each as soon as it can. Begins at 0.

    Raises: ValueError for a schedule that is not complete, or in which ranks wait for ever, saying which and for what.
    """
    everything = [action for actions in schedule for action in actions]
    stages = 1 + max((action.stage for action in everything), default=0)
    check_schedule(schedule, stages, 1 + max((action.microbatch for action in everything), default=0))
    ended: dict[Action, float] = {}
    place, free, spans = [0] * len(schedule), [0.0] * len(schedule), []

    def arrival(need: Action, rank: int) -> float:
        return ended[need] + (times.of("transfer", need.stage) if need.stage % len(schedule) != rank else 0.0)

    while len(spans) < len(everything):
        for rank, actions in enumerate(schedule):
            while place[rank] < len(actions) and all(need in ended for need in needs(actions[place[rank]], stages)):
                action = actions[place[rank]]
                start = max(free[rank], *(arrival(need, rank) for need in needs(action, stages)), 0.0)
                for part in parts(action):
                    ended[part] = free[rank] = start + sum(times.of(each.kind, each.stage) for each in parts(action))
                spans.append(Span(rank, action, start, free[rank]))
                place[rank] += 1
    return Timeline(spans, len(schedule))


def measured_times(spans: Iterable[Span], transfer: float = 0.0) -> Times:
    """The medians of what was measured, stage by stage; a whole backward counts as its first part."""
    found: dict[str, dict[int, list[float]]] = {}
    for _, action, start, end in spans:
        found.setdefault(parts(action)[0].kind, {}).setdefault(action.stage, []).append(end - start)
    kinds, stages = ("forward", "backward_input", "backward_weight", "update"), len(found["forward"])
    return Times(*([median(found.get(kind, {}).get(stage, [0.0])) for stage in range(stages)] for kind in kinds), transfer)
