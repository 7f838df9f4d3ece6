"""When a rank of a pipeline posts which receive: messages without processes."""

from types import SimpleNamespace

import torch

from minillm.parallel import pipeline
from minillm.parallel.schedules import Action, in_order, interleaved


def test_a_rank_waits_for_a_shape_only_when_it_needs_the_stream(monkeypatch):
    asked = []

    def header(tensor, **_):
        asked.append(current)
        tensor[:4] = torch.tensor([0, 2, 3, 4])  # float32 and a shape of two dims, 3 x 4
    monkeypatch.setattr(pipeline.dist, "recv", header)
    for name in ("irecv", "isend"):
        monkeypatch.setattr(pipeline.dist, name, lambda tensor, **_: SimpleNamespace(wait=lambda: None))
    pipe = object.__new__(pipeline.Pipeline)  # rank 1 of 2, without a world
    pipe.group, pipe.rank, pipe.ranks, pipe.chunks = None, 1, 2, []
    mail = pipeline._Mail(in_order(interleaved(2, 2, 2), 4), pipe)
    for number, current in mail.mine:
        came = mail.receive(number, current)
        assert (came is None) == (current in {Action("backward", 3, 0), Action("backward", 3, 1)})  # from the loss, not by mail
        mail.send(current, torch.zeros(3, 4))
    # stage 2 makes its first stream while rank 1 still has stage 1's second microbatch to do, which must not wait for it
    assert asked == [Action("forward", 1, 0), Action("forward", 3, 0)]
