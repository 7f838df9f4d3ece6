"""`--engine torch`: the engine's step on torch's own DistributedDataParallel and DTensor, to compare ours with, or to prefer.

What engine.py does by overlapped buckets and a model cut by hand, here DistributedDataParallel and parallelize_module do, from
the same table (minillm/model/sharding.py). Configuration, sampler, clipping, checkpoints and trainer are the engine's own:
a run can change from one engine to the other at any checkpoint.
DDP knows plain tensors only, and fused optimizers do not mix them with DTensors. So the model keeps its parts as plain
parameters, and each forward sees DTensors made of them, which share their memory (`Placed`).
Differs from ours: uneven parts are torch.chunk's (the last ranks have less). Left out: KV heads that several ranks hold, which
DTensor cannot place; float32 masters over several ranks, since DDP sums the 16-bit gradients. With zero it is FSDP2 that
runs: fsdp_engine.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel, loss_parallel,
                                               parallelize_module)
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.fsdp_engine import FsdpEngine
from minillm.model.sharding import sharding_table
from minillm.model.transformer import Transformer
from minillm.parallel.tensor_parallel import Part, Table, split_of, sum_gradient, vocabulary_log_z
from minillm.train.loss import IGNORED, next_token_loss
from minillm.zero_engine import ZeroEngine


def build_engine(model: ModelConfig | Transformer, train: TrainConfig, parallel: ParallelConfig = ParallelConfig(),
                 **options) -> Engine:
    """The engine that the layout names: ours, with ZeRO or without, or torch's. Arguments and errors as of `Engine`."""
    kinds = {"ours": (Engine, ZeroEngine), "torch": (TorchEngine, FsdpEngine)}
    return kinds[parallel.engine][parallel.zero > 0](model, train, parallel, **options)


class TorchEngine(Engine):
    """`Engine` on torch's own DDP (dp) and DTensor (tp). Raises: as Engine, and ValueError for what torch cannot split so."""

    kind = "torch"

    def __init__(self, model: ModelConfig | Transformer, train: TrainConfig, parallel: ParallelConfig = ParallelConfig(), **options):
        check_torch_layout(model if isinstance(model, ModelConfig) else model.config, train, parallel)
        self.placed: nn.Module | None = None
        super().__init__(model, train, parallel, **options)
        forward = self.replicas or self.placed or self.model
        self._forward = torch.compile(forward) if train.compile else forward

    def forward_backward(self, batch: Batch) -> Tensor:
        """As Engine's. DDP takes the mean over its ranks, and a sum is wanted: the count is divided, and the loss with it."""
        with loss_parallel():
            return super().forward_backward(batch) / self.ranks

    def evaluate(self, batch: Batch) -> float:
        """As Engine's."""
        with loss_parallel():
            return super().evaluate(batch)

    def _split(self, tensor: DeviceMesh) -> None:
        """Let parallelize_module cut the model, and cross entropy read DTensors split by token."""
        self.placed = place(parallelize(self.model, tensor, sharding_table(self.model.config), self.parallel.sequence_parallel))
        group = tensor.get_group()
        self.loss = lambda logits, batch: next_token_loss(logits, batch).to_local()
        self.log_z_squared = lambda logits, targets: vocabulary_log_z(logits.to_local(), group).square()[targets != IGNORED].sum()

    def _replicate(self) -> "Replicas":
        return Replicas(self.placed or self.model, process_group=self.group, bucket_cap_mb=self.parallel.bucket_mb,
                        gradient_as_bucket_view=True)

    def _everyones_count(self, batch: Batch) -> int | Tensor:
        """Targets in all shares, divided by the replicas. Gradients that are there stay: their mean over ranks is themselves."""
        if not self.group:
            return super()._everyones_count(batch)
        count = torch.tensor(batch.count, device=self.device)
        dist.all_reduce(count, group=self.group)
        return count.clamp(min=1).double() / self.ranks

    def _loss(self, forward, batch: Batch) -> tuple[Tensor, Tensor]:
        return super()._loss(self.placed if self.placed and forward is self.model else forward, batch)


class Replicas(DistributedDataParallel):
    """DDP, which has waited for its buckets when backward ends."""

    def finish(self) -> None:
        """Nothing is left to wait for."""


class Placed(nn.Module):
    """A model of plain local parameters, whose forward sees them as the DTensors that parallelize_module had made.

    specs: mesh, placements, shape and stride of each, by name.
    """

    def __init__(self, model: nn.Module, specs: dict[str, dict]):
        super().__init__()
        self.model, self.specs = model, specs

    def forward(self, ids: Tensor, **places) -> Tensor:
        made = {name: DTensor.from_local(self.model.get_parameter(name), run_check=False, **spec) for name, spec in self.specs.items()}
        return functional_call(self.model, made, (ids,), places)


