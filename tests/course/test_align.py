"""The shortened second half of `make run`: every stage gains, is resumable, and refuses what it was not begun with."""

import json
import shutil
import signal
import time
from itertools import islice

import pytest
import torch
from commands import ended, start

from minillm.cli import main
from minillm.course.align import talking_model
from minillm.course.align_gains import calibration_error
from minillm.course.align_report import as_html
from minillm.course.judge import judge, win_rate
from minillm.data.instructions import conversation_row, instructions, read_preferences, write_jsonl
from minillm.model.huggingface import load_pretrained
from minillm.progress import show_progress
from minillm.text.bpe import BPETokenizer
from minillm.text.chat import TEMPLATES
from minillm.train.metrics import read_metrics

BASE = ["train", "--data.size", "600000", "--model.vocab-size", "400", "--model.layers", "2", "--model.width", "64", "--model.heads",
        "2", "--model.context", "64", "--train.steps", "150", "--train.batch-size", "8", "--train.warmup-steps", "20"]
# To say words again is learned in a few hundred steps; adding takes ten times as many tokens.
SHORT = ["--kinds", "repeat", "--told", "0", "--turns", "1", "--wordy", "0.4", "--context", "64", "--online.max-new-tokens", "20", "--demonstrations",
         "8000", "--sft.steps", "300", "--sft.checkpoint-every", "100", "--pairs", "800", "--held-out-pairs", "256", "--reward.steps", "25",
         "--dpo.steps", "25", "--online.rounds", "4", "--policy.lr", "2e-4", "--policy.checkpoint-every", "1"]


def align(capsys, *words):
    """The command in this process: exit code, output, errors."""
    state = torch.get_rng_state()
    with pytest.raises(SystemExit) as end:
        main(["align", *map(str, words)])
    torch.set_rng_state(state)
    show_progress(False)
    return end.value.code or 0, *capsys.readouterr()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned") / "base"
    code, _, err = ended(start(*BASE, "--out", folder))
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def done(base):
    folder = base.with_name("done")
    shutil.copytree(base, folder)
    code, out, err = ended(start("align", folder, *SHORT))
    assert code == 0, err
    return folder, out


def gains(folder):
    return {record["stage"]: record for record in read_metrics(folder / "metrics.jsonl") if "stage" in record}


def test_every_stage_gained(done):
    found = gains(done[0])
    assert list(found) == ["sft", "pairs", "reward", "ppo"]
    assert found["sft"]["exact_match_before"] == 0 and found["sft"]["exact_match_after"] > 0.3
    assert 0.6 < found["reward"]["accuracy"] <= found["pairs"]["best_accuracy"] + 0.06  # 256 pairs: a standard error of 0.03
    assert found["ppo"]["reward_after"] > found["ppo"]["reward_before"] + 0.1 and found["ppo"]["kl_before"] == 0
    assert 0 < found["ppo"]["kl_after"] < 1 and found["ppo"]["rule_after"] > found["ppo"]["rule_before"] + 0.05
    assert abs(found["ppo"]["text_loss_after"] - found["ppo"]["text_loss_before"]) < 0.3
    assert all(found[stage]["seconds"] > 0 for stage in found) and found["sft"]["tokens_per_second"] > 0 < found["ppo"]["seconds_update"]
    assert found["ppo"]["finished_after"] > 0.7 and 0.5 < found["ppo"]["win_rate"] < 0.8


def test_what_it_says_is_what_the_models_do(done):
    """The numbers are measured once more, from the files."""
    folder, out = done
    held_out = list(islice(instructions(3, "test", ["repeat"]), 256))
    model, tokenizer = load_pretrained(talking_model(folder)), BPETokenizer.load(talking_model(folder))
    assert talking_model(folder) == folder / "ppo" / "step-000004"
    found = judge(model, tokenizer, TEMPLATES["minillm"], held_out, 20)
    said = gains(folder)["ppo"]
    assert (found.exact_match, found.rule) == (pytest.approx(said["exact_match_after"], abs=1e-4), pytest.approx(said["rule_after"], abs=1e-4))
    line = next(line for line in out.splitlines() if line.startswith("right, and nothing else"))
    assert [word for word in line.split() if "%" in word] == [
        f"{gains(folder)['sft'][f'exact_match_{when}']:.1%}" for when in ("before", "after")] + [f"{said['exact_match_after']:.1%}"]


def test_the_report_and_the_files_are_there(done):
    folder, out = done
    page = (folder / "report.html").read_text()
    assert "How it learned to answer" in page and "agrees with" in page and page.count("Say: ") == 6
    pairs = read_preferences(folder / "pairs" / "train.jsonl")
    assert len(pairs) == 800 and all(pair.chosen != pair.rejected for pair in pairs) and {pair.probability for pair in pairs} > {0.5}
    rounds = [record for record in read_metrics(folder / "ppo" / "metrics.jsonl")]
    assert [record["step"] for record in rounds] == [1, 2, 3, 4]
    assert all(record[f"seconds_{part}"] > 0 for record in rounds for part in ("generate", "score", "update"))
    assert f"minillm chat {folder}" in out and "report.html" in out


def test_the_same_command_again_does_nothing_and_another_is_refused(done, capsys):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/step-*")}
    code, out, err = align(capsys, folder, *SHORT)
    assert code == 0 and "right, and nothing else" in out, err
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/step-*")}
    code, _, err = align(capsys, folder, *SHORT, "--wordy", "0.5")
    assert code == 2 and "wordy was 0.4 and is now 0.5" in err and "--fresh" in err
    code, _, err = align(capsys, folder, *SHORT, "--policy.steps", "7")
    assert code == 2 and "--policy.steps would change nothing" in err
    code, _, err = align(capsys, folder / "step-000150", *SHORT)
    assert code == 2 and "is a model and no run: say with --out" in err
    code, _, err = align(capsys, folder / "step-000100", "--out", folder.with_name("early"), *SHORT)
    assert code == 2 and "in the middle of its training, at step 100 of 150" in err
    code, _, err = align(capsys, folder / "nothing", *SHORT)
    assert code == 2 and "holds no checkpoint" in err


