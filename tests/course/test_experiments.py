"""The stored experiments belong to the code that is there, and a row of them can be trained again."""

from dataclasses import replace

import pytest

from minillm.course import experiments
from minillm.course.experiments import families, positions
from minillm.data.prepare import DataConfig, prepare
from minillm.model.transformer import Transformer, num_params

EXPERIMENTS = {"positions": positions, "families": families}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_stored_rows_are_those_of_the_code(name):
    stored, code = experiments.results(name), EXPERIMENTS[name]
    assert list(stored["rows"]) == list(code.ROWS)
    for row, runs in stored["rows"].items():
        assert [run["seed"] for run in runs] == list(code.SEEDS)
        assert {run["parameters"] for run in runs} == {num_params(Transformer(code.ROWS[row], device="meta"))}
    assert stored["made"]["plan"]["steps"] == code.PLAN.steps and stored["made"]["command"].endswith(name)


def test_the_families_have_one_size():
    counts = [num_params(Transformer(config, device="meta")) for config in families.ROWS.values()]
    assert max(counts) / min(counts) < 1.04


def test_a_row_is_trained_and_measured(tmp_path):
    data = prepare(tmp_path, DataConfig(size=200_000), 512)
    seen = []
    model = experiments.train_row(positions.ROWS["rope"], replace(positions.PLAN, steps=3, batch_size=2), data, 128, 0,
                                  lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [1, 2, 3] and seen[2][1] < seen[0][1]
    assert set(families.measure(model, data)) == {"loss", "above best"}


def test_the_spread_of_the_seeds():
    mean, deviation = experiments.spread("positions", "128")["rope"]
    assert 0.5 < mean < 2 and 0 < deviation < 0.2
