"""LoRA: a frozen matrix W, and beside it a trained product of two thin ones: W x + scale · B A x.

What fine-tuning changes in a matrix has a low rank, so r · (in + out) numbers do for in · out. B begins at zero, so the model
begins as it was; after training B A can be added into W, and then costs nothing. A layer keeps its class and its weights'
names: a hook adds the product to what it returns. Where W is packed in 4 bits (minillm/nn/quantize.py) the same is QLoRA.
Sources: arXiv:2106.09685 §4, arXiv:2312.03732 (scale alpha/√r), arXiv:2305.14314. Left out: tensor-parallel layers.
"""

import difflib
import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.nn.quantize import QuantizedLinear
from minillm.peft.freeze import Adapter, freeze

LINEAR = (nn.Linear, QuantizedLinear)


@dataclass(frozen=True)
class LoraConfig:
    """One adapter."""

    rank: int = 8
    """r, the inner size of the product."""
    alpha: float = 16.0
    """The product is scaled by alpha / rank."""
    targets: tuple[str, ...] | str = ("q", "v")
    """Which layers: the end of a name (q, attention.q, blocks.3.ffn.up, head, embed) or a pattern (*.ffn.*)."""
    dropout: float = 0.0
    """Of what goes into the product, in training."""
    rank_stabilised: bool = False
    """Scale by alpha / √rank, which keeps the size of the change when the rank grows."""

    def __post_init__(self):
        """Refuse what cannot work."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank = {self.rank}, alpha = {self.alpha}: both must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: must be at least 0 and below 1.")
        if not self.targets:
            raise ValueError(f"targets = {self.targets!r}: names are needed, such as (\"q\", \"v\").")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LowRank(nn.Module):
    """scale · B A. Shapes: A (r, in), B (out, r); as a table of rows, out is V and in is C.

    Cost: r · (in + out) parameters.
    """

    def __init__(self, rows: int, columns: int, config: LoraConfig, like: Tensor, generator: torch.Generator | None):
        super().__init__()
        bound, dtype = 1 / math.sqrt(columns), torch.promote_types(like.dtype, torch.float32)
        start = torch.empty(config.rank, columns).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(like.device, dtype))
        self.B = nn.Parameter(torch.zeros(rows, config.rank, device=like.device, dtype=dtype))
        self.config, self.dropout = config, nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch rows"]:
        """What is added to a linear layer's output."""
        return F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A), self.B) * self.config.scale

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch C"]:
        """What is added to an embedding's rows."""
        return F.embedding(ids, self.B) @ self.A * self.config.scale

    def delta(self) -> Float[Tensor, "rows C"]:
        """The change of the whole matrix."""
        return self.B @ self.A * self.config.scale


class LoraLayer(Adapter, nn.ModuleDict):
    """The low-rank changes of one layer by adapter's name: which are in use, and which are already in the weight."""

    def __init__(self):
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()


def add_lora(model: nn.Module, config: LoraConfig = LoraConfig(), name: str = "default", *, seed: int = 0) -> list[str]:
    """Freeze the model and give every layer that `config.targets` names a low-rank change, the only thing in use and trained.

    Returns the names of those layers. A tied head and its embedding are one matrix, so they get one change together.
    Raises: ValueError for targets that match nothing, a rank above a matrix's, or a name that is taken.
    """
    layers = matching_layers(model, config.targets)
    for layer, module in layers.items():
        if config.rank > min(_shape(module)):
            raise ValueError(f"rank = {config.rank} is above what {layer} of {_shape(module)} can have: at most "
                             f"{min(_shape(module))}, and far less saves anything.")
    attach_lora(model, dict.fromkeys(layers, config), name, seed=seed)
    return list(lora_layers(model, name))


def attach_lora(model: nn.Module, layers: dict[str, LoraConfig], name: str, *, seed: int = 0) -> None:
    """As `add_lora`, with a configuration for each layer by its full name."""
    if name in adapter_names(model):
        raise ValueError(f"an adapter called {name!r} is there already. Give another name, or use_lora(model, {name!r}).")
    freeze(model)
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(getattr(model, "config", None), "tied", False)
    for layer, config in layers.items():
        module = model.get_submodule(layer)
        both = (model.embed, model.head) if tied and (module is model.embed or module is model.head) else (module,)
        lora = _lora_of(both)
        if name not in lora:
            like = next(t for t in (*module.parameters(False), *module.buffers(False)) if t.is_floating_point())
            lora[name] = LowRank(*_shape(module), config, like, generator).train(module.training)
    use_lora(model, name)


