"""What a CUDA GPU must do as the CPU does. Where there is none, all of this is skipped."""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture

from minillm.config import ParallelConfig
from minillm.engine import Engine
from minillm.infer.generate import generate
from minillm.infer.sampling import Sampling
from minillm.model.families import preset
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.train.loss import cross_entropy
from minillm.train.loss_scale import LossScaler
from minillm.train.precision import Autocast
from runs import PLAN, TINY, batch, losses, small_data, trainer
from steps import like_one_process, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SMALL = dict(vocab_size=300, layers=2, width=64, heads=4, context=32)
MODELS = {"gpt2": preset("gpt2", **SMALL), "llama": preset("llama-7b", **SMALL, ffn_width=64),
          "mistral": preset("mistral-7b", **SMALL, ffn_width=64, kv_heads=2, head_dim=None, window=8)}


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_as_on_the_cpu(name):
    """float64: the order of summation differs, and with rotary positions the sines, which are made in float32 on the device."""
    engines = {device: Engine(Transformer(MODELS[name]).double(), dataclasses.replace(PLAN, device=device))
               for device in ("cpu", "cuda")}
    found = {device: losses(engine, 10) for device, engine in engines.items()}
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-6)  # the loss is added up in float32
    for mine, theirs in zip(engines["cuda"].model.parameters(), engines["cpu"].model.parameters(), strict=True):
        close = 1e-9 if name == "gpt2" else 1e-6  # a float32 sine has 24 bits
        torch.testing.assert_close(mine.cpu(), theirs, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_by_hand_is_torchs(name, dtype):
    model, ids = Transformer(MODELS[name]).cuda(), batch().ids.cuda()
    found = []
    for mode in (Autocast(dtype, "cuda"), torch.autocast("cuda", dtype)):
        model.zero_grad()
        with mode:
            logits = model(ids)
            loss = cross_entropy(logits, batch().targets.cuda())
        (8 * loss).backward()
        found.append((logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (ours, our_grads), (theirs, their_grads) = found
    assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)  # the same operations: no tolerance
    assert all(torch.equal(grad, their_grads[key]) for key, grad in our_grads.items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("masters", [False, True])
def test_16_bits_learn(precision, masters):
    plan = dataclasses.replace(PLAN, device="cuda", precision=precision, master_weights=masters, steps=60, lr=1e-2)
    engine = Engine(MODELS["llama"], plan)
    found = []
    for _ in range(60):
        found.append(float(engine.forward_backward(batch())))
        engine.clip(1.0)
        engine.step()
    assert found[-1] < found[0] / 3  # one batch, learned by heart
    wide = Engine(MODELS["llama"], dataclasses.replace(PLAN, device="cuda", steps=60, lr=1e-2))
    assert found[0] == pytest.approx(float(wide.forward_backward(batch())), rel=5e-3)  # bf16 keeps 8 bits, of each logit


def test_the_same_scales_as_torchs_grad_scaler():
    pattern, found = [False] * 4 + [True, False, True, True] + [False] * 7, []
    theirs, ours = torch.amp.GradScaler("cuda", 2.0 ** 10, 2.0, 0.5, 3), LossScaler(scale=2.0 ** 10, interval=3)
    for kind in ("torch", "ours"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=False).cuda()
        optimizer, scales = torch.optim.AdamW(model.parameters(), lr=0.1), []
        for step, overflows in enumerate(pattern):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).cuda() * (1e38 if overflows else 1.0)
            loss = model(x).square().mean()
            if kind == "torch":
                theirs.scale(loss).backward()
                theirs.step(optimizer)
                theirs.update()
                scales.append(theirs.get_scale())
            else:
                (loss * ours.scale).backward()
                finite = ours.unscale([model.weight.grad])
                optimizer.step() if finite else None
                ours.update(finite)
                scales.append(ours.scale)
            optimizer.zero_grad()
        found.append((scales, model.weight.detach().clone()))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) > 3
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)  # 1/scale or a division: one rounding


COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from minillm.engine import Engine
from runs import PLAN, losses
from test_cuda import MODELS
eager, compiled = (losses(Engine(MODELS["llama"], replace(PLAN, device="cuda", compile=c))) for c in (False, True))
# float32: fused kernels round elsewhere, and AdamW's first steps are as large for a small gradient as for a large one
assert all(abs(a - b) < 1e-4 * abs(a) for a, b in zip(eager, compiled, strict=True)), (eager, compiled)
"""


def test_compiled_is_the_same_training():
    """In a process of its own: the shape checks that this suite switches on cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED, Path(__file__).parent], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_no_token(name):
    model, ids = Transformer(MODELS[name], seed=3).double().cuda().eval(), batch().ids[:, :5].cuda()
    cached, whole = (generate(model, ids, 20, sampling=Sampling(temperature=0), cached=flag) for flag in (True, False))
    assert torch.equal(cached, whole)  # float64: no near ties here


def test_a_run_stops_and_goes_on(tmp_path):
    data = small_data(tmp_path / "data")
    whole = trainer(data, tmp_path / "whole", TINY, device="cuda", steps=6)
    whole.train()
    trainer(data, tmp_path / "parts", TINY, device="cuda", steps=6).train()
    again = trainer(data, tmp_path / "parts", TINY, device="cuda", steps=6)
    again.restore(tmp_path / "parts" / "step-000004")
    again._step(), again._step()
    for mine, theirs in zip(again.engine.model.parameters(), whole.engine.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # an embedding's gradient has no fixed order on a GPU


def on_rank(me, config):
    engine = Engine(config, dataclasses.replace(PLAN, device="cuda"), ParallelConfig(dp=me.size))
    total = torch.ones(3, device=me.device)
    torch.distributed.all_reduce(total)
    return str(me.device), total.cpu(), losses(engine, 3)


def test_ranks_on_gpus_talk_by_nccl():
    """As many ranks as there are GPUs, and at most 4: also one goes through NCCL."""
    ranks = min(4, 1 << (torch.cuda.device_count().bit_length() - 1))
    found = launch(partial(on_rank, config=MODELS["llama"]), ranks, backend="nccl")
    assert [device for device, _, _ in found] == [f"cuda:{rank}" for rank in range(ranks)]
    assert all(torch.equal(total, torch.full((3,), float(ranks))) for _, total, _ in found)
    # every rank reads the same batch here, so their mean is that of one
    alone = losses(Engine(MODELS["llama"], dataclasses.replace(PLAN, device="cuda")), 3)
    assert all(found_losses == pytest.approx(alone, rel=1e-4) for _, _, found_losses in found)


def in_layouts(me, model, plan, layouts):
    return [trained(model, plan, layout) for layout in layouts]


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 GPUs")
@pytest.mark.parametrize("engine", ["ours", "torch"])
def test_every_layout_on_four_gpus_is_one_gpu(engine):
    """Over NCCL, with the tolerances of gloo: float64 on the same kind of device, so only the order of summation differs."""
    plan = dataclasses.replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1, device="cuda")
    degrees = [dict(dp=4), dict(dp=2, tp=2), dict(dp=2, tp=2, sequence_parallel=True)]
    layouts = [ParallelConfig(**some, bucket_mb=0.01, engine=engine) for some in degrees]
    wanted = trained(MODELS["mistral"], plan)
    for rank in launch(in_layouts, 4, MODELS["mistral"], plan, layouts, backend="nccl"):
        for found in rank:
            like_one_process(found, wanted)
