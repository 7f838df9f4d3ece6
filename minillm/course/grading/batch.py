"""Grading all submissions: several at a time, from where it stopped, one student's trouble never another's.

Every result is written as soon as it is known, and a later run takes it over if submission, exercises, variant and key are
the same. Results that say "infrastructure" are tried again.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from minillm.course.exercise import Exercise
from minillm.course.exercises import lesson_exercises
from minillm.course.grading import reports
from minillm.course.grading.grade import grade
from minillm.course.grading.sandbox import WARNING, best_level
from minillm.course.grading.submission import Submission, find_submissions
from minillm.files import write_atomically
from minillm.progress import bar, say


def exercises_for(lesson: str, variants: Mapping[str, str]) -> list[Exercise]:
    """A lesson's exercises, each in its variant if it has one. Raises: ValueError for names that there are not."""
    exercises = lesson_exercises(lesson)
    if unknown := set(variants) - {e.name for e in exercises}:
        raise ValueError(f"variants are given for {', '.join(sorted(unknown))}; lesson {lesson} has "
                         f"{', '.join(e.name for e in exercises)}.")
    return [e.in_variant(variants.get(e.name)) for e in exercises]


def read_key(path: Path) -> bytes:
    """The secret of a grading; made, for nobody else to read, if there is none. Raises: ValueError if it is too short."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    key = path.read_bytes().strip()
    if len(key) < 16:
        raise ValueError(f"The key in {path} has {len(key)} bytes and could be guessed: use at least 16, or delete it to get a new one.")
    return key


def grade_all(submissions: Path, lesson: str, out: Path, *, key: Path | None = None, variants: Mapping[str, str] | None = None,
              jobs: int | None = None, level: str | None = None, with_gradescope: bool = False,
              gradebook: Mapping[str, str] | None = None) -> list[dict]:
    """Grade everything below `submissions` into `out`, and return the results by student.

    Raises: FileNotFoundError, ValueError for paths, lessons, variants and columns that make no sense, before any work.
    """
    variants = dict(variants or {})
    exercises, found = exercises_for(lesson, variants), find_submissions(submissions, lesson)
    reports.gradebook_csv([], gradebook or {})
    out.mkdir(parents=True, exist_ok=True)
    secret = read_key(key or out / "key")
    level = level or best_level()
    if WARNING[level]:
        say(f"Warning: {WARNING[level]}")
    stamp = _stamp(exercises, variants, secret)
    results, waiting = {}, []
    for submission in found:
        kept = _kept(out, submission, stamp)
        results |= {submission.student: kept} if kept else {}
        waiting += [] if kept else [submission]
    if results:
        say(f"{len(results)} of {len(found)} are graded already.")
    with bar("grade", total=len(found), unit="submission", start=len(results)) as progress:
        for result in _graded(waiting, lesson, variants, secret, level, jobs or max(1, os.cpu_count() or 1)):
            results[result["student"]] = result
            _keep(out, result | {"stamp": stamp})
            progress.update()
    ordered = [results[submission.student] for submission in found]
    for result in ordered:
        reports.write_feedback(out, result, exercises, with_gradescope)
    write_atomically(out / "grades.csv", reports.grades_csv(ordered, exercises))
    if gradebook:
        write_atomically(out / "gradebook.csv", reports.gradebook_csv(ordered, gradebook))
    return ordered


def _stamp(exercises: Sequence[Exercise], variants: Mapping, key: bytes) -> str:
    """Changes when a result would: with the exercises' files, the variants or the key."""
    files = sorted({e.reference.__code__.co_filename for e in exercises} | {t.draw.__code__.co_filename for e in exercises for t in e.tests})
    parts = [Path(name).read_bytes() for name in files if Path(name).exists()]
    return hashlib.sha256(b"\0".join([*parts, json.dumps(variants, sort_keys=True).encode(), key])).hexdigest()


def _result_file(out: Path, student: str) -> Path:
    return out / "results" / f"{reports.file_name(student)}.json"


def _kept(out: Path, submission: Submission, stamp: str) -> dict | None:
    """An earlier result that still holds."""
    try:
        result = json.loads(_result_file(out, submission.student).read_text())
        same = (result["stamp"], result["submission"], result["student"]) == (
            stamp, hashlib.sha256(submission.data).hexdigest(), submission.student)
        return result if same and result["verdict"] == "graded" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(out: Path, result: Mapping) -> None:
    path = _result_file(out, result["student"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result))


def _graded(submissions: Sequence[Submission], lesson: str, variants: dict, key: bytes, level: str, jobs: int):
    """Results as they come, from processes that do nothing else. One that dies takes no result with it."""
    left = {submission.student: submission for submission in submissions}
    for last_try in (False, True):
        if not left:
            return
        try:
            with ProcessPoolExecutor(min(jobs, len(left)), mp_context=get_context("spawn")) as pool:
                futures = [pool.submit(_grade_one, s, lesson, variants, key, level) for s in left.values()]
                for future in as_completed(futures):
                    result = future.result()
                    again = result["verdict"] == "infrastructure" and not last_try
                    if not again:
                        del left[result["student"]]
                        yield result
        except BrokenProcessPool:
            if last_try:
                break
    for submission in left.values():
        yield {"student": submission.student, "submission": "", "of": 0, "problems": [], "exercises": [], "printed": "",
               "verdict": "infrastructure", "trouble": "the grading process died twice", "seconds": 0.0}


def _grade_one(submission: Submission, lesson: str, variants: dict, key: bytes, level: str) -> dict:
    return grade(submission, exercises_for(lesson, variants), key, level)
