"""Data and tensor parallelism on two ranks beside torch's own, and what the wrappers cost where there is one rank.

    python benchmarks/parallel.py [--rounds 11] [--size A] [--memory-size B]

A step is forward, loss, backward, clipping by the global norm and fused AdamW, in float32 on CPUs over gloo. "ours" is the
Engine; "--engine torch" the same engine on DDP and DTensor; the plain loops use DDP, or parallelize_module with DTensors, as
their own documentation does. Contestants take turns, step by step, in the same ranks; medians. CPU time is that of all
threads of a rank, averaged over the ranks; where other work goes on, believe it before wall time. Memory is measured in
ranks of their own: `held` counts the storages of weights, gradients with our buckets, and optimizer; `peak` is how far the
resident memory of a rank grew at most, activations, torch's buckets and gloo's buffers too.
"""

import argparse
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from peers import BATCH, ours
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from minillm.config import ParallelConfig, TrainConfig
from minillm.data.loader import Batch
from minillm.model.sharding import sharding_table
from minillm.model.transformer import Transformer
from minillm.parallel.data_parallel import Overlapped
from minillm.parallel.launch import launch
from minillm.parallel.mesh import build_mesh
from minillm.parallel.tensor_parallel import apply_tensor_parallel, global_norm, vocabulary_cross_entropy
from minillm.torch_engine import build_engine, parallelize
from minillm.train.loss import next_token_loss
from minillm.train.optim import decay_groups

CONTESTS = {"one": ("plain", "parallel path"), "dp": ("ours", "--engine torch", "DDP in a plain loop"),
            "tp": ("ours", "--engine torch", "DTensor in a plain loop")}
TITLES = {"one": "one rank", "dp": "dp = 2: our buckets and DDP's", "tp": "tp = 2: our split model and DTensor's"}


def loop(model, loss, clip, weights, finish=lambda: None, kinds=(torch.Tensor,)):
    """A training step written out, and the tensors that it keeps."""
    named = [(name, p) for name, p in model.named_parameters()]
    groups = [group | {"params": chosen} for group in decay_groups(named, 0.1) for kind in kinds
              if (chosen := [p for p in group["params"] if isinstance(p, DTensor) == (kind is DTensor)])]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)

    def step(batch):
        (loss(model, batch) / batch.count).backward()
        finish()
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, lambda: (weights, optimizer)


def contestant(name: str, contest: str, config, rows: int):
    """(a step on this rank, what it keeps)"""
    torch.backends.mkldnn.enabled = False  # the plain loops have torch's products, so the engine gets them too
    if name in ("ours", "--engine torch"):
        parallel = ParallelConfig(**{contest: 2}, engine="torch" if "torch" in name else "ours")
        engine = build_engine(config, TrainConfig(batch_size=rows, lr=3e-4, device="cpu"), parallel)

        def step(batch):
            engine.forward_backward(batch)
            engine.clip(1.0)
            engine.step()
        return step, lambda: (list(engine.weights.values()), engine.optimizer)
    model, group = Transformer(config), dist.group.WORLD
    table, weights = sharding_table(config), list(model.parameters())
    if name == "parallel path":
        apply_tensor_parallel(model, group, table)
        replicas = Overlapped(dict(model.named_parameters()), group)
        return loop(model, lambda m, b: vocabulary_cross_entropy(m(b.ids), b.targets, config.vocab_size, group),
                    lambda: clip_grads_with_norm_(weights, 1.0, global_norm(model, group)), weights, replicas.finish)
    if name == "DTensor in a plain loop":
        parallelize(model, build_mesh(dp=1, tp=2)["tp"], table)
        weights = list(model.parameters())
        with_loss, keeps = loop(model, lambda m, b: next_token_loss(m(b.ids), b), lambda: clip_mixed(weights), weights,
                                kinds=(DTensor, torch.Tensor))

        def parallel_step(batch):
            with loss_parallel():
                with_loss(batch)
        return parallel_step, keeps
    forward = DistributedDataParallel(model) if "DDP" in name else model
    return loop(forward, lambda m, b: next_token_loss(m(b.ids), b), lambda: clip_grad_norm_(weights, 1.0), weights)


