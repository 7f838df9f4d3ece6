"""ZeRO-2: ZeRO-1, and of the gradients, too, each rank keeps its part alone.

zero1 holds all gradients to the end of backward. Here a bucket leaves as soon as backward has filled it; while it travels the
next one fills, and when that is full the first has come in and is dropped: two are alive at most. 2Ψ + 14Ψ/P bytes instead of
4Ψ + 12Ψ/P, for the same 2Ψ(P-1)/P elements. With microbatches there is a price: the full gradients that they could be added
up in are gone, so every backward sends, Ψ(P-1)/P elements each, and the parts are added up.
Source: arXiv:1910.02054 §5.2. Left out: holding the gradients of some microbatches in full, which is zero1.
"""

import torch

from minillm.parallel.zero1 import Flat, Zero1


class Zero2(Zero1):
    """As `Zero1`. Buckets leave in one order on all ranks: one that is full early waits for those before it.

    Cost: with M backwards a step, (M + 1)Ψ(P-1)/P elements a rank; keeps the weights, two buckets, and a P-th of the rest.
    """

    _next, _rounds = 0, 0  # the bucket that leaves next; backwards that have sent all of them
    _travels: Flat | None = None

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the bucket that still travels. Raises: as `Zero1.finish`."""
        self._land()
        short = not self._rounds or any(flat.bucket is not None for flat in self.flats)
        late = self.flats[self._next:] if short else []
        self._next = self._rounds = 0
        self._refuse_missing(late)

    @torch.no_grad()
    def _arrived(self, flat: Flat, name: str) -> None:
        flat.take(name)
        while self._next < len(self.flats) and not self.flats[self._next].missing:
            self._leave(self.flats[self._next])
            self._next += 1
        if self._next == len(self.flats):  # a further backward may come before finish
            self._next, self._rounds = 0, self._rounds + 1

    def _leave(self, full: Flat) -> None:
        """Send a bucket, once the one before it has come in."""
        if full.bucket is not None:  # else nothing of it is trained
            self._land()
            full.reduce()
            self._travels = full

    def _land(self) -> None:
        if self._travels:
            self._travels.land()
            self._travels = None
