"""How cost grows: speed against width and depth beside the FLOPs formula, saved memory against batch beside its own.

    python benchmarks/growth.py [--rounds 3]

What a training step keeps for its backward is counted by torch's saved-tensor hooks, every storage once. The formula,
for our LLaMA in float32 with attention that stores no T x S square: for each token and layer, 3C for each of two norms
(its input, the scaled input, its output), 2C + 2G·D for attention (queries, output; keys, values) and H for the logarithms
of its sums, 4F for the feed-forward layer (gate, its activation, up, their product); at the end 3C for the last norm and V
for the softmax over the vocabulary.
"""

import argparse

import torch
from peers import gemm_peak, interleaved, ours
from torch.nn import functional as F

from minillm import ModelConfig, Transformer, preset
from minillm.model.flops import training_flops_per_token


def training_step(config: ModelConfig, batch: int):
    """Forward and backward of one batch."""
    model, ids = Transformer(config), torch.randint(0, config.vocab_size, (batch, config.context + 1))

    def step():
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad()
    return step


def saved_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes of all different storages that autograd keeps, parameters left out."""
    model, ids = Transformer(config), torch.randint(0, config.vocab_size, (batch, config.context + 1))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def formula_bytes(c: ModelConfig, batch: int) -> int:
    """What the docstring says must be kept."""
    layer = 6 * c.width + 2 * c.heads * c.head_size + 2 * c.kv_size * c.head_size + c.heads + 4 * c.ffn_size
    return 4 * batch * c.context * (c.layers * layer + 3 * c.width + c.vocab_size)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    configs = {(depth, width): preset("first", layers=depth, width=width, heads=width // 32, context=128)
               for depth, width in ((2, 128), (4, 128), (8, 128), (4, 64), (4, 256), (4, 384))}
    seconds = interleaved({key: training_step(config, 8) for key, config in configs.items()}, rounds)
    peak = gemm_peak(torch.float32)
    print(f"\nspeed against size, B 8, T 128, fp32, one thread; matrix products reach {peak / 1e9:.0f} GFLOP/s")
    print(f"{'layers':>8}{'width':>8}{'MFLOP/token':>14}{'tokens/s':>12}{'GFLOP/s':>10}{'% of peak':>12}")
    for (depth, width), taken in seconds.items():
        flops, speed = training_flops_per_token(configs[depth, width]), 8 * 128 / taken
        print(f"{depth:>8}{width:>8}{flops / 1e6:>14.2f}{speed:>12,.0f}{speed * flops / 1e9:>10.0f}{100 * speed * flops / peak:>12.0f}")
    config = ours("A", "llama")
    print("\nmemory kept for backward against batch, size A, fp32")
    print(f"{'batch':>8}{'MB kept':>12}{'MB by formula':>16}{'ratio':>8}")
    for batch in (1, 2, 4, 8, 16):
        kept, said = saved_bytes(config, batch), formula_bytes(config, batch)
        print(f"{batch:>8}{kept / 1e6:>12.1f}{said / 1e6:>16.1f}{kept / said:>8.2f}")


if __name__ == "__main__":
    main()
