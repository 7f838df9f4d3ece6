"""The process that ranks are forked from: it has imported torch and does nothing else, so a rank starts in milliseconds.

A fresh interpreter per rank needs a second or more to import torch; a fork of the caller may hang, because the caller
has used threads, and cannot use CUDA. A fork of this server can do both: it has one thread and has never touched CUDA.
It differs from multiprocessing's forkserver in four ways: the caller's main module is not imported again (so scripts
need no `if __name__` guard), each call brings its own environment, a set of ranks is one process group that dies as
one, and it dies when the caller does, whatever killed the caller. Works where os.fork does: Linux, macOS, WSL.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from io import FileIO

# Without the parts of torch.distributed, the first DTensor or FSDP call would take a rank about two seconds.
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining",
             "torch.distributed.device_mesh", "minillm.parallel.rank"]
START = "import importlib, json, sys; sys.path[:], first, names = json.loads(sys.argv[1]); " \
        "[importlib.import_module(name) for name in first]; from minillm.parallel.forkserver import serve; " \
        "serve(int(sys.argv[2]), names)"
# One thread; no CUDA, which even a question for it would start unless it goes to NVML; and on macOS, leave to fork.
CLEAN = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"}
STREAMS = 3  # file descriptors per rank: its channel, its standard output, its standard error


@dataclass
class Session:
    """A set of ranks as the server knows it."""

    control: socket.socket  # speaks to the caller; its end is the order to kill the ranks
    folder: str
    group: int = 0  # the process group, which is the first rank's process id
    alive: dict[int, int] = field(default_factory=dict)  # process id -> rank

    def tell(self, **news) -> None:
        """One line of JSON to the caller."""
        with contextlib.suppress(OSError):  # a caller that is gone will be noticed by its silence
            self.control.sendall(json.dumps(news).encode() + b"\n")

    def end(self) -> None:
        """Kill what is left of the group, collect it, and say so."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, signal.SIGKILL)
        for pid in self.alive:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.tell(ended=True)
        self.control.close()


def serve(descriptor: int, preload: list[str]) -> None:
    """Be the server: import, then fork ranks on request until the caller is gone."""
    for name in preload:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the ranks share these pages as long as no collection writes to them
    requests, sessions = socket.socket(fileno=descriptor), []
    awake, wake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    requests.sendall(b"ready\n")
    while True:
        ready = select.select([requests, awake, *(session.control for session in sessions)], [], [])[0]
        if awake in ready:
            os.read(awake, 4096)
            _report_deaths(sessions)
        for session in [session for session in sessions if session.control in ready]:
            session.end()
            sessions.remove(session)
        if requests in ready:
            head, descriptors, _, _ = socket.recv_fds(requests, 4096, 256)
            if not head:
                break
            ours = [requests.fileno(), awake, wake, *(session.control.fileno() for session in sessions)]
            sessions.append(_fork_ranks(json.loads(head)["folder"], descriptors, ours))
    for session in sessions:
        session.end()


def _report_deaths(sessions: list[Session]) -> None:
    """Collect every rank that has ended and tell its caller how."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        for session in sessions:
            if pid in session.alive:
                session.tell(rank=session.alive.pop(pid), code=os.waitstatus_to_exitcode(status))


def _fork_ranks(folder: str, descriptors: list[int], ours: list[int]) -> Session:
    """Fork one process per rank. descriptors: the session's, then STREAMS for each rank; ours: what no rank may keep."""
    session = Session(socket.socket(fileno=descriptors[0]), folder)
    ranks = [descriptors[i:i + STREAMS] for i in range(1, len(descriptors), STREAMS)]
    for rank, streams in enumerate(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, session.group)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in {*ours, *descriptors} - {*streams}:
                    os.close(other)
                from minillm.parallel.rank import serve_calls
                serve_calls(*streams)
            finally:
                os._exit(70)
        session.group = session.group or pid
        with contextlib.suppress(OSError):  # done by both, whoever comes first
            os.setpgid(pid, session.group)
        session.alive[pid] = rank
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    session.tell(group=session.group, pids=[pid for pid in session.alive])
    return session


