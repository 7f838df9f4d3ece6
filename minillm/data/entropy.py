"""What a grammar's texts are like on average, exactly, and whether its choices can all be read back.

`grammar` draws single texts; here all of them are summed at once. The mean of -log p over all texts is the entropy,
and it follows the shape of the grammar: the entropy of a choice, plus the entropies of its options weighted by their
probabilities. Facts that decide what may come later (a place with its own sights) are enumerated; all others count
only by the mean length of what they write.
Left out: rules that lead back to themselves.
"""

from collections.abc import Iterable
from functools import cache

from minillm.data.grammar import NUMBERS, Draw, Grammar, Note, Option, Rule, Sum, Write, value

Spread = tuple[tuple[float, Option], ...]


def expected(grammar: Grammar) -> tuple[float, float]:
    """(nats, bytes) of a text of this grammar on average: its entropy, and its mean length in UTF-8.

    The nats are the entropy of the text itself if `clashes(grammar)` is empty; else only of its derivation.
    """
    return _Expectation(grammar).option(grammar.start.options)


def clashes(grammar: Grammar, room: int = 60) -> list[str]:
    """Pairs of options that might begin with the same text; empty proves that every text has one derivation.

    The options of a rule are followed together, letter by letter, as long as two of them can still write the same.
    If they part at every choice (within `room` letters, and before one of them ends), a reader who goes from left to
    right knows each choice from the text that follows, so two derivations never write the same text.
    """
    reader = _Letters(grammar)
    found = []
    for rule in grammar.rules.values():
        together = [("", {place: {reader.begin(option.form)} for place, option in enumerate(rule.options)})]
        while together:
            read, options = together.pop()
            following: dict[str, dict[int, set]] = {}
            for place, rests in options.items():
                for letter, rest in (step for rest in rests for step in reader.steps(rest)):
                    following.setdefault(letter, {}).setdefault(place, set()).add(rest)
            if len(options) > 1 and ("" in following or len(read) >= room):
                found.append(f"{rule.name}: options {sorted(options)} can all begin with {read!r}")
            else:
                together += [(read + letter, group) for letter, group in following.items() if len(group) > 1]
    return found


def symbols(rule: Rule) -> Iterable:
    """Every symbol of every option."""
    return (symbol for option in rule.options for symbol in option.form)


def targets(grammar: Grammar, draw: Draw) -> list[Rule]:
    """All rules that a Draw may draw from."""
    if draw.rule is not None:
        return [draw.rule]
    named = {option.fields.get(draw.via[1]) for rule in grammar.rules.values() for option in rule.options}
    return [grammar.rules[name] for name in sorted(named - {None}) if name in grammar.rules]


