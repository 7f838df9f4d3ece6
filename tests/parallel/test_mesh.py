from itertools import product

import pytest
import torch
import torch.distributed as dist

from minillm.config import ParallelConfig
from minillm.parallel.launch import launch
from minillm.parallel.mesh import AXES, build_mesh, groups, layout, seat, who_sits_where


def test_the_published_example_of_16_gpus():
    """Megatron-LM's: 8 tensor groups, 4 pipeline groups and 8 data groups."""
    assert groups(16, tp=2, pp=4, dp=2) == {
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
        "pp": [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
        "dp": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]}


@pytest.mark.parametrize("degrees", [dict(tp=2), dict(pp=3, tp=2), dict(tp=2, cp=2, ep=3, pp=2), dict(dp=12), dict(cp=4)])
def test_every_axis_covers_the_world_once_and_crosses_the_others_once(degrees):
    world = 24
    degrees = {"dp": world // torch.tensor(list(degrees.values())).prod().item(), **degrees} if "dp" not in degrees else {"dp": 12, "tp": 2}
    lines = groups(world, **degrees)
    assert list(lines) == [axis for axis in AXES if axis in degrees]
    for axis, of_axis in lines.items():
        assert sorted(rank for line in of_axis for rank in line) == list(range(world))
        assert {len(line) for line in of_axis} == {degrees[axis]}
    for a, b in product(lines, lines):
        assert a == b or all(len(set(one) & set(other)) <= 1 for one in lines[a] for other in lines[b])


def test_seats_number_the_grid_with_the_tensor_axis_fastest():
    sizes = layout(24, tp=2, cp=3, pp=2)
    assert sizes == {"pp": 2, "dp": 2, "cp": 3, "tp": 2}
    seats = [seat(rank, 24, tp=2, cp=3, pp=2) for rank in range(24)]
    assert [tuple(place.values()) for place in seats] == list(product(*map(range, sizes.values())))


def test_who_sits_where():
    assert who_sits_where(4, tp=2) == ("rank   data (dp)     tensor (tp)\n"
                                       "0      0 in [0, 2]   0 in [0, 1]\n"
                                       "1      0 in [1, 3]   1 in [0, 1]\n"
                                       "2      1 in [0, 2]   0 in [2, 3]\n"
                                       "3      1 in [1, 3]   1 in [2, 3]")


@pytest.mark.parametrize("world, degrees, message", [
    (6, dict(tp=4), "tp = 4 makes 4 ranks, which do not fill a world of 6. Nearest worlds that work: 4 or 8."),
    (3, dict(tp=4), "Nearest worlds that work: 4."),
    (8, dict(tp=2, dp=2), "tp = 2 · dp = 2 makes 4 ranks, which do not fill a world of 8. "
                          "Nearest that work: a world of 4, or tp = 4, or dp = 4."),
    (8, dict(tp=3, dp=2), "a world of 6, or tp = 4."),
    (0, dict(), "world of 0"), (4, dict(tp=0), "tp = 0: every axis needs at least 1 rank"), (4, dict(zp=2), "no axis is called 'zp'")])
def test_degrees_that_do_not_fill_the_world(world, degrees, message):
    with pytest.raises(ValueError) as error:
        groups(world, **degrees)
    assert message in str(error.value)


def test_a_rank_outside():
    with pytest.raises(ValueError, match="rank = 4: a world of 4 has the ranks 0 to 3"):
        seat(4, 4)


def in_a_world(me):
    mesh = build_mesh(tp=2, pp=2, cp=1, device=me.device.type)
    sums = {}
    for axis in mesh.mesh_dim_names:
        number = torch.tensor([2.0 ** me.rank], device=me.device)
        dist.all_reduce(number, group=mesh[axis].get_group())
        sums[axis] = int(number)
    return sums, {axis: mesh.get_local_rank(axis) for axis in mesh.mesh_dim_names}


def test_torchs_groups_are_those_of_the_pure_function(backend):
    results = launch(in_a_world, 4, backend=backend)
    lines = groups(4, tp=2, pp=2, cp=1)
    for rank, (sums, place) in enumerate(results):
        assert place == seat(rank, 4, tp=2, pp=2, cp=1)
        assert sums == {axis: sum(2 ** other for line in lines[axis] if rank in line for other in line) for axis in lines}


def test_a_mesh_from_the_configuration():
    def names(me):
        mesh = build_mesh(ParallelConfig(dp=2))
        return mesh.mesh_dim_names, mesh.size()
    assert launch(names, 2) == [(("pp", "dp", "tp"), 2)] * 2
    with pytest.raises(RuntimeError, match="a mesh needs a world of ranks"):
        build_mesh(dp=2)
