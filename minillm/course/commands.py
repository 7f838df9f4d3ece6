"""The commands of a teacher and of a student: `minillm exercises | check | grade`. minillm/cli.py has the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Exercises:
    """Write the notebooks that students get, from those with the solutions."""

    out: Path = Path("exercises")
    """The folder to write them into."""
    lesson: str = "*"
    """One lesson, such as 01; all by default."""
    variant: tuple[str, ...] = ()
    """Another convention for an exercise, as exercise=variant; grade with the same."""
    solutions: Path = Path("solutions")
    """The folder of the notebooks with the solutions."""

    def run(self) -> int:
        """Print what was written."""
        from minillm.course.student import generate
        for path in generate(self.solutions, self.out, _pairs("--variant", self.variant), self.lesson):
            print(path)
        return 0


@dataclass
class Check:
    """Try a notebook's answers, as `check` in it does, without opening it: 0 when all are right, 1 when not."""

    notebook: Annotated[Path, tyro.conf.Positional]
    """The notebook with your answers."""
    lesson: str | None = None
    """Its lesson; by default the number that its name begins with."""
    variant: tuple[str, ...] = ()
    """The convention that your version asks for, as exercise=variant."""

    def run(self) -> int:
        """Print the result of each test."""
        from minillm.course.grading.batch import exercises_for
        from minillm.course.grading.grade import grade
        from minillm.course.grading.submission import find_submissions
        lesson = self.lesson or self.notebook.name[:2]
        exercises = exercises_for(lesson, _pairs("--variant", self.variant))
        result = grade(find_submissions(self.notebook, lesson)[0], exercises, b"everybody's own inputs")
        if result["verdict"] == "infrastructure":
            raise OSError(result["trouble"])
        for line in result["problems"]:
            print(line)
        for exercise in result["exercises"]:
            print(f"{exercise['name']}: {exercise['points']} of {exercise['of']} points")
            for test in exercise["tests"]:
                print(f"  {'right' if test['points'] else 'not yet'}: {test['name']}" + (f". {test['says']}" if test["says"] else ""))
            if "note" in exercise:
                print(f"  {exercise['note']}")
        print(f"{result['points']} of {result['of']} points")
        return 0 if result["points"] == result["of"] else 1


@dataclass
class Grade:
    """Grade submissions: each in a sandbox, on inputs of its own, with feedback for each student."""

    submissions: Annotated[Path, tyro.conf.Positional]
    """A folder of notebooks, of zips, or of a folder for each student; or one such file."""
    lesson: str
    """The lesson whose exercises they are, such as 01."""
    out: Path = Path("grades")
    """Where grades.csv, feedback/ and instructor/ go. Run again, it goes on where it stopped."""
    key: Path | None = None
    """The file of the secret that inputs are drawn from; made in --out by default. The same key gives the same grading."""
    variant: tuple[str, ...] = ()
    """The convention that this class was given, as exercise=variant."""
    jobs: int | None = None
    """Submissions at a time; as many as there are cores by default."""
    gradescope: bool = False
    """Write Gradescope's results.json for each student, too."""
    gradebook: tuple[str, ...] = ()
    """Columns of a gradebook.csv, as name=field, with a field of student, points, of, percent, verdict, or "name==text"."""

    def run(self) -> int:
        """Grade; print a summary. 1 when some could not be graded and should be tried again."""
        from minillm.course.grading.batch import grade_all
        results = grade_all(self.submissions, self.lesson, self.out, key=self.key, variants=_pairs("--variant", self.variant),
                            jobs=self.jobs, with_gradescope=self.gradescope, gradebook=_pairs("--gradebook", self.gradebook))
        failed = [r for r in results if r["verdict"] == "infrastructure"]
        unreadable = [r["student"] for r in results if r["verdict"] == "unreadable"]
        print(f"{len(results) - len(failed)} of {len(results)} graded; see {self.out / 'grades.csv'} and {self.out / 'feedback'}.")
        if unreadable:
            print(f"Could not be read, 0 points: {', '.join(unreadable)}. Their feedback says why.")
        if failed:
            print(f"Not graded: {', '.join(r['student'] for r in failed)}. {failed[0]['trouble']}\nRun the command again to try them.")
        return 1 if failed else 0


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """name=value arguments as a dict. Raises: ValueError for one without a name or a value."""
    for text in given:
        if not all(text.partition("=")[::2]):
            raise ValueError(f"{option} {text!r}: write it as name=value.")
    return dict(text.split("=", 1) for text in given)