def use_lora(model: nn.Module, *names: str) -> None:
    """Switch to these adapters: their changes are summed, and they alone are trained. No name: the base as it was.

    Raises: ValueError for an unknown name, or while an adapter is merged into the weights.
    """
    _check_names(model, names)
    for layer, module in lora_layers(model).items():
        if module.lora.merged:
            raise ValueError(f"{', '.join(module.lora.merged)} is merged into {layer}: call unmerge_lora(model) first.")
        module.lora.active = tuple(name for name in names if name in module.lora)
        for name, pair in module.lora.items():
            pair.requires_grad_(name in names)


def merge_lora(model: nn.Module, *names: str) -> None:
    """Add changes into the weights, by default those in use: from now on they cost nothing.

    Raises: ValueError for a quantised layer, whose few values cannot take them, or what is merged already.
    """
    _check_names(model, names)
    layers = _distinct(lora_layers(model))
    for layer, module in layers.items():
        if isinstance(module, QuantizedLinear):
            raise ValueError(f"{layer} is stored in {module.form}, which rounds a small change away: call "
                             f"dequantize_linears(model) first, or keep the adapter beside it.")
        if again := set(names or module.lora.active) & set(module.lora.merged):
            raise ValueError(f"{', '.join(sorted(again))} is merged already.")
    for module in layers.values():
        _add_to_weight(module, [name for name in names or module.lora.active if name in module.lora], 1)


def unmerge_lora(model: nn.Module) -> None:
    """Take all merged changes out again; the weights are what they were, but for rounding."""
    for module in _distinct(lora_layers(model)).values():
        _add_to_weight(module, list(module.lora.merged), -1)


def adapter_names(model: nn.Module) -> list[str]:
    """The LoRA adapters of a model."""
    return sorted({name for module in lora_layers(model).values() for name in module.lora})


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The layers that have a low-rank change, or the one of that name."""
    return {layer: module for layer, module in model.named_modules() if isinstance(getattr(module, "lora", None), LoraLayer)
            and (name is None or name in module.lora)}


def matching_layers(model: nn.Module, targets: tuple[str, ...] | str) -> dict[str, nn.Module]:
    """Linear layers and embeddings by name: each target must be the end of a name, or a pattern for it.

    Raises: ValueError for a target that matches nothing, with the nearest names.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (*LINEAR, nn.Embedding))}
    found = {}
    for target in (targets,) if isinstance(targets, str) else targets:
        matched = {name: module for name, module in layers.items() if fnmatch(name, target) or fnmatch(name, f"*.{target}")}
        if not matched:
            parts = [part.split(".") for part in layers]
            ends = {".".join(part[-size:]) for part in parts for size in range(1, len(part))} | set(layers)
            near = difflib.get_close_matches(target, sorted(ends), n=3, cutoff=0.4)
            raise ValueError(f"no layer matches {target!r}. " + (f"The nearest are {', '.join(near)}. " if near else "")
                             + f"Names end in: {', '.join(sorted({part[-1] for part in parts}))}.")
        found |= matched
    return {name: layers[name] for name in layers if name in found}


def _lora_of(modules: tuple[nn.Module, ...]) -> LoraLayer:
    """Where the changes of one weight are kept; made at the first one, with the hook that adds them."""
    if not hasattr(modules[0], "lora"):
        lora = LoraLayer()
        for module in modules:
            module.lora = lora
            module.register_forward_hook(_add_changes)
    return modules[0].lora


def _add_changes(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """The hook. It holds nothing, so that a copy of the model has its own changes."""
    for name in module.lora.active:
        if name not in module.lora.merged:
            pair = module.lora[name]
            out = out + (pair.rows if isinstance(module, nn.Embedding) else pair)(args[0]).to(out.dtype)
    return out


@torch.no_grad()
def _add_to_weight(module: nn.Module, names: list[str], sign: int) -> None:
    """Merge (1) or unmerge (-1)."""
    for name in names:
        module.weight.add_((sign * module.lora[name].delta()).to(module.weight.dtype))
    merged = set(module.lora.merged) | set(names) if sign > 0 else set(module.lora.merged) - set(names)
    module.lora.merged = tuple(sorted(merged))


def _distinct(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each weight once: a tied head and its embedding share theirs."""
    return {name: module for name, module in {id(m.lora): (n, m) for n, m in reversed(layers.items())}.values()}


def _check_names(model: nn.Module, names: tuple[str, ...]) -> None:
    known = adapter_names(model)
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"no adapter is called {strange[0]!r}; there are: {', '.join(known) or 'none'}.")


def _shape(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features
