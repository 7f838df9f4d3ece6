"""BPE beside its peers: training time and memory, and encoding speed, on the same text with the same ids.

    python benchmarks/tokenization.py [--size 5242880] [--vocab 10000] [--runs 5]

The text is mixed and made offline: Python's help topics and standard library, and invented words in five
scripts. Every run is a process of its own, runs of the contestants alternate, and a table has their medians.
Peak memory is what a run added to the process after imports and text (measured on Linux only). All merges and
ids are compared before a time is printed.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydoc_data.topics import topics
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from minillm.text.bpe import PATTERNS, BPETokenizer
from minillm.text.bpe_train import count_words, naive_merges

ALPHABETS = ["abcdefghijklmnopqrstuvwxyzäöüéñ", *("".join(map(chr, range(*block))) for block in (
    (0x3B1, 0x3CA), (0x430, 0x450), (0x627, 0x64B), (0x4E00, 0x5200)))]
NAIVE_MERGES = 3


def mixed_text(size: int) -> list[str]:
    """Documents with `size` bytes in all: a tenth help topics, half source code, the rest invented words."""
    texts, taken = [], 0
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = (file.read_text(encoding="utf-8", errors="replace") for file in library)
    for share, part in ((0.1, iter(topics.values())), (0.6, sources), (1.0, invented_text(random.Random(0)))):
        while taken < share * size and (text := next(part, "")):
            texts.append(text)
            taken += len(text.encode())
    return texts


def invented_text(draw: random.Random) -> Iterator[str]:
    """Endless documents, each in one script, of words as frequent as Zipf's law says."""
    lexicons = [["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(3000)]
                for letters in ALPHABETS]
    weights = [1 / (rank + 5) for rank in range(3000)]
    while True:
        words = draw.choices(draw.choice(lexicons), weights, k=300)
        yield "".join(word + draw.choice((" ", " ", " ", ", ", ". ", "\n")) for word in words)


def hugging_face_trainer(texts: list[str], vocab_size: int) -> Tokenizer:
    """The same training by Hugging Face's tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS["gpt2"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def contestants(folder: Path, vocab_size: int) -> dict[str, Callable[[list[str]], object]]:
    """Name -> what a run does with the texts; the trained tokenizer is loaded before."""
    trained = (folder / "tokenizer.json").exists()
    ours = BPETokenizer.load(folder) if trained else None
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json")) if trained else None
    if trained:
        ours.to_tiktoken()  # made before the clock starts
    return {
        "train minillm": lambda texts: BPETokenizer.train(texts, vocab_size, special_tokens=()),
        "train HF": lambda texts: hugging_face_trainer(texts, vocab_size),
        "train naive": lambda texts: naive_merges(count_words(texts, PATTERNS["gpt2"]), NAIVE_MERGES),
        "count words": lambda texts: count_words(texts, PATTERNS["gpt2"]),
        "encode minillm": lambda texts: [ours.encode(text) for text in texts],
        "encode minillm batch": lambda texts: ours.encode_batch(texts),
        "encode HF": lambda texts: [theirs.encode(text).ids for text in texts],
        "encode HF batch": lambda texts: [encoding.ids for encoding in theirs.encode_batch(texts)],
    }


def run_one(name: str, folder: Path, vocab_size: int) -> dict[str, float]:
    """In a child process: the seconds of a run, of the same run again, and the MB that the first added."""
    texts = json.loads((folder / "texts.json").read_text())
    run = contestants(folder, vocab_size)[name]
    before = memory(reset_peak=True)["VmRSS"]
    first = seconds(run, texts)
    added = memory()["VmHWM"] - before
    return {"first": first, "second": seconds(run, texts) if name.startswith("encode") else 0.0, "MB": added}


def seconds(run: Callable[[list[str]], object], texts: list[str]) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    run(texts)
    return time.perf_counter() - start


def memory(reset_peak: bool = False) -> dict[str, float]:
    """This process's MB now (VmRSS) and at its peak (VmHWM); not a number where there is no Linux /proc."""
    proc = Path("/proc/self")
    if not (proc / "clear_refs").exists():
        return {"VmRSS": math.nan, "VmHWM": math.nan}
    if reset_peak:
        (proc / "clear_refs").write_text("5")
    lines = (proc / "status").read_text().splitlines()
    found = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name.strip(":"): int(kilobytes) / 1e3 for name, kilobytes, _ in found}


