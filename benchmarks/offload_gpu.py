"""One GPU with less memory than AdamW's states need: trained whole it fails, with ZeRO-Offload and ZeRO-Infinity it goes on.

    python benchmarks/offload_gpu.py [--device cuda|cpu] [--layers 16] [--steps 5]

The same model and batches three times: whole without a limit, whole under the limit (which must run out of memory), and
offloaded under it. The limit is half of the peak of the first.
Prints losses, the GPU's peak, and the fastest step. Exits with 1 unless all of it is as said. On a CPU there is no limit.
"""

import argparse
import gc
import tempfile
import time

import torch
from torch.nn import functional as F

from minillm import ModelConfig, TrainConfig, Transformer
from minillm.model.families import preset
from minillm.model.transformer import num_params
from minillm.parallel.offload import Infinity, Offload
from minillm.train.build import build_optimizer
from minillm.train.master_weights import MasterWeights

ROWS, CONTEXT = 4, 256
PLAN = TrainConfig(lr=3e-4, precision="bf16", master_weights=True)


def whole(model, folder):
    """Everything on the GPU: (optimizer, finish, step)."""
    masters = MasterWeights(model, torch.bfloat16, "half")
    optimizer = build_optimizer(masters.named_parameters(), PLAN)

    def step():
        masters.step(optimizer)
        model.zero_grad()
    return lambda: None, step


def offloaded(make):
    """States elsewhere."""
    def prepare(model, folder):
        zero = make(model, folder)
        optimizer = zero.build_optimizer(PLAN)
        return zero.finish, lambda: zero.step(optimizer)
    return prepare


WAYS = {"whole": whole,
        "Offload": offloaded(lambda model, folder: Offload(model, None, dtype=torch.bfloat16)),
        "Infinity": offloaded(lambda model, folder: Infinity(model, None, folder, dtype=torch.bfloat16))}


def train(way: str, weights: dict, config: ModelConfig, device: str, steps: int) -> dict:
    """Losses, peak bytes on the GPU, and seconds of the fastest step."""
    model = Transformer(config, device="meta")
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    model.head.weight = model.embed.weight
    with tempfile.TemporaryDirectory() as folder:
        finish, step = WAYS[way](model.to(device), folder)
        losses, seconds = [], []
        for number in range(steps):
            begun = time.perf_counter()
            ids = torch.randint(config.vocab_size, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(number)).to(device)
            loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            finish()
            step()
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"losses": losses, "peak": peak, "seconds": min(seconds)}


def attempt(way: str, limit: int | None, *args) -> dict | None:
    """Train with at most so many bytes; None when they are not enough."""
    gc.collect()  # models and their hooks refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit / total)
    try:
        return train(way, *args)
    except torch.OutOfMemoryError:
        return None


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    config = preset("gpt2", vocab_size=8192, layers=options.layers, width=1024, heads=16, context=CONTEXT)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in Transformer(config).state_dict().items()}
    size, runs = num_params(Transformer(config, device="meta")), {}
    where = (weights, config, options.device, options.steps)
    runs["whole, no limit"] = attempt("whole", None, *where)
    limit = runs["whole, no limit"]["peak"] // 2
    for way in WAYS:
        runs[f"{way}, limit"] = attempt(way, limit, *where)
    print(f"{size / 1e6:.0f}M parameters, {options.steps} steps of {ROWS} x {CONTEXT} tokens; states of 16 bytes: "
          f"{16 * size / 2 ** 30:.2f} GiB; limit {limit / 2 ** 30:.2f} GiB")
    for name, run in runs.items():
        print(f"{name:<18}", "out of memory" if run is None else
              f"peak {run['peak'] / 2 ** 30:5.2f} GiB   {run['seconds']:6.3f} s a step   "
              f"losses {' '.join(f'{loss:.4f}' for loss in run['losses'])}")
    free, *kept = runs["whole, no limit"], runs["Offload, limit"], runs["Infinity, limit"]
    # bf16 weights: another rounding of AdamW's float32 on the host may move a weight by its last of 8 bits
    same = all(run and max(abs(a - b) for a, b in zip(run["losses"], free["losses"])) < 0.02 for run in kept)
    alike = all(kept) and kept[0]["losses"] == kept[1]["losses"]
    failed = options.device != "cuda" or runs["whole, limit"] is None
    print(f"whole fails under the limit: {failed}; same losses: {same}; Offload and Infinity to the last bit: {alike}")
    return 0 if same and alike and failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
