import socket

import pytest
import torch

from minillm.parallel.channel import HEADER, Channel, pack, unpack


def test_messages_arrive_whole_however_they_are_cut():
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    data = b"".join(len(body).to_bytes(HEADER, "big") + body for body in (pack(("a", 1)), pack((torch.arange(3),))))
    received = []
    for byte in data:
        ours.sendall(bytes([byte]))
        received += channel.receive()
    assert received[0] == ("a", 1) and received[1][0].tolist() == [0, 1, 2]
    Channel(ours).send("b")
    Channel(ours).send("c")
    assert channel.receive() == [("b",), ("c",)]
    ours.close()
    with pytest.raises(EOFError):
        channel.receive()


def test_functions_keep_the_names_of_their_files():
    """Some versions of cloudpickle drop them, and with them the lines of every traceback."""
    namespace = {}
    exec(compile("def f():\n    return lambda: 1", "/a/cell.py", "exec"), namespace)
    copy = unpack(pack(namespace["f"]))
    assert copy()() == 1 and copy.__code__.co_filename == copy().__code__.co_filename == "/a/cell.py"
