"""The one place through which the library shows that it is working.

Library code never prints. It wraps its long loops in `track` or `bar`, which do nothing until a command or a
notebook calls `show_progress(True)`; then each becomes a tqdm bar on standard error. Only `relay` always shows, because
what it passes on is not the library's text.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
_shown = False


def show_progress(shown: bool = True) -> None:
    """Switch every progress bar of the library on or off (off at import)."""
    global _shown
    _shown = shown


def track(iterable: Iterable[Item], label: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield the items of `iterable` behind a progress bar named `label`."""
    yield from tqdm(iterable, desc=label, total=total, unit=unit, disable=not _shown, dynamic_ncols=True)


@contextmanager
def bar(label: str, total: int | None = None, unit: str = "it", start: int = 0) -> Iterator[tqdm]:
    """A progress bar that the caller moves by `.update(n)` and comments on by `.set_postfix_str(text)`."""
    scaled = unit == "B"
    with tqdm(desc=label, total=total, unit=unit, unit_scale=scaled, initial=start, disable=not _shown,
              dynamic_ncols=True) as moving:
        yield moving


def say(text: str) -> None:
    """Write a line above the bars when progress is shown, nothing otherwise."""
    if _shown:
        tqdm.write(text)


def relay(line: str, error: bool = False) -> None:
    """Pass on a line that the caller's own code printed in another process: always shown, as the caller's own print is.

    error: to standard error instead of standard output.
    """
    tqdm.write(line, file=sys.stderr if error else sys.stdout)
