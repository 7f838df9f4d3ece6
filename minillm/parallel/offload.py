"""ZeRO-Offload and ZeRO-Infinity: what a GPU has no room for lies in the host's memory, or in files.

`Offload` is zero2 with each rank's part elsewhere: gradients go to the host as they come in, master weights and moments live
there, the host's cores do the update, and the new 16-bit weights come back. On the GPU stay 2Ψ bytes of weights and two buckets
of gradients; over the bus go 2Ψ/P down and 2Ψ/P up a step. On one GPU, whose group is None, nothing else is sent.
Copies have a stream of their own and memory that the system cannot move (pinned), so backward goes on while gradients leave,
and the host updates the next flat tensor while the last one's weights come. On a CPU the same code copies plainly.
`Infinity` puts masters and moments in memory-mapped files: a thread reads the next flat tensor's while one is updated, whose
pages are then given back. Of the states, two flat tensors' are in a rank's memory at most.
Sources: arXiv:2101.06840 §4 (Offload), arXiv:2104.07857 §5.1 (Infinity). Left out: the update delayed by a step, which hides
it behind the next forward; and of Infinity, parameters and activations elsewhere, and reads around the page cache.
"""

import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.parallel.data_parallel import Group, Pending
from minillm.parallel.zero1 import Flat
from minillm.parallel.zero2 import Zero2


class HostFlat(Flat):
    """A flat tensor whose master weights and gradients are in the host's memory."""

    _landing: tuple[Tensor, "torch.cuda.Event | None"] | None = None

    def hold(self, given: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Always a copy, on the host."""
        self._stream = torch.cuda.Stream(given.device) if given.is_cuda else None
        return self._to_host(given, torch.promote_types(self.part.dtype, torch.float32))

    def keep(self, part: Float[Tensor, "n"]) -> None:
        """Let the gradient set out for the host, without waiting for it."""
        self.settle()
        with self._aside():
            landing = self._to_host(part, part.dtype, wait=False)
        if self._stream:
            part.record_stream(self._stream)  # its memory must not be used again before it is read
        self._landing = landing, self._stream.record_event() if self._stream else None

    def settle(self) -> None:
        """Wait for a gradient that is on its way, and add it up."""
        if self._landing:
            (landing, arrived), self._landing = self._landing, None
            if arrived:
                arrived.synchronize()
            super().keep(landing)

    def write_back(self) -> None:
        """Round on the host, and let the weights set out; what the GPU does next waits for them, the host does not."""
        rounded = self._to_host(self.master, self.part.dtype)
        with self._aside():
            self.part.copy_(rounded, non_blocking=True)
        if self._stream:
            torch.cuda.current_stream(self.part.device).wait_stream(self._stream)

    def _to_host(self, given: Tensor, dtype: torch.dtype, wait: bool = True) -> Tensor:
        there = torch.empty(given.shape, dtype=dtype, pin_memory=self._stream is not None)
        return there.copy_(given, non_blocking=not wait)

    def _aside(self) -> AbstractContextManager:
        """Work on the stream for copies, after what has been asked of the GPU so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.part.device))
        return torch.cuda.stream(self._stream)


class FileFlat(HostFlat):
    """A flat tensor whose master weights and states are in memory-mapped files."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *args, folder: Path):
        self._path, self._maps = folder / next(iter(parameters)), {}
        super().__init__(parameters, *args)

    def hold(self, given: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """A copy in a file."""
        master = self._map("master", super().hold(given))
        self.put_away()
        return master

    def adopt(self, states: Mapping[nn.Parameter, dict[str, Tensor]]) -> None:
        """Move an optimizer's states that are new, or were loaded, to files."""
        for slot in {slot for piece in self.pieces.values() for slot in states[piece]} - {"step"}:
            views = self.cut(self._map(slot, torch.zeros_like(self.master)))
            for name, piece in self.pieces.items():
                if states[piece][slot].data_ptr() != views[name].data_ptr():
                    states[piece][slot] = views[name].copy_(states[piece][slot])

    def fetch(self) -> None:
        """Read a number from each page, so that the system brings them all."""
        for _, tensor in list(self._maps.values()):
            tensor[::mmap.PAGESIZE // tensor.element_size()].sum()

    def put_away(self) -> None:
        """Give the memory back; the system writes what has changed to the files when it wants the pages."""
        for memory, _ in self._maps.values():
            memory.madvise(mmap.MADV_DONTNEED)

    def _map(self, what: str, like: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """A tensor in a file, which is made with these numbers the first time."""
        if what not in self._maps:
            path = Path(f"{self._path}-{what}-rank{self.rank}")
            path.unlink(missing_ok=True)  # another one's map of the old file lives on; cutting the file itself would crash it
            with path.open("wb+") as file:
                file.write(like.numpy().data)
                file.flush()  # a full disk is an error here; a page that finds no room later would be a crash
                memory = mmap.mmap(file.fileno(), like.nbytes)
            self._maps[what] = memory, torch.frombuffer(memory, dtype=like.dtype)
        return self._maps[what][1]


class Offload(Zero2):
    """As `Zero2`, with gradients, master weights and the optimizer's states on the host.

    Cost: keeps the weights and two buckets of gradients on the GPU; over the bus go a P-th of the gradients in each backward,
    and a P-th of the weights in each step.
    """

    flat = HostFlat

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the gradients that still travel, between ranks and to the host. Raises: as `Zero1.finish`."""
        super().finish()
        for flat in self.flats:
            flat.settle()


class Infinity(Offload):
    """As `Offload`, with master weights and the optimizer's states in files of each rank's own in `folder`, which must exist.

    Files are scratch: they hold nothing that a checkpoint would not.
    Cost: reads and writes a P-th of the states in each step; keeps two flat tensors' of them in memory.
    """

    def __init__(self, model: nn.Module, group: Group | None, folder: Path, **options):
        self.flat = partial(FileFlat, folder=Path(folder))
        super().__init__(model, group, **options)
        self._thread, self._coming = ThreadPoolExecutor(1), {}

    def _update(self, flat: Flat, optimizer: torch.optim.Optimizer) -> None:
        """Let the next one's states set out, wait for these, and update."""
        for one in (flat, self.flats[(self.flats.index(flat) + 1) % len(self.flats)]):
            if id(one) not in self._coming:
                self._coming[id(one)] = self._thread.submit(one.fetch)
        self._coming.pop(id(flat)).result()
        super()._update(flat, optimizer)
        flat.adopt(optimizer.state)

    def _publish(self, flat: Flat) -> Pending | None:
        work = super()._publish(flat)
        flat.put_away()
        return work
