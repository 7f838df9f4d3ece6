"""The loss scale: gradients too small for fp16 are made larger before they exist, by multiplying the loss.

Every gradient is proportional to the loss, so a loss of 65,536 times the size lifts them all by 16 of fp16's exponents; before
the update they are divided back in float32. How much is right changes in training, so the scale is tried out: too large, and
a gradient is infinite (the step is skipped, the scale halved); fine for long, and it is doubled.
Sources: arXiv:1710.03740 §3.2; the constants are those of torch.amp.GradScaler, which this equals step by step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossScaler:
    """What the loss is multiplied by, and how it moves. A fixed scale (dynamic=False) skips bad steps all the same."""

    scale: float = 65_536.0
    dynamic: bool = True
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    """Good steps in a row after which the scale grows."""
    good_steps: int = 0
    """Of them, how many so far."""

    @torch.no_grad()
    def unscale(self, grads: Iterable[Tensor]) -> bool:
        """Divide float32 gradients by the scale, in place. Returns whether all are finite.

        Raises: TypeError for gradients in 16 bits, where dividing would lose what scaling has saved.
        """
        finite = torch.ones((), dtype=torch.bool)
        for grad in grads:
            if grad.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(f"a gradient in {grad.dtype} cannot be unscaled in place: divided by {self.scale:g} it would "
                                f"underflow again. Copy it to float32 first.")
            finite = finite.to(grad.device) & grad.isfinite().all()
            grad.mul_(1 / self.scale)
        return bool(finite)

    def update(self, finite: bool) -> None:
        """Move the scale after a step: down at once when a gradient was not finite, up after `interval` good ones."""
        if not self.dynamic:
            return
        if not finite:
            self.scale, self.good_steps = self.scale * self.backoff, 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * self.growth, 0
