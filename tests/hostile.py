"""What the tests of grading share: notebooks made from cells, answers to lesson 01, and a watch over the outside."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

from minillm.course.exercises import lesson_exercises
from minillm.course.grading import grade as grading
from minillm.course.grading.submission import Submission

ROOT = Path(__file__).resolve().parents[1]
KEY = b"a key for the tests only"


def notebook(*cells: str, **more) -> bytes:
    """A notebook of these code cells, as bytes."""
    made = [{"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None} for source in cells]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **more}).encode()


def solution_cells(lesson: str = "01") -> list[str]:
    """The code cells of a lesson's solution."""
    path = next((ROOT / "solutions").glob(f"{lesson}_*.ipynb"))
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def quick_exercises(seconds: float = 2.0):
    """Lesson 01's, with little patience."""
    return [replace(e, seconds=seconds) for e in lesson_exercises("01")]


def grade_cells(*cells: str, student: str = "mallory", level=None, **limits) -> dict:
    """Grade a notebook of these cells against lesson 01."""
    return grading.grade(Submission(student, notebook(*cells)), quick_exercises(**limits), KEY, level)


def points(result: dict) -> dict[str, int]:
    """Exercise -> points."""
    return {e["name"]: e["points"] for e in result["exercises"]}


def strangers() -> set[str]:
    """Processes of users that only workers become, and all whose command line speaks of the grading worker."""
    listed = subprocess.run(["ps", "-eo", "pid,uid,stat,args"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    found = set()
    for line in listed:
        pid, uid, stat, args = line.split(None, 3)
        if not stat.startswith("Z") and int(pid) != os.getpid():
            if 61_184 <= int(uid) < 65_184 or "minillm.course.grading.worker import main" in args:
                found.add(f"{pid} {args[:80]}")
    return found
