import json

import pytest

from minillm.course.pretrained import COMMAND, FILES, FOLDER, load_course_model, measure


def test_the_stored_model_still_scores_what_it_says():
    said = json.loads((FOLDER / "metrics.json").read_text())
    found = measure(*load_course_model(), count=50)
    # 50 stories instead of 200: their mean differs by the spread between stories, about 5% of the loss
    assert found["loss"] == pytest.approx(said["loss"], rel=0.1)
    assert found["best_possible_loss"] < found["loss"] < 1.6 * found["best_possible_loss"]
    assert said["command"] == "minillm " + " ".join(COMMAND)


def test_it_is_small_enough_to_be_committed():
    assert sum((FOLDER / name).stat().st_size for name in FILES) < 4_000_000
