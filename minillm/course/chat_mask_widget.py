"""A conversation token by token: what the model only reads, and what it learns to write.

As in widgets.py: a pure `render_mask(...) -> html`, which is the static figure, and a few lines that redraw it.
"""

import html
from collections.abc import Mapping, Sequence

import ipywidgets as widgets

from minillm.course.plots import COLOURS
from minillm.course.widgets import _redrawn, spell
from minillm.text.chat import TEMPLATES, Template, render

BOX = "border-radius:3px;padding:1px 3px;margin:1px;display:inline-block;font-family:monospace;"


def render_mask(template: Template, tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """Each token in its place; learned ones filled, special ones in bold, ids on hovering, and how many there are of each."""
    ids, learned = render(template, tokenizer, messages)
    special = {number: name for name, number in tokenizer.special_tokens.items()}
    boxes = []
    for number, counts in zip(ids, learned):
        look = f"background:{COLOURS[0]};color:white" if counts else "background:#EFEFEA;color:#222"
        text = special.get(number) or spell(tokenizer.token_bytes(number))
        bold = ";font-weight:bold" if number in special else ""
        boxes.append(f"<span title='id {number}' style='{BOX}{look}{bold}'>{html.escape(text)}</span>")
        if text.endswith("⏎"):
            boxes.append("<br>")
    return (f"<div style='line-height:1.9'>{len(ids)} tokens, of which <b style='color:{COLOURS[0]}'>{sum(learned)} are learned</b>"
            f"<br>{''.join(boxes)}</div>")


def mask_box(tokenizer, system: str = "", question: str = "56+21=", answer: str = "77") -> widgets.Widget:
    """Type a conversation of two turns, choose a template that the tokenizer can write, and see its mask."""
    fields = [widgets.Text(value=value, description=name) for name, value in (("system", system), ("user", question), ("assistant", answer),
                                                                              ("user", "And 3+4?"), ("assistant", "7"))]
    names = widgets.Dropdown(options=["minillm", "llama2", "alpaca", "vicuna", "chatml"], description="template")

    def draw() -> str:
        template = TEMPLATES[names.value]
        stand_in = {name: "<|endoftext|>" if "/" in name or "end" in name else "<|user|>" for name in template.special
                    if name not in tokenizer.special_tokens}
        system, *turns = [field.value for field in fields]
        said = [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(turns)]
        note = "<i>" + html.escape(f"{', '.join(stand_in)} stand as {', '.join(stand_in.values())}, which this tokenizer has") + "</i>"
        return render_mask(template.renamed(stand_in), tokenizer, [{"role": "system", "content": system}] * bool(system) + said) + (note if stand_in else "")
    return _redrawn([names, *fields], [names, *fields], draw)
