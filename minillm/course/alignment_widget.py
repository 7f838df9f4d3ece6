"""A calculator to play with: a stage of alignment, the sizes of its models, and what is done to cut its memory.

As in widgets.py: a pure `render_alignment(...) -> html`, and a few lines that redraw it. An adapter here is 1% of its model.
Left out: activations, and the cache for sampling.
"""

import ipywidgets as widgets

from minillm.course.plots import COLOURS
from minillm.course.widgets import _redrawn
from minillm.plan.devices import GB
from minillm.plan.memory import STAGES, alignment_bytes, least_devices

SIZES = {"0.5 billion": 5 * 10 ** 8, "1.3 billion": 13 * 10 ** 8, "6 billion": 6 * 10 ** 9, "7 billion": 7 * 10 ** 9, "70 billion": 70 * 10 ** 9,
         "175 billion": 175 * 10 ** 9}
CUTS = {"LoRA": "adapters on what is trained", "reference": "reference elsewhere, or its answers precomputed", "reward": "a program gives the reward"}
PARTS = {"weights": COLOURS[0], "gradients": COLOURS[1], "master": COLOURS[2], "moments": COLOURS[4]}


def render_alignment(stage: str, policy: str, judge: str, cuts: tuple[str, ...] = ()) -> str:
    """A bar for each model of a stage, in gigabytes, and how many 80 GB devices hold them all. Cuts that do not apply are ignored."""
    sizes = {"policy": SIZES[policy], "reference": SIZES[policy], "critic": SIZES[judge], "reward": SIZES[judge]}
    adapters = {model: sizes[model] // 100 for model, trained in STAGES[stage].items() if trained and "LoRA" in cuts}
    asked = [model for model, trained in STAGES[stage].items() if not trained]
    found = alignment_bytes(stage, SIZES[policy], SIZES[judge], adapters=adapters, without=[model for model in asked if model in cuts])
    total = sum(states.total for states in found.values())
    rows = []
    for model, states in found.items():
        boxes = "".join(f"<span title='{part}' style='display:inline-block;height:1em;background:{tint};width:{26 * getattr(states, part) / total:.3f}em'>"
                        f"</span>" for part, tint in PARTS.items())
        trained = "trained" if STAGES[stage][model] else "asked"
        rows.append(f"<tr><td style='text-align:left'>{model}, {trained}</td><td style='text-align:right'>{states.total / GB:,.1f} GB</td>"
                    f"<td style='text-align:left;white-space:nowrap'>{boxes}</td></tr>")
    legend = " ".join(f"<span style='color:{tint}'>■</span> {part}" for part, tint in PARTS.items())
    return (f"<b>{stage}: policy {policy}, reward model and critic {judge}</b><table style='font-size:90%'>{''.join(rows)}</table>"
            f"<div>{total / GB:,.1f} GB together, at least {least_devices(total, 80 * GB):,} devices of 80 GB. {legend}</div>")


def alignment_calculator() -> widgets.Widget:
    """Choose them."""
    stage = widgets.Dropdown(options=list(STAGES), value="ppo", description="stage")
    policy = widgets.Dropdown(options=list(SIZES), value="7 billion", description="policy")
    judge = widgets.Dropdown(options=list(SIZES), value="7 billion", description="judge")
    boxes = {name: widgets.Checkbox(value=False, description=what, indent=False) for name, what in CUTS.items()}
    return _redrawn([widgets.HBox([stage, policy, judge]), widgets.HBox(list(boxes.values()))], [stage, policy, judge, *boxes.values()],
                    lambda: render_alignment(stage.value, policy.value, judge.value, tuple(n for n, box in boxes.items() if box.value)))
