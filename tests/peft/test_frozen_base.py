"""The engine and the trainer with a frozen base: every method learns, in 16 bits too, on several ranks and from a checkpoint."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from ranks import functions_travel_by_value  # noqa: F401  a fixture
from runs import PLAN, TINY, batch, losses, run_losses, small_data

from minillm.config import ParallelConfig
from minillm.data.loader import Loader
from minillm.engine import Engine
from minillm.model.huggingface import CheckpointError, load_pretrained, save_pretrained
from minillm.model.transformer import Transformer
from minillm.nn.quantize import quantize_linears
from minillm.parallel.launch import launch
from minillm.peft.adapter import add_adapters
from minillm.peft.freeze import base_parameters, train_only_biases, trained_parameters
from minillm.peft.llama_adapter import add_llama_adapter
from minillm.peft.lora import LoraConfig, add_lora
from minillm.peft.prefix import add_prefix
from minillm.peft.prompt import add_prompt
from minillm.peft.saving import load_adapted, save_adapter
from minillm.plan.memory import state_bytes, tuning_bytes
from minillm.torch_engine import build_engine
from minillm.trainer import Trainer

MODEL = replace(TINY, layers=2, bias=("qkv", "mlp"))
STEPS = replace(PLAN, batch_size=8, lr=1e-2, clip_norm=0.1)


def quantised(model):
    quantize_linears(model, group="row")
    add_lora(model, LoraConfig(rank=4))


METHODS = {"lora": lambda model: add_lora(model, LoraConfig(rank=4, targets=("attention.*", "embed"))), "qlora": quantised,
           "prompt": partial(add_prompt, length=4), "prefix": partial(add_prefix, length=4), "adapters": partial(add_adapters, size=4),
           "gates": partial(add_llama_adapter, length=4), "biases": train_only_biases}


def ready(method, double=False):
    model = Transformer(MODEL, seed=3)
    model = model.double() if double else model
    METHODS[method](model)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_only_the_trained_part_changes_and_has_states(method):
    model = ready(method)
    engine = Engine(model, replace(STEPS, clip_norm=1.0))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    found = []
    for _ in range(8):
        found.append(float(engine.forward_backward(batch(0))))
        engine.clip(1.0)
        engine.step()
    assert found[-1] < found[0]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())
    moments = sum(t.numel() * 4 for key, t in engine.state_dict().items() if key.startswith("exp_avg"))
    count = sum(p.numel() for p in trained_parameters(model).values())
    assert set(engine.weights) == set(trained_parameters(model)) and moments == state_bytes(count, "fp32").moments


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(precision="fp16", loss_scale=1024.0),
                                     dict(precision="bf16", master_weights=True)])
def test_sixteen_bits(method, changes):
    wide, narrow = (losses(Engine(ready(method), replace(STEPS, **c)), 3) for c in ({}, changes))
    # bf16's products are off by up to a 256th, and the loss of a nearly untrained model much less: measured below 2e-3
    assert narrow == pytest.approx(wide, rel=1e-2)


def test_master_weights_are_of_the_trained_part():
    engine = Engine(ready("lora"), replace(STEPS, precision="bf16", master_weights=True))
    model = engine.model
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert set(engine.masters.masters) == set(trained_parameters(model))
    frozen = sum(p.numel() * 2 for p in base_parameters(model).values())
    count = sum(p.numel() for p in trained_parameters(model).values())
    losses(engine, 1)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    masters = sum(p.numel() * 4 for p in engine.masters.masters.values())
    planned = tuning_bytes(frozen, count, "float")
    assert (held, masters) == (planned.weights, planned.master) and planned.total == frozen + 18 * count


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = (Engine(ready("lora", double=True), replace(STEPS, microbatch_size=size)) for size in (None, 2))
    for engine in (whole, parts):
        engine.forward_backward(batch(0, rows=8))
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name].grad, weight.grad, rtol=1e-9, atol=1e-12)  # float64, another order of sums


def seen(method, parallel=ParallelConfig()):
    """What ten steps leave, in float64."""
    engine = build_engine(ready(method, double=True), STEPS, parallel)
    found, gradients = [], []
    for step in range(10):
        found.append(float(engine.forward_backward(batch(step, rows=8).part(engine.rank, engine.ranks))))
        gradients.append({name: weight.grad.clone() for name, weight in engine.weights.items()})
        engine.clip(STEPS.clip_norm)
        engine.step()
    sent = sum(b.flat.numel() for b in getattr(engine.replicas, "buckets", ()))
    return found, gradients, {name: w.detach().clone() for name, w in engine.weights.items()}, sent


@pytest.fixture(scope="module")
def one_process():
    return {method: seen(method) for method in METHODS}


def on_ranks(ranks, engine, methods):
    return launch(lambda me: {method: seen(method, ParallelConfig(dp=ranks, engine=engine)) for method in methods}, ranks)


@pytest.mark.parametrize(("ranks", "engine", "methods"), [(2, "ours", tuple(METHODS)), (4, "ours", ("qlora", "prefix")), (2, "torch", ("lora",))])
def test_data_parallel_ranks_give_what_one_process_gives(one_process, ranks, engine, methods):
    for found in on_ranks(ranks, engine, methods):
        for method in methods:
            alone, ours = one_process[method], found[method]
            assert ours[0] == pytest.approx(alone[0], rel=1e-6)  # the loss is added up in float32
            # float64: only the order of sums over ranks differs, and AdamW divides by small numbers
            for mine, expected in ((ours[1][0], alone[1][0]), (ours[1][-1], alone[1][-1]), (ours[2], alone[2])):
                assert mine.keys() == expected.keys()
                for name, value in expected.items():
                    torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-10, msg=lambda text: f"{method}, {name}: {text}")
            if engine == "ours":
                assert ours[3] == sum(w.numel() for w in alone[2].values())  # only what is trained travels


def shared_out(me, zero, methods):
    """Losses, and the trained weights after ten steps, with ZeRO; what a rank's optimizer sees are pieces."""
    found = {}
    for method in methods:
        engine = build_engine(ready(method, double=True), STEPS, ParallelConfig(dp=me.size, zero=zero))
        losses = []
        for step in range(10):
            losses.append(float(engine.forward_backward(batch(step, rows=8).part(engine.rank, engine.ranks))))
            engine.clip(STEPS.clip_norm)
            engine.step()
        found[method] = losses, {n: w.detach().clone() for n, w in engine.whole_model().named_parameters() if w.requires_grad}
    return found


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_gives_what_one_process_gives(one_process, zero):
    methods = ("lora", "prefix", "adapters")
    for found in launch(shared_out, 2, zero, methods):
        for method in methods:
            alone, ours = one_process[method], found[method]
            assert ours[0] == pytest.approx(alone[0], rel=1e-6)  # as above
            assert ours[1].keys() == alone[2].keys()
            for name, value in alone[2].items():
                torch.testing.assert_close(ours[1][name], value, rtol=1e-6, atol=1e-10, msg=lambda text: f"{method}, {name}: {text}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


def trainer(data, base, run):
    torch.manual_seed(0)  # what dropout draws from
    model = load_pretrained(base)
    add_lora(model, LoraConfig(rank=4, dropout=0.1))
    loader = Loader(data.train, PLAN.batch_size, model.config.context, seed=PLAN.seed)
    return Trainer(Engine(model, PLAN), loader, data.val, run, tokenizer=data.tokenizer, save_model=partial(save_adapter, base=base))


def test_a_run_goes_on_from_an_adapter_s_checkpoint(tmp_path, data):
    save_pretrained(Transformer(TINY, seed=3), tmp_path / "base")
    whole = trainer(data, tmp_path / "base", tmp_path / "whole")
    assert whole.train()
    first = trainer(data, tmp_path / "base", tmp_path / "cut")
    first.at[4] = lambda model: first._on_signal(2, None) or {}
    assert not first.train()
    again = trainer(data, tmp_path / "base", tmp_path / "cut")
    assert again.train(resume=tmp_path / "cut" / "step-000004")
    assert run_losses(tmp_path / "cut") == run_losses(tmp_path / "whole")  # bit for bit, dropout too
    saved = load_adapted(tmp_path / "cut" / "step-000006")
    for name, weight in again.engine.weights.items():
        assert torch.equal(saved.get_parameter(name), weight)
    assert not (tmp_path / "cut" / "step-000006" / "model.safetensors").exists()
    other = trainer(data, tmp_path / "base", tmp_path / "cut")
    other.engine = Engine(ready("lora"), PLAN)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        other.train(resume=tmp_path / "cut" / "step-000004")
    other = Engine(Transformer(TINY), PLAN)
    add_lora(other.model, LoraConfig(rank=2))
    with pytest.raises(CheckpointError, match="was trained with another adapter"):
        Engine(other.model, PLAN).load_state_dict(again.engine.state_dict())


@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2), dict(dp=2, zero=3), dict(engine="torch", dp=2, zero=2)])
def test_layouts_that_cut_the_model_are_refused(layout):
    name, size = list(layout.items())[-1]
    with pytest.raises(ValueError, match=f"{name} = {size}.* with frozen weights: what was added to a model is not cut"):
        build_engine(ready("lora"), replace(STEPS, microbatch_size=2), ParallelConfig(**layout))


def test_what_is_trained_costs_ten_times_its_weights():
    """LLaMA-7B in 16 bits and LLaMA-Adapter's 1.2M: at 20 bytes a parameter, ten times 2; at 16, eight times."""
    frozen, trained = 2 * 6_738_415_616, 1_229_760
    assert tuning_bytes(frozen, trained, "both").total - frozen == 10 * 2 * trained
    assert tuning_bytes(frozen, trained, "half").total - frozen == 8 * 2 * trained
    assert state_bytes(6_738_415_616, "both").total / tuning_bytes(frozen, trained, "both").total > 9.9
