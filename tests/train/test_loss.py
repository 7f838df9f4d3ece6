import math

import torch

from minillm.train.loss import bits_per_byte, cross_entropy


def test_cross_entropy_on_numbers_one_can_check():
    logits = torch.tensor([[[math.log(0.5), math.log(0.25), math.log(0.25)]] * 3])
    loss = cross_entropy(logits, torch.tensor([[0, 1, -100]]))
    torch.testing.assert_close(loss, torch.tensor(math.log(2) + math.log(4)))


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(2, 200, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 200, dtype=torch.long)
    torch.testing.assert_close(cross_entropy(logits, targets), cross_entropy(logits.float(), targets), rtol=0, atol=0)


def test_bits_per_byte_of_uniform_bytes_is_eight():
    assert math.isclose(bits_per_byte(1000 * math.log(256), 1000), 8.0)
