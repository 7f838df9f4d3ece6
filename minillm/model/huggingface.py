"""Load and save whole models as folders that Hugging Face's classes read too: config.json and safetensors.

Loading is strict: a missing or left-over tensor is an error that names it. A configuration that no published layout
can express is saved under our own names (model_type "minillm"). Weights are only ever read as safetensors, never
unpickled, since unpickling a downloaded file runs whatever code it carries.
"""

import difflib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.config import ModelConfig, from_dict
from minillm.files import replacing, write_atomically
from minillm.model.layouts import Layout, Rule
from minillm.model.published import LAYOUTS
from minillm.model.transformer import Transformer


# Which token ends a text is the tokenizer's to say; a class's own default could lie outside our vocabulary.
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which file, what is wrong with it and what to do."""


def load_pretrained(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                    without: Collection[str] = ()) -> Transformer:
    """The model in a folder with config.json and safetensors (one file, or several with an index).

    without: tensors of the file that belong to something else, such as another head; a model without its own is tied.
    Raises: CheckpointError for a missing, truncated or foreign file, and for missing or left-over tensors.
    """
    folder = Path(folder)
    theirs = _read_json(folder / "config.json")
    layout = _layout_named(theirs.get("model_type"))
    try:
        config = from_dict(ModelConfig, layout.fields(theirs) if layout else theirs["minillm"], str(folder / "config.json"))
    except KeyError as missing:
        raise CheckpointError(f"{folder / 'config.json'} has no {missing}, which a {theirs.get('model_type')} needs.") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error
    tensors = {name: tensor for name, tensor in _read_tensors(folder).items() if name not in without}
    if strange := [n for n, t in tensors.items() if t.dtype not in FLOATS and not n.endswith(layout.skip if layout else ())]:
        raise CheckpointError(f"{folder}: {strange[0]} holds {tensors[strange[0]].dtype}, so these weights are quantised or no "
                              f"weights at all. Load a checkpoint in float32, float16 or bfloat16.")
    if layout:
        tensors = {name.removeprefix(layout.prefix): tensor for name, tensor in tensors.items()}
        tensors = {n: t for n, t in tensors.items() if not n.endswith(layout.skip or ("\0",))}
    # The file decides whether the head is the embedding: published flags are not to be trusted.
    rules = layout.rules_for(config) if layout else _own_rules(config)
    embed, head = ("embed.weight", "head.weight") if not layout else _embedding_names(rules)
    tied = head not in tensors or (embed in tensors and torch.equal(tensors[head], tensors[embed]))
    if tied:
        tensors.pop(head, None)
    model = Transformer(replace(config, tied=tied), device="meta")
    ours = _unpack(rules, tensors, model, folder)
    # Copies: the tensors just read are windows into the file, and the file may change under a running model.
    model.load_state_dict({name: t.to(dtype=dtype, device=device, copy=True).contiguous() for name, t in ours.items()},
                          strict=False, assign=True)
    if tied:
        model.head.weight = model.embed.weight
    model.layout = layout
    return model


def save_pretrained(model: Transformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors, so that `load_pretrained` and Hugging Face's class read them back.

    Each file is written under a temporary name and renamed. Adapters are left out (minillm/peft/saving.py).
    Raises: OSError when the disk is full; ValueError for quantised weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout = layout_for(model.config)
    tensors = {n: t.detach().to("cpu").contiguous() for n, t in model.state_dict().items()}
    wanted = [rule.theirs for rule in _own_rules(model.config)]  # not what adapters have brought
    if lost := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{lost[0]} is not there as a matrix. If it is quantised, call dequantize_linears(model) first, or save the "
                         f"adapter alone.")
    tensors = {name: tensors[name] for name in wanted}
    if layout:
        tensors = _pack(layout, tensors, model.config)
        about = {"architectures": [layout.architecture], "model_type": layout.model_type,
                 "tie_word_embeddings": model.config.tied, **NO_TOKENS, **layout.config_json(model.config)}
    else:
        about = {"model_type": "minillm", "minillm": asdict(model.config)}
    kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_atomically(folder / "config.json", json.dumps(about | {"dtype": kind}, indent=2))
    save_tensors(folder / "model.safetensors", tensors)


def layout_of(model: Transformer) -> Layout | None:
    """The published layout that a model was loaded from, or the first that can say its configuration."""
    return getattr(model, "layout", None) or layout_for(model.config)


def layout_for(config: ModelConfig) -> Layout | None:
    """The published layout that can say all of `config`, found by translating it there and back."""
    for layout in LAYOUTS:
        try:
            back = ModelConfig(**layout.fields(layout.config_json(config)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if _essence(back) == _essence(config):
            return layout
    return None


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, whose header says how long it must be.

    Raises: CheckpointError when it is missing, truncated or no safetensors.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    actual = path.stat().st_size
    with open(path, "rb") as file:
        head = int.from_bytes(file.read(8), "little")
        text = file.read(min(head, actual))
    try:
        header = json.loads(text) if head == len(text) else None
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, TypeError, KeyError):
        raise CheckpointError(f"{path} ({actual:,} bytes) is not a whole safetensors file: its header cannot be read. "
                              f"Copy it again, or use another checkpoint.") from None
    expected = 8 + head + max(ends, default=0)
    if actual != expected:
        raise CheckpointError(f"{path} is incomplete: it has {actual:,} of {expected:,} bytes. "
                              f"Copy it again, or use another checkpoint.")
    return load_file(path)


def _unpack(rules: tuple[Rule, ...], tensors: dict[str, Tensor], model: Transformer, folder: Path) -> dict[str, Tensor]:
    """Their tensors under our names, every one used once and every one of ours found."""
    wanted = {name: p.shape for name, p in model.named_parameters()}
    left, ours, missing = dict(tensors), {}, []
    for rule, theirs, names in rules_filled_in(rules, model.config):
        if names[0] not in wanted:
            continue
        if theirs not in left:
            missing.append(theirs)
            continue
        for name, tensor in zip(names, rule.unpack(left.pop(theirs), model.config), strict=True):
            if tensor.shape != wanted[name]:
                raise CheckpointError(f"{folder}: {theirs} gives {name} the shape {tuple(tensor.shape)}, but config.json "
                                      f"asks for {tuple(wanted[name])}. They do not belong together.")
            ours[name] = tensor
    if missing or left:
        raise CheckpointError(f"{folder}: the weights do not fit config.json. Missing: {_some(missing)}. "
                              f"Left over: {_some(list(left))}.")
    return ours


def _pack(layout: Layout, tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under their names."""
    packed = {}
    for rule, theirs, names in rules_filled_in(layout.rules_for(config), config):
        if names[0] in tensors:
            name = theirs if names[0].startswith("head.") else layout.prefix + theirs
            packed[name] = rule.pack(tuple(tensors[n] for n in names), config).contiguous()
    return packed


