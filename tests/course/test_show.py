import pytest

import minillm.nn.block
from minillm.course.show import show
from minillm.nn.masks import causal


def test_the_plain_form_does_not_change_with_the_code():
    assert repr(show(causal)) == "source of minillm.nn.masks.causal (minillm/nn/masks.py)"
    assert repr(show(minillm.nn.block)) == "source of minillm.nn.block (minillm/nn/block.py)"


def test_the_page_is_the_live_source_highlighted_and_folded_when_long():
    page = show(causal)._repr_html_()
    assert "places" in page and "<span class=" in page and "<details class='minillm-source' open>" in page
    import minillm.data.loader
    assert "<details class='minillm-source'>" in show(minillm.data.loader)._repr_html_()
    method = show(minillm.nn.block.Block.forward)
    assert method.code.startswith("def forward(self")  # the indentation of the class is gone


def test_a_value_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match="show\\(type\\(value\\)\\)"):
        show(3)
