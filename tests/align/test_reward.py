import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from answers import ACCUMULATED, MODEL, PLAN, TEMPLATE, TOKENIZER, pairs

from minillm.align.pairs import Groups, pair_batch
from minillm.align.reward import (Scorer, final_scores, load_scorer, preference_accuracy, ranking_loss, reward_loss, save_scorer,
                                   scores_of)
from minillm.align.sft import RowLoader, pad_rows
from minillm.data.instructions import in_a_sentence
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.model.families import preset
from minillm.model.huggingface import CheckpointError, save_pretrained
from minillm.model.transformer import Transformer
from minillm.text.chat import Rendered


def test_the_loss_by_hand():
    assert ranking_loss(torch.zeros(1, 2)).tolist() == pytest.approx([math.log(2)])
    found = ranking_loss(torch.tensor([[2.0, 1.0, -1.0]]))  # gaps 1, 3, 2
    assert found.item() == pytest.approx(sum(math.log(1 + math.exp(-gap)) for gap in (1, 3, 2)) / 3, rel=1e-6)
    with pytest.raises(ValueError, match="1 answer to a prompt"):
        ranking_loss(torch.zeros(3, 1))


def test_the_loss_is_trls_for_pairs_and_its_gradient_that_of_finite_differences():
    """trl's RewardTrainer: -logsigmoid(rewards_chosen - rewards_rejected).mean(), written out; test_trl.py asks TRL itself."""
    rewards = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    theirs = -torch.log(1 / (1 + torch.exp(-(rewards[:, 0] - rewards[:, 1])))).mean()
    torch.testing.assert_close(ranking_loss(rewards).mean(), theirs, rtol=1e-12, atol=0)  # float64
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x.view(3, 4)), rewards)


def scorer():
    """With a head that is not zero, so that something can be seen."""
    made = Scorer.of(Transformer(MODEL, seed=2))
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(1))
    return made


def test_a_scorer_copies_the_body_and_begins_at_zero():
    model = Transformer(replace(MODEL, tied=True), seed=2)
    made, batch = Scorer.of(model), pair_batch(TEMPLATE, TOKENIZER, pairs(3))
    assert (scores_of(made, batch) == 0).all() and made.head.weight.shape == (1, 32)
    for name, weight in model.state_dict().items():
        if name != "head.weight":
            assert torch.equal(made.state_dict()[name], weight)
    assert made.embed.weight.data_ptr() != model.embed.weight.data_ptr()


def test_the_score_is_read_where_the_answers_end_token_was_read():
    model, batch = scorer(), pair_batch(TEMPLATE, TOKENIZER, pairs(4))
    end, answer = TOKENIZER.special_tokens["<|end|>"], TOKENIZER.special_tokens["<|assistant|>"]
    found = scores_of(model, batch)
    for row, score in zip(batch.ids.tolist(), found, strict=True):
        place = row.index(end, row.index(answer))
        alone = model(torch.tensor([row[:place + 1]]))[0, -1, 0]  # no padding, and nothing after the end
        torch.testing.assert_close(score, alone, rtol=1e-4, atol=1e-5)  # float32, other sizes of matrices
    assert final_scores(torch.ones(8, batch.ids.shape[1], 1), batch).tolist() == [1.0] * 8


def test_the_preferred_answer_comes_first():
    some = pairs(3)
    batch = pair_batch(TEMPLATE, TOKENIZER, some)
    said = [TOKENIZER.decode([id for id in row if id != IGNORED]) for row in batch.targets.tolist()]
    for pair, better, worse in zip(some, said[::2], said[1::2], strict=True):
        assert better.startswith(pair.chosen) and worse.startswith(pair.rejected) and better != worse


def test_the_best_must_beat_all_others():
    """Scores of the last tokens: 3 answers to each of 3 prompts."""
    class Given(Scorer):
        def forward(self, ids, **_):
            return torch.tensor([3.0, 2.0, 1.0, 2.0, 3.0, 1.0, 2.0, 2.0, 1.0]).view(9, 1, 1).expand(9, ids.shape[1], 1)
    rows = pad_rows([Rendered([5, 6, 7], [False, True, True])] * 9)
    assert preference_accuracy(Given(MODEL), Groups(**vars(rows), group=3)) == pytest.approx(1 / 3)  # not where it is equal


