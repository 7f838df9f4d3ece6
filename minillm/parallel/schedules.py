"""Pipeline schedules as data: for each rank, what it does in which order. No process and no tensor.

A model is cut into stages, a batch into microbatches. A stage can work on a microbatch when the stage before has; backward
runs from the last stage to the first. What a rank does while it waits is the whole difference between schedules:
    gpipe         all forwards, then all backwards
    one_f_one_b   as soon as there is one, a backward after each forward: the same idle time, fewer activations
    interleaved   several stages (chunks) a rank: less idle time, more messages
    zero_bubble   backward in two parts, of which the second, for the weights, can wait: it fills the idle time
    pipedream     an update after each backward, so nobody ever waits for the batch to end: weights are stale
With one microbatch, gpipe is the naive pipeline, where one rank works at a time. minillm/parallel/pipeline.py runs them all.
Left out: bidirectional schedules (Chimera, DualPipe), the V-shaped zero-bubble ones, and searching for an order.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "backward_input", "backward_weight", "update"]


class Action(NamedTuple):
    """One piece of work. `backward` is backward_input (for the stage before) and backward_weight in one."""

    kind: Kind
    stage: int
    """Counted over all ranks: stage s is on rank s % ranks."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} on stage {self.stage}"


Schedule = list[list[Action]]
"""For each rank, its actions in order."""