class _Expectation:
    """Sums over all derivations. A state maps each fact to its possible options and their probabilities."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        every = [symbol for rule in grammar.rules.values() for symbol in symbols(rule)]
        # facts on which later text depends in another way than by being written: these are enumerated
        self.deciding = {symbol.via[0] for symbol in every if isinstance(symbol, Draw) and symbol.via}
        self.deciding |= {fact for symbol in every if isinstance(symbol, Sum) for fact in (symbol.a, symbol.b)}
        self.known: dict[tuple, tuple[float, float]] = {}
        self.remembers = cache(self._remembers)
        self.reads = cache(self._reads)

    def option(self, options: list[Option]) -> tuple[float, float]:
        """The expectation of a draw among the start's options."""
        return self._mean(options, "", None, {})

    def _mean(self, options: list[Option], fact: str, rest: tuple | None, state: dict[str, Spread]):
        """The expectation of a draw and of everything after it."""
        nats = size = 0.0
        for option in options:
            after = {**state, fact: ((1.0, option),)} if fact else state
            more_nats, more_size = self._follow((option.form, 0, rest), after)
            nats += option.chance * (option.nats + more_nats)
            size += option.chance * more_size
        return nats, size

    def _follow(self, rest: tuple | None, state: dict[str, Spread]) -> tuple[float, float]:
        """The expectation of all that remains; `rest` is (form, index, what comes after that form)."""
        nats = size = 0.0
        while rest is not None:
            form, index, after = rest
            if index == len(form):
                rest = after
                continue
            symbol, rest = form[index], (form, index + 1, after)
            if isinstance(symbol, Draw):
                rule = self.grammar.target(symbol, {name: spread[0][1] for name, spread in state.items()})
                if symbol.fact in self.deciding or self.remembers(rule):
                    key = (rule, symbol.fact, rest, frozenset(state.items()))
                    if key not in self.known:
                        self.known[key] = self._mean(rule.options, symbol.fact, rest, state)
                    more = self.known[key]
                    return nats + more[0], size + more[1]
                more = self._rule(rule, state)
                nats, size = nats + more[0], size + more[1]
                if symbol.fact:
                    state = {**state, symbol.fact: tuple((option.chance, option) for option in rule.options)}
            elif isinstance(symbol, Note):
                state = {**state, symbol.fact: ((1.0, symbol.option),)}
            else:
                size += self._length(symbol, state)
        return nats, size

    def _rule(self, rule: Rule, state: dict[str, Spread]) -> tuple[float, float]:
        """The expectation of a rule that remembers nothing, so that what follows does not depend on it."""
        key = (rule, tuple(state.get(fact) for fact in self.reads(rule)))
        if key not in self.known:
            self.known[key] = self._mean(rule.options, "", None, state)
        return self.known[key]

    def _length(self, symbol: str | Write | Sum, state: dict[str, Spread]) -> float:
        """Mean number of UTF-8 bytes of a symbol without a choice."""
        if isinstance(symbol, str):
            return len(symbol.encode())
        if isinstance(symbol, Sum):
            return len(value(symbol, {fact: state[fact][0][1] for fact in (symbol.a, symbol.b)}))
        return sum(chance * len(option.fields[symbol.field].encode()) for chance, option in state[symbol.fact])

    def _remembers(self, rule: Rule) -> bool:
        """Whether drawing from this rule may leave a fact behind."""
        return any(isinstance(symbol, Note) or (isinstance(symbol, Draw) and (
            symbol.fact or any(self.remembers(target) for target in targets(self.grammar, symbol))))
            for symbol in symbols(rule))

    def _reads(self, rule: Rule) -> tuple[str, ...]:
        """The facts that this rule's text may depend on."""
        facts: set[str] = set()
        for symbol in symbols(rule):
            if isinstance(symbol, Write):
                facts.add(symbol.fact)
            elif isinstance(symbol, Sum):
                facts |= {symbol.a, symbol.b}
            elif isinstance(symbol, Draw):
                facts |= {symbol.via[0]} if symbol.via else set()
                facts |= {fact for target in targets(self.grammar, symbol) for fact in self.reads(target)}
        return tuple(sorted(facts))


class _Letters:
    """What may be written letter by letter. What remains to be written is a chain (part, rest), None at the end.

    Facts count as independent here, so more is possible than the grammar really writes: a clash may be a false alarm,
    but none is missed.
    """

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self.fact = cache(self._fact)
        self.steps = cache(self._steps)

    def begin(self, form: tuple, rest: tuple | None = None) -> tuple | None:
        """The chain of a form in front of another chain."""
        for part in reversed(form):
            rest = (part, rest)
        return rest

    def _steps(self, chain: tuple | None) -> frozenset[tuple[str, tuple | None]]:
        """Every (next letter, what remains after it); ("", None) at the end."""
        if chain is None:
            return frozenset({("", None)})
        part, rest = chain
        if isinstance(part, str):
            return frozenset({(part[0], (part[1:], rest) if part[1:] else rest)})
        if isinstance(part, Draw):
            ways = [self.begin(option.form, rest) for rule in targets(self.grammar, part) for option in rule.options]
        elif isinstance(part, Note):
            ways = [rest]
        else:
            ways = [(text, rest) for text in self._texts(part)]
        return frozenset(step for way in ways for step in self.steps(way))

    def _texts(self, symbol: Write | Sum) -> set[str]:
        """Everything that a symbol without a choice might write."""
        if isinstance(symbol, Sum):
            return set(NUMBERS)
        return {value(symbol, {symbol.fact: option}) for option in self.fact(symbol.fact) if symbol.field in option.fields}

    def _fact(self, fact: str) -> list[Option]:
        """Every option that may be remembered under this name."""
        options = []
        for rule in self.grammar.rules.values():
            for symbol in symbols(rule):
                if isinstance(symbol, Note) and symbol.fact == fact:
                    options.append(symbol.option)
                elif isinstance(symbol, Draw) and symbol.fact == fact:
                    options += [option for target in targets(self.grammar, symbol) for option in target.options]
        return options
