"""Who shares which wire: ring, tree, fat tree and rails as graphs, and what a collective takes when messages share links.

network.py gives every message a link of its own. Here a message is a flow along a route of wires; flows that meet on a wire
share it fairly, and a synchronous collective goes on when the slowest flow of a round has arrived, so that one busy wire slows
every rank. A wire is one direction of a link; its α counts once a message (the largest of its route), switches add none.
Left out: queues, packets, lost ones, and the unfairness of real congestion control. Sources: max-min fair shares by filling
all flows at the same pace, Bertsekas and Gallager, "Data Networks" (1992) §6.5.2; fat trees: Leiserson (1985), Al-Fares et
al. (2008); routes by target ("d-mod-k"): Zahavi et al. (2010); rails: NVIDIA DGX SuperPOD reference architecture (2020).
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.plan.network import Link, Message, Rounds

Wire = tuple[str, str]
"""One direction of a link: from node to node."""


@dataclass(frozen=True)
class Topology:
    """Nodes joined by wires. Rank r of a collective sits on the node places[r], unless it is told another order."""

    places: tuple[str, ...]
    wires: dict[Wire, Link]

    def route(self, source: int, target: int) -> list[Wire]:
        """The wires from one place to another: the fewest; among equals the fastest next; among those, spread by target.

        Raises: ValueError if no way leads there.
        """
        start, end = self.places[source], self.places[target]
        away = self._distances(end)
        if start not in away:
            raise ValueError(f"no way leads from {start} to {end}.")
        here, route = start, []
        while here != end:
            nearer = [wire for wire in self.wires if wire[0] == here and away.get(wire[1], math.inf) == away[here] - 1]
            fastest = max(self.wires[wire].bandwidth for wire in nearer)
            equal = [wire for wire in nearer if self.wires[wire].bandwidth == fastest]
            route.append(equal[target % len(equal)])
            here = route[-1][1]
        return route

    def _distances(self, end: str) -> dict[str, int]:
        """Wires from every node to this one."""
        into = {}
        for source, target in self.wires:
            into.setdefault(target, []).append(source)
        away, queue = {end: 0}, deque([end])
        while queue:
            node = queue.popleft()
            for before in into.get(node, ()):
                if before not in away:
                    away[before] = away[node] + 1
                    queue.append(before)
        return away


def _both_ways(wires: dict[Wire, Link]) -> dict[Wire, Link]:
    return wires | {(target, source): link for (source, target), link in wires.items()}


def ring(hosts: int, link: Link) -> Topology:
    """Each host has a link to the next and one to the one before; others are reached through the hosts between."""
    names = tuple(f"host {i}" for i in range(hosts))
    return Topology(names, _both_ways({(names[i], names[(i + 1) % hosts]): link for i in range(hosts) if hosts > 1}))


def fat_tree(hosts: int, per_leaf: int, link: Link, oversubscription: float = 1) -> Topology:
    """Leaf switches with `per_leaf` hosts each, and spine switches above: as many links up from a leaf as down from it.

    oversubscription: links down for each link up. At 2 there are half as many spines, and all hosts of a leaf together reach
    the others at half their speed.   Raises: ValueError if the hosts do not fill leaves or the links up are no whole number.
    """
    spines = per_leaf / oversubscription
    if hosts < 1 or hosts % per_leaf or spines < 1 or spines != int(spines):
        raise ValueError(f"{hosts} hosts, {per_leaf} a leaf, oversubscription {oversubscription}: hosts must fill the leaves, "
                         f"and per_leaf / oversubscription, here {spines:g}, must be a whole number of spines.")
    names = tuple(f"host {i}" for i in range(hosts))
    down = {(name, f"leaf {i // per_leaf}"): link for i, name in enumerate(names)}
    up = {(f"leaf {leaf}", f"spine {spine}"): link for leaf in range(hosts // per_leaf) for spine in range(int(spines))}
    return Topology(names, _both_ways({**down, **up} if hosts > per_leaf else down))


def tree(hosts: int, per_leaf: int, link: Link) -> Topology:
    """A fat tree that is not fat: one link up from each leaf, whatever hangs below."""
    return fat_tree(hosts, per_leaf, link, oversubscription=per_leaf)


def rails(hosts: int, gpus: int, inside: Link, outside: Link) -> Topology:
    """Hosts whose GPUs share a switch (`inside`: NVLink), and for GPU g of every host one switch, rail g (`outside`).

    Rank h·gpus + g is GPU g of host h. Another host's GPU of the same number is two wires away; to another number the way
    goes inside the host first, as the wires there are faster.
    """
    names = tuple(f"host {h} gpu {g}" for h in range(hosts) for g in range(gpus))
    wires = {}
    for rank, name in enumerate(names):
        wires[name, f"host {rank // gpus}"] = inside
        if hosts > 1:
            wires[name, f"rail {rank % gpus}"] = outside
    return Topology(names, _both_ways(wires))


def rail_rings(hosts: int, gpus: int) -> list[list[int]]:
    """As many rings over all ranks of `rails` as there are rails, each leaving a host on another one.

    In host h ring g starts at GPU (g - h) mod gpus, goes through all and leaves from the one before it, on whose rail the
    next host's first GPU is.
    """
    return [[host * gpus + (ring_number - host + step) % gpus for host in range(hosts) for step in range(gpus)]
            for ring_number in range(gpus)]


@dataclass(frozen=True)
class Flow:
    """Bytes from one place to another (numbers in `Topology.places`)."""

    source: int
    target: int
    size: float = math.inf
    """Bytes; infinity is traffic that never ends."""
    limit: float = math.inf
    """Bytes per second that it never exceeds."""


def fair_rates(routes: Sequence[Sequence[Wire]], limits: Sequence[float], wires: dict[Wire, Link]) -> list[float]:
    """Bytes per second of each flow when wires are shared max-min fairly: nobody gains without one who has less losing.

    All rates rise together; where a wire is full, or a flow at its limit, those flows stay and the others rise on.
    """
    rates = [0.0 if route else limit for route, limit in zip(routes, limits)]
    rising = {i for i, route in enumerate(routes) if route}
    room = {wire: wires[wire].bandwidth for route in routes for wire in route}
    while rising:
        users = Counter(wire for i in rising for wire in routes[i])
        share = {wire: room[wire] / count for wire, count in users.items()}
        level = min([*share.values(), *(limits[i] for i in rising)])
        full = {wire for wire, rate in share.items() if rate <= level * (1 + 1e-12)}  # equal but for rounding
        stay = {i for i in rising if limits[i] <= level or not full.isdisjoint(routes[i])}
        for i in stay:
            rates[i] = level
            for wire in routes[i]:
                room[wire] = max(0.0, room[wire] - level)
        rising -= stay
    return rates


@dataclass(frozen=True)
class Transfer:
    """Flows that started together. seconds: when each had arrived; carried: bytes on each wire until the last one had."""

    seconds: tuple[float, ...]
    carried: dict[Wire, float]


def transfer(topology: Topology, flows: Sequence[Flow]) -> Transfer:
    """Let flows start together and share wires fairly; whenever one has arrived, the others share what it leaves."""
    routes = [topology.route(flow.source, flow.target) for flow in flows]
    left = {i: flow.size for i, flow in enumerate(flows) if flow.size > 0 and routes[i]}
    arrived = [math.inf if i in left else 0.0 for i in range(len(flows))]
    clock, carried = 0.0, Counter()
    while any(math.isfinite(size) for size in left.values()):
        rates = dict(zip(left, fair_rates([routes[i] for i in left], [flows[i].limit for i in left], topology.wires)))
        step = min(size / rates[i] for i, size in left.items())
        clock += step
        for i in list(left):
            carried.update({wire: rates[i] * step for wire in routes[i]})
            if left[i] <= rates[i] * step * (1 + 1e-12):  # equal but for rounding
                arrived[i] = clock
                del left[i]
            else:
                left[i] -= rates[i] * step
    return Transfer(tuple(arrived), dict(carried))


@dataclass(frozen=True)
class Run:
    """A collective on a topology. utilisation: of each wire, its bytes over what it could have carried while bytes flowed."""

    seconds: float
    utilisation: dict[Wire, float]

    @property
    def busiest(self) -> Wire:
        """The wire that is used most: where several are, the first of them."""
        return max(self.utilisation, key=self.utilisation.__getitem__)


def run_rounds(topology: Topology, rounds: Rounds, order: Sequence[int] | None = None, background: Sequence[Flow] = ()) -> Run:
    """The rounds of a collective (see rounds_of in network.py) on a topology, each as slow as its slowest message.

    order: the place on which each rank sits; their own numbers by default.   background: other traffic, all the while.
    Raises: ValueError if two ranks share a place or one has none, or for background of finite size.
    """
    order = range(len(topology.places)) if order is None else order
    if len(set(order)) < len(order) or not all(0 <= place < len(topology.places) for place in order):
        raise ValueError(f"order {list(order)} must name a place of its own, from 0 to {len(topology.places) - 1}, for "
                         f"every rank.")
    ranks = 1 + max((max(message.source, message.target) for messages in rounds for message in messages), default=-1)
    if ranks > len(order):
        raise ValueError(f"the rounds are for {ranks} ranks, and there are places for {len(order)}.")
    if any(math.isfinite(flow.size) for flow in background):
        raise ValueError("background flows last as long as the collective: leave their size at infinity, and give a limit.")
    counts = Counter(tuple(messages) for messages in rounds)
    seconds, flowing, carried = 0.0, 0.0, Counter()
    for messages, times in counts.items():
        flows = [Flow(order[message.source], order[message.target], message.size) for message in messages]
        moved = transfer(topology, [*flows, *background])
        alphas = [max(topology.wires[wire].alpha for wire in topology.route(flow.source, flow.target)) for flow in flows]
        seconds += times * max(alpha + end for alpha, end in zip(alphas, moved.seconds))
        flowing += times * max(moved.seconds[:len(flows)])
        carried.update({wire: times * size for wire, size in moved.carried.items()})
    could = {wire: flowing * link.bandwidth for wire, link in topology.wires.items()}
    return Run(seconds, {wire: carried[wire] / most if most else 0.0 for wire, most in could.items()})


def ring_all_reduce_run(topology: Topology, size: float, rings: Sequence[Sequence[int]] | None = None,
                        background: Sequence[Flow] = ()) -> Run:
    """A ring all-reduce of `size` bytes on a topology: 2(P-1) equal rounds in which every rank sends size/P to the next.

    rings: several orders of the places; each carries an equal part of the bytes, all at once (NCCL's channels). One ring in
    the order of the places by default.   Raises: ValueError if a ring visits a place twice, or lengths differ.
    """
    rings = [range(len(topology.places))] if rings is None else rings
    ranks = len(rings[0])
    if any(len(set(order)) != ranks or len(order) != ranks for order in rings):
        raise ValueError(f"rings {[list(order) for order in rings]} must be equally long and visit no place twice.")
    part = size / ranks / len(rings)
    step = [Message(order[i], order[(i + 1) % ranks], part) for order in rings for i in range(ranks)]
    return run_rounds(topology, [step] * (2 * (ranks - 1)), background=background)
