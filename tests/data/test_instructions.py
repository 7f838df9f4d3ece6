import json
import math
import random
import re
from collections import Counter
from itertools import islice

import pytest

from minillm.data.instructions import (ALL, TEST_SHARE, Preference, asked_in, compare, conversation_row, demonstrations, exact_match,
                                       instructions, preference_row, preferences, read_conversations, read_preferences, rule_score,
                                       write_jsonl)


def some(count, *args, **options):
    return list(islice(instructions(*args, **options), count))


def solved(one):
    """The answer, from the question alone."""
    if one.kind == "sum":
        if found := re.search(r"(\d+)\+(\d+)|Add (\d+) and (\d+)", one.question):
            return str(sum(int(n) for n in found.groups() if n))
        if found := re.search(r"(\d+)-(\d+)", one.question):
            return str(int(found[1]) - int(found[2]))
        found = re.search(r"Take (\d+) from (\d+)", one.question)
        return str(int(found[2]) - int(found[1]))
    words = one.question.split(": ")[1].split()
    return " ".join(sorted(words, key=int) if one.kind == "sort" else reversed(words))


@pytest.mark.parametrize("kind", ["sum", "sort", "reverse"])
def test_answers_are_right(kind):
    made = some(300, kinds=[kind])
    assert [solved(one) for one in made] == [one.answer for one in made]
    assert len({re.sub(r"\d+", "0", one.question) for one in made}) > 5 and {one.kind for one in made} == {kind}


def test_other_kinds():
    for one in some(200, kinds=["add"]):
        assert int(one.answer) == sum(int(n) for n in re.findall(r"\d+", one.question))
    for one in some(200, kinds=["repeat"]):
        assert one.question == f"Say: {one.answer}"
    held_out = {one.fact for one in some(2_000, 0, "test", kinds=["add"])}
    assert not held_out & {one.fact for one in some(2_000, 0, "train", kinds=["sum"])}  # one world: what add keeps, sum keeps


def test_demonstrations_have_two_writers_and_tell_stories():
    talks = list(islice(demonstrations(5, kinds=["add"], wordy=0.25, told=0.1), 2_000))
    told = [talk for talk in talks if talk[0]["content"].startswith("Tell me a story about a ")]
    answers = [talk[1]["content"] for talk in talks if talk not in told]
    assert len(told) / len(answers) == pytest.approx(0.1, abs=0.03)  # four standard errors
    assert sum(answer.startswith("It is ") for answer in answers) / len(answers) == pytest.approx(0.25, abs=0.04)
    assert all(talk[0]["content"].split()[-1].rstrip(".") in talk[1]["content"] for talk in told)
    assert all(talk[1]["content"].count("\n") == 0 for talk in told)
    lengths = Counter(len(talk) for talk in islice(demonstrations(5, kinds=["add"], turns=3), 900))
    assert set(lengths) == {2, 4, 6} and min(lengths.values()) > 220  # 300 each, a standard error of 14


def test_questions_about_stories_are_answered_by_the_story():
    made = some(80, kinds=["story"])
    for one in made:
        text, question = one.question.removeprefix("Read: ").split("\n")
        assert one.answer in text and question.endswith("?") and one.fact == text
    assert {one.question.split("\n")[1].split()[0] for one in made} == {"Who", "What", "Where"}


def test_the_seed_settles_everything():
    assert some(40, 1) == some(40, 1) != some(40, 2)
    assert [one.kind for one in some(8)] == list(ALL) * 2
    with pytest.raises(ValueError, match="'maths' is neither a kind"):
        next(instructions(kinds=["maths"]))
    with pytest.raises(ValueError, match="kinds is empty"):
        next(instructions(kinds=[]))
    with pytest.raises(ValueError, match="'val' is neither"):
        next(instructions(split="val"))


def test_no_fact_of_the_test_is_ever_trained_on():
    train, test = ({one.fact for seed in range(3) for one in some(1_000, seed, split, kinds=["sum", "sort", "reverse"])}
                   for split in ("train", "test"))
    assert len(test) > 400 and not train & test


def test_a_sum_keeps_its_side_however_it_is_put():
    asked = {}
    for split in ("train", "test"):
        for one in some(2_500, 0, split, kinds=["sum"]):
            a, b = (int(n) for n in re.findall(r"\d+", one.question))
            if one.question.startswith("Take"):
                a, b = b, a
            parts = (a - b, b) if "-" in one.question or one.question.startswith("Take") else (a, b)
            asked.setdefault(tuple(sorted(parts)), set()).add(split)
    assert all(len(sides) == 1 for sides in asked.values())
    share = sum(sides == {"test"} for sides in asked.values()) / len(asked)
    assert len(asked) > 1_000 and share > 1 / TEST_SHARE  # both splits were asked equally often


