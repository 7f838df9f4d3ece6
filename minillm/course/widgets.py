"""Things to play with: each is a pure function `render_*(state) -> html` and a few lines that redraw it.

The pure part is what tests read and what a notebook shows as a static figure first; the widget only sets the value of
an HTML box when a control moves, so that nothing is printed and nothing flickers.
"""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ipywidgets as widgets

from minillm.config import ModelConfig
from minillm.course.plots import COLOURS
from minillm.model.families import PRESETS, changes
from minillm.model.flops import forward_flops, training_days
from minillm.model.sharding import sharding_rows, why_not
from minillm.model.transformer import Transformer, num_params
from minillm.nn.formats import FORMATS, bits_of
from minillm.plan.devices import DEVICES, Device
from minillm.plan.network import find_link
from minillm.plan.overlap import Sending, one_after_another, overlapped
from minillm.plan.training import duration, short
from minillm.text.bpe import BPETokenizer
from minillm.text.bpe_train import merge_pair
from minillm.course.scaling_law import ScalingLaw

LEFT = "'text-align:left;padding-right:1em'"
TINTS = ("#CFE4F5", "#FBE0C8", "#CDEBDD", "#F3DCE9", "#FBEFC9")


def merge_steps(text: str, tokenizer: BPETokenizer) -> list[list[bytes]]:
    """The tokens of one word after each merge, from single bytes to the end: always the lowest rank first.

    "lower" with merges lo, low, er -> [l o w e r], [lo w e r], [low e r], [low er].
    """
    parts = [bytes([byte]) for byte in text.encode("utf-8", "replace")]
    steps = [parts]
    while True:
        ranked = [(tokenizer.ranks[a + b], (a, b)) for a, b in zip(parts, parts[1:]) if a + b in tokenizer.ranks]
        if not ranked:
            return steps
        first, second = min(ranked)[1]
        parts = list(merge_pair(parts, (first, second), first + second))
        steps.append(parts)


def spell(token: bytes) -> str:
    """A token as one can read it: spaces as ␣, line ends as ⏎, parts of a character as hexadecimal bytes."""
    try:
        return token.decode().replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    except UnicodeDecodeError:
        return "".join(f"⟨{byte:02x}⟩" for byte in token)


def render_tokens(tokens: Sequence[bytes], title: str = "", ids: Sequence[int] | None = None) -> str:
    """A row of coloured tokens, numbered by their ids on hovering, and how many there are."""
    boxes = "".join(
        f"<span title='{'' if ids is None else f'id {ids[i]}'}' style='background:{TINTS[i % len(TINTS)]};color:#111;"
        f"border-radius:3px;padding:1px 2px;margin:1px;display:inline-block;font-family:monospace'>"
        f"{html.escape(spell(token))}</span>" for i, token in enumerate(tokens))
    head = f"<b>{html.escape(title)}</b> " if title else ""
    return (f"<div style='margin:.4em 0;line-height:1.9'>{head}<span style='opacity:.7'>{len(tokens)} tokens</span>"
            f"<br>{boxes}</div>")


def render_merge_step(text: str, tokenizer: BPETokenizer, step: int) -> str:
    """The tokens of a word after `step` merges, and which merge comes next."""
    steps = merge_steps(text, tokenizer)
    step = max(0, min(step, len(steps) - 1))
    parts = steps[step]
    if step + 1 < len(steps):
        merged = next((a, b) for a, b in zip(parts, parts[1:]) if a + b in steps[step + 1] and a + b in tokenizer.ranks
                      and merge_pair(parts, (a, b), a + b) == tuple(steps[step + 1]))
        rank = tokenizer.ranks[merged[0] + merged[1]]
        note = f"next: {html.escape(spell(merged[0]))} + {html.escape(spell(merged[1]))}, which has rank {rank}"
    else:
        note = "no two neighbours can be merged any more"
    return render_tokens(parts, f"after {step} merges") + f"<div style='opacity:.8'>{note}</div>"


