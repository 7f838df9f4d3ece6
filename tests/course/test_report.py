import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from minillm.config import TrainConfig
from minillm.course.report import summarise, write_report
from minillm.data.prepare import DataConfig, open_prepared, prepare
from minillm.model.families import preset

MODEL = preset("first", vocab_size=300, layers=2, width=16, heads=2, context=32)
RECORDS = [{"step": 0, "val_loss": 5.7, "val_tokens": 128},
           {"step": 1, "loss": 5.6, "tokens": 1000, "tokens_per_second": 10},  # a pause, say: the median passes over it
           {"step": 1, "val_loss": 5.5, "val_tokens": 128}, {"step": 1, "sample": " <b>early</b> & wild"},
           {"step": 2, "loss": 5.0, "tokens": 2000, "tokens_per_second": 4000},
           {"step": 3, "loss": 4.5, "tokens": 3000, "tokens_per_second": 4200},
           {"step": 3, "val_loss": 4.4321, "val_tokens": 900, "val_bits_per_byte": 2.3456},
           {"step": 3, "sample": " the end"}]
NOTES = {"step": 3, "model": asdict(MODEL), "train": asdict(TrainConfig(steps=3)), "device": "cpu"}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("stories"), DataConfig(size=30_000, val_fraction=0.2), 300)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Text whose entropy nobody knows."""
    folder = tmp_path_factory.mktemp("plain")
    lines = (f"Line {number} counts {number * number} things of {number % 7} kinds." for number in range(200))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return prepare(folder / "data", DataConfig(source=str(folder / "a.jsonl"), dedup=False), 300)


def report(run, data, prompt="Once"):
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    summary = write_report(run, data, NOTES, prompt)
    return summary, (run / "report.html").read_text()


def test_the_run_in_numbers(stories):
    found = summarise(RECORDS, stories)
    val = open_prepared(stories.folder).val
    assert found == {"first_loss": 5.7, "final_loss": 4.4321, "tokens": 3000, "tokens_per_second": 4000,
                     "bits_per_byte": 2.3456, "floor": val.nats / val.tokens,
                     "floor_bits_per_byte": val.nats / val.bytes / math.log(2)}


def test_the_page_says_what_the_run_did(stories, tmp_path):
    summary, page = report(tmp_path / "run", stories)
    text = re.sub(r"<[^>]+>", " ", page)
    floor = summary["floor"]
    for words in ("5.700 → 4.432 nats per token", f"{floor:.3f} nats per token", "2.346 (best possible",
                  "2 layers, width 16, 2 heads", "300 tokens", "3,000 tokens", "4,000 tokens/s", "fp32, cpu", "3 of 3 steps",
                  "After 1 steps (validation loss 5.50)", "After 3 steps (validation loss 4.43)",
                  f"{stories.train.documents:,} documents"):
        assert words in text, words
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_a_model_cannot_become_part_of_the_page(stories, tmp_path):
    _, page = report(tmp_path / "<i>run</i>", stories, prompt="<script>alert('x')</script>")
    assert "<script" not in page and "<b>early" not in page and "<i>run" not in page
    assert "&lt;b&gt;early&lt;/b&gt; &amp; wild" in page


def test_without_a_known_source_there_is_no_best_possible(plain, tmp_path):
    summary, page = report(tmp_path / "run", plain)
    assert "floor" not in summary and "best possible" not in page and "2.346" in page and "nan" not in page.lower()


class Checker(HTMLParser):
    """What opens and closes, and everything that a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(stories, tmp_path):
    checker = Checker()
    _, page = report(tmp_path / "run", stories)
    checker.feed(page)
    assert checker.open == [] and len(checker.loads) == 1
    assert checker.loads[0].startswith("data:image/png;base64,")
    assert "http" not in page and "@import" not in page and "url(" not in page


def test_the_same_run_gives_the_same_files(stories, tmp_path):
    for place in ("a", "b"):
        report(tmp_path / place / "run", stories)
    assert (tmp_path / "a/run/loss.png").read_bytes() == (tmp_path / "b/run/loss.png").read_bytes()