def test_batches_are_of_whole_groups():
    rows = pad_rows([Rendered([number, 1, 2], [False, True, True]) for number in range(12)])
    loader = RowLoader(Groups(**vars(rows)), 4, group=2, seed=0)
    epoch = [next(loader).ids[:, 0].view(2, 2).tolist() for _ in range(3)]
    groups = [group for batch in epoch for group in batch]
    assert sorted(groups) == [[n, n + 1] for n in range(0, 12, 2)] and groups != sorted(groups)


def test_pairs_stay_together_in_microbatches_and_shares():
    batch = pair_batch(TEMPLATE, TOKENIZER, pairs(5))
    assert batch.count == 5 and [len(part.ids) for part in batch.split(4)] == [4, 4, 2]
    assert [batch.part(rank, 4).count for rank in range(4)] == [2, 1, 1, 1]
    assert torch.equal(torch.cat([batch.part(rank, 4).ids for rank in range(4)]), batch.ids)
    with pytest.raises(ValueError, match="microbatches of 3 rows would cut groups of 2"):
        batch.split(3)


def test_accumulated_gradients_are_those_of_the_whole():
    batch, found = pair_batch(TEMPLATE, TOKENIZER, pairs(4)), []
    for plan in (PLAN, ACCUMULATED):
        engine = Engine(scorer().double(), plan, loss=reward_loss)
        found.append((engine.forward_backward(batch).item(), [weight.grad for weight in engine.weights.values()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)  # added up in float32
    for whole, parts in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)  # float64, another order of summation
    with torch.no_grad():
        wanted = ranking_loss(scores_of(scorer(), batch).view(4, 2)).mean()
        assert found[0][0] == pytest.approx(wanted.item(), rel=1e-4)  # float32


def test_it_learns_which_answers_are_preferred_and_is_right_about_new_ones():
    """Only a number against the same number in a sentence: a model this small learns style in seconds, and no arithmetic.

    The rule prefers the number, and one label of eight is noise, in training as in the new pairs.
    """
    def styles(count, seed, split):
        return [pair for pair in pairs(8 * count, seed, split)
                if in_a_sentence(pair.chosen) == pair.rejected or in_a_sentence(pair.rejected) == pair.chosen][:count]

    batch, new = (pair_batch(TEMPLATE, TOKENIZER, styles(*which)) for which in ((160, 0, "train"), (160, 1, "test")))
    model = Scorer.of(Transformer(MODEL, seed=2))
    engine = Engine(model, PLAN, loss=reward_loss)
    assert preference_accuracy(model, new) == 0.0 and engine.evaluate(new) / new.count == pytest.approx(math.log(2), rel=1e-5)
    for step in range(40):
        engine.forward_backward(batch.take(torch.arange(32) + 32 * (step % 10)))
        engine.clip(1.0)
        engine.step()
    best = sum(pair.probability > 0.5 for pair in styles(160, 1, "test")) / 160  # what knowing the rule would give
    assert 0.8 < best < 0.95
    assert preference_accuracy(model, new) == pytest.approx(best, abs=0.02)  # three pairs of 160


@pytest.mark.parametrize("name", ["first", "gpt2"])
def test_files_are_those_of_hugging_faces_classifiers(name, tmp_path):
    scorer = Scorer.of(Transformer(preset(name, vocab_size=262, layers=2, width=32, heads=2, context=96), seed=3))
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    save_scorer(scorer, tmp_path)
    ids = torch.randint(0, 262, (3, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_scorer(tmp_path)(ids), scorer(ids))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    scores = torch.cat([theirs(row[None]).logits for row in ids])  # row by row: without a padding token they read the last
    torch.testing.assert_close(scores, scorer(ids)[:, -1], rtol=1e-4, atol=1e-5)  # float32


def test_a_language_model_is_no_reward_model(tmp_path):
    save_pretrained(Transformer(MODEL, seed=1), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no score.weight, and a reward model's is \(1, 32\): it is a language model"):
        load_scorer(tmp_path)
