"""The report of a run: one HTML page with its curve, its numbers and its samples, and nothing loaded from elsewhere."""

import base64
import html
import io
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

from minillm.config import ModelConfig, from_dict
from minillm.course.align_report import as_html
from minillm.course.plots import loss_curve, use_style
from minillm.data.prepare import Prepared
from minillm.files import write_atomically
from minillm.model.flops import training_flops_per_token
from minillm.model.transformer import Transformer, num_params
from minillm.train.metrics import read_metrics

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; } .sub { color: #666; margin-top: 0; } img { max-width: 100%; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; } td + td { font-weight: 600; }
th { text-align: left; padding-right: 1.2rem; }
blockquote { white-space: pre-wrap; background: #f5f5f2; margin: .5rem 0 1.2rem; padding: .8rem 1rem;
  border-left: 4px solid #0072B2; font-family: Georgia, serif; } b.prompt { color: #0072B2; font-weight: 600; }
details { margin-top: 1rem; } pre { font-size: 13px; background: #f5f5f2; padding: .8rem; overflow: auto; }
"""


def write_report(run: Path, data: Prepared, notes: dict, prompt: str) -> dict[str, float]:
    """Write loss.png and report.html into the run's folder. Returns the numbers that the page leads with.

    notes: the trainer's notes of the last checkpoint (configuration and step).
    """
    records = read_metrics(run / "metrics.jsonl")
    summary = summarise(records, data)
    png = _curve(records, data, summary)
    write_atomically(run / "loss.png", png)
    write_atomically(run / "report.html", _page(run, records, data, notes, prompt, summary, png))
    return summary


def summarise(records: list[dict], data: Prepared) -> dict[str, float]:
    """The run in a few numbers: losses in nats a token and bits a byte, beside the best possible if it is known."""
    validation = [r for r in records if "val_loss" in r]
    steps = [r for r in records if "loss" in r]
    summary = {"first_loss": validation[0]["val_loss"], "final_loss": validation[-1]["val_loss"],
               "tokens": steps[-1]["tokens"], "tokens_per_second": _median([r["tokens_per_second"] for r in steps])}
    if "mfu" in steps[-1]:
        summary["mfu"] = _median([r["mfu"] for r in steps if "mfu" in r])
    if "val_bits_per_byte" in validation[-1]:
        summary["bits_per_byte"] = validation[-1]["val_bits_per_byte"]
    if not math.isnan(data.val.nats):
        summary["floor"] = data.val.nats / data.val.tokens
        summary["floor_bits_per_byte"] = data.val.nats / data.val.bytes / math.log(2)
    return summary


def _curve(records: list[dict], data: Prepared, summary: dict) -> bytes:
    """The loss curve as PNG."""
    use_style()
    ax = loss_curve([(r["step"], r["loss"]) for r in records if "loss" in r],
                    [(r["step"], r["val_loss"]) for r in records if "val_loss" in r],
                    floor=summary.get("floor"), start=math.log(data.tokenizer.vocab_size))
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(ax.figure)
    return buffer.getvalue()


def _page(run: Path, records: list[dict], data: Prepared, notes: dict, prompt: str, summary: dict, png: bytes) -> str:
    """The HTML."""
    model = from_dict(ModelConfig, notes["model"])
    samples = "".join(f"<p>After {r['step']:,} steps (validation loss {_loss_at(records, r['step']):.2f}):</p>"
                      f"<blockquote><b class=prompt>{html.escape(prompt)}</b>{html.escape(r['sample'])}</blockquote>"
                      for r in records if "sample" in r)
    noted = run / "alignment.json"
    aligned = as_html(json.loads(noted.read_text())) if noted.exists() else ""
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in _rows(model, data, notes, summary))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(str(run))}</title><style>{STYLE}</style></head><body>
<h1>A language model, from raw text</h1>
<p class=sub>{html.escape(str(run))}: {notes['step']:,} of {notes['train']['steps']:,} steps</p>
<h2>What it learned</h2>
<img alt="Training and validation loss over the steps of the run" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<table>{rows}</table>
<h2>What it writes</h2>
<p>The same prompt at three points of training.</p>
{samples}
{aligned}<details><summary>Configuration</summary><pre>{html.escape(json.dumps(notes, indent=1))}</pre></details>
</body></html>
"""


def _rows(model: ModelConfig, data: Prepared, notes: dict, summary: dict) -> list[tuple[str, str]]:
    """The table under the curve."""
    params = num_params(Transformer(model, device="meta"))
    flops = training_flops_per_token(model)
    rows = [("validation loss", f"{summary['first_loss']:.3f} → {summary['final_loss']:.3f} nats per token")]
    if "floor" in summary:
        rows.append(("best possible, the text's true entropy", f"{summary['floor']:.3f} nats per token"))
    if "bits_per_byte" in summary:
        best = f" (best possible {summary['floor_bits_per_byte']:.3f})" if "floor" in summary else ""
        rows.append(("bits per byte of text", f"{summary['bits_per_byte']:.3f}{best}"))
    return rows + [
        ("model", f"{params:,} parameters: {model.layers} layers, width {model.width}, {model.heads} heads"),
        ("tokenizer", f"{data.tokenizer.vocab_size:,} tokens, {data.train.bytes / data.train.tokens:.2f} bytes each"),
        ("data", f"{data.train.tokens:,} training tokens in {data.train.documents:,} documents"),
        ("trained on", f"{summary['tokens']:,} tokens ({summary['tokens'] / data.train.tokens:.2f} epochs)"),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s = {summary['tokens_per_second'] * flops / 1e9:.0f} GFLOP/s"
                  + (f", {summary['mfu']:.0%} of what matrix products reach here (MFU)" if "mfu" in summary else "")),
        ("precision, device", f"{notes['train']['precision']}, {notes['device']}"),
    ]


def _loss_at(records: list[dict], step: int) -> float:
    """The validation loss measured at a step."""
    return next(r["val_loss"] for r in records if r["step"] == step and "val_loss" in r)


def _median(values: list[float]) -> float:
    """The middle value: a pause in the middle of a run should not count."""
    return sorted(values)[len(values) // 2]
