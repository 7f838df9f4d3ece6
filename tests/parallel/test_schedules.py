"""Schedules by hand, by their papers' formulas, by torch's own, and broken ones that must be told apart."""

import random
from itertools import combinations, pairwise

import pytest

from minillm.parallel.schedules import (Action, balance, check_schedule, gpipe, interleaved, needs, one_f_one_b, parts, peak_live,
                                        pipedream, zero_bubble)

SHORT = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W", "update": "U"}
SIZES = [(stages, microbatches) for stages in (1, 2, 3, 4, 8) for microbatches in (1, 2, 3, 4, 8, 9, 16)]


def short(actions):
    return " ".join(f"{SHORT[a.kind]}{a.microbatch}" for a in actions)


def span(schedule, stages, **times):
    """When the last action ends, if each kind takes its time and messages none; and how long each rank works."""
    times |= {"backward": times["backward_input"] + times["backward_weight"], "update": 0}
    ended, clocks, places = {}, [0] * len(schedule), [0] * len(schedule)
    while any(place < len(actions) for place, actions in zip(places, schedule)):
        for rank, actions in enumerate(schedule):
            while places[rank] < len(actions) and all(n in ended for n in needs(actions[places[rank]], stages)):
                action = actions[places[rank]]
                clocks[rank] = max([clocks[rank], *(ended[n] for n in needs(action, stages))]) + times[action.kind]
                ended |= dict.fromkeys(parts(action), clocks[rank])
                places[rank] += 1
    return max(clocks), [sum(times[a.kind] for a in actions) for actions in schedule]


def test_the_papers_pictures():
    assert [short(rank) for rank in gpipe(2, 3)] == ["F0 F1 F2 B2 B1 B0"] * 2
    assert [short(rank) for rank in one_f_one_b(3, 4)] == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert [short(rank) for rank in pipedream(2, 3)] == ["F0 F1 B0 U0 F2 B1 U1 B2 U2", "F0 B0 U0 F1 B1 U1 F2 B2 U2"]
    # arXiv:2401.10241, figure 2: the first stage owes nothing, the last as many as there are stages before it
    assert [short(rank) for rank in zero_bubble(3, 4)] == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3", "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3", "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"]
    # arXiv:2104.04473, figure 4: chunks take turns after as many microbatches as there are ranks
    first = interleaved(4, 8, 2)[0]
    assert short(first).startswith("F0 F1 F2 F3 F0 F1 F2 F3 F4 F5 F6 B0 F7")
    assert [a.stage for a in first[:10]] == [0] * 4 + [4] * 4 + [0] * 2 and first[11] == Action("backward", 4, 0)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zero_bubble, pipedream])
def test_every_size_runs_to_its_end(make):
    for stages, microbatches in SIZES:
        check_schedule(make(stages, microbatches), stages, microbatches)
    for ranks, chunks, rounds in ((1, 2, 3), (2, 2, 1), (2, 3, 2), (4, 2, 1), (4, 2, 3), (8, 3, 2)):
        check_schedule(interleaved(ranks, ranks * rounds, chunks), ranks * chunks, ranks * rounds)


def test_bubbles_and_peaks_are_those_of_the_docstrings():
    for p, m in SIZES:
        for make in (gpipe, one_f_one_b):
            end, work = span(make(p, m), p, forward=1, backward_input=1, backward_weight=1)
            assert (end - max(work)) * m == (p - 1) * max(work)
        assert peak_live(gpipe(p, m)) == [m] * p
        assert peak_live(one_f_one_b(p, m)) == peak_live(pipedream(p, m)) == [min(p - s, m) for s in range(p)]
        assert peak_live(zero_bubble(p, m)) == [min(p, m)] * p
        if m >= 2 * p - 1:  # shorter batches have no steady phase to owe weights in
            for f, b, w in ((1, 1, 1), (2, 3, 2), (4, 4, 3)):
                end, work = span(zero_bubble(p, m), p, forward=f, backward_input=b, backward_weight=w)
                assert end - max(work) == (p - 1) * (f + b - w), (p, m)
    for p, chunks, rounds in ((2, 2, 2), (4, 2, 2), (4, 3, 3), (8, 2, 4)):
        m = p * rounds
        schedule = interleaved(p, m, chunks)
        end, work = span(schedule, p * chunks, forward=1, backward_input=1, backward_weight=1)
        assert (end - max(work)) * m * chunks == (p - 1) * max(work)
        assert peak_live(schedule) == [min(2 * (p - r - 1) + (chunks - 1) * p + 1, m * chunks) for r in range(p)]


def test_broken_schedules_are_told_apart():
    F, B = (lambda s, m: Action("forward", s, m)), (lambda s, m: Action("backward", s, m))
    for schedule, words in (
            ([[F(0, 0), B(0, 0)], [B(1, 0), F(1, 0)]], "deadlock after 1 of 4 actions: rank 0 waits for backward_input of microbatch 0 on "
                                                       r"stage 1 \(rank 1\) before its backward .*; rank 1 waits for forward"),
            ([[F(0, 0), B(0, 0)], [F(1, 0)]], "2 of 6 actions are missing, first the backward_input of microbatch 0 on stage 1"),
            ([[F(0, 0), F(0, 0)], []], "forward of microbatch 0 on stage 0 is done twice, the second time by rank 0"),
            ([[F(1, 0)], []], "rank 0 has the forward of microbatch 0 on stage 1, which is on rank 1 of 2"),
            ([[F(0, 1)], []], "there are 2 stages and 1 microbatches"),
            ([[F(0, 0)]] * 3, "2 stages on 3 ranks"),
            ([[F(0, 0), B(0, 0), Action("update", 0, 0)], [F(1, 0), B(1, 0)]], "1 of 8 actions are missing, first the update")):
        with pytest.raises(ValueError, match=words):
            check_schedule(schedule, 2, 1)
    with pytest.raises(ValueError, match="6 microbatches do not come in groups of 4 ranks.* 4 or 8 microbatches, or chunks = 1"):
        interleaved(4, 6, 2)
    with pytest.raises(ValueError, match="microbatches = 0: at least 1 is needed"):
        gpipe(2, 0)


def test_balance_is_exact():
    draw = random.Random(0)
    for layers, stages in ((1, 1), (5, 2), (7, 3), (8, 4), (9, 9)):
        costs = [draw.randint(1, 9) for _ in range(layers)]
        cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
        best = min(max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in cuts)
        found = balance(costs, stages)
        assert [layer for part in found for layer in part] == list(range(layers)) and all(found) and len(found) == stages
        assert max(sum(costs[layer] for layer in part) for part in found) == best
    assert sorted(map(len, balance([1] * 10, 4))) == [2, 2, 3, 3]
    assert balance([1, 1, 1, 1, 4], 2) == [range(0, 4), range(4, 5)]  # the last stage has a head that costs as four layers
    with pytest.raises(ValueError, match="4 stages for 3 layers.*Use 3 stages or fewer"):
        balance([1, 1, 1], 4)
