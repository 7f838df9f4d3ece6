"""The shortened `make run`, and what may happen to it: killed, repeated, asked for something else."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm.cli import main
from minillm.data.prepare import open_prepared
from minillm.model.huggingface import load_pretrained
from minillm.progress import show_progress
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


def here(capsys, *args):
    """The same command in this process, which saves the seconds that importing takes: exit code, output, errors."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    show_progress(False)
    return end.value.code, *capsys.readouterr()


def test_it_writes_and_a_seed_repeats_it(finished, capsys):
    asked = ["sample", finished[0], "--prompt", "One day", "--max-new-tokens", "30", "--seed"]
    code, text, err = run(*asked, 1)
    assert code == 0 and text.startswith("One day"), err
    others = [here(capsys, *asked, *more) for more in (["1"], ["1", "--uncached"], ["2"])]
    assert [code for code, _, _ in others] == [0, 0, 0]
    assert text == others[0][1] == others[1][1] != others[2][1]


def test_the_same_command_again_trains_nothing_and_another_is_refused(finished, capsys):
    folder, _ = finished
    before = (latest_checkpoint(folder).stat().st_mtime_ns, losses(folder))
    code, out, err = run("train", "--out", folder, *SHORT)
    assert code == 0 and "Done." in out, err
    assert before == (latest_checkpoint(folder).stat().st_mtime_ns, losses(folder))
    for option, value, said in (("--train.lr", 0.5, "train.lr was 0.005 and is now 0.5"),
                                ("--model.layers", 3, "model.layers was 2 and is now 3"),
                                ("--data.seed", 1, "seed was 0 and is now 1")):
        code, _, err = here(capsys, "train", "--out", folder, *SHORT, option, value)
        assert code == 2 and said in err and "Traceback" not in err
        assert "--fresh" in err or "another folder" in err
    assert before == (latest_checkpoint(folder).stat().st_mtime_ns, losses(folder))


def test_killed_at_any_moment_it_goes_on_to_the_same_losses(finished, tmp_path):
    folder = tmp_path / "killed"
    process = command("train", "--out", folder, *SHORT)
    step = random.randint(52, 110)  # after a checkpoint, and far enough from the end to be surely in time
    deadline = time.monotonic() + 120
    while len(losses(folder)) < step and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert step <= len(losses(folder)) < 200, step
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
