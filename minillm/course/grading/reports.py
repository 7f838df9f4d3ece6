"""What grading leaves behind: grades.csv, a page for each student, Gradescope's results.json, a gradebook's columns.

The page and its JSON are for the student: points, tests, known mistakes, hints. What the submission printed is kept apart,
for the instructor, because it may hold the inputs. Formats: Gradescope's autograder documentation; RFC 4180 for CSV.
"""

import csv
import hashlib
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from minillm.course.exercise import Exercise
from minillm.files import write_atomically

COLUMNS = ("student", "verdict", "points", "of", "percent", "seconds")


def file_name(student: str) -> str:
    """A name for a student's files that no student can choose to be somebody else's, or a path."""
    plain = re.sub(r"[^\w.-]+", "_", student).strip(".")[:60] or "student"
    return plain if plain == student else f"{plain}-{hashlib.sha256(student.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def cell(value) -> object:
    """A value for a CSV that no spreadsheet takes for a formula."""
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
        return "'" + value if value[:1] in "=+-@\t\r" and value else value
    return value


def as_csv(rows: Sequence[Sequence]) -> str:
    """Rows as text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[cell(value) for value in row] for row in rows])
    return text.getvalue()


def grades_csv(results: Sequence[Mapping], exercises: Sequence[Exercise]) -> str:
    """A row for each student, a column for each exercise; empty, not 0, where nothing could be said."""
    rows: list[list] = [[*COLUMNS, *(e.name for e in exercises)]]
    for result in sorted(results, key=lambda r: r["student"]):
        points = {e["name"]: e["points"] for e in result["exercises"]}
        total = result.get("points", "")
        percent = round(100 * total / result["of"], 1) if total != "" and result["of"] else ""
        rows.append([result["student"], result["verdict"], total, result["of"], percent, result["seconds"],
                     *(points.get(e.name, "") for e in exercises)])
    return as_csv(rows)


def gradebook_csv(results: Sequence[Mapping], columns: Mapping[str, str]) -> str:
    """The columns that a learning platform wants: its name -> student, points, percent, of or verdict, or a fixed text
    after "=". Raises: ValueError for a field that there is not."""
    fields = {"student", "points", "of", "percent", "verdict"}
    for name, source in columns.items():
        if source not in fields and not source.startswith("="):
            raise ValueError(f"column {name!r} is to hold {source!r}; there are {', '.join(sorted(fields))}, or =some fixed text.")
    rows: list[list] = [list(columns)]
    for result in sorted(results, key=lambda r: r["student"]):
        points = result.get("points", "")
        values = {**result, "points": points, "percent": round(100 * points / result["of"], 1) if points != "" else ""}
        rows.append([source[1:] if source.startswith("=") else values[source] for source in columns.values()])
    return as_csv(rows)


def for_student(result: Mapping) -> dict:
    """What a student may read of a result."""
    if result["verdict"] == "infrastructure":
        return {"student": result["student"], "verdict": "not graded yet", "problems": [], "exercises": []}
    return {key: result[key] for key in ("student", "verdict", "points", "of", "problems", "exercises")}


def feedback_html(result: Mapping, exercises: Sequence[Exercise]) -> str:
    """A page of its own: no script, nothing loaded from elsewhere, every text escaped."""
    shown, hints = for_student(result), {e.name: e.hints for e in exercises}
    e = html.escape
    body = [f"<h1>{e(shown['student'])}</h1>"]
    if "points" in shown:
        body.append(f"<p class=total>{shown['points']} of {shown['of']} points</p>")
    else:
        body.append("<p class=total>Not graded yet: the grader could not be started. This costs you nothing.</p>")
    if shown["problems"]:
        body.append("<h2>While your notebook ran</h2><ul>" + "".join(f"<li>{e(p)}</li>" for p in shown["problems"]) + "</ul>")
    for exercise in shown["exercises"]:
        body.append(f"<h2>{e(exercise['name'])} <small>{exercise['points']} of {exercise['of']}</small></h2><table>")
        for test in exercise["tests"]:
            good = test["points"] == test["of"]
            body.append(f"<tr class={'good' if good else 'bad'}><td>{'✓' if good else '○'}</td><td>{e(test['name'])}</td>"
                        f"<td>{test['points']} of {test['of']}</td><td>{e(test['says'])}</td></tr>")
        body.append("</table>")
        body += [f"<p>{e(exercise['note'])}</p>"] if "note" in exercise else []
        if exercise["points"] < exercise["of"] and hints.get(exercise["name"]):
            body.append(f"<p>Hint: {e(hints[exercise['name']][0])}</p>")
    style = ("body{font:16px/1.5 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
             "h2{margin:1.6em 0 .3em}small{font-weight:normal;color:#555}.total{font-size:1.3em}"
             "table{border-collapse:collapse;width:100%;table-layout:fixed}td{padding:.3em .6em;border-top:1px solid #ddd;vertical-align:top}"
             "td:nth-child(1){width:1.2em}td:nth-child(2){width:13em}td:nth-child(3){width:4em;white-space:nowrap}.good td:first-child{color:#1E7145}.bad td:first-child{color:#A84A0F}")
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{e(shown['student'])}</title><style>{style}</style>"
            f"<body>{''.join(body)}</body></html>\n")


def gradescope(result: Mapping) -> dict:
    """Gradescope's results.json. An infrastructure failure has no score, so that Gradescope shows an error, not a 0."""
    shown = for_student(result)
    tests = [{"name": f"{exercise['name']}: {test['name']}", "score": test["points"], "max_score": test["of"],
              "status": "passed" if test["points"] == test["of"] else "failed", "output": test["says"], "visibility": "visible"}
             for exercise in shown["exercises"] for test in exercise["tests"]]
    made = {"execution_time": result["seconds"], "stdout_visibility": "hidden", "visibility": "visible",
            "output": "\n".join(shown["problems"]), "tests": tests}
    return made | ({"score": shown["points"]} if "points" in shown else {"output": "Not graded yet: the grader could not start."})


def write_feedback(folder: Path, result: Mapping, exercises: Sequence[Exercise], with_gradescope: bool) -> None:
    """The student's files, in feedback/, and what was printed, in instructor/."""
    name = file_name(result["student"])
    for kind in ("feedback", "instructor", *(["gradescope"] if with_gradescope else [])):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "feedback" / f"{name}.json", json.dumps(for_student(result), indent=1))
    write_atomically(folder / "feedback" / f"{name}.html", feedback_html(result, exercises).encode("utf-8", "replace"))
    write_atomically(folder / "instructor" / f"{name}.txt", result["printed"].encode("utf-8", "replace"))
    if with_gradescope:
        (folder / "gradescope" / name).mkdir(exist_ok=True)
        write_atomically(folder / "gradescope" / name / "results.json", json.dumps(gradescope(result), indent=1))
