import math

import pytest
import torch
from answers import MODEL, PLAN, TEMPLATE, TOKENIZER, pairs

from minillm.align.dpo import dpo, preference_loss, with_reference
from minillm.align.pairs import pair_batch
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.model.transformer import Transformer


def test_by_hand():
    policy, reference = torch.tensor([[-1.0, -5.0]]), torch.tensor([[-2.0, -3.0]])  # h = 1 - (-2) = 3
    assert preference_loss(policy, reference, 0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)
    assert preference_loss(policy, reference, 0.5, "ipo").item() == pytest.approx((3 - 1) ** 2)
    assert preference_loss(policy, policy).item() == pytest.approx(math.log(2))  # where training begins


def test_losses_are_trls_and_gradients_those_of_finite_differences():
    """trl's DPOTrainer, sigmoid and ipo, written out: logits are the policy's log-ratio minus the reference's."""
    policy, reference = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    theirs = {"dpo": -torch.log(torch.sigmoid(0.3 * logits)), "ipo": (logits - 1 / (2 * 0.3)) ** 2}
    for kind, wanted in theirs.items():
        torch.testing.assert_close(preference_loss(policy, reference, 0.3, kind), wanted, rtol=1e-9, atol=0)  # float64
        assert torch.autograd.gradcheck(lambda x: preference_loss(x, reference, 0.3, kind), policy.clone().requires_grad_())


def test_the_gradient_is_the_papers():
    """arXiv:2305.18290 §4: -beta · sigmoid(-beta · h) · (∇ chosen - ∇ rejected)."""
    policy = torch.tensor([[-1.0, -5.0]], requires_grad=True)
    preference_loss(policy, torch.tensor([[-2.0, -3.0]]), 0.5).sum().backward()
    weight = 0.5 / (1 + math.exp(1.5))
    assert policy.grad.tolist()[0] == pytest.approx([-weight, weight], rel=1e-6)


def test_log_probabilities_are_sums_over_the_answer_alone():
    model, batch = Transformer(MODEL, seed=2), pair_batch(TEMPLATE, TOKENIZER, pairs(3))
    found = with_reference(model, batch).reference
    for ids, targets, total in zip(batch.ids, batch.targets, found, strict=True):
        with torch.no_grad():
            log_probs = model(ids[None])[0].log_softmax(-1)
        wanted = sum(log_probs[t, targets[t]] for t in range(len(ids)) if targets[t] != IGNORED)
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)  # float32


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_training_begins_at_the_reference_and_learns_the_preferences(kind):
    model = Transformer(MODEL, seed=2)
    batch = with_reference(model, pair_batch(TEMPLATE, TOKENIZER, pairs(16, beta=math.inf)))
    engine = Engine(model, PLAN, loss=dpo(0.1, kind))
    first = engine.forward_backward(batch).item()
    assert first == pytest.approx(math.log(2) if kind == "dpo" else 25.0, rel=1e-5)
    for _ in range(25):
        engine.clip(1.0)
        engine.step()
        last = engine.forward_backward(batch).item()
    gain = (with_reference(model, batch).reference - batch.reference).view(-1, 2)
    assert last < first / 3 and (gain[:, 0] > gain[:, 1]).all()
