"""Data parallelism: every rank holds the whole model, reads its share of the batch, and the gradients are summed.

Three ways to sum them, each with one idea more:
    sum_each      after backward, one all-reduce for every gradient
    sum_buckets   many gradients travel as one tensor, so that latency is paid once a bucket
    Overlapped    a bucket leaves as soon as backward has filled it, while backward goes on
Sums, not means: a loss is divided by the number of targets on all ranks before backward, so the sum over ranks is the
gradient of the whole batch, also when the ranks' counts differ (a mean of the ranks' means would not be).
Source: arXiv:2006.15704 §3.2. Left out, and torch's DistributedDataParallel has it: a small first bucket, buckets in the
order in which gradients really came, parameters that only some batches use, ranks that run out of batches.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Shaped, UInt8
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minillm.parallel.collectives import Traffic, ring_all_reduce

Group = dist.ProcessGroup


@runtime_checkable
class Pending(Protocol):
    """Something that has been started; torch's Work and Future are."""

    def wait(self):
        """Return when it is done."""


AllReduce = Callable[[Tensor, Group], Pending | None]
"""Sums a contiguous tensor over the ranks, in place. Returns what to wait for, or None when it is done."""
BUCKET_BYTES = 25 * 2 ** 20
"""As in torch, for large models. A small one wants buckets small enough that the first leaves early."""


def torch_sum(x: Shaped[Tensor, "*shape"], group: Group) -> Pending | None:
    """torch's all-reduce, in the background."""
    return dist.all_reduce(x, group=group, async_op=True)


def ring_sum(traffic: Traffic | None = None) -> AllReduce:
    """Our ring all-reduce, counted in `traffic`. It is done when it returns, so nothing can overlap with it."""
    def start(x: Tensor, group: Group) -> None:
        x.copy_(ring_all_reduce(x, group, traffic))
    return start


@torch.no_grad()
def sum_each(parameters: Mapping[str, Tensor], group: Group, all_reduce: AllReduce = torch_sum) -> None:
    """After backward: the naive way, one all-reduce for every gradient, each waiting for the one before.

    Cost: 2Ψ(P-1)/P elements a rank with a ring, where P divides every tensor; 2(P-1) messages a tensor.
    Raises: ValueError naming the parameters that got no gradient.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    _refuse_missing([name for name, parameter in trained.items() if parameter.grad is None], len(trained))
    if dist.get_world_size(group) > 1:
        for parameter in trained.values():
            _wait(all_reduce(parameter.grad, group))


def plan_buckets(parameters: Mapping[str, Tensor], bucket_bytes: int) -> list[list[str]]:
    """Names by bucket, from the last parameter to the first: backward reaches the last layer first.

    A bucket is closed when the next tensor does not fit; one that is too large for any has its own. Each dtype has
    buckets of its own. The order is that in which backward should fill them. Raises: ValueError for buckets below 1 byte.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes = {bucket_bytes}: at least 1 is needed (then every gradient has its own bucket).")
    closed, filling = [], {}
    order = {name: place for place, name in enumerate(reversed(list(parameters)))}
    for name in order:
        parameter = parameters[name]
        size = parameter.numel() * parameter.element_size()
        names, filled = filling.get(parameter.dtype, ([], 0))
        if names and filled + size > bucket_bytes:
            closed.append(names)
            names, filled = [], 0
        filling[parameter.dtype] = [*names, name], filled + size
    closed += [names for names, _ in filling.values()]
    return sorted(closed, key=lambda names: order[names[-1]])


class Bucket:
    """Gradients one after another in one flat tensor. Knows which are still missing, and nothing of ranks."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = dict(parameters)
        sizes = [parameter.numel() for parameter in parameters.values()]
        self.flat = next(iter(parameters.values())).detach().new_zeros(sum(sizes))
        parts = zip(parameters.items(), self.flat.split(sizes), strict=True)
        self.places = {name: part.view_as(parameter) for (name, parameter), part in parts}
        self.missing = set(parameters)

    def take(self, name: str) -> None:
        """Copy a gradient to its place, which then is the parameter's gradient: what happens to the bucket happens to it.

        Raises: RuntimeError when it is there already.
        """
        if name not in self.missing:
            raise RuntimeError(f"the gradient of {name} came twice: call finish() after every backward, and put all but "
                               f"the last backward of a step inside no_sync().")
        parameter, place = self.parameters[name], self.places[name]
        if parameter.grad is not place:
            parameter.grad = place.copy_(parameter.grad)
        self.missing.discard(name)

    def reopen(self) -> None:
        """Wait for all gradients again."""
        self.missing = set(self.parameters)


def make_buckets(parameters: Mapping[str, Tensor], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Buckets for the parameters that are trained. A tied weight is one parameter. Keeps Ψ elements: all gradients."""
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    return [Bucket({name: trained[name] for name in names}) for names in plan_buckets(trained, bucket_bytes)]


