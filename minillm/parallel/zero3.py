"""ZeRO-3: ZeRO-2, and the weights are kept in parts, too: a block is whole on a rank only while it computes.

Before a block runs, forward or backward, its weights are gathered; after it, the memory of the whole is given back, and while
it runs the next block's weights are on their way. Its gradients leave as soon as they are there. 16Ψ/P bytes, and two blocks
whole; the price is a third Ψ(P-1)/P elements of traffic: weights come in for forward and again for backward. What stands
outside the blocks (embedding, final norm, head) is one more unit, whole from the start of forward to its end, and in backward.
Outside of that the model's parameters are this rank's pieces, as torch's `fully_shard` (FSDP2) shows its shards.

How a tensor can come and go while autograd holds it: autograd keeps the storage, and the storage is resized, to 0 and back.
Autocast copies weights to 16 bits and keeps the copies for backward, whole: for 16-bit products use dtype, not autocast.
Source: arXiv:1910.02054 §5.3 and §7.2; the hooks: arXiv:2304.11277 §4. Differs from FSDP2: pieces of flat tensors, not rows of
each weight; a 16-bit part beside the float32 one, as in the paper. Left out: models that never were whole on a rank.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minillm.parallel.data_parallel import Group
from minillm.parallel.zero1 import TORCH, Flat, Wire, wait
from minillm.parallel.zero2 import Zero2


class Zero3(Zero2):
    """As `Zero2`, block by block. In the list of flat tensors the last block is the first, and what is outside the last.

    reshard: give weights back after forward. Else they stay until backward: less traffic, and zero2's memory.
    Cost: with M microbatches a step, 3MΨ(P-1)/P elements a rank (2M without reshard); keeps a P-th of everything, and of whole
    weights two blocks and what is outside of blocks.
    """

    shared = False

    def __init__(self, model: nn.Module, group: Group | None, blocks: Iterable[nn.Module], *, dtype: torch.dtype | None = None,
                 gradients: torch.dtype | None = None, reshard: bool = True, wire: Wire = TORCH):
        self._units = [*reversed(list(blocks)), model]
        super().__init__(model, group, dtype=dtype, gradients=gradients, wire=wire)
        self.reshard, self._coming, self._backward = reshard, {}, set()
        places = {id(p): (number, name) for number, flat in enumerate(self.flats) for name, p in flat.parameters.items()}
        self._slots: list[list] = [[] for _ in self.flats]  # (module, attribute, name in the flat tensor); tied: several
        for path, parameter in model.named_parameters(remove_duplicate=False):
            (number, name), (owner, _, leaf) = places[id(parameter)], path.rpartition(".")
            self._slots[number].append((model.get_submodule(owner), leaf, name))
        for number, unit in enumerate(self._units if self.flats[0].ranks > 1 else ()):
            unit.register_forward_pre_hook(lambda *_, number=number: self._enter(number))
            unit.register_forward_hook(lambda _module, _given, out, number=number: self._after(number, out))
        self._drop_all()

    def finish(self) -> None:
        """Wait for the gradients that still travel. Raises: as `Zero1.finish`."""
        self._drop_all()
        super().finish()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update this rank's pieces and forget the gradients. Nothing is sent."""
        self._drop_all()
        super().step(optimizer)

    def _split(self, _) -> list[dict[str, nn.Parameter]]:
        """One flat tensor for each block, with what is frozen, and one for the rest."""
        left, flats = {p: name for name, p in self.model.named_parameters()}, []
        for unit in self._units:
            flats.append({left.pop(p): p for p in unit.parameters() if p in left})
            dtypes = {p.dtype for p in flats[-1].values()}
            if len(dtypes) != 1:
                raise ValueError(f"a block has parameters in {len(dtypes)} formats ({', '.join(map(str, dtypes)) or 'none'}): give "
                                 f"blocks and a rest that have parameters, all of one block in one format.")
        return flats

    def _enter(self, number: int) -> None:
        if number not in self._backward:  # where a checkpointed forward runs again, in backward, all is there
            self._before(number, number - 1)

    def _before(self, number: int, ahead: int) -> None:
        """A unit is about to run: bring its weights together, and let the next one's set out."""
        self._start(number)
        wait(self._coming.pop(number, None))
        self._show(number, self.flats[number].parameters)
        if 0 <= ahead < len(self.flats):
            self._start(ahead)

    def _after(self, number: int, out) -> None:
        """A unit's forward is done. Its weights may go, but not inside backward."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._begin_backward(number))
        if number not in self._backward and (self.reshard or not torch.is_grad_enabled()):
            self._drop(number)

    def _begin_backward(self, number: int) -> None:
        """The gradient of a unit's output is there; a frozen weight in the unit behind it may have been in use until now."""
        if number and not _all_trained(self.flats[number - 1]):
            self._drop(number - 1)
        if number not in self._backward:
            self._backward.add(number)
            self._before(number, (number + 1) % len(self.flats))

    def _leave(self, full: Flat) -> None:
        """The gradients of a unit are all there, so its weights have done their work."""
        super()._leave(full)
        if _all_trained(full):
            self._drop(self.flats.index(full))

    @torch.no_grad()
    def _start(self, number: int) -> None:
        whole = self.flats[number].whole
        if not whole.untyped_storage().nbytes():
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            self._coming[number] = self.flats[number].gather(whole, self.flats[number].part)

    def _show(self, number: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put whole weights, or pieces, into the model."""
        for module, leaf, name in self._slots[number]:
            module._parameters[leaf] = parameters[name]

    def _drop(self, number: int) -> None:
        """Give the whole weights' memory back."""
        wait(self._coming.pop(number, None))
        self._backward.discard(number)
        if self.flats[number].ranks > 1:  # else the whole is the part
            self.flats[number].whole.untyped_storage().resize_(0)
            self._show(number, self.flats[number].pieces)

    def _drop_all(self) -> None:
        for number in range(len(self.flats)):
            self._drop(number)

    def _publish(self, flat: Flat) -> None:
        flat.write_back()


def _all_trained(flat: Flat) -> bool:
    return all(parameter.requires_grad for parameter in flat.parameters.values())


def fully_shard(model: nn.Module, group: Group, **options) -> Zero3:
    """`Zero3` over the blocks that the model lists (`model.blocks`), under the name that torch has for it."""
    return Zero3(model, group, model.blocks, **options)
