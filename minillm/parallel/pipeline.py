"""Pipeline parallelism: each rank holds some of the layers, and microbatches pass through the ranks.

`Pipeline` runs any schedule (minillm/parallel/schedules.py) on the ranks of a group: activations travel forward, gradients
backward, and a rank does its actions in the schedule's order, each as soon as what it needs has come. Gradients add up over
the microbatches, so a synchronous schedule gives those of the whole batch, whatever its order. The extras are the papers':
    recompute   keep only what a stage was given, and run its forward again in backward (GPipe)
    stash       with updates inside the schedule, a microbatch's backward uses the weights of its forward (PipeDream)
    backward_input and backward_weight   gradients of the stream first, those of the weights later (zero bubble)
All ranks know the whole schedule, so every pair of them posts its messages in one order, that of `in_order`: on NCCL, where
a send waits for its receive, two ranks that post theirs crosswise would wait for ever. Only gloo has been tried.
Sources: arXiv:1811.06965, arXiv:1806.03377, arXiv:2104.04473, arXiv:2401.10241. Left out: dropout's random state in
recomputation (the models here have none), stages whose stream is more than one tensor, and skip connections between stages.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from minillm.parallel.schedules import Action, Schedule, Timed, check_schedule, in_order, parts

Group = dist.ProcessGroup
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEADER = 8
"""Numbers of the message that tells a stream's dtype and shape."""


@dataclass
class Kept:
    """What a stage keeps of a microbatch between its forward and its backward."""

    given: Tensor | None
    out: Tensor | None  # None until it is made again, with recompute
    weights: dict[str, Tensor] | None  # the version that the forward used, when updates come in between
    edges: list[tuple[GradientEdge, list[Tensor]]]  # where each module's output left it, and the module's own parameters
    owed: list[tuple[GradientEdge, list[Tensor], Tensor]] = field(default_factory=list)  # with the gradient: left for the weights