@torch.no_grad()
def sum_buckets(buckets: Sequence[Bucket], group: Group, all_reduce: AllReduce = torch_sum) -> None:
    """After backward: as `sum_each`, with one all-reduce for every bucket.

    Cost: 2Ψ(P-1)/P elements a rank with a ring, where P divides every bucket; 2(P-1) messages a bucket.
    Raises: ValueError naming the parameters that got no gradient.
    """
    parameters = {name: parameter for bucket in buckets for name, parameter in bucket.parameters.items()}
    _refuse_missing([name for name, parameter in parameters.items() if parameter.grad is None], len(parameters))
    if dist.get_world_size(group) > 1:
        for bucket in buckets:
            for name in bucket.parameters:
                bucket.take(name)
            _wait(all_reduce(bucket.flat, group))
            bucket.reopen()


@dataclass(frozen=True)
class Event:
    """From when to when something ran: seconds of time.perf_counter."""

    kind: str
    """bucket (its all-reduce) or backward (a layer's)."""
    name: str
    start: float
    end: float


class Overlapped:
    """As `sum_buckets`, while backward runs: a hook on every parameter starts its bucket when that is full.

    Buckets start in one order on all ranks: one that is full early waits for those before it. At one rank there are no
    hooks. Buckets stay: they are the memory of the gradients, Ψ elements from now on.
    watched: the parameters whose hooks tell, where `parameters` are others that hold the gradients (master weights).
    trace: a list that gets an `Event` for every bucket; may be set at any time. For ranks on CPUs: a GPU's work ends later.
    Cost: 2Ψ(P-1)/P elements a rank with a ring, where P divides every bucket, however many backwards `no_sync` covers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], group: Group, *, bucket_bytes: int = BUCKET_BYTES,
                 all_reduce: AllReduce = torch_sum, watched: Mapping[str, Tensor] | None = None,
                 trace: list[Event] | None = None):
        self.group, self.trace, self._all_reduce = group, trace, all_reduce
        alone = dist.get_world_size(group) == 1
        self.buckets = [] if alone else make_buckets(parameters, bucket_bytes)
        self._waiting: list[Pending | None] = []  # one for every bucket that has started
        self._quiet = False
        self._hooks = [(watched or parameters)[name].register_post_accumulate_grad_hook(self._hook(bucket, name))
                       for bucket in self.buckets for name in bucket.parameters]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward inside only adds to this rank's gradients; the next one outside sends the sum."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def finish(self) -> None:
        """Wait until every gradient is the sum over ranks: after backward, before anybody reads one.

        Raises: ValueError naming the parameters that got no gradient, for whose bucket the others would wait in vain.
        """
        missing = [name for bucket in self.buckets for name in bucket.parameters if name in bucket.missing]
        waiting, self._waiting = self._waiting, []
        for bucket in self.buckets:
            bucket.reopen()
        _refuse_missing(missing[::-1], sum(len(bucket.parameters) for bucket in self.buckets))
        for work in waiting:
            _wait(work)

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, bucket: Bucket, name: str) -> Callable[[Tensor], None]:
        """What runs when backward has added the last part of this gradient."""
        @torch.no_grad()
        def arrived(_: Tensor) -> None:
            if self._quiet:
                return
            bucket.take(name)
            while len(self._waiting) < len(self.buckets) and not self.buckets[len(self._waiting)].missing:
                self._waiting.append(self._start(len(self._waiting)))
        return arrived

    def _start(self, number: int) -> Pending | None:
        """Send a bucket on its way."""
        begun = time.perf_counter()
        work = self._all_reduce(self.buckets[number].flat, self.group)
        if self.trace is None:
            return work

        def note(*_) -> None:
            self.trace.append(Event("bucket", str(number), begun, time.perf_counter()))
        return note() if work is None else work.get_future().then(note)


def trace_backward(layers: Mapping[str, nn.Module], trace: list[Event]) -> list[RemovableHandle]:
    """Note when each layer's backward runs: from the gradient of its output to the last of its parameters' gradients.
    Of several outputs, the first counts.

    Called before `Overlapped`, so that its hooks run first, a layer's time has no part of sending. A layer that shares a
    weight lasts until the other's part of it is there too. Returns handles, whose remove() ends it.
    """
    handles = []
    for name, layer in layers.items():
        begun, missing, parameters = [], set(), [p for p in layer.parameters() if p.requires_grad]

        def begin(_: Tensor, begun=begun, missing=missing, parameters=parameters) -> None:
            begun[:] = [time.perf_counter()]
            missing.update(parameters)

        def ran(layer: nn.Module, inputs: tuple, output, begin=begin) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(begin)

        def arrived(parameter: Tensor, name=name, begun=begun, missing=missing) -> None:
            missing.discard(parameter)
            if begun and not missing:
                trace.append(Event("backward", name, begun.pop(), time.perf_counter()))
        handles.append(layer.register_forward_hook(ran))
        handles += [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    return handles


def differing(tensors: Mapping[str, Tensor], group: Group) -> list[str]:
    """Names of the tensors that have not the same bits on all ranks; the same list on all. Each is broadcast to compare.

    Raises: ValueError on every rank when names, shapes or dtypes differ.
    """
    if dist.get_world_size(group) == 1:
        return []
    _same_shapes(tensors, group)
    unlike = torch.zeros(len(tensors), dtype=torch.int32, device=next(iter(tensors.values())).device)
    for number, tensor in enumerate(tensors.values()):
        theirs = _bits(tensor).clone()
        dist.broadcast(theirs, group_src=0, group=group)
        unlike[number] = not torch.equal(theirs, _bits(tensor))
    dist.all_reduce(unlike, dist.ReduceOp.MAX, group=group)
    return [name for name, flag in zip(tensors, unlike.tolist(), strict=True) if flag]


@torch.no_grad()
def broadcast_from_first(tensors: Mapping[str, Tensor], group: Group) -> list[str]:
    """Give all ranks the first one's values (of parameters and buffers). Returns the names of those that differed."""
    unlike = differing(tensors, group)
    for name in unlike:
        theirs = _bits(tensors[name]).clone()
        dist.broadcast(theirs, group_src=0, group=group)
        tensors[name].copy_(theirs.view(tensors[name].dtype).view_as(tensors[name]))
    return unlike


