import pytest

from minillm.config import TrainConfig
from minillm.train.schedule import learning_rate


def test_up_in_a_line_and_down_along_a_cosine():
    config = TrainConfig(steps=111, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert [learning_rate(s, config) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(10, config) == 1.0
    assert learning_rate(60, config) == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert learning_rate(110, config) == pytest.approx(0.1) == learning_rate(500, config)


def test_shortest_runs():
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=0, lr=1.0)) == 1.0
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=1, lr=1.0)) == 1.0


def test_a_line_and_a_constant():
    line = TrainConfig(steps=111, warmup_steps=10, lr=1.0, min_lr=0.1, schedule="linear")
    assert learning_rate(9, line) == learning_rate(10, line) == 1.0
    assert [learning_rate(s, line) for s in (60, 110, 500)] == pytest.approx([0.55, 0.1, 0.1])
    flat = TrainConfig(steps=111, warmup_steps=10, lr=1.0, schedule="constant")
    assert [learning_rate(s, flat) for s in (4, 10, 110)] == [0.5, 1.0, 1.0]


def test_wsd_stays_and_then_falls_over_the_last_share_of_steps():
    config = TrainConfig(steps=101, warmup_steps=10, lr=1.0, min_lr=0.0, schedule="wsd", cooldown=0.2)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[9:81] == [1.0] * 72 and rates[81] < 1
    assert rates[90] == pytest.approx(0.5) and rates[100] == 0.0
    longer = TrainConfig(steps=201, warmup_steps=10, lr=1.0, min_lr=0.0, schedule="wsd", cooldown=0.2)
    assert [learning_rate(step, longer) for step in range(81)] == rates[:81]  # a longer run begins the same


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (3, 5), (10, 10)])
def test_no_run_is_too_short(schedule, steps, warmup):
    config = TrainConfig(steps=steps, warmup_steps=warmup, lr=1.0, schedule=schedule)
    assert all(0 < learning_rate(step, config) <= 1 for step in range(steps + 3))