def clip_mixed(weights) -> None:
    """torch's functions take DTensors or tensors, not both at once."""
    kinds = [[w.grad for w in weights if isinstance(w, DTensor) == split] for split in (True, False)]
    norm = torch.stack([get_total_norm(kinds[0]).full_tensor(), get_total_norm(kinds[1])]).norm()
    for gradients in kinds:
        torch._foreach_mul_(gradients, min(1.0, 1.0 / (float(norm) + 1e-6)))


def batch_of(me, contest: str, config, rows: int) -> Batch:
    """This rank's share: with dp half of the rows."""
    ids = torch.randint(0, config.vocab_size, (rows, config.context + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).part(me.rank if contest == "dp" else 0, me.size if contest == "dp" else 1)


def timed(me, contest: str, names, config, rows: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of every step of every contestant on this rank, after two to warm up."""
    batch = batch_of(me, contest, config, rows)
    steps, taken = {name: contestant(name, contest, config, rows)[0] for name in names}, {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            dist.barrier()
            start = time.process_time(), time.perf_counter()
            step(batch)
            if turn > 1:
                taken[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return taken


def remembered(me, contest: str, name: str, config, rows: int) -> tuple[float, float]:
    """MB that are held after a backward, and at the peak of two steps."""
    batch = batch_of(me, contest, config, rows)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step, keeps = contestant(name, contest, config, rows)
    step(batch)
    held, (weights, optimizer) = {}, keeps()
    forget, optimizer.zero_grad = optimizer.zero_grad, lambda set_to_none=True: None
    step(batch)
    for weight in weights:
        for tensor in (weight, weight.grad, *optimizer.state[weight].values()):
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    forget()
    return sum(held.values()) / 1e6, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6


def table(contest: str, configs: dict, options) -> None:
    """Measure and print one contest."""
    names, ranks = CONTESTS[contest], 1 if contest == "one" else 2
    config, rows = configs[options.size], BATCH[options.size]
    found = launch(timed, ranks, contest, names, config, rows, options.rounds, backend="gloo", timeout=600)
    # a step's CPU time is the ranks' mean, its wall time that of the slowest
    cpu = {name: statistics.median(statistics.mean(t[0] for t in turn) for turn in zip(*(rank[name] for rank in found))) for name in names}
    wall = {name: statistics.median(max(t[1] for t in turn) for turn in zip(*(rank[name] for rank in found))) for name in names}
    large, few = configs[options.memory_size], BATCH[options.memory_size]
    memory = {name: [max(part) for part in zip(*launch(remembered, ranks, contest, name, large, few, backend="gloo", timeout=600))]
              for name in names}
    print(f"\n{TITLES[contest]}; {options.size}: {config.layers} layers, C {config.width}, T {config.context}, B {rows}, "
          f"medians of {options.rounds} interleaved steps; memory of {options.memory_size}")
    print(f"{'':<26}{'CPU ms':>10}{'x':>8}{'wall ms':>10}{'x':>8}{'held MB':>10}{'peak MB':>10}")
    for name in names:
        print(f"{name:<26}{1e3 * cpu[name]:>10.0f}{cpu[name] / cpu[names[0]]:>8.3f}{1e3 * wall[name]:>10.0f}"
              f"{wall[name] / wall[names[0]]:>8.3f}{memory[name][0]:>10.0f}{memory[name][1]:>10.0f}", flush=True)


def main() -> None:
    """Parse the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--size", default="A", choices=BATCH)
    parser.add_argument("--memory-size", default="B", choices=BATCH)
    options = parser.parse_args()
    configs = {size: replace(ours(size, "llama"), kv_heads=2) for size in {options.size, options.memory_size}}
    for contest in CONTESTS:
        table(contest, configs, options)


if __name__ == "__main__":
    main()
