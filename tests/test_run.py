"""The shortened `make run`, and what may happen to it: killed, repeated, asked for something else."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm.data.prepare import open_prepared
from minillm.model.huggingface import load_pretrained
from minillm.train.checkpoint import latest_checkpoint
from minillm.train.metrics import read_metrics

SHORT = ["--data.size", "600000", "--model.vocab-size", "400", "--model.layers", "2", "--model.width", "64",
         "--model.heads", "2", "--model.context", "64", "--train.steps", "200", "--train.batch-size", "8",
         "--train.warmup-steps", "20", "--train.eval-every", "50", "--train.checkpoint-every", "50"]


def command(*args, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "minillm", *map(str, args)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **options)


def run(*args):
    process = command(*args)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def losses(folder):
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run, with what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    code, out, err = run("train", "--out", folder, *SHORT)
    assert code == 0, err
    return folder, out


def test_it_learns_more_than_which_tokens_are_frequent(finished):
    folder, _ = finished
    data = open_prepared(folder / "data")
    final = [r for r in read_metrics(folder / "metrics.jsonl") if "val_loss" in r][-1]
    counts = Counter(data.val[:].tolist())
    unigram = -sum(n / data.val.tokens * math.log(n / data.val.tokens) for n in counts.values())
    floor = data.val.nats / data.val.tokens
    assert floor < final["val_loss"] < unigram - 0.5, (floor, final, unigram)
    assert final["val_tokens"] == data.val.tokens - 1


def test_everything_that_was_promised_is_there(finished):
    folder, out = finished
    last = latest_checkpoint(folder)
    assert last.name == "step-000200"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in last.iterdir()}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and page.count("<blockquote>") == 3
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", page)  # nothing is loaded from elsewhere
    samples = [r for r in read_metrics(folder / "metrics.jsonl") if "sample" in r]
    assert [r["step"] for r in samples] == [10, 50, 200]
    assert "minillm sample" in out and "report.html" in out


def test_the_checkpoint_is_hugging_faces_too(finished):
    last = latest_checkpoint(finished[0])
    ids = torch.arange(40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(last).eval()(ids).logits
    torch.testing.assert_close(load_pretrained(last)(ids), theirs, rtol=1e-4, atol=1e-4)  # float32, logits of size 10


def test_it_writes_and_a_seed_repeats_it(finished):
    texts = [run("sample", finished[0], "--prompt", "One day", "--max-new-tokens", "30", "--seed", seed, *more)
             for seed, more in (("1", []), ("1", ["--uncached"]), ("2", []))]
    assert all(code == 0 for code, _, _ in texts)
    assert texts[0][1].startswith("One day") and texts[0][1] == texts[1][1] != texts[2][1]


def test_the_same_command_again_trains_nothing_and_another_is_refused(finished):
    folder, _ = finished
    before = (latest_checkpoint(folder).stat().st_mtime_ns, losses(folder))
    code, out, err = run("train", "--out", folder, *SHORT)
    assert code == 0, err
    assert before == (latest_checkpoint(folder).stat().st_mtime_ns, losses(folder))
    code, _, err = run("train", "--out", folder, *SHORT, "--train.lr", "0.5")
    assert code == 2 and "train.lr was 0.005 and is now 0.5" in err and "--fresh" in err and "Traceback" not in err


def test_killed_at_any_moment_it_goes_on_to_the_same_losses(finished, tmp_path):
    folder = tmp_path / "killed"
    process = command("train", "--out", folder, *SHORT)
    deadline = time.monotonic() + 120
    while latest_checkpoint(folder) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.4)  # into the steps after the first checkpoint
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(losses(folder)) < 200
    code, _, err = run("train", "--out", folder, *SHORT)
    assert code == 0, err
    assert losses(folder) == losses(finished[0])


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_well(which, tmp_path):
    process = command("train", "--out", tmp_path / "run", *SHORT, "--train.checkpoint-every", "1000")
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "run")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(which)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    saved = latest_checkpoint(tmp_path / "run")
    assert saved is not None and json.loads((saved / "trainer.json").read_text())["step"] == losses(tmp_path / "run")[-1][0]
    assert "Go on with the same command" in out


def test_fresh_keeps_the_old_run_aside(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    code, _, err = run("train", "--out", tmp_path / "run", *SHORT, "--train.steps", "2", "--fresh")
    assert code == 0, err
    assert (tmp_path / "run-before-1" / "mine.txt").read_text() == "keep me"
    assert latest_checkpoint(tmp_path / "run").name == "step-000002"