class Server:
    """The caller's side: a running server, started at the first use and again if it has died."""

    def __init__(self):
        self.owner = os.getpid()
        self.requests, theirs = socket.socketpair()
        self.errors = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C in a terminal reaches the caller, which then ends the ranks, and not the ranks.
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps([sys.path, _first, PRELOADED + _loaded_parts()]), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors,
            start_new_session=True,
            env={**os.environ, **CLEAN})
        theirs.close()
        if not self.requests.recv(16):
            self.process.wait()
            self.errors.seek(0)
            words = self.errors.read().decode()[-2000:]
            self.stop()
            raise RuntimeError(f"the process that ranks are forked from did not start: {words}")

    def usable(self) -> bool:
        """Started by this very process (not by one that it was forked from), and alive."""
        return self.owner == os.getpid() and self.process.poll() is None

    def fork(self, folder: str, descriptors: list[int]) -> None:
        """Ask for ranks; the answer comes on the session's own socket."""
        socket.send_fds(self.requests, [json.dumps({"folder": folder}).encode()], descriptors)

    def stop(self) -> None:
        """End the server and every rank it has; in a fork of the caller, only let go of it."""
        self.requests.close()
        self.errors.close()
        if self.owner == os.getpid():
            self.process.wait()


_first: list[str] = []  # what `preload` asked for
_running: Server | None = None
_starting = threading.Lock()


def fork_ranks(count: int, folder: str) -> tuple[socket.socket, list[tuple[socket.socket, FileIO, FileIO]], dict]:
    """Start `count` ranks. Returns the session's socket, each rank's (channel, output, errors), and the pids and group.

    Raises: RuntimeError where processes cannot be forked, or if the server does not start or dies.
    """
    global _running
    if not hasattr(os, "fork"):
        raise RuntimeError("ranks are forked processes, and this system has none: use Linux, macOS, or WSL on Windows.")
    with _starting:
        for last in (False, True):
            if _running is None or not _running.usable():
                if _running is not None:
                    _running.stop()
                _running = Server()
            try:
                return _ask_for_ranks(_running, count, folder)
            except ConnectionError:  # it died a moment ago
                _running.stop()
                _running = None
                if last:
                    raise RuntimeError("the process that ranks are forked from has died twice in a row") from None


def _ask_for_ranks(server: Server, count: int, folder: str):
    control, theirs = socket.socketpair()
    given, kept, foreign = [theirs.fileno()], [], [theirs]
    for _ in range(count):
        ours, channel = socket.socketpair()
        output, errors = os.pipe(), os.pipe()
        kept.append((ours, FileIO(output[0]), FileIO(errors[0])))
        foreign += [channel, FileIO(output[1], "w"), FileIO(errors[1], "w")]
        given += [end.fileno() for end in foreign[-3:]]
    try:
        server.fork(folder, given)
        for end in foreign:
            end.close()
        return control, kept, json.loads(_line(control))
    except OSError:
        for end in (control, *foreign, *(end for rank in kept for end in rank)):
            end.close()
        raise


def preload(module: str) -> None:
    """Import a module once in the server, before all others, rather than in every rank. A server that runs is replaced."""
    global _running
    with _starting:
        if module not in _first:
            _first.append(module)
            if _running is not None:
                _running.stop()
            _running = None


def _loaded_parts() -> list[str]:
    """The parts of minillm that the caller has imported, apart from those that only a person looks at."""
    return sorted(name for name in sys.modules if name.startswith("minillm.")
                  and not name.startswith(("minillm.course", "minillm.cli", "minillm.__main__")))


def _line(control: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = control.recv(1)
        if not part:
            raise ConnectionError("the process that ranks are forked from has died")
        line += part
    return line
