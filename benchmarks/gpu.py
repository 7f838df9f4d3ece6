"""Training and generation on one CUDA GPU, beside Hugging Face's classes: GPT-2 and a LLaMA of its size.

    python benchmarks/gpu.py [--tables training generation] [--rounds 5] [--steps 10]

A training step is everything: forward, loss, backward, clipping, AdamW. Ours is the Engine's, as `minillm train` takes it;
the others' is a loop with the same autocast, clipping and fused AdamW. Contestants take turns; medians of wall time. MFU is
of the peak in minillm/plan/devices.py where the card is in it, and beside it the share of a measured matrix product.
"""

import argparse
import statistics
import time

import torch
from peers import SIZES, hf_gpt2, hf_llama, ours
from torch.nn import functional as F

from minillm import TrainConfig, Transformer, generate
from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.infer.sampling import Sampling
from minillm.model.flops import training_flops_per_token
from minillm.plan.devices import DEVICES

ROWS, TOKENS, PROMPT, NEW = 16, 1024, 128, 128
VOCABULARY = SIZES["124M"]["vocab_size"]


def wall(jobs: dict, rounds: int) -> dict[str, float]:
    """Median wall seconds of each job over `rounds` turns, after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            job()
            torch.cuda.synchronize()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def our_steps(family: str, steps: int, compiled: bool):
    """Steps of our Engine in bf16."""
    config = TrainConfig(batch_size=ROWS, precision="bf16", device="cuda", compile=compiled, lr=3e-4)
    engine = Engine(ours("124M", family), config)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1))
    batch = Batch(ids[:, :-1].contiguous().cuda(), ids[:, 1:].contiguous().cuda())

    def run():
        for _ in range(steps):
            engine.forward_backward(batch)
            engine.clip(1.0)
            engine.step()
    return run


def their_steps(model, steps: int, compiled: bool):
    """The same steps of another model, in a plain loop."""
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), device="cuda")
    forward = torch.compile(model) if compiled else model

    def run():
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16):
                logits = forward(ids[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return run


def training(rounds: int, steps: int) -> None:
    """Print the training table."""
    name = torch.cuda.get_device_name()
    card = next((card for card in DEVICES.values() if card.name in name.lower().replace("nvidia ", "")), None)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192 ** 3 / wall({"product": lambda: a @ a}, 10)["product"]
    print(f"\ntraining on {name}, torch {torch.__version__}: 12 layers, C 768, T {TOKENS}, B {ROWS}, bf16, medians of {rounds} "
          f"interleaved runs of {steps} steps; a product of 8192² matrices reaches {product / 1e12:.0f} TFLOP/s")
    print(f"{'':<28}{'tokens/s':>10}{'x of HF':>9}{'MFU %':>8}{'% of product':>14}{'peak GB':>9}")
    for family, theirs in (("gpt2", hf_gpt2), ("llama", hf_llama)):
        flops = training_flops_per_token(ours("124M", family), TOKENS)
        for mode in ("eager", "compiled"):
            torch._dynamo.reset()
            jobs = {f"minillm {family}, {mode}": our_steps(family, steps, mode == "compiled"),
                    f"HF {family}, {mode}": their_steps(theirs("124M"), steps, mode == "compiled")}
            memory = {}
            for job_name, job in jobs.items():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                job()
                memory[job_name] = (torch.cuda.max_memory_allocated() - before) / 1e9
            seconds = wall(jobs, rounds)
            peer = list(seconds.values())[1]
            for job_name, taken in seconds.items():
                speed = ROWS * TOKENS * steps / taken
                mfu = f"{100 * speed * flops / card.peak('bf16'):.1f}" if card else ""
                print(f"{job_name:<28}{speed:>10,.0f}{peer / taken:>9.2f}{mfu:>8}{100 * speed * flops / product:>14.1f}"
                      f"{memory[job_name]:>9.1f}", flush=True)
            del jobs


@torch.no_grad()
def generation(rounds: int) -> None:
    """Print the generation table."""
    print(f"\ngeneration, tokens/s, greedy, bf16, prompt of {PROMPT} and {NEW} new tokens, medians of {rounds} interleaved runs")
    print(f"{'':<24}{'batch':>6}{'tokens/s':>10}{'x of HF':>9}")
    model = Transformer(ours("124M", "llama")).to("cuda", torch.bfloat16).eval()
    theirs = hf_llama("124M").to("cuda", torch.bfloat16).eval()
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for batch in (1, 8, 64):
        prompt = torch.randint(0, 1000, (batch, PROMPT), device="cuda")
        seconds = wall({
            "minillm": lambda: generate(model, prompt, NEW, sampling=Sampling(temperature=0)),
            "minillm, compiled": lambda: generate(model, prompt, NEW, sampling=Sampling(temperature=0), compiled=True),
            "HF, dynamic cache": lambda: theirs.generate(prompt, **options),
        }, rounds)
        for name, taken in seconds.items():
            print(f"{name:<24}{batch:>6}{batch * NEW / taken:>10,.0f}{seconds['HF, dynamic cache'] / taken:>9.2f}", flush=True)


def main() -> None:
    """Parse the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=["training", "generation"], choices=["training", "generation"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU, and torch sees none here.")
    torch.manual_seed(0)
    if "training" in options.tables:
        training(options.rounds, options.steps)
    if "generation" in options.tables:
        generation(options.rounds)


if __name__ == "__main__":
    main()
