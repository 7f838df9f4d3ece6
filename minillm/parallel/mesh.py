"""Where each rank sits: a grid with one axis per kind of parallelism, and a process group along each line of it.

Ranks are numbered with the tensor axis fastest, then context, expert and data, and the pipeline slowest, as Megatron-LM
does: neighbours in number share a machine and its fast links, and tensor parallelism talks most. Source:
arXiv:1909.08053 and arXiv:2104.04473; the order is that of Megatron-LM's initialize_model_parallel ("tp-cp-ep-dp-pp").
`groups` and `who_sits_where` need no processes; `build_mesh` makes the groups of torch.distributed.
Left out: an expert layout of its own beside the dense one (here experts split the ranks that dense weights repeat on).
"""

import math
from dataclasses import asdict

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minillm.config import ParallelConfig

# Slowest first, as DeviceMesh wants them.
AXES = {"pp": "pipeline", "dp": "data", "ep": "expert", "cp": "context", "tp": "tensor"}


def layout(world: int, **degrees: int) -> dict[str, int]:
    """The size of each axis, slowest first: those given, and dp, which takes the ranks that are left if it is not given.

    Raises: ValueError for an unknown axis, a degree below 1, or degrees whose product is not the world size.
    """
    for axis, degree in degrees.items():
        if axis not in AXES:
            raise ValueError(f"no axis is called {axis!r}: choose from {', '.join(AXES)}.")
        if degree < 1:
            raise ValueError(f"{axis} = {degree}: every axis needs at least 1 rank.")
    product, written = math.prod(degrees.values()), " · ".join(f"{axis} = {degree}" for axis, degree in degrees.items())
    if world < 1 or world % product or ("dp" in degrees and world != product):
        raise ValueError(f"{written or 'No axis'} makes {product} ranks, which do not fill a world of {world}. "
                         f"{_nearest(world, product, degrees)}")
    sizes = {"dp": world // product, **degrees}
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def groups(world: int, **degrees: int) -> dict[str, list[list[int]]]:
    """Per axis, its groups, each a list of ranks: who talks to whom along that axis. Arguments as of `layout`.

    groups(16, tp=2, dp=2, pp=4) gives the tensor groups [0, 1], [2, 3] ..., the data groups [0, 2], [1, 3], [4, 6] ...
    and the pipeline groups [0, 4, 8, 12], [1, 5, 9, 13] ..., which Megatron-LM publishes for 16 GPUs.
    """
    sizes, lines, stride = layout(world, **degrees), {}, world
    for axis, size in sizes.items():
        stride //= size  # how far apart in number neighbours along this axis are
        starts = [rank for rank in range(world) if rank // stride % size == 0]
        lines[axis] = [[start + stride * step for step in range(size)] for start in starts]
    return lines


def seat(rank: int, world: int, **degrees: int) -> dict[str, int]:
    """The coordinates of one rank, slowest axis first. Raises: ValueError for a rank outside the world."""
    if not 0 <= rank < world:
        raise ValueError(f"rank = {rank}: a world of {world} has the ranks 0 to {world - 1}.")
    return {axis: next(line for line in lines if rank in line).index(rank)
            for axis, lines in groups(world, **degrees).items()}


def who_sits_where(world: int, **degrees: int) -> str:
    """A table: a line per rank with its coordinates, and behind each the ranks of its group along that axis."""
    lines = groups(world, **degrees)
    rows = [["rank", *(f"{AXES[axis]} ({axis})" for axis in lines)]]
    for rank, place in ((rank, seat(rank, world, **degrees)) for rank in range(world)):
        mine = {axis: next(line for line in lines[axis] if rank in line) for axis in lines}
        rows.append([str(rank), *(f"{place[axis]} in {mine[axis]}" for axis in lines)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def build_mesh(parallel: ParallelConfig | None = None, *, device: str = "cpu", **degrees: int) -> DeviceMesh:
    """The mesh of this world, to be called by every rank: mesh["tp"].get_group() is this rank's group along an axis.

    Either a ParallelConfig or degrees by name; axes that are named exist also at size 1. device: "cuda" for NCCL.
    Raises: ValueError for degrees that do not fill the world; RuntimeError outside one.
    """
    if not dist.is_initialized():
        raise RuntimeError("a mesh needs a world of ranks: call this inside a function that launch or torchrun runs.")
    if parallel is not None:
        degrees = {axis: degree for axis, degree in asdict(parallel).items() if axis in AXES}
    sizes = layout(dist.get_world_size(), **degrees)
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _nearest(world: int, product: int, degrees: dict[str, int]) -> str:
    """What would work: other world sizes, or another size of each axis that leaves the others as they are."""
    if "dp" not in degrees:
        below = world // product * product
        return f"Nearest worlds that work: {f'{below} or ' if below else ''}{below + product}."
    ways = [f"{axis} = {world // (product // degree)}" for axis, degree in degrees.items()
            if world % (product // degree) == 0 and world >= product // degree]
    return f"Nearest that work: a world of {product}{''.join(f', or {way}' for way in ways)}."