def render_both(text: str, tokenizers: Mapping[str, Callable[[str], tuple[list[int], list[bytes]]]]) -> str:
    """One text cut by several tokenizers, one under another."""
    rows = []
    for name, cut in tokenizers.items():
        ids, tokens = cut(text)
        rows.append(render_tokens(tokens, name, ids))
    return "".join(rows) + f"<div style='opacity:.8'>{len(text)} characters, {len(text.encode('utf-8', 'replace'))} bytes</div>"


def merge_stepper(tokenizer: BPETokenizer, text: str = " unbelievable") -> widgets.Widget:
    """Type a word, press play, and watch its merges."""
    word = widgets.Text(value=text, description="word", continuous_update=True)
    most = 40
    play, slider = widgets.Play(min=0, max=most, interval=700), widgets.IntSlider(min=0, max=most, description="merges")
    widgets.jslink((play, "value"), (slider, "value"))
    return _redrawn([word, widgets.HBox([play, slider])], [word, slider],
                    lambda: render_merge_step(word.value, tokenizer, slider.value))


def token_colours(tokenizers: Mapping[str, Callable[[str], tuple[list[int], list[bytes]]]], text: str) -> widgets.Widget:
    """Type any text and see how each tokenizer cuts it."""
    area = widgets.Textarea(value=text, layout=widgets.Layout(width="95%", height="5em"))
    return _redrawn([area], [area], lambda: render_both(area.value, tokenizers))


def temperature_slider(write: Callable[[float, int], str], prompt: str) -> widgets.Widget:
    """Move the temperature, or the seed, and let the model write again. `write(temperature, seed)` gives the text."""
    temperature = widgets.FloatSlider(value=0.8, min=0.0, max=2.0, step=0.1, description="temperature",
                                      continuous_update=False)
    seed = widgets.IntSlider(value=0, min=0, max=20, description="seed", continuous_update=False)
    return _redrawn([temperature, seed], [temperature, seed],
                    lambda: render_text(prompt, write(temperature.value, seed.value)))


def render_text(prompt: str, text: str) -> str:
    """A model's text with its prompt in colour."""
    return (f"<div style='white-space:pre-wrap;font-family:Georgia,serif;max-width:44em;margin:.5em 0'>"
            f"<b style='color:{COLOURS[0]}'>{html.escape(prompt)}</b>{html.escape(text)}</div>")


def encoding_of(tokenizer: BPETokenizer) -> Callable[[str], tuple[list[int], list[bytes]]]:
    """Our tokenizer as `render_both` takes it: text -> (ids, the bytes of each)."""
    def cut(text: str) -> tuple[list[int], list[bytes]]:
        ids = tokenizer.encode(text)
        return ids, [tokenizer.token_bytes(i) for i in ids]
    return cut


def tiktoken_encoding(encoding) -> Callable[[str], tuple[list[int], list[bytes]]]:
    """A tiktoken encoding as `render_both` takes it."""
    def cut(text: str) -> tuple[list[int], list[bytes]]:
        ids = encoding.encode_ordinary(text)
        return ids, [encoding.decode_single_token_bytes(i) for i in ids]
    return cut


def render_attention(tokens: Sequence[str], weights, title: str = "") -> str:
    """Who looks at whom, as a picture: rows are queries, columns the keys they see, darker for more weight. (T, T)"""
    size, left = 22, 8 * max(len(token) for token in tokens) + 12
    side, parts = size * len(tokens), []
    for row, token in enumerate(tokens):
        name = html.escape(token)
        parts.append(f"<text x='{left - 6}' y='{left + size * row + 15}' text-anchor='end'>{name}</text>"
                     f"<text transform='translate({left + size * row + 15},{left - 6}) rotate(-90)'>{name}</text>")
        for column in range(row + 1):
            weight = float(weights[row][column])
            parts.append(f"<rect x='{left + size * column}' y='{left + size * row}' width='{size - 1}' height='{size - 1}' fill='{COLOURS[0]}' "
                         f"fill-opacity='{weight:.3f}' stroke='#ddd'><title>{name} looks at {html.escape(tokens[column])}: {weight:.2f}</title></rect>")
    head = f"<div><b>{html.escape(title)}</b></div>" if title else ""
    return (f"{head}<svg width='{left + side + 4}' height='{left + side + 4}' style='font:12px monospace;background:#fff'>{''.join(parts)}</svg>")


