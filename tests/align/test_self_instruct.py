"""Self-instruct's parts by hand, and its loop with writers whose words are known."""

import random
import re
from functools import lru_cache
from itertools import combinations

import pytest

from minillm.align.self_instruct import (FILTERS, Pool, Task, beyond_text, echo, grow, no_answer, parse, request, rouge_l, sample_examples,
                                         unfinished, wants_program, words_of, wrong_length, wrong_start)

SEEDS = [Task("Add 3 and 4.", "7"), Task("Say: red lake", "red lake"), Task("Who is the story about?", "Lily")]


def longest_common(a, b):
    """By trying every subset of the shorter one."""
    shorter, longer = sorted((words_of(a), words_of(b)), key=len)

    def inside(part):
        rest = iter(longer)
        return all(word in rest for word in part)
    return max(size for size in range(len(shorter) + 1) if any(inside(part) for part in combinations(shorter, size)))


def test_rouge_is_the_longest_common_subsequence():
    assert rouge_l("the fox saw the lake", "the lake") == pytest.approx(2 * 2 / (5 + 2))
    assert rouge_l("Add 3 and 4.", "add 3, and 4") == 1 and rouge_l("fox", "lake") == rouge_l("", "lake") == 0
    draw = random.Random(0)
    for _ in range(60):
        a, b = (" ".join(draw.choice("abcd") for _ in range(draw.randint(1, 8))) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(2 * longest_common(a, b) / (len(words_of(a)) + len(words_of(b))))
        assert rouge_l(a, b) == rouge_l(b, a)


@pytest.mark.parametrize(("check", "good", "bad"), [
    (wrong_length, Task("Name a fox", "Lily"), Task("Fox", "Lily")), (wrong_length, Task("a " * 150, "b"), Task("a " * 151, "b")),
    (wrong_start, Task("3 plus 4?", "7"), Task("- Add 3", "4")), (wrong_start, Task("Add it", "1"), Task("Änder das", "1")),
    (beyond_text, Task("Describe a mapping", "x"), Task("Draw a map of it", "x")),
    (beyond_text, Task("Go on to the lake", "x"), Task("Go to the lake", "x")),
    (wants_program, Task("Name a program", "x"), Task("Write a program that adds", "x")),
    (no_answer, Task("Add 1 and 1", "2"), Task("Add 1 and 1", " ")), (echo, Task("Say it", "it"), Task("Say it", "Say it ")),
    (unfinished, Task("Sort: 2 1", "1 2"), Task("Sort these: ", "1 2")), (unfinished, Task("Name two", "a: b"), Task("Name two", "They are: "))])
def test_each_filter(check, good, bad):
    assert check(good) is None and isinstance(check(bad), str)
    # no other filter objects, so the reason is this one's
    assert [said for one in FILTERS if (said := one(bad))] == [check(bad)] and not any(one(good) for one in FILTERS)


def test_what_rouge_means_for_sums():
    assert rouge_l("Add 3 and 4.", "Add 7 and 9.") == 0.5 and rouge_l("Add 3 and 4.", "Add 3 and 9.") == 0.75
    assert rouge_l("Add 3 and 4.", "Add 4 and 3.") == 0.5  # one fact, put twice
    assert rouge_l("5+2=", "5-2=") == 1 and rouge_l("5+2=", "7+9=") == 0  # signs are no words
    numbers = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(numbers)
    pool, short = Pool([]), Pool([])
    for a, b in numbers:
        pool.offer(Task(f"Add {a} and {b}.", str(a + b)))
        short.offer(Task(f"{a}+{b}=", str(a + b)))
    # each number once in each place
    for place in (1, 3):
        seen = [words_of(task.instruction)[place] for task in pool.made]
        assert len(seen) == len(set(seen)) and 5 <= len(seen) <= 10
    assert pool.report() == {"requests": 0, "fruitless": 0, "proposed": 100, "kept": len(pool.made), "not new": 100 - len(pool.made)}
    assert len(short.made) == 100


def test_the_pool_takes_what_is_new_and_says_why_not():
    pool = Pool(list(SEEDS))
    assert pool.offer(Task("Name two animals", "fox, bear")) is None and pool.made[-1].answer == "fox, bear"
    assert pool.offer(Task("Add 3 and 5.", "8")) == "not new" and pool.nearest("Add 3 and 5.") == (0.75, "Add 3 and 4.")
    assert pool.offer(Task("Add 3 and 5.", "8"), limit=1.0) is None
    assert pool.offer(Task("Name two animals", "cat, dog")) == "contradicts"
    assert pool.offer(Task("Name two animals", "fox, bear"), limit=1.0) == "not new"  # the very same
    assert pool.offer(Task("Plot two animals", "x")) == "asks for more than text"
    assert pool.rejected == {"not new": 2, "contradicts": 1, "asks for more than text": 1} and pool.proposed == 6
    assert Pool([]).nearest("Name two animals") == (0, "")


def test_requests_show_people_s_tasks_and_some_of_its_own():
    pool = Pool([Task(f"seed {n}", "x") for n in range(20)], [Task(f"made {n}", "y") for n in range(5)])
    shown = sample_examples(pool, random.Random(1))
    assert sum(task.instruction.startswith("seed") for task in shown) == 6 and len(shown) == len(set(shown)) == 8
    assert len(sample_examples(Pool(pool.seeds), random.Random(1))) == 8  # nothing made yet: all from people
    text = request(SEEDS[:2])
    assert text == "Task 1: Add 3 and 4.\nAnswer 1: 7\nTask 2: Say: red lake\nAnswer 2: red lake\nTask 3:"
    for ask in (lambda: sample_examples(Pool([]), random.Random(0)), lambda: grow(Pool([]), str, 3)):
        with pytest.raises(ValueError, match="no seed tasks"):
            ask()


def test_what_was_written_is_read():
    assert parse(" Add 1 and 2.\nAnswer 3: 3\nTask 4: Name it\nAnswer 4: Lily\nTask 5: And") == [Task("Add 1 and 2.", "3"), Task("Name it", "Lily")]
    assert parse(" Add 1 and 2.\nAnswer 3: 3") == [] and parse("") == [] and parse(" nothing\nmore\n") == []


def writer(seed):
    """Writes two tasks a request, a good part of which is no good; counts what it was asked."""
    draw, asked = random.Random(seed), []
    verbs, things = ("Name", "Find", "Count", "Praise", "Draw", "-Fix"), ("foxes", "red boats", "three lakes", "a bear", "old songs", "Nina")

    def write(prompt):
        asked.append(prompt)
        number = int(re.findall(r"Task (\d+):", prompt)[-1])
        one, two = (f"{draw.choice(verbs)} {draw.choice(things)} {draw.choice(('now', 'twice', 'for me', 'at home'))}" for _ in range(2))
        return f" {one}\nAnswer {number}: yes\nTask {number + 1}: {two}\nAnswer {number + 1}: {draw.choice(('no', ''))}\nTask {number + 2}: half"
    return write, asked


def test_the_loop_grows_the_pool_the_same_way_every_time():
    found = []
    for _ in range(2):
        write, asked = writer(3)
        found.append((grow(Pool(list(SEEDS)), write, 10, seed=5), asked))
    (pool, asked), (again, _) = found
    assert pool.made == again.made and pool.rejected == again.rejected and len(pool.made) == 10
    assert {"no answer", "not new"} <= set(pool.rejected) and {"begins with a mark", "asks for more than text"} & set(pool.rejected)
    assert pool.proposed <= 2 * len(asked) and not any(check(task) for task in pool.made for check in FILTERS)
    similar = max(rouge_l(a.instruction, b.instruction) for a, b in combinations(pool.tasks, 2))
    assert similar < 0.7
    report = pool.report()
    assert report["requests"] == len(asked) and report["proposed"] == report["kept"] + pool.rejected.total()
    write, others = writer(3)
    assert grow(Pool(list(SEEDS) * 3), write, 10, seed=6).made == pool.made and others != asked  # this writer reads no more than a number


def test_no_more_are_made_than_were_asked_for():
    """Though one request may bring several."""
    several = " Name foxes\nAnswer 3: a\nTask 4: Find boats\nAnswer 4: b\nTask 5: Praise bears\nAnswer 5: c\n"
    pool = grow(Pool(list(SEEDS)), lambda prompt: several, 2)
    assert [task.answer for task in pool.made] == ["a", "b"] and pool.requests == 1


def test_a_request_shows_as_many_as_it_is_told():
    write, asked = writer(4)
    grow(Pool([Task(f"seed {n}", "x") for n in range(9)]), write, 10, by_people=3, by_model=1, most=20)
    shown = [re.findall(r"^Task \d+: (.*)$", prompt, re.M) for prompt in asked]
    assert all(len(tasks) == 4 for tasks in shown)
    assert [sum(not task.startswith("seed") for task in tasks) for tasks in shown] == [0] + [1] * (len(shown) - 1)


def test_a_writer_that_has_nothing_to_say_ends_the_loop():
    pool = grow(Pool(list(SEEDS)), lru_cache(lambda prompt: ""), 3, most=7)
    assert pool.report() == {"requests": 7, "fruitless": 7, "proposed": 0, "kept": 0}
