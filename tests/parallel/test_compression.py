import numpy as np
import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from minillm.parallel.collectives import Traffic
from minillm.parallel.compression import (
    EightBit, PowerSGD, TopK, dequantise, largest, orthogonalise, power_step, quantise, spread)
from minillm.parallel.launch import launch
from minillm.parallel.peers import ALONE, Peers, peers_of, simulate

F64 = torch.float64


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_the_largest_entries_are_a_contraction(k):
    """arXiv:1809.07599, definition 2.1: what is left has at most 1 - k/N of the squared norm; just that where all are equal."""
    for x in (_random(30, seed=k), torch.ones(30, dtype=F64)):
        kept = spread(*largest(x, k), 30)
        assert (x - kept).square().sum() <= (1 - k / 30) * x.square().sum() * (1 + 1e-12)  # float rounding
    x = _random(30, seed=k)
    least = sorted(map(abs, x.tolist()))[-k]
    assert torch.equal(spread(*largest(x, k), 30), torch.tensor([v if abs(v) >= least else 0 for v in x.tolist()], dtype=F64))
    with pytest.raises(ValueError, match="k = 31 of 30 entries"):
        largest(x, 31)


def test_columns_at_right_angles():
    matrix = _random(20, 4)
    q = orthogonalise(matrix)
    # float64 rounding of a few operations; the span is the same when projecting on it changes nothing
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(q @ (q.T @ matrix), matrix, rtol=1e-12, atol=1e-12)
    again = orthogonalise(torch.cat([matrix[:, :2], matrix[:, :1] + matrix[:, 1:2], matrix[:, 2:]], dim=1))
    assert not again[:, 2].any() and again.isfinite().all()  # the third adds nothing to the first two
    assert not orthogonalise(torch.zeros(5, 2)).any()


def test_the_power_method_finds_the_nearest_matrix_of_low_rank():
    """Eckart and Young: no matrix of rank 2 is nearer than the two largest singular values' part."""
    u, _, vt = torch.linalg.svd(_random(12, 8), full_matrices=False)
    s = torch.tensor([8, 4, 1, 0.5, 0.4, 0.3, 0.2, 0.1], dtype=F64)
    q, matrix = _random(8, 2, seed=1), u * s @ vt
    for _ in range(30):  # each step shrinks the rest by (1/4)²: 30 are more than float64 holds
        p, q = power_step(matrix, q, ALONE)
    torch.testing.assert_close(p @ q.T, u[:, :2] * s[:2] @ vt[:2], rtol=1e-10, atol=1e-10)


def test_low_rank_of_the_mean_that_nobody_holds():
    """Both products are linear, so the workers together find what one worker with the mean matrix finds."""
    matrices, q = _random(3, 9, 5), _random(5, 2, seed=1)
    alone = power_step(matrices.mean(0), q, ALONE)
    for together in simulate(lambda peers: power_step(matrices[peers.rank], q, peers), 3):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)  # float64, another order of sums


def test_a_matrix_of_that_rank_is_exact():
    gradient = _random(9, 2) @ _random(2, 7, seed=1)
    torch.testing.assert_close(PowerSGD(2).average(gradient, ALONE), gradient, rtol=1e-10, atol=1e-10)  # float64 rounding


def test_eight_bits_are_right_in_the_mean():
    """arXiv:1610.02132, lemma 3.1: unbiased. A draw is off by less than a scale, its standard deviation at most half of one."""
    x, draws, block = _random(50), 4000, 16
    generator = torch.Generator().manual_seed(0)
    rounded = torch.stack([dequantise(*quantise(x, block, generator), block) for _ in range(draws)])
    scales = (torch.nn.functional.pad(x, (0, 14)).view(4, 16).abs().amax(1) / 127).repeat_interleave(16)[:50]
    assert ((rounded - x).abs() < scales * (1 + 1e-9)).all()
    assert ((rounded.mean(0) - x).abs() < 5 * 0.5 * scales / draws ** 0.5).all()  # five standard deviations
    assert rounded.std(0).max() > 0  # and it does draw


