"""Ranks that stay alive between calls: `with Ranks(4) as ranks: ranks.run(fn)`. One call of `launch` is one such session.

The caller waits on every rank's socket and printed text at once, so nothing a rank does (raise, exit, be killed, print
without end, wait for ever) can leave the caller waiting longer than it asked to.
"""

import contextlib
import inspect
import io
import json
import linecache
import os
import re
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable

from minillm.parallel.channel import Channel, pack
from minillm.parallel.forkserver import fork_ranks
from minillm.parallel.places import waiting_call
from minillm.parallel.rank import choose_backend
from minillm.parallel.rank_error import Call
from minillm.progress import relay

QUIET = 2.0  # seconds without news after which the caller looks whether anybody can still go on
LOOKS, APART = 4, 0.5  # ranks found at the same place so often, so many seconds apart, without using the CPU, are stuck
IDLE = 0.01  # of the time between two looks: less CPU time than that is none
SAME_CAUSE = 0.2  # seconds in which other ranks may fail of the same cause, and are told together
ANSWER = 1.0  # seconds for a rank to say where it is
# Rank, time and process make torch's equal lines differ.
LOG_PREFIX = re.compile(r"^\[rank\d+\]:\[?[A-Z]\d{4} [\d:.]+ +\d+ ?")


class Ranks:
    """Processes that form a world and keep it, and `me.state`, from call to call. Arguments as of `launch`.

    Ends with `close`, the end of its `with`, or the end of this process; and by itself when a call leaves ranks waiting.
    What a rank does in the background when it ends, such as writing a file in a thread, is lost.
    """

    def __init__(self, ranks: int, *, backend: str = "auto", timeout: float = 120.0, checked: bool = False):
        if ranks < 1:
            raise ValueError(f"ranks = {ranks}: at least 1 is needed.")
        self.size, self.timeout, self.backend = ranks, timeout, choose_backend(backend, ranks)
        self._folder = tempfile.mkdtemp(prefix="minillm-ranks-")  # where they meet; the server removes it with the ranks
        try:
            self._control, streams, born = fork_ranks(ranks, self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._group = born["group"]
        self._channels = [Channel(channel) for channel, _, _ in streams]
        for channel, _, _ in streams:
            channel.settimeout(timeout)  # for sending to a rank that does not listen
        self._text = {(name, rank): bytearray() for name in ("stdout", "stderr") for rank in range(ranks)}
        self.pids = born["pids"]
        self._news = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._control, selectors.EVENT_READ, ("control", 0))
        for rank, (channel, output, errors) in enumerate(streams):
            for thing, name in ((self._channels[rank], "channel"), (output, "stdout"), (errors, "stderr")):
                self._selector.register(thing, selectors.EVENT_READ, (name, rank))
        caller = {"environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path}
        for rank in range(ranks):  # torch's own limit comes after the caller's, which can say more
            self._tell(rank, "join", rank, ranks, self.backend, timeout + 60, checked, self._folder, caller)

    def run(self, fn: Callable, *args) -> list:
        """fn(me, *args) on every rank, as `launch` does. An error that leaves no rank waiting leaves the ranks alive."""
        if self._selector is None:
            raise RuntimeError("these ranks have ended, after an error or by close(): make new ones.")
        _check_call(fn, args)
        cells = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and not os.path.exists(name)}
        try:
            packed = pack((fn, args, cells))
        except Exception as error:
            raise TypeError(f"the function or an argument cannot be sent to the ranks: {error}. Make inside the function "
                            f"what belongs to one process, such as locks, open files and groups.") from error
        call = Call(self.size, heard=time.monotonic())
        try:
            for rank in range(self.size):
                self._tell(rank, "call", packed)
            self._watch(call)
            while self._pump(call, 0.0):  # what has been printed and not yet read
                pass
        except BaseException:
            self.close()
            self._show_text()
            raise
        call.last_words = {rank: self._last_words(rank) for rank in call.deaths}
        if call.open() or call.deaths:
            self.close()
        self._show_text()
        error = call.error(self.timeout)
        if error:
            raise error
        return [call.results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks, and return when they are gone. A second call does nothing."""
        if self._selector is None:
            return
        streams = [key.fileobj for key in self._selector.get_map().values() if isinstance(key.fileobj, io.FileIO)]
        self._selector.close()
        self._selector = None
        if not self._server_ended_them():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)
        self._control.close()
        for channel in self._channels:
            channel.socket.close()
        for stream in streams:
            stream.close()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _server_ended_them(self) -> bool:
        """Close the way in, which is the order to kill, and wait for the word that it is done."""
        news = bytearray(self._news)
        self._control.settimeout(10)
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
            while part := self._control.recv(4096):
                news += part
        return b"ended" in news

    def _tell(self, rank: int, *message) -> None:
        with contextlib.suppress(OSError):  # a rank that is gone is reported by the server
            self._channels[rank].send(*message)

    def _watch(self, call: Call) -> None:
        """Wait until every rank has answered, or it is clear that one will not."""
        deadline = time.monotonic() + self.timeout
        while call.open():
            self._pump(call, 0.25)
            if call.failures or call.deaths:
                self._pump_for(call, SAME_CAUSE)
                self._locate(call)
                return
            if time.monotonic() > deadline:
                self._locate(call)
                return
            if time.monotonic() - call.heard > QUIET and self.backend == "gloo" and self._stuck(call):
                call.deadlocked = True
                return

    def _stuck(self, call: Call) -> bool:
        """Every open rank waits in a communication, at the same place at each look, and none has used the CPU since.

        On a GPU that proves nothing, because the CPU only waits for the device there.
        """
        heard = call.heard
        self._locate(call)
        for _ in range(LOOKS):
            before, call.stacks = call.stacks, {}
            self._pump_for(call, APART)
            self._locate(call)
            if call.heard != heard or call.failures or call.deaths or any(
                    rank not in call.stacks or rank not in before or call.stacks[rank][0] != before[rank][0]
                    or call.stacks[rank][1] - before[rank][1] > IDLE * APART or not waiting_call(call.stacks[rank][0])
                    for rank in call.open()):
                return False
        return True

    def _locate(self, call: Call) -> None:
        """Ask every open rank where it is, and wait a moment for the answers."""
        call.stacks.clear()
        for rank in call.open():
            self._tell(rank, "where")
        end = time.monotonic() + ANSWER
        while set(call.open()) - set(call.stacks) and time.monotonic() < end:
            self._pump(call, 0.05)

    def _pump_for(self, call: Call, seconds: float) -> None:
        end = time.monotonic() + seconds
        while call.open() and time.monotonic() < end:
            self._pump(call, max(0.0, end - time.monotonic()))

    def _pump(self, call: Call, seconds: float) -> bool:
        """Wait for news and take it in. Returns whether there was any."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            kind, rank = key.data
            if key.fd not in self._selector.get_map():  # closed a moment ago, with the news of a death
                continue
            if kind == "control":
                self._take_deaths(call)
            elif kind == "channel":
                self._take_messages(call, rank)
            else:
                text = key.fileobj.read(1 << 16)
                self._text[kind, rank] += text
                call.heard = time.monotonic()
                if not text:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
        return bool(ready)

    def _take_messages(self, call: Call, rank: int) -> None:
        try:
            messages = self._channels[rank].receive()
        except EOFError:  # how it ended is the server's to say
            self._selector.unregister(self._channels[rank])
            return
        for kind, *content in messages:
            if kind == "at":
                call.stacks[rank] = tuple(content)
                continue
            call.heard = time.monotonic()
            (call.results if kind == "done" else call.failures)[rank] = content[0]

    def _take_deaths(self, call: Call) -> None:
        """The server's lines about ranks that have ended. What they said before is read first."""
        news = self._control.recv(4096)
        if not news:
            raise RuntimeError("the process that ranks are forked from has died; the next call starts a new one")
        self._news += news
        *lines, self._news[:] = self._news.split(b"\n")
        for line in lines:
            rank, code = (json.loads(line)[name] for name in ("rank", "code"))
            while any(key.data == ("channel", rank) for key, _ in self._selector.select(0)):
                self._take_messages(call, rank)
            if rank in call.open():
                call.deaths[rank] = code

    def _last_words(self, rank: int, most: int = 40) -> str:
        lines = self._text["stderr", rank].decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if line and not line.startswith("Extension modules")][-most:])

    def _show_text(self) -> None:
        """Pass on what was printed, rank by rank. Warnings that several ranks print alike are shown once."""
        errors: dict[str, list[int]] = {}
        for (name, rank), text in self._text.items():
            for line in text.decode(errors="replace").splitlines():
                if name == "stdout":
                    relay(f"rank {rank} | {line}")
                else:
                    errors.setdefault(LOG_PREFIX.sub("", line), []).append(rank)
            text.clear()
        for line, ranks in errors.items():
            relay(f"rank {','.join(map(str, dict.fromkeys(ranks)))} | {line}", error=True)


def _check_call(fn: Callable, args: tuple) -> None:
    """Refuse arguments that do not fit, the forgotten first one above all, before any rank hears of it."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a function in C that does not say
        return
    try:
        signature.bind(None, *args)
    except TypeError as error:
        name = getattr(fn, "__name__", "the function")
        raise TypeError(f"{name}{signature} cannot take the rank and {len(args)} more: {error}. Its first argument is the "
                        f"rank, as in def {name}(me, ...).") from None
