"""When each action of a pipeline schedule runs: a simulation of discrete events, with given times.

overlap.py lets one rank compute while it sends; here ranks wait for one another. The schedule (parallel/schedules.py) says in
which order each rank works, the times say how long, and the rest follows: an action begins when its rank is free and what it
needs has arrived. Sending takes time, but none of the sending rank's. A `Timeline` can also be made of what real ranks
measured, and `measured_times` makes that the times of a simulation. course/plots.py draws it.
Left out: ranks that slow each other down, and links that several messages share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

from minillm.parallel.schedules import Action, Schedule, Timed, check_schedule, in_order, needs, parts

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


@dataclass(frozen=True)
class Timeline:
    """What each rank did when."""

    actions: list[Timed]
    ranks: int

    @property
    def makespan(self) -> float:
        """Seconds from the first action's start to the last one's end."""
        return max(timed.end for timed in self.actions) - min(timed.start for timed in self.actions)

    def on(self, rank: int) -> list[Timed]:
        """The actions of one rank."""
        return [timed for timed in self.actions if timed.action.stage % self.ranks == rank]

    def idle(self, rank: int) -> float:
        """Seconds of the makespan in which a rank waits."""
        return self.makespan - sum(end - start for _, start, end in self.on(rank))

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait: (K-1)/(M+K-1) for GPipe and 1F1B on K equal stages."""
        return sum(map(self.idle, range(self.ranks))) / (self.ranks * self.makespan)

    def live(self, rank: int) -> list[tuple[float, int]]:
        """How many microbatches' activations a rank holds: (since when, how many), one entry for each change.

        They are held from the forward's start to the end of the last part of backward; each chunk of a rank has its own.
        """
        changes = [(start, 1) for action, start, _ in self.on(rank) if action.kind == "forward"]
        changes += [(end, -1) for action, _, end in self.on(rank) if action.kind in ("backward", "backward_weight")]
        changes.sort()  # at the same time, what is freed comes first
        return list(dict(zip((when for when, _ in changes), accumulate(change for _, change in changes))).items())


def simulate(schedule: Schedule, times: Times = Times()) -> Timeline:
    """Let each rank do its actions in order, each as soon as it can. Begins at 0.

    Raises: ValueError for a schedule that is not complete, or in which ranks wait for ever, saying which and for what.
    """
    stages, microbatches = (1 + max((getattr(action, what) for actions in schedule for action in actions), default=0)
                            for what in ("stage", "microbatch"))
    check_schedule(schedule, stages, microbatches)
    ranks, ended, done = len(schedule), {}, []
    free = [0.0] * ranks

    def arrival(need: Action, rank: int) -> float:
        return ended[need] + (times.of("transfer", need.stage) if need.stage % ranks != rank else 0.0)

    for action in in_order(schedule, stages):
        rank = action.stage % ranks
        start = max([free[rank], *(arrival(need, rank) for need in needs(action, stages))])
        free[rank] = start + sum(times.of(part.kind, part.stage) for part in parts(action))
        ended |= dict.fromkeys(parts(action), free[rank])
        done.append(Timed(action, start, free[rank]))
    return Timeline(done, ranks)


def measured_times(actions: Iterable[Timed]) -> Times:
    """The medians of what was measured, stage by stage; a whole backward counts as its first part."""
    found: dict[str, dict[int, list[float]]] = {}
    for action, start, end in actions:
        found.setdefault(parts(action)[0].kind, {}).setdefault(action.stage, []).append(end - start)
    kinds, stages = ("forward", "backward_input", "backward_weight", "update"), len(found["forward"])
    return Times(*([median(found.get(kind, {}).get(stage, [0.0])) for stage in range(stages)] for kind in kinds))
