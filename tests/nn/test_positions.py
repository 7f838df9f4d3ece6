import torch

from minillm.nn.positions import rotary_frequencies, rotary_turns, rotate


def turns(positions, head_size, theta=10_000.0):
    return rotary_turns(positions, rotary_frequencies(head_size, theta))


def test_the_complex_and_the_real_path_agree():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 10)
    table = turns(torch.arange(7)[None], 10)
    # float64 takes the real path, float32 the complex one; float32 rounding is all that differs
    torch.testing.assert_close(rotate(x, table).double(), rotate(x.double(), table), rtol=1e-5, atol=1e-6)


def test_the_dot_product_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at_q, at_k):
        return (rotate(q, turns(torch.tensor([[at_q]]), 16)) * rotate(k, turns(torch.tensor([[at_k]]), 16))).sum()

    # angles are float32: at position 1,000 they carry an error of about 6e-5 radians
    torch.testing.assert_close(score(5, 2), score(1005, 1002), rtol=1e-3, atol=1e-3)
    assert abs(score(5, 2) - score(5, 4)) > 0.01


def test_first_pair_turns_one_radian_a_token():
    x = torch.tensor([[[[1.0, 0.0]]]])
    turned = rotate(x, turns(torch.tensor([[3]]), 2))
    expected = torch.tensor([torch.cos(torch.tensor(3.0)), torch.sin(torch.tensor(3.0))])
    torch.testing.assert_close(turned[0, 0, 0], expected, rtol=1e-6, atol=1e-6)  # float32 rounding
