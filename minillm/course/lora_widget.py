"""A calculator to play with: choose a model, a rank and the matrices, and see what LoRA trains and what it takes.

As in widgets.py: a pure `render_lora(...) -> html`, and a few lines that redraw it. Left out: activations.
"""

import ipywidgets as widgets

from minillm.course.widgets import _named, _redrawn
from minillm.model.families import PRESETS
from minillm.model.transformer import Transformer, num_params
from minillm.peft.freeze import count_trained
from minillm.peft.lora import LoraConfig, add_lora
from minillm.plan.memory import state_bytes, tuning_bytes
from minillm.plan.training import short

PARTS = {"q and v": ("q", "v"), "attention": ("attention.*",), "all matrices": ("attention.*", "ffn.*")}
MODELS = ("gpt2", "gpt3", "llama-7b", "llama-65b", "llama3-8b", "mistral-7b")
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""A number: its code, its share of a group's scale in 8 bits, and of that scale's own scale."""


def render_lora(name: str, rank: int, parts: str) -> str:
    """What LoRA trains, and bytes at 16 a trained parameter, beside full fine-tuning's."""
    model = Transformer(PRESETS[name], device="meta")
    whole = num_params(model)
    packed = sum(w.numel() for key, w in model.named_parameters() if key.startswith("blocks.") and w.ndim == 2)
    add_lora(model, LoraConfig(rank, targets=PARTS[parts]))
    size = count_trained(model)
    four_bits = 2 * (whole - packed) + round(packed * NF4_BITS / 8)
    tuned = {kind: f"{tuning_bytes(frozen, size.trained, 'half').total / 1e9:,.1f} GB"
             for kind, frozen in (("LoRA", 2 * whole), ("QLoRA", four_bits))}
    return _named({name: f"{short(whole)} parameters, LoRA of rank {rank} in {parts}",
                   "trained": f"{size.trained:,}, {size.share:.3%} of all",
                   "its file": f"{2 * size.trained / 1e6:,.1f} MB in 16 bits",
                   "full": f"{state_bytes(whole, 'half').total / 1e9:,.1f} GB", **tuned})


def lora_calculator() -> widgets.Widget:
    """Choose them."""
    model = widgets.Dropdown(options=MODELS, value="llama-7b", description="model")
    power = widgets.IntSlider(value=3, min=0, max=8, description="log₂ r")
    parts = widgets.Dropdown(options=list(PARTS), description="matrices")
    return _redrawn([widgets.HBox([model, power, parts])], [model, power, parts],
                    lambda: render_lora(model.value, 2 ** power.value, parts.value))
