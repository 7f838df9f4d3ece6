import torch

from minillm.nn import masks


def test_each_reason_on_small_numbers():
    assert masks.causal(2, 4)[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert masks.prefix(3, 3, 2)[0, 0].tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert masks.padding(torch.tensor([[False, True]])).tolist() == [[[[False, True]]]]
    apart = masks.documents(torch.tensor([[0, 0, 1]]))[0, 0]
    assert apart.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_nothing_but_causality_needs_no_mask():
    assert masks.combine(4, 4) is None


def test_a_query_that_sees_nothing_sees_itself():
    mask = masks.combine(3, 3, padding_mask=torch.tensor([[False, True, True]]))[0, 0]
    assert mask.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_reasons_combine():
    mask = masks.combine(4, 4, segment_ids=torch.tensor([[0, 0, 1, 1]]), prefix_len=2,
                         padding_mask=torch.tensor([[True, True, True, True]]))[0, 0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    by_row = masks.combine(2, 2, prefix_len=torch.tensor([0, 2]))
    assert by_row[0, 0].int().tolist() == [[1, 0], [1, 1]] and by_row[1, 0].all()
