import math
from collections import Counter

import pytest

from minillm.plan.network import Link, predict, rounds_of
from minillm.course.topology import (
    Flow, Topology, fair_rates, fat_tree, rail_rings, rails, ring, ring_all_reduce_run, run_rounds, transfer, tree)

LINK = Link(1e-5, 1e9)
NVLINK, NET = Link(1e-6, 100e9), Link(1e-5, 10e9)


def test_routes():
    assert ring(6, LINK).route(4, 0) == [("host 4", "host 5"), ("host 5", "host 0")]
    fat = fat_tree(8, 4, LINK)
    assert fat.route(0, 3) == [("host 0", "leaf 0"), ("leaf 0", "host 3")]
    assert fat.route(0, 6) == [("host 0", "leaf 0"), ("leaf 0", "spine 2"), ("spine 2", "leaf 1"), ("leaf 1", "host 6")]
    assert len({fat.route(0, target)[1] for target in range(4, 8)}) == 4  # a spine for each target
    railed = rails(2, 2, NVLINK, NET)
    assert railed.route(0, 2) == [("host 0 gpu 0", "rail 0"), ("rail 0", "host 1 gpu 0")]
    assert railed.route(0, 3) == [("host 0 gpu 0", "host 0"), ("host 0", "host 0 gpu 1"), ("host 0 gpu 1", "rail 1"),
                                  ("rail 1", "host 1 gpu 1")]
    assert fat.route(2, 2) == []


@pytest.mark.parametrize(("hosts", "per_leaf", "oversubscription", "spines"), [
    (8, 4, 1, 4), (8, 4, 2, 2), (8, 4, 4, 1), (6, 3, 1, 3)])
