"""What must hold for every exercise of every lesson, without anybody having to remember it."""

import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
import torch
from hostile import KEY, ROOT, notebook

from minillm.course.check import check
from minillm.course.exercise import Outcome
from minillm.course.exercises import every_exercise, find_exercise, lesson_exercises
from minillm.course.grading.grade import grade
from minillm.course.grading.sandbox import best_level
from minillm.course.grading.submission import Submission
from minillm.course.student import student_version

EVERY = every_exercise()
LESSONS = sorted({e.lesson for e in EVERY.values()})
needs_walls = pytest.mark.skipif(best_level() == "limits", reason="no sandbox here: apt install bubblewrap")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    monkeypatch.setenv("MINILLM_PROGRESS", "")


def solution(lesson: str) -> Path:
    elsewhere = [Path(path).parent for path in os.environ.get("MINILLM_EXERCISES", "").split(os.pathsep) if path]
    found = {path for folder in (ROOT, *elsewhere) for path in (folder / "solutions").glob(f"{lesson}_*.ipynb")}
    assert len(found) == 1, f"lesson {lesson} has exercises and {len(found)} solutions/{lesson}_*.ipynb"
    return found.pop()


def function_names(cells) -> set[str]:
    return {node.name for cell in cells if cell.cell_type == "code" for node in ast.parse(cell.source).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@needs_walls
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_solution_earns_everything_and_a_stub_nothing(lesson):
    exercises = lesson_exercises(lesson)
    data = solution(lesson).read_bytes()
    full = grade(Submission("solved", data), exercises, KEY)
    assert full["points"] == full["of"] > 0 and full["problems"] == [], full
    stub = nbformat.writes(student_version(nbformat.reads(data.decode(), 4))).encode()
    empty = grade(Submission("stub", stub), exercises, KEY)
    assert empty["points"] == 0 and empty["problems"] == [], empty
    assert {t["says"] for e in empty["exercises"] for t in e["tests"]} == {"Not implemented yet."}


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_notebook_and_the_exercises_say_the_same(lesson):
    cells = nbformat.read(solution(lesson), as_version=4).cells
    marked = {c.metadata.nbgrader.grade_id: c for c in cells if "nbgrader" in c.metadata}
    for exercise in lesson_exercises(lesson):
        assert exercise.name in function_names([marked[exercise.name]])
        test = marked[f"{exercise.name}-test"]
        assert test.metadata.nbgrader.points == exercise.points
        assert f'check("{exercise.name}", {exercise.name})' in test.source.split("\n")[0]
        assert f'assert check("{exercise.name}", {exercise.name}, seed=1).passed' in test.source
        text = cells[cells.index(marked[exercise.name]) - 1].source
        assert f"*{exercise.minutes} minutes, {exercise.points} points.*" in text
    assert {n.removesuffix("-test") for n in marked} == {e.name for e in lesson_exercises(lesson)}


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_students_version_is_up_to_date(lesson):
    path = solution(lesson)
    made = nbformat.writes(student_version(nbformat.read(path, as_version=4)), version=4) + "\n"
    assert (path.parents[1] / "exercises" / path.name).read_text() == made, "run make exercises"
    assert "BEGIN" not in made and "HIDDEN" not in made


def test_nothing_in_exercises_is_without_a_source():
    assert {p.name for p in (ROOT / "exercises").glob("*.ipynb")} == {p.name for p in (ROOT / "solutions").glob("*.ipynb")}


def _seeds():
    """Each exercise with three seeds; where ranks have to be started, two of them are for make test-all."""
    for name, exercise in EVERY.items():
        slow = any(test.ranks > 1 for test in exercise.tests)
        yield from (pytest.param(name, seed, marks=[pytest.mark.slow] * (slow and seed > 0)) for seed in range(3))


@pytest.mark.parametrize(("name", "seed"), list(_seeds()))
def test_every_mutant_is_caught_and_named(name, seed):
    exercise = EVERY[name]
    assert len(exercise.mutants) >= 2
    for mutant in exercise.mutants:
        report = check(name, mutant.function, seed=seed)
        wrong = [r for r in report.results if r.wrong]
        assert wrong, f"not caught: {mutant.says}"
        assert mutant.says in [r.mistake for r in wrong], f"not named: {mutant.says}; said {[r.mistake for r in wrong]}"


@pytest.mark.parametrize("name", EVERY)
def test_a_shape_alone_earns_nothing(name):
    """Answers with everything right but the values: zeros, ones, the inputs themselves, nothing."""
    exercise = EVERY[name]

    def blank(value, fill):
        if isinstance(value, torch.Tensor):
            return torch.full_like(value, fill)
        if isinstance(value, dict):
            return {k: blank(v, fill) for k, v in value.items()}
        if isinstance(value, list):
            return [blank(v, fill) for v in value]
        return type(value)(fill) if isinstance(value, bool | int | float) else value

    for test in exercise.tests:
        for seed in range(3):
            cases = exercise.cases(test, seed)
            expected = [exercise.run(exercise.reference, test, inputs) for inputs in cases]
            assert not any(e.raised for e in expected), expected
            for lazy in (lambda i, e: blank(e, 0), lambda i, e: blank(e, 1), lambda i, e: None, lambda i, e: [], lambda i, e: {},
                         *[lambda i, e, n=n: i[n] for n in range(len(cases[0]))]):
                got = [Outcome(value=lazy(inputs, e.value)) for inputs, e in zip(cases, expected)]
                assert any(exercise.difference(e, g) for e, g in zip(expected, got)), f"{name}: {test.name} can be had for nothing"


@pytest.mark.parametrize("name", [n for n, e in EVERY.items() if e.needs])
def test_what_an_exercise_needs_comes_before_it(name):
    order = [e.name for e in lesson_exercises(EVERY[name].lesson)]
    assert all(order.index(need) < order.index(name) for need in EVERY[name].needs)


@pytest.mark.parametrize("name", EVERY)
def test_seeds_draw_different_inputs_and_the_same_seed_the_same(name):
    exercise = EVERY[name]
    for test in exercise.tests:
        assert repr(exercise.cases(test, "a")) == repr(exercise.cases(test, "a")) != repr(exercise.cases(test, "b"))


@pytest.mark.parametrize("name", [n for n, e in EVERY.items() if e.variants])
def test_a_variant_pays_only_its_own_solution(name):
    for variant in EVERY[name].variants:
        exercise = EVERY[name].in_variant(variant)
        assert check(name, exercise.reference, variant=variant).passed
        usual = check(name, EVERY[name].reference, variant=variant)
        wrong = [r for r in usual.results if r.wrong]
        assert wrong and any(exercise.variants == {} and "usual version" in (r.mistake or "") for r in wrong)
        data = student_version(nbformat.read(solution(exercise.lesson), as_version=4), {name: variant})
        text = nbformat.writes(data)
        assert "In this version" in text and f'variant=\\"{variant}\\"' in text


def test_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'count_pairs'"):
        find_exercise("count_pair")
    with pytest.raises(ValueError, match="these have: 00, 01"):
        lesson_exercises("77")


@needs_walls
def test_a_submission_without_metadata_is_graded_by_names():
    cells = [json.loads(solution("01").read_text())["cells"][i]["source"] for i in (1, 3, 6, 9, 12)]
    assert grade(Submission("x", notebook(*["".join(c) for c in cells])), lesson_exercises("01"), KEY)["points"] == 12
