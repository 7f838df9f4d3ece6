import pytest
import torch

from minillm.nn.attention import attend, attend_by_hand
from minillm.nn.masks import combine


@pytest.mark.parametrize("heads, groups", [(6, 6), (6, 3), (6, 1)])
@pytest.mark.parametrize("queries, keys", [(7, 7), (1, 7), (3, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_and_the_formula_agree(heads, groups, queries, keys, masked):
    torch.manual_seed(0)
    q = torch.randn(2, heads, queries, 10, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, keys, 10, dtype=torch.float64)
    real = torch.ones(2, keys, dtype=torch.bool)
    real[0, :2] = False
    mask = combine(queries, keys, padding_mask=real) if masked else None
    expected, weights = attend_by_hand(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)  # float64 rounding
    # weights are softmax's: rows sum to one, and nothing ahead of a query is seen
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights[:, :, 0, keys - queries + 1:].any()


def test_scores_are_divided_by_root_d():
    q, k = torch.zeros(2, 1, 1, 2, 16)
    q[..., 0], k[..., 1, 0] = 4.0, 2.0  # scores of the second query: 0 and 8, divided by 4: 0 and 2
    v = torch.zeros(1, 1, 2, 16)
    _, weights = attend_by_hand(q, k, v)
    torch.testing.assert_close(weights[0, 0, 1], torch.tensor([0.0, 2.0]).softmax(0))