def test_eight_bits_by_hand():
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantise(torch.tensor([0.0, 254.0, -127.0, 0.0, 0.0]), 3, generator)
    assert codes[[0, 1, 3, 4]].tolist() == [0, 127, 0, 0] and codes[2] in (-64, -63) and scales.tolist() == [2.0, 0.0]
    assert dequantise(codes, scales, 3)[1] == 254 and len(codes) == 5
    with pytest.raises(ValueError, match="block = 0"):
        quantise(torch.ones(3), 0, generator)


@pytest.mark.parametrize(("make", "sent"), [
    (lambda: TopK(5), 5 * (8 + 4)), (lambda: PowerSGD(2), (12 + 7) * 2 * 8), (lambda: EightBit(torch.Generator(), 10), 84 + 9 * 8),
    (lambda: PowerSGD(9), 12 * 7 * 8)])  # rank 9 of 12 x 7 would not be smaller: sent whole
def test_bytes(make, sent):
    """The Cost lines: what a worker gives to the collectives, counted where it is given."""
    given = []

    def count(x: torch.Tensor) -> torch.Tensor:
        given.append(x.numel() * x.element_size())
        return x

    scheme, peers = make(), Peers(0, 1, mean=count, gather=lambda x: count(x)[None])
    for step in (1, 2):
        scheme.average(_random(12, 7, seed=step), peers)
        assert scheme.sent == sum(given) == step * sent


def test_vectors_are_averaged_whole_by_powersgd():
    gradient = _random(3, 6)
    for mean in simulate(lambda peers: PowerSGD(1).average(gradient[peers.rank], peers), 3):
        torch.testing.assert_close(mean, gradient.mean(0))


def test_what_error_feedback_keeps_is_what_was_not_sent():
    """Nothing is lost: all that was sent and the errors at the end add up to all gradients (arXiv:1901.09847)."""
    gradients = _random(6, 3, 12, 8)

    def run(peers: Peers, make) -> tuple[torch.Tensor, torch.Tensor]:
        scheme = make()
        return sum(scheme.average(step[peers.rank], peers) for step in gradients), scheme.error.view(12, 8)

    for make in (lambda: TopK(9), lambda: PowerSGD(1), lambda: PowerSGD(2, warm=False)):
        averages, errors = zip(*simulate(run, 3, make))
        assert torch.equal(averages[0], averages[1]) and torch.equal(averages[0], averages[2])
        # float64: sums in another order
        torch.testing.assert_close(averages[0] + torch.stack(errors).mean(0), gradients.sum(0).mean(0), rtol=1e-12, atol=1e-12)


def test_top_k_with_feedback_against_a_dense_version_by_hand():
    gradients = _random(5, 2, 20)
    memory, expected = torch.zeros(2, 20, dtype=F64), []
    for step in gradients:
        memory = memory + step
        sent = memory * (memory.abs() >= memory.abs().sort(dim=1, descending=True).values[:, 3:4])  # four of each worker
        memory = memory - sent
        expected.append(sent.mean(0))

    def run(peers: Peers) -> list[torch.Tensor]:
        scheme = TopK(4)
        return [scheme.average(step[peers.rank], peers) for step in gradients]

    for worker in simulate(run, 2):
        torch.testing.assert_close(worker, expected, rtol=1e-12, atol=1e-12)  # float64, another order of sums


