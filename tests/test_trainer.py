import errno
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from minillm.data.loader import evaluation_batches
from minillm.model.huggingface import CheckpointError, load_pretrained
from minillm.model.flops import training_flops_per_token
from minillm.train import checkpoint
from minillm.train.loss import cross_entropy
from minillm.train.metrics import read_metrics
from minillm.trainer import TrainingError
from runs import TINY, small_data, trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


def steps_of(run):
    return [(r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def test_a_run_leaves_metrics_and_checkpoints(data, tmp_path):
    looked = []
    job = trainer(data, tmp_path)
    job.at = {3: lambda model: looked.append(job.engine.steps_done) or {"sample": "text"}}
    assert job.train() is True
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 2, 3, 4, 6]
    assert looked == [3] and {"step": 3, "sample": "text"} in records
    assert [f.name for f in checkpoint.checkpoints(tmp_path)] == ["step-000004", "step-000006"]  # keep = 2
    model = load_pretrained(tmp_path / "step-000006")
    nats = sum(float(cross_entropy(model(b.ids), b.targets).detach()) for b in evaluation_batches(data.val, 3, 32))
    last = [r for r in records if "val_loss" in r][-1]
    assert last["val_tokens"] == data.val.tokens - 1
    assert last["val_loss"] == pytest.approx(nats / (data.val.tokens - 1), rel=1e-5)  # float32, other batches
    assert last["val_bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / data.val.bytes, rel=1e-5)


def test_resuming_gives_the_very_same_losses(data, tmp_path):
    trainer(data, tmp_path / "whole").train()
    first = trainer(data, tmp_path / "cut")
    first.at = {3: lambda model: first._on_signal(15, None) or {}}  # SIGTERM in the middle of the third step
    assert first.train() is False
    assert steps_of(tmp_path / "cut")[-1][0] == 3
    second = trainer(data, tmp_path / "cut")
    assert second.train(resume=checkpoint.latest_checkpoint(tmp_path / "cut")) is True
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "step-000006" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"optimizer": "adafactor"}, {"precision": "fp16"},
                                     {"precision": "bf16", "master_weights": True}], ids=str)
def test_resuming_other_optimizers_and_precisions(data, tmp_path, changes):
    trainer(data, tmp_path / "whole", **changes).train()
    trainer(data, tmp_path / "cut", **changes).train()
    again = trainer(data, tmp_path / "cut", **changes)
    assert again.train(resume=tmp_path / "cut" / "step-000004")
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "step-000006" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


def test_the_share_of_the_devices_peak_is_told(data, tmp_path):
    job = trainer(data, tmp_path)
    job.peak = 1e12
    job.train()
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    needed = training_flops_per_token(TINY, 32)
    for record in records:  # rounded to four digits after the point
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * needed / 1e12, abs=6e-5)
    assert len(records) == 6 and any(r["mfu"] > 0 for r in records)


def overflowing(job, first, last):
    """Let the gradients of these steps be infinite."""
    right = job.engine.loss
    job.engine.loss = lambda logits, batch: right(logits, batch) * (
        float("inf") if logits.requires_grad and first <= job.engine.steps_done + 1 <= last else 1.0)


def test_fp16_skips_steps_that_overflow_and_goes_on(data, tmp_path):
    job = trainer(data, tmp_path, precision="fp16")
    overflowing(job, 2, 3)
    assert job.train() is True
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if "lr" in r}
    assert [s for s, r in records.items() if r.get("skipped")] == [2, 3]
    assert [records[s]["loss_scale"] for s in range(1, 7)] == [65_536, 65_536, 32_768, 16_384, 16_384, 16_384]
    assert all(("loss" in r) == ("grad_norm" in r) == (not r.get("skipped")) for r in records.values())


def test_fp16_gives_up_when_every_step_overflows(data, tmp_path):
    job = trainer(data, tmp_path, precision="fp16", steps=40, checkpoint_every=100)
    overflowing(job, 3, 40)
    with pytest.raises(TrainingError, match=r"step 33: .*precision fp32"):
        job.train()


