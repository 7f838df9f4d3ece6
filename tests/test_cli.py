"""The command line, in this process: what it says when it is asked for help, or for what cannot be."""

import pytest

from minillm.cli import main


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


@pytest.mark.parametrize("args", [["--help"], [], *[[c, "--help"] for c in ("doctor", "data", "tokenize", "train", "sample")]])
def test_help(capsys, args):
    code, out, _ = call(capsys, *args)
    assert code == 0 and "minillm" in out
    if args == ["train", "--help"]:
        assert "--model.kv-heads" in out and "--train.warmup-steps" in out and "--data.source" in out


def test_unknown_words_suggest_the_nearest(capsys):
    code, _, err = call(capsys, "train", "--model.wdith", "3")
    assert code == 2 and "--model.width" in err
    code, _, err = call(capsys, "train", "--preset", "lama-7b")
    assert code == 2 and "'llama-7b'" in err


def test_data_and_tokens_can_be_looked_at(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "--size", "3000", "--out", tmp_path / "x.txt")
    assert code == 0 and "True entropy: 136.66 nats" in out and (tmp_path / "x.txt").stat().st_size >= 3000
    code, out, _ = call(capsys, "tokenize", "--data.size", "60000", "--data.val-fraction", "0.1", "--vocab-size", "300",
                        "--out", tmp_path / "d")
    assert code == 0 and "300 tokens in the vocabulary" in out
    code, out, _ = call(capsys, "tokenize", "--out", tmp_path / "d", "--text", "a b")
    assert code == 0 and "tokens for 3 bytes" in out


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
        "no checkpoint": (["sample", folder / "void"], ["holds no checkpoint", "minillm train"]),
        "vocabularies": (["train", "--prepared", folder / "made", "--model.vocab-size", "290", *some[:4]],
                         ["290", "300", "--model.vocab-size 300"]),
    }


@pytest.mark.parametrize("case", ["empty file", "not text", "no such path", "folder without text", "small vocabulary",
                                  "long context", "heads", "no checkpoint", "vocabularies"])
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


def test_a_tokenizer_that_does_not_belong_to_the_shards(capsys, tmp_path):
    for name, size in (("a", 300), ("b", 310)):
        call(capsys, "tokenize", "--data.size", "60000", "--data.val-fraction", "0.1", "--vocab-size", size, "--out",
             tmp_path / name)
    (tmp_path / "a" / "tokenizer.json").write_bytes((tmp_path / "b" / "tokenizer.json").read_bytes())
    code, _, err = call(capsys, "train", "--prepared", tmp_path / "a", "--out", tmp_path / "run", "--train.steps", "1")
    assert code == 2 and "was written by tokenizer" in err and "tokenize again" in err
