"""Adapters as folders in PEFT's layout: adapter_config.json and adapter_model.safetensors, megabytes beside a base of gigabytes.

LoRA, prompt and prefix tuning are written and read under PEFT's names for the published class of the base, with the same
rewriting of rows as whole checkpoints (model/layouts.py), so PEFT loads ours and we load PEFT's. Where the class keeps queries,
keys and values in one matrix, their changes are put together block by block: the rank is then their sum, the function the
same. PEFT has no bottlenecks, and its gates differ from LLaMA-Adapter's, so these two have names of their own.
Source: PEFT's docs/source/developer_guides/checkpoint.md. Left out: DoRA, trained biases, modules_to_save.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from minillm.files import write_atomically
from minillm.model.huggingface import CheckpointError, layout_of, load_pretrained, load_tensors, rules_filled_in, save_tensors
from minillm.model.layouts import Rule
from minillm.peft.adapter import add_adapters
from minillm.peft.freeze import Adapter
from minillm.peft.llama_adapter import add_llama_adapter
from minillm.peft.lora import LINEAR, LoraConfig, adapter_names, attach_lora, lora_layers
from minillm.peft.prefix import add_prefix
from minillm.peft.prompt import add_prompt

CONFIG, WEIGHTS, FRONT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
OWN = {"bottleneck": add_adapters, "llama_adapter": add_llama_adapter}


@dataclass(frozen=True)
class Place:
    """A module of the published class and the one or several of ours that it holds. turned: it stores (in, out)."""

    theirs: str
    ours: tuple[str, ...]
    rule: Rule
    rows: tuple[int, ...]
    turned: bool


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, base: str | Path = "") -> None:
    """Write what was added to a model, and nothing of the base.

    name: which LoRA adapter.   base: the folder or name of the base model, which the adapter will say it belongs to.
    Raises: ValueError when there is nothing, two methods at once, or a layer that the published class has no module for.
    """
    settings = getattr(model, "adapter_settings", None)
    lora = name in adapter_names(model)
    if lora == bool(settings):
        there = f"LoRA ({name}) and a {settings['method']}: a folder holds one" if lora else f"no adapter called {name!r}, there are: " \
                f"{', '.join(adapter_names(model)) or 'none'}"
        raise ValueError(f"the model has {there}.")
    if lora:
        about, tensors = _lora_out(model, name)
    else:
        about, tensors = _virtual_out(model) if settings["method"] not in OWN else (
            {"peft_type": f"minillm {settings['method']}", "settings": settings},
            {name: model.get_parameter(name) for name in _added(model)})
    about = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "inference_mode": True} | about
    write_atomically(Path(folder) / CONFIG, json.dumps(about, indent=2))
    save_tensors(Path(folder) / WEIGHTS, {key: t.detach().to("cpu").contiguous().clone() for key, t in tensors.items()})


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Add a saved adapter to its base, frozen as after add_lora and the others. name: what a LoRA adapter is to be called.

    Raises: CheckpointError for files that are not whole, an adapter for another model, or of a kind that is not known.
    """
    folder = Path(folder)
    about, tensors = adapter_config(folder), load_tensors(folder / WEIGHTS)
    kind = about.get("peft_type")
    try:
        if kind == "LORA":
            return _lora_in(model, folder, about, tensors, name)
        if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
            return _virtual_in(model, kind, tensors["prompt_embeddings"])
        if kind in (f"minillm {method}" for method in OWN):
            settings = {key: tuple(value) if isinstance(value, list) else value for key, value in about["settings"].items()}
            OWN[settings.pop("method")](model, **settings)
            for name in _added(model):
                _fill(model.get_parameter(name), tensors[name], name)
            return None
    except KeyError as missing:
        raise CheckpointError(f"{folder} has no {missing}, which a {kind} adapter of this model needs.{_belongs(about)}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be added: {error}{_belongs(about)}") from error
    raise CheckpointError(f"{folder}: peft_type = {kind!r} cannot be loaded; LORA, PROMPT_TUNING and PREFIX_TUNING can.")


def adapter_config(folder: str | Path) -> dict:
    """What adapter_config.json says.  Raises: CheckpointError when it is not there or not whole."""
    try:
        return json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(folder) / CONFIG} cannot be read: {error}.") from None


def load_adapted(folder: str | Path, **options) -> nn.Module:
    """The base that an adapter names, with the adapter; or simply the model, where the folder has no adapter.

    options: of load_pretrained.   Raises: CheckpointError as `load_adapter` and `load_pretrained`.
    """
    if not (Path(folder) / CONFIG).exists():
        return load_pretrained(folder, **options)
    model = load_pretrained(adapter_config(folder)["base_model_name_or_path"], **options)
    load_adapter(model, folder)
    return model