def test_top_1_on_three_workers_diverges_as_published_and_feedback_mends_it():
    """arXiv:2002.12410, example 1: from (1, 1, 1) every step of top-1 multiplies by 1 + 11·lr/6; all losses are convex."""
    rows = torch.tensor([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=F64)

    def descend(peers: Peers, feedback: bool, lr: float, steps: int) -> torch.Tensor:
        scheme, w, a = TopK(1, feedback), torch.ones(3, dtype=F64), rows[peers.rank]
        for _ in range(steps):
            w = w - lr * scheme.average(2 * (a @ w) * a + w / 2, peers)  # of <a, w>² + |w|²/4
        return w

    for w in simulate(descend, 3, False, 0.05, 20):
        assert w.tolist() == pytest.approx([(1 + 11 * 0.05 / 6) ** 20] * 3)  # float64 rounding only
    assert simulate(descend, 3, True, 0.05, 600)[0].norm() < 1e-3


def _least_squares(peers: Peers, make, lr: float, steps: int) -> float:
    """Workers whose data each pull another way. Returns the loss above the best possible."""
    data = _random(peers.size, 40, 60)
    wanted = _random(peers.size, 40, 30, seed=1) + torch.arange(peers.size)[:, None, None]
    best = torch.linalg.lstsq(data.flatten(0, 1), wanted.flatten(0, 1)).solution
    mine, target, scheme = data[peers.rank], wanted[peers.rank], make(peers.rank)
    w = torch.zeros(60, 30, dtype=F64)
    for _ in range(steps):
        gradient = 2 / 40 * mine.T @ (mine @ w - target)
        w = w - lr * (scheme.average(gradient, peers) if scheme else peers.mean(gradient))
    return float((data @ w - wanted).square().mean() - (data @ best - wanted).square().mean())


def test_feedback_recovers_and_without_it_small_messages_stall():
    """Loss above the best possible after 300 steps, 1.7 at the start. Measured: averaged whole and in 8 bits 0.0010; one entry
    in twenty 0.026, without feedback 1.18; rank 1 of 30 0.0009, without feedback 0.21."""
    def run(make) -> float:
        return simulate(_least_squares, 4, make, 0.02, 300)[0]

    assert run(lambda rank: None) < 0.002 and run(lambda rank: EightBit(torch.Generator().manual_seed(rank))) < 0.002
    assert run(lambda rank: TopK(90)) < 0.08 and run(lambda rank: TopK(90, feedback=False)) > 0.8
    assert run(lambda rank: PowerSGD(1)) < 0.002 and run(lambda rank: PowerSGD(1, feedback=False)) > 0.05


def _hooked(me, rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor], int, int]:
    """Three steps of torch's hook behind DDP, after the two that it leaves whole, and three of ours from the same Q."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(10, 12, bias=False).double())
    state = PowerSGDState(me.group, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=1)
    model.register_comm_hook(state, powerSGD_hook)
    inputs = _random(5, me.size, 6, 10)
    theirs, ours, traffic = [], [], Traffic()
    scheme, peers = PowerSGD(rank), peers_of(me.group, traffic)
    for step, x in enumerate(inputs[:, me.rank]):
        if step >= 2:
            gradient, = torch.autograd.grad(model.module(x).square().sum(), model.module.parameters())
            if step == 2:
                scheme.q = _torchs_first_q(rank)
            ours.append(scheme.average(gradient, peers))
        model(x).square().sum().backward()
        theirs.append(model.module.weight.grad.clone())
        model.zero_grad()
    return theirs[2:], ours, scheme.sent, traffic.bytes


def _torchs_first_q(rank: int) -> torch.Tensor:
    """What the hook draws first: a whole number of numpy's, from seed 0, seeds torch's generator."""
    seed = int(np.random.RandomState(0).randint(1_000_000_000))
    return torch.randn(1, 10, rank, generator=torch.Generator().manual_seed(seed), dtype=F64)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, torch's hook waits for it, also with tensors on "
                                                      "the CPU, and raises")
@pytest.mark.parametrize("rank", [1, 3])
def test_powersgd_is_torchs_hook_on_two_ranks(rank):
    for theirs, ours, sent, travelled in launch(_hooked, 2, rank):
        assert len(ours) == 3
        # float64: the same products in another order; the hook also makes Q orthogonal first, which changes no span
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        # On a ring each of 2 ranks sends 2(P-1)/P = 1 times what it gives: 22·rank numbers instead of 120
        assert sent == travelled == 3 * (10 + 12) * rank * 8


def _all_schemes(peers: Peers, gradients: torch.Tensor) -> list[torch.Tensor]:
    schemes = (TopK(6), PowerSGD(1), EightBit(torch.Generator().manual_seed(peers.rank), 16))
    return [scheme.average(step, peers) for step in gradients[:, peers.rank] for scheme in schemes]


def test_ranks_and_threads_agree():
    gradients = _random(3, 2, 8, 9)
    ranks = launch(lambda me: _all_schemes(peers_of(me.group), gradients), 2)
    for result in (*ranks[1:], *simulate(_all_schemes, 2, gradients)):
        torch.testing.assert_close(result, ranks[0], rtol=1e-12, atol=1e-12)  # float64, another order of sums
