"""A function on several real processes that form a gloo group: how exercises on ranks are run.

The processes are forks of this one, each with one thread (a forked child must not use the parent's thread pool), and they
meet through a file, so no port is opened. This file also runs inside the sandbox and imports only its neighbour.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable

from minillm.course.grading import protocol


def on_ranks(function: Callable, ranks: int, seconds: float = 20.0) -> list:
    """function(rank) on `ranks` processes; the results by rank, as plain values.

    Units: seconds for all of it.
    Raises: RuntimeError that names the rank which raised, died or did not end in time.
    """
    context = multiprocessing.get_context("fork")
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        try:
            for rank in range(ranks):
                ours, theirs = socket.socketpair()
                process = context.Process(target=_one_rank, args=(function, rank, ranks, folder, theirs, ours, seconds))
                process.start()
                theirs.close()
                ends.append(ours)
                processes.append(process)
            return [_result(rank, end, deadline) for rank, end in enumerate(ends)]
        finally:
            for process in processes:
                process.kill()
                process.join()
            for end in ends:
                end.close()


def _one_rank(function, rank, ranks, folder, channel, other_end, seconds) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    other_end.close()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        store = dist.FileStore(f"{folder}/store", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
        store.set(f"connected/{rank}", "")
        store.wait([f"connected/{other}" for other in range(ranks)])  # who fails at once must not break others' connecting
        message = {"result": function(rank)}
        dist.barrier()  # nobody leaves while another still needs it
    except BaseException as error:
        message = {"raised": f"{type(error).__name__}: {error}"[:2000], "unimplemented": isinstance(error, NotImplementedError)}
    try:
        protocol.send(channel, message)
    except TypeError as error:
        protocol.send(channel, {"raised": f"TypeError: {error}", "unimplemented": False})
    os._exit(0)


def _result(rank: int, end: socket.socket, deadline: float):
    try:
        message = protocol.receive(end, max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        raise RuntimeError(f"rank {rank} did not end in time; it may wait for a message that nobody sends") from None
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if message.get("unimplemented"):
        raise NotImplementedError
    if "raised" in message:
        raise RuntimeError(f"rank {rank} raised {message['raised']}")
    return message["result"]
