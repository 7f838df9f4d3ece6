"""Every family small enough to train on four ranks, and ten steps of training, dense or split: what the tests of tensor
and sequence parallelism share."""

from dataclasses import replace

import torch
import torch.distributed as dist

from minillm.config import ModelConfig
from minillm.model import families
from minillm.model.sharding import sharding_table
from minillm.model.transformer import Transformer
from minillm.parallel.tensor_parallel import gather_dense, global_norm, vocabulary_cross_entropy
from minillm.train.optim import decay_groups

# 61 tokens and 50 hidden units divide by none of 2 and 4 ranks evenly (50 by 2).
SMALL = dict(vocab_size=61, layers=2, width=32, heads=4, ffn_width=50, context=16)
LLAMA = replace(families.llama, **SMALL, kv_heads=2)
FEW = ("gpt2", "bloom, 12 heads", "falcon", "llama3", "gemma2", "biases everywhere")  # one of each kind
CONFIGS: dict[str, ModelConfig] = {
    "gpt1": replace(families.gpt1, **SMALL), "gpt2": replace(families.gpt2, **SMALL),
    "gpt3": replace(families.gpt3, **SMALL, window=3), "opt": replace(families.opt, **SMALL),
    "bloom": replace(families.bloom, **SMALL), "bloom, 12 heads": replace(families.bloom, **SMALL | dict(heads=12), head_dim=4),
    "gptj": replace(families.gptj, **SMALL, rope_dim=4), "neox": replace(families.neox, **SMALL, rope_dim=4),
    "palm": replace(families.palm, **SMALL, head_dim=6), "falcon": replace(families.falcon, **SMALL),
    "falcon 40b": replace(families.falcon_40b, **SMALL, kv_heads=2), "chatglm": replace(families.chatglm, **SMALL),
    "llama": replace(families.llama, **SMALL), "llama2": replace(families.llama2, **SMALL, tied=True),
    "llama3": replace(families.llama3, **SMALL, kv_heads=2),
    "llama 3.1": replace(families.llama31, **SMALL, kv_heads=2, rope_context=8),
    "mistral": replace(families.mistral, **SMALL, kv_heads=2, window=3), "qwen2": replace(families.qwen2, **SMALL, kv_heads=1),
    "qwen3": replace(families.qwen3, **SMALL, kv_heads=2, head_dim=6), "glm": replace(families.glm, **SMALL, kv_heads=2, rope_dim=4),
    "glm4": replace(families.glm4, **SMALL, kv_heads=2, rope_dim=4), "gemma": replace(families.gemma, **SMALL, head_dim=6),
    "gemma2": replace(families.gemma2, **SMALL, kv_heads=2, head_dim=6, window=3),
    "gemma3": replace(families.gemma3, **SMALL, head_dim=6, window=3),
    "the course's own": replace(families.first, **SMALL),
    "waves": replace(LLAMA, pos="sinusoidal"), "no positions": replace(LLAMA, pos="none"),
    "t5's distances": replace(LLAMA, pos="relative", relative_buckets=6, relative_distance=9),
    "biases everywhere": replace(LLAMA, kv_heads=1, norm="layer", qk_norm="head", bias=("qkv", "out", "mlp", "norm", "head")),
}


def random_model(config):
    """A dense model in float64 whose every parameter is random: zeros and ones would hide mistakes."""
    model, generator = Transformer(config).double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def batch(step):
    """Inputs and targets, some of which do not count."""
    text = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(step))
    ids, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, step % 8], targets[1, :2] = -100, -100
    return ids, targets


def train(model, config, group=None, steps=10):
    """Losses and norms of every step, the gradients of the first, and the weights after the last: dense on every rank."""
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, grads = [], [], None
    for step in range(steps):
        ids, targets = (tensor.to(model.embed.weight.device) for tensor in batch(step))
        count = (targets != -100).sum()
        if group is None:
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        else:
            loss = vocabulary_cross_entropy(model(ids), targets, config.vocab_size, group) / count
        loss.backward()
        mine = {name: parameter.grad for name, parameter in model.named_parameters()}
        if group is None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in mine.values()]))
            grads = grads or {name: grad.clone() for name, grad in mine.items()}
        else:
            norm = global_norm(model, group)
            grads = grads or gather_dense(model, group, mine)
        losses.append(loss.detach())
        norms.append(norm)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict() if group is None else gather_dense(model, group)
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)} | {f"{name}.grad": grad for name, grad in grads.items()} | {
        name: tensor.clone() for name, tensor in state.items()}


def train_split(me, apply, steps):
    """Training of each family (name -> steps), cut by `apply`; the device, and what rank 0 sees, which all ranks saw."""
    seen = {}
    for name, count in steps.items():
        config = CONFIGS[name]
        model = apply(random_model(config).to(me.device), me.group, sharding_table(config))
        seen[name] = train(model, config, me.group, count)
    losses = torch.cat([result["losses"] for result in seen.values()])
    others = [torch.empty_like(losses) for _ in range(me.size)]
    dist.all_gather(others, losses, group=me.group)
    assert all(torch.equal(losses, other) for other in others)  # an all-reduce gives every rank the same bits
    mine = {name: {key: tensor.cpu() for key, tensor in result.items()} for name, result in seen.items()}
    return (me.device, mine) if me.rank == 0 else None


def assert_like_dense(results, steps):
    """Losses, norms, gradients and weights of split training are those of dense training on the same kind of device."""
    device, results = results
    assert results.keys() == steps.keys() and results
    for name, count in steps.items():
        dense = train(random_model(CONFIGS[name]).to(device.type), CONFIGS[name], steps=count)
        dense = {key: tensor.cpu() for key, tensor in dense.items()}
        assert results[name].keys() == dense.keys()
        for key, wanted in dense.items():
            # float64: only the order of summation differs. A key bias without rotation has a gradient of 0 up to rounding
            # (1e-17), which AdamW divides by eps = 1e-8: ten steps of lr = 0.01 carry that to 1e-11 in the weight.
            atol = 1e-12 if key.endswith(".grad") or key in ("losses", "norms") else 1e-10
            torch.testing.assert_close(results[name][key], wanted, rtol=1e-10, atol=atol, msg=lambda text: f"{name}, {key}: {text}")
