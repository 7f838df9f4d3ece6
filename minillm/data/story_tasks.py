"""Tasks from the stories' world, whose answers the grammar knows.

Most contexts are the beginning of a story nobody has seen, cut where the grammar has to write something that is already
settled: then one choice is possible and the others are not, and a perfect model of the stories is always right. The
grammar itself can be asked, exactly (`best_accuracy`). Choices are of one kind and in random order. Where the text has
tempting wrong answers (the friend's name, another colour), they come first among the wrong choices. Choices end with a
word: the point or comma behind it may be one token with a quotation mark, and cut off it would be one never seen there.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence

from minillm.data.grammar import NUMBERS, capital
from minillm.data.stories import Story, grammar, stories
from minillm.data.tasks import Item, shuffled

SEED = 54_321
"""Of stories that training, which uses seed 0, has not seen."""
CHOICES = 4
Draw = Callable[[], float]


def story_task(name: str, count: int, seed: int = SEED) -> list[Item]:
    """`count` items of the task TASKS[name]; the same seed gives the same ones, and fewer are the beginning of more.

    Raises: ValueError for a name that there is not, or no items.
    """
    if name not in TASKS:
        raise ValueError(f"{name!r} is no task; there are {', '.join(TASKS)}. For a file, give its path with .jsonl.")
    if count < 1:
        raise ValueError(f"{count} items of {name!r}: ask for at least one.")
    return [item for _, item in zip(range(count), TASKS[name](seed))]


def best_accuracy(items: Sequence[Item]) -> float | None:
    """How often the grammar's own likelihood picks the right choice: no model can be expected to do better.

    None when some question is no beginning of a story, so that the grammar has nothing to say (examples in front, say).
    """
    right = 0
    for item in items:
        nats = [grammar().begin_nats(item.context + choice) for choice in item.choices]
        if not nats or min(nats) == math.inf:
            return None
        right += nats.index(min(nats)) == item.answer
    return right / len(items)


def _asked(make: Callable[[Story, Draw], Item | None]) -> Callable[[int], Iterator[Item]]:
    """A task from a function that makes a story's item, or None when the story does not have what it asks for."""
    def items(seed: int) -> Iterator[Item]:
        draw = random.Random(f"{make.__name__} {seed}").random
        while True:  # the stories come in packs, because how many are needed is not known
            yield from (item for story in stories(1_000, seed) if (item := make(story, draw)))
            seed += 1_000_003
    return items


def _choose(context: str, right: str, wrong: dict[str, float], draw: Draw) -> Item:
    """One right and three wrong words behind a space; of the wrong ones, those that the context mentions come first.

    wrong: word -> weight. Drawn by the weights that the right one was drawn by, no word is suspect for being rare: the
    smallest of -ln(u) / weight is each word's with a probability in proportion to its weight.
    """
    late = {word: not re.search(rf"\b{word}\b", context, re.I) for word in wrong}
    chosen = sorted(wrong, key=lambda word: (late[word], -math.log(1 - draw()) / wrong[word]))[:CHOICES - 1]
    choices = tuple(f" {word}" for word in shuffled([right, *chosen], draw))
    return Item(context, choices, choices.index(f" {right}"))


def _count(context: str, right: int, draw: Draw) -> Item:
    """Four neighbouring numbers, the right one anywhere among them, so that neither size nor place gives it away."""
    lowest = right - int(draw() * min(CHOICES, right))
    return _choose(context, NUMBERS[right], {NUMBERS[n]: 1.0 for n in range(lowest, lowest + CHOICES) if n != right}, draw)


def _others(rule: str, right: str, field: str = "") -> dict[str, float]:
    """What a rule's other options write (or what a field of theirs says), and how likely they are."""
    return {option.fields[field]: option.chance for option in grammar().rules[rule].options if option.fields[field] != right}


def _field(rule: str, text: str, field: str) -> str:
    """A field of the option with this text."""
    return next(option.fields[field] for option in grammar().rules[rule].options if option.fields[""] == text)