def attention_browser(look: Callable[[str], tuple[list[str], Sequence]], text: str, layers: int, heads: int) -> widgets.Widget:
    """Choose a layer and a head, type a sentence. `look(text)` gives its tokens and the weights [layer][head] (T, T)."""
    area = widgets.Text(value=text, description="text", continuous_update=False, layout=widgets.Layout(width="90%"))
    layer, head = widgets.IntSlider(min=0, max=layers - 1, description="layer"), widgets.IntSlider(min=0, max=heads - 1, description="head")

    def render() -> str:
        tokens, weights = look(area.value or " ")
        return render_attention(tokens, weights[layer.value][head.value], f"layer {layer.value}, head {head.value}")
    return _redrawn([area, widgets.HBox([layer, head])], [area, layer, head], render)


def render_family(base: ModelConfig, changed: Mapping[str, object]) -> str:
    """A configuration with some fields changed: what it costs, and which published one it is nearest to."""
    try:
        config = replace(base, **changed)
        parameters = num_params(Transformer(config, device="meta"))
    except ValueError as error:
        return f"<div style='color:{COLOURS[1]}'>{html.escape(str(error))}</div>"
    near = min((name for name in PRESETS if name != "first"), key=lambda name: len(changes(PRESETS[name], config)))
    left = ", ".join(f"{field}: {old} → {new}" for field, (old, new) in changes(PRESETS[near], config).items())
    rows = {"parameters": f"{parameters:,}", "cache a token": f"{4 * config.layers * config.kv_size * config.head_size / 1024:,.0f} KiB in bf16",
            "work a token": f"{forward_flops(config, 1024) / 1024 / 1e6:,.0f} million operations to read 1,024 tokens",
            "nearest": near + (f", but for {left}" if left else ", in all but size")}
    return _named(rows)


def family_builder(base: ModelConfig = PRESETS["gpt2"]) -> widgets.Widget:
    """Choose the fields of a decoder of GPT-2's size."""
    fields = {"block": ["pre", "post", "parallel", "parallel2", "sandwich", "branch"], "norm": ["layer", "rms"], "qk_norm": ["none", "head", "full"],
              "mlp": ["gelu_tanh", "relu", "swiglu", "geglu"], "pos": ["learned", "alibi", "rope", "relative"], "kv_heads": [12, 4, 1],
              "embed_norm": [False, True], "final_norm": [True, False], "tied": [True, False], "experts": [0, 8]}
    boxes = {name: widgets.Dropdown(options=options, value=getattr(base, name) if name != "kv_heads" else base.kv_size, description=name)
             for name, options in fields.items()}
    biases = widgets.Checkbox(value=True, description="biases")

    def render() -> str:
        changed = {name: box.value for name, box in boxes.items()} | {"bias": base.bias if biases.value else ()}
        return render_family(base, changed | {"kv_heads": None if boxes["kv_heads"].value == base.heads else boxes["kv_heads"].value})
    return _redrawn([widgets.GridBox([*boxes.values(), biases], layout=widgets.Layout(grid_template_columns="repeat(3, 310px)"))],
                    [*boxes.values(), biases], render)