def test_metrics_after_the_checkpoint_are_dropped(data, tmp_path):
    job = trainer(data, tmp_path, steps=6, checkpoint_every=4)
    job.train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # what a crash leaves
    again = trainer(data, tmp_path, checkpoint_every=4)
    again.train(resume=tmp_path / "step-000004")
    assert [s for s, _ in steps_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_with_advice_and_spoils_nothing(data, tmp_path, wrong):
    job, calls = trainer(data, tmp_path), []

    def loss(logits, batch):
        calls.append(1)
        right = cross_entropy(logits, batch.targets)
        if not logits.requires_grad or job.engine.steps_done < 3:
            return right
        # the root of 0 has the gradient inf, and inf times 0 is no number, though the loss itself is one
        return right * float("nan") if wrong == "loss" else right + (logits * 0).square().sum().sqrt()

    job.engine.loss = loss
    job.at = {3: lambda model: before.update({n: t.clone() for n, t in job.engine.model.state_dict().items()}) or {}}
    before = {}
    with pytest.raises(TrainingError) as error:
        job.train()
    for words in ("step 4", "nan", f"last good checkpoint is {tmp_path / 'step-000002'}", "--train.lr", "fp32"):
        assert words in str(error.value)
    assert job.engine.steps_done == 3 and steps_of(tmp_path)[-1][0] == 3
    after = job.engine.model.state_dict()
    assert before and all(torch.equal(after[name], before[name]) for name in before)
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-000002"
    assert trainer(data, tmp_path).train(resume=tmp_path / "step-000002")


class Bar:
    """Stands for the progress bar; sends a signal when the third step is counted."""

    def __init__(self, *_, **__):
        self.counted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_postfix_str(self, text):
        pass

    def update(self, count):
        self.counted += count
        if self.counted == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("when, step", [("first look", 0), ("look", 2), ("between steps", 3), ("last look", 6)])
def test_a_signal_at_any_moment_saves_this_very_step(data, tmp_path, monkeypatch, when, step):
    trainer(data, tmp_path / "whole").train()
    job = trainer(data, tmp_path / "run", checkpoint_every=100)
    if when == "between steps":
        monkeypatch.setattr("minillm.trainer.bar", Bar)
    else:
        job.at = {step: lambda model: os.kill(os.getpid(), signal.SIGINT) or {}}
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert job.train() is (step == 6)
    assert [f.name for f in checkpoint.checkpoints(tmp_path / "run")] == [f"step-{step:06d}"]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.undo()
    assert trainer(data, tmp_path / "run").train(resume=checkpoint.latest_checkpoint(tmp_path / "run"))
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")


def test_a_second_signal_does_not_wait(data, tmp_path):
    job = trainer(data, tmp_path)
    job.at = {2: lambda model: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and {}}
    with pytest.raises(KeyboardInterrupt):
        job.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not checkpoint.checkpoints(tmp_path)


def test_only_the_newest_checkpoints_are_kept(data, tmp_path):
    trainer(data, tmp_path, checkpoint_every=1, keep=3).train()
    assert [f.name for f in checkpoint.checkpoints(tmp_path)] == [f"step-00000{step}" for step in (4, 5, 6)]


def test_an_evaluation_of_a_few_sequences_is_their_mean(data, tmp_path):
    job = trainer(data, tmp_path)
    batch = next(evaluation_batches(data.val, 4, 32))
    expected = float(cross_entropy(job.engine.model(batch.ids), batch.targets).detach()) / 128
    found = job.evaluate(4)
    # float32, the same batch: equal but for the order of summation
    assert found == {"val_loss": pytest.approx(expected, rel=1e-6), "val_tokens": 128}


def test_another_configuration_is_not_continued(data, tmp_path):
    trainer(data, tmp_path).train()
    with pytest.raises(CheckpointError, match="train.lr was 0.005 and is now 0.1"):
        trainer(data, tmp_path, lr=0.1).train(resume=tmp_path / "step-000006")
    with pytest.raises(CheckpointError, match="model.width was 16 and is now 32"):
        trainer(data, tmp_path, model=replace(TINY, width=32)).train(resume=tmp_path / "step-000006")
    assert trainer(data, tmp_path, eval_every=5, keep=3).train(resume=tmp_path / "step-000006")


def test_a_truncated_checkpoint_names_the_last_whole_one(data, tmp_path):
    trainer(data, tmp_path).train()
    weights = tmp_path / "step-000006" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError) as error:
        trainer(data, tmp_path).train(resume=tmp_path / "step-000006")
    assert f"{len(whole) - 1000:,} of {len(whole):,} bytes" in str(error.value)
    assert "--resume" in str(error.value) and "step-000004" in str(error.value)
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-000004"


def test_a_full_disk_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    job = trainer(data, tmp_path, checkpoint_every=2)
    real, calls = checkpoint.save_tensors, []

    def full(path, tensors):
        calls.append(path)
        if len(calls) == 2:  # the optimizer's file of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(CheckpointError, match="disk is full .*step-000002, untouched"):
        job.train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-000002"]
    assert checkpoint.what_is_wrong(tmp_path / "step-000002") is None
    assert not list(tmp_path.glob(".*tmp"))


def test_what_can_be_wrong_with_a_checkpoint(data, tmp_path):
    trainer(data, tmp_path).train()
    folder = tmp_path / "step-000006"
    assert checkpoint.what_is_wrong(folder) is None
    sizes = json.loads((folder / "manifest.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors", "trainer.json"} == set(sizes)
    (folder / "trainer.json").unlink()
    assert checkpoint.what_is_wrong(folder) == "trainer.json is missing"
    (folder / "manifest.json").write_text("{")
    assert checkpoint.what_is_wrong(folder) == "manifest.json is not whole"
    assert checkpoint.what_is_wrong(tmp_path / "step-9") == "the folder does not exist"


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(data, tmp_path):
    trainer(data, tmp_path, keep=3).train()
    before = steps_of(tmp_path)
    weights = (tmp_path / "step-000006" / "model.safetensors").read_bytes()
    again = trainer(data, tmp_path, keep=1)
    again.at = {3: lambda model: again._on_signal(15, None) or {}}  # stopped half way along the new branch
    assert again.train(resume=tmp_path / "step-000002") is False
    # the newest checkpoint is the new branch's, not the one that was given up, which is kept under another name
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-000003"
    assert (tmp_path / "left-step-000006" / "model.safetensors").read_bytes() == weights
    assert trainer(data, tmp_path, keep=1).train(resume=checkpoint.latest_checkpoint(tmp_path)) is True
    assert steps_of(tmp_path) == before
