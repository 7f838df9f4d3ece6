"""When gradients travel: buckets beside backward, by the α-β model of network.py.

Backward is taken to fill gradients at an even rate, from the last to the first, and sending to take nothing from it.
Each bucket is an all-reduce round a ring, and starts when it is full and the one before it has arrived. On real GPUs the
sending takes some of the processors and of the memory's bandwidth, so backward is slower than alone.
"""

import math
from dataclasses import dataclass

from minillm.plan.network import Link, predict


@dataclass(frozen=True)
class Sending:
    """One bucket: bytes, and seconds since backward began."""

    size: float
    ready: float
    start: float
    end: float


def overlapped(backward: float, size: float, bucket: float, ranks: int, link: Link) -> list[Sending]:
    """Buckets that leave while backward runs. backward: its seconds; size: bytes of all gradients; bucket: of each bucket.

    The last bucket has what is left over. The step ends at the last one's end.
    Raises: ValueError for sizes or times that are not above 0.
    """
    if not (backward > 0 and size > 0 and bucket > 0):
        raise ValueError(f"backward = {backward} s, size = {size} bytes, bucket = {bucket} bytes: all must be above 0.")
    count, sendings, free = math.ceil(size / bucket), [], 0.0
    for number in range(count):
        last = number == count - 1
        part = size - number * bucket if last else bucket
        ready = backward if last else backward * (number + 1) * bucket / size
        start = max(ready, free)
        free = start + predict("ring_all_reduce", part, ranks, link)
        sendings.append(Sending(part, ready, start, free))
    return sendings


def one_after_another(backward: float, size: float, bucket: float, ranks: int, link: Link) -> list[Sending]:
    """The same buckets when the first may leave only after backward."""
    sendings, free = [], backward
    for sending in overlapped(backward, size, bucket, ranks, link):
        start, free = free, free + sending.end - sending.start
        sendings.append(Sending(sending.size, sending.ready, start, free))
    return sendings
