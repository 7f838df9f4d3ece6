"""Training speed beside Hugging Face's classes and a plain single-file GPT, on one thread.

    python benchmarks/training.py [--size A|B] [--precision fp32 bf16] [--mode eager compiled] [--rounds 5]

A step is forward, loss, backward and fused AdamW; ours is the Engine's. tokens/s in process time; x of the family's peer; % of
the measured matrix-product peak (6N + 12·L·C·T operations a token); % of the floor: the speed of the model's matrix products
and attention alone, forward and backward, by torch. Where the Engine computes products in float32 by oneDNN
(minillm/nn/onednn.py), it may go below that floor, and the rows "by torch" are of the same models without.
"""

import argparse

import torch
from peers import BATCH, PlainGPT, gemm_peak, hf_gpt2, hf_llama, interleaved, ours
from torch.nn import functional as F

from minillm import TrainConfig
from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.model.flops import training_flops_per_token
from minillm.nn.onednn import helps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def our_step(size: str, family: str, precision: str, compiled: bool, onednn: bool = True):
    """A function that trains one batch by the Engine. onednn: for products in float32, where the Engine would."""
    engine = Engine(ours(size, family), TrainConfig(batch_size=BATCH[size], precision=precision, compile=compiled, device="cpu"))
    ids = torch.randint(0, ours(size, family).vocab_size, (BATCH[size], 257))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step():
        torch.backends.mkldnn.enabled = onednn
        engine.forward_backward(batch)
        engine.step()
        torch.backends.mkldnn.enabled = True
    return step


def training_step(model, size: str, precision: str, compiled: bool):
    """The same of another model, in a plain loop."""
    ids = torch.randint(0, ours(size, "llama").vocab_size, (BATCH[size], 257))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = forward(ids[:, :-1])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def floor_step(size: str, family: str, precision: str):
    """The model's matrix products and attention, forward and backward, and nothing else."""
    c, dtype = ours(size, family), DTYPES[precision]
    rows = BATCH[size] * 256
    shapes = [(c.width, c.width)] * 4 + [(c.ffn_size, c.width)] * (2 if c.gated else 1) + [(c.width, c.ffn_size)]
    weights = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    head = torch.randn(c.vocab_size, c.width, dtype=dtype, requires_grad=True)
    inputs = {n: torch.randn(rows, n, dtype=dtype, requires_grad=True) for n in (c.width, c.ffn_size)}
    grads = {n: torch.randn(rows, n, dtype=dtype) for n in (c.width, c.ffn_size, c.vocab_size)}
    qkv = [torch.randn(BATCH[size], c.heads, 256, c.head_size, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(qkv[0])

    def step():
        for _ in range(c.layers):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight).backward(grads[weight.shape[0]])
            F.scaled_dot_product_attention(*qkv, is_causal=True).backward(grad)
        F.linear(inputs[c.width], head).backward(grads[c.vocab_size])
    return step


def table(size: str, precision: str, mode: str, rounds: int) -> None:
    """Measure and print one table."""
    compiled = mode == "compiled"
    others = {"HF GPT-2": hf_gpt2(size), "plain GPT": PlainGPT(size), "plain, as GPT-2": PlainGPT(size, published=True),
              "HF Llama": hf_llama(size)}
    jobs = {name: training_step(model, size, precision, compiled) for name, model in others.items()}
    for family in ("gpt2", "llama"):
        jobs[f"minillm {family}"] = our_step(size, family, precision, compiled)
        if precision == "fp32" and not compiled and helps():
            jobs[f"{family}, by torch"] = our_step(size, family, precision, compiled, onednn=False)
    jobs |= {f"floor {family}": floor_step(size, family, precision) for family in ("gpt2", "llama")}
    seconds = interleaved(jobs, rounds)
    peak, tokens = gemm_peak(DTYPES[precision]), BATCH[size] * 256
    c = ours(size, "llama")
    print(f"\ntraining, {size}: {c.layers} layers, C {c.width}, T 256, B {BATCH[size]}, {precision}, {mode}, one thread, "
          f"medians of {rounds} interleaved runs; matrix products reach {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':<16}{'tokens/s':>10}{'x of peer':>12}{'% of peak':>12}{'% of floor':>12}")
    for name in ("minillm gpt2", "gpt2, by torch", "HF GPT-2", "plain GPT", "plain, as GPT-2", "minillm llama", "llama, by torch", "HF Llama"):
        if name not in jobs:
            continue
        family = "llama" if "lama" in name else "gpt2"
        peer = {"HF GPT-2": "", "HF Llama": ""}.get(name, f"HF {'Llama' if family == 'llama' else 'GPT-2'}")
        speed = tokens / seconds[name]
        share = 100 * speed * training_flops_per_token(ours(size, family)) / peak
        ratio = f"{seconds[peer] / seconds[name]:.2f}" if peer else ""
        print(f"{name:<16}{speed:>10,.0f}{ratio:>12}{share:>12.0f}{100 * seconds['floor ' + family] / seconds[name]:>12.0f}")
    plain = "gpt2, by torch" if "gpt2, by torch" in seconds else "minillm gpt2"
    print(f"{plain} is {seconds['plain GPT'] / seconds[plain]:.2f} x the plain GPT, and "
          f"{seconds['plain, as GPT-2'] / seconds[plain]:.2f} x one with GPT-2's biases and gelu", flush=True)


def main() -> None:
    """Parse the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.size:
        for precision in options.precision:
            for mode in options.mode:
                torch.manual_seed(0)
                table(size, precision, mode, options.rounds)


if __name__ == "__main__":
    main()
