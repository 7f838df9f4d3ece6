"""check and hint as a student meets them, and the student version of a notebook against nbgrader's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from hostile import KEY, ROOT, grade_cells, notebook, solution_cells

from minillm.course import exercises
from minillm.course.check import check, hint, progress_file
from minillm.course.compare import difference
from minillm.course.exercise import Draw, Exercise, Mutant, Test
from minillm.course.grading.grade import grade
from minillm.course.grading.reports import feedback_html
from minillm.course.grading.sandbox import best_level
from minillm.course.grading.submission import Submission
from minillm.course.student import student_version
from minillm.text.bpe_train import count_pairs

KINDS = Path(__file__).parent / "kinds.py"


@pytest.fixture(autouse=True)
def own_progress(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_PROGRESS", str(tmp_path / "progress.jsonl"))


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setenv("MINILLM_EXERCISES", str(KINDS))
    return {e.name: e for e in exercises.lesson_exercises("99")}


def test_what_is_said(tmp_path):
    assert repr(check("count_pairs", count_pairs)) == "count_pairs: right, 2 of 2 points (one word, many words)."
    wrong = check("count_pairs", lambda words: {pair: 1 for word in words for pair in zip(word, word[1:])})
    assert not wrong.passed and "was expected at [(" in repr(wrong) and 'Try hint("count_pairs", 1).' in repr(wrong)

    def stub(words):
        raise NotImplementedError()
    assert repr(check("count_pairs", stub)).startswith("count_pairs: not implemented yet.")
    broken = repr(check("count_pairs", lambda words: words["x"]))
    assert "KeyError" in broken and "of your cell" in broken and "Traceback" not in broken
    kept = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [line["passed"] for line in kept] == [True, False, False, False] and kept[0]["points"] == kept[0]["of"] == 2


def answers_in_one_notebook(count: str):
    """learn_merges as the solution has it, in a module where count_pairs is this."""
    names = {}
    exec("\n".join(["from collections import Counter", count, *(c for c in solution_cells() if "def merge_pair" in c or "def learn_merges" in c)]), names)
    return names["learn_merges"]


WRONG_COUNT = "def count_pairs(words):\n    return Counter(pair for word in words for pair in zip(word, word[1:]))"
STUB_COUNT = "def count_pairs(words):\n    raise NotImplementedError()"


def test_a_wrong_function_below_is_named():
    said = repr(check("learn_merges", answers_in_one_notebook(WRONG_COUNT)))
    assert "It calls your count_pairs: mend that first." in said and "merge_pair" not in said.split("It calls")[1]
    assert repr(check("learn_merges", answers_in_one_notebook(STUB_COUNT))) == "learn_merges: not yet. It calls your count_pairs: write that first."
    assert check("learn_merges", answers_in_one_notebook(solution_cells()[1])).passed


@pytest.mark.skipif(best_level() == "limits", reason="no sandbox here: apt install bubblewrap")
def test_feedback_names_a_wrong_function_below():
    result = grade_cells(*solution_cells(), WRONG_COUNT, seconds=10)
    notes = {e["name"]: e.get("note") for e in result["exercises"]}
    assert notes == {"count_pairs": None, "merge_pair": None, "encode": None,
                     "learn_merges": "It calls your count_pairs, which lost points too: mend that first."}
    assert "mend that first" in feedback_html(result, exercises.lesson_exercises("01"))


def test_html_escapes_what_students_write():
    box = check("encode", lambda text, merges: "<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in box and "&lt;script&gt;" in box


def test_inputs_cannot_be_changed_for_the_reference():
    def greedy(words):
        found = dict(count_pairs(words))
        words.clear()
        return found
    assert check("count_pairs", greedy).passed


def test_bad_calls():
    with pytest.raises(ValueError, match="Did you mean 'merge_pair'"):
        check("merge_pairs", count_pairs)
    with pytest.raises(TypeError, match="without calling it"):
        check("count_pairs", {})
    with pytest.raises(ValueError, match="has no variant 'x'"):
        check("merge_pair", count_pairs, variant="x")
    with pytest.raises(ValueError, match="has 3 hints"):
        hint("encode", 4)
    assert repr(hint("encode", 1)).startswith("Hint 1 of 3:")


def test_progress_can_be_turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_PROGRESS", "")
    assert progress_file() is None and check("count_pairs", count_pairs).passed
    monkeypatch.setenv("MINILLM_PROGRESS", "/proc/nowhere/progress.jsonl")
    assert check("count_pairs", count_pairs).passed  # nobody is kept from studying by a folder
    monkeypatch.delenv("MINILLM_PROGRESS")
    assert progress_file() == Path.home() / ".local/state/minillm/progress.jsonl"


@pytest.mark.parametrize("name", ["scale_layer", "clip_hook", "momentum_step", "mean_of_all"])
def test_kinds_of_exercises(kinds, name):
    exercise = kinds[name]
    assert check(name, exercise.reference).passed
    for mutant in exercise.mutants:
        report = check(name, mutant.function)
        assert not report.passed and mutant.says in [r.mistake for r in report.results]

    def stub(*args):
        raise NotImplementedError()
    assert check(name, stub).unimplemented


@pytest.mark.skipif(best_level() == "limits", reason="no sandbox here: apt install bubblewrap")
def test_kinds_of_exercises_are_graded(kinds):
    source = KINDS.read_text()
    solved = source[source.index("# a layer"):source.index("EXERCISES")]  # the drivers in it are of no use to anybody
    result = grade(Submission("a", notebook(solved)), list(kinds.values()), KEY)
    assert result.get("points") == result["of"] == 5, result
    wrong = grade(Submission("b", notebook(solved + "\nmean_of_all = sum_of_all\nclip_hook = clip_one_side")), list(kinds.values()), KEY)
    assert wrong.get("points") == 2 and "divide by the number of ranks" in str(wrong["exercises"])
    hung = "def mean_of_all(part):\n    import torch.distributed as dist\n    if dist.get_rank(): dist.barrier()\n    return part"
    last = grade(Submission("c", notebook(solved, hung)), [kinds["mean_of_all"]], KEY)
    assert last.get("points") == 0, last


def test_ranks_really_talk(kinds):
    exercise = kinds["mean_of_all"]
    for test in exercise.tests:
        for inputs in exercise.cases(test, 0):
            means = exercise.run(exercise.reference, test, inputs).value
            # float32: a sum of four numbers in another order
            torch.testing.assert_close(torch.stack(means), torch.stack(inputs[0]).mean(0).expand(test.ranks, -1), rtol=1e-6, atol=1e-6)


def test_files_elsewhere_that_are_none(monkeypatch, tmp_path):
    (tmp_path / "x.py").write_text("y = 1")
    for path in (tmp_path / "x.py", tmp_path / "none.py"):
        monkeypatch.setenv("MINILLM_EXERCISES", str(path))
        with pytest.raises(ValueError, match="must define EXERCISES"):
            exercises.every_exercise()


def test_exercises_that_could_not_be_graded_fairly():
    good = {"name": "f", "lesson": "01", "reference": abs, "tests": (Test("t", lambda d: (d.int(1, 9),)),),
            "mutants": (Mutant(lambda x: x, "no"),), "hints": ("h",), "minutes": 1}
    Exercise(**good)
    for change, why in (({"tests": ()}, "0 tests"), ({"mutants": ()}, "0 mutants"), ({"hints": ("a",) * 4}, "4 hints"),
                        ({"rtol": 1e-3}, "need their reason"), ({"name": "not a name"}, "name of the function|must be that of"),
                        ({"tests": (Test("t", abs, points=0),)}, "a point"), ({"tests": (Test("t", abs), Test("t", abs))}, "one name")):
        with pytest.raises(ValueError, match=why):
            Exercise(**{**good, **change})


@pytest.mark.parametrize(("expected", "got", "said"), [
    (1, 1.0, None), (1, True, "1 was expected, and this is True"), (1.0, float("nan"), "this is nan"), ([1, 2], [1], "2 entries were expected"),
    ([1, 2], [1, 3], "2 was expected at [1], and this is 3"), ({"a": 1}, {}, "the key 'a' is missing"), ({}, {"b": 1}, "should not be there"),
    ("x", None, "this is None"), ({1}, {1}, None), ([float("inf")], [float("inf")], None),
    (torch.zeros(2, 3), torch.zeros(3, 2), "shape (2, 3) was expected, and this is (3, 2)"),
    (torch.zeros(2), torch.zeros(2, dtype=torch.long), "real numbers"), (torch.zeros(2), [0.0, 0.0], None), (torch.tensor(1.0), 1.0, None),
    (torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 2], [3, 5]]), "first at [1, 1]: 4 was expected, and this is 5; index 0"),
    (torch.tensor([float("nan")]), torch.tensor([float("nan")]), None), (torch.tensor([0.0]), torch.tensor([float("nan")]), "this is nan"),
    (torch.tensor([True]), torch.tensor([1]), "booleans"), (2, torch.tensor(2), None)])
def test_differences(expected, got, said):
    found = difference(expected, got)
    assert found is None if said is None else said in found, found


def test_draws_are_the_same_everywhere():
    draw = Draw("a seed")
    assert (draw.ints(5, 0, 9), draw.int(3, 3)) == (Draw("a seed").ints(5, 0, 9), 3)
    assert {Draw(i).int(1, 3) for i in range(99)} == {1, 2, 3}
    assert torch.equal(Draw(1).tensor(3, 2), Draw(1).tensor(3, 2)) and Draw(1).tensor(2, dtype="float64").dtype is torch.float64


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("*.ipynb")), ids=lambda p: p.stem)
def test_nbgrader_makes_the_same_student_version(path, monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    preprocessors = pytest.importorskip("nbgrader.preprocessors", reason="nbgrader is in the extra `teach`")
    theirs, resources = nbformat.read(path, as_version=4), {}
    for name in ("LockCells", "ClearSolutions", "ClearHiddenTests", "ClearOutput", "CheckCellMetadata", "ComputeChecksums"):
        theirs, resources = getattr(preprocessors, name)().preprocess(theirs, resources)
    assert theirs == student_version(nbformat.read(path, as_version=4))


def test_regions_that_are_wrong():
    def made(source, **kind):
        cell = nbformat.v4.new_code_cell(source)
        if kind:
            cell.metadata["nbgrader"] = {"grade_id": "x", "grade": False, "solution": False, "points": 1, **kind}
        return nbformat.v4.new_notebook(cells=[cell])
    for book, why in ((made("### BEGIN SOLUTION\nx"), "has no end"), (made("### BEGIN SOLUTION\n### BEGIN SOLUTION"), "twice"),
                      (made("### BEGIN SOLUTION\n### END SOLUTION"), "not marked as one"),
                      (made("### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS", locked=True), "not marked as one of grading")):
        with pytest.raises(ValueError, match=why):
            student_version(book)
    twice = made("x", solution=True)
    twice.cells.append(twice.cells[0])
    with pytest.raises(ValueError, match="grade_id 'x'"):
        student_version(twice)
    with pytest.raises(ValueError, match="no text followed by"):
        student_version(made("x"), {"merge_pair": "from_the_right"})


def test_check_from_the_command_line():
    def run(*args):
        return subprocess.run([sys.executable, "-m", "minillm", "check", *args], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    good, stub = run("solutions/01_tokenization.ipynb"), run("exercises/01_tokenization.ipynb")
    assert good.returncode == 0 and "12 of 12 points" in good.stdout, good.stderr
    assert stub.returncode == 1 and "Not implemented yet" in stub.stdout and "0 of 12" in stub.stdout
    wrong = run("nothing.ipynb", "--lesson", "01")
    assert wrong.returncode == 2 and "does not exist" in wrong.stderr


@pytest.mark.skipif(best_level() == "limits", reason="no sandbox here: apt install bubblewrap")
def test_forbidden_imports_are_named():
    result = grade_cells("from minillm.text.bpe_train import count_pairs")
    assert "Code cell 1, line 1: minillm.text.bpe_train cannot be used here" in result["problems"][0]
