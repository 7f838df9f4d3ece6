"""One training step, whatever the layout.

The trainer, the alignment methods and the notebooks drive this and nothing else: `forward_backward`, `clip`, `step`.
A layout over several ranks changes what stands behind these calls, not the calls: each rank gives its share of a batch, and
all get what one rank would get for the whole. A loss function returns the sum over the targets of a batch; the engine
divides by their count over all microbatches and ranks, so both give the gradient of the whole batch.
With tp ranks the model is cut (minillm/parallel/tensor_parallel.py), and those of one tensor group must be given the same
rows. What is saved is dense, whatever the layout, so a run can go on in another one.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.model.huggingface import CheckpointError
from minillm.model.sharding import sharding_table, why_not
from minillm.model.transformer import Transformer
from minillm.parallel.agreement import any_rank, on_first
from minillm.parallel.data_parallel import Overlapped, broadcast_from_first, share_gradients
from minillm.parallel.mesh import build_mesh
from minillm.parallel.sequence_parallel import apply_sequence_parallel
from minillm.parallel.tensor_parallel import (apply_tensor_parallel, gather_dense, global_norm, part_of,
                                              vocabulary_cross_entropy, vocabulary_log_z)
from minillm.train.build import STATES, build_optimizer
from minillm.train.loss import IGNORED, log_z_squared, next_token_loss
from minillm.train.loss_scale import LossScaler
from minillm.train.master_weights import MasterWeights
from minillm.train.precision import DTYPES, autocast
from minillm.train.schedule import learning_rate

Loss = Callable[[Tensor, Batch], Tensor]


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
        if parallel.engine != self.kind:
            raise ValueError(f"engine = {parallel.engine!r}, and this is the engine {self.kind!r}: use build_engine of "
                             f"minillm/torch_engine.py, which chooses.")
        self.config, self.parallel, self.loss, self.log_z_squared = train, parallel, loss, log_z_squared
        self.device = choose_device(train.device)
        built = model if isinstance(model, Transformer) else Transformer(model, seed=train.seed)
        self.model = built.to(self.device)
        self.group, self.rank, self.ranks = None, 0, 1  # of the data axis
        self.tensor_group, self.first, self.world = None, True, 1
        if parallel.world_size > 1:
            self._join(mesh)
        self.masters = MasterWeights(self.model, DTYPES[train.precision]) if train.master_weights else None
        self.weights: dict[str, Tensor] = dict((self.masters or self.model).named_parameters())
        self.replicas = self._replicate() if self.group else None
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
        for number, part in enumerate(parts):
            with self.replicas.no_sync() if self.replicas and number < len(parts) - 1 else nullcontext():
                loss, penalty = self._loss(self._forward, part)
                ((loss + penalty) / count * scale).backward()
            total += loss.detach() / count
        if self.replicas:
            dist.all_reduce(total, group=self.group)
            self.replicas.finish()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The summed loss of a batch, without gradients: nats over all its targets, on several ranks those of all shares.
        A rank's share may be empty."""
        self.model.eval()
        if not self.group:
            return float(self._loss(self.model, batch)[0])
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        if len(batch.ids):
            nats += self._loss(self.model, batch)[0]
        dist.all_reduce(nats, group=self.group)
        return float(nats)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients down so that their global norm is at most `max_norm` (0: leave them). Returns the norm,
        which is that of the unscaled gradients: they are unscaled first."""
        self._unscale()
        limit = max_norm if max_norm > 0 else float("inf")
        if not self.tensor_group:
            return torch.nn.utils.clip_grad_norm_(self.weights.values(), limit)
        norm = global_norm(self.model, self.tensor_group, self.weights)
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

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on at least one rank; all must ask."""
        return any_rank(any_rank(flag, self.group, self.device), self.tensor_group, self.device)

    def on_first(self, action: Callable):
        """Let the first rank act while the others wait; all get what it returned. See minillm/parallel/agreement.py."""
        return on_first(lambda: on_first(action, self.group), self.tensor_group)

    def whole_model(self) -> Transformer:
        """The model as one process has it: itself, or on tensor-parallel ranks, which all must ask, a dense copy of now."""
        if not self.tensor_group:
            return self.model
        whole = Transformer(self.model.config, device="meta")
        whole.load_state_dict(gather_dense(self.model, self.tensor_group), assign=True)
        if whole.config.tied:
            whole.head.weight = whole.embed.weight
        return whole.train(self.model.training)

    def load_weights(self, dense: dict[str, Tensor]) -> None:
        """Take the weights from a dense model's state_dict, of which a tensor-parallel rank takes its part."""
        self.model.load_state_dict(part_of(self.model, self.tensor_group, dense) if self.tensor_group else dense)

    def _join(self, mesh: DeviceMesh | None) -> None:
        """Find this rank's place, begin with the weights of the first, and keep this rank's part of them."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if mesh is None and world != self.parallel.world_size:
            axes = ", ".join(f"{axis} = {size}" for axis, size in self.parallel.axes.items())
            raise ValueError(f"a layout of {self.parallel.world_size} ranks ({axes}) does not fit a world of "
                             f"{world}: start as many with torchrun --nproc-per-node {self.parallel.world_size}, or with launch.")
        mesh = build_mesh(self.parallel, device=self.device.type) if mesh is None else mesh
        tensor = mesh["tp"] if "tp" in mesh.mesh_dim_names else None
        if (tensor.size() if tensor else 1) != self.parallel.tp:
            raise ValueError(f"the mesh has the axes {', '.join(mesh.mesh_dim_names)} of {tuple(mesh.shape)} ranks, and the layout "
                             f"tp = {self.parallel.tp}: they must agree.")
        axis, everything = mesh["dp"], dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.rank, self.ranks = axis.get_local_rank(), axis.size()
        self.first, self.world = self.rank == 0, self.ranks
        if self.ranks > 1 or self.parallel.tp == 1:
            self.group = axis.get_group()
            broadcast_from_first(everything, self.group)
        if self.parallel.tp > 1:
            self.tensor_group, self.world = tensor.get_group(), self.ranks * tensor.size()
            self.first &= tensor.get_local_rank() == 0
            broadcast_from_first(everything, self.tensor_group)
            self._split(tensor)

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

        Dense: tensor-parallel ranks bring their parts together, and all must ask.
        """
        tensors = {"rng": torch.get_rng_state(), "steps_done": torch.tensor(self.steps_done)}
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        if self.scaler:
            tensors |= {"loss_scale": torch.tensor(self.scaler.scale), "good_steps": torch.tensor(self.scaler.good_steps)}
        slots: dict[str, dict[str, Tensor]] = {"master": dict(self.weights)} if self.masters else {}
        for name, weight in self.weights.items():
            for slot, value in self.optimizer.state[weight].items():
                slots.setdefault(slot, {})[name] = value
        for slot, values in slots.items():
            if self.tensor_group and slot != "step":
                values = gather_dense(self.model, self.tensor_group, values)
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
                if self.tensor_group and slot != "step":
                    value = part_of(self.model, self.tensor_group, {name: value})[name]
                saved[name][slot] = value.to(self.device, copy=True)  # else the next step would change the caller's tensors
        if self.masters:
            for name, weight in self.weights.items():
                if "master" not in saved[name]:
                    raise CheckpointError(f"the checkpoint has no master weights for {name}: it was trained without them.")
                weight.copy_(saved[name].pop("master"))
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
        mixed = nullcontext() if self.masters else autocast(self.config.precision, self.model, self.device.type)
        with mixed:
            logits = forward(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids)
        loss = self.loss(logits, batch)
        weight = self.config.z_loss
        penalty = weight * self.log_z_squared(logits, batch.targets) if weight else torch.zeros_like(loss)
        return loss, penalty


def check_layout(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, loss: Loss = next_token_loss) -> None:
    """Refuse a layout that the batch, the model or the training cannot have. Raises: ValueError that says what would work."""
    parallel.share(train.batch_size)
    if reason := why_not(model, parallel.tp):
        raise ValueError(reason)
    if parallel.sequence_parallel and model.context % parallel.tp:
        raise ValueError(f"a context of {model.context} tokens cannot be shared out to tp = {parallel.tp} ranks. Use another "
                         f"context, or leave sequence_parallel out.")
    refused = {
        f"optimizer = {train.optimizer!r}": (train.optimizer in ("muon", "adafactor"), "it looks at whole matrices, and a rank has "
                                             "a part of each. Use \"fused\""),
        "precision = 'fp8'": (train.precision == "fp8", "its scales are those of whole matrices. Use \"bf16\""),
        "compile": (train.compile, "it has not been tried with collectives inside the model. Leave it out"),
        "a loss of its own": (loss is not next_token_loss, "the logits are split by token, and only next_token_loss has a form "
                              "that reads them so. Use that"),
    }
    for what, (asked, why) in refused.items():
        if asked and parallel.tp > 1:
            raise ValueError(f"tp = {parallel.tp} with {what}: {why}, or tp = 1.")


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
