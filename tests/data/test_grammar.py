import random
from math import inf, log

import pytest

from minillm.data.grammar import Grammar, GrammarError, article

PETS = """
story
    3 {hero=name} saw {a pet}. {hero.He} (2 smiled|ran){mood:good}.
    1 {Pet}! said {hero=name}.¶{second=number} and {third=number} make {+ second third}.

name: he
    2 Ann, Eve | she
    1 Bob | he

pet ~ cat, owl, hen

number ~ two, three
"""


def first_options(*choices):
    """A `uniform` that makes the rule take the option in which these numbers fall."""
    return iter(choices).__next__


def test_writes_facts_fields_articles_capitals_and_notes():
    # story: 0 of 4; name: 0.9 of 5 is Bob; pet: 0.6 of 6 is the owl; smiled or ran: 0.9 of 3 is ran
    text, _, facts = Grammar(PETS).write(first_options(0.0, 0.9, 0.6, 0.9))
    assert text == "Bob saw an owl. He ran."
    assert facts == {"hero": "Bob", "mood": "good"}


def test_sums_and_new_lines():
    text, _, facts = Grammar(PETS).write(first_options(0.9, 0.0, 0.0, 0.9, 0.9))
    assert text == "Cat! said Ann.\nthree and three make six."
    assert facts == {"hero": "Ann", "second": "three", "third": "three"}


def test_nats_are_the_product_of_the_choices():
    _, nats, _ = Grammar(PETS).write(first_options(0.0, 0.9, 0.6, 0.9))
    # weights: 3 of 4, Bob 1 of 5, owl 2 of 6, ran 1 of 3
    assert nats == pytest.approx(-log(3 / 4) - log(1 / 5) - log(2 / 6) - log(1 / 3))


def test_options_come_as_often_as_their_weights_say():
    grammar, uniform = Grammar("pet ~ cat, owl, hen"), random.Random(0).random
    drawn = [grammar.write(uniform)[0] for _ in range(6_000)]
    for pet, chance in (("cat", 3 / 6), ("owl", 2 / 6), ("hen", 1 / 6)):
        # 4 standard errors of a share of 6,000 draws
        assert drawn.count(pet) / 6_000 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 6_000) ** 0.5)


def test_a_draw_at_the_very_edge_takes_the_last_option():
    assert Grammar("pet ~ cat, owl, hen").write(lambda: 1.0)[0] == "hen"


def test_a_field_names_the_rule_to_draw_from():
    grammar = Grammar("""
start
    At {place=where}: {@place.sight}.
where: sight
    sea | sea_sight
    farm | farm_sight
sea_sight ~ gull, crab
farm_sight ~ cow, pig
""")
    seen = {grammar.write(random.Random(seed).random)[0] for seed in range(60)}
    assert seen == {"At sea: gull.", "At sea: crab.", "At farm: cow.", "At farm: pig."}


@pytest.mark.parametrize("word, expected", [("cat", "a cat"), ("owl", "an owl"), ("Owl", "an Owl"), ("house", "a house"),
                                            ("honest fox", "an honest fox"), ("hour", "an hour")])
def test_article(word, expected):
    assert article(word) == expected


def test_reads_back_exactly_what_was_drawn():
    grammar = Grammar(PETS)
    for seed in range(100):
        text, nats, facts = grammar.write(random.Random(seed).random)
        (found, known), = grammar.read(text)
        assert found == pytest.approx(nats)
        assert known == facts


@pytest.mark.parametrize("text", ["", "Ann saw a dog. She ran.", "Ann saw a cat. He ran.", "Ann saw a cat. She ran. ",
                                  "Ann saw a cat. She ran", "Cat! said Ann.\ntwo and two make five."])
def test_does_not_read_what_it_cannot_write(text):
    assert not list(Grammar(PETS).read(text))


def test_says_when_a_text_has_two_derivations():
    assert len(list(Grammar("start\n    {a}{b}\na ~ x, xy\nb ~ yz, z").read("xyz"))) == 2


@pytest.mark.parametrize("source, words", [
    ("start\n    {nothing}", ["start", "nothing", "neither"]),
    ("start\n    {pet=pet}\npet ~ cat", ["pet", "taken"]),
    ("start\n    {pet}\npet ~ cat\npet ~ dog", ["pet", "taken"]),
    ("start: he him\n    Ann | she", ["start", "1 fields", "he", "him"]),
    ("start\n    (red|blue", ["never closed"]),
    ("start\n    {A pet}\npet\n    {start}", ["pet", "begin with text"]),
])
def test_a_wrong_grammar_is_refused_by_name(source, words):
    with pytest.raises(GrammarError) as caught:
        Grammar(source)
    for word in words:
        assert word in str(caught.value)


def test_the_probability_of_a_beginning():
    pets = Grammar(PETS)
    assert pets.begin_nats("") == 0
    # name: Ann and Eve 2 of 5 each, Bob 1; pet: cat, owl, hen 3, 2, 1 of 6; the two stories 3 and 1 of 4
    assert pets.begin_nats("Ann saw a") == pytest.approx(-log(3 / 4 * 2 / 5))
    assert pets.begin_nats("Ann saw a ") == pytest.approx(-log(3 / 4 * 2 / 5 * 4 / 6))
    assert pets.begin_nats("Ann saw an owl. She r") == pytest.approx(-log(3 / 4 * 2 / 5 * 2 / 6 * 1 / 3))
    assert pets.begin_nats("Hen!") == pytest.approx(-log(1 / 4 * 1 / 6))
    assert pets.begin_nats("Ann saw an owl. He") == inf
    assert pets.begin_nats("Bob saw an owl. He ran. Then") == inf


def test_a_whole_text_is_a_beginning_and_longer_ones_are_rarer():
    pets = Grammar(PETS)
    text, nats, _ = pets.write(first_options(0.0, 0.9, 0.6, 0.9))
    beginnings = [pets.begin_nats(text[:end]) for end in range(len(text) + 1)]
    assert beginnings == sorted(beginnings) and beginnings[-1] == pytest.approx(nats)
