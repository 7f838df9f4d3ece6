"""All exercises, by name. Each file beside this one has those of one lesson, in a list named EXERCISES.

More can be had from files elsewhere (an instructor's own): their paths in MINILLM_EXERCISES, separated as in PATH.
"""

import difflib
import importlib.util
import os
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from minillm.course.exercise import Exercise


def every_exercise() -> dict[str, Exercise]:
    """All by name, in the order of lessons. Raises: ValueError when two have one name, or a file cannot be used."""
    return dict(_collect(os.environ.get("MINILLM_EXERCISES", "")))


@cache
def _collect(elsewhere: str) -> dict[str, Exercise]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    modules += [_load(Path(path)) for path in elsewhere.split(os.pathsep) if path]
    found: dict[str, Exercise] = {}
    for exercise in sorted((e for module in modules for e in module.EXERCISES), key=lambda e: e.lesson):
        if exercise.name in found:
            raise ValueError(f"Two exercises are named {exercise.name}, in lessons {found[exercise.name].lesson} and "
                             f"{exercise.lesson}: rename one, with its function.")
        found[exercise.name] = exercise
    return found


def _load(path: Path) -> ModuleType:
    try:
        spec = importlib.util.spec_from_file_location(f"exercises_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _ = module.EXERCISES
    except (OSError, AttributeError, ImportError) as error:
        raise ValueError(f"{path} in MINILLM_EXERCISES is no file of exercises: {error}. It must define EXERCISES.") from error
    return module


def find_exercise(name: str) -> Exercise:
    """By name. Raises: ValueError that suggests the nearest."""
    known = every_exercise()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(f"There is no exercise {name!r}." + (f" Did you mean {near[0]!r}?" if near else
                         f" There are: {', '.join(known)}."))
    return known[name]


def lesson_exercises(lesson: str) -> list[Exercise]:
    """Those of a lesson, "01". Raises: ValueError when it has none."""
    found = [e for e in every_exercise().values() if e.lesson == lesson]
    if not found:
        have = sorted({e.lesson for e in every_exercise().values()})
        raise ValueError(f"Lesson {lesson!r} has no exercises; these have: {', '.join(have)}.")
    return found
