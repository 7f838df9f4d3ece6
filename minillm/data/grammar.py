"""A random grammar with memory: it writes texts whose probability is known, and reads them back.

A rule is a list of weighted options; an option is text with holes. Options are drawn from left to right, and what was
drawn can be remembered as a fact (`{hero=name}`) and written again (`{hero}`, `{hero.he}`). Every choice shows in
the text where it is made, so the text tells which choices were made: the entropy of the text is the entropy of the
choices, and `expected` adds it up exactly. `clashes` lists the places where that would not be so.

The notation, one rule after another:
    name: he him            a rule, and the fields that its options carry
        3 Lily, Mia | she | her     weight 3 for each of two options with these fields (weight 1 when not given)
    pet ~ cat, dog, hen     a word list with falling weights, here 3, 2, 1
Inside an option: {pet} draws; {who=pet} draws and remembers; {who} {who.field} write a fact; {@who.field} draws from
the rule that the field names; {a pet} puts "a" or "an" in front; a capital ({Pet}, {who.Field}) writes a capital;
{+ n m} and {- n m} calculate with facts that are number words; {label:value} notes a fact without writing it;
(red|2 blue) draws on the spot; ¶ begins a new line.
Left out: options that write nothing, because nothing in the text would show them.
"""

import math
import re
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four").split()


class GrammarError(ValueError):
    """The grammar's source cannot be read, or refers to something that it does not define."""


class Option:
    """One way to continue: `form` is what it writes, `fields` what it is remembered by ("" is its plain text)."""

    __slots__ = ("form", "fields", "nats", "chance")

    def __init__(self, form: tuple, fields: dict[str, str]):
        self.form, self.fields = form, fields


class Rule:
    """Options and their probabilities: weight / total weight."""

    __slots__ = ("name", "options", "edges", "last", "total")

    def __init__(self, name: str):
        self.name = name
        self.options: list[Option] = []

    def weigh(self, weights: list[int]) -> None:
        """Fix the probabilities once all options are known."""
        self.edges = list(accumulate(weights))
        self.total, self.last = self.edges[-1], len(weights) - 1
        for option, weight in zip(self.options, weights, strict=True):
            option.chance = weight / self.total
            option.nats = math.log(self.total / weight)

    def draw(self, uniform: Callable[[], float]) -> Option:
        """One option, from one draw between 0 and 1."""
        return self.options[bisect(self.edges, uniform() * self.total, 0, self.last)]


class Draw(NamedTuple):
    """Draw from `rule`, or from the rule that a fact's field names; remember the option as `fact` unless empty."""

    rule: Rule | None
    via: tuple[str, str] | None
    fact: str


class Write(NamedTuple):
    """Write a field of a fact."""

    fact: str
    field: str
    capital: bool


class Sum(NamedTuple):
    """Write a + b or a - b (sign -1) as a word."""

    a: str
    b: str
    sign: int


class Note(NamedTuple):
    """Remember a constant."""

    fact: str
    option: Option


def article(text: str) -> str:
    """`text` with "a" or "an" in front, chosen by its first letter, unless that is an h that nobody hears."""
    silent = text.lower().startswith(("honest", "honour", "hour", "heir"))
    return ("an " if silent or text[:1].lower() in "aeiou" else "a ") + text


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def remembered(text: str, fields: dict[str, str] | None = None) -> dict[str, str]:
    """The fields of every option: its text, its text with an article, and its own."""
    return {"": text, "a": article(text), **(fields or {})}


def value(symbol: Write | Sum, facts: dict[str, Option]) -> str:
    """What a symbol without a choice writes, given the facts."""
    if isinstance(symbol, Write):
        text = facts[symbol.fact].fields[symbol.field]
        return capital(text) if symbol.capital else text
    return NUMBERS[NUMBERS.index(facts[symbol.a].fields[""]) + symbol.sign * NUMBERS.index(facts[symbol.b].fields[""])]


