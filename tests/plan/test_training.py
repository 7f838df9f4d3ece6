from dataclasses import replace

import pytest

from minillm.config import ModelConfig
from minillm.model.families import preset
from minillm.model.flops import matmul_weights, training_flops_per_token, utilisation
from minillm.plan.devices import DEVICES, GB
from minillm.plan.training import duration, find_model, gigabytes, parse_count, plan_training, power, render, short

SMALL = ModelConfig(vocab_size=61, layers=2, width=48, heads=4, context=32)
A100 = DEVICES["a100-80g"]


def test_llama_65b_as_it_was_trained():
    """arXiv:2302.13971 §2.4: 380 tokens/s a GPU and about 21 days on 2,048 A100s with 80 GB, 1.4T tokens."""
    config = preset("llama-65b")
    mfu = utilisation(380, training_flops_per_token(config), A100.peak("bf16"))
    plan = plan_training(config, A100, gpus=2048, tokens=parse_count("1.4e12"), utilisation=mfu)
    assert plan.tokens_per_second == pytest.approx(380)  # there and back: float rounding only
    assert round(plan.days) == 21 and plan.parameters == 65_285_660_672
    # 16 bytes a parameter: 1,044.6 GB, thirteen GPUs would hold 1,040
    assert plan.states.total == 16 * plan.parameters and plan.least_gpus == 14


def test_gpt3_on_ten_thousand_v100s():
    """arXiv:2104.10350 table 4: 24.6 TFLOP/s for each V100 and 14.8 days; a month would be a tenth of their peak."""
    v100 = DEVICES["v100-32g"]
    plan = plan_training(174_600_000_000, v100, gpus=10_000, tokens=300 * 10 ** 9, utilisation=24.6e12 / v100.peak("fp16"))
    assert plan.precision == "fp16" and plan.flops == plan.six_nd == pytest.approx(3.14e23, rel=0.005)
    assert plan.days == pytest.approx(14.8, abs=0.05)
    month = plan_training(174_600_000_000, v100, gpus=10_000, tokens=300 * 10 ** 9, utilisation=0.097)
    assert month.days == pytest.approx(30, abs=0.1)


def test_chinchilla_is_twenty_tokens_a_parameter():
    """arXiv:2203.15556: 70B parameters, 1.4T tokens. By default a plan takes as many."""
    assert plan_training(find_model("70B"), A100).tokens == parse_count("1.4T")


def test_sums_agree_with_their_parts():
    plan = plan_training(SMALL, A100, gpus=3, tokens=1000, utilisation=0.5)
    assert plan.flops == 1000 * training_flops_per_token(SMALL) and plan.six_nd == 6000 * matmul_weights(SMALL)
    assert plan.days * 86_400 * 3 * A100.peak("bf16") * 0.5 == pytest.approx(plan.flops)  # float rounding only
    longer = plan_training(SMALL, A100, gpus=3, tokens=1000, utilisation=0.5, context=64)
    assert longer.flops - plan.flops == 12 * 2 * 48 * 32 * 1000  # 12·L·H·D more for each token of context


def test_experts_take_memory_and_no_time():
    dense = replace(SMALL, ffn_width=40)
    mixed = replace(dense, experts=8, top_k=1)
    plan, twin = plan_training(mixed, A100, tokens=1000), plan_training(dense, A100, tokens=1000)
    assert plan.flops - twin.flops == 6 * 1000 * 2 * 48 * 8  # the routers of two layers
    assert plan.parameters - twin.parameters == 2 * (7 * 3 * 48 * 40 + 48 * 8)


@pytest.mark.parametrize(("asked", "device", "precision", "convention"), [
    ({}, "a100-80g", "bf16", "half"), ({}, "t4", "fp16", "half"), ({}, "tpu-v4", "bf16", "half"),
    ({"precision": "tf32"}, "a100-80g", "tf32", "fp32"), ({"precision": "fp8"}, "h100", "fp8", "half"),
    ({"convention": "fp32"}, "a100-80g", "bf16", "fp32"), ({"convention": "both", "precision": "fp16"}, "a100-80g", "fp16", "both")])
def test_formats_and_what_is_kept(asked, device, precision, convention):
    plan = plan_training(SMALL, DEVICES[device], **asked)
    assert (plan.precision, plan.convention) == (precision, convention)