def rules_filled_in(rules: tuple[Rule, ...], config: ModelConfig) -> Iterator[tuple[Rule, str, list[str]]]:
    """Every rule with its names filled in, once for each layer where it has an {i}, and each expert where it has a {j}."""
    for rule in rules:
        for i in range(config.layers) if "{i}" in rule.theirs else [0]:
            for j in range(config.experts) if "{j}" in rule.theirs else [0]:
                yield rule, rule.theirs.format(i=i, j=j), [name.format(i=i, j=j) for name in rule.ours]


def _own_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Our own layout: every name stands for itself."""
    return tuple(Rule(name, (name,)) for name, _ in Transformer(config, device="meta").named_parameters())


def _embedding_names(rules: tuple[Rule, ...]) -> tuple[str, str]:
    """What the layout calls the embedding and the head."""
    by_ours = {rule.ours[0]: rule.theirs for rule in rules}
    return by_ours["embed.weight"], by_ours["head.weight"]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(_read_json(index)["weight_map"].values()))
        if lost := [shard for shard in shards if not (folder / shard).exists()]:
            raise CheckpointError(f"{folder} lacks {', '.join(lost)}, of the {len(shards)} files that {index.name} names. Copy it there.")
        return {name: t for shard in shards for name, t in load_tensors(folder / shard).items()}
    if not (folder / "model.safetensors").exists() and list(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} has only pickled weights ({next(folder.glob('*.bin')).name}), which can run any "
                              f"code when opened. Convert them to safetensors first.")
    return load_tensors(folder / "model.safetensors")


def _read_json(path: Path) -> dict:
    """A JSON file, or an error that says what is wrong with it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a checkpoint.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not whole JSON: {error}.") from None


def _layout_named(model_type: str | None) -> Layout | None:
    """The layout of a published model type; None for our own."""
    if model_type == "minillm":
        return None
    for layout in LAYOUTS:
        if layout.model_type == model_type:
            return layout
    known = [layout.model_type for layout in LAYOUTS] + ["minillm"]
    near = difflib.get_close_matches(str(model_type), known, n=1)
    hint = f" The nearest is {near[0]!r}." if near else ""
    raise CheckpointError(f"config.json says model_type {model_type!r}, which cannot be loaded.{hint} These can: {', '.join(known)}.")


def _essence(config: ModelConfig) -> ModelConfig:
    """A configuration with its defaults filled in, without what means nothing in it or what only a fresh model or the
    weights' file decides."""
    rope, stretched = config.pos == "rope", config.rope_scaling != "none"
    theta = config.rope_theta if rope else 1.0
    meaningless = {} if config.experts else {"top_k": 2, "norm_topk": True}
    if not stretched:
        meaningless |= {"rope_context": None}
    if config.rope_scaling not in ("yarn", "llama3"):
        meaningless |= {"rope_slow": 1.0, "rope_fast": 32.0}
    local = (config.rope_theta_local or theta) if rope and "l" in config.pattern else theta
    return replace(config, kv_heads=config.kv_size, head_dim=config.head_size, ffn_width=config.ffn_size, rope_theta=theta,
                   rope_theta_local=local, rope_dim=config.rope_size if rope else None,
                   attn_scale=round(config.attn_scale or config.head_size ** -0.5, 12), bias=tuple(sorted(config.bias)),
                   init_residual=True, init_std=0.02, tied=True, **meaningless)


def _some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more if names else "none"

