import pytest
import torch
from torch.nn import functional as F

from minillm.config import TrainConfig
from minillm.data.loader import Batch
from minillm.engine import Engine
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.nn import onednn
from minillm.train.precision import autocast

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture
def used(monkeypatch):
    """The shapes that go to oneDNN, on a machine that says it helps."""
    found, product = [], onednn.product
    monkeypatch.setattr(onednn, "_amd_with_mkl", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 64 * 8 * 8)
    monkeypatch.setattr(onednn, "product", lambda x, weight, bias=None: found.append((*x.shape, len(weight))) or product(x, weight, bias))
    return found


def drawn(*shapes, **options):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
def test_products_and_gradients_are_those_of_exact_arithmetic(used, biased):
    """float32 sums of n products are off by at most n half-ulps (2^-24) of the sum of their sizes, in whatever order."""
    x, weight, bias, grad = drawn((4, 33, 48), (40, 48), (40,), (4, 33, 40))
    parts = [x, weight, bias][:2 + biased]
    wide = [part.double().requires_grad_() for part in parts]
    exact = F.linear(*wide)
    exact.backward(grad.double())
    parts = [part.requires_grad_() for part in parts]
    out = onednn.linear(*parts)
    out.backward(grad)
    assert used == [(4, 33, 48, 40), (4, 33, 40, 48), (40, 132, 48)]

    big = [part.detach().abs().double() for part in (x, weight, grad)]
    sizes = [big[0] @ big[1].mT + (bias.abs() if biased else 0), big[2] @ big[1], big[2].flatten(0, 1).mT @ big[0].flatten(0, 1), big[2].sum((0, 1))]
    found = [(out, exact)] + [(part.grad, one.grad) for part, one in zip(parts, wide, strict=True)]
    for (ours, theirs), size, summed in zip(found, sizes, (49, 40, 132, 132)):
        assert ours.dtype == torch.float32 and ((ours - theirs).abs() <= summed * 2.0 ** -24 * size).all()


def test_frozen_parts_get_no_gradient_and_cost_no_product(used):
    x, weight = drawn((64, 8), (8, 8))
    onednn.linear(x, weight.requires_grad_()).sum().backward()
    assert x.grad is None and weight.grad is not None and len(used) == 2
    weight.grad, weight.requires_grad = None, False
    onednn.linear(x.requires_grad_(), weight).sum().backward()
    assert weight.grad is None and x.grad is not None and len(used) == 4


@pytest.mark.parametrize("shape, dtype", [((63, 8), torch.float32), ((8,), torch.float32), ((0, 8), torch.float32), ((64, 8), torch.float64),
                                          ((64, 8), torch.bfloat16), ((64, 0), torch.float32)])
def test_all_else_is_torchs_own(used, shape, dtype):
    x, weight = drawn(shape, (8, shape[-1]), dtype=dtype)
    assert torch.equal(onednn.linear(x, weight), F.linear(x, weight)) and used == []


def test_other_devices_are_left_to_torch(used):
    assert onednn.linear(*(part.to("meta") for part in drawn((64, 8), (8, 8)))).shape == (64, 8) and used == []


def test_inside_it_linear_layers_take_it(used):
    x, layer = drawn((64, 8))[0], torch.nn.Linear(8, 8)
    with onednn.OneDNN():
        layer(x)
        torch.cat((x, x)).sum()
    assert len(used) == 1
    layer(x)
    assert len(used) == 1


def step(**options):
    config = preset("gpt2", vocab_size=64, layers=2, width=16, heads=2, context=32)
    engine = Engine(Transformer(config, seed=1), TrainConfig(batch_size=4, device="cpu", **options))
    ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss = float(engine.forward_backward(batch))
    return loss, {name: weight.grad for name, weight in engine.model.named_parameters()}, engine.evaluate(batch) / batch.count


def test_the_engine_trains_and_evaluates_with_it_where_it_helps(used, monkeypatch):
    """The bound is a hundred half-ulps: two layers, each of a dozen operations."""
    loss, gradients, evaluated = step()
    layers = 2 * 6 + 1  # q, k, v, out, up, down; the head
    assert len(used) == 3 * layers + layers
    used.clear()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    plain, others, plainly = step()
    assert used == []
    assert loss == pytest.approx(plain, rel=100 * 2.0 ** -24) and evaluated == pytest.approx(plainly, rel=100 * 2.0 ** -24)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).abs().max() <= 100 * 2.0 ** -24 * max(g.abs().max() for g in others.values()), name


def test_other_precisions_and_compiled_models_do_not(used):
    step(precision="bf16")
    assert used == []
    eager, compiled = (autocast("fp32", torch.nn.Identity(), "cpu", compiled) for compiled in (False, True))
    assert isinstance(eager, onednn.OneDNN) and not isinstance(compiled, onednn.OneDNN)


@pytest.mark.parametrize("vendor, capability, helps", [("vendor_id : AuthenticAMD", "AVX512", True), ("vendor_id : AuthenticAMD", "AVX2", False),
                                                       ("vendor_id : GenuineIntel", "AVX512", False)])
def test_it_is_for_amds_processors_with_avx512(monkeypatch, tmp_path, vendor, capability, helps):
    about = tmp_path / "cpuinfo"
    about.write_text(vendor)
    monkeypatch.setattr(onednn, "Path", lambda name: about)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    onednn._amd_with_mkl.cache_clear()
    assert onednn.helps() == helps
    onednn._amd_with_mkl.cache_clear()
