from dataclasses import replace

import pytest
import torch

from minillm.config import ModelConfig
from minillm.infer.generate import generate
from minillm.infer.kv_cache import StaticCache
from minillm.infer.sampling import Sampling
from minillm.model import families
from minillm.model.transformer import Transformer, num_params

LLAMA = ModelConfig(vocab_size=61, layers=3, width=40, heads=4, kv_heads=2, head_dim=6, ffn_width=56, context=32)
GPT2 = ModelConfig(vocab_size=61, layers=3, width=40, heads=4, ffn_width=56, context=32, norm="layer", mlp="gelu_tanh",
                   pos="learned", bias=("qkv", "out", "mlp", "norm"))
SMALL = dict(vocab_size=61, layers=3, width=40, heads=4, ffn_width=56, context=32)
CONFIGS = {
    "llama": LLAMA, "gpt2": GPT2,
    "gpt1": replace(families.gpt1, **SMALL),
    "gpt3": replace(families.gpt3, **SMALL | dict(layers=4), window=3),
    "bloom": replace(families.bloom, **SMALL | dict(heads=5)),
    "gptj": replace(families.gptj, **SMALL, rope_dim=4),
    "palm": replace(families.palm, **SMALL | dict(heads=5), head_dim=6),
    "falcon 40b": replace(families.falcon_40b, **SMALL, kv_heads=2),
    "chatglm": replace(families.chatglm, **SMALL | dict(heads=5)),
    "llama 3.1": replace(families.llama31, **SMALL, kv_heads=2, rope_context=8),
    "mistral": replace(families.mistral, **SMALL, kv_heads=2, window=3),
    "qwen3 moe": replace(families.qwen3_moe, **SMALL, kv_heads=2, head_dim=6, experts=4, top_k=2),
    "olmo2": replace(families.olmo2, **SMALL),
    "gemma2": replace(families.gemma2, **SMALL | dict(layers=4), kv_heads=2, head_dim=6, window=3),
    "waves": replace(LLAMA, pos="sinusoidal"), "t5's distances": replace(LLAMA, pos="relative", relative_buckets=6, relative_distance=9),
    "gemma3": replace(families.gemma3, **SMALL | dict(layers=6), kv_heads=1, head_dim=6, window=3),
}
BOTH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_model(config):
    """A model in float64 whose every parameter is random: zeros and ones would hide mistakes."""
    model = Transformer(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def ids(*shape, seed=2):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@BOTH
def test_the_cache_gives_the_same_logits(config):
    model, text = random_model(config), ids(2, 12)
    cache = StaticCache(config, 2, 12, dtype=torch.float64)
    pieces = [model(part, cache=cache) for part in text.split([5, 1, 3, 1, 2], dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, 1), model(text), rtol=1e-10, atol=1e-10)  # float64 rounding


@BOTH
def test_left_padding_changes_nothing(config):
    model, short, long = random_model(config), ids(1, 5), ids(1, 9, seed=3)
    both = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), 1), long))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = False
    out = model(both, padding_mask=real)
    torch.testing.assert_close(out[:1, 4:], model(short), rtol=1e-10, atol=1e-10)  # float64 rounding
    torch.testing.assert_close(out[1:], model(long), rtol=1e-10, atol=1e-10)
    assert out.isfinite().all()
    cache = StaticCache(config, 2, 9, dtype=torch.float64)
    model(both[:, :6], padding_mask=real[:, :6], cache=cache)
    step = model(both[:, 6:7], padding_mask=real[:, :7], cache=cache)
    torch.testing.assert_close(step, out[:, 6:7], rtol=1e-10, atol=1e-10)