def _places(model: nn.Module) -> Iterator[Place]:
    """Every matrix of the published class, or of our own where there is none."""
    layout, config = layout_of(model), model.config
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (*LINEAR, nn.Embedding))}
    filled = rules_filled_in(layout.rules_for(config), config) if layout else (
        (Rule(f"{name}.weight", (f"{name}.weight",)), f"{name}.weight", [f"{name}.weight"]) for name in modules)
    for rule, theirs, weights in filled:
        names = tuple(weight.removesuffix(".weight") for weight in weights)
        if not theirs.endswith(".weight") or not all(name in modules for name in names):
            continue
        rows = tuple(getattr(modules[n], "out_features", None) or modules[n].num_embeddings for n in names)
        probe = rule.pack(tuple(torch.zeros(size, 1) for size in rows), config)
        front = layout.prefix if layout and names[0] != "head" else ""
        theirs = front + theirs.removesuffix(".weight")
        if probe.ndim == 2:  # transformers 5 renames GPT-NeoX's head when it reads a checkpoint
            yield Place("lm_head" if theirs == "embed_out" else theirs, names, rule, rows, turned=probe.shape[0] == 1)


def _join(place: Place, parts: list[Tensor], model: nn.Module) -> Tensor:
    """Our rows as their module has them, as (out, ...)."""
    joined = place.rule.pack(tuple(parts), model.config)
    return joined.T if place.turned else joined


def _lora_out(model: nn.Module, name: str) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and weights of a LoRA adapter under PEFT's names."""
    layers, tensors, ranks, alphas, turned = lora_layers(model, name), {}, {}, {}, False
    config = next(iter(layers.values())).lora[name].config
    left, every = set(layers), list(_places(model))
    for place in every:
        pairs = {ours: layers[ours].lora[name] for ours in place.ours if ours in layers}
        left -= set(place.ours)
        if not pairs:
            continue
        rank, first = sum(pair.config.rank for pair in pairs.values()), next(iter(pairs.values()))
        if isinstance(layers.get(place.ours[0]), nn.Embedding):
            both = {"lora_embedding_A": first.B.T, "lora_embedding_B": first.A.T}
        else:
            columns = iter(torch.eye(rank).to(first.A).split([pair.config.rank for pair in pairs.values()]))
            parts = [pairs[ours].B @ next(columns) if ours in pairs else torch.zeros(rows, rank).to(first.A)
                     for ours, rows in zip(place.ours, place.rows, strict=True)]
            both = {"lora_A.weight": torch.cat([pair.A for pair in pairs.values()]), "lora_B.weight": _join(place, parts, model)}
        tensors |= {f"{FRONT}{place.theirs}.{key}": tensor for key, tensor in both.items()}
        ranks[place.theirs], turned = rank, turned or place.turned
        alphas[place.theirs] = first.config.scale * (math.sqrt(rank) if config.rank_stabilised else rank)
    if left:
        raise ValueError(f"{sorted(left)[0]} has no module of its own in the published class, so PEFT cannot have its change.")
    tied = model.config.tied and any("lora_embedding" in key for key in tensors)
    return {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
            "use_rslora": config.rank_stabilised, "fan_in_fan_out": turned, "target_modules": _short(ranks, every),
            "rank_pattern": {m: r for m, r in ranks.items() if r != config.rank},
            "alpha_pattern": {m: a for m, a in alphas.items() if a != config.alpha},
            } | ({"ensure_weight_tying": True} if tied else {}), tensors


def _short(chosen: dict[str, int], every: list[Place]) -> list[str]:
    """target_modules: the ends of the names where all modules with that end are meant, else whole names."""
    ends = {name.split(".")[-1] for name in chosen}
    meant = {place.theirs for place in every if place.theirs.split(".")[-1] in ends}
    return sorted(ends if meant == set(chosen) else chosen)


