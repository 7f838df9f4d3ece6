"""The KV cache: keys and values of the tokens already read, so that each new token is one row of work.

Without it, writing N tokens reads 1 + 2 + ... + N; with it, N. The price is memory: 2 · L · G · D numbers a token.
Every cache answers `update(layer, k, v) -> (k, v)` with all keys and values so far, and knows its `length`.
This one is static: it holds its whole size from the start, so that no step allocates.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.config import ModelConfig


class StaticCache:
    """Room for `size` tokens of `batch` texts.

    Shapes: keys and values (L, B, G, size, D).   Cost: 2 · L · B · G · D · size numbers, whatever is in use.
    """

    def __init__(self, config: ModelConfig, batch: int, size: int, *, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu"):
        shape = (config.layers, batch, config.kv_size, size, config.head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        # Each layer's part, cut once: in a small model slicing takes as long as copying.
        self._parts = [(self.keys[layer], self.values[layer]) for layer in range(config.layers)]
        self.length = 0

    @property
    def bytes(self) -> int:
        """Bytes that the cache occupies."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def update(self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"],
               ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """Append one layer's new keys and values; the last layer's call makes the cache longer.

        Raises: ValueError when the tokens do not fit.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens and cannot take {end}: make it larger, "
                             f"or ask for {end - self.keys.shape[3]} tokens fewer.")
        keys, values = self._parts[layer]
        keys.narrow(2, start, end - start).copy_(k)
        values.narrow(2, start, end - start).copy_(v)
        if layer == len(self._parts) - 1:
            self.length = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)
