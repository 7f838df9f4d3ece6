import json

import pytest

from minillm.data.tasks import SEPARATOR, Item, chance, read_items, shuffled, with_examples, write_items

SUMS = [Item(f"{n} and one make", (f" {n + 1}", f" {n}"), 0, domain="sums") for n in range(6)]


def test_what_is_written_is_read_back(tmp_path):
    items = [*SUMS, Item("", ("早\u2028\n\"", " ß"), 1)]  # U+2028 ends a line for str.splitlines, and must not here
    write_items(tmp_path / "a.jsonl", items)
    assert read_items(tmp_path / "a.jsonl") == items
    written = [Item("Say two:", target=" two"), Item("", target="x", domain="d")]
    write_items(tmp_path / "b.jsonl", written)
    assert read_items(tmp_path / "b.jsonl") == written
    assert json.loads((tmp_path / "b.jsonl").read_text().split("\n")[0]) == {"context": "Say two:", "target": " two"}


GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 1}'
BAD = {
    "no json": ("{", ["expected a JSON object", "'{'"]),
    "no object": ("[1]", ["expected a JSON object"]),
    "missing": ('{"context": "a", "choices": ["b", "c"]}', ["key 'answer' is missing"]),
    "no context": ('{"target": "b"}', ["key 'context' is missing"]),
    "unknown": (GOOD[:-1] + ', "label": 1}', ["unknown key 'label'"]),
    "out of range": (GOOD.replace("1", "2"), ["answer = 2", "0 to 1"]),
    "negative": (GOOD.replace("1", "-1"), ["answer = -1"]),
    "kind": (GOOD.replace("1", '"b"'), ["answer = 'b'", "expected int"]),
    "true is no place": (GOOD.replace("1", "true"), ["answer = True"]),
    "a number among choices": (GOOD.replace('"c"', "3"), ["3", "no text"]),
    "one choice": ('{"context": "a", "choices": ["b"], "answer": 0}', ["['b']", "at least two"]),
    "empty choice": (GOOD.replace('"c"', '""'), ["none empty"]),
    "equal choices": (GOOD.replace('"c"', '"b"'), ["of its own"]),
    "both": (GOOD[:-1] + ', "target": "b"}', ["not both"]),
    "blank target": ('{"context": "a", "target": " "}', ["nothing to write"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, case):
    line, words = BAD[case]
    (tmp_path / "t.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError) as error:
        read_items(tmp_path / "t.jsonl")
    for word in ["t.jsonl, line 3: ", *words]:
        assert word in str(error.value)


def test_files_that_are_no_task(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no items"):
        read_items(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(GOOD + '\n{"context": "a", "target": "b"}')
    with pytest.raises(ValueError, match="two files"):
        read_items(tmp_path / "t.jsonl")


def test_examples_are_other_items_with_their_answers():
    seen = set()
    for seed in range(20):
        for item, asked in zip(SUMS, with_examples(SUMS, 3, seed), strict=True):
            *examples, question = asked.context.split(SEPARATOR)
            assert question == item.context and asked.choices == item.choices and asked.domain == "sums"
            assert len(set(examples)) == 3
            others = {other.context + other.solution for other in SUMS if other is not item}
            assert set(examples) <= others
            seen.add(tuple(examples))
    assert len(seen) > 60  # of 6 * 5 * 4 orders of three


def test_examples_follow_the_seed_and_none_are_the_plain_question():
    assert with_examples(SUMS, 2, 1) == with_examples(SUMS, 2, 1) != with_examples(SUMS, 2, 2)
    assert with_examples(SUMS, 0) == SUMS


def test_an_item_with_the_same_text_is_no_example():
    twins = [SUMS[0], SUMS[0], SUMS[1]]
    assert with_examples(twins, 1)[0].context.startswith(SUMS[1].context)
    with pytest.raises(ValueError, match="2 examples need .* has 1 with another text"):
        with_examples(twins, 2)
    with pytest.raises(ValueError, match="shots = -1"):
        with_examples(SUMS, -1)


def test_targets_are_shown_in_examples_too():
    first, _ = with_examples([Item("Say two:", target=" two"), Item("Say six:", target=" six")], 1)
    assert first.context == "Say six: six\n\nSay two:" and first.target == " two"


def test_chance_is_that_of_a_guess():
    assert chance([SUMS[0], Item("", ("a", "b", "c", "d"), 0)]) == (1 / 2 + 1 / 4) / 2
    assert chance([Item("a", target="b")]) == 0


def test_shuffling_keeps_everything():
    draw = iter([0.9, 0.1, 0.5]).__next__
    assert shuffled("abc", draw) == ["b", "c", "a"]
