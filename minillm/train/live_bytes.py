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
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes alive now. Views share a storage, which counts once."""
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                storage = tensor.untyped_storage()
                self._storages[_storage(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
