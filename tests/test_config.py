from dataclasses import fields, replace

import pytest
import torch

from minillm.config import ModelConfig, ParallelConfig, TrainConfig, from_dict
from minillm.model.transformer import Transformer

TINY = ModelConfig(vocab_size=31, layers=2, width=24, heads=4, context=16, ffn_width=40)

# One change of every field that must show in the weights or the logits.
FLIPS = {
    "vocab_size": 37, "layers": 3, "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_width": 48, "block": "parallel",
    "norm": "layer", "norm_eps": 0.5, "final_norm": False, "embed_norm": True, "qk_norm": "head", "residual_alpha": 2.0,
    "mlp": "relu", "experts": 3, "top_k": 2, "norm_topk": False, "pos": "learned", "relative_buckets": 6, "relative_distance": 5, "rope_theta": 100.0, "rope_theta_local": 50.0,
    "rope_dim": 2, "rope_axes": 2, "rope_scaling": "linear", "rope_factor": 3.0, "rope_context": 6, "rope_slow": 0.1,
    "rope_fast": 1.5, "pattern": "gl", "window": 4, "attn_scale": 1.0, "attn_softcap": 1.0, "logit_softcap": 1.0,
    "embed_scale": 2.0, "logit_scale": 2.0, "bias": ("qkv", "out", "mlp", "norm", "head"), "tied": False, "init_std": 0.5,
    "init_residual": False,
}
STRETCHED = {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_slow": 0.2, "rope_fast": 2.0}
# Where the base must be another for the change to mean something.
BASES = {
    "relative_buckets": {"pos": "relative", "relative_buckets": 8}, "relative_distance": {"pos": "relative", "relative_buckets": 8},
    "rope_axes": {"head_dim": 8}, "rope_theta_local": {"pattern": "l", "window": 4}, "residual_alpha": {"block": "post"},
    "rope_context": STRETCHED, "rope_slow": STRETCHED, "rope_fast": STRETCHED, "rope_factor": STRETCHED, "rope_scaling": STRETCHED,
    "top_k": {"experts": 3, "top_k": 1}, "norm_topk": {"experts": 3}, "pattern": {"pattern": "l", "window": 3},
    "window": {"pattern": "l", "window": 3},
}


def fingerprint(config: ModelConfig) -> tuple:
    """Everything that two models can differ in: names, shapes and logits on fixed ids, with large random weights."""
    model = Transformer(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    logits = model(torch.arange(12)[None] % 31)[..., :31]
    return tuple((n, tuple(p.shape)) for n, p in model.named_parameters()), tuple(logits.flatten().tolist())


@pytest.mark.parametrize("field", [f.name for f in fields(ModelConfig) if f.name != "context"])
def test_every_field_changes_the_model(field):
    base = replace(TINY, **BASES.get(field, {}))
    assert fingerprint(base) != fingerprint(replace(base, **{field: FLIPS[field]}))


@pytest.mark.parametrize("field", ["block", "qk_norm", "mlp", "pos", "rope_scaling"])
def test_every_choice_is_a_model_of_its_own(field):
    choices = ModelConfig.__dataclass_fields__[field].type.__args__
    stretched = {"rope_factor": 2.0} if field == "rope_scaling" else {}
    made = [fingerprint(replace(TINY, **{field: one}, **(stretched if one != "none" else {}))) for one in choices]
    assert len(set(made)) == len(choices)


def test_context_sizes_the_table_of_learned_positions():
    learned = replace(TINY, pos="learned")
    assert fingerprint(learned) != fingerprint(replace(learned, context=20))


@pytest.mark.parametrize("changes, words", [
    (dict(width=100, heads=3), ["width 100", "3 heads", "2 or 4"]),
    (dict(heads=12, width=96, kv_heads=5), ["12 query heads", "5 KV heads", "4 or 6"]),
    (dict(head_dim=7), ["head size 7", "odd", "head_dim = 8"]),
    (dict(layers=0), ["layers = 0", "at least 1"]),
    (dict(norm="rsm"), ["'rsm'", "'rms'"]),
    (dict(bias=("qvk",)), ["'qvk'", "'qkv'"]),
    (dict(kv_heads=0), ["kv_heads = 0"]),
    (dict(rope_theta=-1.0), ["rope_theta = -1.0"]),
    (dict(rope_dim=3), ["rope_dim = 3", "multiple of 2", "6"]),
    (dict(rope_axes=2), ["rope_dim = 6", "2 axes", "multiple of 4"]),
    (dict(pattern="gx"), ["'gx'", "l for each with a window"]),
    (dict(pattern="gl"), ["'gl'", "window = None"]),
    (dict(window=5), ["'g'", "window = 5"]),
    (dict(residual_alpha=2.0), ["residual_alpha = 2.0", "'pre'", "post"]),
    (dict(experts=2, top_k=3), ["top_k = 3", "1 to 2"]),
    (dict(rope_scaling="linear"), ["'linear'", "1.0", "factor"]),
    (dict(rope_slow=40.0), ["rope_slow = 40.0", "rope_fast = 32.0"]),
])
def test_impossible_models_are_refused_with_both_numbers(changes, words):
    with pytest.raises(ValueError) as error:
        replace(TINY, **changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=16, microbatch_size=5), ["16", "5", "4 or 8"]),
    (dict(steps=0), ["steps = 0"]),
    (dict(seed=-1), ["seed = -1", "negative"]),
    (dict(lr=0.0), ["lr = 0.0"]),
    (dict(beta2=1.0), ["beta2 = 1.0"]),
    (dict(min_lr=2.0), ["min_lr = 2.0"]),
    (dict(precision="fp4"), ["'fp4'", "fp8"]),
    (dict(precision="fp32", master_weights=True), ["'fp32'", "master_weights", "bf16"]),
    (dict(precision="bf16", loss_scale=8.0), ["loss_scale = 8.0", "'bf16'", "fp16"]),
    (dict(cooldown=1.5), ["cooldown = 1.5"]),
    (dict(z_loss=-1.0), ["z_loss = -1.0"]),
    (dict(schedule="cosin"), ["'cosin'", "'cosine'"]),
])
def test_impossible_training_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        TrainConfig(**changes)
    for word in words:
        assert word in str(error.value)


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ValueError, match="no field 'kv_head'. Did you mean 'kv_heads'"):
        from_dict(ModelConfig, {"kv_head": 2})
    assert from_dict(ModelConfig, {"bias": ["qkv"]}).bias == ("qkv",)


def test_parallel_config_multiplies_its_axes():
    assert ParallelConfig(dp=4).world_size == 4 and ParallelConfig(dp=4, tp=2).world_size == 8
    assert ParallelConfig(tp=2).axes == {"tp": 2}
    for wrong in ({"dp": 0}, {"tp": 0}, {"sequence_parallel": True}, {"bucket_mb": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ParallelConfig(**wrong)


def test_each_rank_has_an_equal_share_of_the_batch():
    assert ParallelConfig(dp=4).share(16) == 4
    for dp, batch, words in ((3, 16, "a batch of 15 or 18, or dp = 2 or 4"), (8, 4, "a batch of 8, or dp = 4.")):
        with pytest.raises(ValueError, match=words):
            ParallelConfig(dp=dp).share(batch)


def test_gated_default_width_keeps_the_parameters_of_a_plain_layer():
    for width in (96, 768, 4096):
        gated, plain = ModelConfig(width=width, mlp="swiglu"), ModelConfig(width=width, mlp="gelu")
        # three matrices of 8C/3 against two of 4C; rounding up to a multiple of 8 adds less than 8 columns
        assert 0 <= 3 * gated.ffn_size - 2 * plain.ffn_size < 3 * 8
