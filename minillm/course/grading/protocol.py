"""Values as bytes: what goes between the grader and the process that runs a student's code.

JSON for the structure, raw bytes for tensors, never pickle: reading an answer builds numbers, strings and plain tensors,
and runs nothing. Tuples arrive as lists and every kind of dict as a dict, so answers compare by value. This file also
runs inside the sandbox, so it imports no other file of minillm, and torch only if somebody else did.
"""

import json
import math
import socket
import struct
import sys
import time

FRAME_BYTES = 64 << 20
JSON_BYTES = 8 << 20
MAP_ENTRIES = 20_000  # more of them, made to collide, would keep the reader of a dict busy for minutes
DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "int64": 8, "int32": 4, "int16": 2,
          "int8": 1, "uint8": 1, "bool": 1}


class ProtocolError(Exception):
    """Bytes that no honest worker sends."""


def encode(value) -> bytes:
    """A value as bytes. Raises: TypeError for what is neither plain data nor a tensor."""
    buffers: list[bytes] = []
    head = json.dumps([_tree(value, buffers), [len(b) for b in buffers]]).encode()
    if len(head) > JSON_BYTES or len(head) + sum(map(len, buffers)) > FRAME_BYTES - 4:
        raise TypeError(f"the value is too large to be sent: more than {JSON_BYTES >> 20} MB of numbers and words, or "
                        f"{FRAME_BYTES >> 20} MB of tensors")
    return struct.pack(">I", len(head)) + head + b"".join(buffers)


def _tree(value, buffers: list[bytes]):
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, list | tuple):
        return [_tree(v, buffers) for v in value]
    if isinstance(value, dict):
        return {"map": [[_tree(k, buffers), _tree(v, buffers)] for k, v in value.items()]}
    if isinstance(value, set | frozenset):
        return {"set": [_tree(v, buffers) for v in value]}
    if isinstance(value, bytes | bytearray):
        buffers.append(bytes(value))
        return {"bytes": len(buffers) - 1}
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch and isinstance(value, torch.Tensor):
        value = value.detach().to("cpu").contiguous()
        dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        data = bytes(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else b""
    elif numpy and isinstance(value, numpy.generic):
        return _tree(value.item(), buffers)
    elif numpy and isinstance(value, numpy.ndarray):
        dtype, shape, data = str(value.dtype), list(value.shape), value.tobytes()
    else:
        raise TypeError(f"a value of type {type(value).__name__}; expected numbers, strings, lists, dicts or tensors")
    if dtype not in DTYPES:
        raise TypeError(f"a tensor of dtype {dtype}; expected one of {', '.join(DTYPES)}")
    buffers.append(data)
    return {"tensor": len(buffers) - 1, "dtype": dtype, "shape": shape}


def decode(data: bytes):
    """The value of some bytes. Raises: ProtocolError for anything but what `encode` makes."""
    try:
        (head,) = struct.unpack_from(">I", data)
        if head > JSON_BYTES or 4 + head > len(data):
            raise ProtocolError(f"a head of {head:,} bytes")
        tree, sizes = json.loads(data[4:4 + head])
        buffers, at = [], 4 + head
        for size in sizes:
            if not isinstance(size, int) or not 0 <= size <= len(data) - at:
                raise ProtocolError(f"a buffer of {size} bytes")
            buffers.append(data[at:at + size])
            at += size
        if at != len(data):
            raise ProtocolError(f"{len(data) - at:,} bytes too many")
        return _value(tree, buffers)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, struct.error, RuntimeError) as error:
        raise ProtocolError(f"{type(error).__name__}: {str(error)[:200]}") from None


def _value(node, buffers: list[bytes]):
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, list):
        return [_value(v, buffers) for v in node]
    kind = next(iter(node), "")
    if kind == "int":
        return int(node["int"], 16)
    if kind == "map":
        return dict([(_key(_value(k, buffers)), _value(v, buffers)) for k, v in _few(node["map"])])
    if kind == "set":
        return {_key(_value(v, buffers)) for v in _few(node["set"])}
    if kind == "bytes":
        return _buffer(buffers, node["bytes"])
    if kind == "tensor":
        return _tensor(node["dtype"], node["shape"], _buffer(buffers, node["tensor"]))
    raise ProtocolError(f"a value of kind {kind[:20]!r}")


def _few(entries: list) -> list:
    if len(entries) > MAP_ENTRIES:
        raise ProtocolError(f"a dict or set of {len(entries):,} entries; at most {MAP_ENTRIES:,} are read")
    return entries


def _key(key):
    """Keys are hashed, so lists in them become tuples again."""
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _buffer(buffers: list[bytes], number: int) -> bytes:
    if not 0 <= number < len(buffers):
        raise ProtocolError(f"buffer {number} of {len(buffers)}")
    return buffers[number]


def _tensor(dtype: str, shape: list, data: bytes):
    import torch
    if dtype not in DTYPES or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise ProtocolError(f"a tensor of dtype {dtype!r:.30} and shape {str(shape)[:80]}")
    if math.prod(shape) * DTYPES[dtype] != len(data):
        raise ProtocolError(f"a tensor of shape {shape} and {len(data)} bytes")
    if dtype == "bool":  # any byte but 0 and 1 is no bool
        return _tensor("uint8", shape, data) != 0
    if not data:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape)


def send(channel: socket.socket, value, seconds: float | None = None) -> None:
    """Send a value in one frame. Raises: TimeoutError, OSError when the other side is gone, TypeError from `encode`."""
    channel.settimeout(seconds)
    data = encode(value)
    channel.sendall(struct.pack(">Q", len(data)) + data)


def receive(channel: socket.socket, seconds: float | None = None):
    """The next value. Raises: TimeoutError, EOFError when the other side is gone, ProtocolError."""
    deadline = None if seconds is None else time.monotonic() + seconds
    (size,) = struct.unpack(">Q", _read(channel, 8, deadline))
    if not 4 <= size <= FRAME_BYTES:
        raise ProtocolError(f"a frame of {size:,} bytes")
    return decode(_read(channel, size, deadline))


def _read(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            channel.settimeout(left)
        try:
            part = channel.recv(min(size - len(data), 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            raise EOFError("the worker closed its end")
        data += part
    return bytes(data)
