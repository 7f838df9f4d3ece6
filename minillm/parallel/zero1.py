"""ZeRO-1: data parallelism in which each rank keeps the optimizer's states of its own P-th of the weights only.

`Overlapped` gives every rank every summed gradient, and all of them do the same update. Here gradients are held until
backward is done, then each rank gets the sum of its part alone (reduce-scatter), updates that, and the ranks show one
another the new weights (all-gather). An all-reduce is just these two halves, so the traffic stays 2Ψ(P-1)/P elements. What
is kept, with 16-bit weights and gradients: 4Ψ + 12Ψ/P bytes instead of 16Ψ.

Weights lie one after another in flat tensors, padded to P equal parts; a part may begin and end inside a weight. What the
optimizer sees of one is a piece: a view of (n, 1) for a matrix, (n,) for a vector, so that decay still knows them apart; n may
be 0, and padding is in no piece. An optimizer must work element by element: Muon and Adafactor do not.
Source: arXiv:1910.02054 §5.1 and §7. Left out: replicas of groups of ranks (HSDP), and buffers, which each rank keeps.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.config import TrainConfig
from minillm.parallel.collectives import Traffic, ring_all_gather, ring_reduce_scatter
from minillm.parallel.data_parallel import BUCKET_BYTES, Group, Pending, plan_buckets
from minillm.train.build import build_optimizer


class Wire(NamedTuple):
    """Who carries: functions of (what is filled, what is sent, group), which return what to wait for, or None when done."""

    reduce_scatter: Callable[[Tensor, Tensor, Group], Pending | None]
    all_gather: Callable[[Tensor, Tensor, Group], Pending | None]


def _torch(new: str, old: str) -> Callable[[Tensor, Tensor, Group], Pending]:
    """A collective of torch's, in the background, under its name of 2.13 or that before."""
    return lambda out, given, group: getattr(dist, new if hasattr(dist, new) else old)(out, given, group=group, async_op=True)


TORCH = Wire(_torch("reduce_scatter_single", "reduce_scatter_tensor"), _torch("all_gather_single", "all_gather_into_tensor"))


def ring(traffic: Traffic | None = None) -> Wire:
    """Our rings, counted in `traffic`. They are done when they return, so nothing can overlap with them."""
    def reduce_scatter(part: Tensor, whole: Tensor, group: Group) -> None:
        part.copy_(ring_reduce_scatter(whole, group, traffic))

    def all_gather(whole: Tensor, part: Tensor, group: Group) -> None:
        whole.copy_(ring_all_gather(part, group, traffic=traffic))
    return Wire(reduce_scatter, all_gather)


def wait(work: Pending | None) -> None:
    """Wait for what a wire has started, if it is not done."""
    if work is not None:
        work.wait()


