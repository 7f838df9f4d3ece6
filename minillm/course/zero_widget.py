"""Lesson 12's widget: what a GPU holds and sends at each stage of ZeRO, for any model, any number of GPUs and any convention."""

import ipywidgets as widgets

from minillm.course.plots import COLOURS
from minillm.course.widgets import _redrawn
from minillm.plan.devices import DEVICES, Device
from minillm.plan.memory import CONVENTIONS, zero_bytes, zero_traffic
from minillm.plan.training import short

PARTS = {"weights": COLOURS[0], "gradients": COLOURS[1], "master": COLOURS[2], "moments": COLOURS[4]}
NAMES = ("whole copies", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def render_zero(parameters: int, ranks: int, convention: str, device: Device, microbatches: int = 1) -> str:
    """A bar a stage, of what each GPU keeps, with the GPU's own memory as a line; and the numbers that each sends in a step."""
    stages = [zero_bytes(parameters, ranks, stage, convention) for stage in range(4)]
    room, left, width = device.memory, 96, 400
    scale = width / max(stages[0].total, room)
    shapes = []
    for row, (name, states) in enumerate(zip(NAMES, stages, strict=True)):
        y, x = 24 + 28 * row, float(left)
        shapes.append(f"<text x='{left - 8}' y='{y + 15}' text-anchor='end'>{name}</text>")
        for part, colour in PARTS.items():
            wide = scale * getattr(states, part)
            shapes.append(f"<rect x='{x:.1f}' y='{y}' width='{wide:.2f}' height='20' fill='{colour}'/>")
            x += wide
        sent = zero_traffic(parameters, ranks, row, microbatches)
        fits = "fits" if states.total <= room else "does not fit"
        shapes.append(f"<text x='{left + width + 12}' y='{y + 15}'>{states.total / 1e9:,.1f} GB, {fits}; sends {short(sent)} numbers, {sent / parameters:.2f} Ψ</text>")
    line = left + scale * room
    shapes.append(f"<line x1='{line:.1f}' x2='{line:.1f}' y1='18' y2='138' stroke='black' stroke-dasharray='4 3'/>"
                  f"<text x='{line:.1f}' y='13' text-anchor='{'end' if line > left + width / 2 else 'start'}'>{device.name}: {room / 1e9:,.0f} GB</text>")
    legend = "".join(f"<span style='color:{colour};padding-right:1em'>&#9632; {part}</span>" for part, colour in PARTS.items())
    each = " + ".join(str(getattr(CONVENTIONS[convention], part)) for part in PARTS)
    picture = f"<svg width='{left + width + 370}' height='142' style='font:12px sans-serif;background:#fff'>{''.join(shapes)}</svg>"
    return (f"<div><b>{short(parameters)} parameters on {ranks:,} GPU{'s' * (ranks > 1)}</b>, {each} = {CONVENTIONS[convention].total} bytes a parameter, "
            f"{microbatches} microbatch{'es' * (microbatches > 1)}; activations and buffers come on top</div>{picture}<div>{legend}</div>")


def zero_slider() -> widgets.Widget:
    """Choose a size, a number of GPUs, bytes a parameter, a GPU and microbatches."""
    size = widgets.FloatSlider(value=9.9, min=8, max=12.3, step=0.1, description="log₁₀ Ψ")
    ranks = widgets.SelectionSlider(options=[2 ** power for power in range(13)], value=64, description="GPUs")
    convention = widgets.Dropdown(options=list(CONVENTIONS), value="half", description="gradients")
    device = widgets.Dropdown(options=list(DEVICES), value="v100-32g", description="GPU")
    parts = widgets.Dropdown(options=[1, 2, 4, 8, 16], value=1, description="microbatches")
    controls = [size, ranks, convention, device, parts]
    return _redrawn([widgets.HBox([size, ranks]), widgets.HBox([convention, device, parts])], controls,
                    lambda: render_zero(round(10 ** size.value), ranks.value, convention.value, DEVICES[device.value], parts.value))
