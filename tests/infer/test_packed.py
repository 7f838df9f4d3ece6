import pytest
import torch

from minillm.infer.generate import generate
from minillm.infer.packed import PackedLinear, packed
from minillm.infer.sampling import Sampling
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.peft.lora import LoraConfig, add_lora

IDS = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(1))


def model(family="gpt2", **changes):
    return Transformer(preset(family, vocab_size=256, layers=2, width=64, heads=4, context=64, **changes), seed=2).eval()


def layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])  # of the largest; 24 and 8 bits, two layers
@pytest.mark.parametrize("family", ["gpt2", "llama-7b", "mixtral-8x7b"])
def test_packed_weights_give_the_same_logits(family, dtype, bound):
    dense = model(family, **({} if family == "gpt2" else {"ffn_width": 96, "kv_heads": 2})).to(dtype)
    with torch.no_grad():
        for parameter in dense.parameters():  # biases are zero at first, and must be seen to be added
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(dtype) / 8)
        expected, got = dense(IDS), packed(dense, smallest=0)(IDS)
    assert len(layers(packed(dense, smallest=0))) == sum(type(m) is torch.nn.Linear for m in dense.modules()) > 12
    assert got.dtype == dtype and (got - expected).abs().max() <= bound * expected.abs().max()


def test_only_large_weights_are_packed_and_the_model_stays_as_it_was():
    dense = model()
    before = {name: p.clone() for name, p in dense.named_parameters()}
    assert layers(packed(dense)) == [] and layers(packed(dense, smallest=64 * 256 - 1)) == [
        f"blocks.{i}.ffn.{part}" for i in (0, 1) for part in ("up", "down")] + ["head"]
    assert layers(dense) == [] and all(torch.equal(p, before[n]) and p.requires_grad for n, p in dense.named_parameters())


def test_packed_models_write_the_same_tokens():
    dense = model("llama-7b", ffn_width=96, kv_heads=2)
    blocked = packed(dense, smallest=0)
    plain, *others = (generate(m, IDS, 20, sampling=Sampling(temperature=0)) for m in (dense, blocked, packed(blocked)))
    assert torch.equal(plain, others[0]) and torch.equal(plain, others[1])


def test_adapters_keep_working():
    """A hook on a layer would be lost with the layer."""
    dense = model()
    add_lora(dense, LoraConfig(rank=2, targets=("q", "up")), seed=4)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("B"):
                parameter.fill_(0.1)
        expected, got = dense(IDS), packed(dense, smallest=0)(IDS)
    assert (expected - model()(IDS)).abs().max() > 0.1  # the adapter is seen
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_packed_weights_are_not_for():
    with pytest.raises(ValueError, match="this model is in torch.float64 on cpu"):
        packed(model().double())
    blocked = packed(model(), smallest=0)
    with pytest.raises(ValueError, match="packed in torch.float32 were given torch.bfloat16: convert the model, then pack"), \
            torch.autocast("cpu", torch.bfloat16):
        blocked(IDS)
    with pytest.raises(ValueError, match="save the model that they were made from"):
        blocked.state_dict()
    with pytest.raises(ValueError, match="compiled with packed weights"):
        generate(blocked, IDS, 2, compiled=True)
    assert not blocked(IDS).requires_grad