class Timed(NamedTuple):
    """From when to when an action ran, without what it waited for: seconds."""

    action: Action
    start: float
    end: float


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards, the last microbatch first. Source: GPipe, arXiv:1811.06965 §2.3.

    Bubble: (stages - 1) / microbatches of the ideal time.   Peak activations on each stage: microbatches.
    Raises: ValueError if either is below 1.
    """
    _at_least_one(stages=stages, microbatches=microbatches)
    return [[Action("forward", s, m) for m in range(microbatches)] + [Action("backward", s, m) for m in reversed(range(microbatches))]
            for s in range(stages)]


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """Just enough forwards to reach the last stage and come back, then one backward for each forward.

    Source: PipeDream-flush, arXiv:2104.04473 §2.2.1.   Raises: ValueError if either is below 1.
    Bubble: that of gpipe.   Peak activations on stage s: min(stages - s, microbatches).
    """
    return interleaved(stages, microbatches, 1)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with `chunks` stages a rank: a microbatch comes round that often, and filling the pipeline takes shorter steps.

    Source: arXiv:2104.04473 §2.2.2 and Megatron-LM's forward_backward_pipelining_with_interleaving.
    Bubble: (ranks - 1) / (microbatches · chunks) of the ideal time.   Peak activations on rank r, of one chunk each:
    min(2 (ranks - r - 1) + (chunks - 1) · ranks + 1, microbatches · chunks) if chunks > 1.
    Raises: ValueError for a size below 1, or chunks whose microbatches do not come in groups of `ranks`.
    """
    _at_least_one(ranks=ranks, microbatches=microbatches, chunks=chunks)
    if chunks > 1 and microbatches % ranks:
        below = microbatches // ranks * ranks
        raise ValueError(f"{microbatches} microbatches do not come in groups of {ranks} ranks, in which chunks take turns. Nearest "
                         f"that work: {f'{below} or ' if below else ''}{below + ranks} microbatches, or chunks = 1.")
    plan, group = [], ranks if chunks > 1 else microbatches
    turns = [(chunk, m) for start in range(0, microbatches, group) for chunk in range(chunks) for m in range(start, start + group)]
    for rank in range(ranks):
        forwards = [Action("forward", chunk * ranks + rank, m) for chunk, m in turns]
        backwards = [Action("backward", (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in turns]
        ahead = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        plan.append(_one_each(forwards, backwards, ahead))
    return plan


def pipedream(stages: int, microbatches: int) -> Schedule:
    """1F1B without an end of the batch: each microbatch is a batch of its own, and each backward is followed by an update.

    Source: PipeDream, arXiv:1806.03377 §3.3.   Raises: ValueError if either is below 1.
    Bubble: none once the pipeline is full.   Peak activations on stage s: min(stages - s, microbatches), and as many versions
    of the weights. Between its forward and its backward, a stage's weights are updated stages - s - 1 times.
    """
    return [list(chain.from_iterable([a, a._replace(kind="update")] if a.kind == "backward" else [a] for a in actions))
            for actions in one_f_one_b(stages, microbatches)]


def zero_bubble(stages: int, microbatches: int) -> Schedule:
    """ZB-H1: 1F1B whose backward is cut in two. The stage before gets its gradient first; stage s owes s weight gradients.

    Source: arXiv:2401.10241 §2.2.   Raises: ValueError if either is below 1.
    Bubble: (stages - 1)(F + B - W), where 1F1B has (stages - 1)(F + B + W): the times of forward, of backward for the input and
    for the weights.   Peak activations on each stage: min(stages, microbatches), as on the first stage of 1F1B.
    """
    plan = []
    for stage, actions in enumerate(one_f_one_b(stages, microbatches)):
        split = []
        for action in actions:
            if action.kind == "forward":
                split.append(action)
                continue
            split.append(action._replace(kind="backward_input"))
            if action.microbatch >= stage:
                split.append(Action("backward_weight", stage, action.microbatch - stage))
        owed = range(max(0, microbatches - stage), microbatches)
        plan.append(split + [Action("backward_weight", stage, m) for m in owed])
    return plan


def build_schedule(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The synchronous schedule that a configuration names. Raises: as the schedule's own function."""
    if name == "interleaved":
        return interleaved(ranks, microbatches, chunks)
    return {"gpipe": gpipe, "1f1b": one_f_one_b, "zero_bubble": zero_bubble}[name](ranks, microbatches)


def needs(action: Action, stages: int) -> list[Action]:
    """What must be done before this action, on whatever rank; a whole backward is named by its parts, see `parts`."""
    kind, stage, microbatch = action
    if kind == "forward":
        return [Action("forward", stage - 1, microbatch)] if stage else []
    if kind == "backward_weight":
        return [Action("backward_input", stage, microbatch)]
    if kind == "update":
        return [Action("backward_weight", stage, microbatch)]
    after = [Action("backward_input", stage + 1, microbatch)] if stage + 1 < stages else []
    return [Action("forward", stage, microbatch), *after]


def parts(action: Action) -> list[Action]:
    """The action itself, or the two that a whole backward stands for."""
    if action.kind != "backward":
        return [action]
    return [action._replace(kind="backward_input"), action._replace(kind="backward_weight")]


def in_order(schedule: Schedule, stages: int) -> list[Action]:
    """All ranks' actions in one order in which they can run: in each round a rank does its next one, if it need not wait.

    Raises: ValueError for a deadlock, naming who waits for whom.
    """
    done, ordered, left = set(), [], [list(reversed(actions)) for actions in schedule]
    while any(left):
        missing = [[need for need in needs(actions[-1], stages) if need not in done] if actions else [] for actions in left]
        ready = [actions.pop() for actions, lacks in zip(left, missing) if actions and not lacks]
        if not ready:
            waiting = "; ".join(f"rank {rank} waits for {lacks[-1]} (rank {lacks[-1].stage % len(schedule)}) before its {left[rank][-1]}"
                                for rank, lacks in enumerate(missing) if lacks)
            raise ValueError(f"deadlock after {len(ordered)} of {sum(map(len, schedule))} actions: {waiting}.")
        ordered += ready
        done.update(part for action in ready for part in parts(action))
    return ordered


def check_schedule(schedule: Schedule, stages: int, microbatches: int) -> None:
    """Run a schedule without processes: everything is done once, where it belongs, and nobody waits for ever.

    Raises: ValueError naming what is missing, done twice or misplaced, or who waits for whom.
    """
    _at_least_one(ranks=len(schedule), stages=stages, microbatches=microbatches)
    if stages % len(schedule):
        raise ValueError(f"{stages} stages on {len(schedule)} ranks: each rank needs the same number of them.")
    _check_once(schedule, stages, microbatches)
    in_order(schedule, stages)


def peak_live(schedule: Schedule) -> list[int]:
    """Per rank, the most microbatches (of one stage each) whose activations are held at once: from forward until the weights'
    gradients are there."""
    change = {"forward": 1, "backward": -1, "backward_weight": -1}
    return [max(accumulate(change.get(action.kind, 0) for action in actions), default=0) for actions in schedule]


def balance(costs: Sequence[float], stages: int) -> list[range]:
    """Which layers each stage gets: neighbours, so that the most expensive stage is as cheap as can be. Exact.

    Cost: O(stages · layers²), by dynamic programming; of equally good cuts, an even one.
    Raises: ValueError for more stages than layers.
    """
    _at_least_one(stages=stages)
    if stages > len(costs):
        raise ValueError(f"{stages} stages for {len(costs)} layers: each stage needs at least one. Use {len(costs)} stages or fewer.")
    upto = [0, *accumulate(costs)]
    # best[end]: of the cuts of the first `end` layers, (the dearest stage, sum of squares, the ends of its stages)
    best: dict[int, tuple] = {0: (0, 0, ())}
    for _ in range(stages):
        best = {end: min((max(dearest, part := upto[end] - upto[start]), squares + part * part, (*ends, end))
                         for start, (dearest, squares, ends) in best.items() if start < end)
                for end in range(min(best) + 1, len(costs) + 1)}
    ends = best[len(costs)][2]
    return [range(start, end) for start, end in zip((0, *ends), ends)]


def _one_each(forwards: list[Action], backwards: list[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, then a forward and a backward in turns, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    steady = chain.from_iterable(zip(forwards[ahead:], backwards))
    return [*forwards[:ahead], *steady, *backwards[len(forwards) - ahead:]]


def _check_once(schedule: Schedule, stages: int, microbatches: int) -> None:
    """Every stage and microbatch has one forward and one backward, whole or in parts, on its rank; updates all or none."""
    seen: set[Action] = set()
    for rank, actions in enumerate(schedule):
        for action in actions:
            if not (0 <= action.stage < stages and 0 <= action.microbatch < microbatches):
                raise ValueError(f"rank {rank} has the {action}, and there are {stages} stages and {microbatches} microbatches.")
            if action.stage % len(schedule) != rank:
                raise ValueError(f"rank {rank} has the {action}, which is on rank {action.stage % len(schedule)} of {len(schedule)}.")
            for part in parts(action):
                if part in seen:
                    raise ValueError(f"{part} is done twice, the second time by rank {rank}.")
                seen.add(part)
    updates = {action.stage for action in seen if action.kind == "update"}
    wanted = ["forward", "backward_input", "backward_weight", *(["update"] if updates else [])]
    missing = [action for m in range(microbatches) for s in range(stages) for kind in wanted
               if (action := Action(kind, s, m)) not in seen]
    if missing:
        raise ValueError(f"{len(missing)} of {stages * microbatches * len(wanted)} actions are missing, first the {missing[0]}.")


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: at least 1 is needed.")
