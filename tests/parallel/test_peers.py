import pytest
import torch

from minillm.parallel.collectives import Traffic
from minillm.parallel.launch import launch
from minillm.parallel.peers import ALONE, Peers, peers_of, simulate


def _meet(peers: Peers) -> tuple[int, int, list[float], list[list[int]]]:
    mine = torch.full((4,), float(peers.rank))
    return peers.rank, peers.size, peers.mean(mine).tolist(), peers.gather(torch.tensor([peers.rank, 7])).tolist()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_threads_and_ranks_meet_alike(workers):
    expected = [(rank, workers, [(workers - 1) / 2] * 4, [[other, 7] for other in range(workers)]) for rank in range(workers)]
    assert simulate(_meet, workers) == expected
    if workers > 1:
        assert launch(lambda me: _meet(peers_of(me.group)), workers) == expected
    else:
        assert _meet(ALONE) == expected[0]


def test_what_ranks_send_is_counted():
    def count(me) -> tuple[int, int]:
        traffic = Traffic()
        _meet(peers_of(me.group, traffic))
        return traffic.messages, traffic.bytes

    assert launch(count, 2) == [(3, 16 + 16)] * 2  # on a ring of two: an all-reduce sends 2 halves of 16 bytes, a gather its 16


def test_a_worker_that_fails_ends_all():
    def fail(peers: Peers) -> None:
        if peers.rank == 1:
            raise KeyError("worker 1")
        peers.mean(torch.ones(2))

    with pytest.raises(KeyError, match="worker 1"):
        simulate(fail, 3)


def test_a_worker_that_leaves_early():
    with pytest.raises(RuntimeError, match=r"workers \[0\] returned while others still waited"):
        simulate(lambda peers: peers.rank == 0 or peers.mean(torch.ones(2)), 3)
    with pytest.raises(ValueError, match="workers = 0"):
        simulate(_meet, 0)
