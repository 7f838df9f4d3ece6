from dataclasses import replace

import pytest

from minillm.course.widgets import (encoding_of, merge_stepper, merge_steps, render_both, render_merge_step, render_tokens,
                                    spell, temperature_slider, tiktoken_encoding, token_colours)
from minillm.text.bpe import BPETokenizer

TOKENIZER = BPETokenizer.train(["low low low low low lower lower newest newest widest"], 270)


def test_each_step_is_one_merge_and_the_last_is_the_encoding():
    steps = merge_steps("lower", TOKENIZER)
    assert steps[0] == [b"l", b"o", b"w", b"e", b"r"]
    assert all(len(a) > len(b) and b"".join(b) == b"lower" for a, b in zip(steps, steps[1:]))
    assert [TOKENIZER.ranks[token] for token in steps[-1]] == TOKENIZER.encode("lower")


def test_pages_escape_and_count():
    assert spell(b" a\n") == "␣a⏎" and spell(b"\xe6\x97") == "⟨e6⟩⟨97⟩"
    page = render_tokens([b"<b>", b"x"], "name", [7, 8])
    assert "&lt;b&gt;" in page and "2 tokens" in page and "id 7" in page
    assert "next: " in render_merge_step("lower", TOKENIZER, 0)
    assert "no two neighbours" in render_merge_step("lower", TOKENIZER, 99)
    both = render_both("low", {"ours": encoding_of(TOKENIZER), "tiktoken": tiktoken_encoding(TOKENIZER.to_tiktoken())})
    assert both.count("1 tokens") == 2


def test_controls_redraw():
    stepper = merge_stepper(TOKENIZER, "lower")
    word, page = stepper.children[0], stepper.children[-1]
    before = page.value
    word.value = "widest"
    assert page.value != before and "w" in page.value
    colours = token_colours({"ours": encoding_of(TOKENIZER)}, "low")
    colours.children[0].value = "low low"
    assert "2 tokens" in colours.children[-1].value
    slider = temperature_slider(lambda temperature, seed: f" at {temperature} {seed}", "Now")
    slider.children[0].value = 1.5
    assert "at 1.5 0" in slider.children[-1].value


def test_attention_is_drawn_for_every_pair_that_may_look():
    from minillm.course.widgets import attention_browser, render_attention
    weights = [[1.0, 0.0], [0.25, 0.75]]
    picture = render_attention(["<a>", "b"], weights)
    assert picture.count("<rect") == 3 and "b looks at &lt;a&gt;: 0.25" in picture and "<a>" not in picture
    browser = attention_browser(lambda text: (list(text), [[weights] * 2] * 3), "xy", 3, 2)
    box, sliders = browser.children[-1], browser.children[1].children
    assert "layer 0, head 0" in box.value
    sliders[0].value = 2
    assert "layer 2, head 0" in box.value


def test_a_family_of_ones_own_is_priced_and_named():
    from minillm.course.widgets import family_builder, render_family
    from minillm.model.families import gpt2
    assert "gpt2, in all but size" in render_family(gpt2, {}) and "124,439,808" in render_family(gpt2, {})
    assert "bloom" in render_family(gpt2, {"pos": "alibi", "embed_norm": True})
    assert "cannot share 5 KV heads" in render_family(gpt2, {"kv_heads": 5})
    builder = family_builder()
    assert "gpt2, in all but size" in builder.children[-1].value
    builder.children[0].children[4].value = "alibi"
    assert "gpt2, in all but size" not in builder.children[-1].value


def test_a_number_is_drawn_in_every_format():
    from minillm.course.widgets import number_formats, render_number
    page = render_number("65520")
    assert page.count("<tr>") == 6 and page.count("overflows") == 2  # fp16 and e5m2
    for bits in ("11111111111000000000000", "10001111", ">448<", "exact"):
        assert bits in page
    assert render_number("1e-8").count("underflows") == 3 and "-6.2%" in render_number("0.1")
    assert render_number("-inf").count("exact") == 4 and render_number("nan").count("exact") == 5 and "exact" in render_number("0")
    assert "&lt;b&gt; is no number" in render_number("<b>")
    box = number_formats()
    box.children[0].value = "2"
    assert box.children[-1].value == render_number("2")


