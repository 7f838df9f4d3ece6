"""Small models of several families in float64, and changes that make an adapter do something."""

import torch

from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.peft.freeze import trained_parameters

FAMILIES = {"first": dict(kv_heads=2), "gpt2": {}, "bloom-560m": {}, "gemma2-2b": dict(kv_heads=2, head_dim=8), "chatglm-6b": {},
            "glm-4-9b-0414": dict(kv_heads=2, rope_dim=4), "qwen3-8b": dict(kv_heads=2, head_dim=8), "olmo2-7b": {}}


def small(family="first", **changes) -> Transformer:
    sizes = dict(vocab_size=67, layers=2, width=32, heads=4, ffn_width=48, context=64)
    return Transformer(preset(family, **sizes | FAMILIES[family] | changes), seed=1).double().eval()


def ids(rows=2, length=9, seed=0):
    return torch.randint(0, 67, (rows, length), generator=torch.Generator().manual_seed(seed))


def shake(model, size=0.1):
    """Add noise to all that is trained."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trained_parameters(model).values():
        parameter.data += (size * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model


def gradients_flow_only_where_they_should(model):
    model(ids()).square().sum().backward()
    trained = trained_parameters(model)
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