@BOTH
def test_packed_documents_do_not_see_one_another(config):
    model, first, second = random_model(config), ids(1, 5), ids(1, 4, seed=3)
    packed = model(torch.cat((first, second), 1), segment_ids=torch.tensor([[0] * 5 + [1] * 4]),
                   positions=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
    alone = torch.cat((model(first), model(second)), 1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)  # float64 rounding


@BOTH
def test_no_token_sees_the_future(config):
    model, text = random_model(config), ids(1, 10)
    changed = text.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 61
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.allclose(before[:, 6:], after[:, 6:])
    # a prefix of 8 may look ahead: the change is seen by the first token
    assert not torch.allclose(model(text, prefix_len=8)[:, 0], model(changed, prefix_len=8)[:, 0])


@BOTH
def test_more_than_logits_on_request(config):
    model, text = random_model(config), ids(2, 7)
    out = model(text, return_hidden=True, return_attention=True)
    torch.testing.assert_close(out.logits, model(text), rtol=1e-10, atol=1e-10)  # by hand against torch's attention
    assert [tuple(h.shape) for h in out.hidden] == [(2, 7, 40)] * (config.layers + 1)
    assert [tuple(a.shape) for a in out.attention] == [(2, config.heads, 7, 7)] * config.layers
    torch.testing.assert_close(model.scores(out.hidden[-1]), out.logits)
    assert model(text, return_hidden=True).attention is None


def test_same_seed_same_weights_and_the_meta_device_takes_no_memory():
    a, b, c = Transformer(LLAMA, seed=3), Transformer(LLAMA, seed=3), Transformer(LLAMA, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    meta = Transformer(LLAMA, device="meta")
    assert num_params(meta) == num_params(a) and all(p.is_meta for p in meta.parameters())


def test_initial_weights_have_the_sizes_they_should():
    model = Transformer(replace(LLAMA, width=256, head_dim=64, ffn_width=512, init_std=0.02))
    # standard errors of these estimates are below 0.5%
    assert model.blocks[0].attention.q.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].ffn.down.weight.std().item() == pytest.approx(0.02 / 6 ** 0.5, rel=0.02)
    assert (model.norm.weight == 1).all()


def test_tied_head_is_the_embedding():
    model = Transformer(LLAMA)
    assert model.head.weight is model.embed.weight
    assert Transformer(replace(LLAMA, tied=False)).head.weight.shape == (61, 40)


@pytest.mark.parametrize("bad, words", [(61, "token id 61 is outside the vocabulary of 61"), (-1, "token id -1")])
def test_ids_outside_the_vocabulary_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        Transformer(LLAMA)(torch.tensor([[1, bad]]))


def test_a_text_longer_than_the_learned_positions():
    with pytest.raises(ValueError, match="position 32 is beyond the 32 positions"):
        Transformer(GPT2)(ids(1, 33))
    assert Transformer(LLAMA)(ids(1, 33)).shape == (1, 33, 61)  # rotary positions go on


def test_the_cache_says_when_it_is_full():
    model, cache = Transformer(LLAMA), StaticCache(LLAMA, 1, 4)
    assert cache.bytes == 2 * 3 * 1 * 2 * 6 * 4 * 4  # keys and values · L · B · G · D · size · 4 bytes
    model(ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens and cannot take 5"):
        model(ids(1, 2), cache=cache)
    with pytest.raises(ValueError, match="segment_ids and cache"):
        model(ids(1, 1), cache=cache, segment_ids=torch.zeros(1, 1, dtype=torch.long))


@BOTH
def test_a_prefix_with_a_cache_and_padding(config):
    model, text = random_model(config), ids(2, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :3] = False
    prefix = torch.tensor([7, 5])
    whole = model(text, prefix_len=prefix, padding_mask=real)
    cache = StaticCache(config, 2, 12, dtype=torch.float64)
    pieces = [model(part, prefix_len=prefix, padding_mask=real[:, :end], cache=cache)
              for part, end in zip(text.split([7, 1, 1, 3], 1), (7, 8, 9, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-10, atol=1e-10)  # float64 rounding
    alone = model(text[:1, 3:], prefix_len=4)
    torch.testing.assert_close(whole[:1, 3:], alone, rtol=1e-10, atol=1e-10)


@BOTH
def test_gradients_reach_every_parameter(config):
    model = random_model(config)
    model(ids(2, 20)).square().sum().backward()
    # an expert that no token chose would have none: 40 tokens choose among 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_window_looks_no_further_than_it_says():
    model, text = random_model(replace(CONFIGS["mistral"], layers=1)), ids(1, 10)
    changed = text.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 61
    same = [torch.equal(a, b) for a, b in zip(model(text)[0], model(changed)[0])]
    assert same == [True] * 4 + [False] * 3 + [True] * 3  # itself and two more


@BOTH
def test_writing_with_and_without_the_cache(config):
    model, real = random_model(config), torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False
    options = dict(sampling=Sampling(temperature=0), padding_mask=real, prefix_len=6)
    with_cache, without = (generate(model, ids(2, 6), 9, cached=cached, **options) for cached in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape == (2, 15)
