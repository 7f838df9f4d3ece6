"""What grading costs: a class of 100 with a hostile student in it, and every attack of the tests by itself.

The classmates hand in the solution, a stub, or a wrong one. Prints seconds, and what each attack earned.
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "course" / "grading")]

from hostile import KEY, notebook, solution_cells  # noqa: E402
from test_attacks import ATTACKS, BOMBS, STUBS  # noqa: E402

from minillm.course.exercises import lesson_exercises  # noqa: E402
from minillm.course.grading.batch import grade_all  # noqa: E402
from minillm.course.grading.grade import grade  # noqa: E402
from minillm.course.grading.submission import Submission  # noqa: E402

WRONG = "def merge_pair(ids, pair, new_id):\n    return ids"


def main() -> None:
    """Print the tables."""
    print(f"{'a class of 100':<32}{'seconds':>9}{'  points of the hostile one':<30}{'others as they should be'}")
    for name in (None, "forged frames", "forks", "a daemon that ignores signals"):
        seconds, points, right = a_class(name)
        print(f"{name or 'nobody hostile':<32}{seconds:>9.0f}  {points:<28}{right} of 99")
    print(f"\n{'attack':<34}{'points':>7}{'seconds':>9}")
    for name, cell in {**ATTACKS, **BOMBS}.items():
        started = time.monotonic()
        result = grade(Submission("mallory", notebook(STUBS, cell.replace("PORT", "9"))), lesson_exercises("01"), KEY)
        print(f"{name:<34}{result['points']:>7}{time.monotonic() - started:>9.1f}", flush=True)


def a_class(attack: str | None) -> tuple[float, int, int]:
    """Seconds, what the hostile one earned, and how many of the others got what they deserve."""
    solution = solution_cells()
    # merge_pair is wrong: 2 points for count_pairs, 1 for a first merge that needs no merging
    kinds = {12: notebook(*solution), 0: notebook(STUBS), 3: notebook(*solution[:3], WRONG, *[c for c in solution[3:] if "def merge_pair" not in c])}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given"
        given.mkdir()
        expected = {}
        for number in range(99):
            points = (12, 12, 0, 3)[number % 4]
            expected[f"student{number:02d}"] = points
            (given / f"student{number:02d}.ipynb").write_bytes(kinds[points])
        (given / "student40x.ipynb").write_bytes(notebook(STUBS, {**ATTACKS, **BOMBS}.get(attack, "")))
        started = time.monotonic()
        results = {r["student"]: r.get("points") for r in grade_all(given, "01", Path(folder) / "grades")}
        hostile = results.pop("student40x")
        return time.monotonic() - started, hostile, sum(results[name] == points for name, points in expected.items())


if __name__ == "__main__":
    main()
