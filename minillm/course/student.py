"""`make exercises`: the notebooks that students get, made from those with the solutions.

The format is nbgrader's: a region between ### BEGIN SOLUTION and ### END SOLUTION becomes a stub, one between ### BEGIN
HIDDEN TESTS and ### END HIDDEN TESTS goes, outputs go, cells that belong to the grading are locked and get nbgrader's
checksum, so its own tools work on both. Left out: everything of nbgrader's that needs its database.
"""

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbformat import v4

from minillm.course.exercises import find_exercise
from minillm.files import write_atomically

STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")


def exercise_cells(name: str, text: str, solution: str) -> list[nbformat.NotebookNode]:
    """The three cells of an exercise in a notebook of solutions: the task, the function, its check.

    `solution` is the function with its ### BEGIN SOLUTION and ### END SOLUTION; `text` gets minutes and points put before it.
    Raises: ValueError for an exercise that there is not, or a solution without a region.
    """
    exercise = find_exercise(name)
    if not _replace_region(solution, "SOLUTION", STUB)[1]:
        raise ValueError(f"The solution of {name} has no region between ### BEGIN SOLUTION and ### END SOLUTION.")
    call = f'check("{name}", {name}'
    tests = f"{call})\n### BEGIN HIDDEN TESTS\nassert {call}, seed=1).passed\n### END HIDDEN TESTS"
    cells = [v4.new_markdown_cell(f"*{exercise.minutes} minutes, {exercise.points} points.* {text}"),
             v4.new_code_cell(solution), v4.new_code_cell(tests)]
    common = {"schema_version": 3, "task": False}
    cells[1].metadata["nbgrader"] = {"grade_id": name, "solution": True, "grade": False, "locked": False, **common}
    cells[2].metadata["nbgrader"] = {"grade_id": f"{name}-test", "solution": False, "grade": True, "locked": True,
                                     "points": exercise.points, **common}
    return [nbformat.from_dict(cell) for cell in cells]


def student_version(notebook: nbformat.NotebookNode, variants: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """The notebook without solutions, hidden tests and outputs; `variants` maps exercises to a variant's name.

    Raises: ValueError for regions that do not close or stand in the wrong cell, for a grade id given twice, and for a
    variant that there is not.
    """
    notebook = copy.deepcopy(notebook)
    seen: set[str] = set()
    for cell in notebook.cells:
        _clear(cell, seen)
    for name, variant in (variants or {}).items():
        _tell_variant(notebook, name, variant)
    for cell in notebook.cells:
        if "nbgrader" in cell.metadata:
            _lock(cell)
    return notebook


def _clear(cell: nbformat.NotebookNode, seen: set[str]) -> None:
    """Empty one cell of what a student should not see, in place."""
    kind = cell.metadata.get("nbgrader", {})
    name = kind.get("grade_id")
    if name in seen:
        raise ValueError(f"Two cells have the grade_id {name!r}; each needs its own.")
    seen |= {name} if name else set()
    cell.source, solved = _replace_region(cell.source, "SOLUTION", STUB)
    if solved and not kind.get("solution"):
        raise ValueError(f"A solution stands in a cell that is not marked as one: {cell.source[:80]!r}. Set "
                         "metadata.nbgrader.solution to true there.")
    if kind.get("solution") and not solved:
        cell.source = "\n".join(STUB) if cell.cell_type == "code" else "YOUR ANSWER HERE"
    cell.source, hidden = _replace_region(cell.source, "HIDDEN TESTS", ())
    if hidden and not kind.get("grade"):
        raise ValueError(f"Hidden tests stand in a cell that is not marked as one of grading: {cell.source[:80]!r}. Set "
                         "metadata.nbgrader.grade to true there.")
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None


def _replace_region(source: str, kind: str, stub: tuple[str, ...]) -> tuple[str, bool]:
    """The source with the stub in the place of a region, indented like its first line; and whether there was one."""
    kept, inside, found = [], False, False
    for line in source.split("\n"):
        if f"BEGIN {kind}" in line:
            if inside:
                raise ValueError(f"### BEGIN {kind} twice, without an end between: {source[:80]!r}")
            inside = found = True
            indent = re.match(r"\s*", line).group()
            kept += [indent + text for text in stub]
        elif f"END {kind}" in line:
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise ValueError(f"### BEGIN {kind} has no end: {source[:80]!r}")
    return "\n".join(kept), found


def _tell_variant(notebook: nbformat.NotebookNode, name: str, variant: str) -> None:
    """Write a variant's convention below the exercise's text, and name it in its check."""
    find_exercise(name).in_variant(variant)
    says = find_exercise(name).variants[variant].says
    places = [i for i, cell in enumerate(notebook.cells) if cell.metadata.get("nbgrader", {}).get("grade_id") == name]
    if not places or places[0] == 0 or notebook.cells[places[0] - 1].cell_type != "markdown":
        raise ValueError(f"This notebook has no text followed by a cell with the grade_id {name!r}, to write the variant into.")
    notebook.cells[places[0] - 1].source += f"\n\n**In this version:** {says}"
    for cell in notebook.cells:
        cell.source = cell.source.replace(f'check("{name}", {name})', f'check("{name}", {name}, variant="{variant}")')


def _lock(cell: nbformat.NotebookNode) -> None:
    """What nbgrader's LockCells and ComputeChecksums do."""
    kind = cell.metadata.nbgrader
    grade, solution = bool(kind.get("grade")), bool(kind.get("solution"))
    locked = not solution and (grade or bool(kind.get("locked")))
    if solution or locked:
        cell.metadata["deletable"] = False
        if locked:
            cell.metadata["editable"] = False
        parts = [cell.source, cell.cell_type, str(grade), str(solution), str(locked), kind.grade_id]
        parts += [str(float(kind.points))] if grade else []
        kind["checksum"] = hashlib.md5("".join(parts).encode()).hexdigest()
        kind["cell_type"] = cell.cell_type


def generate(solutions: Path, out: Path, variants: Mapping[str, str] | None = None, lesson: str = "*") -> list[Path]:
    """Write the student version of each notebook of a folder; those written. Raises: ValueError when there is none."""
    sources = sorted(Path(solutions).glob(f"{lesson}_*.ipynb"))
    if not sources:
        raise ValueError(f"{solutions} has no notebook named {lesson}_*.ipynb.")
    written = []
    for path in sources:
        made = student_version(nbformat.read(path, as_version=4), variants)
        written.append(Path(out) / path.name)
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(written[-1], nbformat.writes(made, version=4) + "\n")
    return written

