"""Losses and gradients of TRL's own trainers, on the same tensors: SFT, reward, DPO, GRPO and Dr. GRPO.

PPO's losses stand in the middle of TRL's training loop and cannot be called; test_ppo.py has its formulas. IPO differs on
purpose (align/dpo.py).
"""

import json
import logging

import pytest
import torch
from answers import MODEL, PLAN, TEMPLATE, TOKENIZER, pairs

from minillm.align.dpo import dpo, with_reference
from minillm.align.grpo import PolicyBatch, grpo
from minillm.align.pairs import Groups, pair_batch
from minillm.align.reward import Scorer, reward_loss, save_scorer
from minillm.align.rollout import log_probs_of, sample
from minillm.align.sft import pad_rows
from minillm.data.instructions import instructions
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.model.huggingface import save_pretrained
from minillm.model.transformer import Transformer
from minillm.text.chat import render

trl = pytest.importorskip("trl", reason="TRL is not here: pip install trl (the test extra brings it)")
transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
END = TOKENIZER.special_tokens["<|end|>"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Their tokenizer, which trainers want to have and these tests never ask."""
    folder = tmp_path_factory.mktemp("words")
    TOKENIZER.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.eos_token, made.pad_token = "<|end|>", "<|pad|>"
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def theirs(model, folder, kind=None):
    (save_scorer if isinstance(model, Scorer) else save_pretrained)(model, folder)
    return (kind or transformers.AutoModelForCausalLM).from_pretrained(folder)


def config(kind, folder, **options):
    return kind(output_dir=str(folder / "out"), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False, **options)


def compared(ours, batch, model, loss, tied="model.embed_tokens.weight"):
    """Our engine's loss and gradient of the embedding, beside theirs."""
    found = ours.forward_backward(batch)
    loss.backward()
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)  # float32: the same sums in another order
    wanted = dict(model.named_parameters())[tied].grad
    assert wanted.abs().max() > 1e-4
    atol = 3e-5 * float(wanted.abs().max())  # float32: sums of many terms as large as the largest, in another order
    torch.testing.assert_close(ours.weights["embed.weight"].grad, wanted, rtol=1e-3, atol=atol)


def test_sft(words, tmp_path):
    asked = instructions(0, "train", ["sum"])
    batch = pad_rows([render(TEMPLATE, TOKENIZER, next(asked).messages) for _ in range(6)])
    model, mine = theirs(Transformer(MODEL, seed=1), tmp_path), Engine(Transformer(MODEL, seed=1), PLAN)
    data = datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}])
    trainer = trl.SFTTrainer(model, config(trl.SFTConfig, tmp_path), train_dataset=data, processing_class=words)
    labels = torch.cat((torch.full((6, 1), -100), batch.targets), 1)
    ids = torch.cat((batch.ids, torch.zeros(6, 1, dtype=torch.long)), 1)
    compared(mine, batch, model, trainer.compute_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}))


def split(batch: Groups):
    """Their order, all chosen ones and then the rejected, each row up to its answer's last token; with both masks."""
    order = torch.arange(len(batch.ids)).view(-1, 2).T.flatten()
    ids, targets = batch.ids[order], batch.targets[order]
    learned = torch.cat((torch.zeros(len(ids), 1, dtype=torch.bool), (targets != IGNORED)[:, :-1]), 1)
    places = torch.arange(ids.shape[1])
    real = places <= (learned * places).amax(1, keepdim=True)
    return torch.where(real, ids, TOKENIZER.special_tokens["<|pad|>"]), real.long(), learned.long()


def test_reward(words, tmp_path):
    scorer = Scorer.of(Transformer(MODEL, seed=1))
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    batch = pair_batch(TEMPLATE, TOKENIZER, pairs(5))
    model = theirs(scorer, tmp_path, transformers.AutoModelForSequenceClassification)
    model.config.pad_token_id = words.pad_token_id
    data = datasets.Dataset.from_list([{"chosen_ids": [1, 2], "rejected_ids": [1, 3], "chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3]}])
    trainer = trl.RewardTrainer(model, config(trl.RewardConfig, tmp_path), train_dataset=data, processing_class=words)
    ids, real, _ = split(batch)
    compared(Engine(scorer, PLAN, loss=reward_loss), batch, model, trainer.compute_loss(model, {"input_ids": ids, "attention_mask": real}))


def test_dpo(words, tmp_path):
    reference, policy = Transformer(MODEL, seed=2), Transformer(MODEL, seed=1)
    batch = pair_batch(TEMPLATE, TOKENIZER, pairs(5))
    model = theirs(policy, tmp_path / "policy")
    data = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(model, theirs(reference, tmp_path / "reference"), config(trl.DPOConfig, tmp_path, beta=0.3), train_dataset=data,
                             processing_class=words)
    ids, real, learned = split(batch)
    loss = trainer.compute_loss(model, {"input_ids": ids, "attention_mask": real, "completion_mask": learned})
    compared(Engine(policy, PLAN, loss=dpo(0.3)), with_reference(reference, batch), model, loss)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_grpo(kind, words, tmp_path):
    """After some steps, so that ratios are off 1; one is clipped."""
    old, reference, policy = (Transformer(MODEL, seed=seed) for seed in (1, 2, 1))
    with torch.no_grad():
        policy.blocks[0].ffn.down.weight.add_(2 * torch.randn(policy.blocks[0].ffn.down.weight.shape, generator=torch.Generator().manual_seed(0)))
    prompts = [[5, 6, 7, 8]] * 6  # of one length: they pad prompts on the left
    made = sample(old, prompts, 8, range(40), generator=torch.Generator().manual_seed(1))
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2, 0.3, -0.3])
    batch = PolicyBatch(**vars(made.batch), old=made.log_probs, reference=log_probs_of(reference, made.batch), advantages=advantages)
    model = theirs(policy, tmp_path / "policy")
    data = datasets.Dataset.from_list([{"prompt": "a"}] * 8)
    options = config(trl.GRPOConfig, tmp_path, beta=0.07, epsilon=0.2, loss_type=kind, num_generations=2, per_device_train_batch_size=2,
                     max_completion_length=12, use_bias_correction_kl=False)  # the paper's KL: theirs multiplies it by the ratio
    trainer = trl.GRPOTrainer(model, lambda **_: [0.0], args=options, train_dataset=data, processing_class=words)
    trainer.current_gradient_accumulation_steps = 1
    width = batch.ids.shape[1] - 4
    written = (batch.targets != IGNORED)[:, 3:3 + width]
    inputs = {"prompt_ids": batch.ids[:, :4], "prompt_mask": torch.ones(6, 4, dtype=torch.long), "completion_ids": batch.ids[:, 4:],
              "completion_mask": written.long(), "advantages": advantages, "old_per_token_logps": batch.old[:, 3:3 + width],
              "ref_per_token_logps": batch.reference[:, 3:3 + width], "num_items_in_batch": written.sum()}
    ratios = torch.exp(log_probs_of(policy, batch) - batch.old)[batch.targets != IGNORED]
    assert (ratios > 1.2).any() and (ratios < 0.8).any() and len({len(answer) for answer in made.answers}) > 1
    mine = Engine(policy, PLAN, loss=grpo(0.2, 0.07, length=12 if kind == "dr_grpo" else None))
    compared(mine, batch, model, trainer.compute_loss(model, inputs))
