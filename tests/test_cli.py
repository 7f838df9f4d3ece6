"""The command line, in this process: what it says when it is asked for help, or for what cannot be."""

import errno
import json

import pytest

from minillm.cli import main, parse
from minillm.train import checkpoint


def call(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


@pytest.fixture
def quiet():
    """Leave the progress bars as they were."""
    from minillm.progress import show_progress
    yield
    show_progress(False)


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("args", [["--help"], [], *[[c, "--help"] for c in ("doctor", "data", "tokenize", "train", "finetune", "align", "chat", "sample", "evaluate", "plan")]])
def test_help(capsys, args):
    code, out, _ = call(capsys, *args)
    assert code == 0 and "minillm" in out
    if args == ["train", "--help"]:
        assert "--model.kv-heads" in out and "--train.warmup-steps" in out and "--data.source" in out


def test_the_engine_has_a_short_name():
    for words in (["--engine", "torch"], ["--engine=torch"], ["--parallel.engine", "torch"], ["--preset", "llama-7b", "--engine", "torch"]):
        assert parse(["train", *words]).parallel.engine == "torch" and parse(["train"]).parallel.engine == "ours"


def test_unknown_words_suggest_the_nearest(capsys):
    code, _, err = call(capsys, "train", "--model.wdith", "3")
    assert code == 2 and "--model.width" in err
    for words in (["--preset", "lama-7b"], ["--preset=lama-7b"]):
        code, _, err = call(capsys, "train", *words)
        assert code == 2 and "'llama-7b'" in err
    code, _, err = call(capsys, "trian")
    assert code == 2 and "trian" in err and "train" in err


def test_data_and_tokens_can_be_looked_at(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "--size", "3000", "--out", tmp_path / "x.txt")
    assert code == 0 and "True entropy: 136.66 nats" in out and (tmp_path / "x.txt").stat().st_size >= 3000
    code, out, _ = call(capsys, "tokenize", "--data.size", "60000", "--data.val-fraction", "0.1", "--vocab-size", "300",
                        "--out", tmp_path / "d")
    assert code == 0 and "300 tokens in the vocabulary" in out
    code, out, _ = call(capsys, "tokenize", "--out", tmp_path / "d", "--text", "a b")
    assert code == 0 and "tokens for 3 bytes" in out


def test_a_plan_is_a_table(capsys):
    code, out, _ = call(capsys, "plan", "--model", "llama-65b", "--gpus", "2048", "--gpu", "a100-80g", "--tokens", "1.4e12")
    assert code == 0 and out.startswith("llama-65b on 2,048 x a100-80g\n") and "65,285,660,672" in out and "25.8 days" in out
    code, shorter, _ = call(capsys, "plan", "--model", "llama-65b", "--gpus", "2048", "--tokens", "1.4T", "--utilisation", "0.495",
                            "--precision", "fp16", "--states", "float", "--context", "2048")
    assert code == 0 and "20.8 days" in shorter and "in fp16" in shorter and "18 bytes" in shorter
    code, out, _ = call(capsys, "plan", "--model", "70B")
    assert code == 0 and "1.4T   20 a parameter" in out


def test_what_cleaning_removed_is_a_table(capsys, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("The same few words of text, and that is all that there is to be read. " * (number + 1))
    code, out, _ = call(capsys, "data", "--source", "languages", "--clean", "--show", "0")
    assert code == 0 and "quality rules         12" in out and "languages: 12 documents" in out
    code, _, err = call(capsys, "data", "--source", tmp_path, "--clean")
    assert code == 2 and "cleaning left none of 3 documents: \"quality rules\" took 3" in err


def bad_cases(folder):
    """Each request that cannot be carried out, and words that its one line must have."""
    empty, binary, short = folder / "empty.txt", folder / "photo.txt", folder / "short"
    empty.write_text("")
    binary.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    short.mkdir()
    for number in range(30):
        (short / f"{number}.txt").write_text(f"document {number} says little")
    some = ["--train.steps", "1", "--train.batch-size", "1", "--data.val-fraction", "0.3"]
    return {
        "empty file": (["train", "--data.source", empty], ["empty.txt is empty"]),
        "not text": (["train", "--data.source", binary], ["photo.txt", "not UTF-8", "0x89", "offset 0"]),
        "no such path": (["data", "--source", folder / "nothing"], ["nothing", "no file, folder or glob"]),
        "folder without text": (["data", "--source", folder / "void"], ["no text file", ".txt"]),
        "small vocabulary": (["tokenize", "--vocab-size", "100", "--data.size", "9999", "--data.val-fraction", "0.5"],
                             ["100", "262"]),
        "long context": (["train", "--data.source", short, *some, "--model.context", "100000"],
                         ["context of 100,000", "longer than the data"]),
        "heads": (["train", "--model.width", "100", "--model.heads", "3"], ["width 100", "3 heads"]),
        "model to plan": (["plan", "--model", "lama-65b"], ["'lama-65b'", "Did you mean 'llama-65b'"]),
        "gpu to plan for": (["plan", "--model", "gpt2", "--gpu", "v100"], ["'v100'", "Did you mean 'v100-32g'", "h200"]),
        "tokens to plan for": (["plan", "--model", "gpt2", "--tokens", "many"], ["'many'", "1.4T"]),
        "format that the gpu lacks": (["plan", "--model", "gpt2", "--gpu", "v100-32g", "--precision", "bf16"], ["bf16", "fp16"]),
        "no checkpoint": (["sample", folder / "void"], ["holds no checkpoint", "minillm train"]),
        "vocabularies": (["train", "--prepared", folder / "made", "--model.vocab-size", "290", *some[:4]],
                         ["290", "300", "--model.vocab-size 300"]),
    }


@pytest.mark.parametrize("case", ["empty file", "not text", "no such path", "folder without text", "small vocabulary",
                                  "long context", "heads", "model to plan", "gpu to plan for", "tokens to plan for",
                                  "format that the gpu lacks", "no checkpoint", "vocabularies"])
def test_bad_input_is_one_line_that_helps(capsys, tmp_path, case):
    (tmp_path / "void").mkdir()
    args, words = bad_cases(tmp_path)[case]
    if case == "vocabularies":
        call(capsys, "tokenize", "--data.size", "60000", "--data.val-fraction", "0.1", "--vocab-size", "300", "--out",
             tmp_path / "made")
    if args[0] in ("train", "tokenize"):
        args = [*args, "--out", tmp_path / "out"]
    code, _, err = call(capsys, *args)
    assert code == 2, err
    said = " ".join(err.replace("│", " ").split())
    for word in words:
        assert word in said, said
    assert "Traceback" not in err
    # one line of ours; impossible configurations are shown by tyro, in a box
    assert len([line for line in err.splitlines() if line.startswith("minillm: ")]) == (case != "heads")


def test_a_tokenizer_that_does_not_belong_to_the_shards(capsys, tmp_path):
    for name, size in (("a", 300), ("b", 310)):
        call(capsys, "tokenize", "--data.size", "60000", "--data.val-fraction", "0.1", "--vocab-size", size, "--out",
             tmp_path / name)
    (tmp_path / "a" / "tokenizer.json").write_bytes((tmp_path / "b" / "tokenizer.json").read_bytes())
    code, _, err = call(capsys, "train", "--prepared", tmp_path / "a", "--out", tmp_path / "run", "--train.steps", "1")
    assert code == 2 and "was written by tokenizer" in err and "tokenize again" in err


TINY = ["--data.size", "40000", "--data.val-fraction", "0.2", "--model.vocab-size", "300", "--model.layers", "1",
        "--model.width", "16", "--model.heads", "2", "--model.context", "32", "--train.batch-size", "4",
        "--train.steps", "2", "--train.checkpoint-every", "1", "--train.device", "cpu"]


@pytest.fixture
def run(capsys, tmp_path):
    """A finished run of two steps, with a checkpoint after each."""
    assert call(capsys, "train", *TINY, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def test_a_truncated_checkpoint_is_not_used(capsys, run):
    weights = run / "step-000002" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    code, _, err = call(capsys, "train", *TINY, "--out", run, "--resume", run / "step-000002")
    assert code == 2 and f"{len(whole) - 100:,} of {len(whole):,} bytes" in err and f"--resume {run / 'step-000001'}" in err
    code, _, err = call(capsys, "sample", run / "step-000002")
    assert code == 2 and "model.safetensors is incomplete" in err and "Traceback" not in err
    assert call(capsys, "sample", run, "--max-new-tokens", "3")[0] == 0  # the run has another, whole one


def test_a_full_disk_is_one_line_and_loses_nothing(capsys, run, monkeypatch):
    before = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.glob("step-*/*")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    code, _, err = call(capsys, "train", *TINY, "--out", run, "--resume", run / "step-000001")
    assert code == 2 and "the disk is full" in err and "step-000001, untouched" in err and "Traceback" not in err
    after = {path.relative_to(run).as_posix().removeprefix("left-"): path.read_bytes()
             for pattern in ("step-*/*", "left-step-*/*") for path in run.glob(pattern)}
    assert after == before  # the second checkpoint, from which the run went back, only has another name


def test_fresh_keeps_the_old_run_aside(capsys, run):
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for number in (1, 2):
        code, out, err = call(capsys, "train", *TINY, "--out", run, "--train.steps", "1", "--fresh")
        assert code == 0, err
        assert f"it is now {run}-before-{number}" in out
        assert [folder.name for folder in checkpoint.checkpoints(run)] == ["step-000001"]
    aside = run.with_name("run-before-1")
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before


def test_ids_outside_the_vocabulary_are_named(capsys, run):
    call(capsys, "tokenize", "--data.size", "60000", "--data.val-fraction", "0.1", "--vocab-size", "400", "--out", run / "more")
    (run / "step-000002" / "tokenizer.json").write_bytes((run / "more" / "tokenizer.json").read_bytes())
    code, _, err = call(capsys, "sample", run / "step-000002", "--prompt", "Once upon a time there was a little")
    assert code == 2 and "outside the vocabulary of 300" in err and "another model's tokenizer" in err


def test_a_run_is_evaluated(capsys, run, tmp_path):
    task = tmp_path / "mine.jsonl"
    task.write_text("".join(json.dumps({"context": f"{n} and", "choices": [" a", " b", " c"], "answer": n % 3, "domain": "xy"[n % 2]}) + "\n"
                            for n in range(8)))
    code, out, err = call(capsys, "evaluate", run, "--task", task, "place", "written difference", "--shots", "0", "2", "--items", "6",
                          "--domains", "stories", "languages", "--size", "3000", "--out", tmp_path / "r.json")
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["domain"] for row in found["loss"]] == ["stories", "languages"]
    stories, languages = found["loss"]
    assert stories["bytes"] >= 3000 and 0.1 < stories["best_bits_per_byte"] < stories["bits_per_byte"]
    assert languages["best_bits_per_byte"] is None
    assert [(row["shots"], row["items"], row["chance"]) for row in found["tasks"]] == [
        (0, 6, pytest.approx(1 / 3)), (2, 6, pytest.approx(1 / 3)), (0, 6, 0.25), (2, 6, 0.25), (0, 6, 0), (2, 6, 0)]
    mine, _, place, *_, written = found["tasks"]
    assert mine["best"] is None and place["best"] == 1 and set(mine["domains"]) == {"x", "y"}
    assert mine["domains"]["x"]["right"] + mine["domains"]["y"]["right"] == mine["right"] == mine["accuracy"] * 6
    assert set(place["by"]) == {"token", "byte", "unconditional"} and written["by"] == {}
    lines = out.splitlines()
    assert "Nothing beside" not in out and len(lines) == 1 + 2 + 1 + 1 + 6  # two tables and a line between them
    assert len({len(line) for line in lines[:3]}) == 1 and lines[5].split()[:3] == ["mine.jsonl", "6", "0"]


def test_only_what_was_asked_for_is_evaluated(capsys, run, tmp_path):
    code, out, _ = call(capsys, "evaluate", run, "--domains", "--task", "place", "--items", "2", "--shots", "1")
    assert code == 0 and "bits/byte" not in out and len(out.splitlines()) == 2
    code, out, _ = call(capsys, "evaluate", run, "--domains", "stories", "--size", "500", "--task")
    assert code == 0 and "interval" not in out and len(out.splitlines()) == 3


@pytest.mark.parametrize(["words", "said"], [
    (["--task", "places"], "'places' is no task"), (["--task", "nothing.jsonl"], "nothing.jsonl"), (["--items", "0"], "items = 0"),
    (["--task", "place", "--items", "2", "--shots", "4"], "4 examples need"), (["--domains", "nowhere"], "'nowhere' is no file"),
    (["--task", "order", "--items", "2"], "task order, 0 shots: the choice 'Everyone")])
def test_what_cannot_be_evaluated_is_one_line(capsys, run, words, said):
    words = [*words, "--domains"] if "--domains" not in words else words
    code, _, err = call(capsys, "evaluate", run, *words)
    assert code == 2 and said in err and "Traceback" not in err


def test_training_gone_wrong_has_an_exit_code_of_its_own(capsys, tmp_path):
    code, _, err = call(capsys, "train", *TINY, "--out", tmp_path / "run", "--train.lr", "1e25", "--train.clip-norm", "0",
                        "--train.warmup-steps", "0")
    assert code == 3 and "step 2" in err and "step-000001" in err and "Try a lower --train.lr" in err and "Traceback" not in err


def test_data_that_is_already_prepared_cannot_be_asked_for_again(capsys, run):
    code, _, err = call(capsys, "train", "--prepared", run / "data", "--out", run.with_name("other"), *TINY)
    assert code == 2 and "leave the --data.* options out" in err
    assert call(capsys, "train", "--prepared", run / "data", "--out", run.with_name("other"), *TINY[4:])[0] == 0


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minillm.cli.documents", interrupted)
    code, _, err = call(capsys, "data")
    assert code == 130 and err.strip() == "minillm: interrupted."