def parallelize(model: nn.Module, mesh: DeviceMesh, table: Table, sequence_parallel: bool = False) -> nn.Module:
    """Cut a dense model, the same on every rank, as `apply_tensor_parallel` does, in place, by parallelize_module; its logits
    become a DTensor split by token.

    Cost: Megatron's count, as ours: 4 all-reduces a block, 1 for the embedding, 1 for the head; q, k and v share one.
    """
    group, rank, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    first = {parameter: name for name, parameter in model.named_parameters()}
    tied = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False) if first[p] != name}
    stream = Shard(1) if sequence_parallel else Replicate()
    styles = parallel_styles(model, table, ranks, stream)
    parallelize_module(model, mesh, styles, src_data_rank=None)
    for name, other in tied.items():
        _put(model, name, model.get_parameter(other))
    regions = {name.rpartition(".")[0] for name in styles if isinstance(model.get_submodule(name), nn.Linear)} - {""}
    for name in regions:  # one door for q, k and v, so that their gradients are summed together
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: (_enter(args[0], mesh, stream), *args[1:]))
    if sequence_parallel and model.positions is not None:
        model.positions.register_forward_pre_hook(lambda module, args: (args[0].chunk(ranks, 1)[rank],))
    for name, parameter in model.named_parameters():
        inside = any(name.startswith(f"{region}.") for region in regions)
        if parameter.requires_grad and not isinstance(parameter, DTensor) and (inside or sequence_parallel):
            sum_gradient(parameter, group)  # whole, but each rank sees other heads or tokens
    for name, (_, pieces, _) in table.items():
        if isinstance(getattr(model, name, None), slice):
            setattr(model, name, slice(*_chunks(pieces, ranks)[rank]))
    return model


def place(model: nn.Module) -> Placed:
    """Replace a model's DTensors by parameters of their local parts; model.parts then says where each lies in the whole one."""
    model.parts, specs, local = {}, {}, {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not isinstance(parameter, DTensor):
            continue
        (placement,), mesh, shape = parameter.placements, parameter.device_mesh, parameter.shape
        if placement.is_shard():
            spans = _chunks(shape[placement.dim], mesh.size())
            model.parts[name] = Part("rows" if placement.dim else "columns", placement.dim, shape[placement.dim], spans)
        if parameter not in local:
            specs[name] = dict(device_mesh=mesh, placements=parameter.placements, shape=shape, stride=parameter.stride())
            mine = parameter.to_local().detach().clone()  # a copy, so that the whole one's memory is given back
            local[parameter] = nn.Parameter(mine, requires_grad=parameter.requires_grad)
        _put(model, name, local[parameter])
    return Placed(model, specs)


def parallel_styles(model: nn.Module, table: Table, ranks: int, stream: Shard | Replicate) -> dict[str, ParallelStyle]:
    """torch's style for each module that the table splits, and under sequence parallelism for each norm of the stream.

    Between columns and rows the pieces stay DTensors where ranks have unequal numbers of them: torch then knows the whole size.
    """
    styles = {}
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        how, pieces, _ = split_of(f"{name}.weight", table)
        table_of_tokens = how == "vocabulary" and isinstance(module, nn.Embedding)
        if table_of_tokens or how == "rows":
            styles[name] = RowwiseParallel(input_layouts=Replicate() if table_of_tokens else None, output_layouts=stream)
        elif how == "vocabulary":
            styles[name] = ColwiseParallel(input_layouts=stream, use_local_output=False)
        elif how == "columns":
            styles[name] = ColwiseParallel(use_local_output=pieces % ranks == 0)
        elif isinstance(stream, Shard) and name.endswith("norm") and ".attention." not in name:
            styles[name] = SequenceParallel(use_local_output=True)
    return styles


def check_torch_layout(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig) -> None:
    """Refuse what only our engine can do. Raises: ValueError that says what would work."""
    way_out = "or --parallel.engine ours, which can."
    if others := [f"{axis} = {size}" for axis, size in parallel.axes.items() if axis not in ("dp", "tp")]:
        raise ValueError(f"engine = 'torch' with {', '.join(others)}: it has the axes dp and tp. Leave the others out, {way_out}")
    if parallel.world_size > 1 and train.master_weights and not parallel.zero:
        raise ValueError(f"engine = 'torch' on {parallel.world_size} ranks with master_weights: DDP sums the 16-bit gradients, not "
                         f"their float32 copies. Leave master_weights out, use zero = 2 or 3, {way_out}")
    if model.kv_size % parallel.tp:
        raise ValueError(f"engine = 'torch' with tp = {parallel.tp} and {model.kv_size} KV heads: a DTensor has no way to put a head "
                         f"on several ranks. Use a tp that divides {model.kv_size}, {way_out}")


def _enter(x: Tensor, mesh: DeviceMesh, stream: Shard | Replicate) -> DTensor:
    """The stream, whole on every rank. PrepareModuleInput does this for a fixed number of arguments."""
    return DTensor.from_local(x, mesh, [stream], run_check=False).redistribute(placements=[Replicate()])


def _chunks(size: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """First and end entry of each rank's part, as Shard cuts."""
    most = -(-size // ranks)
    return tuple((min(rank * most, size), min((rank + 1) * most, size)) for rank in range(ranks))


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
