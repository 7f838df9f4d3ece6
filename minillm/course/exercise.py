"""What an exercise is: inputs from a seed, a reference, a tolerance, hints, and the mistakes that people make.

One object serves all three uses: `check` in a notebook, `minillm grade`, and the tests of the course. A function is
called as it is. A class, a hook or an optimizer needs a driver that uses it and returns tensors; a function on ranks
has tests with `ranks`. docs/authoring.md walks through writing one.
"""

import ast
import inspect
import random
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from minillm.course.compare import difference
from minillm.course.grading import protocol
from minillm.course.grading.ranks import on_ranks


class Draw(random.Random):
    """Random inputs from one seed, the same on every machine."""

    def int(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def ints(self, count: int, low: int, high: int) -> list[int]:
        """Some of them."""
        return [self.int(low, high) for _ in range(count)]

    def tensor(self, *shape: int, dtype: str = "float32"):
        """Normally distributed numbers, a torch tensor of this shape."""
        import torch
        generator = torch.Generator().manual_seed(self.int(0, 2**31 - 1))
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


@dataclass(frozen=True)
class Test:
    """One thing that must hold: `cases` inputs drawn by `draw(Draw) -> tuple`. All right earns the points, else nothing."""

    __test__ = False  # not one of pytest's
    name: str
    draw: Callable[[Draw], tuple]
    points: int = 1
    cases: int = 4
    ranks: int = 1


@dataclass(frozen=True)
class Mutant:
    """A wrong solution that people write, and the sentence that names the mistake to them."""

    function: Callable
    says: str


@dataclass(frozen=True)
class Variant:
    """The same exercise under another convention, so that last year's solution earns nothing."""

    says: str
    reference: Callable
    mutants: tuple[Mutant, ...] = ()


def call(answer: Callable, *inputs):
    """The driver of an exercise that is a plain function."""
    return answer(*inputs)


@dataclass(frozen=True)
class Exercise:
    """An exercise. `reference` is a right solution; `driver(answer, *inputs)` uses one (on ranks: `driver(answer, rank,
    *inputs)`), imports what it needs inside, and must not contain the answer, because it runs beside the student's code.

    Raises: ValueError for an exercise that could not be graded fairly, naming it.
    """

    name: str
    lesson: str
    reference: Callable
    tests: tuple[Test, ...]
    mutants: tuple[Mutant, ...]
    hints: tuple[str, ...]
    minutes: int
    difficulty: int = 1
    """1 to 3."""
    why: str = "exact"
    """Why the tolerance is what it is."""
    rtol: float = 0.0
    atol: float = 0.0
    driver: Callable = call
    allows: tuple[str, ...] = ()
    """Modules of minillm that a solution may import; no other can be read where it is graded."""
    packages: tuple[str, ...] = ("torch", "numpy", "einops")
    """Installed packages that it may import."""
    bans: tuple[str, ...] = ()
    """Names that would be the answer, such as torch.nn.functional.scaled_dot_product_attention."""
    seconds: float = 10.0
    """For each call."""
    needs: tuple[str, ...] = ()
    """Exercises of the same notebook whose functions this one calls: while one is wrong, this one is likely to be."""
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tests or not self.mutants or not 1 <= len(self.hints) <= 3:
            raise ValueError(f"exercise {self.name}: it has {len(self.tests)} tests, {len(self.mutants)} mutants and "
                             f"{len(self.hints)} hints; it needs tests, mutants and one to three hints")
        if not self.name.isidentifier():
            raise ValueError(f"exercise {self.name!r}: the name must be that of the function to write")
        if (self.rtol or self.atol) and self.why == "exact":
            raise ValueError(f"exercise {self.name}: rtol {self.rtol} and atol {self.atol} need their reason in `why`")
        if min(test.points for test in self.tests) < 1 or min(test.cases for test in self.tests) < 1:
            raise ValueError(f"exercise {self.name}: each test needs a case and a point")
        if len({test.name for test in self.tests}) < len(self.tests):
            raise ValueError(f"exercise {self.name}: two tests have one name")

    @property
    def points(self) -> int:
        """Of all tests together."""
        return sum(test.points for test in self.tests)

    @property
    def driver_source(self) -> str:
        """The driver's source without annotations: all that is sent to where the student's code runs."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.driver)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.returns, node.decorator_list = None, []
            if isinstance(node, ast.arg):
                node.annotation = None
        return ast.unparse(tree)

    def in_variant(self, name: str | None) -> "Exercise":
        """The exercise under another convention; the usual solution becomes one of its mistakes.

        Raises: ValueError for a variant that there is not.
        """
        if not name:
            return self
        if name not in self.variants:
            raise ValueError(f"{self.name} has no variant {name!r}; it has {', '.join(self.variants) or 'none'}.")
        variant = self.variants[name]
        usual = Mutant(self.reference, f"This is right for the usual version of the exercise. In yours: {variant.says}")
        return replace(self, reference=variant.reference, mutants=(usual, *variant.mutants, *self.mutants), variants={})

    def cases(self, test: Test, seed: str | int) -> list[tuple]:
        """The inputs of a test."""
        draw = Draw(f"{seed}/{self.lesson}/{self.name}/{test.name}")
        return [test.draw(draw) for _ in range(test.cases)]

    def run(self, function: Callable, test: Test, inputs: tuple) -> "Outcome":
        """What a function makes of inputs, which it cannot change for others: it gets copies."""
        inputs = fresh(inputs)
        try:
            if test.ranks > 1:
                value = on_ranks(lambda rank: self.driver(function, rank, *inputs), test.ranks, self.seconds)
            else:
                value = self.driver(function, *inputs)
            return Outcome(value=plain(value))
        except Exception as error:
            return Outcome(raised=error)

    def difference(self, expected: "Outcome", got: "Outcome") -> str | None:
        """In words, or None."""
        if got.raised:
            return f"{type(got.raised).__name__}: {got.raised}"
        return difference(expected.value, got.value, self.rtol, self.atol)


@dataclass(frozen=True)
class Outcome:
    """What a call gave: a plain value, or an exception."""

    value: object = None
    raised: BaseException | None = None

    @property
    def unimplemented(self) -> bool:
        """Whether the function is still the stub."""
        return isinstance(self.raised, NotImplementedError)


def fresh(inputs: tuple) -> tuple:
    """Copies of inputs, tuples and dicts as they are."""
    return tuple(_copy(value) for value in inputs)


def _copy(value):
    if isinstance(value, dict):
        return {key: _copy(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value.clone() if hasattr(value, "clone") else value


def plain(value):
    """A value as it arrives from the sandbox. Raises: TypeError for what cannot be sent."""
    return protocol.decode(protocol.encode(value))


def likely_mistake(exercise: Exercise, test: Test, cases: list[tuple], outcomes: list[Outcome]) -> str | None:
    """What the mutant says that gives the same answers on all these cases; an exception counts by its type."""
    for mutant in exercise.mutants:
        theirs = [exercise.run(mutant.function, test, inputs) for inputs in cases]
        if all(_alike(exercise, one, other) for one, other in zip(theirs, outcomes)):
            return mutant.says
    return None


def _alike(exercise: Exercise, one: Outcome, other: Outcome) -> bool:
    if one.raised or other.raised:
        return type(one.raised) is type(other.raised) and not one.unimplemented
    return difference(one.value, other.value, exercise.rtol, exercise.atol) is None
