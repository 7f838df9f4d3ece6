"""Talk to a model in a notebook: a field to type into, and the conversation above it, which grows as the answer is written.

As in widgets.py: a pure `render_conversation(messages) -> html`, which is the static figure, and a few lines around it.
`minillm chat` (chat.py) is the same in a terminal.
"""

import html
from collections.abc import Iterator, Mapping, Sequence

import ipywidgets as widgets

from minillm.course.plots import COLOURS
from minillm.infer.answer import stream_answer
from minillm.infer.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.text.chat import Template

BUBBLE = "display:inline-block;padding:.35em .8em;border-radius:.8em;max-width:75%;white-space:pre-wrap;text-align:left;"
SIDES = {"user": ("right", f"background:{COLOURS[0]};color:white"), "assistant": ("left", "background:#EFEFEA;color:#222"),
         "system": ("center", "color:#666;font-style:italic")}


def render_conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """What was said, the user on the right; nothing that was said is read as HTML."""
    rows = [f"<div style='text-align:{side};margin:.3em 0'><span style='{BUBBLE}{colours}'>{html.escape(message['content']) or '…'}</span></div>"
            for message in messages for side, colours in [SIDES[message["role"]]]]
    return "<div style='max-width:40em;font-size:14px'>" + "".join(rows) + "</div>"


def answering(model: Transformer, tokenizer, template: Template, messages: Sequence[Mapping[str, str]], max_new_tokens: int,
              temperature: float, seed: int | None = None) -> Iterator[list[dict[str, str]]]:
    """The conversation again and again, with more and more of the answer. Turns that do not fit the context are left out, the oldest first."""
    said = ""
    for piece in stream_answer(model, tokenizer, template, messages, max_new_tokens, sampling=Sampling(temperature), seed=seed):
        said += piece
        yield [*messages, {"role": "assistant", "content": said}]
    if not said:
        yield [*messages, {"role": "assistant", "content": ""}]


def chat_box(model: Transformer, tokenizer, template: Template, first: Sequence[str] = (), max_new_tokens: int = 100,
             seed: int | None = None) -> widgets.Widget:
    """The widget. first: questions that are asked at once, so that there is something to see."""
    model.eval()
    messages: list[dict[str, str]] = []
    shown, note = widgets.HTML(), widgets.HTML()
    typed = widgets.Text(placeholder="56+21=   or   Tell me a story about a fox.", layout=widgets.Layout(width="28em"))
    send, anew = widgets.Button(description="send"), widgets.Button(description="start over")
    heat = widgets.FloatSlider(value=0.7, min=0.0, max=1.5, step=0.1, description="temperature")

    def ask(question: str) -> None:
        try:
            for whole in answering(model, tokenizer, template, [*messages, {"role": "user", "content": question}], max_new_tokens, heat.value,
                                   None if seed is None else seed + len(messages)):
                shown.value = render_conversation(whole)
        except ValueError as error:
            note.value = html.escape(str(error))
            return
        messages[:], note.value = whole, ""

    def on_send(_) -> None:
        question, typed.value = typed.value.strip(), ""
        if question:
            ask(question)

    def on_new(_) -> None:
        messages.clear()
        shown.value = note.value = ""

    typed.continuous_update = False
    typed.observe(lambda change: on_send(None) if change["new"].strip() else None, names="value")  # the return key
    send.on_click(on_send)
    anew.on_click(on_new)
    for question in first:
        ask(question)
    return widgets.VBox([shown, widgets.HBox([typed, send, anew]), heat, note])
