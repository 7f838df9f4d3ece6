"""Checkpoints as they lie on the hub, which differ from what today's classes save: older keys, other names, extra tensors."""

import json

import chatglm_reference as chatglm
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_families import FAMILIES, PLAIN

from minillm.infer.kv_cache import StaticCache
from minillm.model.huggingface import CheckpointError, load_pretrained, save_pretrained

IDS = torch.randint(2, 67, (2, 20), generator=torch.Generator().manual_seed(1))


def published(kind, folder, config=lambda about: about, tensors=lambda tensors: tensors):
    """A family's random model, saved and then rewritten to look like a hub checkpoint."""
    model = (PLAIN[kind.removesuffix(" as it comes")] if kind.endswith(" as it comes") else FAMILIES[kind])().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(about)))
    saved = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    save_file({n: t.contiguous() for n, t in tensors(saved).items()}, folder / "model.safetensors")
    return model


def without(about, *keys, **more):
    return {k: v for k, v in about.items() if k not in keys} | more


VARIANTS = {
    "bloom without a prefix, with its oldest keys": ("bloom, 6 heads", lambda a: without(
        a, "hidden_size", "n_head", n_embed=36, num_attention_heads=6), lambda ts: {n.removeprefix("transformer."): t for n, t in ts.items()}),
    "falcon with few keys and a copy of the embedding": ("falcon 7b", lambda a: {k: a[k] for k in (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "multi_query", "layer_norm_epsilon")},
        lambda ts: ts | {"lm_head.weight": ts["transformer.word_embeddings.weight"].clone()}),
    "gpt-neox with rotary_pct, masks and frequencies": ("gpt_neox", lambda a: without(
        a, "rope_parameters", rotary_pct=0.25, rotary_emb_base=500), lambda ts: ts | {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool), "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}),
    "gptj with masks": ("gptj", lambda a: a, lambda ts: ts | {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool)}),
    "llama 3.1 with rope_scaling": ("llama 3.1", lambda a: without(
        a, "rope_parameters", rope_theta=a["rope_parameters"]["rope_theta"], rope_scaling={k: v for k, v in a["rope_parameters"].items() if k != "rope_theta"}),
        lambda ts: ts),
    "mistral with head_dim null": ("mistral", lambda a: a, lambda ts: ts),
    "qwen2 with a window that is not used": ("qwen2", lambda a: without(a, "layer_types", sliding_window=4, use_sliding_window=False), lambda ts: ts),
    "gemma2 without layer_types": ("gemma2", lambda a: without(a, "layer_types"), lambda ts: ts),
    "qwen2 with max_window_layers alone": ("qwen2, some layers with a window", lambda a: without(a, "layer_types"), lambda ts: ts),
    "gemma3 with rope_local_base_freq": ("gemma3", lambda a: without(
        a, "rope_parameters", rope_theta=1000.0, rope_local_base_freq=50.0, rope_scaling={"rope_type": "linear", "factor": 8.0}), lambda ts: ts),
    "glm with partial_rotary_factor": ("glm", lambda a: without(a, "rope_parameters", rope_theta=10_000.0, partial_rotary_factor=0.5), lambda ts: ts),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hub_files_load_like_saved_ones(variant, tmp_path):
    kind, config, tensors = VARIANTS[variant]
    theirs = published(kind, tmp_path, config, tensors)
    ours = load_pretrained(tmp_path)
    expected = theirs(IDS).logits
    # float32: the same sums in another order, so 7 digits of the largest numbers that were summed
    torch.testing.assert_close(ours(IDS), expected, rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item() / 5))


@pytest.mark.parametrize("kind", [*FAMILIES, *(f"{name} as it comes" for name in PLAIN)])
@torch.no_grad()
def test_what_a_config_leaves_out_is_never_guessed_wrongly(kind, tmp_path):
    """Each key that says what the class assumes anyway, left out: the same logits, or an error that names the key."""
    theirs = published(kind, tmp_path)
    about, expected = json.loads((tmp_path / "config.json").read_text()), theirs(IDS).logits
    said = set(theirs.config.to_diff_dict()) | {"model_type", "architectures", "dtype"}
    for key in set(about) - said:
        (tmp_path / "config.json").write_text(json.dumps(without(about, key)))
        try:
            ours = load_pretrained(tmp_path)(IDS)
        except CheckpointError as error:
            assert f"has no '{key}'" in str(error), error
        else:
            # float32: the same sums in another order, so 7 digits of the largest numbers that were summed
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item() / 5),
                                       msg=lambda text: f"without {key} = {about[key]}: {text}")


