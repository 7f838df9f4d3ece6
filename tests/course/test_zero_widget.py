"""What the widget of lesson 12 draws, read as text."""

import re

from minillm.course.zero_widget import PARTS, render_zero, zero_slider
from minillm.plan.devices import DEVICES


def widths(page):
    """Of the bars, stage by stage."""
    found = [float(width) for width in re.findall(r"<rect [^>]*width='([\d.]+)'", page)]
    return [found[4 * stage:4 * stage + 4] for stage in range(4)]


def test_the_papers_example():
    page = render_zero(7_500_000_000, 64, "half", DEVICES["v100-32g"])
    assert re.findall(r"([\d.]+) GB, (fits|does not fit); sends ([\d.]+B) numbers", page) == [
        ("120.0", "does not fit", "14.8B"), ("31.4", "fits", "14.8B"), ("16.6", "fits", "14.8B"), ("1.9", "fits", "22.1B")]
    assert "<b>7.5B parameters on 64 GPUs</b>" in page and "v100-32g: 32 GB" in page
    assert all(part in page for part in PARTS)
    whole, one, two, three = widths(page)
    assert sum(whole) == 400 and whole[0] == one[0] == two[0] == 50 and whole[1] == one[1] == 50
    assert one[2] == round(100 / 64, 2) and two[1] == three[0] == round(50 / 64, 2)  # shared out to 64


def test_one_gpu_shares_with_nobody_and_microbatches_cost():
    alone = render_zero(10 ** 9, 1, "float", DEVICES["h100"])
    assert alone.count("18.0 GB, fits; sends 0 numbers") == 4 and "on 1 GPU<" in alone
    assert "2 + 4 + 4 + 8 = 18 bytes a parameter" in alone and "h100: 80 GB" in alone
    many = render_zero(10 ** 9, 2, "half", DEVICES["h100"], 4)
    assert re.findall(r"([\d.]+) Ψ<", many) == ["1.00", "1.00", "2.50", "6.00"] and "4 microbatches" in many


def test_controls_redraw():
    slider = zero_slider()
    before = slider.children[-1].value
    assert before == render_zero(round(10 ** 9.9), 64, "half", DEVICES["v100-32g"])
    slider.children[0].children[1].value = 512
    slider.children[1].children[2].value = 8
    assert slider.children[-1].value == render_zero(round(10 ** 9.9), 512, "half", DEVICES["v100-32g"], 8) != before
