"""`minillm finetune`, in this process: from a run and a file to an adapter that writes."""

import json

import pytest
import torch
from runs import TINY, small_data

from minillm.cli import main
from minillm.model.huggingface import save_pretrained
from minillm.model.transformer import Transformer
from minillm.progress import show_progress

OPTIONS = ["--train.steps", "2", "--train.batch-size", "2", "--train.device", "cpu", "--data.val-fraction", "0.3", "--length", "4", "--size", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pretrained(Transformer(TINY, seed=3), folder)
    small_data(folder / "data").tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The same documents as lines of JSON and as one text file with blank lines between them."""
    folder, lines = tmp_path_factory.mktemp("texts"), [f"The {word} is number {n}. " * 12 for n, word in enumerate(("cat", "dog", "owl", "hen") * 4)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (folder / "b.txt").write_text("\n\n".join(lines))
    return folder


def call(capsys, *words):
    state = torch.get_rng_state()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    torch.set_rng_state(state)
    show_progress(False)
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


@pytest.mark.parametrize(("method", "file"), [("lora", "a.jsonl"), ("qlora", "b.txt"), ("prompt", "a.jsonl"), ("prefix", "a.jsonl"),
                                              ("adapter", "a.jsonl"), ("parallel-adapter", "a.jsonl"), ("llama-adapter", "a.jsonl"),
                                              ("full", "a.jsonl")])
def test_every_method_ends_in_something_that_writes(tmp_path, capsys, base, texts, method, file):
    # no near copies are taken out: that would leave nothing of texts so alike. qlora needs rows that divide into groups of 64
    source = base if method != "qlora" else wider(base, tmp_path / "wide")
    words = ["finetune", source, "--out", tmp_path / "out", "--method", method, "--data.source", texts / file, "--data.no-dedup", *OPTIONS]
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert "Done. Validation loss" in out and "step-000002 holds" in out
    assert (tmp_path / "out" / "step-000002" / "adapter_config.json").exists() == (method != "full")
    code, out, err = call(capsys, "sample", tmp_path / "out", "--max-new-tokens", "5", "--prompt", "The cat")
    assert code == 0 and out.startswith("The cat"), err


def wider(base, folder):
    from dataclasses import replace
    save_pretrained(Transformer(replace(TINY, width=64, ffn_width=64)), folder)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    return folder


def test_what_cannot_be(tmp_path, capsys, base, texts):
    start = ["finetune", base, "--out", tmp_path / "out", "--data.source", texts / "a.jsonl", "--data.no-dedup", *OPTIONS]
    code, _, err = call(capsys, *start, "--method", "bitfit")
    assert code == 2 and "no bias at all" in err and not (tmp_path / "out").exists()
    code, _, err = call(capsys, *start, "--targets", "q_proj")
    assert code == 2 and "no layer matches 'q_proj'" in err
    assert call(capsys, *start)[0] == 0
    code, _, err = call(capsys, *start, "--rank", "4")
    assert code == 2 and "was begun by another request: rank was 8 and is now 4" in err
    code, _, err = call(capsys, *start, "--parallel.dp", "2")
    assert code == 2 and "-m minillm finetune --parallel.dp 2 and your other options" in err
    code, _, err = call(capsys, "finetune", tmp_path / "nowhere")
    assert code == 2 and "holds no checkpoint" in err
