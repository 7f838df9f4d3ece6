"""What the documents say to type is typed, in a copy of nothing but their own files, and must print what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.course.grading.sandbox import best_level

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(?:^`(?P<name>[\w./]+)`[^\n]*\n(?:[^\n`][^\n]*\n)*\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(document: Path) -> list[tuple[str, str, str]]:
    """(kind, file name or nothing, text) of each fenced block."""
    return [(m["kind"], m["name"] or "", m["text"]) for m in FENCE.finditer(document.read_text())]


def run(command: str, folder: Path, environment: dict) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.skipif(best_level() == "limits", reason="no sandbox here: apt install bubblewrap")
def test_the_guide_for_authors_does_what_it_says(tmp_path):
    environment = {**os.environ, "MINILLM_PROGRESS": "", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:xdist"}
    (tmp_path / "my_course").mkdir()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    typed = 0
    for kind, name, text in blocks(ROOT / "docs" / "authoring.md"):
        if kind == "python":
            assert name, f"a file without a name above it: {text[:60]}"
            (tmp_path / name).write_text(text)
            continue
        for step in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, printed = step.partition("\n")
            if command.startswith("export "):
                key, value = command.removeprefix("export ").split("=")
                environment[key] = os.pathsep.join(str(tmp_path / part) for part in value.split(":"))
                continue
            assert run(command, tmp_path, environment) == printed, command
            typed += 1
    assert typed == 7
