"""`--engine torch --parallel.zero 3`: the engine's step with the weights shared out by torch's FSDP2, `fully_shard`.

What minillm/parallel/zero2.py and zero3.py do by flat tensors, torch does here by cutting the rows of each weight: parameters,
gradients and the optimizer's states are DTensors. zero = 3 frees a block's weights after its forward, zero = 2 keeps them until
backward (`reshard_after_forward=False`); in both they go after a step, and gradients are summed, as ours, in each microbatch.
What is saved is dense, so a run can go on without FSDP2, or leave it, at any checkpoint.
With master_weights the float32 DTensors are the masters, and their 16-bit copies live as long as a block is whole; autocast's,
as with ours, stay until backward.
Source: arXiv:2304.11277; torch.distributed.fsdp.fully_shard. Left out: tensor ranks beside it; zero = 1, which FSDP2 has no
form of; --parallel.bucket-mb, since one message carries a block.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.model.transformer import Transformer
from minillm.zero_engine import ZeroEngine


class FsdpEngine(ZeroEngine):
    """`ZeroEngine` on torch's FSDP2. Raises: as ZeroEngine."""

    kind = "fsdp"

    def evaluate(self, batch: Batch) -> float:
        """As ZeroEngine's. Without a backward nothing would free the weights that are whole."""
        nats = super().evaluate(batch)
        self.zero.reshard()
        return nats

    def clip(self, max_norm: float) -> Tensor:
        """As Engine's: the norm of DTensors is over all ranks."""
        return Engine.clip(self, max_norm).full_tensor()

    def _replicate(self) -> "Sharded":
        self.zero = Sharded(self.model, DeviceMesh.from_group(self.group, self.device.type), self._narrow, self.parallel.zero == 3)
        self.weights, self.masters = self.zero.pieces, self.zero if self._narrow else None
        return self.zero


class Sharded:
    """A model that `fully_shard` has shared out, with what ZeroEngine asks of minillm/parallel/zero1.py's classes.

    dtype: 16 bits to compute in; None is the weights' own.   free: whether a block's weights go after its forward.
    Cost: in each microbatch a gather and a reduce-scatter for each block and for the rest; with free, another gather a block.
    """

    shared = False

    def __init__(self, model: Transformer, mesh: DeviceMesh, dtype: torch.dtype | None = None, free: bool = True):
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=None if free else False)
        # torch 2.13 warns of logits that are a view; nothing here writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self.modules:  # a sum, not the mean that it takes by itself
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.pieces: dict[str, DTensor] = dict(model.named_parameters())

    def no_sync(self) -> AbstractContextManager:
        """Around all but the last backward. It changes nothing: held back, gradients would be whole on each rank."""
        return nullcontext()

    def finish(self) -> None:
        """Nothing is left to wait for when backward ends."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the master weights: the next forward casts them."""
        optimizer.step()

    def publish(self) -> None:
        """Nothing is to be sent: the next forward gathers the weights."""

    write_back = publish  # as MasterWeights calls it

    def reshard(self) -> None:
        """Free what is whole."""
        for module in self.modules:
            module.reshard()

    def gather(self, mine: Mapping[str, DTensor]) -> dict[str, Tensor]:
        """Dense tensors on every rank."""
        return {name: tensor.full_tensor() for name, tensor in mine.items()}

    def part_of(self, dense: Mapping[str, Tensor]) -> dict[str, DTensor]:
        """Dense tensors of parameters' names, the same on every rank, as DTensors like those parameters. Nothing is sent."""
        return {name: distribute_tensor(dense[name], piece.device_mesh, piece.placements, src_data_rank=None)
                for name, piece in self.pieces.items() if name in dense}

    @torch.no_grad()
    def load(self, dense: Mapping[str, Tensor]) -> None:
        """Take the weights of a dense model."""
        for name, tensor in dense.items():  # one at a time: on a GPU each is whole there for a moment
            for part in self.part_of({name: tensor}).values():
                self.pieces[name].copy_(part)
