"""The engine's step with ZeRO: `ParallelConfig(dp=4, zero=1)` shares out the optimizer's states among the data-parallel ranks,
zero = 2 the gradients too, zero = 3 the weights too (minillm/parallel/zero1.py to zero3.py).

What is saved is dense, as everywhere, so a run can change its stage, or leave ZeRO, at any checkpoint.
Differs from engine.py: what the optimizer sees are pieces, of which each data-parallel rank has other ones, so norms are summed
over those ranks, too. With precision in 16 bits and no master_weights, products are cast by autocast, whose copies of the
weights stay until backward: zero = 3 then saves less. `--engine torch` does 2 and 3 by FSDP2:
minillm/fsdp_engine.py.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.data.loader import IGNORED, Batch
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.parallel.stage_weights import SharedParameters
from minillm.parallel.tensor_parallel import global_norm, part_of
from minillm.parallel.zero1 import Zero1
from minillm.parallel.zero2 import Zero2
from minillm.parallel.zero3 import fully_shard
from minillm.train.precision import DTYPES


class ZeroEngine(Engine):
    """`Engine` whose data-parallel ranks share out what zero says. Raises: as Engine, and ValueError for what does not go together."""

    kind, saves = "zero", True

    def __init__(self, model: ModelConfig | Transformer, train: TrainConfig, parallel: ParallelConfig, **options):
        check_zero(train, parallel)
        self._narrow = DTYPES[train.precision] if train.master_weights else None
        super().__init__(model, replace(train, master_weights=False), parallel, **options)  # ZeRO has masters of its own
        self.config = train

    def evaluate(self, batch: Batch) -> float:
        """As Engine's. Where weights come and go every rank has to run the model, one without rows for a row without targets."""
        if not (self.zero.shared or len(batch.ids)):
            batch = Batch(batch.ids.new_zeros(1, batch.ids.shape[1]), batch.targets.new_full((1, batch.ids.shape[1]), IGNORED))
        return super().evaluate(batch)

    def clip(self, max_norm: float) -> Tensor:
        """As Engine's: the norm over all ranks."""
        self._unscale()
        once = self.shared.first if self.pipe_group else self.weights
        norm = self.zero.norm(global_norm(self.model, self.tensor_group, {name: self.weights[name] for name in once}))
        norm = self.shared.norm(norm) if self.pipe_group else norm
        torch.nn.utils.clip_grads_with_norm_(self.weights.values(), max_norm if max_norm > 0 else float("inf"), norm)
        return norm

    def step(self) -> bool:
        """As Engine's."""
        updated = super().step()
        if updated and not self.masters:
            self.zero.publish()
        return updated

    def whole_model(self) -> Transformer:
        """As Engine's; where weights come and go always a dense copy."""
        if self.zero.shared and not (self.tensor_group or self.pipe_group):
            return self.model
        dense = {name: weight.to(self._narrow or weight.dtype) for name, weight in self.gather(self.zero.pieces).items()}
        whole = Transformer(self.model.config, device="meta")
        tied = {"head.weight": dense["embed.weight"]} if whole.config.tied else {}
        whole.load_state_dict(dense | tied, assign=True)
        if tied:
            whole.head.weight = whole.embed.weight
        return whole.train(self.model.training)

    def load_weights(self, dense: dict[str, Tensor]) -> None:
        """As Engine's."""
        self.zero.load(part_of(self.model, self.tensor_group, dense) if self.tensor_group else dense)

    def _replicate(self) -> Zero1:
        options = dict(dtype=self._narrow, gradients=torch.float32 if self._narrow else None)
        if self.parallel.zero == 3:
            self.zero = fully_shard(self.model, self.group, **options)
        else:
            several = SharedParameters(self.weights, self.pipe_group).holders if self.pipe_group else ()
            self.zero = {1: Zero1, 2: Zero2}[self.parallel.zero](
                self.model, self.group, bucket_bytes=max(1, int(self.parallel.bucket_mb * 2 ** 20)), apart=several, **options)
        self.weights, self.masters = self.zero.pieces, self.zero if self._narrow else None
        return self.zero

    def _everyones_count(self, batch: Batch) -> Tensor:
        """As Engine's. Sums that are there stay: new ones are added to them."""
        if self.pipe_group:
            self.shared.divide(self.weights)
        count = torch.tensor(batch.count, device=self.device)
        dist.all_reduce(count, group=self.group)
        return count.clamp(min=1)

    def gather(self, mine: dict[str, Tensor], split: bool = True) -> dict[str, Tensor]:
        """As Engine's, of pieces."""
        return super().gather(self.zero.gather(mine) if split else mine, split)

    def _part(self, name: str, dense: Tensor) -> Tensor:
        return self.zero.part_of({name: super()._part(name, dense)})[name]


def check_zero(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Refuse what ZeRO cannot do, or what would make no sense. Raises: ValueError that says what would work."""
    stage, torchs = parallel.zero, parallel.engine == "torch"
    moving = stage == 3 or torchs  # weights come and go
    refused = {
        "engine = 'torch'": (torchs and stage == 1, "FSDP2 shares out the gradients, too. Use zero = 2"),
        f"engine = 'torch' and tp = {parallel.tp}": (torchs and parallel.tp > 1, "its DTensors are cut along one axis. Use "
                                                     "--parallel.engine ours"),
        f"optimizer = {train.optimizer!r}": (train.optimizer in ("muon", "adafactor"), "it looks at whole matrices, and a rank has some "
                                             "of the elements. Use \"fused\""),
        f"pp = {parallel.pp}": (parallel.pp > 1 and stage > 1, "each of the microbatches on their way would send its gradients, and with 3 "
                                "gather the weights. Use zero = 1"),
        "compile": (train.compile and moving, "weights come and go between blocks. Leave it out"),
        "precision = 'fp8'": (train.precision == "fp8" and moving, "it has to know the head, which comes and goes. Use \"bf16\""),
    }
    for what, (asked, why) in refused.items():
        if asked:
            raise ValueError(f"zero = {stage} with {what}: {why}, or zero = 0.")
