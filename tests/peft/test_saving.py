"""Adapters on disk: there and back, and in both directions with PEFT itself on small random models of its classes."""

import copy
import json

import pytest
import torch
from small import ids, shake, small
from small_families import FAMILIES as PUBLISHED

from minillm.model.huggingface import CheckpointError, load_pretrained, save_pretrained
from minillm.nn.quantize import quantize_linears
from minillm.peft.adapter import add_adapters
from minillm.peft.llama_adapter import add_llama_adapter
from minillm.peft.lora import LoraConfig, add_lora, merge_lora, unmerge_lora
from minillm.peft.prefix import add_prefix
from minillm.peft.prompt import add_prompt
from minillm.peft.saving import load_adapted, load_adapter, save_adapter

ADD = {
    "lora": lambda model: add_lora(model, LoraConfig(rank=3, alpha=5, targets=("attention.*", "down"))),
    "some layers, rank-stabilised": lambda model: add_lora(
        model, LoraConfig(rank=2, alpha=5, targets=("q", "blocks.0.attention.v"), rank_stabilised=True)),
    "embedding and head": lambda model: add_lora(model, LoraConfig(rank=3, targets=("embed", "head", "q"))),
    "prompt": lambda model: add_prompt(model, 4), "prefix": lambda model: add_prefix(model, 4),
    "bottleneck": lambda model: add_adapters(model, 3, parallel=True, scale=0.5, parts=("ffn",)),
    "llama_adapter": lambda model: add_llama_adapter(model, 3, layers=1),
}
FAMILIES = ("gpt2", "gpt_neox", "gptj", "bloom, 6 heads", "falcon 7b", "opt", "llama, grouped, wide heads, biases, tied", "qwen3", "gemma2", "glm")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder and Hugging Face's model of each family, made when asked for."""
    made = {}

    def base(family):
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp("base"), PUBLISHED[family]().eval()
            made[family][1].save_pretrained(made[family][0])
        return made[family]
    return base


@pytest.mark.parametrize("method", ADD)
@pytest.mark.parametrize("family", ["first", "gpt2", "olmo2-7b", "chatglm-6b"])
def test_there_and_back(tmp_path, family, method):
    model = small(family)
    save_pretrained(model, tmp_path / "base")
    ADD[method](model)
    save_adapter(shake(model), tmp_path / "adapter", base=tmp_path / "base")
    again = load_adapted(tmp_path / "adapter", dtype=torch.float64).eval()
    # float64: a fused matrix has the sum of the ranks, so the order of sums changes
    torch.testing.assert_close(again(ids()), model(ids()), rtol=1e-10, atol=1e-10)
    assert not torch.equal(load_adapted(tmp_path / "base", dtype=torch.float64)(ids()), again(ids()))


@pytest.mark.filterwarnings("ignore")  # PEFT's about tied weights, transformers' about PEFT
@pytest.mark.parametrize("method", list(ADD)[:5])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours_and_we_read_peft_s(tmp_path, bases, family, method):
    pytest.importorskip("peft.peft_model", reason="PEFT is not installed: it is in the test extra")  # this folder is a peft, too
    import peft
    folder, published = bases(family)
    ours = load_pretrained(folder).eval()
    ADD[method](ours)
    save_adapter(shake(ours), tmp_path / "ours", base=folder)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(published), tmp_path / "ours").eval()
    expected = theirs(ids()).logits[:, -9:]  # PEFT gives logits for the prompt, too
    # float32: the parity of the bases (tests/model/test_huggingface.py) and the order of sums
    torch.testing.assert_close(ours(ids()), expected, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(folder).eval()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(ids()), expected, rtol=1e-4, atol=2e-5)


def test_what_peft_trained_is_read(tmp_path, bases):
    pytest.importorskip("peft.peft_model", reason="PEFT is not installed: it is in the test extra")  # this folder is a peft, too
    import peft
    folder, published = bases("gpt2")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False,
                             rank_pattern={"c_fc": 2}, alpha_pattern={"h.0.attn.c_attn": 20})
    theirs = peft.get_peft_model(copy.deepcopy(published), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(folder).eval()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=1e-4, atol=2e-5)  # float32, as above


def test_the_files_are_peft_s(tmp_path):
    model = small("olmo2-7b")
    add_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path, base="some/base")
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: about[key] for key in ("peft_type", "r", "target_modules", "base_model_name_or_path")} == {
        "peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "some/base"}
    from safetensors.torch import load_file
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 8 and tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 32)


@pytest.mark.parametrize("family", ["first", "chatglm-6b"])
def test_a_merged_model_is_saved_as_any_other(tmp_path, family):
    model = small(family, width=64, ffn_width=64)
    add_lora(model)
    merge_lora(shake(model))
    save_pretrained(model, tmp_path)
    # float64: the model that is saved adds nothing to what its weights hold
    torch.testing.assert_close(load_pretrained(tmp_path, dtype=torch.float64)(ids()), model(ids()), rtol=1e-12, atol=1e-12)
    unmerge_lora(model)
    packed = small(family, width=64, ffn_width=64)
    quantize_linears(packed)
    with pytest.raises(ValueError, match="attention.q.weight is not there as a matrix. If it is quantised"):
        save_pretrained(packed, tmp_path)


def test_several_are_loaded_side_by_side(tmp_path):
    model = small()
    add_lora(model, name="one")
    save_adapter(shake(model), tmp_path, "one")
    load_adapter(model, tmp_path, "two")
    one, two = (model.blocks[0].attention.q.lora[name].B for name in ("one", "two"))
    assert torch.equal(one, two) and one is not two


def test_what_cannot_be_saved(tmp_path):
    model = small()
    with pytest.raises(ValueError, match="no adapter called 'default', there are: none"):
        save_adapter(model, tmp_path)
    add_lora(model)
    add_prefix(model)
    with pytest.raises(ValueError, match=r"LoRA \(default\) and a prefix: a folder holds one"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize(("method", "changes", "message"), [
    ("lora", dict(layers=1), "this model has no place for base_model.model.model.layers.1.mlp.down_proj.lora_A.weight and 9 others"),
    ("lora", dict(kv_heads=4), r"k_proj of the adapter has 16 rows, of this model 32. It was made for here"),
    ("lora", dict(width=64, heads=8), "rows, of this model"),
    ("prompt", dict(width=64), r"prompt_embeddings has the shape \(4, 32\), and this model needs \(4, 64\)"),
    ("prefix", dict(layers=1), "a virtual token has 64 numbers, and keys and values of this model 32"),
    ("bottleneck", dict(width=64), "blocks.0.ffn.bottleneck.down.weight has the shape"),
    ("llama_adapter", dict(heads=2), r"gate has the shape \(4,\), and this model needs \(2,\)"),
])
def test_an_adapter_of_another_model(tmp_path, method, changes, message):
    model = small()
    ADD[method](model)
    save_adapter(model, tmp_path, base="here")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(small(**changes), tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(peft_type="IA3"), "peft_type = 'IA3' cannot be loaded; LORA, PROMPT_TUNING"),
    (dict(peft_type="PREFIX_TUNING"), "has no 'prompt_embeddings', which a PREFIX_TUNING adapter"),
    (dict(r=0), "rank = 0"),
])
def test_a_file_that_is_not_right(tmp_path, changes, message):
    model = small()
    add_lora(model)
    save_adapter(model, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | changes))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(small(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
        load_adapter(small(), tmp_path)
