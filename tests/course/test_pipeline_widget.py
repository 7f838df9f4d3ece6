"""The pipeline that one plays with says what the schedules say."""

import pytest

from minillm.course.pipeline_widget import SCHEDULES, pipeline_player, plan_pipeline, render_pipeline


@pytest.mark.parametrize("name, time", [("GPipe", 33), ("1F1B", 33), ("interleaved", 28.5), ("ZB-H1", 27), ("PipeDream", 33)])
def test_one_model_whatever_the_schedule(name, time):
    # 8 microbatches on 4 ranks: 24 of work, and a bubble of 9, 9, 9/2, 3 and 9
    schedule, timeline = plan_pipeline(name, 4, 8, 2.0)
    assert timeline.makespan == time and sum(timeline.idle(rank) for rank in range(4)) == 4 * (time - 24)
    page = render_pipeline(name, 4, 8)
    assert f"time {time:g}, of which {(time - 24) / time:.0%} idle" in page
    assert page.count("<rect") == sum(action.kind != "update" for actions in schedule for action in actions)


def test_the_most_that_is_held_stands_at_the_right():
    assert [f">{held}</text>" in render_pipeline("1F1B", 3, 6) for held in (3, 2, 1)] == [True] * 3
    assert render_pipeline("GPipe", 3, 6).count("x='770' y") == 3


def test_a_microbatch_is_followed():
    page = render_pipeline("1F1B", 2, 4, 1.0, follow=1)
    assert page.count("opacity='1.00'") == 4 and page.count("opacity='0.18'") == 12
    assert "microbatch 1: from 1 to 6, and worked on for 4 of it" in page
    assert "no microbatch 9" in render_pipeline("GPipe", 2, 4, follow=9)


def test_what_cannot_be_is_said():
    assert "do not come in groups of 3 ranks" in render_pipeline("interleaved", 3, 4)


def test_the_player_redraws():
    player = pipeline_player(2, 3)
    pages = [player.children[-1].value]
    assert pages[0] == render_pipeline("1F1B", 2, 3)
    for row, control, value in ((0, 0, "GPipe"), (0, 1, 3), (1, 0, 6), (1, 1, 1.0), (2, 1, 2)):
        player.children[row].children[control].value = value
        pages.append(player.children[-1].value)
    assert len(set(pages)) == 6 and pages[-1] == render_pipeline("GPipe", 3, 6, 1.0, follow=1)
    assert set(player.children[0].children[0].options) == set(SCHEDULES)