def render_number(text: str) -> str:
    """A number as each format stores it: sign, exponent and mantissa in three colours, its value, and how far off that is."""
    try:
        number = float(text)
    except ValueError:
        return f"<div>{html.escape(text)} is no number: try 0.1, 65520, 1e-8 or -inf.</div>"
    rows = []
    for form in FORMATS.values():
        bits = bits_of(number, form)
        boxes = "".join(f"<span style='background:{tint};color:#111;padding:1px 3px;margin-right:2px'>{part}</span>"
                        for part, tint in zip(bits[:3], (TINTS[3], TINTS[0], TINTS[2])))
        rows.append(f"<tr><td>{form.name}</td><td style='text-align:left;font-family:monospace;white-space:nowrap'>{boxes}</td>"
                    f"<td>{bits.value:.10g}</td><td>{_off(number, bits.value)}</td></tr>")
    head = "<tr><th></th><th style='text-align:left'>sign, exponent, mantissa</th><th>value</th><th>off by</th></tr>"
    return f"<table style='font-size:90%'>{head}{''.join(rows)}</table>"


def _off(number: float, stored: float) -> str:
    """How far a stored number is from the one that was meant, in words or percent of it."""
    if stored == number or math.isnan(number):
        return "exact"
    if math.isinf(stored) or math.isinf(number):
        return "overflows"
    return "underflows" if stored == 0 else f"{100 * (stored / number - 1):+.2g}%"


def number_formats(number: str = "0.1") -> widgets.Widget:
    """Type a number and see its bits in every format."""
    box = widgets.Text(value=number, description="number", continuous_update=True)
    return _redrawn([box], [box], lambda: render_number(box.value))


def render_budget(law: ScalingLaw, power: float, device: Device, gpus: int, utilisation: float = 0.4) -> str:
    """What 10^power operations buy under a scaling law: the best size, its tokens, its loss, and how long some GPUs take."""
    flops = 10.0 ** power
    parameters, tokens = law.compute_optimal(flops)
    days = training_days(flops, gpus, device.peak("bf16" if "bf16" in device.peaks else "fp16"), utilisation)
    rows = {"budget": f"{flops:.1e} operations", "best size": f"{short(parameters)} parameters",
            "to read": f"{short(tokens)} tokens, {tokens / parameters:,.0f} a parameter",
            "expected loss": f"{law.loss(parameters, tokens):.3f} nats a token, of which {law.E:.3f} are the text's own",
            "half that size": f"{law.loss(parameters / 2, tokens * 2):.3f} on twice the tokens; twice the size, {law.loss(parameters * 2, tokens / 2):.3f} on half",
            "time": f"{duration(days)} on {gpus:,} x {device.name} at {utilisation:.0%} of their peak"}
    return _named(rows)


def budget_slider(laws: Mapping[str, ScalingLaw]) -> widgets.Widget:
    """Choose a law, a budget and GPUs."""
    law = widgets.Dropdown(options=list(laws), description="law")
    power = widgets.FloatSlider(value=23, min=12, max=27, step=0.1, description="log₁₀ FLOPs")
    device = widgets.Dropdown(options=list(DEVICES), value="h100", description="GPU")
    gpus = widgets.Dropdown(options=[1, 8, 64, 512, 2048, 16384], value=512, description="how many")
    controls = [law, power, device, gpus]
    return _redrawn([widgets.HBox([law, power]), widgets.HBox([device, gpus])], controls,
                    lambda: render_budget(laws[law.value], power.value, DEVICES[device.value], gpus.value))


def ring_states(size: int) -> list[tuple[list[list[frozenset[int]]], list[int]]]:
    """A ring all-reduce step by step: whose numbers are in chunk c of rank r, and which chunk each rank has just sent.

    The order is that of `ring_all_reduce` in minillm/parallel/collectives.py: size - 1 steps in which sums move on, and
    size - 1 in which finished chunks are handed round.
    """
    table = [[frozenset({rank})] * size for rank in range(size)]
    states = [([list(row) for row in table], [])]
    for step in range(2 * (size - 1)):
        adding = step < size - 1
        sent = [(rank - 1 - step) % size if adding else (rank - (step - size + 1)) % size for rank in range(size)]
        before = [list(row) for row in table]
        for rank, chunk in enumerate(sent):
            after = (rank + 1) % size
            table[after][chunk] = before[rank][chunk] | (table[after][chunk] if adding else frozenset())
        states.append(([list(row) for row in table], sent))
    return states


