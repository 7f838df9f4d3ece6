import torch

from minillm.config import TrainConfig
from minillm.train.adafactor import Adafactor
from minillm.train.build import build_optimizer


def run(build):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((12, 30), (7, 5), (9,))]
    optimizer = build(weights)
    for scale in (1.0, 10.0, 0.1, 1.0, 50.0, 1.0):  # some updates are clipped, some not
        for weight in weights:
            weight.grad = scale * torch.randn_like(weight)
        optimizer.step()
    return torch.cat([w.detach().flatten() for w in weights]), optimizer


def test_adafactor_equals_torchs():
    ours, _ = run(lambda w: Adafactor([{"params": w, "weight_decay": 0.2}], lr=0.02))
    theirs, _ = run(lambda w: torch.optim.Adafactor(w, lr=0.02, weight_decay=0.2))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # float64: sums in another order


def test_its_state_is_a_row_and_a_column():
    _, optimizer = run(lambda w: build_optimizer([(f"blocks.{i}.weight", p) for i, p in enumerate(w)],
                                                 TrainConfig(optimizer="adafactor", lr=0.02)))
    sizes = [sum(v.numel() for k, v in optimizer.state[p].items() if k != "step")
             for group in optimizer.param_groups for p in group["params"]]
    assert sizes == [12 + 30, 7 + 5, 9]


def test_a_matrix_of_rank_one_is_estimated_exactly():
    """Squares that are a row times a column lose nothing: the first step is the sign of the gradient, scaled."""
    grad = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 0.5])).double()
    weight = torch.nn.Parameter(torch.full((3, 2), 2.0, dtype=torch.float64))
    weight.grad = grad
    Adafactor([weight], lr=0.01).step()
    torch.testing.assert_close(weight.detach(), 2 - 0.01 * 2 * grad.sign(), rtol=1e-12, atol=0)  # float64
