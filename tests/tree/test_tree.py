"""The rules, applied to this repository."""

import ast
import json
import subprocess
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import rules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "minillm").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))


def below(path: Path) -> str:
    return path.relative_to(ROOT / "minillm").as_posix()


def complain(check, paths=PACKAGE):
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in paths for line, what in check(path)]
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_check():
    assert len(PACKAGE) > 30 and len(NOTEBOOKS) >= 2


def test_imports_go_down_only():
    complain(lambda path: rules.wrong_layers(below(path).split("/")[0].removesuffix(".py"), path.read_text()))


@pytest.mark.parametrize("rule", ["too_long", "unpickles", "late_annotations"])
def test_rule(rule):
    complain(lambda path: getattr(rules, rule)(path.read_text()))


def test_what_is_public_is_documented():
    """Mutants apart: the sentence beside each one, which the student reads, says what it does."""
    complain(lambda path: rules.undocumented(path.read_text()), [p for p in PACKAGE if below(p) == "course/exercises/__init__.py" or not below(p).startswith("course/exercises/")])


def test_only_commands_print():
    complain(lambda path: rules.prints(path.read_text()), [p for p in PACKAGE if below(p) not in rules.SPEAKING])


def test_the_package_stays_small():
    lines = sum(path.read_text().count("\n") for path in PACKAGE if not below(path).startswith("course/"))
    assert lines <= rules.ALL_LINES, f"{lines} lines"


def listed_files():
    """What git knows or would take; without git (an unpacked archive), what is not built or hidden."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines()]
    built = {"runs", "build", "__pycache__", "minillm.egg-info"}
    return [path for path in ROOT.rglob("*") if path.is_file()
            and not any(part in built or part.startswith(".") for part in path.relative_to(ROOT).parts)]


def test_nothing_unfinished_and_no_path_of_a_machine():
    text = (".py", ".md", ".toml", ".ipynb", ".yml", ".txt", "Makefile", ".json", ".cfg")
    paths = [path for path in listed_files() if path.name.endswith(text) and path.exists()]
    assert len(paths) > 50
    complain(lambda path: rules.unfinished_or_local(path.read_text(encoding="utf-8")), paths)


def test_no_function_is_written_twice():
    seen: dict[str, str] = {}
    twice = []
    for path in [*PACKAGE, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for body, name in rules.function_bodies(path.read_text()).items():
            place = f"{path.relative_to(ROOT)}: {name}"
            if body in seen:
                twice.append(f"{place} has the body of {seen[body]}")
            seen[body] = place
    assert not twice, "\n".join(twice)


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_notebooks_are_stored_as_they_should_be(path):
    stored, raw = nbformat.read(path, as_version=4), json.loads(path.read_text())
    nbformat.validate(stored)
    assert rules.notebook_faults(raw, least_words=600 if path in NOTEBOOKS else 300) == []
    assert rules.missing_pictures(raw) == []
    assert rules.stale_parts(stored) == []
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_redefine_nothing(path):
    # what the exercises ask for is the reader's to write
    modules = [module for module in PACKAGE if module.parent.name != "exercises"]
    public = {node.name for module in modules for node in ast.parse(module.read_text()).body
              if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")}
    found = [f"{cell['id']}: {what}" for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
             for _, what in rules.redefined(cell.source, public)]
    assert not found, found


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and finds only the first of two."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_links_lead_somewhere():
    def broken(path):
        text = path.read_text()
        if path.suffix == ".ipynb":
            text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
        return [(line, f"{target} does not exist") for line, target in rules.local_links(text)
                if not (path.parent / target.partition("#")[0]).exists()]

    complain(broken, [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS, *SOLUTIONS])