def test_a_budget_is_spent_by_a_law():
    from minillm.course.widgets import budget_slider, render_budget
    from minillm.plan.devices import DEVICES
    from minillm.course.scaling_law import CHINCHILLA
    page = render_budget(CHINCHILLA, 23.76, DEVICES["tpu-v4"], 512)
    assert "5.8e+23 operations" in page and "32.2B parameters" in page and "2.98T tokens, 93 a parameter" in page
    best, less, more = (CHINCHILLA.loss(n, 10 ** 23.76 / 6 / n) for n in (32.18e9, 16.09e9, 64.35e9))
    assert best < less and best < more and f"{more:.3f} on half" in page and f"{best:.3f} nats" in page
    slider = budget_slider({"Chinchilla": CHINCHILLA, "flat": replace(CHINCHILLA, alpha=0.28)})
    before = slider.children[-1].value
    slider.children[0].children[0].value = "flat"
    assert slider.children[-1].value != before
    slider.children[1].children[0].value = "t4"
    assert "t4" in slider.children[-1].value


def test_the_ring_turns_as_the_code_does():
    from minillm.course.widgets import render_ring, ring_states, ring_stepper
    for size in (2, 3, 5):
        states, everybody = ring_states(size), frozenset(range(size))
        assert len(states) == 2 * size - 1 and all(cell == everybody for row in states[-1][0] for cell in row)
        halfway = states[size - 1][0]
        assert all(halfway[rank][rank] == everybody for rank in range(size))  # a reduce-scatter
        sums = [sum(len(cell) for row in table for cell in row) for table, _ in states]
        assert sums == sorted(sums) and all(len(sent) == size for _, sent in states[1:])
    assert "step 3 of 6" in render_ring(4, 3) and "0+1+2+3" in render_ring(4, 3) and "0+1+2+3" not in render_ring(4, 2)
    assert render_ring(4, 99) == render_ring(4, 6)
    stepper = ring_stepper(3)
    before = stepper.children[-1].value
    stepper.children[1].children[1].value = 2
    assert stepper.children[-1].value != before and "step 2 of 4" in stepper.children[-1].value


def test_buckets_are_drawn_beside_backward():
    from minillm.course.widgets import bucket_slider, render_buckets
    from minillm.plan.network import find_link, predict
    page = render_buckets(0.3, 13e9, 13e9, 8, "nvlink-4")
    whole = 1e3 * predict("ring_all_reduce", 13e9, 8, find_link("nvlink-4"))
    assert page.count("<rect") == 4 and f"<b>1 bucket of 13,000 MB</b>, 8 ranks, nvlink-4: {300 + whole:,.0f} ms" in page
    assert render_buckets(0.3, 13e9, 3.25e9, 8, "nvlink-4").count("<rect") == 2 + 2 * 4
    assert render_buckets(0.3, 13e9, 1e6, 8, "infiniband-ndr").count("<rect") < 100  # of 13,000 buckets
    with pytest.raises(ValueError, match="no link is called"):
        render_buckets(0.3, 13e9, 1e6, 8, "string")
    slider = bucket_slider(0.3, 13e9)
    before = slider.children[-1].value
    slider.children[0].value = 9.0
    assert slider.children[-1].value != before and "13 buckets of 1,000 MB" in slider.children[-1].value
    slider.children[1].children[1].value = "ethernet-25g"
    assert "ethernet-25g" in slider.children[-1].value


def test_who_holds_what_of_a_preset_or_why_nobody_can():
    from minillm.course.widgets import render_shards, shard_browser
    page = render_shards("llama3-8b", 16)
    assert page.count("128 x 4,096  (each by 2)") == 2  # 8 KV heads on 16 ranks
    assert page.count("<tr>") == 13 and page.count("#DDDDDD") == 3 * 16  # three norms are whole
    assert "25 query heads cannot be shared out evenly to 2 ranks" in render_shards("gpt2-xl", 2)
    assert "rank 0 to 0" in render_shards("gpt2-xl", 1)
    browser = shard_browser()
    assert browser.children[-1].value == render_shards("llama3-8b", 4)
    browser.children[0].children[1].value = 3
    assert "Numbers of ranks that work: 1, 2, 4, 8" in browser.children[-1].value
