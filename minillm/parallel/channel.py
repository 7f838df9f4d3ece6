"""Messages between a program and the processes of its ranks: a length, then a pickled tuple, over a local socket.

Functions and classes of a notebook cell or a script travel by value, those of an importable module by name. Both ends
are processes of one user on one machine, started by one another; nothing from outside is ever unpickled here.
"""

import io
import socket
import threading
import types
from collections import ChainMap

import cloudpickle

HEADER = 8  # bytes that hold the length


def pack(value) -> bytes:
    """Pickle by cloudpickle, with the file names of code kept, which cloudpickle drops: tracebacks need them."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def unpack(data: bytes):
    """The value that `pack` packed."""
    return cloudpickle.loads(data)


def _code(rebuild, arguments: tuple, file: str) -> types.CodeType:
    return rebuild(*arguments).replace(co_filename=file)


def _reduce_code(code: types.CodeType) -> tuple:
    return _code, (*cloudpickle.Pickler.dispatch_table[types.CodeType](code), code.co_filename)


class _Pickler(cloudpickle.Pickler):
    dispatch_table = ChainMap({types.CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


class Channel:
    """One end of a socket that carries tuples. `send` may be called from several threads."""

    def __init__(self, end: socket.socket):
        self.socket = end
        self._sending = threading.Lock()
        self._received = bytearray()

    def fileno(self) -> int:
        """The file descriptor, so that a selector can wait for this channel."""
        return self.socket.fileno()

    def send(self, *message) -> None:
        """Send one tuple. Raises: OSError if the other end is gone, and what pickling raises."""
        data = pack(message)
        with self._sending:
            self.socket.sendall(len(data).to_bytes(HEADER, "big"))
            self.socket.sendall(data)

    def receive(self) -> list[tuple]:
        """Wait for bytes, and return the messages that they complete: perhaps none yet.

        Raises: EOFError when the other end is gone.
        """
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        messages = []
        while len(self._received) >= HEADER:
            end = HEADER + int.from_bytes(self._received[:HEADER], "big")
            if len(self._received) < end:
                break
            messages.append(unpack(bytes(self._received[HEADER:end])))
            del self._received[:end]
        return messages
