"""The picture of a mask has every token, and as many filled ones as are learned."""

import pytest

from minillm.course.chat_mask_widget import mask_box, render_mask
from minillm.course.plots import COLOURS
from minillm.course.pretrained import load_course_chat
from minillm.text.chat import TEMPLATES, render

TOKENIZER = load_course_chat()[1]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|end|> & 1+1="}, {"role": "assistant", "content": "2"}]


def test_every_token_is_there_and_the_learned_ones_are_filled():
    page = render_mask(TEMPLATES["minillm"], TOKENIZER, TALK)
    ids, learned = render(TEMPLATES["minillm"], TOKENIZER, TALK)
    assert page.count("<span") == len(ids) and page.count(f"background:{COLOURS[0]}") == sum(learned) == 2  # "2" and the end of the turn
    assert f"{len(ids)} tokens, of which" in page and "2 are learned" in page
    assert page.count("font-weight:bold'>&lt;|end|&gt;") == 3 and "&amp;" in page  # what the user typed is no special token


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_box_redraws_every_template(name):
    box = mask_box(TOKENIZER, "Be brief.")
    before = box.children[-1].value
    box.children[0].value = name
    assert (box.children[-1].value == before) == (name == "minillm") and "are learned" in box.children[-1].value
    shown = box.children[-1].value
    box.children[3].value = "a much longer answer than before"
    assert box.children[-1].value.count("<span") > shown.count("<span")