@pytest.fixture
def chatglm_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(chatglm.CONFIG))
    save_file(chatglm.weights(), tmp_path / "model.safetensors")
    return tmp_path


@torch.no_grad()
def test_chatglm_equals_its_published_model(chatglm_folder, tmp_path):
    ours, w = load_pretrained(chatglm_folder), chatglm.weights()
    prompts = torch.tensor([9, 6])
    expected = torch.stack([chatglm.logits(w, ids, int(prompt)) for ids, prompt in zip(IDS, prompts)])
    torch.testing.assert_close(ours(IDS, prefix_len=prompts), expected, rtol=1e-5, atol=1e-5)  # float32
    # the prompts padded on the left, and the answers token by token
    width = 9
    padded = torch.stack([torch.cat((torch.zeros(width - p, dtype=torch.long), ids[:p], ids[p:p + 8])) for ids, p in zip(IDS, prompts.tolist())])
    real = torch.stack([torch.arange(width + 8) >= width - p for p in prompts])
    cache = StaticCache(ours.config, 2, width + 8)
    pieces = [ours(part, prefix_len=width, padding_mask=real[:, :end], cache=cache)
              for part, end in zip(padded.split([width] + [1] * 8, 1), range(width, width + 9))]
    for row, prompt in enumerate(prompts.tolist()):
        alone = chatglm.logits(w, IDS[row, :prompt + 8], prompt)
        torch.testing.assert_close(torch.cat(pieces, 1)[row][real[row]], alone, rtol=1e-5, atol=1e-5)
    save_pretrained(ours, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == w.keys() and all(torch.equal(back[name], w[name]) for name in w)


@torch.no_grad()
def test_mask_pos_moves_the_answers_place(chatglm_folder):
    ours = load_pretrained(chatglm_folder)
    assert torch.equal(ours(IDS, prefix_len=9, mask_pos=8), ours(IDS, prefix_len=9))
    other = ours(IDS, prefix_len=9, mask_pos=4)
    assert torch.equal(other[:, :9], ours(IDS, prefix_len=9)[:, :9]) and not torch.allclose(other[:, 9:], ours(IDS, prefix_len=9)[:, 9:])


@pytest.mark.parametrize("kind, change, words", [
    ("llama", dict(model_type="lama"), ["'lama'", "nearest is 'llama'", "gpt2"]),
    ("falcon 7b", dict(alibi=True), ["alibi = True"]),
    ("opt", dict(word_embed_proj_dim=18), ["18", "36"]),
    ("opt", dict(do_layer_norm_before=False), ["do_layer_norm_before = False"]),
    ("olmoe", dict(clip_qkv=8.0), ["clip_qkv = 8.0"]),
    ("gpt2", dict(scale_attn_weights=False), ["scale_attn_weights = False"]),
    ("gemma", dict(use_bidirectional_attention=True), ["use_bidirectional_attention = True"]),
    ("llama, yarn", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, truncate=False)), ["truncate"]),
    ("llama", dict(rope_parameters=dict(rope_type="longrope", factor=4.0)), ["'longrope'", "llama3"]),
    ("qwen3_moe", dict(mlp_only_layers=[1]), ["mlp_only_layers = [1]"]),
    ("llama", dict(num_attention_heads=5), ["config.json", "head"]),
    ("mixtral", dict(num_local_experts=4), ["(5, 36)", "(4, 36)"]),
    ("qwen3", dict(num_key_value_heads=3), ["(20, 36)", "(30, 36)"]),
    ("llama, yarn", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, attention_factor=1.0)), ["attention_factor"]),
])
def test_what_cannot_be_loaded_is_named(kind, change, words, tmp_path):
    published(kind, tmp_path, lambda about: about | change)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value), error.value


def test_a_missing_shard_and_quantised_weights_are_named(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {lost.name}"):
        load_pretrained(tmp_path / "shards")
    published("llama", tmp_path / "int8", tensors=lambda ts: {n: t.to(torch.int8) if "q_proj" in n else t for n, t in ts.items()})
    with pytest.raises(CheckpointError, match="torch.int8"):
        load_pretrained(tmp_path / "int8")
