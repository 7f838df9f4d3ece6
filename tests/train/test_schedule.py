import pytest

from minillm.config import TrainConfig
from minillm.train.schedule import warmup_cosine


def test_up_in_a_line_and_down_along_a_cosine():
    config = TrainConfig(steps=111, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert [warmup_cosine(s, config) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert warmup_cosine(10, config) == 1.0
    assert warmup_cosine(60, config) == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert warmup_cosine(110, config) == pytest.approx(0.1) == warmup_cosine(500, config)


def test_shortest_runs():
    assert warmup_cosine(0, TrainConfig(steps=1, warmup_steps=0, lr=1.0)) == 1.0
    assert warmup_cosine(0, TrainConfig(steps=1, warmup_steps=1, lr=1.0)) == 1.0
