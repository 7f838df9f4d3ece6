"""One training step, whatever the layout.

The trainer, the alignment methods and the notebooks drive this and nothing else: `forward_backward`, `clip`, `step`.
Today it runs one rank; a layout over several changes what stands behind these calls, not the calls. A loss function
returns the sum over the targets of a batch; the engine divides by their count over all microbatches, so accumulation
gives the gradient of the whole batch.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.model.huggingface import CheckpointError
from minillm.model.transformer import Transformer
from minillm.train.loss import next_token_loss
from minillm.train.optim import build_optimizer
from minillm.train.schedule import warmup_cosine

Loss = Callable[[Tensor, Batch], Tensor]


class Engine:
    """A model, its optimizer and its schedule, built from the configurations.

    Raises: ValueError for a device that is not there, or a layout that needs more ranks than there are.
    """

    def __init__(self, model: ModelConfig | Transformer, train: TrainConfig,
                 parallel: ParallelConfig = ParallelConfig(), *, loss: Loss = next_token_loss):
        if parallel.world_size != 1:
            raise ValueError(f"a layout of {parallel.world_size} ranks (dp = {parallel.dp}) cannot run here: this "
                             f"version trains on one rank. Use dp = 1.")
        self.config, self.loss = train, loss
        self.device = choose_device(train.device)
        built = model if isinstance(model, Transformer) else Transformer(model, seed=train.seed)
        self.model = built.to(self.device)
        self.optimizer = build_optimizer(self.model, train)
        self.steps_done = 0
        self._forward = torch.compile(self.model) if train.compile else self.model

    @property
    def learning_rate(self) -> float:
        """The rate that the next step will take."""
        return warmup_cosine(self.steps_done, self.config)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the mean loss of a batch. Returns that loss, a scalar on the device, in nats a target."""
        self.model.train()
        size = self.config.microbatch_size or len(batch.ids)
        total, count = torch.zeros((), device=self.device), max(1, batch.count)
        for part in batch.split(size):
            loss = self._loss(self._forward, part) / count
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The summed loss of a batch, without gradients: nats over all its targets."""
        self.model.eval()
        return float(self._loss(self.model, batch))

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients down so that their global norm is at most `max_norm` (0: leave them). Returns the norm."""
        limit = max_norm if max_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def step(self) -> None:
        """Update the weights at the schedule's learning rate, and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs beside the weights: the optimizer's state by parameter name, the step, the random state."""
        tensors = {"rng": torch.get_rng_state(), "steps_done": torch.tensor(self.steps_done)}
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                tensors[f"{slot}/{name}"] = value.detach().cpu().clone()
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave. Raises: CheckpointError when a parameter's state is missing."""
        self.steps_done = int(tensors["steps_done"])
        torch.set_rng_state(tensors["rng"])
        if self.device.type == "cuda" and "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.device)
        for name, parameter in self.model.named_parameters():
            slots = {slot: tensors.get(f"{slot}/{name}") for slot in ("step", "exp_avg", "exp_avg_sq")}
            if self.steps_done and any(value is None for value in slots.values()):
                raise CheckpointError(f"the checkpoint has no optimizer state for {name}: it belongs to another model.")
            if self.steps_done:
                self.optimizer.state[parameter] = {slot: v.to(self.device) for slot, v in slots.items()}

    def _loss(self, forward: Callable, batch: Batch) -> Tensor:
        """The summed loss of one microbatch, under autocast when the precision is bf16."""
        batch = batch.to(self.device)
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()
        with mixed:
            logits = forward(batch.ids, positions=batch.positions, segment_ids=batch.segment_ids)
        return self.loss(logits, batch)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a CUDA GPU if there is one, else the CPU. Raises: ValueError if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if absent.get(name):
        raise ValueError(f"device {name!r} is not there: torch {torch.__version__} sees none. Use --train.device cpu.")
    return torch.device(name)