def test_a_fat_tree_has_as_many_links_up_as_it_says(hosts, per_leaf, oversubscription, spines):
    wires = fat_tree(hosts, per_leaf, LINK, oversubscription).wires
    assert len(wires) == 2 * (hosts + hosts // per_leaf * spines)
    assert sum(1 for source, target in wires if source == "leaf 0" and target.startswith("spine")) == spines


@pytest.mark.parametrize("arguments", [(8, 3, LINK), (8, 4, LINK, 3), (8, 4, LINK, 8), (0, 4, LINK)])
def test_what_is_no_fat_tree(arguments):
    with pytest.raises(ValueError, match="must fill the leaves"):
        fat_tree(*arguments)


def test_no_way():
    with pytest.raises(ValueError, match="no way leads from a to c"):
        Topology(("a", "c"), {("a", "b"): LINK}).route(0, 1)


def test_fair_shares_of_the_textbook():
    """Bertsekas and Gallager's kind of example, by hand: the flow over both wires gets what the fuller wire leaves."""
    wires = {("a", "b"): Link(0, 10), ("b", "c"): Link(0, 4)}
    routes = [[("a", "b")], [("b", "c")], [("a", "b"), ("b", "c")]]
    assert fair_rates(routes, [math.inf] * 3, wires) == [8, 2, 2]
    assert fair_rates(routes, [math.inf, 1, math.inf], wires) == [7, 1, 3]  # what a flow at its limit leaves goes to the other
    assert fair_rates([[], [("a", "b")]], [5, math.inf], wires) == [5, 10]


def test_shares_are_max_min_fair():
    """The definition: every flow is at its limit, or has a full wire on which nobody has more."""
    fat = fat_tree(8, 4, LINK, 2)
    flows = [Flow(i, (3 * i + 4) % 8, limit=3e8 if i % 3 == 0 else math.inf) for i in range(8)]
    flows += [Flow(0, 5), Flow(1, 5), Flow(2, 5)]
    routes = [fat.route(flow.source, flow.target) for flow in flows]
    rates = fair_rates(routes, [flow.limit for flow in flows], fat.wires)
    load = Counter()
    for route, rate in zip(routes, rates):
        load.update({wire: rate for wire in route})
    full = {wire for wire in load if load[wire] >= 1e9 * (1 - 1e-9)}  # float rounding only
    assert max(load.values()) <= 1e9 * (1 + 1e-9) and full
    for flow, route, rate in zip(flows, routes, rates):
        most = [max(r for r, other in zip(rates, routes) if wire in other) for wire in route if wire in full]
        assert rate == flow.limit or any(rate >= m * (1 - 1e-9) for m in most)


def test_what_one_flow_leaves_the_others_take():
    """Two flows on one wire of 1 GB/s: 1 GB and 3 GB. Half each until 2 s, then the second alone: 2 GB more, until 4 s."""
    moved = transfer(fat_tree(4, 4, LINK), [Flow(0, 2, 1e9), Flow(1, 2, 3e9), Flow(3, 3, 5e9), Flow(3, 1, 0)])
    assert moved.seconds == pytest.approx((2, 4, 0, 0)) and moved.carried["leaf 0", "host 2"] == pytest.approx(4e9)  # rounding


@pytest.mark.parametrize("topology", [ring(8, LINK), fat_tree(8, 4, LINK), fat_tree(8, 4, LINK, 4), fat_tree(8, 8, LINK)])
def test_a_ring_alone_takes_what_the_model_says(topology):
    """In the order of the places a ring's messages share no wire, not even with one link up: predict() of network.py."""
    run = ring_all_reduce_run(topology, 8e6)
    assert run.seconds == pytest.approx(predict("ring_all_reduce", 8e6, 8, LINK))  # float rounding only
    assert run_rounds(topology, rounds_of("ring_all_reduce", 8_000_000, 8)).seconds == pytest.approx(run.seconds)
    assert max(run.utilisation.values()) == pytest.approx(1)


def test_one_busy_wire_slows_every_rank():
    """Hosts 3 and 7 are strangers to the ring and share one link up with it: they take half, and every rank waits twice as long."""
    thin, six, stranger = fat_tree(8, 4, LINK, 4), [[0, 1, 2, 4, 5, 6]], Flow(3, 7)
    alone, busy = (ring_all_reduce_run(thin, 6e6, six, background) for background in ((), [stranger]))
    alphas = 10 * LINK.alpha
    assert alone.seconds == pytest.approx(predict("ring_all_reduce", 6e6, 6, LINK))  # float rounding only, as below
    assert busy.seconds - alphas == pytest.approx(2 * (alone.seconds - alphas))
    assert busy.utilisation["host 1", "leaf 0"] == pytest.approx(0.5) and alone.utilisation["host 1", "leaf 0"] == pytest.approx(1)
    assert busy.busiest == ("leaf 0", "spine 0") and busy.utilisation[busy.busiest] == pytest.approx(1)
    capped = ring_all_reduce_run(thin, 6e6, six, [Flow(3, 7, limit=2.5e8)])  # a quarter of the link leaves three
    assert capped.seconds - alphas == pytest.approx((alone.seconds - alphas) / 0.75)
    wide = ring_all_reduce_run(fat_tree(8, 4, LINK), 6e6, six, [stranger])  # it goes by spine 3, and the ring by spine 0
    assert wide.seconds == pytest.approx(alone.seconds) and wide.utilisation["leaf 0", "spine 3"] == pytest.approx(1)


def test_an_order_that_hops_between_leaves_needs_the_links_that_oversubscription_took():
    hopping = [0, 4, 1, 5, 2, 6, 3, 7]  # every message crosses the spines: four up from each leaf, and four down
    alphas = 14 * LINK.alpha
    times = {spread: ring_all_reduce_run(fat_tree(8, 4, LINK, spread), 8e6, [hopping]).seconds - alphas for spread in (1, 2, 4)}
    assert times[2] == pytest.approx(2 * times[1]) and times[4] == pytest.approx(4 * times[1])  # float rounding only
    placed = run_rounds(fat_tree(8, 4, LINK, 2), rounds_of("ring_all_reduce", 8_000_000, 8), hopping)
    assert placed.seconds == pytest.approx(times[2] + alphas)
    assert times[1] + alphas == pytest.approx(predict("ring_all_reduce", 8e6, 8, LINK))
    assert ring_all_reduce_run(tree(8, 4, LINK), 8e6, [hopping]).seconds == pytest.approx(times[4] + alphas)


@pytest.mark.parametrize(("hosts", "gpus"), [(2, 4), (4, 4), (3, 2), (5, 4)])
def test_a_ring_on_every_rail(hosts, gpus):
    """One ring leaves each host through one GPU's network card; as many rings as rails use them all, and are that much faster."""
    railed, rings = rails(hosts, gpus, NVLINK, NET), rail_rings(hosts, gpus)
    assert all(sorted(order) == list(range(hosts * gpus)) for order in rings)
    for order in rings:  # from host to host by the rail alone; only the last way back may need a detour
        assert all(len(railed.route(order[i - 1], order[i])) == 2 for i in range(gpus, hosts * gpus, gpus))
    one, all_of_them = ring_all_reduce_run(railed, 1e9), ring_all_reduce_run(railed, 1e9, rings)
    alphas = 2 * (hosts * gpus - 1) * NET.alpha
    assert one.seconds - alphas == pytest.approx(gpus * (all_of_them.seconds - alphas))  # float rounding only
    used = [sum(run.utilisation[wire] > 0 for wire in railed.wires if wire[1].startswith("rail")) for run in (one, all_of_them)]
    assert used == [hosts, hosts * gpus]


def test_all_to_all_fills_what_is_there():
    """Every host of a leaf sends half of its bytes across: with a link up for four hosts that is four times too much."""
    rounds = rounds_of("all_to_all", 8_000_000, 8)
    times = {spread: run_rounds(fat_tree(8, 4, Link(0, 1e9), spread), rounds).seconds for spread in (1, 4)}
    assert times[1] == pytest.approx(predict("all_to_all", 8e6, 8, Link(0, 1e9)))  # float rounding only
    # Rounds 1 to 7 send min(step, 8 - step) messages up from each leaf: 1 + 2 + 3 + 4 + 3 + 2 + 1 shares of a millisecond.
    assert times[4] == pytest.approx(16e-3)


def test_what_cannot_be_run():
    fat = fat_tree(4, 4, LINK)
    for order in ([0, 1, 1, 2], [0, 1, 2, 4]):
        with pytest.raises(ValueError, match="must name a place of its own"):
            run_rounds(fat, rounds_of("reduce", 8, 4), order)
    with pytest.raises(ValueError, match="for 5 ranks, and there are places for 4"):
        run_rounds(fat, rounds_of("reduce", 8, 5))
    with pytest.raises(ValueError, match="leave their size at infinity"):
        run_rounds(fat, rounds_of("reduce", 8, 4), background=[Flow(0, 1, 8)])
    with pytest.raises(ValueError, match="visit no place twice"):
        ring_all_reduce_run(fat, 8, [[0, 1, 2], [0, 1, 1]])
    assert run_rounds(fat, []).seconds == 0
