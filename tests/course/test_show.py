import configparser
import re
from pathlib import Path

import pytest

import minillm.nn.block
from minillm.course.show import CSS, show
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


def test_a_stored_page_stays_valid_when_the_code_moves():
    # what nbval does to both sides before it compares them
    settings = configparser.RawConfigParser()
    assert settings.read(Path(__file__).parents[1] / "nbval_sanitize.cfg")
    rules = [(settings[name]["regex"], settings[name]["replace"]) for name in settings.sections()]

    def compared(page):
        for pattern, replacement in rules:
            page = re.sub(pattern, replacement, page)
        return page

    assert compared(show(causal)._repr_html_()) == compared(show(minillm.nn.block)._repr_html_()) == "<SHOWN SOURCE>"
    assert compared(repr(show(causal))) != compared(repr(show(minillm.nn.block)))
    assert compared("<Figure size 700x360 with 1 Axes>") == compared("<Figure size 1x2.5 with 12 Axes>")
    assert compared("<f at 0x7ff66aef00e0>") == compared("<f at 0x7f59529f0900>")
    assert compared("loss 1.25") == "loss 1.25"


def luminance(colour):
    """Relative luminance of #RRGGBB, WCAG 2.2."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("theme", "page"), [(0, "#FFFFFF"), (1, "#1E1E1E")], ids=["light", "dark"])
def test_every_colour_can_be_read(theme, page):
    colours = re.findall(r"--\w+: (#[0-9A-F]{6})", CSS)[5 * theme:][:5]
    assert len(colours) == 5
    for colour in colours:
        dark, light = sorted((luminance(colour), luminance(page)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour  # WCAG AA for text of this size