class Flat:
    """Some weights in one flat tensor of P parts, of which this rank updates one.

    whole (P·n,): what the model's parameters are views of.   part (n,): this rank's; a view of whole, or its own.
    master (n,): what is updated: float32 copies of a part in 16 bits, else the part itself.   pieces: its views, by name.
    A group of None is one rank, and nothing is sent.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: Group | None, wire: Wire, dtype: torch.dtype | None = None,
                 gradients: torch.dtype | None = None, shared: bool = True):
        self.parameters, self.group, self.wire = dict(parameters), group, wire
        self.ranks, self.rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
        ends = list(accumulate(p.numel() for p in parameters.values()))
        self.spans = {name: (end - p.numel(), end) for (name, p), end in zip(parameters.items(), ends, strict=True)}
        self.length = -(-ends[-1] // self.ranks)
        given = F.pad(torch.cat([p.detach().reshape(-1) for p in parameters.values()]), (0, self.length * self.ranks - ends[-1]))
        self.whole = given.to(dtype or given.dtype)
        self.part = self.mine(self.whole) if shared or self.ranks == 1 else self.mine(self.whole).clone()
        self.master = self.hold(self.mine(given))
        for name, parameter in self.parameters.items():
            parameter.data = self.place(self.whole, name)
        self.pieces = {name: nn.Parameter(view, parameters[name].requires_grad) for name, view in self.cut(self.master).items()}
        for piece in self.pieces.values():
            piece.grad_dtype = None  # any: a 16-bit gradient waits as it is
        self.gradients, self.bucket, self._flying = gradients or self.whole.dtype, None, None
        self.reopen()

    def mine(self, whole: Shaped[Tensor, "P·n"]) -> Shaped[Tensor, "n"]:
        """This rank's part of a flat tensor."""
        return whole.view(self.ranks, self.length)[self.rank]

    def hold(self, given: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The master weights of this part, from what it was before it was rounded."""
        wide = torch.promote_types(self.part.dtype, torch.float32)
        return self.part if self.part.dtype == wide else given.to(wide, copy=True)

    def place(self, whole: Shaped[Tensor, "P·n"], name: str) -> Shaped[Tensor, "..."]:
        """Where a weight is in a flat tensor, in its shape."""
        return whole[slice(*self.spans[name])].view(self.parameters[name].shape)

    def span(self, name: str) -> tuple[int, int]:
        """First and end place of this rank's piece in the part."""
        return tuple(min(max(end - self.rank * self.length, 0), self.length) for end in self.spans[name])

    def cut(self, part: Shaped[Tensor, "n"]) -> dict[str, Tensor]:
        """The pieces of a part, with as many dimensions as the weights have."""
        return {name: part[slice(*self.span(name))].view(-1, *[1] * (p.ndim - 1)) for name, p in self.parameters.items()}

    def piece_of(self, name: str, dense: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """This rank's elements of a dense weight, in its piece's shape."""
        first, end = (self.rank * self.length + place - self.spans[name][0] for place in self.span(name))
        return dense.reshape(-1)[first:end].view(self.pieces[name].shape)

    def take(self, name: str) -> None:
        """Add a parameter's gradient to the bucket, and drop it."""
        if self.bucket is None:
            self.bucket = torch.zeros_like(self.whole, dtype=self.gradients)
        self.place(self.bucket, name).add_(self.parameters[name].grad)
        self.parameters[name].grad = None
        self.missing.discard(name)

    def reduce(self) -> None:
        """Send the bucket on its way: of the sum over ranks, each gets its part."""
        bucket, self.bucket, work = self.bucket, None, None
        part = bucket if self.ranks == 1 else torch.empty_like(self.mine(bucket))
        if self.ranks > 1:
            work = self.wire.reduce_scatter(part, bucket, self.group)
        self._flying = work, bucket, part
        self.reopen()

    def land(self) -> None:
        """Wait for the part, and drop the bucket."""
        if self._flying:
            (work, _, part), self._flying = self._flying, None
            wait(work)
            self.keep(part)

    def keep(self, part: Float[Tensor, "n"]) -> None:
        """Add a part to the pieces' gradients."""
        for name, grad in self.cut(part).items():
            piece = self.pieces[name]
            if piece.requires_grad:
                piece.grad = grad if piece.grad is None else piece.grad.add_(grad)

    def reopen(self) -> None:
        """Wait for all gradients again."""
        self.missing = {name for name, parameter in self.parameters.items() if parameter.requires_grad}

    def write_back(self) -> None:
        """Round the master weights to the part."""
        if self.part is not self.master:
            self.part.copy_(self.master)

    def gather(self, whole: Shaped[Tensor, "P·n"], part: Shaped[Tensor, "n"]) -> Pending | None:
        """Fill whole with all ranks' parts."""
        return self.wire.all_gather(whole, part, self.group) if self.ranks > 1 else None


class Zero1:
    """A model whose optimizer's states are shared out. In a step: backward, `finish`, `clip`, `step(optimizer)`.

    The optimizer updates `pieces`, this rank's parts of the weights by their names, which are the same on every rank.
    dtype: 16 bits, which the model is turned to; None leaves it as it is.   gradients: in what they are summed and kept; None
    is the weights' own (ZeRO's count), float32 what Megatron-LM does.   apart: weights with a flat tensor of their own, so that
    ranks of another group that hold them, too, have the same pieces.
    Cost: 2Ψ(P-1)/P elements a rank and step, however many backwards; keeps the weights, all gradients until `finish`, and a
    P-th of master weights and states.
    """

    flat = Flat
    shared = True  # whether a rank's part is a view of the whole weights, which stay

    def __init__(self, model: nn.Module, group: Group | None, *, dtype: torch.dtype | None = None,
                 gradients: torch.dtype | None = None, bucket_bytes: int = BUCKET_BYTES, apart: Collection[str] = (),
                 wire: Wire = TORCH):
        self.model, self.group, self.apart = model, group, apart
        self.flats = [self.flat(some, group, wire, dtype, gradients, self.shared) for some in self._split(bucket_bytes)]
        self.pieces = {name: piece for flat in self.flats for name, piece in flat.pieces.items()}
        if dtype:
            model.to(dtype)  # buffers, and what is frozen
        for flat in self.flats:
            for name, parameter in flat.parameters.items():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda _, flat=flat, name=name: self._arrived(flat, name))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The pieces."""
        return iter(self.pieces.items())

    def build_optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """The configuration's optimizer, for the pieces. Raises: ValueError for one that looks at whole matrices."""
        why = {"muon": "it orthogonalises whole matrices", "adafactor": "it averages over rows and columns"}.get(config.optimizer)
        if why:
            raise ValueError(f"optimizer = {config.optimizer!r} with ZeRO: {why}, and a rank has a part of the elements. Use "
                             f"\"fused\" or \"by_hand\".")
        return build_optimizer(self.named_parameters(), config)

    def no_sync(self) -> AbstractContextManager:
        """Around all but the last backward of a step, as with `Overlapped`. Here it changes nothing: `finish` sends."""
        return nullcontext()

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward, give every piece the sum of its gradient over ranks.

        Raises: ValueError naming the parameters that got no gradient.
        """
        self._refuse_missing(self.flats)
        for flat in self.flats:
            flat.reduce()
            flat.land()

    @torch.no_grad()
    def norm(self, mine: Float[Tensor, ""] | None = None) -> Float[Tensor, ""]:
        """Of all gradients together, each element once. mine: this rank's norm, if not all its pieces count.

        Cost: one all-reduce of one number.
        """
        grads = [piece.grad for piece in self.pieces.values() if piece.grad is not None] if mine is None else [mine]
        total = torch.zeros((), dtype=torch.float64, device=self.flats[0].whole.device)
        for grad in grads:
            total += grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum()
        if self.flats[0].ranks > 1:
            dist.all_reduce(total, group=self.group)
        return total.sqrt()

    def clip(self, max_norm: float) -> Float[Tensor, ""]:
        """Scale the gradients so that their norm over all ranks is at most max_norm. Returns the norm before."""
        norm = self.norm()
        torch.nn.utils.clip_grads_with_norm_(self.pieces.values(), max_norm, norm)
        return norm

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update this rank's pieces, one flat tensor after another, forget the gradients, and share the new weights.

        While one's weights travel the next is updated; of 16-bit gradients, one flat tensor's are float32 at a time.
        """
        grads, waiting = {name: piece.grad for name, piece in self.pieces.items()}, []
        optimizer.zero_grad(set_to_none=True)
        for flat in self.flats:
            for name, piece in flat.pieces.items():
                grad = grads.pop(name)
                piece.grad = grad if grad is None else grad.to(piece.dtype)
            self._update(flat, optimizer)
            optimizer.zero_grad(set_to_none=True)
            waiting.append(self._publish(flat))
        for work in waiting:
            wait(work)

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors from those of the pieces' names and shapes (the pieces, an optimizer's averages), on every rank."""
        dense = {}
        for flat in self.flats:
            given = {name: tensors[name] for name in flat.pieces if name in tensors}
            if given:
                whole = torch.zeros_like(flat.whole, dtype=next(iter(given.values())).dtype)
                part = torch.zeros_like(flat.mine(whole)) if flat.ranks > 1 else whole
                for name, view in flat.cut(part).items():
                    if name in given:
                        view.copy_(given[name])
                wait(flat.gather(whole, part))
                dense |= {name: flat.place(whole, name).clone() for name in given}
        return dense

    def part_of(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of dense tensors: `gather` backwards. Names that are no trained weight's are left out."""
        return {name: flat.piece_of(name, dense[name]) for flat in self.flats for name in flat.pieces if name in dense}

    @torch.no_grad()
    def load(self, dense: Mapping[str, Tensor]) -> None:
        """Take the weights of a dense model."""
        for name, part in self.part_of(dense).items():
            self.pieces[name].copy_(part)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Make the pieces the model's weights, after they were set by hand."""
        for flat in self.flats:
            wait(self._publish(flat))

    write_back = publish  # as `MasterWeights` calls it

    def _split(self, bucket_bytes: int) -> Iterable[dict[str, nn.Parameter]]:
        """What goes into each flat tensor: trained weights, those first whose gradients come first."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        together = {name: p for name, p in trained.items() if name not in self.apart}
        return ({name: trained[name] for name in names} for names in [*plan_buckets(together, bucket_bytes), *([n] for n in self.apart)])

    def _arrived(self, flat: Flat, name: str) -> None:
        """Backward has made a gradient."""
        with torch.no_grad():
            flat.take(name)

    def _update(self, flat: Flat, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def _publish(self, flat: Flat) -> Pending | None:
        flat.write_back()
        return flat.gather(flat.whole, flat.part)

    def _refuse_missing(self, flats: list[Flat]) -> None:
        missing = [name for flat in flats for name in flat.parameters if name in flat.missing]
        for flat in self.flats:
            flat.reopen()
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.pieces)} parameters got no gradient in this backward: {', '.join(missing)}. "
                             f"Every rank must bring every gradient: use them in the loss, or freeze them by "
                             f"requires_grad_(False) before the model is shared out.")
