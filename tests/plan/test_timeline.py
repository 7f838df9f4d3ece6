"""Simulated pipelines: idle time as the papers have it, what is held, and what is refused."""

from dataclasses import replace
from fractions import Fraction

import pytest

from minillm.parallel.schedules import Action, Timed, gpipe, interleaved, one_f_one_b, peak_live, pipedream, zero_bubble
from minillm.plan.timeline import Timeline, Times, measured_times, simulate

SIZES = [(stages, microbatches) for stages in (1, 2, 3, 4, 8) for microbatches in (1, 2, 4, 7, 16)]
# whole seconds, so that sums of them are exact in floating point
UNEVEN = Times(forward=2.0, backward_input=3.0, backward_weight=1.0)


def share(timeline):
    """The bubble as a fraction."""
    idle = sum(Fraction(timeline.idle(rank)) for rank in range(timeline.ranks))
    return idle / (timeline.ranks * Fraction(timeline.makespan))


@pytest.mark.parametrize("stages, microbatches", SIZES)
@pytest.mark.parametrize("order", [gpipe, one_f_one_b])
def test_the_bubble_of_gpipe_and_1f1b(order, stages, microbatches):
    timeline = simulate(order(stages, microbatches), UNEVEN)
    assert share(timeline) == Fraction(stages - 1, microbatches + stages - 1)
    assert timeline.bubble == pytest.approx(float(share(timeline)))
    assert timeline.makespan == (microbatches + stages - 1) * 6


@pytest.mark.parametrize("ranks, microbatches, chunks", [(2, 2, 2), (2, 4, 3), (4, 4, 2), (4, 8, 2), (4, 12, 5), (8, 16, 4)])
def test_the_bubble_of_interleaved_stages(ranks, microbatches, chunks):
    # a rank's forward takes 2·chunks, its backward 4·chunks: the same model is cut into more stages
    timeline = simulate(interleaved(ranks, microbatches, chunks), UNEVEN)
    whole = simulate(one_f_one_b(ranks, microbatches), Times(2.0 * chunks, 3.0 * chunks, 1.0 * chunks))
    assert [timeline.idle(rank) * chunks for rank in range(ranks)] == [whole.idle(rank) for rank in range(ranks)]
    assert share(timeline) == Fraction(ranks - 1, chunks * microbatches + ranks - 1)


@pytest.mark.parametrize("stages, microbatches", [(2, 2), (2, 8), (3, 6), (4, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("forward, backward, weight", [(1, 1, 1), (2, 3, 2), (4, 5, 3)])
def test_the_bubble_of_zero_bubble(stages, microbatches, forward, backward, weight):
    # arXiv:2401.10241 §2.3: ZB-H1 has (p - 1)(F + B - W) where 1F1B has (p - 1)(F + B + W)
    timeline = simulate(zero_bubble(stages, microbatches), Times(float(forward), float(backward), float(weight)))
    assert timeline.idle(0) == (stages - 1) * (forward + backward - weight)
    plain = simulate(one_f_one_b(stages, microbatches), Times(float(forward), float(backward), float(weight)))
    assert plain.idle(0) == (stages - 1) * (forward + backward + weight)


def test_pipedream_does_not_stop():
    # no rank waits between its first backward and the last one's forward: only filling and draining are left
    timeline = simulate(pipedream(4, 40), Times(1.0, 1.0, 1.0, update=0.0))
    assert share(timeline) == Fraction(3, 43)


@pytest.mark.parametrize("schedule", [gpipe(3, 5), one_f_one_b(4, 6), interleaved(2, 4, 2), zero_bubble(3, 5), pipedream(3, 4)])
@pytest.mark.parametrize("times", [Times(), UNEVEN, Times(1.0, 0.0, 1.0, transfer=0.5)])
def test_held_activations_are_those_of_the_schedule(schedule, times):
    timeline = simulate(schedule, times)
    held = [timeline.live(rank) for rank in range(timeline.ranks)]
    assert [max(count for _, count in steps) for steps in held] == peak_live(schedule)
    assert all(steps[-1][1] == 0 and steps[0][1] >= 1 for steps in held)


def test_two_stages_by_hand():
    # stage 1 takes twice as long, and a message half a second
    timeline = simulate(one_f_one_b(2, 2), Times([1.0, 2.0], [1.0, 2.0], 0.0, transfer=0.5))
    spans = [(action.stage, action.kind, action.microbatch, start, end) for action, start, end in timeline.actions]
    assert sorted(spans) == sorted([
        (0, "forward", 0, 0, 1), (0, "forward", 1, 1, 2), (0, "backward", 0, 6, 7), (0, "backward", 1, 10, 11),
        (1, "forward", 0, 1.5, 3.5), (1, "backward", 0, 3.5, 5.5), (1, "forward", 1, 5.5, 7.5), (1, "backward", 1, 7.5, 9.5)])
    assert timeline.live(0) == [(0, 1), (1, 2), (7, 1), (11, 0)] and timeline.makespan == 11


def test_within_a_rank_nothing_is_sent():
    alone = simulate(interleaved(1, 2, 3), Times(transfer=100.0))
    assert alone.makespan == 2 * 3 * 3 and alone.bubble == 0


def test_an_update_takes_its_time():
    assert simulate(pipedream(1, 3), Times(update=0.25)).makespan == 3 * 3.25


def test_measured_spans_give_the_times_back():
    times = Times([1.0, 2.0], [3.0, 1.0], [0.5, 0.25], [0.0, 0.0], 0.5)
    assert replace(measured_times(simulate(zero_bubble(2, 5), times).actions), transfer=0.5) == times
    whole = measured_times(simulate(one_f_one_b(2, 5), times).actions)
    assert whole.backward_input == [3.5, 1.25] and whole.backward_weight == [0.0, 0.0]


def test_a_measured_timeline_need_not_begin_at_nought():
    timeline = Timeline([Timed(Action("forward", 0, 0), 10.0, 11.0), Timed(Action("forward", 1, 0), 11.0, 13.0)], 2)
    assert timeline.makespan == 3 and timeline.idle(0) == 2 and timeline.bubble == 0.5


def test_who_waits_for_ever_is_named():
    order = one_f_one_b(2, 2)
    order[0] = [order[0][0], order[0][2], order[0][1], order[0][3]]  # backward 0, then forward 1: as it should be
    simulate(order)
    order[1] = [order[1][2], order[1][3], order[1][0], order[1][1]]  # stage 1 begins with microbatch 1
    with pytest.raises(ValueError, match="rank 0 waits for backward_input of microbatch 0 on stage 1 .* rank 1 waits for forward "
                                         "of microbatch 1 on stage 0"):
        simulate(order)
    with pytest.raises(ValueError, match="missing"):
        simulate([order[0][:3], order[1]])
