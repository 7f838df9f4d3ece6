import re

import pytest

from minillm.data.grammar import NUMBERS
from minillm.data.story_tasks import TASKS, best_accuracy, story_task
from minillm.data.tasks import Item, chance, with_examples

CHOSEN = [name for name in TASKS if not name.startswith("written")]
SETTLED = [name for name in CHOSEN if name not in ("pastime", "bare difference")]
COUNT = 150


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Item]]:
    return {name: story_task(name, COUNT) for name in TASKS}


def test_the_same_seed_gives_the_same_items():
    for name in TASKS:
        assert story_task(name, 5, 3) == story_task(name, 12, 3)[:5] != story_task(name, 5, 4)


@pytest.mark.parametrize("name", SETTLED)
def test_the_grammar_is_always_right_where_the_text_settles_the_answer(tasks, name):
    assert len(tasks[name]) == COUNT and best_accuracy(tasks[name]) == 1.0


def test_where_nothing_settles_it_the_best_is_between_chance_and_certainty(tasks):
    best = best_accuracy(tasks["pastime"])
    # of four pastimes with weights from 26 to 1 the likeliest has 45% on average; 4 standard errors of 150 answers are 16%
    assert 0.29 < best < 0.61


def test_the_grammar_says_nothing_where_the_text_is_no_story(tasks):
    assert best_accuracy(tasks["bare difference"]) is None
    assert best_accuracy(with_examples(tasks["place"], 1)) is None
    assert best_accuracy(tasks["written difference"]) is None


@pytest.mark.parametrize("name", CHOSEN)
def test_neither_place_nor_length_gives_the_answer_away(tasks, name):
    items = tasks[name]
    guess = chance(items)
    assert guess == (0.5 if name in ("order", "pronoun") else 0.25)
    margin = 4 * (guess * (1 - guess) / len(items)) ** 0.5  # 4 standard errors of a guess
    for place in range(round(1 / guess)):
        assert abs(sum(item.answer == place for item in items) / len(items) - guess) < margin
    if name == "order":
        assert all(len(item.choices[0]) == len(item.choices[1]) for item in items)
    elif name != "pronoun":  # " He" is always the shorter one, and right half of the time, as was just seen
        shortest = sum(min(range(4), key=lambda c: len(item.choices[c])) == item.answer for item in items)
        longest = sum(max(range(4), key=lambda c: len(item.choices[c])) == item.answer for item in items)
        # lengths tell a little, since likely options were written down first; they must not tell half
        assert max(shortest, longest) / len(items) < 0.5


def test_there_are_temptations_in_the_text(tasks):
    for item in tasks["name"]:
        assert sum(choice.strip() in item.context for choice in item.choices) >= 2  # the hero and the friend
    with_others = sum(sum(choice in item.context for choice in item.choices) >= 2 for item in tasks["colour"])
    assert with_others > COUNT / 2


def test_numbers_are_neighbours_and_differences_right(tasks):
    for name in ("difference", "bare difference"):
        for item in tasks[name]:
            values = sorted(NUMBERS.index(choice[1:]) for choice in item.choices)
            assert values == list(range(values[0], values[0] + 4)) and values[0] >= 1
            a, b = re.search(r"(\w+) take away (\w+) is$", item.context.lower()).groups()
            assert item.solution == f" {NUMBERS[NUMBERS.index(a) - NUMBERS.index(b)]}"
    assert len({item.context for item in tasks["bare difference"]}) == len(tasks["bare difference"]) == 45


def test_written_differences_are_the_chosen_ones(tasks):
    assert [item.context for item in tasks["written difference"]] == [item.context for item in tasks["difference"]]
    assert all(item.target == other.solution
               for item, other in zip(tasks["written difference"], tasks["difference"], strict=True))


def test_order_exchanges_two_neighbours(tasks):
    for item in tasks["order"]:
        right, wrong = (choice.split() for choice in (item.solution, item.choices[1 - item.answer]))
        apart = [place for place, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1]]
        assert len(apart) == 2 and apart[1] == apart[0] + 1 and 0 < apart[0] and apart[1] < len(right) - 1


def test_unknown_tasks_and_no_items_are_refused():
    with pytest.raises(ValueError, match="'places' is no task; there are order, .*jsonl"):
        story_task("places", 3)
    with pytest.raises(ValueError, match="0 items of 'place'"):
        story_task("place", 0)
