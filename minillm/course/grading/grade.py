"""Grading one submission: fresh inputs, calls into the sandbox, comparison here.

Points are given only for answers that arrived and are right. An exercise whose function hangs or dies is over; the others
go on in a new process. Whatever the student gets to read names tests, points and known mistakes, never an input.
"""

import builtins
import hashlib
import hmac
import time
from collections.abc import Sequence
from itertools import groupby

from minillm.course.compare import difference
from minillm.course.exercise import Exercise, Outcome, Test, likely_mistake
from minillm.course.grading.sandbox import InfrastructureError, Worker, WorkerGone
from minillm.course.grading.submission import Submission, UnreadableError, code_cells, forbidden

MOST_SECONDS = 240  # for one submission, besides starting
LOAD_SECONDS = 30  # for running its cells


def seed_for(key: bytes, student: str) -> str:
    """A student's own seed: nobody can guess it without the key, and the key gives it again."""
    return hmac.new(key, student.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def grade(submission: Submission, exercises: Sequence[Exercise], key: bytes, level: str | None = None) -> dict:
    """The result of one submission, ready for JSON.

    "verdict" is graded, unreadable (the file is none that can be graded: 0 points) or infrastructure (nothing can be said
    yet: no points field at all). "printed" is for the instructor alone.
    """
    started = time.monotonic()
    result = {"student": submission.student, "submission": hashlib.sha256(submission.data).hexdigest(),
              "of": sum(e.points for e in exercises), "problems": [], "exercises": [], "printed": ""}
    try:
        if submission.trouble:
            raise UnreadableError(f"The submission {submission.trouble}.")
        cells = code_cells(submission.data)
        result["problems"] = _problems(cells, exercises)
        seed = seed_for(key, submission.student)
        for (allows, packages, bans), group in groupby(exercises, key=lambda e: (e.allows, e.packages, e.bans)):
            run = _Run(cells, list(group), seed, {"allows": allows, "packages": packages, "bans": bans, "level": level},
                       started + MOST_SECONDS)
            result["exercises"] += run.grade()
            result["problems"] += [p for p in run.problems if p not in result["problems"]]
            result["printed"] += run.printed
        _say_what_to_mend_first(result["exercises"], exercises)
        result |= {"verdict": "graded", "points": sum(e["points"] for e in result["exercises"])}
    except UnreadableError as error:
        result |= {"verdict": "unreadable", "points": 0, "problems": [str(error)], "exercises": [_nothing(e) for e in exercises]}
    except InfrastructureError as error:
        result |= {"verdict": "infrastructure", "exercises": [], "trouble": str(error)}
    return result | {"seconds": round(time.monotonic() - started, 2)}


def _problems(cells: list[str], exercises: Sequence[Exercise]) -> list[str]:
    allows = tuple({name for e in exercises for name in e.allows})
    bans = tuple({name for e in exercises for name in e.bans})
    return [f"Code cell {cell + 1}, line {line}: {name} cannot be used here, because it holds an answer. Write your own."
            for cell, line, name in forbidden(cells, allows, bans)]


def _say_what_to_mend_first(results: list[dict], exercises: Sequence[Exercise]) -> None:
    """A note on an exercise that lost points and calls a function that lost some too."""
    lost = {r["name"] for r in results if r["points"] < r["of"]}
    for result, exercise in zip(results, exercises):
        if first := [need for need in exercise.needs if need in lost and result["name"] in lost]:
            result["note"] = f"It calls your {' and '.join(first)}, which lost points too: mend that first."


def _nothing(exercise: Exercise) -> dict:
    tests = [{"name": t.name, "points": 0, "of": t.points, "says": "Not tried."} for t in exercise.tests]
    return {"name": exercise.name, "points": 0, "of": exercise.points, "tests": tests}


class _Run:
    """The exercises of a submission that share what they allow, in as few processes as it takes."""

    def __init__(self, cells: list[str], exercises: list[Exercise], seed: str, walls: dict, deadline: float):
        self.cells, self.exercises, self.seed, self.walls, self.deadline = cells, exercises, seed, walls, deadline
        self.worker: Worker | None = None
        self.problems: list[str] = []
        self.only_definitions, self.unloadable = False, ""
        self.printed = ""

    def grade(self) -> list[dict]:
        """The results of all its exercises. Raises: InfrastructureError."""
        try:
            return [self._exercise(exercise) for exercise in self.exercises]
        finally:
            self._stop()

    def _start(self) -> None:
        """A worker with the student's cells loaded; if running them all ends it, with their definitions only.

        Raises: WorkerGone when that ends it too, and from then on at once.
        """
        if self.unloadable:
            raise WorkerGone(self.unloadable)
        drivers = {e.name: e.driver_source for e in self.exercises}
        for definitions_only in (False, True):
            if self.only_definitions and not definitions_only:
                continue
            self._stop()
            self.worker = Worker(**self.walls)
            if not self.worker.held["user"]:
                raise InfrastructureError("the worker could not give up root's rights. Grade as an ordinary user.")
            try:
                loaded = self.worker.load(self.cells, drivers, definitions_only, min(LOAD_SECONDS, self._left()))
            except WorkerGone as error:
                self._stop()
                self.only_definitions, self.unloadable = True, f"running your cells, {error}" if definitions_only else ""
                self.problems = [f"Running your cells, {error}; so only their imports, functions, classes and assignments were run."]
            else:
                self.problems = self.problems[:1] + _load_problems(loaded.get("problems"), len(self.cells))
                return
        raise WorkerGone(self.unloadable)

    def _stop(self) -> None:
        if self.worker:
            self.printed += self.worker.printed()
            self.worker.stop()
            self.worker = None

    def _left(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    def _exercise(self, exercise: Exercise) -> dict:
        tests, gone = [], ""
        for test in exercise.tests:
            says = gone
            if not gone:
                try:
                    if self.worker is None:
                        self._start()
                    says = self._test(exercise, test)
                except WorkerGone as error:
                    says = f"Your code was stopped: {error}."
                    gone = "Not tried, because your code was stopped in a test before this one."
                    self._stop()
            tests.append({"name": test.name, "points": 0 if says else test.points, "of": test.points, "says": says})
        return {"name": exercise.name, "points": sum(t["points"] for t in tests), "of": exercise.points, "tests": tests}

    def _test(self, exercise: Exercise, test: Test) -> str:
        """What is wrong, for the student to read; nothing when all is right. Raises: WorkerGone."""
        cases, outcomes, right = exercise.cases(test, self.seed), [], True
        for inputs in cases:
            answer = self.worker.call(exercise.name, inputs, test.ranks, min(exercise.seconds, self._left()))
            if answer.get("missing") is True:
                return f"There is no function {exercise.name} in the notebook."
            if answer.get("unimplemented") is True:
                return "Not implemented yet."
            outcomes.append(_outcome(answer))
            expected = exercise.run(exercise.reference, test, inputs)
            right = right and not expected.raised and not outcomes[-1].raised and difference(
                expected.value, outcomes[-1].value, exercise.rtol, exercise.atol) is None
        if right:
            return ""
        mistake = likely_mistake(exercise, test, cases, outcomes)
        raised = next((outcome.raised for outcome in outcomes if outcome.raised), None)
        says = f"It raises {raised}." if raised else "Some answers are wrong."
        return f"{says} {mistake}" if mistake else f'{says} Try check("{exercise.name}", {exercise.name}) in the notebook, and its hints.'


def _outcome(answer: dict) -> Outcome:
    """An answer as the comparison wants it. Exceptions keep only their built-in type and place: words could hold inputs."""
    if "result" in answer:
        return Outcome(value=answer["result"])
    if "raised" in answer:
        kind = getattr(builtins, str(answer["raised"]), None)
        kind = kind if isinstance(kind, type) and issubclass(kind, BaseException) else Exception
        place = answer.get("place")
        known = isinstance(place, list) and len(place) == 2 and all(type(n) is int and 0 <= n < 100_000 for n in place)
        where = f" in line {place[1]} of code cell {place[0] + 1}" if known else ""
        return Outcome(raised=_raised(kind, f"{kind.__name__}{where}"))
    return Outcome(raised=TypeError("TypeError: its answer is no number, text, list, dict or tensor"))


def _raised(kind: type[BaseException], text: str) -> BaseException:
    """An exception of a type that may want other arguments, such as UnicodeDecodeError."""
    try:
        return kind(text) if kind is not KeyError else LookupError(text)
    except TypeError:
        return Exception(text)


def _load_problems(problems, cells: int) -> list[str]:
    """What went wrong while the cells ran, as far as it can be believed."""
    said = []
    for entry in problems[:20] if isinstance(problems, list) else []:
        if isinstance(entry, list) and len(entry) == 3 and all(type(n) is int for n in entry[:2]) and 0 <= entry[0] < cells:
            kind = entry[2] if isinstance(getattr(builtins, str(entry[2]), None), type) else "an error"
            said.append(f"Code cell {entry[0] + 1}, line {min(abs(entry[1]), 99_999)}: {kind}")
    return said
