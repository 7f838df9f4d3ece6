"""The rules, applied to this repository."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import rules

ROOT = Path(__file__).resolve().parents[2]


def files_of(root):
    """Paths below a folder that belong to the project: what git tracks or would offer to track; without git, all but
    what .gitignore names."""
    try:
        listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True).stdout
    except FileNotFoundError:
        listed = b""
    names = [name for name in listed.decode().split("\0") if name]
    if not names:
        patterns = (root / ".gitignore").read_text().split()
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
        names = [name for name in names if not rules.ignored(name, patterns)]
    return sorted(path for name in set(names) if (path := root / name).is_file())


def text_of(path):
    """A file's text, nothing for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


FILES = files_of(ROOT)
PYTHON = [path for path in FILES if path.suffix == ".py"]
PACKAGE = [path for path in PYTHON if path.is_relative_to(ROOT / "minillm")]
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
SPOKEN = [path for path in FILES if path.suffix in (".md", ".yml", ".toml", ".cfg", ".txt", ".sh")
          or path.name in ("Makefile", "run", "LICENSE")]


def below(path: Path) -> str:
    return path.relative_to(ROOT / "minillm").as_posix()


def complain(check, paths=PACKAGE):
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in paths for line, what in check(path)]
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_check():
    assert len(PACKAGE) > 30 and len(NOTEBOOKS) >= 2 and len(FILES) > 100
    assert {"Makefile", "README.md", ".ci/run", ".gitignore"} <= {path.relative_to(ROOT).as_posix() for path in FILES}


@pytest.mark.parametrize("git", [True, False], ids=["with git", "without git"])
def test_files_are_found_with_and_without_git(tmp_path, monkeypatch, git):
    (tmp_path / ".gitignore").write_text(".venv/\n/runs/\n*.tmp\n")
    for name in ("a.py", "b.tmp", ".venv/c.py", "runs/d.json", "minillm/runs/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    if git:
        if shutil.which("git") is None:
            pytest.skip("git is not installed")
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    else:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert [path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path)] == [".gitignore", "a.py", "minillm/runs/e.py"]


def test_imports_go_down_only():
    complain(lambda path: rules.wrong_layers(below(path).split("/")[0].removesuffix(".py"), text_of(path)))


@pytest.mark.parametrize("rule", ["too_long", "undocumented", "unpickles", "late_annotations"])
def test_rule(rule):
    complain(lambda path: getattr(rules, rule)(text_of(path)))


def test_only_commands_print():
    complain(lambda path: rules.prints(text_of(path)), [p for p in PACKAGE if below(p) not in rules.SPEAKING])


def test_the_package_stays_small():
    assert rules.too_much({below(path): text_of(path) for path in PACKAGE}) == []


def test_nothing_unfinished_and_no_path_of_a_machine():
    complain(lambda path: rules.unfinished_or_local(text_of(path)), FILES)


def test_the_project_speaks_of_itself_alone():
    complain(lambda path: rules.about_its_making(rules.prose(text_of(path))), SPOKEN)
    complain(lambda path: rules.about_its_making(rules.comments(text_of(path))), PYTHON)
    complain(lambda path: [(f"{cell} line {line}", what) for cell, line, said in rules.cell_words(json.loads(text_of(path)))
                           for _, what in rules.about_its_making([(line, said)])], NOTEBOOKS)


def test_no_function_is_written_twice():
    found = rules.repeated({path.relative_to(ROOT).as_posix(): text_of(path) for path in PYTHON})
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_they_should_be(path):
    raw = json.loads(text_of(path))
    for rule in (rules.invalid, rules.notebook_faults, rules.missing_pictures, rules.widgets_alone):
        assert rule(raw) == [], path
    assert rules.stale_parts(nbformat.read(path, as_version=4)) == [], path
    assert rules.too_heavy(path.stat().st_size) == [], path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_redefine_nothing(path):
    public = {node.name for module in PACKAGE for node in ast.parse(text_of(module)).body
              if isinstance(node, rules.Function | ast.ClassDef) and not node.name.startswith("_")}
    complain(lambda path: [(f"{cell.id} line {line}", what) for cell in nbformat.read(path, as_version=4).cells
                           if cell.cell_type == "code" for line, what in rules.redefined(cell.source, public)], [path])


def test_links_lead_somewhere():
    def broken(path):
        text = path.read_text()
        if path.suffix == ".ipynb":
            text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
        return [(line, f"{target} does not exist") for line, target in rules.local_links(text)
                if not (path.parent / target.partition("#")[0]).exists()]

    complain(broken, [*(path for path in FILES if path.suffix == ".md"), *NOTEBOOKS])