class Pipeline:
    """This rank's part of a pipeline.

    stages: this rank's, called as stage(x, microbatch): x is what the stage before made, None on the first. The i-th is
    number i · P + rank.   loss: what the last stage makes of its output and the microbatch, a scalar, the sum over its targets.
    A microbatch is anything; all ranks are given the same ones, and of each a stage's outputs must have the same shape.
    With backward_input, weights belong to modules that return one tensor; where one weight is used twice in a stage (one that has
    both the embedding and the head that is tied to it), backward_weight repeats what backward_input did. Until then a microbatch
    keeps its activations, and the gradients of those modules' outputs too.
    context: what the stages' forwards run under, such as autocast; the loss does not.
    trace: a list that gets a `Timed` for every action; may be set at any time. For ranks on CPUs: a GPU's work ends later.
    stash: whether an asynchronous schedule keeps a copy of the weights for every microbatch on its way. Without, backward mixes
    activations of old weights with new ones, and its result is the gradient of nothing.
    Staleness: a microbatch's gradient on stage s is that of weights which were updated stages - s - 1 times since (fewer at
    the start). With one weight version less for each stage on, no single version has that gradient.
    Cost: a stage's output, B·T·C elements of a microbatch, goes to the next rank, and its gradient comes back; before the first, 64
    bytes tell its shape.
    """

    def __init__(self, stages: Sequence[nn.Module], group: Group, loss: Callable[[Tensor, Any], Tensor], *,
                 recompute: bool = False, stash: bool = True, trace: list[Timed] | None = None,
                 context: Callable[[], AbstractContextManager] = nullcontext):
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.chunks, self.stages = list(stages), len(stages) * self.ranks
        self.loss, self.recompute, self.stash, self.trace, self.context = loss, recompute, stash, trace, context
        self.kept: dict[tuple[int, int], Kept] = {}
        self._edges: list[tuple[GradientEdge, list[Tensor]]] = []
        self._versions: dict[int, dict[str, Tensor]] = {}  # of each stage, for the next forward
        self._checked: tuple[Schedule, int, list[Action]] = [], 0, []  # the last one, and its common order

    def run(self, schedule: Schedule, microbatches: Sequence, *, scale: float | Tensor = 1.0,
            update: Callable[[int, int], None] | None = None, quiet: Callable[[], AbstractContextManager] = nullcontext) -> list[Tensor]:
        """Do the schedule; adds the gradients of scale · (the sum of all losses). Returns the microbatches' losses on the rank of
        the last stage, [] on the others.

        update(stage, microbatch): an update action of an asynchronous schedule: step the stage's optimizer, forget its gradients.
        quiet: what all backwards but the last of each stage run under (`Overlapped.no_sync`).
        Raises: ValueError for a schedule that is wrong, or of another number of ranks, stages or microbatches; or outputs whose
        shape changes. An error inside a stage gets a note that says which, and what it was given.
        """
        if self._checked[:2] != (schedule, len(microbatches)):
            self._fit(schedule, len(microbatches))
        kinds = {action.kind for actions in schedule for action in actions}
        if "update" in kinds and update is None:
            raise ValueError("the schedule has updates, and no update function was given: pass update=, which steps an optimizer.")
        with self._watch() if "backward_input" in kinds else nullcontext():
            return self._do(self._checked[2], microbatches, scale, update, quiet)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence) -> list[Tensor]:
        """Forward only: the microbatches' losses on the rank of the last stage, [] on the others."""
        forwards = [[Action("forward", chunk * self.ranks + rank, m) for m in range(len(microbatches)) for chunk in range(len(self.chunks))]
                    for rank in range(self.ranks)]
        return self._do(in_order(forwards, self.stages), microbatches)

    def _fit(self, schedule: Schedule, microbatches: int) -> None:
        """Check a schedule, once."""
        if len(schedule) != self.ranks:
            raise ValueError(f"the schedule is for {len(schedule)} ranks, and the pipeline has {self.ranks}.")
        for which, what, given in ((1, "stages", self.stages), (2, "microbatches", microbatches)):
            planned = 1 + max((action[which] for actions in schedule for action in actions), default=-1)
            if planned != given:
                raise ValueError(f"the schedule is for {planned} {what}, and the pipeline was given {given}.")
        check_schedule(schedule, self.stages, microbatches)
        self._checked = [list(actions) for actions in schedule], microbatches, in_order(schedule, self.stages)

    def _do(self, ordered: list[Action], microbatches, scale=1.0, update=None, quiet=nullcontext) -> list[Tensor]:
        """This rank's actions, one after another."""
        mail, losses, self.kept = _Mail(ordered, self), {}, {}
        left = Counter(action.stage for _, action in mail.mine if parts(action)[-1].kind == "backward_weight")
        for place, action in mail.mine:
            kind, stage, m = action
            came, result = mail.receive(place, action), None
            begun = time.perf_counter()
            if kind == "forward":
                result = self._forward(action, came, microbatches[m], stale=update is not None)
                if stage == self.stages - 1:
                    losses[m] = result
            elif kind == "update":
                update(stage, m)
                self._versions.pop(stage, None)
            else:
                left[stage] -= parts(action)[-1].kind == "backward_weight"
                with quiet() if left[stage] else nullcontext():
                    result = self._backward(action, came, microbatches[m], scale)
            if self.trace is not None:
                self.trace.append(Timed(action, begun, time.perf_counter()))
            mail.send(action, result)
        mail.settle(len(ordered))
        return [losses[m] for m in sorted(losses)]

    def _forward(self, action: Action, given: Tensor | None, microbatch, stale: bool) -> Tensor:
        """Run a stage and keep what its backward needs."""
        training = torch.is_grad_enabled()
        if given is not None and training:
            given.requires_grad_()
        with torch.no_grad() if self.recompute else nullcontext():
            kept = self._call(action, given, microbatch, self._version(action.stage) if stale else None)
        out = kept.out.detach()
        if training:
            kept.out = None if self.recompute else kept.out
            self.kept[action.stage, action.microbatch] = kept
        return out

    def _call(self, action: Action, given: Tensor | None, microbatch, weights: dict[str, Tensor] | None) -> Kept:
        """A stage's forward; the last one's ends in the loss."""
        self._edges, stage = [], self.chunks[action.stage // self.ranks]
        try:
            with self.context():
                out = stage(given, microbatch) if weights is None else functional_call(stage, weights, (given, microbatch))
            if action.stage == self.stages - 1:
                out = self.loss(out, microbatch)
        except Exception as error:
            shape = "nothing" if given is None else f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)} by stage {action.stage - 1}"
            error.add_note(f"In the {action} (rank {self.rank} of the pipeline), which was given {shape}.")
            raise
        used = {id(parameter): parameter for _, own in self._edges for parameter in own}
        if len(used) < sum(len(own) for _, own in self._edges):  # one used twice would be counted twice: take the stage as one module
            self._edges = [(get_gradient_edge(out), list(used.values()))]
        return Kept(given, out, weights, self._edges)

    def _backward(self, action: Action, grad: Tensor | None, microbatch, scale) -> Tensor | None:
        """A backward or a part of one. Returns the gradient of what the stage was given, for the stage before."""
        key = action.stage, action.microbatch
        kept = self.kept[key] if action.kind == "backward_input" else self.kept.pop(key)
        if action.kind == "backward_weight":
            for edge, own, owed in kept.owed:
                # modules inside one another share parts of the graph, so it is kept until all are done
                torch.autograd.backward(edge, owed, inputs=own, retain_graph=True)
            return None
        if self.recompute:
            again = self._call(action, kept.given, microbatch, kept.weights)
            kept.out, kept.edges = again.out, again.edges
        grad = torch.ones_like(kept.out) * scale if grad is None else grad
        if action.kind == "backward_input" and kept.edges:
            wanted = [edge for edge, _ in kept.edges] + ([] if kept.given is None else [kept.given])
            found = torch.autograd.grad(kept.out, wanted, grad, retain_graph=True, allow_unused=True)
            kept.owed = [(edge, own, owed) for (edge, own), owed in zip(kept.edges, found) if owed is not None]
            back = found[-1]
        else:
            torch.autograd.backward(kept.out, grad)
            self._collect(action.stage, kept.weights or {})
            back = None if kept.given is None else kept.given.grad
        if kept.given is not None and back is None:
            raise ValueError(f"the {action} gave no gradient for stage {action.stage - 1}: stage {action.stage} made nothing of its stream.")
        return None if kept.given is None else back

    def _version(self, stage: int) -> dict[str, Tensor]:
        """The weights as they are now, for the forward of a microbatch whose backward comes after other updates: copies, or,
        without stash, other names of the same memory (so that torch does not notice when they change)."""
        if stage not in self._versions:
            named = self.chunks[stage // self.ranks].named_parameters()
            self._versions[stage] = {name: (p.detach().clone() if self.stash else p.data).requires_grad_() for name, p in named}
        return self._versions[stage]

    def _collect(self, stage: int, weights: dict[str, Tensor]) -> None:
        """Hand the gradients of a version over to the stage's parameters."""
        for name, parameter in self.chunks[stage // self.ranks].named_parameters() if weights else ():
            got, weights[name].grad = weights[name].grad, None
            parameter.grad = got if parameter.grad is None else parameter.grad + got

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Note where the output of each module with parameters of its own leaves it: there its weights' gradients begin."""
        modules = {id(module): module for chunk in self.chunks for module in chunk.modules()}.values()
        owned = [(module, [p for p in module.parameters(recurse=False) if p.requires_grad]) for module in modules]

        def note(own: list[Tensor]) -> Callable:
            return lambda module, args, out: self._edges.append((get_gradient_edge(out), own)) if out.requires_grad else None
        handles = [module.register_forward_hook(note(own)) for module, own in owned if own]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Mail:
    """The messages of one run between this rank and the others.

    Before its action at place n of the common order, a rank has posted a receive for all that is sent to it before n, and
    waits until all has left that is needed before n: what it waits for never depends on what it has not done yet.
    """

    def __init__(self, ordered: list[Action], pipe: Pipeline):
        self.group, self.rank, self.ranks = pipe.group, pipe.rank, pipe.ranks
        self.device = next((p.device for chunk in pipe.chunks for p in chunk.parameters()), torch.device("cpu"))
        self.mine = [(number, action) for number, action in enumerate(ordered) if action.stage % self.ranks == self.rank]
        self.place = {part: number for number, action in enumerate(ordered) for part in parts(action)}
        self.incoming = [(number, to) for number, action in enumerate(ordered) if (to := self._to(action)) in self.place
                         and to.stage % self.ranks == self.rank != action.stage % self.ranks][::-1]
        self.pending = {to for _, to in self.incoming}
        self.came: dict[Action, tuple[Tensor, dist.Work | None]] = {}
        self.sent: list[tuple[int, dist.Work, Tensor]] = []
        self.forms: dict[int, tuple[torch.dtype, list[int]]] = {}  # of the stream that goes to a stage, once it is known

    def receive(self, number: int, action: Action) -> Tensor | None:
        """What an action at this place needs from elsewhere: a stream, a gradient or nothing."""
        wanted = parts(action)[0]
        while self.incoming and self.incoming[-1][0] < number and (wanted in self.pending or not self._too_early(number)):
            self._expect(self.incoming.pop()[1])
        self.settle(number)
        tensor, work = self.came.pop(wanted, (None, None))
        if work is not None:
            work.wait()
        return tensor

    def send(self, action: Action, result: Tensor | None) -> None:
        """Send an action's result to where it is needed, if it is."""
        to = self._to(action)
        if to not in self.place:
            return
        if to.stage % self.ranks == self.rank:
            self.came[to] = result, None
            return
        if action.kind == "forward":
            form = result.dtype, list(result.shape)
            if to.stage not in self.forms:
                header = [DTYPES.index(form[0]), len(form[1]), *form[1]]
                self._post(to, torch.tensor(header + [0] * (HEADER - len(header)), device=self.device))
            known = self.forms.setdefault(to.stage, form)
            if known != form:
                raise ValueError(f"stage {action.stage} made {known[1]} of another microbatch and {form[1]} of microbatch "
                                 f"{action.microbatch}: all must have one shape. Use microbatches that divide the batch.")
        self._post(to, result.contiguous())

    def settle(self, number: int) -> None:
        """Wait until all has left that is needed before a place."""
        for needed, work, _ in self.sent:
            if needed < number:
                work.wait()
        self.sent = [message for message in self.sent if message[0] >= number]

    def _too_early(self, number: int) -> bool:
        """Whether the next receive would wait for its shape, though what it brings is not needed yet."""
        to = self.incoming[-1][1]
        return to.kind == "forward" and to.stage not in self.forms and self.place[to] > number

    def _expect(self, to: Action) -> None:
        """Post a receive. A gradient has the shape of what was sent; a stream's is told before its first."""
        self.pending.discard(to)
        forward = to.kind == "forward"
        sender = (to.stage + (-1 if forward else 1)) % self.ranks
        if forward and to.stage not in self.forms:
            header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
            dist.recv(header, group_src=sender, group=self.group)
            dtype, dims, *shape = header.tolist()
            self.forms[to.stage] = DTYPES[dtype], shape[:dims]
        dtype, shape = self.forms[to.stage if forward else to.stage + 1]
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self.came[to] = tensor, dist.irecv(tensor, group_src=sender, group=self.group)

    def _post(self, to: Action, tensor: Tensor) -> None:
        work = dist.isend(tensor, group_dst=to.stage % self.ranks, group=self.group)
        self.sent.append((self.place[to], work, tensor))

    @staticmethod
    def _to(action: Action) -> Action | None:
        """The action on another stage that needs this one's result, if there were one."""
        kind = parts(action)[0].kind
        step = {"forward": 1, "backward_input": -1}.get(kind)
        return step and Action(kind, action.stage + step, action.microbatch)
