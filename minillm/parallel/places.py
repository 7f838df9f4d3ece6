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
HERE = tuple(os.path.join(OURS, "parallel", name) for name in ("rank.py", "forkserver.py", "launch.py", "live.py", "channel.py"))
LIBRARIES = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
TORCH = os.path.realpath(os.path.dirname(torch.distributed.__file__))
WAITS = (".wait(", ".backward(", "synchronize(")  # calls into C that Python's stack does not show


class Frame(NamedTuple):
    """One level of a stack."""

    file: str
    line: int
    function: str


def frames_of(stack: Iterable) -> list[Frame]:
    """Frames of traceback.walk_stack or walk_tb as plain values."""
    return [Frame(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in stack]


def users_frame(frames: Sequence[Frame]) -> int:
    """Index of the innermost frame that is neither Python's, nor a library's, nor of the machinery that runs ranks.

    The last index if there is none.
    """
    for index, frame in enumerate(frames):
        real = os.path.realpath(frame.file)
        if real.startswith(OURS + os.sep):
            if real not in HERE:
                return index
        elif not real.startswith(LIBRARIES) and not frame.file.startswith("<frozen"):
            return index
    return len(frames) - 1


def waiting_call(frames: Sequence[Frame]) -> str | None:
    """The name of the communication that the innermost frames are in, such as all_reduce, or None if it is none.

    The source line stands in where C code has no name: `work.wait()`.
    """
    user = users_frame(frames)
    called = [frame.function for frame in frames[:user] if os.path.realpath(frame.file).startswith(TORCH)
              and frame.function != "wrapper"]
    if called:
        return called[-1]
    source = source_line(frames[user]) if frames else ""
    return f"`{source}`" if any(wait in source for wait in WAITS) else None


def place(frame: Frame) -> str:
    """backward_hook (data_parallel.py:88); in a notebook, step (line 3 of a cell)."""
    if "ipykernel_" in frame.file or "<ipython-input" in frame.file:
        return f"{frame.function} (line {frame.line} of a cell)"
    return f"{frame.function} ({os.path.basename(frame.file)}:{frame.line})"


def whereabouts(frames: Sequence[Frame]) -> str:
    """What a rank was doing: `waiting in all_reduce, called by step (train.py:12)`, or just the place."""
    if not frames:
        return "somewhere that it could not tell"
    call, user = waiting_call(frames), place(frames[users_frame(frames)])
    return f"waiting in {call}, called by {user}" if call else f"in {user}"


def source_line(frame: Frame) -> str:
    """The text of a frame's line, empty if it cannot be found."""
    return linecache.getline(frame.file, frame.line).strip()


def several(ranks: Iterable[int]) -> str:
    """rank 2; ranks 0, 1 and 3."""
    names = [str(rank) for rank in sorted(ranks)]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def together(sentences: dict[int, str]) -> str:
    """Ranks that share a sentence share it in print: ranks 0 and 1 were waiting in ...; rank 3 was in ..."""
    by_text: dict[str, list[int]] = {}
    for rank, text in sorted(sentences.items()):
        by_text.setdefault(text, []).append(rank)
    return "; ".join(f"{several(ranks)} {'was' if len(ranks) == 1 else 'were'} {text}" for text, ranks in by_text.items())
