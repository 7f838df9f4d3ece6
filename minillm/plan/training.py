"""How long pretraining takes on given GPUs, and how many of them it needs at the least.

Two sums: operations over what the GPUs do in a day, and bytes over what each of them holds. Both are lower bounds. The
first leans on a utilisation that has to be guessed (30 to 50% of the peak is usual, see tests/model/test_flops.py for
published ones); the second leaves activations out. Left out: what the layout costs, which is what later files are for.
"""

import math
from dataclasses import dataclass

from minillm.config import ModelConfig
from minillm.model.families import preset
from minillm.model.flops import matmul_weights, training_days, training_flops, training_flops_per_token
from minillm.model.transformer import Transformer, num_params
from minillm.plan.devices import GB, Device
from minillm.plan.memory import CONVENTIONS, States, least_devices, state_bytes, zero_bytes

TOKENS_PER_PARAMETER = 20
"""About what makes the best model of a given compute. Source: Chinchilla, arXiv:2203.15556."""

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class TrainingPlan:
    """What a run costs. Units: operations, days, bytes."""

    device: Device
    gpus: int
    precision: str
    utilisation: float
    parameters: int
    multiplied: int
    """N of 6ND: weights that each token is multiplied by. No embedding table, and of all experts those that are used."""
    tokens: int
    context: int | None
    """Tokens that attention looks over; None when only a number of parameters is known, and attention is not counted."""
    flops: float
    """Operations of the whole training, attention's scores with them."""
    days: float
    states: States
    convention: str

    @property
    def six_nd(self) -> float:
        """The rule of thumb."""
        return training_flops(self.multiplied, self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / (self.days * 86_400 * self.gpus)

    @property
    def least_gpus(self) -> int:
        """GPUs that hold the states, spread evenly and without activations."""
        return least_devices(self.states.total, self.device.memory)


def plan_training(model: ModelConfig | int, device: Device, *, gpus: int = 1, tokens: int | None = None,
                  utilisation: float = 0.4, precision: str | None = None, convention: str | None = None,
                  context: int | None = None) -> TrainingPlan:
    """What it takes to train a model, or just a number of parameters.

    tokens: 20 a parameter by default.   utilisation: the share of the peak that is reached (MFU).
    precision: of the products; bf16 by default, and fp16 or fp32 where there is none.   context: the model's own by default.
    convention: what is kept for a parameter (plan/memory.py); by default "half" for 8 and 16 bits, else "fp32".
    Raises: ValueError for numbers that are not positive, formats that the device lacks or that contradict one another.
    """
    known = isinstance(model, ModelConfig)
    if context is not None and not known:
        raise ValueError(f"context = {context} for {model:,} parameters: attention's cost needs a model's shape. "
                         f"Name a preset.")
    parameters = num_params(Transformer(model, device="meta")) if known else model
    tokens = TOKENS_PER_PARAMETER * parameters if tokens is None else tokens
    if known and context is None:
        context = model.context
    for name, value in (("parameters", parameters), ("tokens", tokens), ("context", 1 if context is None else context)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1.")
    precision = precision or next(p for p in ("bf16", "fp16", "fp32") if p in device.peaks)
    convention = convention or ("fp32" if precision in ("fp32", "tf32") else "half")
    if precision in ("fp32", "tf32") and convention != "fp32" and convention in CONVENTIONS:
        raise ValueError(f"precision = {precision!r} with states {convention!r}: those are 16-bit weights. Use \"fp32\".")
    multiplied = matmul_weights(model) if known else model
    flops = tokens * training_flops_per_token(model, context) if known else training_flops(model, tokens)
    return TrainingPlan(device, gpus, precision, utilisation, parameters, multiplied, tokens, context, flops,
                        training_days(flops, gpus, device.peak(precision), utilisation),
                        state_bytes(parameters, convention), convention)


def render(plan: TrainingPlan, name: str) -> str:
    """The plan as a table: what, how much, and where it comes from."""
    each, peak = CONVENTIONS[plan.convention], plan.device.peak(plan.precision)
    rows = [
        ("parameters", short(plan.parameters), f"{plan.parameters:,}"),
        ("tokens", short(plan.tokens),
         f"{plan.tokens / plan.parameters:.3g} a parameter; {TOKENS_PER_PARAMETER} use compute best"),
        ("a token", power(plan.flops / plan.tokens),
         f"operations, forward and backward: 6 for each of {short(plan.multiplied)} weights"),
        ("", *_attention(plan)),
        ("training", power(plan.flops), f"operations; 6ND alone: {power(plan.six_nd)}"),
        ("speed", f"{plan.tokens_per_second:,.0f}",
         f"tokens/s a GPU, at {plan.utilisation:.0%} of {peak / 1e12:,.5g} TFLOP/s in {plan.precision}"),
        ("time", duration(plan.days), f"{short(plan.days * 24 * plan.gpus)} GPU-hours"),
        ("states", gigabytes(plan.states.total), f"{each.total} bytes a parameter: weights {each.weights}, gradients "
                                                 f"{each.gradients}, master copies {each.master}, moments {each.moments}"),
        ("least GPUs", f"{plan.least_gpus:,}", "to hold the states, spread evenly; activations come on top"),
        ("on each GPU", gigabytes(plan.states.total / plan.gpus), _room(plan)),
    ]
    lines = [f"{label:<12}{value:>11}   {note}" for label, value, note in rows]
    return "\n".join([f"{name} on {plan.gpus:,} x {plan.device.name}", *lines])


def _attention(plan: TrainingPlan) -> tuple[str, str]:
    """What attention's scores add, and over how many tokens."""
    if plan.context is None:
        return "?", "more for attention: that needs a model's shape, so it is not counted"
    return f"+{plan.flops / plan.six_nd - 1:.1%}", f"for attention over {plan.context:,} tokens"


def _room(plan: TrainingPlan) -> str:
    """Whether the states fit, whole or spread."""
    memory = plan.device.memory
    if plan.states.total > memory * plan.gpus:
        return f"more than the {gigabytes(memory)} that it holds: too few GPUs"
    if plan.gpus == 1:
        return f"of {gigabytes(memory)}"
    some = ", ".join(f"ZeRO-{stage} {gigabytes(zero_bytes(plan.parameters, plan.gpus, stage, plan.convention).total)}" for stage in (2, 1))
    whole = "fit" if plan.states.total <= memory else "do not fit"
    return f"of {gigabytes(memory)}, spread over all (ZeRO-3); {some}; whole copies (data parallel) {whole}"


def short(number: float) -> str:
    """Three digits and a unit: 65.3B."""
    for unit, size in reversed(UNITS.items()):
        if number >= size:
            return f"{number / size:.4g}{unit}" if number >= 1000 * size else f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def power(number: float) -> str:
    """Three digits and a power of ten: 5.70e23."""
    return f"{number:.2e}".replace("e+", "e")


def duration(days: float) -> str:
    """Days, or hours below one day."""
    if days < 1:
        return f"{days * 24:.3g} hours"
    return f"{days:.3g} days" if days < 1000 else f"{days:,.0f} days"


def gigabytes(size: float) -> str:
    """Bytes as GB, with one digit where that says something."""
    return f"{size / GB:,.0f} GB" if size >= 100 * GB else f"{size / GB:.3g} GB"


def parse_count(text: str) -> int:
    """A count as people write it: "1.4T", "300B", "1.4e12", "1,000,000". Raises: ValueError for anything else, or below 1."""
    written = text.strip().replace(",", "").upper()
    try:
        number = float(written[:-1]) * UNITS[written[-1]] if written[-1:] in UNITS else float(written)
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise ValueError(f"{text!r} is no count: write it as 300B, 1.4T or 1.4e12 (K, M, B and T are powers of 1,000).")
    return round(number)


def find_model(name: str) -> ModelConfig | int:
    """A preset by its name, or a number of parameters such as 70B.

    Raises: ValueError for what is neither, with the nearest preset.
    """
    try:
        return parse_count(name)
    except ValueError:
        return preset(name)
