"""Generation speed beside Hugging Face's generate: greedy, float32, one thread, prompt of 32 and 192 new tokens.

    python benchmarks/generation.py [--size A|B] [--rounds 3]

The floor is torch's products with every weight alone, which at batch 1 means reading every weight once a token; packed weights
are read by another kernel and may go below it.
"""

import argparse
import logging

import torch
from peers import hf_llama, interleaved, ours
from torch.nn import functional as F

from minillm import Transformer, generate
from minillm.infer.packed import packed
from minillm.infer.sampling import Sampling

NEW = 192


def jobs_of(size: str, batch: int) -> dict:
    """The contestants at one size and batch."""
    model, theirs = Transformer(ours(size, "llama")).eval(), hf_llama(size).eval()
    blocked = packed(model)
    weights = [p.detach() for p in model.parameters() if p.ndim == 2]
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1]) for w in weights}
    prompt = torch.randint(0, 1000, (batch, 32))
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return {
        "minillm": lambda: generate(model, prompt, NEW, sampling=Sampling(temperature=0)),
        "minillm, compiled": lambda: generate(model, prompt, NEW, sampling=Sampling(temperature=0), compiled=True),
        "minillm, packed": lambda: generate(blocked, prompt, NEW, sampling=Sampling(temperature=0)),
        "HF, dynamic cache": lambda: theirs.generate(prompt, **options),
        "HF, static cache": lambda: theirs.generate(prompt, cache_implementation="static", disable_compile=True, **options),
        "floor": lambda: [F.linear(inputs[w.shape[1]], w) for _ in range(NEW) for w in weights],
        "minillm, no cache": lambda: generate(model, prompt, 24, sampling=Sampling(temperature=0), cached=False),
    }


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(f"\ngeneration, tokens/s, one thread, medians of {options.rounds} interleaved runs")
    print(f"{'':<22}{'size':>5}{'batch':>6}{'tokens/s':>10}{'x of HF':>9}{'% of floor':>12}")
    for size in options.size:
        for batch in (1, 8):
            with torch.no_grad():
                seconds = interleaved(jobs_of(size, batch), options.rounds)
            best = min(seconds["HF, dynamic cache"], seconds["HF, static cache"])
            for name, taken in seconds.items():
                tokens = batch * (24 if name == "minillm, no cache" else NEW)
                speed, theirs = tokens / taken, batch * NEW / best
                print(f"{name:<22}{size:>5}{batch:>6}{speed:>10,.0f}{speed / theirs:>9.2f}"
                      f"{100 * speed * seconds['floor'] / (batch * NEW):>12.0f}", flush=True)


if __name__ == "__main__":
    main()