def measure(names: list[str], folder: Path, vocab_size: int, runs: int) -> dict[str, dict[str, float]]:
    """The medians of each contestant, whose runs alternate."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            options = ["--one", name, "--folder", folder, "--vocab", str(vocab_size)]
            done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, check=True)
            results[name].append(json.loads(done.stdout))
    return {name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in results.items()}


def check_same(texts: list[str], folder: Path, vocab_size: int) -> None:
    """Train both, require the same merges and ids, and leave tokenizer.json in the folder."""
    ours = BPETokenizer.train(texts, vocab_size, special_tokens=())
    theirs = hugging_face_trainer(texts, vocab_size)
    ours.save(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    learned = [" ".join(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]]
    if saved != learned:
        raise SystemExit("The merges differ: there is nothing to compare.")
    ids = [ours.encode(text) for text in texts]
    if not ids == ours.encode_batch(texts) == [encoding.ids for encoding in theirs.encode_batch(texts)]:
        raise SystemExit("The ids differ: there is nothing to compare.")


def report_training(megabytes: float, folder: Path, vocab_size: int, runs: int) -> None:
    """Measure and print the table of training."""
    found = measure(["train minillm", "train HF"], folder, vocab_size, runs)
    naive = measure(["train naive", "count words"], folder, vocab_size, 1)
    per_merge = (naive["train naive"]["first"] - naive["count words"]["first"]) / NAIVE_MERGES
    base = found["train HF"]["first"]
    print(f"BPE training to {vocab_size:,} tokens on {megabytes:.1f} MB, medians of {runs} interleaved runs")
    print(f"{'':28}{'seconds':>10}{'x of HF':>10}{'peak MB':>10}")
    for name, label in (("train minillm", "minillm, pure Python"), ("train HF", "HF tokenizers, Rust")):
        took, peak = found[name]["first"], found[name]["MB"]
        print(f"{label:28}{took:10.2f}{took / base:10.2f}{peak:10.0f}")
    total = per_merge * (vocab_size - 256)
    print(f"{'naive, recounts each time':28}{total:10,.0f}{total / base:10,.0f}")
    print(f"  naive: extrapolated from {NAIVE_MERGES} merges, {per_merge:.2f} s each; later ones take less\n")


def report_encoding(megabytes: float, folder: Path, vocab_size: int, runs: int) -> None:
    """Measure and print the table of encoding. The second pass finds every word in minillm's cache."""
    names = {"encode minillm": "minillm, pure Python", "encode minillm batch": "minillm through tiktoken",
             "encode HF": "HF tokenizers", "encode HF batch": "HF tokenizers, all cores"}
    found = measure(list(names), folder, vocab_size, runs)
    print(f"encoding {megabytes:.1f} MB with that vocabulary, MB/s, medians of {runs} interleaved runs")
    print(f"{'':28}{'first pass':>12}{'x of HF':>10}{'second pass':>14}{'x of HF':>10}")
    for name, label in names.items():
        first, second = (megabytes / found[name][key] for key in ("first", "second"))
        print(f"{label:28}{first:12.1f}{first * found['encode HF']['first'] / megabytes:10.2f}"
              f"{second:14.1f}{second * found['encode HF']['second'] / megabytes:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=5 * 2**20, help="bytes of text")
    parser.add_argument("--vocab", type=int, default=10_000, help="tokens to train to")
    parser.add_argument("--runs", type=int, default=5, help="runs of each contestant")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.folder, options.vocab)))
        return
    with tempfile.TemporaryDirectory() as folder:
        texts = mixed_text(options.size)
        (Path(folder) / "texts.json").write_text(json.dumps(texts))
        check_same(texts, Path(folder), options.vocab)
        for report in (report_training, report_encoding):
            report(sum(len(text.encode()) for text in texts) / 1e6, Path(folder), options.vocab, options.runs)


if __name__ == "__main__":
    main()
