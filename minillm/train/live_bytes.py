"""Counting memory on running code: the bytes of tensors that were made inside a block and are still alive.

Works on every device, the CPU too, which keeps no such statistics of its own. It sees what operations of torch return, whoever
calls them, and forgets a storage when its last tensor is gone; scratch space inside a kernel is not seen.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` then `live.now` and, since it was last set, `live.peak`, both in bytes."""

    def __init__(self):
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes alive now. Views share a storage, which counts once, with the size that it has now."""
        alive = {key: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for key, ref in self._storages.items()}
        self._storages = {key: self._storages[key] for key, storage in alive.items() if storage is not None}
        return sum(storage.nbytes() for storage in alive.values() if storage is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                self._storages[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
