"""`minillm doctor`: what this machine can do, and whether the course will run on it."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.model.families import preset
from minillm.model.flops import training_flops_per_token
from minillm.model.transformer import Transformer, num_params
from minillm.nn import onednn

NEEDED = ("torch", "numpy", "matplotlib", "einops", "tiktoken", "safetensors", "regex", "jaxtyping", "tyro", "tqdm",
          "cloudpickle", "jupyterlab", "ipywidgets", "nbval")


def examine() -> tuple[list[str], bool]:
    """Lines of a report, and whether everything needed is there."""
    lines, healthy = [], True
    lines.append(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version, healthy = "MISSING: pip install -r requirements.txt", False
        if name == "torch" or version.startswith("MISSING"):
            lines.append(f"{name:<10} {version}")
    if healthy:
        lines.append(f"packages   all {len(NEEDED)} there")
    lines.append(f"cores      {os.cpu_count()}, torch uses {torch.get_num_threads()} threads")
    free = shutil.disk_usage(Path.cwd()).free
    lines.append(f"disk       {free / 1e9:.0f} GB free here" + ("" if free > 1e9 else ": too little, the course needs 1 GB"))
    lines += _devices() + _speed()
    lines.append("verdict    " + ("ready: make run" if healthy and free > 1e9 else "not ready, see above"))
    return lines, healthy and free > 1e9


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024, multiply: Callable = torch.matmul, repeats: int = 8) -> float:
    """Floating-point operations per second of a size x size matrix product: the fastest of some repeats."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best = float("inf")
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        multiply(a, a)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def _devices() -> list[str]:
    """GPUs and ways to talk between ranks."""
    lines = [f"gpu        {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2 ** 30:.0f} GiB"
             for i in range(torch.cuda.device_count())] or ["gpu        none; nothing in the course needs one"]
    if torch.distributed.is_available():
        there = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
        lines.append(f"ranks      torch.distributed with {' and '.join(there) or 'no backend'}")
    return lines


def _speed() -> list[str]:
    """Measured matrix products, and what they mean for the first run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 1024
    rates = {name: matmul_rate(dtype, device, size) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    if device == "cpu" and onednn.helps():  # then the engine takes it
        rates["fp32 by oneDNN"] = matmul_rate(torch.float32, device, size, onednn.product)
    best = rates.get("fp32 by oneDNN", rates["fp32"])
    config = preset("first")
    flops = training_flops_per_token(config)
    params = num_params(Transformer(config, device="meta"))
    lines = ["matmul     " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())]
    lines.append(f"first run  {params:,} parameters, {flops / 1e6:.1f} MFLOP a training token: at most "
                 f"{best / flops:,.0f} tokens/s in fp32")
    return lines
