import torch

from minillm.config import ModelConfig
from minillm.nn.positions import alibi, alibi_slopes, buckets, rotary_frequencies, rotary_turns, rotate, stretch, two_axes, waves


def turns(positions, head_size, **fields):
    return rotary_turns(positions[..., None], ModelConfig(width=4 * head_size, head_dim=head_size, **fields))


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


def test_a_part_of_each_head_can_stay_as_it_is():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 2, 10)
    out = rotate(x, turns(torch.arange(5)[None], 10, rope_dim=4))
    assert torch.equal(out[..., 4:], x[..., 4:]) and not torch.equal(out[:, 1:, :, :4], x[:, 1:, :, :4])


# Published: ALiBi's paper gives 1/2, 1/4, ..., 1/256 for 8 heads; for 12 it takes those of 8 and every other one of 16.
def test_published_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    assert torch.allclose(alibi_slopes(12), torch.tensor([2.0 ** -i for i in range(1, 9)] + [2.0 ** -i for i in (0.5, 1.5, 2.5, 3.5)]))
    assert torch.allclose(alibi_slopes(1), torch.tensor([2.0 ** -8]))


def test_alibi_is_minus_slope_times_distance():
    bias = alibi(torch.tensor([[4, 5]]), torch.arange(6)[None], 2)
    assert bias.shape == (1, 2, 2, 6)
    assert bias[0, 0, 1, 2].item() == -3 / 16 and bias[0, 1, 0, 0].item() == -4 / 256


def test_interpolation_slows_every_pair_and_ntk_only_the_slowest():
    plain = rotary_frequencies(16, 10_000.0)
    fields = dict(width=64, head_dim=16, rope_factor=4.0, context=256)
    assert torch.equal(stretch(plain, ModelConfig(rope_scaling="linear", **fields), 10_000.0), plain / 4)
    ntk = stretch(plain, ModelConfig(rope_scaling="ntk", **fields), 10_000.0)
    # float32: the last pair is slowed by the whole factor, the first not at all
    torch.testing.assert_close(ntk[[0, -1]], plain[[0, -1]] / torch.tensor([1.0, 4.0]))
    for kind in ("yarn", "llama3"):
        out = stretch(plain, ModelConfig(rope_scaling=kind, rope_slow=1.0, rope_fast=4.0, **fields), 10_000.0)
        assert out[0] == plain[0] and torch.isclose(out[-1], plain[-1] / 4) and (out <= plain).all() and (out >= plain / 4).all()


def test_the_two_positions_of_an_answer():
    # a prompt of 3, the mask at place 2, and an answer of 3 whose place stays 2
    both = two_axes(torch.arange(6)[None], torch.tensor([[3]]), torch.tensor([[2]]))
    assert both[0].T.tolist() == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]


def test_buckets_are_those_of_t5():
    from transformers.models.t5.modeling_t5 import T5Attention
    places = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(places[None] - places[:, None], bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(buckets(places[None], places[None], 32, 128)[0], theirs)


def test_waves_start_with_one_radian_a_token():
    table = waves(torch.arange(5)[None], 6)[0]
    assert torch.allclose(table[:, 0], torch.arange(5.0).sin()) and torch.allclose(table[:, 1], torch.arange(5.0).cos())
    assert torch.allclose(table[:, 4], (torch.arange(5) * 10_000 ** (-4 / 6)).sin()) and waves(torch.arange(5)[None], 5).shape == (1, 5, 5)
