"""What training keeps for every parameter, whatever the batch: weights, gradients, master copies, AdamW's two moments.

With weights in 16 bits it is the gradient that conventions disagree on; minillm/train/master_weights.py does all three.
Left out: activations, which depend on the batch and the context, the cache that answers are sampled with, buffers of
communication, and fragmentation. Sources: arXiv:1910.02054 §3.1 (half), §5 and §7 (ZeRO), Megatron-LM's distributed optimizer (float).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class States:
    """Bytes by what they hold, of one parameter or of a whole model."""

    weights: int
    gradients: int
    master: int
    """Float32 copies of weights that are kept in 16 bits."""
    moments: int
    """AdamW's running means of the gradient and of its square, in float32."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


CONVENTIONS = {
    "fp32": States(4, 4, 0, 4 + 4),  # also what autocast keeps: its 16-bit copies live as long as a layer runs
    "half": States(2, 2, 4, 4 + 4),  # ZeRO's 16
    "float": States(2, 4, 4, 4 + 4),  # Megatron's 18: gradients are added up in float32
    "both": States(2, 2 + 4, 4, 4 + 4),  # 20: float32 copies of 16-bit gradients, and neither dropped
}
"""Bytes of one parameter."""


def state_bytes(parameters: int, convention: str) -> States:
    """Bytes that a model's parameters take in training. Cost: 16, 16, 18 or 20 each.

    Raises: ValueError for an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"no convention is called {convention!r}: choose from {', '.join(CONVENTIONS)}.")
    return States(**{part: size * parameters for part, size in asdict(CONVENTIONS[convention]).items()})


def zero_bytes(parameters: int, ranks: int, stage: int, convention: str = "half") -> States:
    """Bytes that each rank keeps under ZeRO: stage 1 shares out master copies and moments, 2 gradients too, 3 weights too.

    Cost: with "half" 16Ψ, 4Ψ + 12Ψ/P, 2Ψ + 14Ψ/P, 16Ψ/P. Raises: ValueError for an unknown convention or stage.
    """
    if stage not in range(4):
        raise ValueError(f"stage = {stage}: ZeRO has the stages 1, 2 and 3, and 0 is whole copies.")
    shared = {"weights": 3, "gradients": 2, "master": 1, "moments": 1}
    return States(**{part: math.ceil(size / ranks) if stage >= shared[part] else size
                     for part, size in asdict(state_bytes(parameters, convention)).items()})


def zero_traffic(parameters: int, ranks: int, stage: int, microbatches: int = 1) -> float:
    """Elements that each rank sends in a step; stage 0 is data parallelism.

    Cost: (P-1)/P times 2Ψ, 2Ψ, 2Ψ, 3Ψ. Of M microbatches each has its own reduce-scatter from stage 2 on: (M + 1)Ψ, 3MΨ.
    """
    return (2, 2, microbatches + 1, 3 * microbatches)[stage] * parameters * (ranks - 1) / ranks


def tuning_bytes(frozen: int, trained: int, convention: str) -> States:
    """Fine-tuning a part: the base once, in `frozen` bytes as it is stored, and `trained` parameters with all their states.

    What is trained costs eight times its 16-bit weights at 16 bytes a parameter, ten times at 20; the base costs itself.
    """
    states = state_bytes(trained, convention)
    return replace(states, weights=states.weights + frozen)


STAGES: dict[str, dict[str, bool]] = {
    "sft": {"policy": True}, "reward": {"reward": True}, "dpo": {"policy": True, "reference": False},
    "ppo": {"policy": True, "critic": True, "reference": False, "reward": False},
    "grpo": {"policy": True, "reference": False, "reward": False}}
"""What takes part in each way of learning from people: model -> whether it is trained, or only asked."""


def alignment_bytes(stage: str, policy: int, judge: int | None = None, convention: str = "half", *,
                    adapters: Mapping[str, int] | None = None, without: Collection[str] = ()) -> dict[str, States]:
    """Bytes of each model that takes part: a trained one has all its states, one that is only asked its weights.

    policy: parameters of policy and reference.   judge: those of reward model and critic; as many by default.
    adapters: model -> trained parameters of an adapter, beside which the model is frozen; where the policy has one, the
    reference is the policy with its adapter off, and costs nothing.   without: models that are not on the device: a
    reference that is offloaded, or (DPO) whose answers are precomputed, a reward model that is a program.
    Raises: ValueError for an unknown stage, convention or model.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage is called {stage!r}: choose from {', '.join(STAGES)}.")
    adapters, models = adapters or {}, STAGES[stage]
    if unknown := (set(without) | set(adapters)) - set(models):
        raise ValueError(f"{', '.join(sorted(unknown))} takes no part in {stage}, which has {', '.join(models)}.")
    each, found = state_bytes(1, convention).weights, {}
    for model, trained in models.items():
        size = policy if model in ("policy", "reference") else policy if judge is None else judge
        if model in without or (model == "reference" and "policy" in adapters):
            found[model] = States(0, 0, 0, 0)
        elif model in adapters:
            found[model] = tuning_bytes(each * size, adapters[model], convention)
        else:
            found[model] = state_bytes(size, convention) if trained else States(each * size, 0, 0, 0)
    return found


def least_devices(size: int, memory: int) -> int:
    """How many devices of `memory` bytes hold `size` bytes, spread evenly over them and with nothing else there."""
    return math.ceil(size / memory)
