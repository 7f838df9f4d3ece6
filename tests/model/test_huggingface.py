import json
from dataclasses import replace
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_families import FAMILIES
from transformers import AutoModelForCausalLM

from minillm.config import ModelConfig
from minillm.infer.kv_cache import StaticCache
from minillm.model.families import PRESETS
from minillm.model.huggingface import CheckpointError, layout_for, load_pretrained, save_pretrained
from minillm.model.transformer import Transformer

BOTH = pytest.mark.parametrize("kind", FAMILIES)


@pytest.fixture
def theirs(kind, tmp_path):
    """A Hugging Face model with every parameter random, saved in tmp_path / 'theirs'."""
    model = FAMILIES[kind]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    return model


def close(ours, expected):
    # float32: the same sums in another order, so 7 digits of the largest numbers that were summed
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item() / 5))


@BOTH
@torch.no_grad()
def test_logits_equal_hugging_face_there_and_back(theirs, tmp_path):
    ids = torch.randint(2, 67, (3, 20), generator=torch.Generator().manual_seed(1))
    real = torch.ones(3, 20, dtype=torch.bool)
    real[1, :6] = False
    ours = load_pretrained(tmp_path / "theirs")
    expected = theirs(ids).logits
    close(ours(ids), expected)
    close(ours(ids, return_attention=True).logits, expected)  # the readable path
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    extra = {"position_ids": places} if "position_ids" in signature(theirs.forward).parameters else {}
    padded = theirs(ids, attention_mask=real.long(), **extra).logits
    close(ours(ids, padding_mask=real)[real], padded[real])
    cache = StaticCache(ours.config, 3, 20)
    pieces = [ours(part, cache=cache, padding_mask=real[:, :end]) for part, end in zip(ids.split([7] + [1] * 13, 1), range(7, 21))]
    close(torch.cat(pieces, 1)[real], padded[real])
    save_pretrained(ours, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    # a Falcon whose parts come one after the other is a GPT-NeoX, and says so
    assert type(back) is type(theirs) or (type(theirs).__name__, type(back).__name__) == ("FalconForCausalLM", "GPTNeoXForCausalLM")
    before, after = theirs.state_dict(), back.state_dict()
    for name in before.keys() & after.keys():
        if "embed_positions" in name:  # the two rows that belong to padding
            before[name][:2] = after[name][:2]
    assert type(back) is not type(theirs) or before.keys() == after.keys() and all(torch.equal(before[n], after[n]) or "norm" in n for n in before)
    close(back(ids).logits, expected)


@pytest.mark.parametrize("kind", ["gpt2"])
def test_published_gpt2_files_without_prefix_and_with_masks(theirs, tmp_path):
    folder = tmp_path / "theirs"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40) for i in range(3)}
    save_file(tensors, folder / "model.safetensors")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load_pretrained(folder)(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("kind", ["llama"])
def test_sharded_files_with_an_index(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load_pretrained(tmp_path / "sharded")(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama"])
def test_an_old_config_with_rope_theta_at_the_top_and_a_flag_that_lies(theirs, tmp_path):
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_theta": 10_000.0, "tie_word_embeddings": True}))
    model = load_pretrained(tmp_path / "theirs")
    assert not model.config.tied  # the file has a head of its own
    torch.testing.assert_close(model(torch.arange(9)[None]), theirs(torch.arange(9)[None]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama"])
def test_what_cannot_be_loaded_says_why(theirs, tmp_path):
    folder = tmp_path / "theirs"
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, about = weights.read_bytes(), json.loads(config.read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file changes under them

    def error():
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(folder)
        return str(caught.value)

    weights.write_bytes(whole[:-100])
    assert f"{len(whole) - 100:,} of {len(whole):,} bytes" in error()
    weights.write_bytes(whole[:5])
    assert "not a whole safetensors file" in error()
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, weights)
    assert "Missing: norm.weight" in error()
    save_file(tensors | {"model.extra": torch.ones(1)}, weights)
    assert "Left over: extra" in error()
    weights.write_bytes(whole)
    config.write_text(json.dumps(about | {"intermediate_size": 51}))
    assert "(50, 36)" in error() and "(51, 36)" in error()
    config.write_text(json.dumps(about | {"model_type": "mamba"}))
    assert "'mamba'" in error() and "llama" in error()
    config.write_text(json.dumps({k: v for k, v in about.items() if k != "hidden_size"}))
    assert "hidden_size" in error()
    config.write_text(config.read_text()[:40])
    assert "not whole JSON" in error()
    config.unlink()
    assert "not a checkpoint" in error()


@pytest.mark.parametrize("kind", ["llama"])
def test_pickles_are_refused(theirs, tmp_path):
    folder = tmp_path / "theirs"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run any code"):
        load_pretrained(folder)


def test_unsupported_choices_are_named(tmp_path):
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    for change, words in [({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"), ({"hidden_act": "relu"}, "'relu'")]:
        (tmp_path / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=words):
            load_pretrained(tmp_path)


def test_a_model_that_no_family_has_keeps_our_own_names(tmp_path):
    config = ModelConfig(vocab_size=31, layers=2, width=24, heads=4, context=16, norm="rms", pos="learned", tied=False)
    assert layout_for(config) is None
    model = Transformer(config, seed=5)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_every_preset_but_gpt3_has_a_published_layout():
    # GPT-3's weights were never published, so no layout has its band
    assert {name for name, config in PRESETS.items() if layout_for(config) is None} == {name for name in PRESETS if name.startswith("gpt3")}
    assert layout_for(PRESETS["gpt2"]).model_type == "gpt2" and layout_for(PRESETS["first"]).model_type == "llama"
    assert layout_for(replace(PRESETS["gpt2"], bias=("qkv",))) is None


def test_half_precision_weights_load_into_the_dtype_asked_for(tmp_path):
    model = Transformer(replace(PRESETS["first"], vocab_size=50, layers=1), seed=2).bfloat16()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_pretrained(tmp_path).embed.weight.dtype == torch.float32
    assert torch.equal(load_pretrained(tmp_path, dtype=torch.bfloat16).embed.weight, model.embed.weight)
