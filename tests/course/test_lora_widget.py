"""The calculator says what the methods count, for every model and choice that it offers."""

import pytest

from minillm.course.lora_widget import MODELS, PARTS, lora_calculator, render_lora
from minillm.nn.quantize import quantize


def test_the_paper_s_number_and_bytes():
    page = render_lora("gpt3", 1, "q and v")
    assert "4,718,592" in page and "9.4 MB" in page  # arXiv:2106.09685 table 4; two bytes each
    page = render_lora("llama-7b", 8, "q and v")
    assert "107.8 GB" in page and "13.5 GB" in page and "4,194,304" in page  # 16 bytes and 2 of 6.74 billion


def test_four_bits_are_those_of_the_packing():
    import torch

    from minillm.course.lora_widget import NF4_BITS
    packed = quantize(torch.randn(256, 256), "nf4", double=True)
    assert packed.bytes * 8 / 256 ** 2 == pytest.approx(NF4_BITS, abs=1e-9)


@pytest.mark.parametrize(("name", "parts"), [(MODELS[0], parts) for parts in PARTS] + [(MODELS[-1], "all matrices")])
def test_every_choice_can_be_drawn(name, parts):
    assert "GB" in render_lora(name, 8, parts)


def test_the_widget_redraws():
    box = lora_calculator()
    before = box.children[-1].value
    box.children[0].children[1].value = 5
    assert box.children[-1].value != before
