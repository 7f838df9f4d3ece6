"""Where a rank is, in words: which collective it waits in, on which line of whose code.

Pure functions on stacks, without processes: a stack is a list of frames, the innermost first.
"""

import linecache
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed

OURS = str(Path(__file__).resolve().parents[1])
RANK, CHECKED, *MACHINERY = (os.path.join(OURS, "parallel", name + ".py") for name in
                             ("rank", "checked", "forkserver", "launch", "live", "channel"))
TALKING = tuple(os.path.join(OURS, "parallel", name) for name in ("collectives.py", "differentiable.py"))
LIBRARIES = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
TORCH = os.path.realpath(os.path.dirname(torch.distributed.__file__))
WAITS = (".wait(", ".synchronize(")  # calls into C, of which Python's stack shows no more than the caller's line
BACKWARD = "_engine_run_backward"  # the function of torch.autograd that calls into C


class Frame(NamedTuple):
    """One level of a stack."""

    file: str
    line: int
    function: str


def frames_of(stack: Iterable) -> list[Frame]:
    """Frames of traceback.walk_stack or walk_tb as plain values."""
    return [Frame(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in stack]


def users_frame(frames: Sequence[Frame]) -> int | None:
    """Index of the innermost frame that is neither Python's, nor a library's, nor of our collectives or what runs ranks."""
    for index, frame in enumerate(frames):
        real = os.path.realpath(frame.file)
        if real.startswith(OURS + os.sep):
            if real == RANK:  # from here on outwards, all is machinery
                return None
            if real not in (CHECKED, *MACHINERY, *TALKING):
                return index
        elif not real.startswith(LIBRARIES) and not frame.file.startswith(("<frozen", "<@beartype")):
            return index
    return None


def waiting_call(frames: Sequence[Frame]) -> str | None:
    """The name of the communication that the innermost frames are in, such as all_reduce, or None if it is none.

    The source line stands in where C code has no name: `work.wait()`.
    """
    user = users_frame(frames)
    if user is None:
        return None
    if any(os.path.realpath(frame.file) == CHECKED for frame in frames[:user]):
        return "the comparison of checked mode"
    called = [frame.function for frame in frames[:user] if os.path.realpath(frame.file).startswith((TORCH, *TALKING))
              and frame.function != "wrapper"]
    if called:
        return called[-1]
    source = linecache.getline(frames[user].file, frames[user].line).strip()
    waits = any(wait in source for wait in WAITS) if user == 0 else frames[0].function == BACKWARD
    return f"`{source}`" if waits else None


def place(frames: Sequence[Frame]) -> str:
    """Where the user's code was: backward_hook (data_parallel.py:88); in a notebook, step (line 3 of a cell)."""
    user = users_frame(frames)
    if user is None:
        return "code that is not the caller's"
    frame = frames[user]
    if "ipykernel_" in frame.file or "<ipython-input" in frame.file:
        return f"{frame.function} (line {frame.line} of a cell)"
    return f"{frame.function} ({os.path.basename(frame.file)}:{frame.line})"


def whereabouts(frames: Sequence[Frame]) -> str:
    """What a rank did: `waited in all_reduce, called by step (train.py:12)`, or `worked in step (train.py:9)`."""
    call = waiting_call(frames)
    return f"waited in {call}, called by {place(frames)}" if call else f"worked in {place(frames)}"


def several(ranks: Iterable[int]) -> str:
    """rank 2; ranks 0, 1 and 3."""
    names = [str(rank) for rank in sorted(ranks)]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def together(sentences: dict[int, str]) -> str:
    """Ranks that share a sentence share it in print: ranks 0 and 1 waited in ...; rank 3 worked in ..."""
    by_text: dict[str, list[int]] = {}
    for rank, text in sorted(sentences.items()):
        by_text.setdefault(text, []).append(rank)
    return "; ".join(f"{several(ranks)} {text}" for text, ranks in by_text.items())
