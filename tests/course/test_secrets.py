"""No program that runs where a student's code runs can find the answer. A file of its own, so that it runs beside the others."""

import inspect
import textwrap
from pathlib import Path

import pytest
from hostile import ROOT

from minillm.course.exercises import every_exercise
from minillm.course.grading.sandbox import Worker, best_level

EVERY = every_exercise()
needs_walls = pytest.mark.skipif(best_level() == "limits", reason="no sandbox here: apt install bubblewrap")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    monkeypatch.setenv("MINILLM_PROGRESS", "")


@needs_walls
@pytest.mark.parametrize("name", EVERY)
def test_the_answer_is_nowhere_inside(name):
    """A probe that may do everything that a student's code may: import, read every file, look through objects and memory."""
    exercise = EVERY[name]
    functions = [exercise.reference, *(m.function for m in exercise.mutants), *(t.draw for t in exercise.tests)]
    secrets = set()
    for function in functions:
        source = textwrap.dedent(inspect.getsource(function))
        secrets |= {line.strip() for line in source.splitlines() if len(line.strip()) > 25 and "Test(" not in line and "Mutant(" not in line}
    needles = sorted(s for s in secrets if not s.startswith(("def ", "while at <")))[:40]
    assert needles
    # written so that the probe itself holds no needle in one piece, and the first one is rare, which makes the search fast
    parts = [[n[:-3], n[-3:]] for n in needles]
    modules = [f"minillm.{p.relative_to(ROOT / 'minillm').as_posix().removesuffix('.py').replace('/', '.')}"
               for p in (ROOT / "minillm").rglob("*.py")]
    worker_files = {f"minillm.course.grading.{n}" for n in ("protocol", "ranks", "lockdown", "worker")} | {"minillm.course.check"}
    names = [m.removesuffix(".__init__") for m in modules if m not in worker_files and m not in exercise.allows]
    packages = {m.removesuffix(".__init__") for m in modules if m.endswith("__init__")}
    probe = (Path(__file__).parent / "probe.py").read_text()
    cell = f"PARTS = {parts!r}\nNAMES = {sorted(set(names) - packages)!r}\n{probe}\ndef {exercise.name}(*inputs):\n    return probe()"
    with Worker(exercise.packages, exercise.allows, exercise.bans) as worker:
        assert worker.load([cell], {exercise.name: "def drive(answer, *inputs):\n    return answer(*inputs)"})["problems"] == []
        answer = worker.call(exercise.name, (), 1, 120)
    found = answer["result"]
    assert found["looked at"] > 500 and found["regions"] > 5, found
    assert found["control"], "the probe finds nothing at all"
    assert found["imports"] == [] and found["files"] == [] and found["memory"] == [], found
