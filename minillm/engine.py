"""One training step, whatever the layout.

The trainer, the alignment methods and the notebooks drive this and nothing else: `forward_backward`, `clip`, `step`.
A layout over several ranks changes what stands behind these calls, not the calls: each rank gives its share of a batch, and
all get what one rank would get for the whole. A loss function returns the sum over the targets of a batch; the engine
divides by their count over all microbatches and ranks, so both give the gradient of the whole batch.
With tp ranks every matrix is cut (minillm/parallel/tensor_parallel.py), with pp ranks the layers are shared out and microbatches
pass through them (minillm/parallel/pipeline.py); the ranks of one tensor or pipeline group must be given the same rows. What
is saved is dense, whatever the layout, so a run can go on in another one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.layout import Loss, check_layout
from minillm.model.huggingface import CheckpointError
from minillm.model.sharding import sharding_table
from minillm.model.stages import cut_stages, layer_costs
from minillm.model.transformer import Transformer
from minillm.parallel.agreement import any_rank, on_first
from minillm.parallel.data_parallel import Overlapped, broadcast_from_first, share_gradients
from minillm.parallel.mesh import build_mesh
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.schedules import balance, build_schedule
from minillm.parallel.sequence_parallel import apply_sequence_parallel
from minillm.parallel.stage_weights import SharedParameters, gather_stages
from minillm.parallel.tensor_parallel import (apply_tensor_parallel, gather_dense, global_norm, part_of,
                                              vocabulary_cross_entropy, vocabulary_log_z)
from minillm.train.build import STATES, build_optimizer
from minillm.train.loss import IGNORED, log_z_squared, next_token_loss
from minillm.train.loss_scale import LossScaler
from minillm.train.master_weights import MasterWeights
from minillm.train.precision import DTYPES, autocast
from minillm.train.schedule import learning_rate


class Engine:
    """A model, its optimizer and its schedule, built from the configurations.

    With more than one rank it is made on each of them at once; all then have the first one's weights. mesh: where the ranks
    sit, if the world is not to be laid out by `parallel` alone.
    Raises: ValueError for a device that is not there, or a layout that this world, the model or the training does not fit.
    """

    kind = "ours"

    def __init__(self, model: ModelConfig | Transformer, train: TrainConfig, parallel: ParallelConfig = ParallelConfig(), *,
                 loss: Loss = next_token_loss, mesh: DeviceMesh | None = None):
        check_layout(model if isinstance(model, ModelConfig) else model.config, train, parallel, loss)
        wanted = {"ours": "zero", "torch": "fsdp"}[parallel.engine] if parallel.zero else parallel.engine
        if wanted != self.kind:
            raise ValueError(f"engine = {wanted!r}, and this is the engine {self.kind!r}: use build_engine of "
                             f"minillm/torch_engine.py, which chooses.")
        self.config, self.parallel, self.loss, self.log_z_squared = train, parallel, loss, log_z_squared
        self.device = choose_device(train.device)
        built = model if isinstance(model, Transformer) else Transformer(model, seed=train.seed)
        self.model = built.to(self.device)
        self.partial = any(not weight.requires_grad for weight in self.model.parameters())  # a part of it is frozen
        if self.partial and (parallel.tp > 1 or parallel.pp > 1 or parallel.zero == 3 or wanted == "fsdp"):
            raise ValueError(f"tp = {parallel.tp}, pp = {parallel.pp}, zero = {parallel.zero} with frozen weights: what was added to a "
                             f"model is not cut with it. Use dp alone, with zero = 2 of our engine at most.")
        self.group, self.rank, self.ranks = None, 0, 1  # of the data axis
        self.tensor_group, self.pipe_group, self.first, self.world = None, None, True, 1
        if parallel.world_size > 1:
            self._join(mesh)
        self.masters = MasterWeights(self.model, DTYPES[train.precision]) if train.master_weights else None
        named = dict((self.masters or self.model).named_parameters())
        self.weights: dict[str, Tensor] = {name: weight for name, weight in named.items() if weight.requires_grad}
        self.replicas = self._replicate() if self.group else None
        if self.pipe_group:
            self.pipeline = Pipeline(self.stages, self.pipe_group, self._last_loss, context=self._mixed)
            self.shared = SharedParameters(self.weights, self.pipe_group)
        self.optimizer = build_optimizer(self.weights.items(), train)
        self.scaler = None
        if train.precision == "fp16":
            self.scaler = LossScaler(train.loss_scale or LossScaler.scale, dynamic=train.loss_scale is None)
        self.steps_done = 0
        self._finite: bool | None = None  # of the gradients, once they are unscaled
        self._forward = torch.compile(self.model) if train.compile else self.model

    @property
    def learning_rate(self) -> float:
        """The rate that the next step will take."""
        return learning_rate(self.steps_done, self.config)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the mean loss of a batch. Returns that loss, a scalar on the device, in nats a target.

        The z-loss has its part in the gradients, but not in what is returned. With fp16 the gradients are scaled.
        On several ranks, batch is this one's share; gradients and loss are those of all shares together.
        """
        self.model.train()
        parts = batch.split(self.config.microbatch_size or max(1, len(batch.ids)))
        total, count = torch.zeros((), device=self.device), self._everyones_count(batch)
        scale = self.scaler.scale if self.scaler else 1.0
        if self.pipe_group:
            total += self._pass(parts, count, scale)
        for number, part in enumerate(() if self.pipe_group else parts):
            with self.replicas.no_sync() if self.replicas and number < len(parts) - 1 else nullcontext():
                loss, penalty = self._loss(self._forward, part)
                ((loss + penalty) / count * scale).backward()
            total += loss.detach() / count
        if self.replicas:
            dist.all_reduce(total, group=self.group)
            self.replicas.finish()
        if self.pipe_group:
            self.shared.sum(self.weights)
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The summed loss of a batch, without gradients: nats over all its targets, on several ranks those of all shares.
        A rank's share may be empty."""
        self.model.eval()
        passed = self._pass if self.pipe_group else lambda parts: self._loss(self.model, *parts)[0]
        if not self.group:
            return float(passed([batch]))
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        if len(batch.ids):
            nats += passed([batch])
        dist.all_reduce(nats, group=self.group)
        return float(nats)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients down so that their global norm is at most `max_norm` (0: leave them). Returns the norm,
        which is that of the unscaled gradients: they are unscaled first."""
        self._unscale()
        limit = max_norm if max_norm > 0 else float("inf")
        if not (self.tensor_group or self.pipe_group):
            return torch.nn.utils.clip_grad_norm_(self.weights.values(), limit)
        once = self.shared.first if self.pipe_group else self.weights
        norm = global_norm(self.model, self.tensor_group, {name: self.weights[name] for name in once})
        norm = self.shared.norm(norm) if self.pipe_group else norm
        torch.nn.utils.clip_grads_with_norm_(self.weights.values(), limit, norm)
        return norm

    def step(self) -> bool:
        """Update the weights at the schedule's learning rate, and forget the gradients.

        Returns False when a loss scaler found gradients that are not finite: then the weights stay as they were.
        """
        self._unscale()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        updated = self._finite is not False
        if updated:
            self.masters.step(self.optimizer) if self.masters else self.optimizer.step()
        if self.scaler:
            self.scaler.update(updated)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done, self._finite = self.steps_done + 1, None
        return updated

    @property
    def saves(self) -> bool:
        """Whether this rank has a part in `whole_model` and `state_dict`: of the replicas, the first is brought together."""
        return self.rank == 0

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on at least one rank; all must ask."""
        for group in (self.group, self.tensor_group, self.pipe_group):
            flag = any_rank(flag, group, self.device)
        return flag

    def on_first(self, action: Callable):
        """Let the first rank act while the others wait; all get what it returned. See minillm/parallel/agreement.py."""
        return on_first(lambda: on_first(lambda: on_first(action, self.group), self.tensor_group), self.pipe_group)

    def whole_model(self) -> Transformer:
        """The model as one process has it: itself, or on tensor and pipeline ranks, which all must ask, a dense copy of now."""
        if not (self.tensor_group or self.pipe_group):
            return self.model
        whole = Transformer(self.model.config, device="meta")
        whole.load_state_dict(self.gather(self.model.state_dict()), assign=True)
        if whole.config.tied:
            whole.head.weight = whole.embed.weight
        return whole.train(self.model.training)

    def load_weights(self, dense: dict[str, Tensor]) -> None:
        """Take the weights from a dense model's state_dict, of which a tensor or pipeline rank takes its part."""
        mine = {name: dense[name] for name in self.model.state_dict() if name in dense} if self.pipe_group else dense
        self.model.load_state_dict(part_of(self.model, self.tensor_group, mine) if self.tensor_group else mine)

    def gather(self, mine: dict[str, Tensor], split: bool = True) -> dict[str, Tensor]:
        """This rank's tensors, by names of parameters, with those of the others: dense. split: they are cut as the parameters."""
        if self.tensor_group and split:
            mine = gather_dense(self.model, self.tensor_group, mine)
        return gather_stages(mine, self.pipe_group, self.device) if self.pipe_group else mine

    def _part(self, name: str, dense: Tensor) -> Tensor:
        """What this rank holds of a dense tensor by a parameter's name."""
        return part_of(self.model, self.tensor_group, {name: dense})[name] if self.tensor_group else dense

    def _join(self, mesh: DeviceMesh | None) -> None:
        """Find this rank's place, begin with the weights of the first, and keep this rank's part of them."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if mesh is None and world != self.parallel.world_size:
            axes = ", ".join(f"{axis} = {size}" for axis, size in self.parallel.axes.items())
            raise ValueError(f"a layout of {self.parallel.world_size} ranks ({axes}) does not fit a world of "
                             f"{world}: start as many with torchrun --nproc-per-node {self.parallel.world_size}, or with launch.")
        mesh = build_mesh(self.parallel, device=self.device.type) if mesh is None else mesh
        axes = {axis: mesh[axis] if axis in mesh.mesh_dim_names else None for axis in ("tp", "pp")}
        for name, axis in axes.items():
            if (axis.size() if axis else 1) != getattr(self.parallel, name):
                raise ValueError(f"the mesh has the axes {', '.join(mesh.mesh_dim_names)} of {tuple(mesh.shape)} ranks, and the layout "
                                 f"{name} = {getattr(self.parallel, name)}: they must agree.")
        axis, everything = mesh["dp"], dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.rank, self.ranks = axis.get_local_rank(), axis.size()
        self.first, self.world = self.rank == 0, self.ranks
        if self.ranks > 1 or self.parallel.tp == self.parallel.pp == 1:
            self.group = axis.get_group()
            broadcast_from_first(everything, self.group)
        for name in (name for name in axes if getattr(self.parallel, name) > 1):
            broadcast_from_first(everything, axes[name].get_group())
            self.world, self.first = self.world * axes[name].size(), self.first and axes[name].get_local_rank() == 0
        if self.parallel.pp > 1:
            self.pipe_group = axes["pp"].get_group()
            cuts = balance(layer_costs(self.model.config), self.parallel.pp * self.parallel.chunks)
            self.stages = cut_stages(self.model, cuts[axes["pp"].get_local_rank()::self.parallel.pp])
        if self.parallel.tp > 1:
            self.tensor_group = axes["tp"].get_group()
            self._split(axes["tp"])

    def _replicate(self) -> Overlapped:
        """What sums the gradients over the data axis while backward runs."""
        return Overlapped(self.weights, self.group, watched=dict(self.model.named_parameters()),
                          bucket_bytes=max(1, int(self.parallel.bucket_mb * 2 ** 20)))

    def _split(self, tensor: DeviceMesh) -> None:
        """Cut the model, and take the losses that read logits which are split by token."""
        config, group = self.model.config, tensor.get_group()
        split = apply_sequence_parallel if self.parallel.sequence_parallel else apply_tensor_parallel
        split(self.model, group, sharding_table(config))
        self.loss = lambda logits, batch: vocabulary_cross_entropy(logits, batch.targets, config.vocab_size, group)
        self.log_z_squared = lambda logits, targets: vocabulary_log_z(logits, group).square()[targets != IGNORED].sum()

    def _everyones_count(self, batch: Batch) -> int | Tensor:
        """Targets in all shares, at least 1. Gradients that are sums over ranks already are made ready for the next sum."""
        if self.pipe_group:
            self.shared.divide(self.weights)
        if not self.group:
            return max(1, batch.count)
        share_gradients(self.weights, self.group)
        count = torch.tensor(batch.count, device=self.device)
        dist.all_reduce(count, group=self.group)
        return count.clamp(min=1)

    def _unscale(self) -> None:
        """Divide the gradients by the loss scale, once a step. One rank that finds an infinite one speaks for all."""
        if self.scaler and self._finite is None:
            finite = self.scaler.unscale(w.grad for w in self.weights.values() if w.grad is not None)
            self._finite = not self.any_rank(not finite)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs beside the weights: the optimizer's state by parameter name, the step, the random state.

        Dense: tensor and pipeline ranks bring their parts together, and all must ask.
        """
        tensors = {"rng": torch.get_rng_state(), "steps_done": torch.tensor(self.steps_done)}
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        if self.scaler:
            tensors |= {"loss_scale": torch.tensor(self.scaler.scale), "good_steps": torch.tensor(self.scaler.good_steps)}
        # A checkpoint beside a frozen base has its adapter in another form, or in none.
        slots: dict[str, dict[str, Tensor]] = {"master": dict(self.weights)} if self.masters or self.partial else {}
        for name, weight in self.weights.items():
            for slot, value in self.optimizer.state[weight].items():
                slots.setdefault(slot, {})[name] = value
        for slot, values in slots.items():
            values = self.gather(values, split=slot != "step")
            tensors |= {f"{slot}/{name}": value.detach().cpu().clone() for name, value in values.items()}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave. Raises: CheckpointError when a parameter's state is missing."""
        self.steps_done = int(tensors["steps_done"])
        torch.set_rng_state(tensors["rng"])
        if self.device.type == "cuda" and "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.device)
        if self.scaler:
            self.scaler.scale, self.scaler.good_steps = float(tensors["loss_scale"]), int(tensors["good_steps"])
        saved: dict[str, dict[str, Tensor]] = {name: {} for name in self.weights}
        for key, value in tensors.items():
            slot, _, name = key.partition("/")
            if name in saved:
                value = value if slot == "step" else self._part(name, value)
                saved[name][slot] = value.to(self.device, copy=True)  # else the next step would change the caller's tensors
        if self.masters or self.partial:
            for name, weight in self.weights.items():
                held = saved[name].pop("master", None)
                if held is None:
                    raise CheckpointError(f"the checkpoint has no {'master ' if self.masters else ''}weights for {name}: it was trained "
                                          f"without them.")
                if held.shape != weight.shape:
                    raise CheckpointError(f"{name} is {tuple(held.shape)} in the checkpoint and {tuple(weight.shape)} here: it was "
                                          f"trained with another adapter.")
                weight.copy_(held)
        if self.masters:
            self.masters.write_back()
        # a scaler may have skipped every step so far, and then there is no state yet
        begun = any(saved.values()) or (self.steps_done and not self.scaler)
        for name, weight in self.weights.items():
            if begun and set(saved[name]) not in STATES:
                raise CheckpointError(f"the checkpoint has no optimizer state for {name}: it belongs to another model.")
            if begun:
                self.optimizer.state[weight] = saved[name]

    def _loss(self, forward: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of one microbatch, and the summed z-loss that is added to it in training."""
        batch = batch.to(self.device)
        with self._mixed():
            logits = forward(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids)
        return self._scored(logits, batch)

    def _mixed(self) -> AbstractContextManager:
        """What a forward pass runs under."""
        return nullcontext() if self.masters else autocast(self.config.precision, self.model, self.device.type, self.config.compile)

    def _scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The two losses of a microbatch's logits."""
        loss = self.loss(logits, batch)
        weight = self.config.z_loss
        penalty = weight * self.log_z_squared(logits, batch.targets) if weight else torch.zeros_like(loss)
        return loss, penalty

    def _pass(self, parts: list[Batch], count: int | Tensor = 1, scale: float | None = None) -> Tensor:
        """Send microbatches through the pipeline, and with a scale their gradients back. Returns their loss over the count."""
        self._nats = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = [part.to(self.device) for part in parts]
        if scale is None:
            self.pipeline.evaluate(parts)
        else:
            schedule = build_schedule(self.parallel.schedule, self.parallel.pp, len(parts), self.parallel.chunks)
            quiet = self.replicas.no_sync if self.replicas else nullcontext
            self.pipeline.run(schedule, parts, scale=scale / int(count), quiet=quiet)
        dist.all_reduce(self._nats, group=self.pipe_group)  # the last stage has it, the others have 0
        return self._nats / count

    def _last_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """What the last stage makes of its logits."""
        loss, penalty = self._scored(logits, batch)
        self._nats += loss.detach()
        return loss + penalty


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a CUDA GPU if there is one, else the CPU. Raises: ValueError if it is absent.

    Among ranks, "auto" is a GPU only where there is one for each, that is, where NCCL connects them.
    """
    if name == "auto":
        shared = dist.is_initialized() and "nccl" not in dist.get_backend_config()
        return torch.device("cuda" if torch.cuda.is_available() and not shared else "cpu")
    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if absent.get(name):
        raise ValueError(f"device {name!r} is not there: torch {torch.__version__} sees none. Use --train.device cpu.")
    return torch.device(name)