class Grammar:
    """A compiled grammar. Its first rule is the start.

    Raises: GrammarError, naming the rule, when the source refers to something undefined.
    """

    def __init__(self, source: str):
        self.rules: dict[str, Rule] = {}
        self._sources: dict[str, list[tuple[int, str, dict[str, str]]]] = {}
        self._facts = set(re.findall(r"{(?:[aA] )?(\w+)=", source)) | set(re.findall(r"{(\w+):", source))
        for block in re.split(r"\n(?=\w)", source.strip()):
            self._read(block)
        for name, options in self._sources.items():
            rule = self._rule(name)
            rule.options = [Option(self._compile(text, name), remembered(text, fields)) for _, text, fields in options]
            rule.weigh([weight for weight, _, _ in options])
        self._derive()
        self.start = next(iter(self.rules.values()))

    # Reading the notation

    def _read(self, block: str) -> None:
        """One rule's lines into (weight, text, fields) triples."""
        head, _, body = block.partition("\n")
        if "~" in head:
            name, words = block.split("~")
            texts = [" ".join(word.split()) for word in words.split(",")]
            options = [(len(texts) - place, text, {}) for place, text in enumerate(texts)]
        else:
            name, _, names = head.partition(":")
            options = []
            for line in re.split(r"\n    (?! )", "\n" + body)[1:]:
                options += self._option(" ".join(line.split()), names.split(), name)
        name = name.strip()
        if name in self._sources or name in self._facts:
            raise GrammarError(f"rule {name!r}: the name is taken by another rule or by a fact; rename one of them.")
        self._sources[name] = options
        self._rule(name)

    @staticmethod
    def _option(line: str, names: list[str], rule: str) -> list[tuple[int, str, dict[str, str]]]:
        """One option line; with fields it may hold several texts that share them."""
        weight, text = re.fullmatch(r"(?:(\d+) )?(.*)", line).groups()
        texts, values = [text], []
        if names:
            text, *values = (part.strip() for part in text.split(" | "))
            texts = text.split(", ")
        if len(values) != len(names):
            raise GrammarError(f"rule {rule!r}: {line!r} has {len(values)} fields, expected {len(names)}: {names}.")
        return [(int(weight or 1), text, dict(zip(names, values, strict=True))) for text in texts]

    def _rule(self, name: str) -> Rule:
        """The rule of this name, empty as long as its options have not been compiled."""
        return self.rules.setdefault(name, Rule(name))

    def _compile(self, text: str, rule: str) -> tuple:
        """An option's text into literals and symbols."""
        form, place = [], 0
        text = re.sub(r" ?¶ ?", "\n", re.sub(r" ({\w+:\w+})", r"\1", text))  # a note leaves no space behind
        while place < len(text):
            if text[place] == "{":
                end = text.index("}", place)
                form.append(self._symbol(text[place + 1:end], rule))
                place = end + 1
            elif text[place] == "(":
                end = closing(text, place)
                form.append(Draw(self._inline(text[place + 1:end], rule), None, ""))
                place = end + 1
            else:
                literal = re.compile(r"[^{(]+").match(text, place).group()
                form.append(literal)
                place += len(literal)
        return tuple(form)

    def _inline(self, text: str, owner: str) -> Rule:
        """(a|2 b): a rule without a name."""
        rule, weights = Rule(f"{owner}: ({text})"), []
        for part in alternatives(text):
            weight, words = re.fullmatch(r"(?:(\d+) )?(.*)", part, re.DOTALL).groups()
            weights.append(int(weight or 1))
            rule.options.append(Option(self._compile(words, owner), remembered(words)))
        rule.weigh(weights)
        self.rules[rule.name] = rule
        return rule

    def _symbol(self, text: str, owner: str) -> Draw | Write | Sum | Note:
        """What stands between braces."""
        if match := re.fullmatch(r"([+-]) (\w+) (\w+)", text):
            sign, a, b = match.groups()
            return Sum(a, b, 1 if sign == "+" else -1)
        if match := re.fullmatch(r"(\w+):(\w+)", text):
            return Note(match[1], Option((), remembered(match[2])))
        if match := re.fullmatch(r"(?:(\w+)=)?@(\w+)\.(\w+)", text):
            return Draw(None, (match[2], match[3]), match[1] or "")
        if match := re.fullmatch(r"(\w+)(?:\.(\w+))?", text):
            fact, field = match[1], match[2] or ""
            upper = (field or fact)[0].isupper()
            if fact.lower() in self._facts:
                return Write(fact.lower(), field.lower(), upper)
        match = re.fullmatch(r"([aA] )?(?:(\w+)=)?(\w+)", text)
        if not match or match[3].lower() not in self._sources:
            raise GrammarError(f"rule {owner!r}: {{{text}}} is neither a fact nor a rule of the grammar.")
        how = (match[1] or "").strip() or ("C" if match[3][0].isupper() else "")
        name = match[3].lower()
        return Draw(self._rule(f"{how} {name}" if how else name), None, match[2] or "")

    def _derive(self) -> None:
        """Fill the rules that write another rule's options with an article or a capital."""
        changes = {"a": article, "A": lambda text: capital(article(text)), "C": capital}
        for name, rule in self.rules.items():
            if rule.options:
                continue
            how, _, base = name.partition(" ")
            for option in self.rules[base].options:
                if not isinstance(option.form[0], str):
                    raise GrammarError(f"rule {base!r} needs options that begin with text: {{{name}}} changes it.")
                changed = Option((changes[how](option.form[0]), *option.form[1:]), option.fields)
                changed.chance, changed.nats = option.chance, option.nats
                rule.options.append(changed)
            rule.edges, rule.last, rule.total = (getattr(self.rules[base], part) for part in ("edges", "last", "total"))

    # Writing

    def write(self, uniform: Callable[[], float]) -> tuple[str, float, dict[str, str]]:
        """One text, its -log probability in nats, and its facts. `uniform` is random.Random(seed).random."""
        pieces: list[str] = []
        facts: dict[str, Option] = {}
        nats = self._write(self.start.draw(uniform), facts, pieces.append, uniform)
        return "".join(pieces), nats, plain(facts)

    def _write(self, option: Option, facts: dict[str, Option], put: Callable[[str], None],
               uniform: Callable[[], float]) -> float:
        nats = option.nats
        for symbol in option.form:
            kind = symbol.__class__
            if kind is str:
                put(symbol)
            elif kind is Draw:
                chosen = self.target(symbol, facts).draw(uniform)
                if symbol.fact:
                    facts[symbol.fact] = chosen
                nats += self._write(chosen, facts, put, uniform)
            elif kind is Note:
                facts[symbol.fact] = symbol.option
            else:
                put(value(symbol, facts))
        return nats

    def target(self, symbol: Draw, facts: dict[str, Option]) -> Rule:
        """The rule that a Draw draws from, which may depend on the facts."""
        if symbol.rule is not None:
            return symbol.rule
        fact, field = symbol.via
        return self.rules[facts[fact].fields[field]]

    # Reading back

    def read(self, text: str) -> Iterator[tuple[float, dict[str, str]]]:
        """Every way in which the grammar can write exactly `text`: its nats and facts. At most one, or none."""
        for option in self.start.options:
            yield from self._follow((option.form, 0, None), text, 0, option.nats, {})

    def begin_nats(self, text: str) -> float:
        """-log of the probability that a text begins with `text`; infinite when none does.

        So P(choice | context) is exp(begin_nats(context) - begin_nats(context + choice)), exactly.
        """
        chance = sum(math.exp(-nats) for option in self.start.options
                     for nats, _ in self._follow((option.form, 0, None), text, 0, option.nats, {}, beginning=True))
        return -math.log(chance) if chance else math.inf

    def _follow(self, rest: tuple | None, text: str, place: int, nats: float, facts: dict[str, Option],
                beginning: bool = False) -> Iterator:
        """`rest` is what remains to be matched: (form, index, what comes after that form).

        beginning: stop where `text` ends, whatever comes after it; the chances of what may come add up to 1.
        """
        while rest is not None:
            if beginning and place == len(text):
                break
            form, index, after = rest
            if index == len(form):
                rest = after
                continue
            symbol, rest = form[index], (form, index + 1, after)
            if isinstance(symbol, Draw):
                for option in self.target(symbol, facts).options:
                    known = {**facts, symbol.fact: option} if symbol.fact else facts
                    yield from self._follow((option.form, 0, rest), text, place, nats + option.nats, known, beginning)
                return
            if isinstance(symbol, Note):
                facts = {**facts, symbol.fact: symbol.option}
                continue
            literal = symbol if isinstance(symbol, str) else value(symbol, facts)
            if beginning:
                literal = literal[:len(text) - place]
            if not text.startswith(literal, place):
                return
            place += len(literal)
        if place == len(text):
            yield nats, plain(facts)


def plain(facts: dict[str, Option]) -> dict[str, str]:
    """Facts as text."""
    return {name: option.fields[""] for name, option in facts.items()}


def closing(text: str, place: int) -> int:
    """Where the parenthesis that opens at `place` closes."""
    depth = 0
    for end in range(place, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return end
    raise GrammarError(f"{text!r}: the parenthesis at {place} is never closed.")


def alternatives(text: str) -> list[str]:
    """Split at the bars that are not inside parentheses."""
    depth, parts = 0, [""]
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