def _lora_in(model: nn.Module, folder: Path, about: dict, tensors: dict[str, Tensor], name: str) -> None:
    """Attach and fill a LoRA adapter."""
    shared = LoraConfig(about["r"], about["lora_alpha"], tuple(about["target_modules"]), about.get("lora_dropout", 0.0),
                        about.get("use_rslora", False))
    left = {key: t for key, t in tensors.items() if ".base_layer." not in key}  # PEFT adds whole embeddings
    found: dict[str, tuple[LoraConfig, Tensor, Tensor]] = {}
    for place in _places(model):
        front = f"{FRONT}{place.theirs}."
        if f"{front}lora_embedding_A" in left:
            pairs = [(left.pop(f"{front}lora_embedding_B").T, left.pop(f"{front}lora_embedding_A").T)]
        elif f"{front}lora_A.weight" in left:
            A, B = left.pop(f"{front}lora_A.weight"), left.pop(f"{front}lora_B.weight")
            if len(B) != sum(place.rows):
                raise ValueError(f"{place.theirs} of the adapter has {len(B)} rows, of this model {sum(place.rows)}.")
            pairs = [(A, part) for part in place.rule.unpack(B.T if place.turned else B, model.config)]
        else:
            continue
        config = replace(shared, rank=len(pairs[0][0]), alpha=_pattern(about, "alpha_pattern", place.theirs, shared.alpha))
        found |= {ours: (config, *pair) for ours, pair in zip(place.ours, pairs, strict=True)}
    if left:
        raise ValueError(f"this model has no place for {sorted(left)[0]} and {len(left) - 1} others.")
    if model.config.tied and ("embed" in found) + ("head" in found) == 1 and not about.get("ensure_weight_tying"):
        raise ValueError("it changes only one of the embedding and the head, which in this model are one matrix.")
    if model.config.tied and "embed" in found and "head" in found and not all(map(torch.equal, found["embed"][1:], found["head"][1:])):
        raise ValueError("it changes the embedding and the head each in its own way, and in this model they are one matrix.")
    attach_lora(model, {ours: config for ours, (config, _, _) in found.items()}, name)
    for ours, (_, A, B) in found.items():
        pair = model.get_submodule(ours).lora[name]
        _fill(pair.A, A, ours)
        _fill(pair.B, B, ours)


def _pattern(about: dict, kind: str, module: str, default: float) -> float:
    """A setting of one module: patterns match the end of its name."""
    return next((value for key, value in about.get(kind, {}).items() if re.fullmatch(rf"(.*\.)?{key}", module)), default)


def _virtual_out(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """Prompt or prefix as PEFT's one table of virtual tokens, (P, C) or (P, 2 · L · G · D)."""
    config = model.config
    about = {"num_layers": config.layers, "num_transformer_submodules": 1, "num_virtual_tokens": model.adapter_settings["length"]}
    if model.adapter_settings["method"] == "prompt":
        return about | {"peft_type": "PROMPT_TUNING", "token_dim": config.width, "num_attention_heads": config.heads}, {
            "prompt_embeddings": model.embed.soft_prompt.vectors}
    table = rearrange(model.prefix.table.detach(), "l two g p d -> p l two (g d)").clone()
    table[:, :, 0] = table[:, :, 0][..., _key_order(model)]
    return about | {"peft_type": "PREFIX_TUNING", "token_dim": config.kv_size * config.head_size, "prefix_projection": False,
                    "num_attention_heads": config.kv_size}, {"prompt_embeddings": table.flatten(1)}


def _virtual_in(model: nn.Module, kind: str, table: Tensor) -> None:
    """The way back."""
    config = model.config
    if kind == "PROMPT_TUNING":
        add_prompt(model, len(table))
        return _fill(model.embed.soft_prompt.vectors, table, "prompt_embeddings")
    if table.shape[1] != (size := 2 * config.layers * config.kv_size * config.head_size):
        raise ValueError(f"a virtual token has {table.shape[1]} numbers, and keys and values of this model {size}.")
    table = rearrange(table, "p (l two n) -> p l two n", l=config.layers, two=2).clone()
    table[:, :, 0] = table[:, :, 0][..., _key_order(model).argsort()]
    add_prefix(model, len(table))
    _fill(model.prefix.table, rearrange(table, "p l two (g d) -> l two g p d", g=config.kv_size), "prompt_embeddings")


def _key_order(model: nn.Module) -> Tensor:
    """For each number of their keys, its place in ours: rotary pairs may stand otherwise."""
    place = next(place for place in _places(model) if "blocks.0.attention.k" in place.ours)
    parts = [torch.arange(rows)[:, None] if ours.endswith(".k") else torch.full((rows, 1), -1)
             for ours, rows in zip(place.ours, place.rows, strict=True)]
    order = _join(place, parts, model).flatten()
    return order[order >= 0].long()


def _added(model: nn.Module) -> list[str]:
    """Names of what adapters have brought."""
    return [f"{front}.{name}" for front, module in model.named_modules() if isinstance(module, Adapter)
            for name, _ in module.named_parameters()]


def _fill(parameter: Tensor, value: Tensor, name: str) -> None:
    if parameter.shape != value.shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, and this model needs {tuple(parameter.shape)}.")
    with torch.no_grad():
        parameter.copy_(value)


def _belongs(about: dict) -> str:
    base = about.get("base_model_name_or_path")
    return f" It was made for {base}." if base else ""