@pytest.mark.parametrize(("model", "asked", "words"), [
    (SMALL, {"tokens": 0}, "tokens = 0"), (0, {}, "parameters = 0"), (SMALL, {"context": 0}, "context = 0"),
    (10 ** 9, {"context": 32}, "context = 32 for 1,000,000,000 parameters"), (SMALL, {"gpus": 0}, "gpus = 0"),
    (SMALL, {"utilisation": 40}, "utilisation = 40"), (SMALL, {"precision": "fp8"}, "a100-80g has no matrix products in fp8"),
    (SMALL, {"precision": "fp32", "convention": "half"}, "16-bit weights"), (SMALL, {"convention": "mixed"}, "'mixed'"),
    (SMALL, {"precision": "fp32", "convention": "mixed"}, "'mixed'")])
def test_what_cannot_be_planned(model, asked, words):
    with pytest.raises(ValueError, match=words):
        plan_training(model, A100, **asked)


def test_the_table():
    table = render(plan_training(preset("gpt2"), A100, gpus=2, tokens=10 ** 9), "gpt2").splitlines()
    rows = {line[:12].strip() or "attention": line[12:].split(None, 1)[0] for line in table[1:]}
    assert table[0] == "gpt2 on 2 x a100-80g" and len(rows) == len(table) - 1 == 10
    # By hand: 12 x 12 x 768² weights in the blocks, 768 x 50,257 in the head, 12 x 12 x 768 x 1,024 operations of attention.
    assert rows["a token"] == "8.54e08" and rows["training"] == "8.54e17" and rows["attention"] == "+15.3%"
    assert rows["parameters"] == "124M" and rows["tokens"] == "1B"
    # 124,439,808 weights over 2: 8 and 12 bytes shared, 4 + 6 and 2 + 7 on each
    assert "0.996 GB" in table[-1] and "ZeRO-2 1.12 GB, ZeRO-1 1.24 GB; whole copies (data parallel) fit" in table[-1]
    assert "weights 2, gradients 2, master copies 4, moments 8" in table[-3]


def test_the_table_says_what_does_not_fit():
    one = render(plan_training(preset("gpt2"), A100), "gpt2")
    assert "of 80 GB" in one and "spread over all" not in one
    assert "too few GPUs" in render(plan_training(preset("llama-65b"), A100, gpus=13), "x")
    spread = render(plan_training(preset("llama-65b"), A100, gpus=14), "x")
    assert "too few GPUs" not in spread and "do not fit" in spread
    assert "so it is not counted" in render(plan_training(10 ** 9, A100), "1B")


def test_numbers_are_short():
    assert [short(n) for n in (7, 999, 1000, 65_285_660_672, 1.4e12, 2.5e15)] == ["7", "999", "1K", "65.3B", "1.4T", "2500T"]
    assert [power(5.694e23), power(1e9)] == ["5.69e23", "1.00e09"]
    assert [duration(d) for d in (0.25, 25.83, 1234.5)] == ["6 hours", "25.8 days", "1,234 days"]
    assert [gigabytes(n * GB) for n in (0.51, 80, 1044.57)] == ["0.51 GB", "80 GB", "1,045 GB"]


@pytest.mark.parametrize(("text", "count"), [("1.4e12", 1.4e12), ("1.4T", 1.4e12), ("300B", 300e9), ("7b", 7e9), (" 2.5 M ", 2_500_000),
                                             ("1,000,000", 10 ** 6), ("10K", 10 ** 4), ("1", 1), ("0.3T", 300e9)])
def test_counts(text, count):
    assert parse_count(text) == count and isinstance(parse_count(text), int)


@pytest.mark.parametrize("text", ["", "T", "1.4 tokens", "1.4BT", "-3B", "0", "0.5", "nan", "inf", "infB", "1e400"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="is no count: write it as 300B, 1.4T or 1.4e12"):
        parse_count(text)


def test_models_by_name_or_by_size():
    assert find_model("gpt3-175b") == preset("gpt3") and find_model("70B") == 70 * 10 ** 9
    with pytest.raises(ValueError, match="Did you mean 'llama-65b'"):
        find_model("lama-65b")
