"""What students hand in: finding it, reading it as data, and its cells as plain Python.

A notebook is JSON here and nothing more. Cells are not identified by metadata, which editors lose: functions are found
by name once the cells have run. Tests, points and outputs in a submission are never looked at.
"""

import ast
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

LARGEST = 20 << 20  # bytes of one notebook
MOST_CELLS = 2_000


class UnreadableError(Exception):
    """A submission that holds no notebook that can be read; the text says why, to the student."""


@dataclass(frozen=True)
class Submission:
    """A student and the notebook's bytes, or why there are none."""

    student: str
    data: bytes = b""
    trouble: str = ""


def find_submissions(path: Path, lesson: str) -> list[Submission]:
    """All below a path: notebooks, zips, or a folder for each student; or one such file.

    Raises: FileNotFoundError, ValueError when nothing is there to grade.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a folder of notebooks, of zips or of students' folders.")
    entries = sorted(p for p in path.iterdir() if not p.name.startswith((".", "__"))) if path.is_dir() else [path]
    found = [submission for entry in entries for submission in _of_entry(entry, lesson)]
    if not found:
        raise ValueError(f"{path} holds no notebook, no zip and no folder with one.")
    return _with_own_names(found)


def _of_entry(entry: Path, lesson: str) -> list[Submission]:
    if entry.is_symlink():
        return [Submission(entry.stem, trouble="is a link to another file; hand in the notebook itself")]
    if entry.is_dir():
        files = [p for p in sorted(entry.rglob("*")) if p.suffix in (".ipynb", ".zip") and not p.is_symlink() and p.is_file()]
        files = [p for p in files if ".ipynb_checkpoints" not in p.parts and "__MACOSX" not in p.parts]
        if len(files) == 1 and files[0].suffix == ".zip":
            return [Submission(entry.name, s.data, s.trouble) for s in _of_zip(files[0], lesson)[:1]]
        return [_choose(entry.name, {p.relative_to(entry).as_posix(): p for p in files if p.suffix == ".ipynb"}, lesson, _read_file)]
    if entry.suffix == ".ipynb":
        return [_choose(entry.stem, {entry.name: entry}, lesson, _read_file)]
    return _of_zip(entry, lesson) if entry.suffix == ".zip" else []


def _of_zip(path: Path, lesson: str) -> list[Submission]:
    """A zip with one notebook is one student's; one with a folder or a file for each student is all of theirs."""
    try:
        archive = zipfile.ZipFile(path)
        names = [n for n in archive.namelist() if n.endswith(".ipynb")
                 and not any(part in (".ipynb_checkpoints", "__MACOSX") for part in n.split("/"))]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return [Submission(path.stem, trouble=f"is no readable zip: {error}")]
    if len(names) > 10_000:
        return [Submission(path.stem, trouble=f"has {len(names):,} notebooks")]
    groups: dict[str, dict[str, str]] = {}
    folders = {name.split("/")[0] for name in names if "/" in name}
    for name in names:
        student = path.stem if len(names) == 1 or len(folders) == 1 and "/" in name else name.removesuffix(".ipynb").split("/")[0]
        groups.setdefault(student, {})[name] = name
    if not groups:
        return [Submission(path.stem, trouble="holds no notebook (.ipynb)")]
    return [_choose(student, files, lesson, lambda name: _read_member(archive, name)) for student, files in groups.items()]


def _choose(student: str, files: dict, lesson: str, read) -> Submission:
    """The one notebook of a student: the only one, or the only one named after the lesson."""
    named = {name: file for name, file in files.items() if lesson in name.split("/")[-1]}
    chosen = files if len(files) == 1 else named
    if len(chosen) != 1:
        which = ", ".join(list(files)[:5]) or "none"
        return Submission(student, trouble=f"needs one notebook named after lesson {lesson}; there are {len(files)}: {which}")
    try:
        return Submission(student, read(next(iter(chosen.values()))))
    except (OSError, UnreadableError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        return Submission(student, trouble=f"cannot be read: {error}")


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return _capped(file)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        return _capped(file)


def _capped(file: io.BufferedIOBase) -> bytes:
    """A zip may promise kilobytes and unpack to gigabytes: no more is read than a notebook may have."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UnreadableError(f"it is larger than {LARGEST >> 20} MB; clear its outputs and save it again")
    return data


def _with_own_names(found: list[Submission]) -> list[Submission]:
    """Two submissions of one name are told apart by a number, so that neither replaces the other."""
    seen: dict[str, int] = {}
    named = []
    for submission in found:
        key = submission.student.casefold()
        seen[key] = seen.get(key, 0) + 1
        name = submission.student if seen[key] == 1 else f"{submission.student} ({seen[key]})"
        named.append(Submission(name, submission.data, submission.trouble))
    return named


def code_cells(data: bytes) -> list[str]:
    """The code cells of a notebook, magics taken out. Raises: UnreadableError, which says what is wrong with the file."""
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
        cells = notebook["cells"]
        sources = [cell["source"] for cell in cells if cell.get("cell_type") == "code"]
        sources = ["".join(source) if isinstance(source, list) else source for source in sources]
        if not all(isinstance(source, str) for source in sources):
            raise TypeError("a cell's source is no text")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UnreadableError(f"The file is no notebook ({type(error).__name__}). Open it in Jupyter, save it, hand it in again.") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableError(f"The notebook has no readable cells ({error}). Save it with Jupyter in format 4.") from None
    if len(sources) > MOST_CELLS:
        raise UnreadableError(f"The notebook has {len(sources):,} code cells; at most {MOST_CELLS:,} are run.")
    return [without_magics(source) for source in sources]


def without_magics(source: str) -> str:
    """The cell as plain Python, every line in its place: %lines and !lines do nothing, other cell magics go whole."""
    lines = source.replace("\0", "").split("\n")
    if lines[0].startswith("%%"):
        if lines[0].split()[0] not in ("%%time", "%%timeit", "%%capture"):
            return ""
        lines[0] = ""
    return "\n".join(re.sub(r"^(\s*)[%!?].*", r"\1pass", line) for line in lines)


def forbidden(cells: list[str], allows: tuple[str, ...], bans: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """What the cells import or name although it would be the answer: (cell, line, name). The sandbox would stop it
    anyway; this is for a clear message."""
    found = []
    for number, source in enumerate(cells):
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module] if node.module != "minillm" else [f"minillm.{alias.name}" for alias in node.names]
            allowed = (*allows, "minillm.course.check")
            found += [(number, node.lineno, name) for name in names if name.split(".")[0] == "minillm" and name not in allowed]
            # a function of the student's own may have the name; what is reached through a module or imported from one is meant
            words = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                words = [alias.name for alias in node.names]
            found += [(number, node.lineno, ban) for ban in bans for word in words if word == ban.split(".")[-1]]
    return found[:20]