def _order(story: Story, draw: Draw) -> Item:
    """Which is a sentence: a story's first, or the same with two neighbouring words exchanged? The same bytes in both."""
    sentence = story.text[:story.text.index(".") + 1]
    words = sentence.split()
    at = 1 + int(draw() * (len(words) - 3))  # neither the first word, with its capital, nor the last, with its point
    words[at:at + 2] = words[at + 1], words[at]
    pair = shuffled([sentence, " ".join(words)], draw)
    return Item("", tuple(pair), pair.index(sentence))


def _pronoun(story: Story, draw: Draw) -> Item | None:
    """He or she, once the name is known."""
    found = re.search(r" (He|She|he|she|His|Her|his|her)\b", story.text)
    if found[1] not in ("He", "She"):
        return None
    choices = tuple(shuffled([" He", " She"], draw))
    return Item(story.text[:found.start()], choices, choices.index(found[0]))


def _place(story: Story, draw: Draw) -> Item | None:
    """Where somebody arrives who went to the forest."""
    right = _field("places", story.facts["place"], "on")
    found = re.search(rf"\. ({capital(right)}) ", story.text.partition("\n")[0])
    wrong = {capital(on): weight for on, weight in _others("places", right, "on").items()}
    return found and _choose(story.text[:found.start() + 1], found[1], wrong, draw)


def _colour(story: Story, draw: Draw) -> Item | None:
    """Which colour the thing has that is lost or wished for: told a paragraph ago, with other coloured things since."""
    found = re.search(r'"I (?:lost|cannot find|miss) my |"I am saving for the ', story.text)
    colour = story.facts.get("colour", "")
    return found and _choose(story.text[:found.end() - 1], colour, _others("hue", colour), draw)


def _name(story: Story, draw: Draw) -> Item | None:
    """Who is speaking: the hero, whose trouble it is, or the friend who has just asked, or somebody of another story?"""
    hero = story.facts["hero"]
    found = re.search(rf',"( {hero}) (?:{"|".join(_others("sad_said", ""))})\.', story.text)
    he = _field("name", hero, "he")
    alike = {name: weight for name, weight in _others("name", hero).items() if _field("name", name, "he") == he}
    return found and _choose(story.text[:found.start(1)], hero, alike | {story.facts["friend"]: 1.0}, draw)


def _goods(story: Story, draw: Draw) -> Item | None:
    """What is found in such a place: acorns in the forest, shells on the beach. Not in the text: to be known."""
    right = _field("places", story.facts["place"], "goods")
    found = re.search(rf" found \w+ \w+( {right})\.", story.text)
    return found and _choose(story.text[:found.start(1)], right, _others("places", right, "goods"), draw)


def _difference(story: Story, draw: Draw) -> Item | None:
    """What is left when some of the goods are given away: to be calculated, not copied."""
    found = re.search(r" take away \w+ is( (\w+)),", story.text)
    return found and _count(story.text[:found.start(1)], NUMBERS.index(found[2]), draw)


def _pastime(story: Story, draw: Draw) -> Item:
    """What the hero likes to do: nothing settles it, so the best answer is the likeliest pastime of the four."""
    right = story.facts["pastime"]
    context = story.text[:story.text.index(f" {right}")]
    return _choose(context, right, dict.fromkeys(_others("pastimes", right), 1.0), draw)


def _bare_difference(seed: int) -> Iterator[Item]:
    """The stories' sums without a story around them: a - b for 2 <= b <= a - 2 and a <= 12, each once. All 45 but
    four take away two are in the stories, so this asks for a table to be known by heart, not for arithmetic."""
    draw = random.Random(f"bare difference {seed}").random
    for a, b in shuffled([(a, b) for a in range(4, 13) for b in range(2, a - 1)], draw):
        yield _count(f'"{NUMBERS[a].capitalize()} take away {NUMBERS[b]} is', a - b, draw)


def _written(seed: int) -> Iterator[Item]:
    """The differences again, to be written instead of chosen."""
    return (Item(item.context, target=item.solution) for item in TASKS["difference"](seed))


TASKS: dict[str, Callable[[int], Iterator[Item]]] = {
    "order": _asked(_order), "pronoun": _asked(_pronoun), "place": _asked(_place), "colour": _asked(_colour),
    "name": _asked(_name), "goods": _asked(_goods), "pastime": _asked(_pastime), "difference": _asked(_difference),
    "bare difference": _bare_difference, "written difference": _written}
"""Each task's items, endlessly (bare difference: 45 and no more), from a seed."""
