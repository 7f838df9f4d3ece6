"""The models that benchmarks compare with, all of one size, and how they are measured.

Contestants take turns, so that a slow moment of the machine meets all of them, and a table has medians of process time.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minillm.config import ModelConfig
from minillm.model.families import preset

# The two sizes of all tables on CPUs, and GPT-2's for GPUs; batch is what training uses.
SIZES = {"A": dict(layers=4, heads=4, width=128, context=256, vocab_size=1024),
         "B": dict(layers=6, heads=6, width=384, context=256, vocab_size=4096),
         "124M": dict(layers=12, heads=12, width=768, context=1024, vocab_size=50304)}
HIDDEN = {"A": 344, "B": 1024, "124M": 2048}
BATCH = {"A": 16, "B": 8}
ENDS = dict(bos_token_id=0, eos_token_id=None)


def ours(size: str, family: str) -> ModelConfig:
    """Our configuration of a size: LLaMA with a tied head, or GPT-2."""
    if family == "gpt2":
        return preset("gpt2", **SIZES[size])
    return replace(preset("llama-7b", **SIZES[size]), ffn_width=HIDDEN[size], tied=True)


def hf_llama(size: str) -> nn.Module:
    """Hugging Face's LLaMA of the same shape."""
    c = ours(size, "llama")
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        intermediate_size=c.ffn_width, max_position_embeddings=c.context, tie_word_embeddings=True, **ENDS))


def hf_gpt2(size: str) -> nn.Module:
    """Hugging Face's GPT-2 of the same shape, without dropout."""
    c = ours(size, "gpt2")
    return GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
                                      n_positions=c.context, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **ENDS))


class PlainGPT(nn.Module):
    """GPT-2 the way a single-file trainer writes it: fused qkv, SDPA, loss outside; with GPT-2's biases and its gelu, or
    without biases and with the exact gelu, which is faster but reads no published checkpoint."""

    def __init__(self, size: str, published: bool = False):
        super().__init__()
        self.gelu = "tanh" if published else "none"
        c = self.config = ours(size, "gpt2")
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.width), nn.Embedding(c.context, c.width)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(c.width, bias=published), "qkv": nn.Linear(c.width, 3 * c.width, bias=published),
            "out": nn.Linear(c.width, c.width, bias=published), "norm2": nn.LayerNorm(c.width, bias=published),
            "up": nn.Linear(c.width, 4 * c.width, bias=published), "down": nn.Linear(4 * c.width, c.width, bias=published),
        }) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.width, bias=published), nn.Linear(c.width, c.vocab_size, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        """Logits (B, T, V)."""
        rows, tokens = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(tokens))
        for b in self.blocks:
            q, k, v = (t.view(rows, tokens, self.config.heads, -1).transpose(1, 2)
                       for t in b["qkv"](b["norm1"](x)).split(self.config.width, dim=2))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            x = x + b["out"](mixed)
            x = x + b["down"](F.gelu(b["up"](b["norm2"](x)), approximate=self.gelu))
        return self.head(self.norm(x))


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median process seconds of each job over `rounds` turns, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if turn:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def gemm_peak(dtype: torch.dtype) -> float:
    """Measured operations per second of a 1024 x 1024 matrix product on one thread."""
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024 ** 3 / interleaved({"gemm": lambda: [a @ a for _ in range(4)]}, 5)["gemm"] * 4
