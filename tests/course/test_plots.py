import io
from itertools import combinations

import matplotlib
import matplotlib.pyplot as plt
import pytest

from minillm.course.plots import COLOURS, STYLES, bars, loss_curve, mesh_picture, use_style


@pytest.fixture(autouse=True)
def drawn_without_a_display():
    with matplotlib.rc_context():
        plt.switch_backend("agg")
        use_style()
        yield
        plt.close("all")


def png(ax):
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def test_lines_differ_in_style_as_well_as_in_colour():
    lines = plt.figure().gca().plot([[0] * len(COLOURS), [1] * len(COLOURS)])
    assert [line.get_color() for line in lines] == list(COLOURS)
    assert len(set(STYLES)) == len(COLOURS) == len(set(COLOURS))
    assert len({str(line._dash_pattern) for line in lines}) == len(lines)


def without_red(colour):
    """Roughly what somebody without red cones sees: red and green fall together."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return 0.15 * red + 0.85 * green, blue


def test_colours_can_be_told_apart_without_red_cones():
    for a, b in combinations(COLOURS, 2):
        assert max(abs(x - y) for x, y in zip(without_red(a), without_red(b))) > 0.1, (a, b)


def test_the_curve_shows_both_losses_and_names_its_limits():
    ax = loss_curve([(1, 6.0), (2, 4.0)], [(0, 6.2), (2, 4.1)], floor=1.25, start=6.931, title="t")
    assert [line.get_label() for line in ax.lines[:2]] == ["train, each step", "validation"]
    assert ax.lines[1].get_xdata().tolist() == [0, 2] and ax.lines[1].get_ydata().tolist() == [6.2, 4.1]
    assert [text.get_text() for text in ax.texts] == ["uniform guess: 6.931", "best possible: 1.250"]
    assert [line.get_ydata()[0] for line in ax.lines[2:]] == [6.931, 1.25]
    assert not loss_curve([(1, 2.0)], [(1, 2.0)]).texts


def test_bars_carry_their_values_with_the_first_on_top():
    ax = bars(["one", "two"], [1, 2_345.6], fmt="{:,.1f}", unit="tokens")
    assert [text.get_text() for text in ax.texts] == ["1.0", "2,345.6"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert ax.yaxis_inverted() and ax.get_xlabel() == "tokens"


def test_the_same_figure_is_the_same_file():
    assert png(bars(["a"], [1])) == png(bars(["a"], [1]))


def test_a_tree_shows_every_name_once_and_parents_left_of_children():
    from minillm.course.plots import tree
    ax = tree({"b": "a", "c": "a", "d": "c"}, {"b": "1 field"})
    places = {text.get_text().strip(): text.get_position() for text in ax.texts if text.get_text()}
    assert set(places) == {"a", "b", "c", "d", "1 field"} and places["a"][0] < places["c"][0] < places["d"][0]
    assert len({places[name] for name in "abcd"}) == 4


def test_tables_stand_side_by_side():
    import torch

    from minillm.course.plots import tables
    axes = tables({"one": torch.eye(3), "two": torch.ones(3, 3)}, labels=["x", "y", "z"])
    assert [ax.get_title() or ax.get_title(loc="left") for ax in axes] == ["one", "two"] and axes[0].images[0].get_array().shape == (3, 3)


def test_the_picture_of_a_mesh_frames_tensor_groups_and_colours_data_groups():
    ax = mesh_picture(16, tp=2, pp=4, dp=2)
    framed = [patch for patch in ax.patches if patch.get_facecolor()[3] == 0]
    squares = {int(text.get_text()): patch for text, patch in
               zip([t for t in ax.texts if t.get_text().isdigit()], [p for p in ax.patches if p.get_facecolor()[3]], strict=True)}
    assert len(framed) == 8 and len(squares) == 16 and {patch.get_width() for patch in framed} == {2}
    colour = {rank: square.get_facecolor() for rank, square in squares.items()}
    assert colour[0] == colour[2] != colour[1] == colour[3] and colour[4] == colour[6] != colour[0]
    assert squares[0].get_x() == squares[4].get_x() == squares[12].get_x()  # a pipeline group is a column
    assert not any("stage" in text.get_text() for text in mesh_picture(4, tp=2).texts)


def test_a_timeline_has_a_row_a_rank_and_a_box_an_action():
    from minillm.course.plots import gantt
    from minillm.parallel.schedules import interleaved, zero_bubble
    from minillm.plan.timeline import Times, simulate
    timeline = simulate(interleaved(2, 4, 2), Times(1.0, 1.0, 1.0))
    ax = gantt(timeline, unit="ms", scale=1000.0)
    assert len(ax.patches) == len(timeline.actions) == 2 * 2 * 2 * 4 and ax.get_xlim() == (0, 1000 * timeline.makespan)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert len({patch.get_facecolor() for patch in ax.patches}) == 4  # two kinds, each in two chunks
    assert {text.get_text() for text in ax.texts} == set("0123")
    assert len({patch.get_facecolor() for patch in gantt(simulate(zero_bubble(2, 4)), until=50).patches}) == 3
