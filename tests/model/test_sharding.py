from dataclasses import replace

import pytest

from minillm.model.families import PRESETS, preset
from minillm.model.sharding import Split, _look_up, sharding_rows, sharding_table, why_not
from minillm.model.transformer import Transformer

# Which presets 8 ranks cannot share, and the two numbers that their reasons name.
REFUSED_BY_8 = {
    "first": ("4 query heads", "8 ranks"), "gpt1": ("12 query heads", "8 ranks"), "gpt2": ("12 query heads", "8 ranks"),
    "gpt2-large": ("20 query heads", "8 ranks"), "gpt2-xl": ("25 query heads", "8 ranks"), "falcon-7b": ("71 query heads", "8 ranks"),
    "llama-33b": ("52 query heads", "8 ranks"), "qwen2-7b": ("28 query heads that share 4 KV heads", "8 ranks"),
    "gemma3-1b": ("4 query heads", "8 ranks"), "mixtral-8x7b": ("tp = 8", "8 experts"), "qwen3-30b-a3b": ("tp = 8", "128 experts"),
    "olmoe-1b-7b": ("tp = 8", "64 experts"), "olmo2-7b": ("all 32 heads", "a rank would see 4"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_covers_every_parameter_and_its_pieces_fit(name):
    config = replace(PRESETS[name], layers=1)
    if config.experts:
        assert why_not(config, 2)
        return
    table, splits = sharding_table(config), {}
    for parameter, tensor in Transformer(config, device="meta").named_parameters():
        splits[parameter] = split = _look_up(parameter, table)
        along = 1 if split.how == "rows" or parameter.startswith("relative") else 0
        assert tensor.shape[along] % split.pieces == 0
        if tensor.ndim == 2:  # matrices are cut; what stays whole is a vector, or a table of positions
            assert (split.how == "whole") == (parameter == "positions.weight")
    assert splits["blocks.0.attention.k.weight"].pieces == config.kv_size
    assert {split.how for split in splits.values()} == {"columns", "rows", "vocabulary", "whole"}


@pytest.mark.parametrize("name", PRESETS)
def test_what_eight_ranks_can_share(name):
    reason = why_not(PRESETS[name], 8)
    assert why_not(PRESETS[name], 1) is None and (reason is not None) == (name in REFUSED_BY_8)
    assert all(number in reason for number in REFUSED_BY_8.get(name, ()))


def test_reasons_say_what_works():
    assert why_not(preset("gpt2-xl"), 8).endswith("Numbers of ranks that work: 1, 5, 25.")
    assert why_not(preset("qwen2-7b"), 7).endswith("Numbers of ranks that work: 1, 2, 4, 28.")  # 7 of 28 heads, but 4 KV heads
    assert why_not(preset("llama3-8b"), 16) is None  # a KV head on two ranks each
    assert why_not(preset("gpt2"), 0) == "tp = 0: at least 1 rank is needed."
    assert "ffn_width = 3 is less than 4 ranks" in why_not(preset("gpt2", ffn_width=3), 4)
    assert "vocab_size = 2 is less than 4 ranks" in why_not(preset("gpt2", vocab_size=2), 4)
    with pytest.raises(ValueError, match="12 query heads cannot be shared out evenly to 8 ranks"):
        sharding_rows(preset("gpt2"), 8)


def test_the_first_entry_counts():
    assert _look_up("a.b", {"a.*": Split("rows", 2), "*": Split("whole")}) == Split("rows", 2)


def test_the_table_for_reading():
    rows = [line.split() for line in sharding_rows(preset("llama3-8b"), 16).splitlines()]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["embed.weight"] == "128,256 x 4,096 vocabulary 8,016 x 4,096".split()
    assert by_name["blocks.i.attention.q.weight"] == "4,096 x 4,096 columns 256 x 4,096".split()
    assert by_name["blocks.i.attention.k.weight"] == "1,024 x 4,096 columns 128 x 4,096 (each by 2)".split()
    assert by_name["blocks.i.attention.out.weight"] == "4,096 x 4,096 rows 4,096 x 256".split()
    assert by_name["blocks.i.ffn.down.weight"] == "4,096 x 14,336 rows 4,096 x 896".split()
    assert by_name["norm.weight"] == "4,096 whole 4,096".split()
    t5 = sharding_rows(preset("llama3-8b", pos="relative"), 4)
    assert ["relative.weight", "32", "x", "32", "columns", "32", "x", "8"] in [line.split() for line in t5.splitlines()]
    # 50,257 tokens on 4 ranks: the first has one more, and its shape is shown
    assert "12,565 x 768" in sharding_rows(preset("gpt2"), 4)