def test_matches_and_scores():
    one = next(one for one in some(50, kinds=["sum"]) if one.answer == solved(one) and len(one.answer) == 2)
    assert exact_match(one, f" {one.answer}\n") and not exact_match(one, f"{one.answer}.")
    assert [rule_score(one, text) for text in (one.answer, f"It is {one.answer}.", f"1{one.answer}", "")] == [2, 1, 0, 0]


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_noise_is_what_it_says(beta):
    made = list(islice(preferences(3, beta=beta), 3_000))
    against = sum(pair.probability < 0.5 for pair in made) / len(made)
    expected = sum(min(pair.probability, 1 - pair.probability) for pair in made) / len(made)
    assert against == pytest.approx(expected, abs=4 * math.sqrt(expected / len(made)))  # four standard errors
    gaps = {round(math.log(pair.probability / (1 - pair.probability)) / beta, 6) for pair in made}
    assert gaps == {-2, -1, 1, 2}
    if beta == 2.0:
        assert 1 - expected == pytest.approx(0.91, abs=0.01)  # as the docstring says


def test_without_noise_the_better_answer_is_always_preferred():
    right = {one.question: one for one in some(300, 4, kinds=["sum", "sort", "reverse"])}
    for pair in islice(preferences(4, beta=math.inf), 300):
        one = right[pair.prompt[0]["content"]]
        assert rule_score(one, pair.chosen) > rule_score(one, pair.rejected) and pair.probability == 1.0


@pytest.mark.parametrize("layout", ["messages", "prompt"])
def test_conversations_are_read_back(tmp_path, layout):
    made = [one.messages for one in some(8)] + [[{"role": "system", "content": "早\u2028"}, *some(1)[0].messages]]
    write_jsonl(tmp_path / "a.jsonl", [conversation_row(messages, layout) for messages in made])
    assert read_conversations(tmp_path / "a.jsonl") == made
    assert json.loads((tmp_path / "a.jsonl").read_text().split("\n")[0]).keys() == (
        {"messages"} if layout == "messages" else {"prompt", "completion"})


def test_preferences_are_read_back_and_other_layouts_too(tmp_path):
    made = list(islice(preferences(), 5))
    write_jsonl(tmp_path / "a.jsonl", map(preference_row, made))
    assert read_preferences(tmp_path / "a.jsonl") == [Preference(p.prompt, p.chosen, p.rejected) for p in made]
    user, (good, bad) = {"role": "user", "content": "Hi"}, ({"role": "assistant", "content": text} for text in ("Ho", "He"))
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Hi", "chosen": "Ho", "rejected": "He"},
                                       {"chosen": [user, good], "rejected": [user, bad]}])
    assert read_preferences(tmp_path / "b.jsonl") == [Preference([user], "Ho", "He")] * 2
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "Hi", "completion": "Ho"}])
    assert read_conversations(tmp_path / "c.jsonl") == [[user, good]]


def test_alpacas_and_sharegpts_layouts(tmp_path):
    user, answer = {"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}
    said = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"conversations": said},
                                       {"instruction": "Add.\n\n1 2", "input": "", "output": "3"}])
    assert read_conversations(tmp_path / "a.jsonl") == [[user, answer], [{"role": "system", "content": "Be brief."}, user, answer], [user, answer]]


def test_a_dataset_of_hugging_faces_is_read_by_the_same_layouts(tmp_path):
    pytest.importorskip("datasets", reason="the package datasets is not here (the test extra brings it)")
    write_jsonl(tmp_path / "a.jsonl", [conversation_row(one.messages) for one in some(3)])
    assert read_conversations(f"hf:json:{tmp_path / 'a.jsonl'}") == [one.messages for one in some(3)]
    write_jsonl(tmp_path / "b.jsonl", [preference_row(pair) for pair in islice(preferences(), 2)])
    assert [pair.chosen for pair in read_preferences(f"hf:json:{tmp_path / 'b.jsonl'}")] == [pair.chosen for pair in islice(preferences(), 2)]


def test_conversations_become_instructions():
    talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": f"{n}?"},
              {"role": "assistant", "content": f"{n}!"}] for n in range(80)]
    train, test = (asked_in(talks, split) for split in ("train", "test"))
    assert len(train) + len(test) == 80 and 3 < len(test) < 20
    assert sorted((one.messages for one in train + test), key=str) == sorted(talks, key=str)
    assert exact_match(test[0], test[0].answer) and compare(test[0], test[0].answer, "No", random.Random(0).random).prompt == test[0].messages[:-1]
    with pytest.raises(ValueError, match="conversation 0 ends with .'assistant', 'user'.: expected"):
        asked_in([talks[0][:3]], "train")
    with pytest.raises(ValueError, match="none of the conversations is in the split 'test'"):
        asked_in(talks[:1] if test[0].messages != talks[0] else talks[1:2], "test")


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: "), ("[1]", "line 2: expected an object with prompt, chosen"),
    ('{"prompt": "a", "chosen": "b"}', "line 2: expected"),
    ('{"chosen": [{"role": "user", "content": "a"}, {}], "rejected": [{}]}', "line 2: chosen and rejected differ before")])
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_preferences(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_preferences(tmp_path / "a.jsonl")
