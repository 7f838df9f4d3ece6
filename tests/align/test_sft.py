import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm.align.sft import ConversationLoader, pack, pad_rows
from minillm.config import TrainConfig
from minillm.data.loader import IGNORED
from minillm.engine import Engine
from minillm.model.families import preset
from minillm.model.huggingface import save_pretrained
from minillm.model.transformer import Transformer
from minillm.text.chat import Rendered
from minillm.train.metrics import read_metrics
from minillm.trainer import Trainer

TINY = preset("first", vocab_size=60, layers=2, width=16, heads=2, context=24)
PLAN = TrainConfig(steps=4, batch_size=4, warmup_steps=1, eval_every=2, checkpoint_every=2, device="cpu")


def conversations(count, seed=0, longest=20):
    """Random ids; the second half of each, at least, is an answer with a question in it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = draw.randint(4, longest)
        learned = [n > size // 2 and n % 5 != 0 or n == size - 1 for n in range(size)]
        rows.append(Rendered([draw.randrange(60) for _ in range(size)], learned))
    return rows


def test_by_hand():
    batch = pack([Rendered([1, 2, 3], [False, True, True]), Rendered([4, 5, 6, 7], [False, False, True, False])], 6, pad=9)
    assert batch.ids.tolist() == [[4, 5, 6, 1, 2, 9]]
    assert batch.targets.tolist() == [[IGNORED, 6, IGNORED, 2, 3, IGNORED]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]] and batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2]]


def test_padded_rows_by_hand():
    """Every id is read, the last one too."""
    batch = pad_rows([Rendered([1, 2, 3], [False, True, True]), Rendered([4, 5], [False, True])], pad=9)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 5, 9]] and batch.targets.tolist() == [[2, 3, IGNORED], [5, IGNORED, IGNORED]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 0]] and batch.segment_ids.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_every_conversation_is_whole_and_there_once(seed):
    rows = conversations(200, seed)
    batch = pack(rows, 24)
    found = []
    for ids, targets, segments in zip(batch.ids, batch.targets, batch.segment_ids, strict=True):
        for segment in range(int(segments[-1]) + 1):
            found.append((ids[segments == segment].tolist(), targets[segments == segment].tolist()))
    wanted = [(row.ids[:-1], [i if learned else IGNORED for i, learned in zip(row.ids[1:], row.learned[1:])]) for row in rows]
    assert sorted(pair for pair in found if set(pair[0]) - {0} or set(pair[1]) - {IGNORED}) == sorted(wanted)
    fewest = -(-sum(len(row.ids) - 1 for row in rows) // 24)
    assert len(batch.ids) <= fewest * 11 / 9 + 1  # Cost


def test_packed_conversations_do_not_see_one_another():
    rows = conversations(12)
    engine = Engine(Transformer(TINY, seed=1).double(), PLAN)
    packed, alone = pack(rows, 24), pad_rows(rows)
    assert len(packed.ids) < len(alone.ids) == 12 and packed.count == alone.count
    seen = []
    for batch in (packed, alone):
        loss = engine.forward_backward(batch)
        seen.append([loss.double(), *(weight.grad.clone() for weight in engine.weights.values())])
        engine.optimizer.zero_grad()
    for ours, wanted in zip(*seen, strict=True):  # float64: only the order of summation differs; the loss is added in float32
        torch.testing.assert_close(ours, wanted, rtol=1e-6 if ours.dim() == 0 else 1e-9, atol=1e-12)


def test_loss_and_gradients_equal_hugging_faces(tmp_path):
    """The mean over the tokens whose label is not -100, which is the loss of TRL's SFTTrainer too, over a whole batch."""
    model = Transformer(TINY, seed=1)
    save_pretrained(model, tmp_path)
    theirs, rows = AutoModelForCausalLM.from_pretrained(tmp_path), conversations(9)
    longest = max(len(row.ids) for row in rows)
    ids, labels, mask = torch.zeros(9, longest, dtype=torch.long), torch.full((9, longest), -100), torch.zeros(9, longest)
    for number, (tokens, learned) in enumerate(rows):
        ids[number, :len(tokens)], mask[number, :len(tokens)] = torch.tensor(tokens), 1
        labels[number, :len(tokens)] = torch.where(torch.tensor(learned), torch.tensor(tokens), -100)
    wanted = theirs(ids, attention_mask=mask.long(), labels=labels)
    wanted.loss.backward()
    engine = Engine(model, TrainConfig(batch_size=4, microbatch_size=2, device="cpu"))
    assert float(engine.forward_backward(pack(rows, 24))) == pytest.approx(wanted.loss.item(), rel=1e-5)  # float32, other order
    torch.testing.assert_close(engine.weights["embed.weight"].grad, theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)


def test_ranks_side_by_side_are_one_rank():
    rows = conversations(60)
    whole = ConversationLoader(rows, 4, 24, seed=3)
    parts = [ConversationLoader(rows, 4, 24, seed=3, rank=rank, ranks=2) for rank in range(2)]
    for _ in range(3 * whole.batches_per_epoch):
        wanted, batches = next(whole), [next(loader) for loader in parts]
        for name in ("ids", "targets", "positions", "segment_ids"):
            assert torch.equal(getattr(wanted, name), torch.cat([getattr(batch, name) for batch in batches]))


def test_the_trainer_drives_it_and_resumes_to_the_same_losses(tmp_path):
    def job(run):
        loader = ConversationLoader(conversations(60), 4, 24)
        return Trainer(Engine(TINY, PLAN), loader, pack(conversations(20, 5), 24).split(4), tmp_path / run)

    assert job("whole").train()
    again = job("whole")
    again.run = tmp_path / "again"
    assert again.train(resume=tmp_path / "whole" / "step-000002")
    whole, later = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "again"))
    assert [r["loss"] for r in whole if r["step"] > 2 and "loss" in r] == [r["loss"] for r in later if "loss" in r]
    last = [r for r in whole if "val_loss" in r][-1]
    assert last["val_tokens"] == pack(conversations(20, 5), 24).count and "val_bits_per_byte" not in last


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="conversation 1 has 26 tokens, which do not fit a context of 24"):
        pack([*conversations(1), Rendered([1] * 26, [True] * 26)], 24)
    with pytest.raises(ValueError, match="conversation 0 has no answer"):
        pack([Rendered([1, 2], [True, False])], 24)
    with pytest.raises(ValueError, match="2 rows of 24 are fewer than one batch of 4"):
        ConversationLoader([Rendered([1] * 25, [True] * 25)] * 2, 4, 24)
    with pytest.raises(ValueError, match="4 does not divide over 3 ranks"):
        ConversationLoader(conversations(60), 4, 24, ranks=3)
