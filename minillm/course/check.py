"""`check("count_pairs", count_pairs)` in a notebook: what is right, what first differs, the likely mistake, what to try.

The inputs follow from a public seed, so the same answer gets the same words. Results are added to a file of your own
(~/.local/state/minillm/progress.jsonl, or MINILLM_PROGRESS; empty turns it off); nothing leaves the machine.
"""

import html
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minillm.course.exercise import Exercise, Outcome, Test, likely_mistake
from minillm.course.exercises import find_exercise


@dataclass(frozen=True)
class Result:
    """How one test went: None when right, else what is wrong, and the likely mistake."""

    test: Test
    wrong: str | None = None
    mistake: str | None = None


@dataclass(frozen=True)
class Report:
    """What `check` answers: a text, and in Jupyter a box."""

    name: str
    results: tuple[Result, ...] = ()
    unimplemented: bool = False
    needs: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything is right."""
        return bool(self.results) and not any(result.wrong for result in self.results)

    @property
    def points(self) -> int:
        """Points earned."""
        return sum(result.test.points for result in self.results if not result.wrong)

    def lines(self) -> list[str]:
        """The answer, a line for each thing said."""
        if self.unimplemented and self.needs:
            return [f"{self.name}: not yet. It calls your {' and '.join(self.needs)}: write that first."]
        if self.unimplemented:
            return [f"{self.name}: not implemented yet. Replace `raise NotImplementedError()` and run this cell again."]
        total = sum(result.test.points for result in self.results)
        if self.passed:
            return [f"{self.name}: right, {total} of {total} points ({', '.join(r.test.name for r in self.results)})."]
        said = [f"{self.name}: not yet, {self.points} of {total} points."]
        good = [result.test.name for result in self.results if not result.wrong]
        said += [f"Right: {', '.join(good)}."] if good else []
        for result in self.results:
            if result.wrong:
                said.append(f"Wrong: {result.test.name}. {result.wrong}")
                said += [f"Likely: {result.mistake}"] if result.mistake else []
                break  # one thing at a time
        said += [f"It calls your {' and '.join(self.needs)}: mend that first."] if self.needs else []
        return [*said, f'Try hint("{self.name}", 1).']

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        colour, sign = ("#1E7145", "✓") if self.passed else ("#A84A0F", "○")
        first, *rest = [html.escape(line) for line in self.lines()]
        body = "".join(f"<div style='margin:.3em 0 0 1.5em'>{line}</div>" for line in rest)
        return f"<div style='border-left:4px solid {colour};padding:.3em .8em'><b>{sign} {first}</b>{body}</div>"


def check(name: str, answer: Callable, seed: int = 0, variant: str | None = None) -> Report:
    """Try an answer and say how it went. Other seeds draw other inputs.

    Raises: ValueError for a name or a variant that does not exist, TypeError when the answer cannot be called.
    """
    exercise = find_exercise(name).in_variant(variant)
    if not callable(answer):
        raise TypeError(f"check({name!r}, ...) takes the function itself, not {type(answer).__name__} {answer!r:.60}. "
                        f"Write check({name!r}, {name}), without calling it.")
    results = []
    for test in exercise.tests:
        result, stub = _try(exercise, test, answer, seed)
        if stub:
            return _kept(Report(name, unimplemented=True, needs=(stub,) if stub in exercise.needs else ()), exercise)
        results.append(result)
    wrong = [need for need in exercise.needs if any(result.wrong for result in results) and _is_wrong(need, answer, seed)]
    return _kept(Report(name, tuple(results), needs=tuple(wrong)), exercise)


def _is_wrong(name: str, caller: Callable, seed: int) -> bool:
    """Whether a function that the answer calls, found where the answer was defined, fails its own tests."""
    exercise, function = find_exercise(name), getattr(caller, "__globals__", {}).get(name)
    return callable(function) and any(_try(exercise, test, function, seed)[0].wrong for test in exercise.tests)


def _try(exercise: Exercise, test: Test, answer: Callable, seed: int) -> tuple[Result, str]:
    """How a test went, and the name of the function that is still a stub, if one is."""
    cases, outcomes, wrong = exercise.cases(test, seed), [], None
    for inputs in cases:
        expected, got = exercise.run(exercise.reference, test, inputs), exercise.run(answer, test, inputs)
        outcomes.append(got)
        if got.unimplemented:
            return Result(test), _last_frame(got.raised)
        found = exercise.difference(expected, got)
        if found and not wrong:
            wrong = f"For {describe(inputs)}: {found}{_place(got)}."
    mistake = likely_mistake(exercise, test, cases, outcomes) if wrong else None
    return Result(test, wrong, mistake), ""


def describe(inputs: tuple) -> str:
    """Inputs in a line: small ones written out, tensors by their shape."""
    def one(value) -> str:
        if hasattr(value, "shape"):
            return f"a tensor of shape {tuple(value.shape)}"
        text = repr(value)
        return text if len(text) <= 160 else f"{text[:157]}..."
    return ", ".join(map(one, inputs))


def _last_frame(error: BaseException) -> str:
    """The function that an exception came from."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_name


def _place(got: Outcome) -> str:
    """Where in the answer an exception came from: the last line that is not the library's."""
    trace, line = got.raised.__traceback__ if got.raised else None, None
    while trace:
        if not trace.tb_frame.f_code.co_filename.startswith(str(Path(__file__).parents[1])):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line} of your cell)" if line else ""


def hint(name: str, number: int = 1) -> str:
    """A hint, from a nudge (1) to nearly the answer (3). Raises: ValueError for one that there is not."""
    hints = find_exercise(name).hints
    if not 1 <= number <= len(hints):
        raise ValueError(f"{name} has {len(hints)} hints: hint({name!r}, 1) to hint({name!r}, {len(hints)}).")
    return _Hint(f"Hint {number} of {len(hints)}: {hints[number - 1]}")


class _Hint(str):
    """A text that shows itself without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def progress_file() -> Path | None:
    """Where results are kept, or None when that is turned off."""
    home = Path.home() / ".local" / "state" / "minillm" / "progress.jsonl"
    named = os.environ.get("MINILLM_PROGRESS")
    return Path(named) if named else home if named is None else None


def _kept(report: Report, exercise: Exercise) -> Report:
    """Add a result to the file; a folder that cannot be written to is no reason to stop anybody from studying."""
    if path := progress_file():
        line = {"time": int(time.time()), "lesson": exercise.lesson, "exercise": exercise.name, "points": report.points,
                "of": exercise.points, "passed": report.passed}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            pass
    return report
