from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.nn.fp8 import linear8
from minillm.train.precision import Autocast, autocast

SMALL = dict(vocab_size=300, layers=2, width=32, heads=4, context=32, head_dim=None, ffn_width=64)
MODELS = {
    "gpt2": preset("gpt2", **SMALL), "llama": preset("llama-7b", **SMALL), "bloom": preset("bloom", **SMALL),
    "palm": preset("palm", **SMALL, attn_scale=None, rope_dim=None), "qwen3": preset("qwen3-8b", **SMALL | {"kv_heads": 2}),
    "gemma2": preset("gemma2-2b", **SMALL | {"kv_heads": 2, "attn_scale": None, "window": 16}),
    "mixtral": preset("mixtral-8x7b", **SMALL | {"kv_heads": 2, "experts": 4}),
}


def forward_backward(config, mode):
    """Logits and gradients under a context, with the loss scaled so that fp16 has something to say."""
    model = Transformer(config, seed=0)
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    with mode:
        logits = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    (1024 * loss).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_by_hand_is_torchs(name, dtype):
    ours, our_grads = forward_backward(MODELS[name], Autocast(dtype))
    theirs, their_grads = forward_backward(MODELS[name], torch.autocast("cpu", dtype))
    full, _ = forward_backward(MODELS[name], nullcontext())
    # the same operations in the same formats, so no tolerance
    assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)
    assert all(torch.equal(our_grads[n], their_grads[n]) for n in their_grads)
    assert all(grad.dtype == torch.float32 for grad in our_grads.values())
    assert not torch.equal(ours.float(), full)


def test_which_operations_are_wide():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    narrow = x.bfloat16()
    targets = torch.tensor([0, 1, 2, 3])
    for mode in (Autocast(torch.bfloat16), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert (x @ x).dtype == F.linear(x, x).dtype == torch.bfloat16
            assert (x + x).dtype == F.softmax(x, -1).dtype == torch.float32  # as it comes
            assert (narrow + narrow).dtype == torch.bfloat16
            assert F.cross_entropy(narrow, targets).dtype == torch.float32
            assert (x.double() @ x.double()).dtype == torch.float64


def test_fp8_is_in_the_blocks_and_not_in_the_head():
    model = Transformer(MODELS["llama"], seed=0)
    seen = []
    linear = F.linear

    def spy(x, weight, bias=None):
        seen.append(weight)
        return linear8(x, weight, bias)

    ids = torch.arange(32)[None]
    with Autocast(torch.bfloat16, linear=spy, keep=(model.head.weight,)), torch.no_grad():
        watched = model(ids)
    with autocast("fp8", model, "cpu"), torch.no_grad():
        assert torch.equal(model(ids), watched)
    assert len(seen) == 2 * 7 and F.linear is linear  # q, k, v, out, gate, up, down, twice
    tied = Transformer(replace(MODELS["llama"], tied=True), seed=0)
    with Autocast(torch.bfloat16, linear=spy, keep=(tied.head.weight,)), torch.no_grad():
        tied(ids)
    assert len(seen) == 4 * 7


def test_fp8_is_near_bf16():
    model = Transformer(MODELS["llama"], seed=0)
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    errors = {}
    with torch.no_grad():
        exact = model(ids, return_hidden=True).hidden[-1]
        for precision in ("bf16", "fp8"):
            with autocast(precision, model, "cpu"):
                errors[precision] = float((model(ids, return_hidden=True).hidden[-1].float() - exact).norm() / exact.norm())
    # e4m3's neighbours are 1/8 apart and bf16's 1/128: roundings of random sign, so about 16 times the error
    assert 4 < errors["fp8"] / errors["bf16"] < 40 and errors["fp8"] < 2 ** -4