@torch.no_grad()
def share_gradients(parameters: Mapping[str, Tensor], group: Group) -> None:
    """Divide gradients that are sums over ranks already by P: in the next sum all P parts come together again."""
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.div_(dist.get_world_size(group))


def _bits(tensor: Tensor) -> UInt8[Tensor, "bytes"]:
    """A tensor as bytes, which every backend can send, whatever they mean."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _same_shapes(tensors: Mapping[str, Tensor], group: Group) -> None:
    """Refuse tensors that could not be sent to one another."""
    mine = {name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for name, tensor in tensors.items()}
    everyones: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    for rank, theirs in enumerate(everyones):
        for name in [*everyones[0], *theirs]:
            if everyones[0].get(name) != theirs.get(name):
                raise ValueError(f"rank {rank} of the group has {theirs.get(name, 'nothing')} as {name}, and rank 0 "
                                 f"{everyones[0].get(name, 'nothing')}: replicas must be the same model.")
        if list(theirs) != list(everyones[0]):
            raise ValueError(f"rank {rank} of the group has the tensors of rank 0 in another order.")


def _refuse_missing(names: list[str], all_of_them: int) -> None:
    if names:
        raise ValueError(f"{len(names)} of {all_of_them} parameters got no gradient in this backward: {', '.join(names)}. "
                         f"Every rank must bring every gradient: use them in the loss, or freeze them by "
                         f"requires_grad_(False) before the buckets are made.")


def _wait(work: Pending | None) -> None:
    if work is not None:
        work.wait()
