import torch
from torch import nn

from minillm.train.live_bytes import LiveBytes


def test_it_counts_what_is_alive_and_remembers_the_peak():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        before.add_(1)  # made before, so not counted
        a = torch.zeros(100)
        view = a[:50]
        assert live.now == 400
        b = a + 1.0
        del a
        assert live.now == 800  # the view keeps it
        del view
        assert live.now == 400 and live.peak == 800
        live.peak = 0
        b.mul_(2)
        assert live.peak == 400


def test_it_sees_what_backward_keeps():
    with LiveBytes() as live:
        layer = nn.Linear(8, 8, bias=False)
        x = torch.zeros(4, 8)
        weights = live.now
        assert weights == 4 * (64 + 32)
        layer(x).sum().backward()
        assert live.now == weights + 4 * 64  # the gradient; the output and its graph are gone
