"""The calculator shows what minillm/plan/memory.py counts, for every stage, size and cut that it offers."""

import re

import pytest

from minillm.course.alignment_widget import CUTS, SIZES, alignment_calculator, render_alignment
from minillm.plan.memory import STAGES


def gigabytes(page: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) GB", page)]


def test_instructgpts_models():
    page = render_alignment("ppo", "175 billion", "6 billion")
    assert gigabytes(page) == [2800, 96, 350, 12, 3258, 80] and "at least 41 devices" in page  # 3258 / 80 = 40.7


def test_cuts_take_away_what_they_say():
    whole = gigabytes(render_alignment("ppo", "7 billion", "7 billion"))
    assert whole == [112, 112, 14, 14, 252, 80]
    assert gigabytes(render_alignment("ppo", "7 billion", "7 billion", ("LoRA",))) == [15.1, 15.1, 0, 14, 44.2, 80]
    assert gigabytes(render_alignment("grpo", "7 billion", "7 billion", ("reference", "reward"))) == [112, 0, 0, 112, 80]
    assert gigabytes(render_alignment("dpo", "7 billion", "7 billion", ("reference", "reward"))) == [112, 0, 112, 80]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_drawn(stage):
    for size in SIZES:
        assert "GB together" in render_alignment(stage, size, "6 billion", tuple(CUTS))


def test_the_calculator_redraws():
    box = alignment_calculator()
    before = box.children[-1].value
    box.children[1].children[0].value = True
    assert gigabytes(before)[-2] == 252 and gigabytes(box.children[-1].value)[-2] == 44.2