@pytest.mark.slow  # the whole of it in three processes
def test_stopped_in_two_stages_it_goes_on_to_the_same_policy(base, done):
    """By a signal in the middle of tuning, and killed in the middle of PPO."""
    folder = base.with_name("stopped")
    shutil.copytree(base, folder)
    stopped = start("align", folder, *SHORT)
    wait_for(folder / "sft" / "metrics.jsonl", 20)
    stopped.send_signal(signal.SIGTERM)
    code, out, err = ended(stopped)
    assert code == 0 and "Stopped in the stage sft and saved" in out, err
    killed = start("align", folder, *SHORT)
    wait_for(folder / "ppo" / "metrics.jsonl", 1)
    killed.kill()
    ended(killed)
    code, out, err = ended(start("align", folder, *SHORT))
    assert code == 0, err
    ours, wanted = (load_pretrained(talking_model(run)).state_dict() for run in (folder, done[0]))
    assert all(torch.equal(ours[name], weight) for name, weight in wanted.items())


def wait_for(file, lines):
    deadline = time.monotonic() + 120
    while len(read_metrics(file)) < lines and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(read_metrics(file)) >= lines


def test_other_methods_go_on_from_the_same_tuned_model(done, capsys):
    folder = done[0].with_name("others")
    shutil.copytree(done[0], folder)
    for method in ("dpo", "grpo"):
        code, out, err = align(capsys, folder, *SHORT, "--method", method)
        assert code == 0, err
        found = gains(folder)[method]
        assert found["rule_before"] == gains(folder)["ppo"]["rule_before"] and 0 < found["kl_after"] < 2
        assert talking_model(folder).parent.name == method and method.upper() in out
    assert gains(folder)["grpo"]["rule_after"] > gains(folder)["grpo"]["rule_before"]


def test_fresh_keeps_what_was_there(done, capsys):
    folder = done[0].with_name("afresh")
    shutil.copytree(done[0], folder)
    code, _, err = align(capsys, folder, *SHORT, "--method", "sft", "--fresh", "--sft.steps", "2", "--sft.warmup-steps", "1")
    assert code == 0, err
    assert (folder / "ppo-before-1" / "step-000004").exists() and not (folder / "ppo").exists()
    assert json.loads((folder / "sft" / "request.json").read_text())["sft"]["steps"] == 2
    assert talking_model(folder) == folder / "sft" / "step-000002" and list(gains(folder)) == ["sft"]


def test_conversations_and_comparisons_of_ones_own(base, capsys, tmp_path):
    """Two turns, one of them with a system message; and what is preferred is the longer answer."""
    words = ["red", "blue", "small", "old", "tall", "green"]
    talks = [[{"role": "user", "content": f"Say: {a} {b}"}, {"role": "assistant", "content": f"{a} {b}"}] for a in words for b in words]
    talks += [[{"role": "system", "content": "Echo."}, *talk, *talk] for talk in talks]
    write_jsonl(tmp_path / "talks.jsonl", map(conversation_row, talks))
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": talk[0]["content"], "chosen": talk[1]["content"] * 2, "rejected": talk[1]["content"]}
                                           for talk in talks[:36]])
    own = ["--conversations", tmp_path / "talks.jsonl", "--preferences", tmp_path / "pairs.jsonl", "--context", "64", "--sft.batch-size", "4",
           "--sft.steps", "20", "--reward.steps", "4", "--reward.batch-size", "16", "--online.rounds", "1"]
    code, out, err = align(capsys, base, "--out", tmp_path / "own", *own)
    assert code == 0 and "right, and nothing else" in out, err
    assert len(read_preferences(tmp_path / "own" / "pairs" / "train.jsonl")) + len(read_preferences(tmp_path / "own" / "pairs" / "test.jsonl")) == 36
    assert not (tmp_path / "own" / "report.html").exists()
    noted = json.loads((tmp_path / "own" / "alignment.json").read_text())
    assert noted["stages"]["pairs"]["comparisons"] + noted["stages"]["pairs"]["held_out"] == 36
    assert "best_accuracy" not in noted["stages"]["pairs"] and "of which the noise allows" not in as_html(noted)


@pytest.mark.slow  # two processes, each with imports of its own
def test_two_ranks(base):
    folder = base.with_name("ranks")
    shutil.copytree(base, folder)
    code, out, err = ended(start("align", folder, *SHORT, "--parallel.dp", "2", ranks=2))
    assert code == 0, err
    found = gains(folder)
    assert found["sft"]["exact_match_after"] > 0.3 and found["ppo"]["reward_after"] > found["ppo"]["reward_before"]
    assert out.count("right, and nothing else") == 1


def test_win_rates_and_calibration_by_hand():
    assert win_rate([2, 1, 0, 1], [1, 1, 1, 0]) == (1 + 0.5 + 0 + 1) / 4
    # two sure at 0.95, one of them wrong; two at 0.55, both right: |0.95 - 0.5|, |0.55 - 1|
    assert calibration_error(torch.tensor([0.95, 0.05, 0.55, 0.55])) == pytest.approx(0.45)
    draw = torch.Generator().manual_seed(0)
    sure = torch.rand(100_000, generator=draw, dtype=torch.float64)
    honest = torch.where(torch.rand(100_000, generator=draw, dtype=torch.float64) < sure, sure, 1 - sure)
    assert calibration_error(honest) < 0.01
