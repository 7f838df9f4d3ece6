from dataclasses import replace

import pytest
import torch
from answers import MODEL, PLAN

from minillm.align.ppo import policy_loss
from minillm.align.rollout import log_probs_of, sample
from minillm.align.sft import pack, pad_rows
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.infer.generate import generate
from minillm.infer.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.text.chat import Rendered
from minillm.train.loss import token_log_probs

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7]]


@pytest.fixture(scope="module")
def model():
    """With weights large enough that its distribution is far from flat."""
    made = Transformer(replace(MODEL, tied=False), seed=2)
    torch.nn.init.normal_(made.head.weight, std=0.4, generator=torch.Generator().manual_seed(1))
    return made


def rollouts(model, stop_ids=(), seed=0, **options):
    return sample(model, PROMPTS, 12, stop_ids, generator=torch.Generator().manual_seed(seed), **options)


def test_rows_are_prompts_and_answers(model):
    found = rollouts(model)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, found.answers, strict=True)):
        assert found.batch.ids[row, :len(prompt) + 12].tolist() == prompt + answer
        targets = found.batch.targets[row]
        assert targets[targets != IGNORED].tolist() == answer and targets[len(prompt) - 1] == answer[0]
    assert found.finished == [False] * 4 and (found.log_probs[found.batch.targets == IGNORED] == 0).all()


def test_log_probabilities_are_those_of_the_sampler(model):
    """Token by token, without padding, cache or other rows."""
    found = rollouts(model)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, found.answers, strict=True)):
        for n, token in enumerate(answer):
            with torch.no_grad():
                wanted = model(torch.tensor([prompt + answer[:n]]))[0, -1].log_softmax(-1)[token]
            torch.testing.assert_close(found.log_probs[row, len(prompt) - 1 + n], wanted, rtol=1e-4, atol=1e-4)  # float32


def test_log_probabilities_are_exactly_those_of_the_training_forward(model):
    """So the first ratio of PPO is 1, and not nearly 1."""
    found, seen = rollouts(model), []

    def loss(logits, batch):
        log_probs = token_log_probs(logits, batch.targets)
        seen.append(log_probs.detach())
        return policy_loss(log_probs, found.log_probs, torch.ones_like(log_probs)).sum()

    Engine(model, PLAN, loss=loss).forward_backward(found.batch)
    assert torch.equal(seen[0], found.log_probs) and torch.equal(log_probs_of(model, found.batch), found.log_probs)


def test_answers_end_at_the_first_stop_token(model):
    plain = rollouts(model).answers
    stop = plain[0][3]
    for prompt, answer, free, finished, targets in zip(PROMPTS, *(lambda r: (r.answers, plain, r.finished, r.batch.targets))(
            rollouts(model, [stop])), strict=True):
        place = free.index(stop) if stop in free else 12
        assert answer == free[:place] and finished == (stop in free)
        assert targets[targets != IGNORED].tolist() == free[:place + 1]  # the stop token is learned too


def test_an_answer_that_stops_at_its_last_token_is_finished(model):
    stop = rollouts(model).answers[0][11]
    found = rollouts(model, [stop])
    full = [row for row, targets in enumerate(found.batch.targets) if int((targets != IGNORED).sum()) == 12]
    assert 0 in full and [found.finished[row] for row in full] == [rollouts(model).answers[row][11] == stop for row in full]


def test_log_probabilities_in_packed_rows_are_those_of_each_alone(model):
    rows = [Rendered(list(range(5, 5 + size)), [False] * 2 + [True] * (size - 2)) for size in (4, 7, 5)]
    packed = pack(rows, 16)
    assert len(packed.ids) == 1
    found = log_probs_of(model, packed)[0]
    for row, segment in ((1, 0), (2, 1), (0, 2)):  # the longest first
        alone = log_probs_of(model, pad_rows([rows[row]]))[0, :-1]
        torch.testing.assert_close(found[packed.segment_ids[0] == segment], alone, rtol=1e-4, atol=1e-5)  # float32, other sizes of matrices


def test_greedy_answers_are_those_of_generate(model):
    for prompt, answer in zip(PROMPTS, rollouts(model, greedy=True).answers, strict=True):
        assert generate(model, torch.tensor([prompt]), 12, sampling=Sampling(temperature=0.0))[0].tolist() == prompt + answer
    assert rollouts(model).answers == rollouts(model).answers != rollouts(model, seed=1).answers


def test_samples_follow_the_models_distribution(model):
    """The first token of 2,000 answers to one prompt."""
    found = sample(model, [[5, 6, 7]] * 2_000, 1, (), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 6, 7]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([answer[0] for answer in found.answers]), minlength=len(wanted))
    error = (wanted * (1 - wanted) / 2_000).sqrt()
    assert ((counts / 2_000 - wanted).abs() < 5 * error + 1e-3).all()  # five standard errors


def test_no_prompt():
    with pytest.raises(ValueError, match="2 prompts, 1 of them empty"):
        sample(Transformer(MODEL), [[1], []], 4, ())
