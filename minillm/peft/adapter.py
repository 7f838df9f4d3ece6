"""Adapters: small feed-forward layers, C -> m -> C, inside the frozen blocks.

Serial ones (arXiv:1902.00751) read what attention or the feed-forward layer returns and correct it, before it is added to the
stream; parallel ones (arXiv:2110.04366) read what that layer reads. The second matrix begins at zero, so that the model
begins as it was. Unlike LoRA's, their work cannot be merged into a weight, since a function stands between the matrices.
Left out: adapters after the sum (arXiv:2005.00247), new norms.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.peft.freeze import Adapter, begin


class Bottleneck(Adapter, nn.Module):
    """scale · up(gelu(down(x))).   Cost: 2·m·C + m + C parameters."""

    def __init__(self, width: int, size: int, parallel: bool, scale: float, like: Tensor, generator: torch.Generator):
        super().__init__()
        self.parallel, self.scale = parallel, scale
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        with torch.no_grad():
            self.down.weight.normal_(0, width ** -0.5, generator=generator)
            for rest in (self.down.bias, self.up.weight, self.up.bias):
                rest.zero_()
        self.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """The correction."""
        return self.up(F.gelu(self.down(x.to(self.down.weight.dtype)))) * self.scale


def add_adapters(model: nn.Module, size: int = 16, *, parallel: bool = False, scale: float = 1.0,
                 parts: tuple[str, ...] = ("attention", "ffn"), seed: int = 0) -> None:
    """Freeze the model and give these parts of every block a bottleneck of `size` numbers.

    Raises: ValueError for an unknown part, a size below 1, or a second method.
    """
    if size < 1 or not parts or set(parts) - {"attention", "ffn"}:
        raise ValueError(f"size = {size}, parts = {parts}: a size of at least 1 is needed, in \"attention\", \"ffn\" or both.")
    begin(model, "bottleneck", size=size, parallel=parallel, scale=scale, parts=parts)
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for part in parts:
            module = getattr(block, part)
            module.bottleneck = Bottleneck(model.config.width, size, parallel, scale, model.embed.weight, generator)
            module.register_forward_hook(_correct)


def _correct(module: nn.Module, args: tuple, out: Tensor | tuple):
    """The hook: attention returns its weights, too."""
    first = out[0] if isinstance(out, tuple) else out
    first = first + module.bottleneck(args[0] if module.bottleneck.parallel else first).to(first.dtype)
    return (first, *out[1:]) if isinstance(out, tuple) else first
