"""What happens inside one rank: it joins the world, runs the functions that arrive, and says where it is when asked.

The main thread runs the functions; a second thread listens, so that a rank stuck in a collective (where torch lets
other threads run) can still answer, and so that a rank whose caller is gone ends itself.
"""

import faulthandler
import linecache
import os
import queue
import random
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from minillm.parallel.channel import Channel, unpack
from minillm.parallel.checked import switch_on
from minillm.parallel.places import Frame, frames_of

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}  # with NCCL, tensors on the CPU still travel by gloo
ENDED = 0  # the exit code of a rank whose caller is gone


@dataclass
class Rank:
    """What a function run by `launch` gets as its first argument: who it is and how to reach the others."""

    rank: int
    """This rank's number, from 0."""
    size: int
    """How many ranks there are: the world size."""
    device: torch.device
    """Where its tensors belong: a GPU of its own with NCCL, else the CPU."""
    group: dist.ProcessGroup
    """All ranks. torch's own default group, so its collectives find it without being told."""
    state: dict = field(default_factory=dict)
    """Kept from one call to the next as long as the ranks live (see `Ranks`)."""


@dataclass
class Failure:
    """An exception as it travels: not the object, whose class the caller may not have."""

    kind: str
    text: str
    traceback: str
    frames: list[Frame]  # innermost first


def choose_backend(backend: str, ranks: int) -> str:
    """nccl or gloo. ranks: those of this machine.

    Raises: ValueError if it is neither, or NCCL is asked for without a GPU for every rank.
    """
    if backend not in ("auto", "gloo", "nccl"):
        raise ValueError(f"backend = {backend!r}: choose auto, gloo or nccl.")
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if backend == "nccl" and gpus < ranks:
        raise ValueError(f"backend = 'nccl' for {ranks} ranks needs {ranks} GPUs, and there are {gpus} that NCCL can use. "
                         f"Use backend = 'gloo'.")
    return "gloo" if backend == "gloo" or gpus < ranks else "nccl"


def join_world(rank: int, size: int, backend: str, timeout: float, checked: bool, local_rank: int,
               store: dist.Store | None = None) -> Rank:
    """Join the process group of this world: through `store`, or as the environment says (torchrun)."""
    torch.set_num_threads(1)
    if checked:
        switch_on()
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if store is None and (restart := os.environ.get("TORCHELASTIC_RESTART_COUNT")):
            store, *_ = next(dist.rendezvous("env://"))  # torchrun keeps one for all starts: addresses of dead ranks are in it
            store = dist.PrefixStore(f"start {restart}", store)
        dist.init_process_group(BACKENDS[backend], store=store, rank=rank if store else -1, world_size=size if store else -1,
                                timeout=timedelta(seconds=timeout), device_id=device if device.type == "cuda" else None)
    return Rank(rank, size, device, dist.group.WORLD)


def serve_calls(channel: int, output: int, errors: int) -> None:
    """The life of a forked rank. Arguments: file descriptors. Does not return while the caller lives."""
    for descriptor, standard, name in ((output, 1, "stdout"), (errors, 2, "stderr")):
        os.dup2(descriptor, standard)
        os.close(descriptor)
        setattr(sys, name, open(standard, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False))
    faulthandler.enable()  # a crash in C says on standard error where it was
    caller, calls = Channel(socket.socket(fileno=channel)), queue.SimpleQueue()
    threading.Thread(target=_listen, args=(caller, calls, threading.get_ident()), daemon=True).start()
    me, first = None, True
    while True:
        kind, *content = calls.get()
        try:
            if kind == "join":
                me = _join_forked(*content)
                continue
            if me is None:  # the caller has been told why
                continue
            begins, first = first, False
            result = _call(me, content[0], begins)
            _flush()
            try:
                caller.send("done", result)
            except (TypeError, AttributeError, ValueError, RuntimeError) as error:  # what pickling may raise
                raise TypeError(f"the result, a {type(result).__name__}, cannot be sent to the caller: {error}") from None
        except BaseException as error:
            _flush()
            caller.send("raised", _failure(error))


def _listen(caller: Channel, calls: queue.SimpleQueue, main: int) -> None:
    """Pass calls on to the main thread, and answer the question where that thread is."""
    while True:
        try:
            messages = caller.receive()
        except EOFError:
            os._exit(ENDED)
        for message in messages:
            if message[0] == "where":
                caller.send("at", frames_of(traceback.walk_stack(sys._current_frames()[main])), time.process_time())
            else:
                calls.put(message)


def _join_forked(rank: int, size: int, backend: str, timeout: float, checked: bool, folder: str, caller: dict) -> Rank:
    """Take over the caller's surroundings, then meet the others through a file: no port, no host name, no network."""
    os.environ.clear()
    os.environ.update(caller["environment"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:  # all ranks are on this machine, whatever the environment says about its network
        os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    os.chdir(caller["folder"])
    sys.path[:] = caller["path"]
    try:
        return join_world(rank, size, backend, timeout, checked, rank, dist.FileStore(os.path.join(folder, "store"), size))
    except RuntimeError as error:
        raise RuntimeError(f"the ranks could not connect to one another by {backend} over the loopback interface {loopback}, "
                           f"which must be up: {error}") from error


def _call(me: Rank, packed: bytes, first: bool):
    """Unpack a function with its arguments and run it; before the first one, all ranks start from the same seeds."""
    function, arguments, cells = unpack(packed)
    linecache.cache.update(cells)  # so that tracebacks quote the lines of notebook cells
    if first:  # as late as can be: what unpacking imports may draw, and so does the checking of types in the tests
        random.seed(0)
        torch.manual_seed(0)
    return function(me, *arguments)


def _failure(error: BaseException) -> Failure:
    trace = step = error.__traceback__
    while step.tb_next:  # leave out the frames up to this file's last one
        trace = step.tb_next if step.tb_frame.f_code.co_filename == __file__ else trace
        step = step.tb_next
    lines = traceback.format_exception(type(error), error, trace)
    return Failure(type(error).__name__, str(error), "".join(lines), frames_of(traceback.walk_tb(trace))[::-1])


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed by the function
            pass
