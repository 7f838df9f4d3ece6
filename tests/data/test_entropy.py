import math

import pytest

from minillm.data.entropy import clashes, expected
from minillm.data.grammar import Grammar, Rule

# Every feature that the sums must follow: facts written later, facts that decide later rules, sums, notes, bytes.
SMALL = """
start
    3 {hero=name} went to {place=where}. {hero.He} saw {seen=@place.sight} and {sight_two}.
    2 Once {hero=name} had {many=number} (3 plums|eggs). {give}
    1 Nobody came, {mood:quiet}not even {place=where} with its {@place.sight}.

name: he
    2 Ann, Évé | she
    1 Bob | he

where: sight
    3 the sea | sea_sight
    1 the farm | farm_sight

sea_sight ~ crab, oyster, gull
farm_sight ~ cow, old pig

sight_two
    2 {number} {@place.sight}s
    1 the {place}

number: part
    2 four | part_four
    1 five | part_five

part_four ~ one, two
part_five ~ one, two, three

give
    1 {hero} gave {given=@many.part} away and kept {- many given}.
    1 Now {more=number} more: {+ many more}!
"""


def everything(grammar: Grammar, monkeypatch) -> list[tuple[str, float]]:
    """Every derivation of a small grammar with its nats: the writer is led through all choices in turn."""
    script: list[int] = []
    sizes: list[int] = []

    def draw(self, uniform):
        if len(sizes) == len(script):
            script.append(0)
        sizes.append(len(self.options))
        return self.options[script[len(sizes) - 1]]

    monkeypatch.setattr(Rule, "draw", draw)
    written = []
    while True:
        sizes.clear()
        written.append(grammar.write(lambda: 0.0)[:2])
        while script and script[-1] + 1 == sizes[len(script) - 1]:
            script.pop()
        if not script:
            return written
        script[-1] += 1


def test_entropy_and_length_are_those_of_all_texts_written_out(monkeypatch):
    grammar = Grammar(SMALL)
    written = everything(grammar, monkeypatch)
    chances = [math.exp(-nats) for _, nats in written]
    assert len(written) > 150
    assert sum(chances) == pytest.approx(1)
    nats, size = expected(grammar)
    # exact but for rounding: a few hundred additions in float64
    assert nats == pytest.approx(sum(p * n for p, (_, n) in zip(chances, written)), rel=1e-12)
    assert size == pytest.approx(sum(p * len(text.encode()) for p, (text, _) in zip(chances, written)), rel=1e-12)


def test_without_clashes_no_two_derivations_write_the_same_text(monkeypatch):
    grammar = Grammar(SMALL)
    written = everything(grammar, monkeypatch)
    assert clashes(grammar) == []
    assert len({text for text, _ in written}) == len(written)
    assert all(len(list(grammar.read(text))) == 1 for text, _ in written)


def test_the_entropy_of_one_choice():
    nats, size = expected(Grammar("pet\n    3 cat\n    1 horse"))
    assert nats == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert size == pytest.approx(0.75 * 3 + 0.25 * 5)


@pytest.mark.parametrize("source", [
    "start\n    {a}{b}\na ~ x, xy\nb ~ yz, z",                # "xyz" twice
    "pet ~ cat, catfish",                                     # one word begins another
    "pet ~ cat, cat",                                         # the same twice
    "start\n    {a} ran\n    {b} ran\na ~ cat, dog\nb ~ cow, dog",  # hidden in rules
    "start\n    {who=pet}.\npet\n    a (big|small) cat\n    a small cat",
    "start\n    {hero=name} met {end}\nname ~ Ann, Bob\nend\n    {hero}.\n    Bob.",  # a fact may write what text writes
])
def test_clashes_are_found(source):
    assert clashes(Grammar(source))


def test_a_long_common_beginning_is_no_clash_but_an_endless_one_is():
    same = "the very same words again and again "
    assert clashes(Grammar(f"start\n    {same}and a cat\n    {same}and a dog")) == []
    assert clashes(Grammar(f"start\n    {same * 2}and a cat\n    {same * 2}and a dog"))
