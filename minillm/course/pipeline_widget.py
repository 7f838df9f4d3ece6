"""A pipeline to play with: choose a schedule and its sizes, and follow one microbatch through it.

As in widgets.py: a pure `render_pipeline(...) -> html`, and a few lines that redraw it.
"""

import ipywidgets as widgets

from minillm.course.plots import ACTIONS
from minillm.course.widgets import _redrawn
from minillm.parallel.schedules import Schedule, Timed, gpipe, interleaved, one_f_one_b, peak_live, pipedream, zero_bubble
from minillm.plan.timeline import Timeline, Times, simulate

SCHEDULES = {"GPipe": gpipe, "1F1B": one_f_one_b, "interleaved": interleaved, "ZB-H1": zero_bubble, "PipeDream": pipedream}
CHUNKS = 2  # stages a rank of the interleaved one
WIDTH, ROW, LEFT = 700, 26, 62


def plan_pipeline(name: str, ranks: int, microbatches: int, ratio: float) -> tuple[Schedule, Timeline]:
    """A schedule by its name and how it runs, one model for all: a rank's forward takes 1, its backward `ratio`."""
    if name == "interleaved":
        schedule, parts = interleaved(ranks, microbatches, CHUNKS), CHUNKS
    else:
        schedule, parts = SCHEDULES[name](ranks, microbatches), 1
    return schedule, simulate(schedule, Times(1.0 / parts, ratio / 2 / parts, ratio / 2 / parts))


def render_pipeline(name: str, ranks: int, microbatches: int, ratio: float = 2.0, follow: int | None = None) -> str:
    """The timeline of a schedule, as wide as its time beside GPipe's, and what it costs. follow: a microbatch, the others pale."""
    try:
        schedule, timeline = plan_pipeline(name, ranks, microbatches, ratio)
    except ValueError as error:
        return f"<div style='color:{ACTIONS['backward']}'>{error}</div>"
    slowest = plan_pipeline("GPipe", ranks, microbatches, ratio)[1].makespan
    held = peak_live(schedule)
    boxes = [f"<text x='{LEFT - 8}' y='{ROW * rank + 18}' text-anchor='end'>rank {rank}</text>"
             f"<text x='{LEFT + WIDTH + 8}' y='{ROW * rank + 18}'>{held[rank]}</text>" for rank in range(ranks)]
    boxes += [_box(timed, WIDTH / slowest, ranks, follow) for timed in timeline.actions if timed.end > timed.start]
    head = (f"<b>{name}</b>, {ranks} ranks, {microbatches} microbatches: time {timeline.makespan:g}, of which {timeline.bubble:.0%} idle; "
            f"on the right, the most {'chunks of ' * (name == 'interleaved')}microbatches whose activations a rank holds")
    if follow is not None:
        mine = [timed for timed in timeline.actions if timed.action.microbatch == follow]
        head += (f"<br>microbatch {follow}: from {min(timed.start for timed in mine):g} to {max(timed.end for timed in mine):g}, "
                 f"and worked on for {sum(timed.end - timed.start for timed in mine):g} of it" if mine else
                 f"<br>there is no microbatch {follow}")
    return (f"<div>{head}</div><svg width='{LEFT + WIDTH + 40}' height='{ROW * ranks + 6}' "
            f"style='font:12px sans-serif;background:#fff'>{''.join(boxes)}</svg>")


def _box(timed: Timed, scale: float, ranks: int, follow: int | None) -> str:
    """One action: a rectangle with its microbatch's number, pale if another one is followed."""
    action, start, end = timed
    rank, x, width = action.stage % ranks, LEFT + scale * start, scale * (end - start)
    strength = (1.0 if follow in (None, action.microbatch) else 0.18) * (1.0 if action.stage < ranks else 0.65)
    number = f"<text x='{x + width / 2:.1f}' y='{ROW * rank + 18}' text-anchor='middle' fill='#fff'>{action.microbatch}</text>"
    return (f"<g><title>{action}, from {start:g} to {end:g}</title><rect x='{x:.1f}' y='{ROW * rank + 3}' width='{max(0.5, width - 1):.1f}' "
            f"height='{ROW - 4}' fill='{ACTIONS[action.kind]}' opacity='{strength:.2f}'/>{number if width > 13 and strength > 0.5 else ''}</g>")


def pipeline_player(ranks: int = 4, microbatches: int = 8) -> widgets.Widget:
    """Choose a schedule, its sizes and how long a backward takes; press play to follow one microbatch after another."""
    name = widgets.Dropdown(options=list(SCHEDULES), value="1F1B", description="schedule")
    size = widgets.IntSlider(value=ranks, min=1, max=8, description="ranks")
    parts = widgets.IntSlider(value=microbatches, min=1, max=24, description="microbatches")
    ratio = widgets.FloatSlider(value=2.0, min=0.5, max=4.0, step=0.25, description="backward")
    play, follow = widgets.Play(min=0, max=24, interval=900), widgets.IntSlider(min=0, max=24, description="follow")
    widgets.jslink((play, "value"), (follow, "value"))
    note = widgets.Label("0 follows nobody, 1 the first microbatch")
    return _redrawn([widgets.HBox([name, size]), widgets.HBox([parts, ratio]), widgets.HBox([play, follow, note])],
                    [name, size, parts, ratio, follow],
                    lambda: render_pipeline(name.value, size.value, parts.value, ratio.value, follow.value - 1 if follow.value else None))
