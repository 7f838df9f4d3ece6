import pytest
import torch
from transformers import (LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

from minillm.infer.sampling import Sampling, choose, keep_min_p, keep_top_k, keep_top_p, penalise_repetition

LOGITS = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
SEEN = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ours, theirs", [
    (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
    (lambda x: keep_top_k(x, 500), TopKLogitsWarper(500)),
    (lambda x: keep_top_p(x, 0.7), TopPLogitsWarper(0.7)),
    (lambda x: keep_top_p(x, 0.05), TopPLogitsWarper(0.05)),
    (lambda x: keep_min_p(x, 0.1), MinPLogitsWarper(0.1)),
    (lambda x: penalise_repetition(x, SEEN, 1.7), RepetitionPenaltyLogitsProcessor(1.7)),
])
def test_filters_equal_hugging_faces(ours, theirs):
    assert torch.equal(ours(LOGITS), theirs(SEEN, LOGITS.clone()))


def test_all_together_in_their_order():
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.8),
                                 TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)])
    probabilities = chain(SEEN, LOGITS.clone()).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    assert torch.equal(choose(LOGITS, sampling, SEEN, torch.Generator().manual_seed(3)), expected)


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_top_p(logits, 0.75).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(logits, 0.85).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_p(logits, 1e-9).isfinite().tolist() == [[True, False, False, False]]


def test_temperature_zero_is_greedy_and_sampling_follows_the_distribution():
    assert torch.equal(choose(LOGITS, Sampling(temperature=0), SEEN), LOGITS.argmax(-1))
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(20_000, 3)
    drawn = choose(logits, Sampling(), torch.zeros(20_000, 1, dtype=torch.long), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    # the standard error of a share is at most √(0.25 / 20,000) = 0.0035; four of them
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.014)


@pytest.mark.parametrize("values", [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5),
                                    dict(min_p=-0.1), dict(repetition_penalty=0.0)])
def test_meaningless_values_are_refused(values):
    (name, value), = values.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Sampling(**values)