def render_ring(size: int, step: int) -> str:
    """The state of a ring all-reduce after so many steps: a row a rank, a column a chunk, darker the more is in the sum."""
    states = ring_states(size)
    step = max(0, min(step, len(states) - 1))
    table, sent = states[step]
    rows = []
    for rank, chunks in enumerate(table):
        cells = []
        for chunk, whose in enumerate(chunks):
            arrived = bool(sent) and sent[(rank - 1) % size] == chunk
            share = 0.12 + 0.6 * (len(whose) - 1) / max(1, size - 1)
            border = f"2px solid {COLOURS[1]}" if arrived else "2px solid transparent"
            cells.append(f"<td style='background:rgba(0,114,178,{share:.2f});border:{border};text-align:center;min-width:3.2em'>"
                         f"{'+'.join(map(str, sorted(whose)))}</td>")
        arrow = f"<td style='padding-left:.8em'>sent chunk {sent[rank]} to rank {(rank + 1) % size}</td>" if sent else ""
        rows.append(f"<tr><td>rank {rank}</td>{''.join(cells)}{arrow}</tr>")
    part = "before" if step == 0 else "sums move on" if step < size else "finished chunks go round"
    head = "".join(f"<th style='text-align:center'>chunk {chunk}</th>" for chunk in range(size))
    return (f"<div><b>step {step} of {2 * (size - 1)}</b>: {part}</div>"
            f"<table style='border-collapse:separate'><tr><th></th>{head}</tr>{''.join(rows)}</table>")


def ring_stepper(size: int = 4) -> widgets.Widget:
    """Press play, and watch the ring turn."""
    ranks = widgets.IntSlider(value=size, min=2, max=8, description="ranks")
    play, slider = widgets.Play(min=0, max=14, interval=900), widgets.IntSlider(min=0, max=14, description="step")
    widgets.jslink((play, "value"), (slider, "value"))
    return _redrawn([ranks, widgets.HBox([play, slider])], [ranks, slider], lambda: render_ring(ranks.value, slider.value))


def render_buckets(backward: float, size: float, bucket: float, ranks: int, link: str) -> str:
    """Buckets on a timeline with backward, and below the same without overlap, by the α-β model. Units: seconds, bytes."""
    link_named = find_link(link)
    together = overlapped(backward, size, bucket, ranks, link_named)
    alone = one_after_another(backward, size, bucket, ranks, link_named)
    ends, width, left = (together[-1].end, alone[-1].end), 600, 130
    scale, shapes = width / max(ends), []
    for row, (name, spans) in enumerate((("backward", [(0.0, backward)]), ("buckets", _spans(together, 1 / scale)), ("backward", [(0.0, backward)]),
                                         ("buckets, after it", _spans(alone, 1 / scale)))):
        y = 6 + 26 * row + 12 * (row > 1)
        shapes.append(f"<text x='{left - 8}' y='{y + 15}' text-anchor='end'>{name}</text>")
        for number, (start, end) in enumerate(spans):
            colour = COLOURS[0] if name == "backward" else (COLOURS[1], COLOURS[4])[number % 2]
            shapes.append(f"<rect x='{left + scale * start:.1f}' y='{y}' width='{max(0.5, scale * (end - start)):.1f}' height='20' fill='{colour}'/>")
    picture = f"<svg width='{left + width + 6}' height='126' style='font:12px sans-serif;background:#fff'>{''.join(shapes)}</svg>"
    return (f"<div><b>{len(together):,} bucket{'s' * (len(together) > 1)} of {bucket / 1e6:,.{0 if bucket > 1e7 else 1}f} MB</b>, {ranks} ranks, {link}: {1e3 * ends[0]:,.0f} ms "
            f"overlapped, {1e3 * (ends[0] - backward):,.0f} of them after backward; {1e3 * ends[1]:,.0f} without</div>{picture}")


def _spans(sendings: Sequence[Sending], pixel: float) -> list[tuple[float, float]]:
    """From when to when the wire is busy; buckets that are too narrow to be told apart are drawn as one."""
    spans: list[tuple[float, float]] = []
    for sending in sendings:
        if spans and sending.start - spans[-1][1] < pixel / 2 and sending.end - sending.start < 3 * pixel:
            spans[-1] = spans[-1][0], sending.end
        else:
            spans.append((sending.start, sending.end))
    return spans


def bucket_slider(backward: float, size: float) -> widgets.Widget:
    """Move the size of the buckets, and choose ranks and their link."""
    power = widgets.FloatSlider(value=7.4, min=6, max=10.2, step=0.1, description="log₁₀ bytes")
    ranks = widgets.Dropdown(options=[2, 8, 64, 512], value=8, description="ranks")
    link = widgets.Dropdown(options=["nvlink-4", "infiniband-ndr", "ethernet-100g", "ethernet-25g"], value="infiniband-ndr", description="link")
    return _redrawn([power, widgets.HBox([ranks, link])], [power, ranks, link],
                    lambda: render_buckets(backward, size, min(10 ** power.value, size), ranks.value, link.value))


def render_shards(name: str, ranks: int) -> str:
    """Which rank of tensor parallelism holds what of one block of a preset, or why it cannot be split so."""
    if reason := why_not(PRESETS[name], ranks):
        return f"<div style='color:{COLOURS[1]}'>{html.escape(reason)}</div>"
    (*head, _), *rows = [re.split(" {3,}", line) for line in sharding_rows(PRESETS[name], ranks).splitlines()]
    body = ""
    for parameter, whole, how, held in rows:
        copies = int(re.findall(r"each by (\d+)", held)[0]) if "each by" in held else 1
        strip = "".join(f"<span style='display:inline-block;width:{240 / ranks:.1f}px;height:1em;"
                        f"background:{'#DDDDDD' if how == 'whole' else TINTS[rank // copies % len(TINTS)]}'></span>" for rank in range(ranks))
        cells = (parameter, whole, how, f"<span style='white-space:nowrap'>{strip}</span>", held)
        body += f"<tr>{''.join(f'<td style={LEFT}>{cell}</td>' for cell in cells)}</tr>"
    titles = "".join(f"<th style={LEFT}>{cell}</th>" for cell in (*head, f"rank 0 to {ranks - 1}", "on each"))
    return f"<table><tr>{titles}</tr>{body}</table>"


def shard_browser(name: str = "llama3-8b", ranks: int = 4) -> widgets.Widget:
    """Choose a preset and a number of ranks."""
    model = widgets.Dropdown(options=list(PRESETS), value=name, description="model")
    size = widgets.BoundedIntText(value=ranks, min=1, max=64, description="ranks")
    return _redrawn([widgets.HBox([model, size])], [model, size], lambda: render_shards(model.value, size.value))


def _named(rows: Mapping[str, str]) -> str:
    """Names and what there is to say of them, as a table."""
    body = "".join(f"<tr><td style='padding-right:1em'>{k}</td><td style='text-align:left'>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{body}</table>"


def _redrawn(shown: list, controls: list, render: Callable[[], str]) -> widgets.Widget:
    """Controls above an HTML box that is drawn again whenever one of them changes."""
    box = widgets.HTML(value=render())

    def redraw(change) -> None:
        box.value = render()

    for control in controls:
        control.observe(redraw, names="value")
    return widgets.VBox([*shown, box])
